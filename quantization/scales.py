"""Block scales of NVFP4 chosen by error instead of by the largest value."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..formats import NVFP4, Quantized
from ..formats.nvfp4 import BLOCK, blocks
from ..kernels import reference as ref

# Multiples of amax/6. 1.5 maps the block maximum to 4 (arXiv 2512.02010); below 1 the maximum is clipped.
CANDIDATES = (0.85, 0.93, 1.0, 1.0625, 1.125, 1.25, 1.375, 1.5)
HEADROOM = 256.0  # the largest block's E4M3 scale at factor 1: 448/256 leaves 1.75x for the factors above 1
BLOCKS_AT_ONCE = 2048  # on CPU: 32768 numbers, where torch runs an operation in one thread; the threads are ours
MANY_BLOCKS = 1 << 20  # on other devices
MAX_VANISHED = 1e-3  # share of blocks; more, and one outlier has taken the whole tensor's range


def sweep(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(scale [], block_scale [out, in/16]) that minimise each block's squared error over CANDIDATES.

    Raises ValueError if more than MAX_VANISHED of the blocks are too small against the largest weight to keep a scale.
    """
    scale = global_scale(weight)
    grouped = blocks(weight)
    flat = grouped.reshape(-1, BLOCK)
    block_scale = torch.cat(_map(lambda piece: _best_scales(piece.T.contiguous().abs_(), scale), flat))
    block_scale = block_scale.view(grouped.shape[:2])
    refuse_vanished(weight, block_scale)
    return scale, block_scale


def global_scale(weight: Tensor) -> Tensor:
    """The fp32 scale [] that leaves room to enlarge block scales."""
    amax = weight.abs().amax()
    scale = amax / (ref.E2M1_MAX * HEADROOM)
    return scale if scale > 0 else torch.ones_like(scale)  # also where it is below the smallest number


def encode(format: NVFP4, weight: Tensor) -> Quantized:
    """NVFP4 codes with swept scales: 6 to 12 % less weight error than amax scales."""
    return format.encode_with(weight, *sweep(weight))


def best_steps(columns: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
    """scale * block_scale [n] of blocks given as columns [16, n], each error weighted by importance [16, n or 1]."""
    if columns.device.type != "cpu":
        return _best_scales(columns.abs(), scale, importance).float() * scale
    pieces = columns.split(BLOCKS_AT_ONCE, 1)
    weights = importance.split(BLOCKS_AT_ONCE, 1) if importance.shape[1] > 1 else [importance] * len(pieces)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        best = pool.map(lambda piece, weight: _best_scales(piece.abs(), scale, weight), pieces, weights)
        return torch.cat(list(best)).float() * scale


def _map(function: Callable[[Tensor], Tensor], flat: Tensor) -> list[Tensor]:
    """function of pieces of [n, 16] in order. On CPU one thread a core, each on small pieces: torch's own threads meet
    after every operation, and beside another program that made the sweep 20 times slower."""
    if flat.device.type != "cpu":
        return [function(piece) for piece in flat.split(MANY_BLOCKS)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(function, flat.split(BLOCKS_AT_ONCE)))


def _best_scales(magnitude: Tensor, scale: Tensor, importance: Tensor | None = None) -> Tensor:
    """E4M3 block scales [n] of magnitudes [16, n]: sums over a block are vector additions."""
    amax = magnitude.amax(0)
    best, least = torch.zeros_like(amax), torch.full_like(amax, torch.inf)
    for factor in CANDIDATES:
        candidate = (amax * (factor / ref.E2M1_MAX) / scale).clamp_(max=ref.E4M3_MAX)
        step = candidate.to(torch.float8_e4m3fn).float() * scale
        inverse = torch.where(step == 0, 0.0, 1 / step)
        rounded = ref.e2m1_round((magnitude * inverse).clamp_(max=ref.E2M1_MAX)).mul_(step)
        error = rounded.sub_(magnitude).square_()
        error = (error if importance is None else error.mul_(importance)).sum(0)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, step, best)
    return (best / scale).to(torch.float8_e4m3fn)


def refuse_vanished(weight: Tensor, block_scale: Tensor) -> None:
    """Raises ValueError if more than MAX_VANISHED of the blocks of a weight have got scale 0 without being zero."""
    empty = block_scale.float() == 0
    vanished = int((blocks(weight).abs().amax(-1)[empty] > 0).sum()) if empty.any() else 0
    if vanished > MAX_VANISHED * block_scale.numel():
        raise ValueError(
            f"{vanished} of {block_scale.numel()} blocks of {BLOCK} would become zero beside the largest weight "
            f"{weight.abs().amax().item():.4g}; use mxfp8 or int8_convrot for this layer"
        )
