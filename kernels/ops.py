"""Kernels as torch.library operations: on CUDA our Triton, elsewhere the reference, whole for torch.compile and graphs.

Each has a fake, so that tracing sees shapes only; none waits for the device. Optional tensors are None.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from . import cpu
from . import reference as ref

MAX_RANK = 256  # of a branch that our kernels take into their own sweep or epilogue
PADS = {"nvfp4": (16, 16), "mxfp8": (32, 32), "fp8_row": (1, 1)}  # of rows and columns, in an operand


@torch.library.custom_op("tessera::int8_linear_cpu", mutates_args=())
def int8_linear_cpu(x: Tensor, weight: Tensor, scale: Tensor, group: int, bias: Tensor | None, down: Tensor | None,
                    strength: Tensor | None, up: Tensor | None, code_max: int) -> Tensor:  # fmt: skip
    """x [M, in] times an int8 weight [out, in] on the CPU, by the way that `cpu.choose` says, plus branch; [M, out]."""
    t = None if down is None else cpu.branch_middle(x, down, strength)
    return cpu.int8_linear(x, weight, scale, group, bias, t, up, code_max)


@int8_linear_cpu.register_fake
def _(x, weight, scale, group, bias, down, strength, up, code_max):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("tessera::decoded_linear_cpu", mutates_args=())
def decoded_linear_cpu(x: Tensor, kind: str, qdata: Tensor, scale: Tensor, block_scale: Tensor | None, n: int,
                       group: int, bias: Tensor | None, down: Tensor | None, strength: Tensor | None,
                       up: Tensor | None) -> Tensor:  # fmt: skip
    """x [M, in] times a weight that is decoded some rows at a time, in fp32, plus branch; [M, out]."""

    def rows(part: slice) -> Tensor:
        return cpu.decode_rows(kind, qdata, scale, block_scale, part, x.shape[1], group)

    t = None if down is None else cpu.branch_middle(x, down, strength)
    return cpu.decoded_linear(x, rows, n, bias, t, up)


@decoded_linear_cpu.register_fake
def _(x, kind, qdata, scale, block_scale, n, group, bias, down, strength, up):
    return x.new_empty(x.shape[0], n)


@torch.library.custom_op("tessera::rotate_quantize_int8", mutates_args=())
def rotate_quantize_int8(x: Tensor, up: Tensor | None, group: int, down: Tensor | None,
                         strength: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """int8 codes [M, in] of the rotated x, row scales [M, 1], and the branch's middle [M, r] (r 0 without one).

    With `up` it is silu(x) * up that is quantized, and not stored.
    """
    if not x.is_cuda:
        x = _gated(x, up)
        return *ref.quantize_rows(x, group), _middle(x, down, strength)
    kernels, x, down, strength = _gpu("activations"), x.contiguous(), _whole(down), _whole(strength)
    if up is None:
        q, scale, t = kernels.rotate_quantize_int8(x, group, down, strength)
    else:
        q, scale, t = kernels.swiglu_quantize_int8(x, up.contiguous(), group, down, strength)
    return q, scale, _given(t, x)


@rotate_quantize_int8.register_fake
def _(x, up, group, down, strength):
    m = x.shape[0]
    return (x.new_empty(x.shape, dtype=torch.int8), x.new_empty(m, 1, dtype=torch.float32),
            x.new_empty(m, 0 if down is None else down.shape[0]))  # fmt: skip


@torch.library.custom_op("tessera::int8_gemm", mutates_args=())
def int8_gemm(q: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, t: Tensor | None,
              up: Tensor | None, dtype: torch.dtype) -> Tensor:  # fmt: skip
    """Codes [M, in] times codes [out, in]^T, scaled, plus bias plus t up^T; rounded once to dtype."""
    if q.is_cuda:
        return _gpu("int8_gemm").int8_gemm(q, x_scale, weight, scale, bias, t, up, dtype)
    return _finished(ref.int8_product(q, x_scale, weight, scale), bias, t, up, dtype)


@int8_gemm.register_fake
def _(q, x_scale, weight, scale, bias, t, up, dtype):
    return q.new_empty(q.shape[0], weight.shape[0], dtype=dtype)


@torch.library.custom_op("tessera::kitchen_int8", mutates_args=())
def kitchen_int8(x: Tensor, weight: Tensor, scale: Tensor, group: int, bias: Tensor | None,
                 residual: Tensor | None) -> Tensor:  # fmt: skip
    """comfy-kitchen's int8_linear of x [M, in], by its best backend; residual [M, out] is added before rounding.

    Raises TypeError for a residual where comfy-kitchen has none (before 0.2.40): plans know that beforehand.
    """
    import comfy_kitchen as ck

    extra = {}
    if residual is not None:
        extra = {"residual": residual, "residual_scale": torch.ones(weight.shape[0], device=x.device)}
    return ck.int8_linear(x.contiguous(), weight, scale, bias, x.dtype, group > 0, group or 256, **extra)


@kitchen_int8.register_fake
def _(x, weight, scale, group, bias, residual):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("tessera::weight_only_gemm", mutates_args=())
def weight_only_gemm(x: Tensor, kind: str, qdata: Tensor, scale: Tensor, block_scale: Tensor | None, n: int,
                     bias: Tensor | None, t: Tensor | None, up: Tensor | None) -> Tensor:  # fmt: skip
    """x [M, in] times a weight whose codes are decoded inside the product; inputs are not rounded. [M, out]."""
    if x.is_cuda:
        return _gpu("weight_only").weight_only_gemm(x, kind, qdata, scale, block_scale, bias, t, up, n)
    weight = ref.decode_rows(kind, qdata, scale, block_scale, slice(0, n), x.shape[1], 0)
    return _finished(x.float() @ weight.T, bias, t, up, x.dtype)


@weight_only_gemm.register_fake
def _(x, kind, qdata, scale, block_scale, n, bias, t, up):
    return x.new_empty(x.shape[0], n)


@torch.library.custom_op("tessera::dequantize", mutates_args=())
def dequantize(kind: str, qdata: Tensor, scale: Tensor, block_scale: Tensor | None, n: int, k: int, group: int,
               dtype: torch.dtype) -> Tensor:  # fmt: skip
    """The weight [n, k] that the codes stand for, in dtype."""
    if qdata.is_cuda and _has_triton() and group in ref.ROTATED_GROUPS:
        kernels = _gpu("dequantize")
        if kind == "nvfp4":
            return kernels.dequantize_nvfp4(qdata, block_scale, scale, n, k, dtype)
        if kind == "mxfp8":
            return kernels.dequantize_mxfp8(qdata, scale, n, k, dtype)
        if kind == "int8":
            return kernels.dequantize_int8(qdata, scale, group, dtype)
    return ref.decode_rows(kind, qdata, scale, block_scale, slice(0, n), k, group).to(dtype)


@dequantize.register_fake
def _(kind, qdata, scale, block_scale, n, k, group, dtype):
    return qdata.new_empty(n, k, dtype=dtype)


@torch.library.custom_op("tessera::quantize_blocks", mutates_args=())
def quantize_blocks(kind: str, x: Tensor, up: Tensor | None, scale: Tensor, down: Tensor | None,
                    strength: Tensor | None, extension: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [M, in] as the operand of a block-scaled or fp8 GEMM, padded: codes, scales, and the branch's middle [M, r].

    scale: [] for nvfp4, [M, 1] for fp8_row, unused for mxfp8. With `extension` the middle stands in that many columns
    behind x instead (zero without a branch), and comes back with no columns. With `up` it is silu(x) * up.
    """
    if not (x.is_cuda and kind in ("nvfp4", "mxfp8") and _has_triton()):
        return _operand(kind, _gated(x, up), scale, down, strength, extension)
    kernels, down, strength = _gpu("activations"), _whole(down), _whole(strength)
    inputs = (x.contiguous(),) if up is None else (x.contiguous(), up.contiguous())
    scales = (scale,) if kind == "nvfp4" else ()
    quantize = getattr(kernels, f"{'swiglu_' if up is not None else ''}quantize_{kind}")
    q, block_scale, t = quantize(*inputs, *scales, down, strength, extension)
    return q, block_scale, _given(t, x)


