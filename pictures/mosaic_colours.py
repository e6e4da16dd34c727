"""What the tiles of a layer map are coloured by: as web/layer_map_colours.js does it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..tiles import EXACT, Tile, gigabytes, percent

FORMATS = {
    "nvfp4": ("#D55E00", "4"),
    "mxfp8": ("#0072B2", "8"),
    "fp8": ("#56B4E9", "f"),
    "int8_row": ("#009E73", "i"),
    "int8_convrot": ("#44C9A0", "c"),
    "keep": ("#8A8A8A", "·"),
    "strange": ("#CC79A7", "?"),
}
"""Of Okabe and Ito's palette, told apart by the colour-blind; the letter says the same."""
KERNELS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#8A8A8A")
STEPS = ("#440154", "#482475", "#414487", "#355F8D", "#2A788E", "#21918C", "#22A884", "#44BF70", "#7AD151", "#BDDF26",
         "#FDE725")  # fmt: skip
WAYS = ("format", "error", "sensitivity", "size", "kernel")


@dataclass(frozen=True)
class Entry:
    """A colour of the legend: what it stands for, and how many layers have it."""

    label: str
    count: int
    colour: str
    mark: str = ""


@dataclass(frozen=True)
class Scale:
    """The ends of a legend that is a gradient, and how many layers are not on it."""

    low: str
    high: str
    log: bool
    none: int
    lacking: str  # what those are


@dataclass(frozen=True)
class Scheme:
    """A way to colour: (colour, mark) of a tile, no colour where nothing is known; its legend."""

    of: Callable[[Tile], tuple[str | None, str]]
    entries: Sequence[Entry] = ()
    scale: Scale | None = None


def scheme(by: str, tiles: Sequence[Tile]) -> Scheme:
    """Raises ValueError for a way that there is not."""
    if by not in WAYS:
        raise ValueError(f"color {by!r}: must be one of {', '.join(WAYS)}")
    if by == "format":
        return _by_format(tiles)
    if by == "kernel":
        return _by_kernel(tiles)
    value = {
        "error": lambda tile: tile.error if tile.corrected is None else tile.corrected,
        "sensitivity": lambda tile: tile.sensitivity,
        "size": lambda tile: tile.nbytes or None,
    }[by]
    return _scaled(tiles, value, gigabytes if by == "size" else percent)


def family(label: str) -> str:
    """Of formats that share a colour."""
    if label in EXACT:
        return "keep"
    starts = {"int8_convrot": "int8_convrot", "int8": "int8_row", "fp8": "fp8", "float8": "fp8"}
    found = next((name for start, name in starts.items() if label.startswith(start)), label)
    return found if found in FORMATS else "strange"


def _by_format(tiles: Sequence[Tile]) -> Scheme:
    counts = Counter(tile.format for tile in tiles)
    entries = [Entry(label, n, *FORMATS[family(label)]) for label, n in counts.most_common()]
    return Scheme(lambda tile: FORMATS[family(tile.format)], entries)


def _by_kernel(tiles: Sequence[Tile]) -> Scheme:
    """By the kernel that ran most, else the one that is planned."""
    counts = Counter(map(_kernel, tiles))
    found: dict[str, tuple[str | None, str]] = {"": (None, "")}
    for number, name in enumerate(name for name, _ in counts.most_common() if name):
        found[name] = KERNELS[min(number, len(KERNELS) - 1)], chr(ord("A") + number) if number < 26 else "?"
    entries = [Entry(name or "not quantized", n, found[name][0] or "", found[name][1]) for name, n in
               counts.most_common()]  # fmt: skip
    return Scheme(lambda tile: found[_kernel(tile)], entries if len(found) > 1 else ())


def _kernel(tile: Tile) -> str:
    return max(tile.ran, key=tile.ran.get) if tile.ran else tile.kernel


def _scaled(tiles: Sequence[Tile], value, write) -> Scheme:
    known = [number for number in map(value, tiles) if number is not None and math.isfinite(number)]
    if not known:
        return Scheme(lambda tile: (None, ""))
    low, high = min([n for n in known if n > 0] or known), max(known)
    log = low > 0 and high / low > 100

    def of(tile: Tile) -> tuple[str | None, str]:
        number = value(tile)
        if number is None or not math.isfinite(number):
            return None, ""
        if high <= low:
            return STEPS[0], ""
        share = math.log(max(number, low) / low) / math.log(high / low) if log else (number - low) / (high - low)
        return STEPS[max(0, min(len(STEPS) - 1, round(share * (len(STEPS) - 1))))], ""

    without = [tile for tile in tiles if of(tile)[0] is None]
    lacking = "unknown" if any(tile.quantized for tile in without) else "not quantized"
    return Scheme(of, scale=Scale(write(low), write(high), log, len(without), lacking))
