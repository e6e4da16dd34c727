"""The kernel that rounds rows to NVFP4, MXFP8 or both in one sweep, with their swizzled scales and the branch."""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import mxfp8_encode, nvfp4_encode
from .rows import finish_projection, load_input, project, store_projection
from .tiles import swizzled


@triton.jit
def block_quantize_kernel(
    x_ptr, up_ptr, sx_ptr, nv_ptr, nv_scale_ptr, mx_ptr, mx_scale_ptr, down_ptr, s_ptr, t_ptr,
    M, K, R, s_step, per_program,
    NV_EXTENSION: tl.constexpr, MX_EXTENSION: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Codes and scales of x, or of swiglu(x, up), for the formats whose pointers are given.

    A program takes ROWS rows and `per_program` columns, all of them where there is a branch. Rows and columns of
    padding are written as zeros. The branch's t [M, R] goes to t_ptr, or behind the columns of x as its codes.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * per_program
    stop = tl.minimum(start + per_program, tl.cdiv(K, 128) * 128)  # 128: whole tiles of scales in both formats
    sx = 0.0
    if nv_ptr is not None:
        sx = tl.load(sx_ptr)
    nv_k, mx_k = (K + 15) // 16 * 16, (K + 31) // 32 * 32
    t = tl.zeros([ROWS, RANK], dtype=tl.float32)
    for first in tl.range(start, stop, COLUMNS, num_stages=STAGES):
        columns = first + tl.arange(0, COLUMNS)
        x = load_input(x_ptr, up_ptr, rows, columns, M, K)
        if down_ptr is not None:
            t = project(t, x, x_ptr, down_ptr, columns, K, R, RANK)
        x = x.to(tl.float32)
        if nv_ptr is not None:
            codes, scales = nvfp4_encode(x, sx, ROWS, COLUMNS)
            _store(codes, scales, nv_ptr, nv_scale_ptr, rows, first, nv_k, M, nv_k, NV_EXTENSION, COLUMNS, 16)
        if mx_ptr is not None:
            codes, scales = mxfp8_encode(x, ROWS, COLUMNS)
            _store(codes, scales, mx_ptr, mx_scale_ptr, rows, first, mx_k, M, mx_k, MX_EXTENSION, COLUMNS, 32)

    if down_ptr is not None:
        t = finish_projection(t, s_ptr, s_step, x_ptr, rows, M, R, RANK)
        if t_ptr is not None:
            store_projection(t, t_ptr, rows, M, R, RANK)
        t = t.to(tl.float32)
        if NV_EXTENSION:
            codes, scales = nvfp4_encode(t, sx, ROWS, RANK)
            _store(
                codes, scales, nv_ptr, nv_scale_ptr, rows, nv_k, nv_k + NV_EXTENSION, M, nv_k, NV_EXTENSION, RANK, 16
            )
            _clear(nv_ptr, nv_scale_ptr, rows, M, nv_k, NV_EXTENSION, RANK, 16)
        if MX_EXTENSION:
            codes, scales = mxfp8_encode(t, ROWS, RANK)
            _store(
                codes, scales, mx_ptr, mx_scale_ptr, rows, mx_k, mx_k + MX_EXTENSION, M, mx_k, MX_EXTENSION, RANK, 32
            )
            _clear(mx_ptr, mx_scale_ptr, rows, M, mx_k, MX_EXTENSION, RANK, 32)
    elif tl.program_id(1) == 0:
        if NV_EXTENSION:
            _clear(nv_ptr, nv_scale_ptr, rows, M, nv_k, NV_EXTENSION, 0, 16)
        if MX_EXTENSION:
            _clear(mx_ptr, mx_scale_ptr, rows, M, mx_k, MX_EXTENSION, 0, 32)


@triton.jit
def _store(codes, scales, q_ptr, scale_ptr, rows, first, end, M, k, EXTENSION: tl.constexpr, WIDTH: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """Codes of the columns from `first`, those before `end`, and their scales; k: columns of x with their padding.

    Whoever writes the last columns writes the scales of padding behind them too.
    """
    PER_BYTE: tl.constexpr = 32 // BLOCK
    all_columns = k + EXTENSION
    bytes_in_row = all_columns // PER_BYTE
    columns = first // PER_BYTE + tl.arange(0, WIDTH // PER_BYTE)
    padded_m = (M + BLOCK - 1) // BLOCK * BLOCK
    inside = (rows < padded_m)[:, None] & (columns < end // PER_BYTE)[None, :]
    tl.store(q_ptr + rows.to(tl.int64)[:, None] * bytes_in_row + columns[None, :], codes, mask=inside)

    scale_width = (all_columns // BLOCK + 3) // 4 * 4
    scale_end = tl.where(end == all_columns, scale_width, end // BLOCK)
    o_s = first // BLOCK + tl.arange(0, WIDTH // BLOCK)
    offsets = swizzled(rows[:, None], o_s[None, :], scale_width)
    tl.store(scale_ptr + offsets, scales, mask=(rows >= 0)[:, None] & (o_s < scale_end)[None, :])


@triton.jit
def _clear(q_ptr, scale_ptr, rows, M, k, EXTENSION: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros behind the RANK columns of the branch, up to the end of the extension and of its last tile of scales."""
    ROWS: tl.constexpr = rows.shape[0]
    codes = tl.zeros([ROWS, 64 // (32 // BLOCK)], dtype=tl.uint8)
    scales = tl.zeros([ROWS, 64 // BLOCK], dtype=tl.uint8)
    for first in range(RANK, EXTENSION + 4 * BLOCK, 64):
        _store(codes, scales, q_ptr, scale_ptr, rows, k + first, k + EXTENSION, M, k, EXTENSION, 64, BLOCK)
