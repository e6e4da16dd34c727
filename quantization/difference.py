"""The low-rank difference of two weights: a pair of a fixed rank, or of the smallest that loses no more than said."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import lowrank
from .lowrank import LowRank
from .metrics import norm
from .moment import Moment

RANK, MAX_RANK = 32, 128


@dataclass(frozen=True)
class Wish:
    """A pair's rank; or with a `tolerance` the smallest, up to `max_rank`, that loses no more than that share of the
    difference (relative L2)."""

    rank: int = RANK
    tolerance: float | None = None
    max_rank: int = MAX_RANK

    def __post_init__(self):
        for said in ("rank", "max_rank"):
            if getattr(self, said) < 1:
                raise ValueError(f"{said} {getattr(self, said)}: must be 1 or more")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance {self.tolerance}: must be between 0 and 1, the share of a layer's difference "
                             "that may be lost; 0.05 for instance")  # fmt: skip

    @property
    def most(self) -> int:
        """No pair has a higher rank."""
        return self.rank if self.tolerance is None else self.max_rank


@dataclass(frozen=True)
class Difference:
    """A weight's fp16 pair, and what it is worth. Errors are base's distance from the truth, relative, before and with
    the pair: of the weight, and of the output if the inputs are known."""

    branch: LowRank
    directions: Tensor  # [out, r], orthonormal: the pair is their part of the difference, up to fp16
    left: Tensor  # [out, in], what the pair does not hold
    loss: float  # share of the difference that is left, of the output if the inputs are known, else of the weight
    weight: tuple[float, float]
    output: tuple[float, float] | None


def fit(truth: Tensor, base: Tensor, wish: Wish, seed: int = 0, moment: Moment | None = None) -> Difference:
    """truth - base [out, in] (fp32) as the pair that loses least for inputs of that moment; `truth` is overwritten.

    Raises ValueError if fp16 cannot hold it.
    """
    length = norm(truth) or norm(base)
    power = 0.0 if moment is None else moment.energy(truth) or moment.energy(base)
    error = truth.sub_(base)
    before, whole = norm(error), _size(error, moment)
    best = lowrank.fit(error, wish.most, seed, moment)
    rank = best.rank if wish.tolerance is None else needed(best, moment, whole, wish.tolerance)
    for more in range(best.rank + 1):
        branch = LowRank(best.up[:, :rank], best.down[:rank]).half()
        left = _size(branch.add_to(error, -1), moment)
        if rank == best.rank or left <= wish.tolerance * whole:
            break
        branch.add_to(error)  # the fp16 factors fall short of it by a little
        rank = min(best.rank, rank + 2**more)
    if not all(torch.isfinite(part).all() for part in (branch.up, branch.down)):
        raise ValueError("differs by more than fp16 can hold; these are no two versions of one model")
    output = None if moment is None else (_share(whole, math.sqrt(power)), _share(left, math.sqrt(power)))
    weight = _share(before, length), _share(norm(error), length)
    return Difference(branch, best.up[:, :rank], error, _share(left, whole), weight, output)


def needed(best: LowRank, moment: Moment | None, whole: float, tolerance: float) -> int:
    """The smallest rank at which a fitted pair, its directions orthonormal and the strongest first, loses no more than
    `tolerance` of a difference of that size; at least 1, at most its own."""
    down = best.down if moment is None else moment.times(best.down)
    left = whole**2 - (down * best.down).sum(1).double().cumsum(0)  # after each rank
    return min(int((left > (tolerance * whole) ** 2).sum()) + 1, best.rank)


def _size(error: Tensor, moment: Moment | None) -> float:
    """Of a weight error, or of the output error that it makes."""
    return norm(error) if moment is None else math.sqrt(moment.energy(error))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float(part > 0)
