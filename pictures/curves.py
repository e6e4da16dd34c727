"""A curve over a strength: an error on the left axis, a ratio on the right one, the best point marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import FAINT, GOOD, INK, PAPER, RULE, font_of, new_sheet

if TYPE_CHECKING:
    from PIL.Image import Image

FINE = 3  # drawn so many times as large, then made smaller: smooth lines
WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, UPPER, LOWER = 96, 96, 64, 72  # margins


@dataclass(frozen=True)
class Series:
    """Values over the strengths, with an axis of their own; infinite ones are left out."""

    title: str
    unit: str
    values: Sequence[float]
    colour: str


def curve(title: str, x_title: str, strengths: Sequence[float], left: Series, right: Series, best: int) -> Image:
    """Both series over the strengths, in their order from small to large."""
    from PIL import Image

    sheet, pen = new_sheet(WIDTH * FINE, HEIGHT * FINE)
    chart = _Chart(sheet, pen, _axis(strengths, zero=False, spare=0.03))
    chart.text((WIDTH / 2, 30), title, INK, 20, "mm")
    chart.frame(x_title)
    chart.best(strengths[best])
    order = sorted(range(len(strengths)), key=lambda i: strengths[i])
    for series, on_left in ((left, True), (right, False)):
        finite = [i for i in order if math.isfinite(series.values[i])]
        axis = _axis([series.values[i] for i in finite] or [0.0], zero=on_left)
        chart.side(series, axis, on_left)
        chart.line([(strengths[i], series.values[i], i == best) for i in finite], axis, series, on_left)
    return sheet.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    step: float

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        first = math.ceil(self.low / self.step - 1e-6)
        return [n * self.step for n in range(first, math.floor(self.high / self.step + 1e-6) + 1)]


def _axis(values: Sequence[float], zero: bool, spare: float = 0.0) -> _Axis:
    """An axis that holds the values, from round number to round number; `spare`: not round, with that share around."""
    low, high = min(values), max(values)
    low = min(low, 0.0) if zero else low
    span = (high - low) or abs(high) or 1.0
    step = next(s for s in _steps(span) if span / s <= 6)
    if spare:
        return _Axis(low - spare * span, high + spare * span, step)
    low, high = math.floor(low / step + 1e-6) * step, math.ceil(high / step - 1e-6) * step
    return _Axis(low, high + (step if high == low else 0), step)


def _steps(span: float):
    power = 10 ** (math.floor(math.log10(span)) - 1)
    return (factor * unit for unit in (power, 10 * power, 100 * power) for factor in (1, 2, 2.5, 5))


class _Chart:
    """Draws in units of the finished picture."""

    def __init__(self, sheet: Image, pen, across: _Axis):
        self.sheet, self.pen, self.across = sheet, pen, across

    def x(self, value: float) -> float:
        return LEFT + self.across.share(value) * (WIDTH - LEFT - RIGHT)

    def y(self, axis: _Axis, value: float) -> float:
        return HEIGHT - LOWER - axis.share(value) * (HEIGHT - UPPER - LOWER)

    def text(self, at: tuple[float, float], text: str, colour: str, size: int, anchor: str) -> None:
        self.pen.text([FINE * n for n in at], text, colour, font_of(size * FINE), anchor)

    def stroke(self, points, colour: str, width: float) -> None:
        self.pen.line([(FINE * x, FINE * y) for x, y in points], colour, round(FINE * width), "curve")

    def frame(self, title: str) -> None:
        for tick in self.across.ticks():
            x = self.x(tick)
            self.stroke([(x, UPPER), (x, HEIGHT - LOWER)], RULE, 0.5)
            self.text((x, HEIGHT - LOWER + 8), f"{tick:.4g}", INK, 15, "mt")
        self.stroke([(LEFT, HEIGHT - LOWER), (WIDTH - RIGHT, HEIGHT - LOWER)], FAINT, 1)
        self.text((WIDTH / 2, HEIGHT - 24), title, INK, 16, "mm")

    def best(self, strength: float) -> None:
        x = self.x(strength)
        for y in range(UPPER, HEIGHT - LOWER, 10):
            self.stroke([(x, y), (x, min(y + 5, HEIGHT - LOWER))], GOOD, 2)
        anchor = "lb" if x < WIDTH / 2 else "rb"
        self.text((x, UPPER - 6), f"best: {strength:g}", GOOD, 16, anchor)

    def side(self, series: Series, axis: _Axis, on_left: bool) -> None:
        """An axis with its numbers and title; the lines across are those of the left one."""
        edge = LEFT if on_left else WIDTH - RIGHT
        for tick in axis.ticks():
            y = self.y(axis, tick)
            if on_left:
                self.stroke([(LEFT, y), (WIDTH - RIGHT, y)], RULE, 0.5)
            at, anchor = ((edge - 8, y), "rm") if on_left else ((edge + 8, y), "lm")
            self.text(at, f"{tick:.4g}", series.colour, 15, anchor)
        title, pen = new_sheet((HEIGHT - UPPER - LOWER) * FINE, 24 * FINE)
        said = f"{series.title} ({series.unit})"
        pen.text((title.width / 2, title.height / 2), said, series.colour, font_of(16 * FINE), "mm")
        turned = title.rotate(90 if on_left else -90, expand=True)
        self.sheet.paste(turned, (FINE * (8 if on_left else WIDTH - 32), FINE * UPPER))

    def line(self, points: list[tuple[float, float, bool]], axis: _Axis, series: Series, round_marks: bool) -> None:
        places = [(self.x(x), self.y(axis, y)) for x, y, _ in points]
        if len(places) > 1:
            self.stroke(places, series.colour, 2.5)
        draw = self.pen.ellipse if round_marks else self.pen.rectangle
        for (x, y), (*_, best) in zip(places, points, strict=True):
            radius = 7 if best else 5
            draw([FINE * n for n in (x - radius, y - radius, x + radius, y + radius)], series.colour, PAPER, 2 * FINE)
            if best:
                radius += 3
                draw([FINE * n for n in (x - radius, y - radius, x + radius, y + radius)], None, GOOD, 2 * FINE)
