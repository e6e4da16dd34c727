"""What the three GEMM kernels share: the program order, the swizzled block scales and the low-rank epilogue."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter multiplies bf16 as raw uint16: there every dot takes fp32, whose values are the same.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Tile(NamedTuple):
    """What one program computes, and what it runs on."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def options(self) -> dict:
        return {
            "BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k,
            "num_warps": self.warps, "num_stages": self.stages,
            "enable_fp_fusion": True,  # Triton 3.10 changes the default
        }  # fmt: skip


def capability(x: Tensor) -> tuple[int, int]:
    """(major, minor) of the GPU that holds x; (8, 0) where the interpreter runs on the CPU."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)


def require_int32(weight: Tensor) -> None:
    """Weight offsets are 32 bits wide in the kernels, those of activations 64: registers are scarce in the loop."""
    if weight.numel() >= 2**31:
        raise ValueError(f"weight of shape {tuple(weight.shape)} has 2^31 bytes or more; split the layer")


def rank_block(t: Tensor | None, up: Tensor | None) -> tuple[int, int]:
    """(rank, how much of it the epilogue multiplies at once); (0, 0) without a branch."""
    if t is None or up is None or not up.shape[1]:
        return 0, 0
    if t.dtype != up.dtype or t.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"low-rank factors are {t.dtype} and {up.dtype}; both must be bfloat16, or both float16")
    return up.shape[1], min(64, max(16, triton.next_power_of_2(up.shape[1])))


def programs(m: int, n: int, tile: Tile) -> tuple[int]:
    """The launch grid of a [m, n] output."""
    return (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)


@triton.jit
def grouped(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of a program's tile: GROUP_M tiles down, then one to the right, so that the weight stays in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = pid // per_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + pid % per_group % height, pid % per_group // height


@triton.jit
def swizzled(rows, columns, row_stride):
    """Offset of block scale (row, column) in the 128x4 tiles of format.md 2.3; row_stride is the stored width."""
    tile = (rows // 128) * (row_stride // 4) + columns // 4
    return tile * 512 + (rows % 32) * 16 + (rows % 128) // 32 * 4 + columns % 4


@triton.jit
def load_scales(
    words_ptr, rows, first, width, EVEN_K: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """Bytes [ROWS, COUNT] as int32 of the block scales first .. first + COUNT, from the 128x4 tiles of format.md 2.3.

    width is the stored one. Four columns of a row are neighbours there: one 32-bit load, which is also the least that
    copies asynchronously; single bytes would stall the loop.
    """
    o_word = first // 4 + tl.arange(0, (COUNT + 3) // 4)
    p_row = words_ptr + (rows // 128) * (width // 4) * 128 + (rows % 32) * 4 + rows % 128 // 32
    p_words = p_row[:, None] + o_word[None, :] * 128
    words = tl.load(p_words) if EVEN_K else tl.load(p_words, mask=o_word[None, :] < width // 4, other=0)
    shift = tl.arange(0, COUNT if COUNT < 4 else 4) * 8
    if COUNT < 4:
        shift += first % 4 * 8
    return tl.reshape((words[:, :, None] >> shift[None, None, :]) & 0xFF, (ROWS, COUNT))


@triton.jit
def multiply(a, b, acc):
    """acc + a @ b with fp32 sums."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc)


@triton.jit
def add_outer(acc, a_ptr, b_ptr, a_rows, b_rows, R, RANK_BLOCK: tl.constexpr):
    """acc [A, B] + a [a_rows, R] @ b [b_rows, R]^T; the rank is padded with zeros to a multiple of RANK_BLOCK."""
    for first in tl.range(0, R, RANK_BLOCK, num_stages=1):
        o_r = first + tl.arange(0, RANK_BLOCK)
        inside = o_r[None, :] < R
        b_a = tl.load(a_ptr + a_rows[:, None] * R + o_r[None, :], mask=inside, other=0.0)
        b_b = tl.load(b_ptr + b_rows[:, None] * R + o_r[None, :], mask=inside, other=0.0)
        acc = multiply(b_a, tl.trans(b_b), acc)
    return acc
