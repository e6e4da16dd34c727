"""INT8 GEMM: int8 rows times an int8 weight in int32, then scales, bias and the low-rank branch in one fp32 epilogue.

comfy-kitchen 0.2.40 has no public GEMM for rows that are quantized already, and cannot add a branch before the one
rounding (kernels.md 2 and 4).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import Tile, add_outer, capability, grouped, programs, rank_block, require_int32

GROUP_M = 8

# Constant, not autotuned: a trial launch inside a forward would break CUDA graphs. bench/ can sweep it.
# (largest M, tile), None for any M. Consumer GPUs (SM 8.6, 8.9, 12.x) have 99 KiB of shared memory, others 163 or 227.
TILES = {
    "consumer": ((16, Tile(16, 64, 256, 4, 3)), (64, Tile(64, 64, 128, 4, 4)), (None, Tile(128, 128, 64, 4, 4))),
    "ampere": ((16, Tile(16, 64, 256, 4, 4)), (64, Tile(64, 64, 128, 4, 4)), (None, Tile(128, 256, 64, 8, 4))),
    "hopper": ((16, Tile(16, 64, 256, 4, 4)), (64, Tile(64, 128, 128, 4, 4)), (None, Tile(128, 256, 128, 8, 4))),
    "blackwell": ((16, Tile(16, 64, 256, 4, 4)), (64, Tile(64, 128, 128, 4, 4)), (None, Tile(128, 256, 128, 8, 4))),
}
FAMILIES = {(8, 0): "ampere", (9, 0): "hopper", (10, 0): "blackwell", (10, 3): "blackwell"}


def tile_for(m: int, sm: tuple[int, int]) -> Tile:
    """The tile for M rows on that GPU."""
    table = TILES[FAMILIES.get(sm, "consumer")]
    return next(tile for most, tile in table if most is None or m <= most)


def int8_gemm(
    q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    t: Tensor | None = None,
    up: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """q [M, K] @ weight [N, K]^T * x_scale [M, 1] * weight_scale ([N, 1] or []) + bias [N] + t [M, R] @ up [N, R]^T.

    The integer sums are exact; everything after them is fp32 and rounded once, to out_dtype.
    """
    (m, k), n = q.shape, weight.shape[0]
    y = torch.empty(m, n, dtype=out_dtype, device=q.device)
    if not y.numel():
        return y
    require_int32(weight)
    rank, block = rank_block(t, up)
    tile = tile_for(m, capability(q))
    with torch.cuda.device_of(q):
        int8_gemm_kernel[programs(m, n, tile)](
            q, x_scale, weight, weight_scale, bias, t if rank else None, up if rank else None, y, m, n, k, rank,
            SCALE_PER_ROW=weight_scale.numel() > 1, RANK_BLOCK=block, EVEN_K=k % tile.k == 0, GROUP_M=GROUP_M,
            **tile.options,
        )  # fmt: skip
    return y


@triton.jit
def int8_gemm_kernel(
    q_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, t_ptr, up_ptr, y_ptr, M, N, K, R,
    SCALE_PER_ROW: tl.constexpr, RANK_BLOCK: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    i_m, i_n = grouped(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    # Rows beyond the edge read the last one, and are not stored: no mask in the loop
    rows = tl.minimum(o_m, M - 1).to(tl.int64)
    columns = tl.minimum(o_n, N - 1)
    p_q = q_ptr + rows[:, None] * K + o_k[None, :]
    p_w = weight_ptr + columns[:, None] * K + o_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for first in range(0, K, BLOCK_K):
        if EVEN_K:
            b_q = tl.load(p_q)
            b_w = tl.load(p_w)
        else:
            inside = o_k[None, :] < K - first
            b_q = tl.load(p_q, mask=inside, other=0)
            b_w = tl.load(p_w, mask=inside, other=0)
        acc = tl.dot(b_q, tl.trans(b_w), acc, out_dtype=tl.int32)
        p_q += BLOCK_K
        p_w += BLOCK_K

    x_scale = tl.load(x_scale_ptr + rows)
    weight_scale = tl.load(weight_scale_ptr + columns) if SCALE_PER_ROW else tl.load(weight_scale_ptr)
    y = acc.to(tl.float32) * x_scale[:, None]
    y = y * weight_scale[None, :] if SCALE_PER_ROW else y * weight_scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    if RANK_BLOCK:
        y = add_outer(y, t_ptr, up_ptr, rows, columns, R, RANK_BLOCK)
    p_y = y_ptr + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_y, y.to(y_ptr.dtype.element_ty), mask=(o_m < M)[:, None] & (o_n < N)[None, :])
