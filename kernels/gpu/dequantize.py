"""Packed weights decoded to a dense dtype in one sweep: comfy-kitchen's own decoders below SM 10.0 are eager."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import ROTATED_GROUPS
from .activations import on_device
from .bits import e2m1_decode, e4m3_decode, e8m0_decode
from .rotation import hadamard, rotate_span, rotation_norm
from .tiles import swizzled

ROWS, COLUMNS = 16, 256

_empty = torch.empty  # tests replace it: outputs full of poison show what a kernel forgets to write


def dequantize_nvfp4(
    qdata: Tensor, block_scale: Tensor, scale: Tensor, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """[rows, columns] of packed codes, swizzled E4M3 block scales and the tensor scale []; padding is left out."""
    y = _empty(rows, columns, dtype=dtype, device=qdata.device)
    if y.numel():
        with on_device(qdata):
            nvfp4_dequantize_kernel[_grid(rows, columns)](
                qdata.view(torch.uint8), block_scale.view(torch.uint8), scale, y, rows, columns,
                qdata.stride(0), block_scale.shape[1], ROWS=ROWS, COLUMNS=COLUMNS,
            )  # fmt: skip
    return y


def dequantize_mxfp8(qdata: Tensor, block_scale: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] of E4M3 codes and swizzled E8M0 exponents; padding is left out."""
    y = _empty(rows, columns, dtype=dtype, device=qdata.device)
    if y.numel():
        with on_device(qdata):
            mxfp8_dequantize_kernel[_grid(rows, columns)](
                qdata.view(torch.uint8), block_scale.view(torch.uint8), y, rows, columns,
                qdata.stride(0), block_scale.shape[1], ROWS=ROWS, COLUMNS=COLUMNS,
            )  # fmt: skip
    return y


def dequantize_int8(qdata: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] of int8 codes and scales ([rows, 1] or []), rotated back in groups (0: not rotated)."""
    (rows, columns), y = qdata.shape, _empty(*qdata.shape, dtype=dtype, device=qdata.device)
    if group not in ROTATED_GROUPS:
        raise ValueError(
            f"convrot group {group}: the kernel rotates groups of {', '.join(map(str, ROTATED_GROUPS))} (0: none)"
        )
    if y.numel():
        with on_device(qdata):
            int8_dequantize_kernel[_grid(rows, columns)](
                qdata.contiguous(), scale, y, rows, columns, int(scale.numel() > 1), GROUP=group, ROWS=ROWS
            )
    return y


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)


@triton.jit
def nvfp4_dequantize_kernel(
    q_ptr, block_scale_ptr, scale_ptr, y_ptr, M, K, q_stride, scale_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    blocks = tl.program_id(1) * (COLUMNS // 16) + tl.arange(0, COLUMNS // 16)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    pairs = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    step = _block_scales(block_scale_ptr, rows, blocks, M, tl.cdiv(K, 16), scale_stride)
    step = tl.load(scale_ptr) * e4m3_decode(step)
    packed = _load_rows(q_ptr, rows, pairs, M, tl.cdiv(K, 2), q_stride).to(tl.int32)
    codes = tl.join(packed >> 4, packed & 0xF)  # the even column is in the high nibble
    values = e2m1_decode(tl.reshape(codes, [ROWS, COLUMNS // 16, 16])) * step[:, :, None]
    _store_rows(y_ptr, tl.reshape(values, [ROWS, COLUMNS]), rows, columns, M, K)


@triton.jit
def mxfp8_dequantize_kernel(
    q_ptr, block_scale_ptr, y_ptr, M, K, q_stride, scale_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    blocks = tl.program_id(1) * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    step = e8m0_decode(_block_scales(block_scale_ptr, rows, blocks, M, tl.cdiv(K, 32), scale_stride))
    codes = _load_rows(q_ptr, rows, columns, M, K, q_stride).to(tl.int32)
    values = tl.reshape(e4m3_decode(codes), [ROWS, COLUMNS // 32, 32]) * step[:, :, None]
    _store_rows(y_ptr, tl.reshape(values, [ROWS, COLUMNS]), rows, columns, M, K)


@triton.jit
def int8_dequantize_kernel(q_ptr, scale_ptr, y_ptr, M, K, scale_step, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Rotates the codes, whose sums are whole numbers and exact in fp32, and scales after it: one rounding."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * 256 + tl.arange(0, 64)
    a = _load_rows(q_ptr, rows, first, M, K, K).to(tl.float32).to(tl.bfloat16)
    b = _load_rows(q_ptr, rows, first + 64, M, K, K).to(tl.float32).to(tl.bfloat16)
    c = _load_rows(q_ptr, rows, first + 128, M, K, K).to(tl.float32).to(tl.bfloat16)
    d = _load_rows(q_ptr, rows, first + 192, M, K, K).to(tl.float32).to(tl.bfloat16)
    a, b, c, d = rotate_span(a, b, c, d, hadamard(GROUP, tl.bfloat16), GROUP)
    scale = tl.load(scale_ptr + rows * scale_step, mask=rows < M, other=0.0)[:, None] * rotation_norm(GROUP)
    _store_rows(y_ptr, a * scale, rows, first, M, K)
    _store_rows(y_ptr, b * scale, rows, first + 64, M, K)
    _store_rows(y_ptr, c * scale, rows, first + 128, M, K)
    _store_rows(y_ptr, d * scale, rows, first + 192, M, K)


@triton.jit
def _block_scales(scale_ptr, rows, blocks, M, N, stride):
    inside = (rows < M)[:, None] & (blocks < N)[None, :]
    offsets = swizzled(rows[:, None], blocks[None, :], stride)
    return tl.load(scale_ptr + offsets, mask=inside, other=0).to(tl.int32)


@triton.jit
def _load_rows(ptr, rows, columns, M, N, stride):
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0)


@triton.jit
def _store_rows(ptr, values, rows, columns, M, N):
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    p = ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(p, values.to(ptr.dtype.element_ty), mask=inside)
