"""How a LoRA's strength moves while a picture is made."""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A factor on the strength over sampling, 0 at its start and 1 at its end: linear between points, 0 outside
    [start, end)."""

    points: tuple[tuple[float, float], ...] = ()  # (share of sampling, factor); without any, 1
    start: float = 0.0
    end: float = 1.0

    @classmethod
    def parse(cls, curve: str = "", start: float = 0.0, end: float = 1.0) -> Schedule | None:
        """From "0:0, 0.3:1, 1:0.5"; None if nothing moves. Raises ValueError for what is no curve."""
        points = []
        for text in filter(None, (part.strip() for part in curve.replace("\n", ",").split(","))):
            share, colon, factor = text.partition(":")
            try:
                points.append((float(share), float(factor)))
            except ValueError:
                colon = ""
            if not colon or not 0 <= points[-1][0] <= 1 or not abs(points[-1][1]) <= 100:
                raise ValueError(f"curve: {text!r} is no point; write share of sampling : factor, as in 0:0, 1:1")
        if any(after[0] <= before[0] for before, after in itertools.pairwise(points)):
            raise ValueError(f"curve {curve!r}: shares must rise from point to point")
        if not 0 <= start < end <= 1:
            raise ValueError(f"start_percent {start:g}, end_percent {end:g}: sampling goes from 0 to 1, the start must "
                             "come before the end")  # fmt: skip
        still = all(factor == 1 for _, factor in points) and (start, end) == (0, 1)
        return None if still else cls(tuple(points), start, end)

    def factor(self, share: float) -> float:
        """At this share of sampling."""
        if not (self.start <= share < self.end or (self.end >= 1 and share >= self.start)):
            return 0.0
        if not self.points:
            return 1.0
        if share <= self.points[0][0]:
            return self.points[0][1]
        for (a, low), (b, high) in itertools.pairwise(self.points):
            if share <= b:
                return low + (high - low) * (share - a) / (b - a)
        return self.points[-1][1]

    def __str__(self) -> str:
        shape = ", ".join(f"{share:g}:{factor:g}" for share, factor in self.points) or "1"
        return shape if (self.start, self.end) == (0, 1) else f"{shape} from {self.start:g} to {self.end:g}"
