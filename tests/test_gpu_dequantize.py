"""Weights decoded by our kernels are the reference's, bit for bit, at SM 8.0 as at 12.0: fp8 is decoded by its bits."""

import os

import pytest
import torch

pytest.importorskip("triton")

import interpreted
from tessera.formats import INT8, MXFP8, NVFP4, Quantized
from tessera.kernels import reference as ref

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"


def compiled_or_interpreted(test):
    """Runs on a GPU, or in the process that the test below starts."""
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETING, reason="no GPU")(test))


SHAPES = ((1, 16), (63, 80), (130, 320), (5, 90))
# The interpreter truncates where a GPU rounds: there only fp32 is compared
DTYPES = (torch.float32,) if DEVICE == "cpu" else (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.skipif(INTERPRETING, reason="is the interpreter")
def test_kernels_keep_their_promises_in_the_interpreter():
    interpreted.run(__file__)


@pytest.mark.skipif(INTERPRETING, reason="needs no interpreter")
@pytest.mark.parametrize("scale", (1.0, 1e-6, 1e-30))
def test_quotient_by_a_rounded_reciprocal_is_the_ieee_quotient(scale):
    """What `divide` in bits.py computes where fma rounds once: on the CPU only float64 can stand for it."""
    generator = torch.Generator().manual_seed(0)
    divisor = (torch.rand(1_000_000, generator=generator) + 1.0) * scale
    x = torch.randn(1_000_000, generator=generator) * 50 * divisor
    x[::2] = torch.randint(-254, 255, (500_000,), generator=generator) / 2.0 * divisor[::2]  # around rounding ties
    inverse = 1.0 / divisor
    q = x * inverse
    rest = x.double() - q.double() * divisor.double()  # exact
    assert torch.equal((q.double() + rest * inverse.double()).float(), x / divisor)


@pytest.mark.skipif(INTERPRETING, reason="needs no interpreter")
def test_a_float_is_the_sum_of_three_bf16():
    """What `rotate_64` in rotation.py does to fp32, so that its products are exact."""
    bits = torch.randint(
        -(2**31), 2**31 - 1, (1_000_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32
    )
    x = bits.view(torch.float32)
    x = x[x.isfinite() & (x.abs() > 1e-30)]

    def high(v):
        return (v.view(torch.int32) & -65536).view(torch.float32)

    parts = high(x), high(x - high(x)), x - high(x) - high(x - high(x))
    assert all(torch.equal(part.bfloat16().float(), part) for part in parts)
    assert torch.equal(sum(part.double() for part in parts), x.double())


@pytest.fixture
def kernels(monkeypatch):
    """The launchers; outputs start as NaN."""
    from tessera.kernels.gpu import dequantize

    monkeypatch.setattr(dequantize, "_empty", interpreted.poisoned)
    return dequantize


def weight(*shape):
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(*shape, generator=generator) * torch.exp(torch.randn(shape[0], 1, generator=generator))


def to_device(packed):
    return {name: tensor.to(DEVICE) for name, tensor in packed.items()}


def assert_decoded(y, expected, dtype):
    assert y.dtype == dtype
    assert torch.equal(y.cpu(), expected.to(dtype))


@compiled_or_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nvfp4_decodes_as_the_reference(kernels, shape, dtype):
    quantized = NVFP4().encode(weight(*shape))
    p = to_device(NVFP4().pack(quantized))
    y = kernels.dequantize_nvfp4(p["weight"], p["weight_scale"], p["weight_scale_2"], *shape, dtype)
    assert_decoded(y, NVFP4().decode_rows(quantized), dtype)


@compiled_or_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mxfp8_decodes_as_the_reference(kernels, shape, dtype):
    quantized = MXFP8().encode(weight(*shape))
    p = to_device(MXFP8().pack(quantized))
    assert_decoded(
        kernels.dequantize_mxfp8(p["weight"], p["weight_scale"], *shape, dtype), MXFP8().decode_rows(quantized), dtype
    )


@compiled_or_interpreted
def test_every_code_under_every_scale_decodes_as_the_reference(kernels):
    """All 16 x 256 pairs of NVFP4 and all 256 x 255 of MXFP8, NaN and subnormal ones included; 255 is no scale."""
    codes = torch.arange(16, dtype=torch.uint8).expand(256, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1)
    quantized = Quantized(codes, torch.tensor(0.75), scales.view(torch.float8_e4m3fn))
    p = to_device(NVFP4().pack(quantized))
    y = kernels.dequantize_nvfp4(p["weight"], p["weight_scale"], p["weight_scale_2"], 256, 16, torch.float32).cpu()
    torch.testing.assert_close(y, NVFP4().decode_rows(quantized), rtol=0, atol=0, equal_nan=True)

    codes = torch.arange(256, dtype=torch.uint8).expand(255, 256).contiguous().view(torch.float8_e4m3fn)
    scales = torch.arange(255, dtype=torch.uint8).view(255, 1).expand(255, 8).contiguous()
    quantized = Quantized(codes, block_scale=scales)
    p = to_device(MXFP8().pack(quantized))
    y = kernels.dequantize_mxfp8(p["weight"], p["weight_scale"], 255, 256, torch.float32).cpu()
    torch.testing.assert_close(y, MXFP8().decode_rows(quantized), rtol=0, atol=0, equal_nan=True)


@compiled_or_interpreted
def test_an_extension_behind_the_weight_is_left_out(kernels):
    """The packed columns and their tiles of scales may be wider than the weight, as with a reserved branch."""
    wide = weight(40, 144)
    quantized = NVFP4().encode(wide)
    p = to_device(NVFP4().pack(quantized))
    y = kernels.dequantize_nvfp4(p["weight"], p["weight_scale"], p["weight_scale_2"], 33, 70, torch.float32)
    view = p["weight"][:33, :40]
    assert torch.equal(y, kernels.dequantize_nvfp4(view, p["weight_scale"], p["weight_scale_2"], 33, 70, torch.float32))
    assert_decoded(y, NVFP4().decode_rows(quantized)[:33, :70], torch.float32)
    quantized = MXFP8().encode(wide)
    p = to_device(MXFP8().pack(quantized))
    y = kernels.dequantize_mxfp8(p["weight"], p["weight_scale"], 33, 70, torch.float32)
    assert_decoded(y, MXFP8().decode_rows(quantized)[:33, :70], torch.float32)


@compiled_or_interpreted
@pytest.mark.parametrize("per_row", (True, False))
@pytest.mark.parametrize(
    ("group", "shape"), ((0, (17, 100)), (4, (3, 12)), (16, (33, 80)), (64, (63, 320)), (256, (5, 512)))
)
def test_int8_is_rotated_back_with_one_rounding(kernels, group, shape, per_row):
    """Against float64: a rotated row of codes is a whole number, so only the scale rounds."""
    fmt = INT8(per_row=per_row, convrot=group > 0, convrot_groupsize=group)
    quantized = fmt.encode(weight(*shape))
    p = to_device(fmt.pack(quantized))
    y = kernels.dequantize_int8(p["weight"], p["weight_scale"], group, torch.float32).cpu()
    sums = quantized.qdata.float()
    exact = ref.rotate(sums, group) if group else sums  # whole numbers over a power of two: exact in fp32
    assert_decoded(y, exact * quantized.scale, torch.float32)
    torch.testing.assert_close(y, fmt.decode_rows(quantized), rtol=1e-5, atol=float(quantized.scale.max()) * 1e-4)


@compiled_or_interpreted
def test_no_rows_give_an_empty_weight(kernels):
    empty = torch.empty(0, 64, dtype=torch.int8, device=DEVICE)
    assert kernels.dequantize_int8(empty, torch.empty(0, 1, device=DEVICE), 64, torch.bfloat16).shape == (0, 64)


@compiled_or_interpreted
def test_a_group_without_a_kernel_is_refused_by_name(kernels):
    with pytest.raises(ValueError, match="convrot group 1024: the kernel rotates groups of 0, 4, 16, 64, 256"):
        kernels.dequantize_int8(torch.zeros(2, 1024, dtype=torch.int8), torch.ones(2, 1), 1024, torch.float32)