@quantize_blocks.register_fake
def _(kind, x, up, scale, down, strength, extension):
    rank = 0 if down is None or extension else down.shape[0]
    return *_empty_operand(kind, x, extension), x.new_empty(x.shape[0], rank)


@torch.library.custom_op("tessera::dual_quantize", mutates_args=())
def dual_quantize(x: Tensor, scale: Tensor, down: Tensor | None, strength: Tensor | None,
                  nvfp4_extension: int, mxfp8_extension: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x as nvfp4 (codes, scales) and as mxfp8 (codes, exponents), each with the middle in its extension; read once."""
    if x.is_cuda and _has_triton():
        extensions = nvfp4_extension, mxfp8_extension
        kernels, x = _gpu("activations"), x.contiguous()
        nvfp4, mxfp8, _ = kernels.dual_quantize(x, scale, _whole(down), _whole(strength), extensions)
        return *nvfp4, *mxfp8
    q, block_scale, _ = _operand("nvfp4", x, scale, down, strength, nvfp4_extension)
    codes, exponents, _ = _operand("mxfp8", x, scale, down, strength, mxfp8_extension)
    return q, block_scale, codes, exponents


@dual_quantize.register_fake
def _(x, scale, down, strength, nvfp4_extension, mxfp8_extension):
    return *_empty_operand("nvfp4", x, nvfp4_extension), *_empty_operand("mxfp8", x, mxfp8_extension)


def _operand(kind, x, scale, down, strength, extension) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_blocks` by the reference."""
    t = _middle(x, down, strength)
    row, column = PADS[kind]
    padded = ref.pad_to(x.float(), ref.round_up(x.shape[0], row), ref.round_up(x.shape[1], column))
    if extension:
        tail = padded.new_zeros(padded.shape[0], extension)
        tail[: x.shape[0], : t.shape[1]] = t
        padded, t = torch.cat((padded, tail), 1), x.new_empty(x.shape[0], 0)
    return *_codes(kind, padded, scale), t


def _empty_operand(kind: str, x: Tensor, extension: int) -> tuple[Tensor, Tensor]:
    row, column = PADS[kind]
    m, k = ref.round_up(x.shape[0], row), ref.round_up(x.shape[1], column) + extension
    if kind == "fp8_row":
        return x.new_empty(m, k, dtype=torch.float8_e4m3fn), x.new_empty(m, 1, dtype=torch.float32)
    scales = (ref.round_up(m, 128), ref.round_up(k // ref.BLOCKS[kind], 4))
    if kind == "nvfp4":
        return x.new_empty(m, k // 2, dtype=torch.uint8), x.new_empty(scales, dtype=torch.float8_e4m3fn)
    return x.new_empty(m, k, dtype=torch.float8_e4m3fn), x.new_empty(scales, dtype=torch.uint8)


def _codes(kind: str, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    if kind == "nvfp4":
        codes, block_scale = ref.nvfp4_codes(x, scale)
        return ref.pack_nibbles(codes), ref.swizzle(block_scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    if kind == "mxfp8":
        codes, exponents = ref.mxfp8_codes(x)
        return codes, ref.swizzle(exponents)
    return ref.fp8_codes(x, scale), scale.clone()


@torch.library.custom_op("tessera::block_product", mutates_args=())
def block_product(kind: str, x: Tensor, x_scales: Tensor, sx: Tensor, weight: Tensor, scales: Tensor, sw: Tensor,
                  bias: Tensor | None, m: int, n: int, dtype: torch.dtype) -> Tensor:  # fmt: skip
    """Two quantized operands multiplied, plus bias; [m, n], padding cut off. sx, sw: nvfp4's tensor scales."""
    if not x.is_cuda:
        mine = (x, x_scales, sx) if kind == "nvfp4" else (x, x_scales)
        theirs = (weight, scales, sw) if kind == "nvfp4" else (weight, scales)
        return _finished(ref.packed_product(kind, mine, theirs)[:m, :n], bias, None, None, dtype)
    if kind == "fp8_row":  # row scales: torch gives bf16 only
        bias = None if bias is None else bias.bfloat16()
        y = torch._scaled_mm(x, weight.T, x_scales, scales.reshape(1, -1), bias=bias, out_dtype=torch.bfloat16)
        return y.to(dtype)
    import comfy_kitchen as ck

    bias = bias if bias is None or weight.shape[0] == n else torch.nn.functional.pad(bias, (0, weight.shape[0] - n))
    if kind == "nvfp4":
        y = ck.scaled_mm_nvfp4(x, weight, sx, sw, x_scales, scales, bias=bias, out_dtype=dtype)
    else:
        exponents = x_scales.view(torch.float8_e8m0fnu), scales.view(torch.float8_e8m0fnu)
        y = ck.scaled_mm_mxfp8(x, weight, *exponents, bias=bias, out_dtype=dtype)
    return y if y.shape == (m, n) else y[:m, :n].contiguous()


@block_product.register_fake
def _(kind, x, x_scales, sx, weight, scales, sw, bias, m, n, dtype):
    return x.new_empty(m, n, dtype=dtype)


def _finished(y: Tensor, bias: Tensor | None, t: Tensor | None, up: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The end of every product: bias and branch are added in fp32, before the only rounding."""
    if bias is not None:
        y = y + bias.float()
    if t is not None and up is not None:
        y = torch.addmm(y, t.float(), up.float().T)
    return y.to(dtype)


def _middle(x: Tensor, down: Tensor | None, strength: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], 0) if down is None else ref.branch_middle(x, down, strength)


def _gated(x: Tensor, up: Tensor | None) -> Tensor:
    return x if up is None else ref.swiglu(x, up).to(x.dtype)


def _whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _given(t: Tensor | None, x: Tensor) -> Tensor:
    """An op returns tensors only: no branch is a middle without columns."""
    return x.new_empty(x.shape[0], 0) if t is None else t


def _gpu(module: str):
    """Our Triton kernels, imported when a plan first needs them."""
    import importlib

    return importlib.import_module(f".gpu.{module}", __package__)


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    from .facts import triton_version

    return (triton_version() or (0, 0)) >= (3, 6)
