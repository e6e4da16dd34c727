"""Where a running job is, and how long it will still take by what its layers have cost so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .contents import Contents
from .quantization.report import LayerReport

FEEDBACK = 4096  # inputs over which GPTQ carries an error, at most: larger moments are recorded in blocks
SECONDS_PER_WEIGHT = 2e-7  # of one core; what counts is how the three compare: the run itself corrects the scale
SECONDS_PER_FEEDBACK = 2e-11  # GPTQ, per weight and input
SECONDS_PER_READ = 2e-8  # verification


@dataclass(frozen=True)
class Step:
    """Where a running job is. `seconds_left` is an estimate from what was measured so far; None before the first."""

    index: int
    total: int
    layer: str
    seconds_left: float | None
    verifying: bool = False  # the second pass, over what was written
    format: str = ""  # of the layer in hand
    share: float = 0.0  # of all the work, done
    last: LayerReport | None = None  # the layer finished just before
    done: Sequence[LayerReport] = ()  # all that are finished; grows while the job runs

    def __str__(self) -> str:
        minutes, seconds = divmod(int(self.seconds_left or 0), 60)
        left = "" if self.seconds_left is None else f", {minutes}:{seconds:02d} left"
        return f"{self.index}/{self.total} {self.layer}{left}"

    def details(self) -> str:
        """The layer in hand and the one before, in a line; empty if there is nothing to say."""
        before = "" if self.last is None else f"before: {self.last.line()}"
        return "; ".join(filter(None, (self.format, before)))


@dataclass(frozen=True)
class Cost:
    """What one piece of work should take; pieces of one kind are off by the same factor."""

    kind: str
    seconds: float


class Estimate:
    """Seconds left: guessed costs, corrected per kind by what pieces of that kind took, else by what all took."""

    def __init__(self, costs: Mapping[str, Cost], width: int = 1):
        self._costs, self.width = dict(costs), width
        self._guessed: dict[str, float] = {}
        self._measured: dict[str, float] = {}

    @classmethod
    def of(cls, contents: Contents, done: Iterable[LayerReport]) -> Estimate:
        """Of a job: each layer is quantized, then verified. Layers of an earlier run count with what they took."""
        costs = {}
        for name, format in contents.formats.items():
            shape = contents.shape(name)
            feedback = min(shape[1], FEEDBACK) if name in contents.calibrated else 0
            costs[name] = layer_cost(format.label, shape, feedback)
            costs[f"verifying {name}"] = reading_cost(shape)
        estimate = cls(costs)
        for row in done:
            estimate.done(row.name, row.seconds)
        return estimate

    def done(self, name: str, seconds: float) -> None:
        """A piece is finished and took so long."""
        cost = self._costs.pop(name)
        self._guessed[cost.kind] = self._guessed.get(cost.kind, 0.0) + cost.seconds
        self._measured[cost.kind] = self._measured.get(cost.kind, 0.0) + seconds

    def seconds_left(self) -> float | None:
        """With `width` pieces at work at a time; None before anything was measured."""
        if not self._measured:
            return None
        return sum(cost.seconds * self._factor(cost.kind) for cost in self._costs.values()) / self.width

    def share(self) -> float:
        """Of the whole work, by cost, that is done."""
        left = sum(cost.seconds * self._factor(cost.kind) for cost in self._costs.values())
        spent = sum(self._measured.values())
        return spent / (spent + left) if spent + left else 0.0

    def _factor(self, kind: str) -> float:
        """Measured seconds per guessed one."""
        if kind in self._measured:
            return self._measured[kind] / self._guessed[kind]
        guessed = sum(self._guessed.values())
        return sum(self._measured.values()) / guessed if guessed else 1.0


def layer_cost(label: str, shape: tuple[int, int], feedback: int) -> Cost:
    """Of quantizing a layer [out, in]; `feedback`: inputs over which GPTQ carries the error of one, 0 without."""
    rows, columns = shape
    seconds = SECONDS_PER_WEIGHT * rows * columns + SECONDS_PER_FEEDBACK * (rows + columns) * columns * feedback
    return Cost(f"{label} {'with' if feedback else 'without'} statistics", seconds)


def reading_cost(shape: tuple[int, int]) -> Cost:
    """Of comparing a written layer with its source."""
    return Cost("verification", SECONDS_PER_READ * shape[0] * shape[1])
