"""NVFP4 and MXFP8 GEMM on Blackwell's own instructions, with the low-rank branch in the epilogue.

For what a stock GEMM over extended K cannot serve: branches of rank above 256 (kernels.md 4). SM 10.0 and later only;
below, tl.dot_scaled compiles to an upcast that weight_only.py does better.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import INTERPRETED, Tile, add_outer, capability, grouped, load_scales, programs, rank_block, require_int32
from .weight_only import e2m1_pairs, e4m3_bits, scale_blocks

GROUP_M = 8

# Constant, not autotuned: a trial launch inside a forward would break CUDA graphs. bench/ can sweep it.
# SM 12.x has 99 KB of shared memory and sums in registers, SM 10.x sums in tensor memory.
TILES = {
    "nvfp4": {10: Tile(128, 128, 256, 8, 4), 12: Tile(128, 128, 128, 8, 4)},
    "mxfp8": {10: Tile(128, 128, 128, 8, 4), 12: Tile(128, 128, 128, 8, 3)},
}


def nvfp4_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    tensor_scales: tuple[Tensor, Tensor],
    bias: Tensor | None = None,
    t: Tensor | None = None,
    up: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    rows: int | None = None,
    out_features: int | None = None,
) -> Tensor:
    """a @ b^T of packed NVFP4 operands [M, K/2], [N, K/2] + bias [N] + t [M, R] @ up [N, R]^T -> [M, N].

    Scales are swizzled as packed, tensor_scales are both []. rows and out_features are M and N where a and b have
    padding rows.
    """
    return _launch("nvfp4", a, a_scale, b, b_scale, tensor_scales, bias, t, up, out_dtype, rows, out_features)


def mxfp8_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    tensor_scales: tuple[Tensor | None, Tensor | None] = (None, None),
    bias: Tensor | None = None,
    t: Tensor | None = None,
    up: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    rows: int | None = None,
    out_features: int | None = None,
) -> Tensor:
    """`nvfp4_gemm` for packed MXFP8 operands [M, K], [N, K] and their swizzled exponents; tensor scales may be None."""
    return _launch("mxfp8", a, a_scale, b, b_scale, tensor_scales, bias, t, up, out_dtype, rows, out_features)


def _launch(name, a, a_scale, b, b_scale, tensor_scales, bias, t, up, out_dtype, rows, out_features) -> Tensor:
    major, minor = capability(a)
    if major < 10:
        raise RuntimeError(f"{name} block-scaled GEMM needs SM 10.0, this is SM {major}.{minor}; use weight_only_gemm")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{name} operands have {a.shape[1]} and {b.shape[1]} bytes a row; extend both or neither")
    m, n = a.shape[0] if rows is None else rows, b.shape[0] if out_features is None else out_features
    y = torch.empty(m, n, dtype=out_dtype, device=a.device)
    if not y.numel():
        return y
    require_int32(b)
    rank, block = rank_block(t, up)
    tile = TILES[name][10 if major == 10 else 12]
    codes = torch.uint8 if name == "nvfp4" else torch.float8_e4m3fn
    k = a.shape[1] * (2 if name == "nvfp4" else 1)
    with torch.cuda.device_of(a):
        block_scaled_gemm_kernel[programs(m, n, tile)](
            a.view(codes), a_scale.view(torch.int32), b.view(codes), b_scale.view(torch.int32), *tensor_scales,
            bias, t if rank else None, up if rank else None, y, m, n, k, rank, a_scale.shape[1], b_scale.shape[1],
            FORMAT="e2m1" if name == "nvfp4" else "e4m3", RANK_BLOCK=block, EVEN_K=k % tile.k == 0, GROUP_M=GROUP_M,
            **tile.options,
        )  # fmt: skip
    return y


@triton.jit
def load_operand(
    codes_ptr, scale_ptr, rows, first, width, scale_width, FORMAT: tl.constexpr, OFFSET: tl.constexpr,
    EVEN_K: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Code bytes first .. first + BYTES of some rows, and their block scales in plain row order."""
    o_k = first + tl.arange(0, BYTES)
    p_codes = codes_ptr + rows.to(OFFSET)[:, None] * width + o_k[None, :]
    codes = tl.load(p_codes) if EVEN_K else tl.load(p_codes, mask=o_k[None, :] < width, other=0.0)
    scales = load_scales(scale_ptr, rows, first // (BYTES // SCALES), scale_width, EVEN_K, ROWS, SCALES).to(tl.uint8)
    if FORMAT == "e2m1":
        scales = scales.to(tl.float8e4nv, bitcast=True)
    return codes, scales


@triton.jit
def explicit_dot(a, a_scale, b, b_scale, acc, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """dot_scaled of NVFP4 operands, decoded: the interpreter's own takes E4M3 scales for exponents."""
    b_a = scale_blocks(e2m1_pairs(a), e4m3_bits(a_scale.to(tl.uint8, bitcast=True)).to(tl.float32), M, K, 16)
    b_b = scale_blocks(e2m1_pairs(b), e4m3_bits(b_scale.to(tl.uint8, bitcast=True)).to(tl.float32), N, K, 16)
    return tl.dot(b_a * 4194304.0, tl.trans(b_b * 4194304.0), acc)


@triton.jit
def block_scaled_gemm_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, a_global_ptr, b_global_ptr, bias_ptr, t_ptr, up_ptr, y_ptr,
    M, N, K, R, a_scale_width, b_scale_width,
    FORMAT: tl.constexpr, RANK_BLOCK: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Triton takes the low nibble as the even column, our files the high one: both operands agree, so the sums do."""
    PER_BYTE: tl.constexpr = 2 if FORMAT == "e2m1" else 1
    BLOCK: tl.constexpr = 16 if FORMAT == "e2m1" else 32
    i_m, i_n = grouped(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(o_m, M - 1)
    columns = tl.minimum(o_n, N - 1)
    width = K // PER_BYTE
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, width, BLOCK_K // PER_BYTE):
        b_a, b_a_scale = load_operand(
            a_ptr, a_scale_ptr, rows, first, width, a_scale_width, FORMAT, tl.int64,
            EVEN_K, BLOCK_M, BLOCK_K // PER_BYTE, BLOCK_K // BLOCK,
        )  # fmt: skip
        b_b, b_b_scale = load_operand(
            b_ptr, b_scale_ptr, columns, first, width, b_scale_width, FORMAT, tl.int32,
            EVEN_K, BLOCK_N, BLOCK_K // PER_BYTE, BLOCK_K // BLOCK,
        )  # fmt: skip
        if INTERPRETED and FORMAT == "e2m1":
            acc = explicit_dot(b_a, b_a_scale, b_b, b_b_scale, acc, BLOCK_M, BLOCK_N, BLOCK_K)
        else:
            acc = tl.dot_scaled(b_a, b_a_scale, FORMAT, tl.trans(b_b), b_b_scale, FORMAT, acc)

    y = acc
    if a_global_ptr is not None:
        y *= tl.load(a_global_ptr) * tl.load(b_global_ptr)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    if RANK_BLOCK:
        y = add_outer(y, t_ptr, up_ptr, rows.to(tl.int64), columns, R, RANK_BLOCK)
    p_y = y_ptr + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_y, y.to(y_ptr.dtype.element_ty), mask=(o_m < M)[:, None] & (o_n < N)[None, :])
