"""What each format does to one layer by itself: its error, and how much of it a low-rank branch leaves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import Format, Plain, require_finite
from . import activations, indicators, lowrank, pipeline
from .calibration import Statistics
from .indicators import Indicators
from .metrics import norm
from .moment import Moment


@dataclass(frozen=True)
class LocalError:
    """One format on one layer, rounded with swept scales. Squared errors, relative to the layer's own output."""

    format: Format
    weight: float  # ||E||^2 / ||W||^2
    output: float | None  # tr(E R E^T) / tr(W R W^T); None without statistics
    noise: float  # of rounding the input as this format's kernels do, which no rank takes; 0 without statistics
    left: dict[int, float]  # rank -> share of `output` (`weight` without statistics) that remains; {0: 1.0} at least

    @property
    def energy(self) -> float:
        """The best known relative squared error of the layer's output, weights alone."""
        return self.weight if self.output is None else self.output

    def remaining(self, rank: int, activations: bool = False) -> float:
        """Share of a measured damage that a branch of that rank leaves."""
        left = self.left.get(rank, 1.0)
        noise = self.noise if activations else 0.0
        whole = self.energy + noise
        return (self.energy * left + noise) / whole if whole else 1.0


@dataclass(frozen=True)
class Measurement:
    """One layer in every format that can store it."""

    shape: tuple[int, int]
    errors: dict[str, LocalError]  # by the format's label
    indicators: Indicators
    rows: int  # of the weight that were measured


def measure(
    weight: Tensor, formats: Iterable[Format], ranks: Sequence[int], statistics: Statistics | None = None,
    seed: int = 0, rows: int | None = None,
) -> Measurement:  # fmt: skip
    """Local errors of a weight [out, in] (fp32) in `formats`, each settled for its shape, for every rank.

    At most `rows` rows, evenly spaced, stand for all; None: all. Raises ValueError if the weight is not finite.
    """
    require_finite(weight)
    sample = weight if rows is None or rows >= len(weight) else weight[_spaced(len(weight), rows)]
    moment = statistics.moment().to(weight.device) if statistics is not None else None
    errors = {}
    for format in formats:
        try:
            errors[format.label] = _local(format, sample, ranks, statistics, moment, seed, len(weight))
        except ValueError:  # numbers this format cannot hold: it is no option for this layer
            continue
    shape = (weight.shape[0], weight.shape[1])
    return Measurement(shape, errors, indicators.of(weight), len(sample))


def _local(format, weight, ranks, statistics, moment: Moment | None, seed, all_rows) -> LocalError:
    stored = format.decode(pipeline.encode(format, weight))
    residual = weight - stored
    length, squared = norm(weight) ** 2, norm(residual) ** 2
    relative, output, noise = squared / length if length else 0.0, None, 0.0
    if moment is not None:
        whole, squared = moment.energy(weight), moment.energy(residual)
        output = squared / whole if whole else 0.0
        x = statistics.sample.float()
        if len(x) and whole:
            noise = norm((activations.rounded(format, x) - x) @ stored.T) ** 2 / len(x) / whole
    left = {0: 1.0}
    if squared and max(ranks, default=0) > 0 and not isinstance(format, Plain):
        left |= _left(residual, moment, squared, ranks, seed, all_rows)
    return LocalError(format, relative, output, noise, left)


def _left(residual: Tensor, moment: Moment | None, squared: float, ranks, seed, all_rows: int) -> dict[int, float]:
    """Share of the squared error left after each rank: one fit at the largest gives the eigenvalues of all."""
    branch = lowrank.fit(residual, max(ranks), seed, moment)
    down = branch.down if moment is None else moment.times(branch.down)
    taken = ((down * branch.down).sum(1) * branch.up.square().sum(0)).cumsum(0) / squared
    share = _rows_correction(residual.shape, moment, all_rows)
    return {r: min(1.0, max(0.0, 1 - share * taken[min(r, len(taken)) - 1].item())) for r in ranks if r > 0}


def _rows_correction(shape, moment: Moment | None, all_rows: int) -> float:
    """How much less a rank takes of all rows than of the measured ones.

    A rank takes (1/sqrt(K) + 1/sqrt(N))^2 of white noise [N, K] (Marchenko and Pastur 1967); with inputs of second
    moment R, K is their effective number tr(R)^2 / ||R||^2.
    """
    rows, columns = shape
    if rows == all_rows:
        return 1.0
    if moment is not None:
        columns = (moment.diagonal().sum().square() / moment.matrix.square().sum().clamp(min=1e-30)).item()
    edge = [columns**-0.5 + n**-0.5 for n in (all_rows, rows)]
    return (edge[0] / edge[1]) ** 2


def _spaced(count: int, wanted: int) -> Tensor:
    return torch.arange(wanted) * count // wanted
