"""What tests/test_gpu_gemm.py proves, as functions that run in Triton's interpreter or, on torch's device, on a GPU."""

import pytest
import torch
import triton

from tessera import formats
from tessera.kernels import reference as ref
from tessera.kernels.gpu import block_scaled, int8_gemm, weight_only

INTERPRETED = triton.knobs.runtime.interpret
TOLERANCE = 4e-7 if INTERPRETED else 4e-6  # relative L2 of fp32 results: the order of sums, how tensor cores align them


def relative(found, expected):
    assert found.shape == expected.shape, f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
    assert torch.isfinite(found.float()).all(), "an output was never written, or read something that is not there"
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


class Poisoned:
    """torch.empty gives NaN: an output that a kernel does not write is seen."""

    def __enter__(self):
        self.empty = torch.empty
        torch.empty = lambda *shape, dtype, device=None: torch.full(
            shape, float("nan") if dtype.is_floating_point else -77, dtype=dtype, device=device
        )

    def __exit__(self, *_):
        torch.empty = self.empty


def branch(m, n, rank, dtype):
    return torch.randn(m, rank).to(dtype), (torch.randn(n, rank) / rank**0.5).to(dtype)


def product(t, up):
    return t.float() @ up.float().T


def rows(m, n, k, per_row=True):
    """Quantized activations and weight of random numbers."""
    q, x_scale = ref.quantize_rows(torch.randn(m, k))
    fmt = formats.INT8(per_row=per_row)
    stored = fmt.encode(torch.randn(n, k))
    return q, x_scale, stored.qdata, stored.scale


def int8_is_exact(m, n, k, per_row):
    torch.manual_seed(m + n + k)
    q, x_scale, weight, scale = rows(m, n, k, per_row)
    with Poisoned():
        found = int8_gemm.int8_gemm(q, x_scale, weight, scale, out_dtype=torch.float32)
    assert torch.equal(found, ref.int8_product(q, x_scale, weight, scale))


def int8_epilogue(m, n, k, rank, dtype, with_bias):
    torch.manual_seed(m + n + k + rank)
    q, x_scale, weight, scale = rows(m, n, k)
    t, up = branch(m, n, rank, dtype)
    bias = torch.randn(n).to(dtype) if with_bias else None
    with Poisoned():
        found = int8_gemm.int8_gemm(q, x_scale, weight, scale, bias, t, up, torch.float32)
    expected = ref.int8_product(q, x_scale, weight, scale) + product(t, up) + (bias.float() if with_bias else 0)
    assert relative(found, expected) < TOLERANCE


def int8_rounds_once(dtype):
    """Where the fp32 result is known, the output is that result in `dtype`. The interpreter truncates to bf16."""
    torch.manual_seed(0)
    q, x_scale, weight, scale = rows(33, 40, 64)
    with Poisoned():
        found = int8_gemm.int8_gemm(q, x_scale, weight, scale, out_dtype=dtype)
    expected = ref.int8_product(q, x_scale, weight, scale)
    if dtype == torch.bfloat16 and INTERPRETED:
        expected = (expected.view(torch.int32) & -65536).view(torch.float32)
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


