"""A layer and its low-rank branches as one stock GEMM over K + E: the branches' columns stand behind the layer's.

x' = [q(x) | q(s d t)], W' = [Wq | q(B / d)], so x' W'^T = q(x) Wq^T + sum_j s_j t_j B_j up to the rounding of t and B:
13 % of the branch for nvfp4, 3.8 % for mxfp8 and fp8. Where that is too much (a user's LoRA), each factor is stored as
hi + lo, x' = [t_hi | t_hi | t_lo], W' = [B_hi | B_lo | B_hi]: 1.5 % and .12 %. d: balance.py. Strengths multiply t: a
slider moves no byte of the weight. Code 0 with scale 0 is no branch.

INT8 has none: a row of x and a row of W have one step each, amax/127, under which the branch must fit whole. Measured,
that rounds a correction by 12-36 % and a LoRA by 5-20 %, and lo is below one step, so hi/lo gains nothing. INT8 adds
the branch in its GEMM's epilogue instead.

An operand is what the GEMM takes: nvfp4 bytes [rows, K/2] and E4M3 scales, mxfp8 codes [rows, K] and E8M0 scales, both
in 128x4 tiles, K padded to the block; fp8_row E4M3 codes [rows, K] and row scales, which the extension shares (fp8: one
scale for all rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference as ref

STEP = 64  # columns are reserved in multiples of this
MOST = 256  # columns; a wider branch costs more here than apart
ALIGN = {"nvfp4": 16, "mxfp8": 1, "fp8_row": 1, "fp8": 1}
"""hi and lo start at multiples of this: an nvfp4 block that holds both rounds lo away (branch error 5 % for 1.5 %)."""
ROWS = {"nvfp4": 16, "mxfp8": 32, "fp8_row": 1, "fp8": 1}  # a weight's rows are padded to a multiple of this


@dataclass(frozen=True)
class Run:
    """Reserved columns from `column` on hold the stacked ranks from `row` on, as this part of each factor."""

    column: int
    row: int
    rank: int
    t_low: bool = False
    up_low: bool = False


@dataclass(frozen=True)
class Layout:
    """What each reserved column holds. The first run is always t and B themselves, rank j in column j."""

    columns: int
    runs: tuple[Run, ...]

    @property
    def rank(self) -> int:
        return self.runs[0].rank

    @property
    def direct(self) -> bool:
        """The extension of x is t itself, zero-padded to `columns`: a fused quantizer can write it."""
        return len(self.runs) == 1


def layout(kind: str, ranks: Sequence[int], exact: Sequence[bool] | bool = False, reserved: int = 0) -> Layout | str:
    """Columns for stacked branches of these ranks, `exact` ones (one choice or one each) as hi/lo; or why not.

    r columns plain and 3r hi/lo, together rounded up to 64; at least as many as are `reserved` already.
    """
    flags = [exact] * len(ranks) if isinstance(exact, bool) else list(exact)
    if len(flags) != len(ranks):
        raise ValueError(f"{len(flags)} hi/lo choices for {len(ranks)} branches; give one for each")
    total = sum(ranks)
    split = sum(rank for rank, flag in zip(ranks, flags, strict=True) if flag)
    second = ref.round_up(total, ALIGN[kind])
    third = ref.round_up(second + split, ALIGN[kind])
    needed = third + split if split else total
    columns = max(ref.round_up(needed, STEP), reserved, STEP)
    if columns > MOST:
        return f"the branches need {needed} columns of K, {MOST} is the most that pays"
    runs, row, offset = [Run(0, 0, total)], 0, 0
    for rank, flag in zip(ranks, flags, strict=True):
        if flag and rank:
            runs.append(Run(second + offset, row, rank, up_low=True))
            runs.append(Run(third + offset, row, rank, t_low=True))
            offset += rank
        row += rank
    return Layout(columns, tuple(runs))


@dataclass(frozen=True)
class Extension:
    """What stands in the reserved columns of one operand."""

    kind: str
    qdata: Tensor  # bytes [rows, E/2] for nvfp4, codes [rows, E] else
    block_scale: Tensor | None  # [rows, E/block], not swizzled; None for fp8_row

    @property
    def columns(self) -> int:
        return self.qdata.shape[1] * _geometry(self.kind)[1]

    @property
    def nbytes(self) -> int:
        return self.qdata.nbytes + (0 if self.block_scale is None else self.block_scale.nbytes)


def reserve(kind: str, qdata: Tensor, scale: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The operand with `columns` empty columns behind its own: a copy whose product is the same.

    Tiles of scales lie row block by row block, so that more columns move every one of them: reserve once, at load.
    """
    block, per_byte = _geometry(kind)
    if columns <= 0 or columns % STEP:
        raise ValueError(f"{columns} reserved columns; they come in multiples of {STEP}")
    width = qdata.shape[1]
    wide = torch.zeros(qdata.shape[0], width + columns // per_byte, dtype=torch.uint8, device=qdata.device)
    wide[:, :width] = qdata.view(torch.uint8)
    if block:
        own = width * per_byte // block
        _check_scale(kind, scale, qdata.shape[0], own)
        scale = _retile(scale, own + columns // block)
        _blank(scale, own)  # a foreign writer's padding may not be zero
    return wide.view(qdata.dtype), scale


def strip(kind: str, qdata: Tensor, scale: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The operand without its reserved columns, whatever they hold: the bytes that `reserve` was given.

    Codes are a view: a model's worth of them at once must not be a second model.
    """
    block, per_byte = _geometry(kind)
    width = qdata.shape[1] - columns // per_byte
    if block:
        own = width * per_byte // block
        scale = _retile(scale, own)
        _blank(scale, own)
    return qdata.view(torch.uint8)[:, :width].view(qdata.dtype), scale


def write(extension: Extension, qdata: Tensor, scale: Tensor, columns: int) -> None:
    """Puts the extension into the operand's `columns` reserved ones, in place; no other byte is touched."""
    rows, width = extension.qdata.shape
    if extension.columns != columns:
        raise ValueError(f"the branch takes {extension.columns} columns, {columns} are reserved; reserve as many")
    if rows != qdata.shape[0]:
        raise ValueError(f"the branch has {rows} rows, the operand {qdata.shape[0]}; encode it for this layer")
    qdata.view(torch.uint8)[:, qdata.shape[1] - width :] = extension.qdata.view(torch.uint8)
    if extension.block_scale is not None:
        block, per_byte = _geometry(extension.kind)
        count = extension.block_scale.shape[1]
        where = offsets(rows, scale.shape[1] // 4, qdata.shape[1] * per_byte // block - count, count, scale.device)
        scale.view(torch.uint8).view(-1)[where] = extension.block_scale.view(torch.uint8)


def clear(kind: str, qdata: Tensor, scale: Tensor, columns: int) -> None:
    """Empties the reserved columns in place: the operand's product is its own again."""
    block, per_byte = _geometry(kind)
    qdata.view(torch.uint8)[:, qdata.shape[1] - columns // per_byte :] = 0
    if block:
        _blank(scale, qdata.shape[1] * per_byte // block - columns // block)


def encode_up(kind: str, up: Tensor, weight_scale: Tensor | None, layout: Layout) -> Extension:
    """The weight's part of balanced factors up [N, R]; weight_scale [] (nvfp4, fp8), [N, 1] (fp8_row), None (mxfp8)."""
    values = _place(kind, up, weight_scale, layout, [run.up_low for run in layout.runs])
    return _encode(kind, values, weight_scale, ref.round_up(up.shape[0], ROWS[kind]))


def extend_input(
    kind: str, x_q: Tensor, x_scale: Tensor, t: Tensor, scale: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor]:
    """The quantized input with t [M, R] behind it: bit for bit what quantizing [x | extended_middle(t)] at once gives.

    `scale` is x's own, [] for nvfp4 and fp8, [M, 1] for fp8_row; t saturates under it.
    """
    values = extended_middle(kind, t, scale, layout)
    qdata, x_scale = reserve(kind, x_q, x_scale, layout.columns)
    write(_encode(kind, values, scale, x_q.shape[0]), qdata, x_scale, layout.columns)
    return qdata, x_scale


def extended_middle(kind: str, t: Tensor, scale: Tensor | None, layout: Layout) -> Tensor:
    """t [M, R] as the fp32 columns [M, E] that are quantized behind x: t | t | t - q(t) for hi/lo, zero elsewhere."""
    return _place(kind, t, scale, layout, [run.t_low for run in layout.runs])


def offsets(rows: int, tiles: int, first: int, count: int, device: torch.device) -> Tensor:
    """Where scales [rows, first .. first + count] lie in a buffer with `tiles` 128x4 tiles per row block (int64)."""
    r = torch.arange(rows, device=device).unsqueeze(1)
    c = torch.arange(first, first + count, device=device)
    return (r // 128 * tiles + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4


def _place(kind: str, values: Tensor, scale: Tensor | None, layout: Layout, low: list[bool]) -> Tensor:
    if values.shape[1] != layout.rank:
        raise ValueError(f"a branch of rank {values.shape[1]} in a layout for {layout.rank}; stack all adapters")
    values = values.float()
    placed = values.new_zeros(values.shape[0], layout.columns)
    for run, is_low in zip(layout.runs, low, strict=True):
        if not is_low:
            placed[:, run.column : run.column + run.rank] = values[:, run.row : run.row + run.rank]
    if any(low):
        rest = values - _rounded(kind, placed, scale)[:, : layout.rank]
        for run, is_low in zip(layout.runs, low, strict=True):
            if is_low:
                placed[:, run.column : run.column + run.rank] = rest[:, run.row : run.row + run.rank]
    return placed


def _rounded(kind: str, values: Tensor, scale: Tensor | None) -> Tensor:
    extension = _encode(kind, values, scale, values.shape[0])
    if extension.block_scale is None:
        return extension.qdata.float() * scale
    return ref.packed_decode(kind, extension.qdata, ref.swizzle(extension.block_scale.view(torch.uint8)), scale)


def _encode(kind: str, values: Tensor, scale: Tensor | None, rows: int) -> Extension:
    """values [n, E] in codes, n zero-padded to `rows`."""
    block_scale = None
    if kind == "nvfp4":
        codes, block_scale = ref.nvfp4_codes(values, scale)
        codes = ref.pack_nibbles(codes)
    elif kind == "mxfp8":
        codes, block_scale = ref.mxfp8_codes(values)
    else:
        codes = ref.fp8_codes(values, scale)
    return Extension(kind, _pad_rows(codes, rows), None if block_scale is None else _pad_rows(block_scale, rows))


def _pad_rows(codes: Tensor, rows: int) -> Tensor:
    return ref.pad_to(codes.view(torch.uint8), rows, codes.shape[1]).view(codes.dtype)


def _geometry(kind: str) -> tuple[int, int]:
    """Columns per block scale (0: none), columns per byte."""
    if kind not in ref.BLOCKS:
        raise ValueError(f"{kind} has no K-extension ({', '.join(ref.BLOCKS)} have); add the branch apart")
    return ref.BLOCKS[kind], 2 if kind == "nvfp4" else 1


def _retile(scale: Tensor, columns: int) -> Tensor:
    """A copy of swizzled scales for another number of block columns: cropped, or extended by zero tiles."""
    tiles = ref.round_up(columns, 4) // 4
    old = scale.view(torch.uint8).view(scale.shape[0] // 128, scale.shape[1] // 4, 512)
    new = old.new_zeros(old.shape[0], tiles, 512)
    kept = min(tiles, old.shape[1])
    new[:, :kept] = old[:, :kept]
    return new.view(scale.shape[0], tiles * 4).view(scale.dtype)


def _blank(scale: Tensor, first: int) -> None:
    """Zeroes the scales of block columns from `first` on, in place."""
    count = scale.shape[1] - first
    where = offsets(scale.shape[0], scale.shape[1] // 4, first, count, scale.device)
    scale.view(torch.uint8).view(-1)[where] = 0


def _check_scale(kind: str, scale: Tensor, rows: int, columns: int) -> None:
    wanted = (ref.round_up(rows, 128), ref.round_up(columns, 4))
    if tuple(scale.shape) != wanted:
        raise ValueError(f"{kind} block scales are {list(scale.shape)}, {rows} rows need {list(wanted)} in 128x4 tiles")
