"""A stack of LoRAs as text, one a line: `name.safetensors : strength_model [: strength_clip]`; a leading # mutes it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

LIMIT = 100.0  # of a strength, as in ComfyUI's LoraLoader
_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_LINE = re.compile(rf"(.+?)\s*(?::\s*({_NUMBER}))?\s*(?::\s*({_NUMBER}))?")  # the shortest name that fits
_BREAK = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class Line:
    name: str  # as the host lists it
    strength_model: float
    strength_clip: float


def parse(text: str, names: Sequence[str]) -> list[Line]:
    """The lines that are not muted, in order; strength_model is 1 where none is given, strength_clip as strength_model.

    `names` are the files there are. A name that starts with # is written ./#name. Raises ValueError that tells for each
    bad line its number, what is wrong, and what to write.
    """
    listed = {_slashes(name): name for name in names}
    lines, complaints = [], []
    for number, written in enumerate(_BREAK.split(text), 1):
        line = written.strip()
        if line and not line.startswith("#"):
            try:
                lines.append(_parse(line, listed))
            except ValueError as error:
                complaints.append(f"line {number}: {error}")
    if complaints:
        raise ValueError("\n".join(complaints))
    return lines


def _parse(line: str, listed: dict[str, str]) -> Line:
    written, model, clip = _LINE.fullmatch(line).groups()
    name = listed.get(_slashes(written))
    if name is None:
        raise ValueError(_unknown(line, written, listed))
    strength = float(model or 1.0)
    strengths = strength, strength if clip is None else float(clip)
    for value in strengths:
        if not -LIMIT <= value <= LIMIT:
            raise ValueError(f"{name}: strength {value:g} is outside -{LIMIT:g} to {LIMIT:g}")
    return Line(name, *strengths)


def _unknown(line: str, written: str, listed: dict[str, str]) -> str:
    for colon in re.finditer(":", line):
        name = listed.get(_slashes(line[: colon.start()].strip()))
        if name is not None:
            return (f'{name}: "{line[colon.end() :].strip()}" is not one or two numbers; write {name} : 0.8, or '
                    f"{name} : 0.8 : 0.6 for model and text encoder")  # fmt: skip
    wanted = _slashes(written)
    near = [name for name in listed if wanted in (PurePosixPath(name).stem, PurePosixPath(name).name)]
    near += difflib.get_close_matches(wanted, listed, 1, 0.7)
    help = f"did you mean {listed[near[0]]}?" if near else "put it there and press R, or mute the line with a leading #"
    return f'there is no "{written}" in models/loras; {help}'


def _slashes(name: str) -> str:
    """A name as written on any system: workflows travel between Windows and others."""
    return name.replace("\\", "/").removeprefix("./")
