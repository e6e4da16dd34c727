"""Edits by hand: lines that give layers another format and rank than the allocation chose."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import formats
from .formats import Format, Plain
from .header import shown
from .quantization import patterns
from .quantization.allocation import Option
from .quantization.layer_map import KEEP, label
from .words import first_of

MAX_TEXT = 400_000  # characters


@dataclass(frozen=True)
class Edit:
    """`PATTERN = FORMAT [rN]`: without rN no correction."""

    number: int  # of the line
    pattern: str
    format: Format | None
    rank: int

    def layers(self, names: Sequence[str]) -> list[str]:
        """Those that the pattern names: a layer by its own name, whatever that is, else a recipe's glob."""
        if self.pattern in names:
            return [self.pattern]
        expression = patterns.compile(self.pattern)
        return [name for name in names if expression.search(f"{name}.weight")]

    def option(self, menu: Sequence[Option], shape: Sequence[int]) -> Option | None:
        """What it means for a layer; None if the layer cannot take it."""
        words = {KEEP} if self.format is None else {self.format.label}
        if isinstance(self.format, Plain):
            words.add(KEEP)  # what stays as it is stored
        elif self.format is not None:
            try:
                words.add(self.format.for_shape(*shape).label)
            except ValueError:
                return None
        return next((o for o in menu if label(o.format) in words and o.rank == self.rank), None)

    def error(self, problem: object) -> ValueError:
        return ValueError(f"edits, line {self.number} ({shown(str(self))}): {problem}")

    def __str__(self) -> str:
        return f"{self.pattern} = {label(self.format)}" + (f" r{self.rank}" if self.rank else "")


def parse(text: str) -> list[Edit]:
    """The edits of a text, `#` begins a comment. Raises ValueError naming the first line that is none."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"edits: {len(text)} characters are more than {MAX_TEXT}; use patterns for many layers")
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].strip()
        if words:
            try:
                found.append(_edit(number, words))
            except ValueError as problem:
                raise ValueError(f"edits, line {number} ({shown(words)}): {problem}") from None
    return found


def _edit(number: int, line: str) -> Edit:
    pattern, _, choice = (part.strip() for part in line.rpartition("="))
    word, *rest = choice.split() or [""]
    if not (pattern and word) or len(rest) > 1 or (rest and not re.fullmatch(r"r\d{1,4}", rest[0], re.ASCII)):
        raise ValueError("write PATTERN = FORMAT or PATTERN = FORMAT rN, as in layers.3.attention.qkv = mxfp8 r32")
    rank = int(rest[0][1:]) if rest else 0
    try:
        format = None if word == KEEP else formats.parse(word)
    except ValueError as problem:
        raise ValueError(f"{problem}, and {KEEP}") from None
    if rank and (format is None or isinstance(format, Plain)):
        raise ValueError(f"r{rank}: a layer that stays exact has no error to correct; leave it out")
    return Edit(number, pattern, format, rank)


def apply(
    text: str, options: Mapping[str, Sequence[Option]], shapes: Mapping[str, Sequence[int]], kept: Mapping[str, str]
) -> tuple[dict[str, Option], list[str]]:
    """(layer -> what it is to be, remarks about layers that a pattern names and that cannot be it). Later lines win.

    `kept`: layers that nobody may change, and why. Raises ValueError, naming the line, if it names no layer or none
    that can be it.
    """
    found, remarks, names = {}, [], [*options, *kept]
    for edit in parse(text):
        try:
            named = edit.layers(names)
        except ValueError as problem:
            raise edit.error(problem) from None
        if not named:
            raise edit.error("names no layer of this model; the report lists them")
        taken = {n: o for n in named if (o := edit.option(options.get(n, ()), shapes[f"{n}.weight"])) is not None}
        refused = [n for n in named if n not in taken and not (n in kept and edit.format is None)]
        if refused and not taken:
            raise edit.error(_why(refused[0], options.get(refused[0], ()), kept.get(refused[0])))
        if refused:
            remarks.append(f"edits, line {edit.number}: {len(refused)} layers cannot be that and stay as they were "
                           f"({first_of(refused)})")  # fmt: skip
        found |= taken
    return found, remarks


def _why(name: str, menu: Sequence[Option], kept: str | None) -> str:
    if kept is not None:
        return f"{name} must stay as it is: {kept}"
    ranks = sorted({o.rank for o in menu})
    words = ", ".join(dict.fromkeys(label(o.format) for o in menu)) or "nothing but keep"
    return f"{name} was measured for {words}, with rank {', '.join(map(str, ranks))}; allow more in the plan's inputs"
