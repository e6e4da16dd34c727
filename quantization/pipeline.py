"""One layer through scales, rounding and low rank."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch import Tensor

from ..formats import NVFP4, Entries, Format, Plain, Quantized, require_finite
from . import lowrank, scales
from .lowrank import LowRank
from .metrics import norm, relative_error


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's checkpoint entries, its correction, and the relative weight errors without and with it."""

    entries: Entries
    branch: LowRank | None
    error: float
    corrected_error: float | None


def quantize(format: Format, weight: Tensor, rank: int, seed: int, sweep: bool = True) -> QuantizedLayer:
    """A weight [out, in] (fp32) in a format settled for its shape, and the rank-r correction of what that lost.

    Data-free. Raises ValueError if the weight is not finite or the format cannot hold its range.
    """
    require_finite(weight)
    quantized = encode(format, weight, sweep)
    residual = format.decode(quantized).sub_(weight).neg_()
    length = norm(weight)
    error = norm(residual) / length if length else 0.0
    if isinstance(format, Plain) or not rank:
        return QuantizedLayer(format.pack(quantized), None, error, None)
    branch = lowrank.fit(residual, rank, seed).half()
    corrected = norm(branch.add_to(residual, -1)) / length if length else 0.0
    return QuantizedLayer(format.pack(quantized), branch, error, corrected)


def encode(format: Format, weight: Tensor, sweep: bool = True) -> Quantized:
    """Codes of a finite fp32 weight [out, in]: swept block scales where the format has a choice, else its standard."""
    return scales.encode(format, weight) if sweep and isinstance(format, NVFP4) else format.encode(weight)


def layer_errors(stored: Tensor, branch: LowRank | None, weight: Tensor) -> list[float]:
    """Relative error of a stored weight, then of it + branch if there is one. Adds the branch to `stored` in place."""
    errors = [relative_error(stored, weight)]
    return errors if branch is None else [*errors, relative_error(branch.add_to(stored), weight)]


def layer_seed(seed: int, name: str) -> int:
    """A seed of its own per layer, so that neither order nor other layers change a layer's bytes."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7])
