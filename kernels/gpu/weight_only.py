"""Weight-only GEMM: 16-bit activations times NVFP4, MXFP8, INT8 or FP8 codes that are decoded in registers.

Decoding rounds nothing, since a code times its block scale has few significant bits: NVFP4 2 + 4, MXFP8 4 (its scale is
a power of two), INT8 8, FP8 4 or 3; bfloat16 holds 8, float16 11. Scales per tensor and per row multiply the fp32 sums.
Where 16 bits do not reach: float16 has no numbers below 2^-24, so MXFP8 weights smaller than 2^-14 may be off by 2^-25;
bfloat16 rounds MXFP8 blocks with exponents below 3 or above 246 (weights under 1e-35, over 1e36).

Bytes are decoded with integer operations alone: fp8 pointers do not compile below SM 8.9. NaN codes, which no format
writes, become 480.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import Tile, add_outer, capability, grouped, load_scales, multiply, programs, rank_block, require_int32

GROUP_M = 8
GEMV_ROWS = 4  # up to here each row of x gets its own programs, on which all warps share K: bound by the weight's bytes
GEMV_TILE = Tile(1, 8, 256, 4, 6)
GEMV_STAGES = tl.constexpr(GEMV_TILE.stages)

# Constant, not autotuned: a trial launch inside a forward would break CUDA graphs. bench/ can sweep it.
TILES = {
    "consumer": ((16, Tile(16, 32, 256, 4, 4)), (64, Tile(64, 64, 64, 4, 4)), (None, Tile(128, 128, 64, 8, 3))),
    "datacenter": ((16, Tile(16, 32, 256, 4, 5)), (64, Tile(64, 64, 64, 4, 5)), (None, Tile(128, 128, 64, 8, 4))),
}
DATACENTER = {(8, 0), (9, 0), (10, 0), (10, 3)}

KINDS = {
    ("nvfp4", torch.uint8): "e2m1",
    ("mxfp8", torch.float8_e4m3fn): "mx_e4m3",
    ("mxfp8", torch.uint8): "mx_e4m3",
    ("int8", torch.int8): "int8",
    ("fp8", torch.float8_e4m3fn): "e4m3",
    ("fp8", torch.float8_e5m2): "e5m2",
    ("fp8", torch.uint8): "e4m3",
    ("fp8_row", torch.float8_e4m3fn): "e4m3",  # what transcoding MXFP8 makes
}


def tile_for(m: int, sm: tuple[int, int]) -> Tile:
    """The tile for M rows on that GPU."""
    table = TILES["datacenter" if sm in DATACENTER else "consumer"]
    return next(tile for most, tile in table if most is None or m <= most)


def weight_only_gemm(
    x: Tensor,
    kind: str,
    qdata: Tensor,
    scale: Tensor | None,
    block_scale: Tensor | None = None,
    bias: Tensor | None = None,
    t: Tensor | None = None,
    up: Tensor | None = None,
    out_features: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [M, K] @ decoded weight [N, K]^T + bias [N] + t [M, R] @ up [N, R]^T, in fp32, rounded once to x's dtype.

    kind, qdata and the scales are as packed (format.md 2): nvfp4 with scale [] and swizzled block_scale, mxfp8 with
    swizzled exponents as block_scale (or as scale), int8, fp8 and fp8_row with scale [] or [N, 1]. out_features is N
    where qdata has padding rows. int8 of a rotated weight takes x rotated by the caller.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"weight-only GEMM takes bfloat16 or float16 activations, not {x.dtype}; cast x")
    if (kind, qdata.dtype) not in KINDS:
        known = ", ".join(f"{name} from {dtype}" for name, dtype in KINDS)
        raise ValueError(f"weight-only GEMM decodes no {kind} from {qdata.dtype}; it does {known}")
    if kind == "mxfp8" and block_scale is None:
        scale, block_scale = None, scale
    (m, k), n = x.shape, qdata.shape[0] if out_features is None else out_features
    y = torch.empty(m, n, dtype=out_dtype or x.dtype, device=x.device)
    if not y.numel():
        return y
    require_int32(qdata)
    rank, block = rank_block(t, up)
    if m <= GEMV_ROWS:
        kernel, tile = weight_only_gemv_kernel, GEMV_TILE
        grid = (triton.cdiv(n, tile.n), m)
    else:
        kernel, tile = weight_only_gemm_kernel, tile_for(m, capability(x))
        grid = programs(m, n, tile)
    with torch.cuda.device_of(x):
        kernel[grid](
            x, qdata if kind == "int8" else qdata.view(torch.uint8), scale,
            None if block_scale is None else block_scale.view(torch.int32),
            bias, t if rank else None, up if rank else None, y, m, n, k, rank,
            qdata.shape[1], 0 if block_scale is None else block_scale.shape[1],
            KIND=KINDS[kind, qdata.dtype], SCALE_PER_ROW=scale is not None and scale.numel() > 1, RANK_BLOCK=block,
            EVEN_K=k % tile.k == 0, GROUP_M=GROUP_M, **tile.options,
        )  # fmt: skip
    return y


@triton.jit
def e4m3_bits(codes):
    """E4M3 bytes as float16 of 1/256 of the value: both have a sign, an exponent and subnormals, so bits just move."""
    bits = codes.to(tl.uint16)
    return ((bits & 0x80) << 8 | (bits & 0x7F) << 7).to(tl.float16, bitcast=True)


@triton.jit
def e2m1_pairs(packed):
    """Bytes [R, C] as float16 [R, C, 2] of 2^-14 of the values, the high nibble first; subnormals included."""
    bits = packed.to(tl.uint16)
    even = (bits << 8) & 0x8000 | (bits << 5) & 0x0E00  # sign, exponent and mantissa to float16's places
    odd = (bits << 12) & 0x8000 | (bits << 9) & 0x0E00
    return tl.join(even, odd).to(tl.float16, bitcast=True)


@triton.jit
def scale_blocks(values, scales, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):
    """values [BLOCK_N, BLOCK_K] times the scale of each BLOCK columns [BLOCK_N, BLOCK_K / BLOCK], in fp32."""
    blocks = tl.reshape(values, (BLOCK_N, BLOCK_K // BLOCK, BLOCK)).to(tl.float32) * scales[:, :, None]
    return tl.reshape(blocks, (BLOCK_N, BLOCK_K))


@triton.jit
def load_codes(w_ptr, rows, first, w_width, EVEN_K: tl.constexpr, COUNT: tl.constexpr):
    o_k = first + tl.arange(0, COUNT)
    p_w = w_ptr + rows[:, None] * w_width + o_k[None, :]
    if EVEN_K:
        return tl.load(p_w)
    return tl.load(p_w, mask=o_k[None, :] < w_width, other=0)


@triton.jit
def load_weight(
    w_ptr, block_scale_ptr, rows, first, w_width, scale_width,
    KIND: tl.constexpr, DTYPE: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weight columns first .. first + BLOCK_K of some rows, decoded to DTYPE except for `factor` and row scales."""
    if KIND == "e2m1":
        packed = load_codes(w_ptr, rows, first // 2, w_width, EVEN_K, BLOCK_K // 2)
        scales = e4m3_bits(load_scales(block_scale_ptr, rows, first // 16, scale_width, EVEN_K, BLOCK_N, BLOCK_K // 16))
        scales = scales.to(tl.float32) * 4194304.0  # 2^(14 + 8)
        return scale_blocks(e2m1_pairs(packed), scales, BLOCK_N, BLOCK_K, 16).to(DTYPE)
    codes = load_codes(w_ptr, rows, first, w_width, EVEN_K, BLOCK_K)
    if KIND == "mx_e4m3":
        exponents = load_scales(block_scale_ptr, rows, first // 32, scale_width, EVEN_K, BLOCK_N, BLOCK_K // 32)
        scales = (exponents << 23).to(tl.float32, bitcast=True) * 256.0  # exponent 0 gives 0, as it must
        return scale_blocks(e4m3_bits(codes), scales, BLOCK_N, BLOCK_K, 32).to(DTYPE)
    if KIND == "int8":
        # 1.5 * 2^23 has the integers in its last bits: an addition where a conversion runs at a quarter of the rate
        return ((codes.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0).to(DTYPE)
    if KIND == "e4m3":
        return e4m3_bits(codes).to(tl.float32).to(DTYPE)
    return (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32).to(DTYPE)


@triton.jit
def factor(scale_ptr, rows, KIND: tl.constexpr, SCALE_PER_ROW: tl.constexpr):
    """What the sums of those rows are multiplied with."""
    if scale_ptr is None:
        scale = 1.0
    else:
        scale = tl.load(scale_ptr + rows) if SCALE_PER_ROW else tl.load(scale_ptr)
        if KIND == "e4m3":
            scale *= 256.0
    return scale


@triton.jit
def weight_only_gemm_kernel(
    x_ptr, w_ptr, scale_ptr, block_scale_ptr, bias_ptr, t_ptr, up_ptr, y_ptr, M, N, K, R, w_width, scale_width,
    KIND: tl.constexpr, SCALE_PER_ROW: tl.constexpr, RANK_BLOCK: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Sums y^T [N, M]: the weight is the left operand, the one that tensor cores take from registers (SM 8 and 9)."""
    i_m, i_n = grouped(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    # Rows beyond the edge read the last one, and are not stored: no mask in the loop
    rows = tl.minimum(o_m, M - 1).to(tl.int64)
    columns = tl.minimum(o_n, N - 1)
    p_x = x_ptr + rows[:, None] * K + o_k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        b_x = tl.load(p_x) if EVEN_K else tl.load(p_x, mask=o_k[None, :] < K - first, other=0.0)
        b_w = load_weight(
            w_ptr, block_scale_ptr, columns, first, w_width, scale_width,
            KIND, x_ptr.dtype.element_ty, EVEN_K, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc = multiply(b_w, tl.trans(b_x), acc)
        p_x += BLOCK_K

    scale = factor(scale_ptr, columns, KIND, SCALE_PER_ROW)
    y = acc * scale[:, None] if SCALE_PER_ROW else acc * scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns).to(tl.float32)[:, None]
    if RANK_BLOCK:
        y = add_outer(y, up_ptr, t_ptr, columns, rows, R, RANK_BLOCK)
    p_y = y_ptr + o_m.to(tl.int64)[None, :] * N + o_n[:, None]
    tl.store(p_y, y.to(y_ptr.dtype.element_ty), mask=(o_m < M)[None, :] & (o_n < N)[:, None])


@triton.jit
def weight_only_gemv_kernel(
    x_ptr, w_ptr, scale_ptr, block_scale_ptr, bias_ptr, t_ptr, up_ptr, y_ptr, M, N, K, R, w_width, scale_width,
    KIND: tl.constexpr, SCALE_PER_ROW: tl.constexpr, RANK_BLOCK: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one row of x: bound by the weight's bytes, which rows after the first find in L2."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    row = tl.program_id(1).to(tl.int64)
    columns = tl.minimum(o_n, N - 1)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for first in tl.range(
        0, K, BLOCK_K, num_stages=GEMV_STAGES
    ):  # a loop without a dot is pipelined only if it says so
        b_x = tl.load(x_ptr + row * K + first + o_k, mask=o_k < K - first, other=0.0).to(tl.float32)
        b_w = load_weight(
            w_ptr, block_scale_ptr, columns, first, w_width, scale_width,
            KIND, tl.float32, EVEN_K, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc += b_w * b_x[None, :]

    y = tl.sum(acc, axis=1) * factor(scale_ptr, columns, KIND, SCALE_PER_ROW)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns).to(tl.float32)
    if RANK_BLOCK:
        for first in range(0, R, RANK_BLOCK):
            o_r = first + tl.arange(0, RANK_BLOCK)
            b_t = tl.load(t_ptr + row * R + o_r, mask=o_r < R, other=0.0).to(tl.float32)
            b_up = tl.load(up_ptr + columns[:, None] * R + o_r[None, :], mask=o_r[None, :] < R, other=0.0)
            y += tl.sum(b_up.to(tl.float32) * b_t[None, :], axis=1)
    tl.store(y_ptr + row * N + o_n, y.to(y_ptr.dtype.element_ty), mask=o_n < N)