def packed(kind, n, k, spread=1.0):
    """(arguments of weight_only_gemm, decoded weight in fp64) of a random weight."""
    weight = torch.randn(n, k) * torch.exp(spread * torch.randn(n, k))
    if kind == "fp8_row":
        scale = weight.abs().amax(1, keepdim=True) / ref.E4M3_MAX
        codes = (weight / scale).to(torch.float8_e4m3fn)
        return ("fp8_row", codes, scale), codes.double() * scale.double()
    fmt = formats.parse({"int8_scalar": "int8"}.get(kind, kind))
    stored = fmt.encode(weight)
    entries = fmt.pack(stored)
    name = {"int8_scalar": "int8", "int8_row": "int8", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8"}.get(kind, kind)
    if kind == "nvfp4":
        scales = entries["weight_scale_2"], entries["weight_scale"]
    elif kind == "mxfp8":
        scales = None, entries["weight_scale"]
    else:
        scales = (entries["weight_scale"],)
    return (name, entries["weight"], *scales), fmt.decode(stored).double()


def weight_only_is_exact(kind, m, n, k, dtype):
    torch.manual_seed(m + n + k)
    arguments, decoded = packed(kind, n, k)
    x = torch.randn(m, k).to(dtype)
    with Poisoned():
        found = weight_only.weight_only_gemm(x, *arguments, out_features=n, out_dtype=torch.float32)
    assert relative(found, x.double() @ decoded.T) < TOLERANCE


def weight_only_decodes_every_code(kind):
    """x = identity shows the decoded weight itself: the same fp32 numbers as the reference, bit for bit."""
    codes = torch.arange(256, dtype=torch.uint8)
    n, k = 40, 256
    if kind == "nvfp4":
        packed_codes = codes.repeat(n, 1)[:, : k // 2]
        packed_codes[1::2] = codes[128:]
        block = torch.randint(0, 127, (n, k // 16), dtype=torch.uint8)  # 127 is NaN; every other scale
        stored = ref.swizzle(block).view(torch.float8_e4m3fn)
        rows_padded = ref.pad_to(packed_codes, 48, k // 2)
        arguments = ("nvfp4", rows_padded, torch.tensor(1.0), stored)
        expected = ref.decode_rows("nvfp4", rows_padded, torch.tensor(1.0), stored, slice(0, n), k)
    else:
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN
        block = torch.randint(110, 140, (n, k // 32), dtype=torch.uint8)
        block[0] = 0
        qdata = ref.pad_to(codes.repeat(n, 1), 64, k).view(torch.float8_e4m3fn)
        arguments = ("mxfp8", qdata, None, ref.swizzle(block))
        expected = ref.decode_rows("mxfp8", qdata, ref.swizzle(block), None, slice(0, n), k)
    for m in (3, k):  # the GEMV and the GEMM
        x = torch.eye(k)[:m].bfloat16()
        with Poisoned():
            found = weight_only.weight_only_gemm(x, *arguments, out_features=n, out_dtype=torch.float32)
        assert torch.equal(found, expected[:, :m].T)


def weight_only_epilogue(kind, m, n, k, rank, dtype):
    torch.manual_seed(m + n + k + rank)
    arguments, decoded = packed(kind, n, k)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    t, up = branch(m, n, rank, dtype)
    with Poisoned():
        found = weight_only.weight_only_gemm(
            x, *arguments, bias=bias, t=t, up=up, out_features=n, out_dtype=torch.float32
        )
    assert relative(found, x.double() @ decoded.T + t.double() @ up.double().T + bias.double()) < TOLERANCE


def block_scaled_is_exact(kind, m, n, k, rank, sm):
    """MXFP8 through the interpreter's dot_scaled; NVFP4 through `explicit_dot`, as that one reads its scales wrongly.

    Proven for both: addresses, masks, unswizzled scales, the order of codes within a byte, the epilogue.
    """
    torch.manual_seed(m + n + k + rank)
    if INTERPRETED:
        block_scaled.capability = lambda _: sm
    elif torch.cuda.get_device_capability() != sm:
        pytest.skip(f"needs SM {sm[0]}.{sm[1]}")
    operands = [packed(kind, m, k), packed(kind, n, k)]
    (_, a, a_global, a_scale), (_, b, b_global, b_scale) = (arguments for arguments, _ in operands)
    t, up = branch(m, n, rank, torch.bfloat16) if rank else (None, None)
    bias = torch.randn(n) if rank else None
    gemm = {"nvfp4": block_scaled.nvfp4_gemm, "mxfp8": block_scaled.mxfp8_gemm}[kind]
    with Poisoned():
        found = gemm(a, a_scale, b, b_scale, (a_global, b_global), bias, t, up, torch.float32, rows=m, out_features=n)
    expected = operands[0][1] @ operands[1][1].T
    if rank:
        expected = expected + product(t, up) + bias
    assert relative(found, expected) < TOLERANCE


def no_rows_give_no_rows():
    q, x_scale, weight, scale = rows(2, 24, 32)
    found = int8_gemm.int8_gemm(q[:0], x_scale[:0], weight, scale)
    assert found.shape == (0, 24) and found.dtype == torch.bfloat16
    arguments, _ = packed("nvfp4", 24, 32)
    found = weight_only.weight_only_gemm(torch.zeros(0, 32, dtype=torch.float16), *arguments, out_features=24)
    assert found.shape == (0, 24) and found.dtype == torch.float16
