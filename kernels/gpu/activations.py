"""Inputs of quantized layers: rotated, rounded and projected on the low-rank branch by one kernel that reads them once.

In every launcher x is [M, K], contiguous, fp16, bf16 or fp32; down [R, K] and s ([R] or [], fp32; None: 1) give the
branch's t = s * (x down^T) [M, R], from x before any rotation or rounding, in x's dtype; without down t is None.
`extension` columns (a multiple of 64) put t behind x instead, rounded by the same rule, and t is None; zeros without a
branch.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..reference import ROTATED_GROUPS, round_up
from .quantize_blocks import block_quantize_kernel
from .quantize_int8 import int8_quantize_kernel

MAX_RANK = 256
ROWS = 32

_empty = torch.empty  # tests replace it: outputs full of poison show what a kernel forgets to write


class Config(NamedTuple):
    """How a branch of that (padded) rank runs: its tile of `down` shares registers and memory with the rest."""

    rank: int
    columns: int  # per step of the block formats
    stages: int
    warps: int
    registers: int | None  # at most, in the int8 kernel. 128: two programs share an SM, so that the 144 of 4608 rows
    # run at once on 80 SMs and more; a second wave would double the time


def config(rank: int) -> Config:
    padded = max(32, triton.next_power_of_2(rank))
    if padded <= 64:
        return Config(padded, 128, 2, 8, 128)
    return Config(padded, 64, 1, 8, None)


def rotate_quantize_int8(x: Tensor, group: int, down: Tensor | None = None, s: Tensor | None = None):
    """(q int8 [M, K], scale fp32 [M, 1], t): rows rotated in groups (0: not), scale amax/127, ties to even."""
    return _int8(x, None, group, down, s)


def swiglu_quantize_int8(gate: Tensor, up: Tensor, group: int, down: Tensor | None = None, s: Tensor | None = None):
    """rotate_quantize_int8 of silu(gate) * up, which is never stored."""
    return _int8(gate, up, group, down, s)


def quantize_nvfp4(x: Tensor, sx: Tensor, down: Tensor | None = None, s: Tensor | None = None, extension: int = 0):
    """(packed codes, swizzled E4M3 block scales, t) under the tensor scale sx []; beyond 2688 sx values saturate."""
    nv, _, t = _blocks(x, None, sx, down, s, (extension, None))
    return *nv, t


def quantize_mxfp8(x: Tensor, down: Tensor | None = None, s: Tensor | None = None, extension: int = 0):
    """(E4M3 codes, swizzled E8M0 exponents as uint8, t)."""
    _, mx, t = _blocks(x, None, None, down, s, (None, extension))
    return *mx, t


def dual_quantize(x: Tensor, sx: Tensor, down: Tensor | None = None, s: Tensor | None = None, extensions=(0, 0)):
    """((NVFP4 codes, scales), (MXFP8 codes, exponents), t) of one x, read once; t unless both have an extension."""
    return _blocks(x, None, sx, down, s, tuple(extensions))


def swiglu_quantize_nvfp4(gate: Tensor, up: Tensor, sx: Tensor, down: Tensor | None = None, s: Tensor | None = None,
                          extension: int = 0):  # fmt: skip
    """quantize_nvfp4 of silu(gate) * up, which is never stored."""
    nv, _, t = _blocks(gate, up, sx, down, s, (extension, None))
    return *nv, t


def swiglu_quantize_mxfp8(gate: Tensor, up: Tensor, down: Tensor | None = None, s: Tensor | None = None,
                          extension: int = 0):  # fmt: skip
    """quantize_mxfp8 of silu(gate) * up, which is never stored."""
    _, mx, t = _blocks(gate, up, None, down, s, (None, extension))
    return *mx, t


def _int8(x, up, group, down, s):
    _check(x, up, down, s)
    (m, k), device = x.shape, x.device
    if group not in ROTATED_GROUPS:
        raise ValueError(
            f"convrot group {group}: the kernel rotates groups of {', '.join(map(str, ROTATED_GROUPS))} (0: none)"
        )
    if group and k % group:
        raise ValueError(f"in_features {k} is not a multiple of the ConvRot group {group}")
    q = _empty(m, k, dtype=torch.int8, device=device)
    scale = _empty(m, 1, dtype=torch.float32, device=device)
    rank = 0 if down is None else down.shape[0]
    t = None if down is None else _empty(m, rank, dtype=x.dtype, device=device)
    if not m:
        return q, scale, t
    c, down, s, s_step = _branch(down if rank else None, s)
    wide = x.dtype == torch.float32
    rows = 16 if m <= 16 or c.rank > 128 or wide else ROWS  # the latter two: for their registers
    with on_device(x):
        int8_quantize_kernel[(triton.cdiv(m, rows),)](
            x, up, q, scale, down, s, t if rank else None, m, k, rank, s_step,
            GROUP=group, RANK=c.rank, ROWS=rows, STAGES=c.stages, num_warps=c.warps,
            maxnreg=None if wide else c.registers,
        )  # fmt: skip
    return q, scale, t


def _blocks(x, up, sx, down, s, extensions):
    """((nvfp4 codes, scales), (mxfp8 codes, exponents), t); an extension of None: without that format."""
    _check(x, up, down, s)
    (m, k), device = x.shape, x.device
    rank = 0 if down is None else down.shape[0]
    nv_extension, mx_extension = (0 if e is None else e for e in extensions)
    for extension in (nv_extension, mx_extension):
        if extension % 64 or (extension and rank > extension):
            raise ValueError(
                f"extension of {extension} columns for a branch of rank {rank}: use a multiple of 64 >= rank"
            )
    nv = mx = (None, None)
    if extensions[0] is not None:
        nv = _outputs(m, k, nv_extension, 16, 2, torch.uint8, torch.float8_e4m3fn, device)
    if extensions[1] is not None:
        mx = _outputs(m, k, mx_extension, 32, 1, torch.float8_e4m3fn, torch.uint8, device)
    wants_t = down is not None and 0 in extensions
    t = _empty(m, rank, dtype=x.dtype, device=device) if wants_t else None
    if not m:
        return nv, mx, t
    c, down, s, s_step = _branch(down if rank else None, s)
    columns = round_up(k, 128)
    per_program = columns if rank else min(columns, 512)  # sums of a branch stay in one program
    grid = (round_up(m, 128) // ROWS, triton.cdiv(columns, per_program))
    with on_device(x):
        block_quantize_kernel[grid](
            x, up, sx, *map(_bytes, (*nv, *mx)), down, s, t if rank else None, m, k, rank, s_step, per_program,
            NV_EXTENSION=nv_extension, MX_EXTENSION=mx_extension, RANK=c.rank, ROWS=ROWS,
            COLUMNS=c.columns, STAGES=c.stages, num_warps=c.warps,
        )  # fmt: skip
    return nv, mx, t


def _outputs(m, k, extension, block, codes_per_byte, dtype, scale_dtype, device) -> tuple[Tensor, Tensor]:
    """Codes and swizzled scales of [m, k] padded to `block` both ways, and the extension behind it."""
    rows, columns = round_up(m, block), round_up(k, block) + extension
    scales = round_up(rows, 128), round_up(columns // block, 4)
    codes = _empty(rows, columns // codes_per_byte, dtype=dtype, device=device)
    return codes, _empty(*scales, dtype=scale_dtype, device=device)


def _branch(down, s):
    """(config, down, s, step of s): a scalar s is read again and again."""
    if down is None:
        return config(0), None, None, 0
    return config(down.shape[0]), down, s, int(s is not None and s.numel() > 1)


def _check(x, up, down, s):
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"input is {x.dtype}; cast it to bfloat16, float16 or float32")
    if up is not None and (up.shape != x.shape or up.dtype != x.dtype):
        raise ValueError(f"gate is {list(x.shape)} {x.dtype}, up is {list(up.shape)} {up.dtype}; they must match")
    if down is not None and (down.shape[1] != x.shape[1] or down.shape[0] > MAX_RANK):
        raise ValueError(f"branch is {list(down.shape)} for {x.shape[1]} columns; at most {MAX_RANK} rows are fused")
    if s is not None and down is not None and s.numel() not in (1, down.shape[0]):
        raise ValueError(f"{s.numel()} strengths for a branch of rank {down.shape[0]}")
    for tensor in (x, up, down, s):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"operand {list(tensor.shape)} is not contiguous; call .contiguous() on it")


def _bytes(tensor: Tensor | None) -> Tensor | None:
    """fp8 pointers compile from SM 8.9 only: kernels see bytes."""
    return None if tensor is None else tensor.view(torch.uint8)


def on_device(x: Tensor):
    """Triton launches on the current device; this makes it the device of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
