"""Where the tiles of a layer map stand: blocks along x, kinds of layers along y; as web/layer_map_data.js does it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..quantization.patterns import natural

MOST_PANELS = 40  # more kinds of blocks than any model has; the rest stands with the others


@dataclass(frozen=True)
class Place:
    """A name read as a block's: `layers.3.attention.qkv` is attention.qkv of block 3 of the stack `layers`."""

    stack: str
    number: int
    kind: str
    template: str  # what names alike but for numbers have in common, read at the same place


@dataclass
class Column:
    """One block: the tile of each row, by its place in the list of names."""

    number: int | None
    cells: list[int | None]


@dataclass
class Band:
    """The blocks of one stack, ascending."""

    stack: str
    columns: list[Column]


@dataclass
class Panel:
    """Bands beside each other that share their rows."""

    rows: list[str]
    bands: list[Band]


@dataclass
class _Grid:
    """The blocks that one reading of alike names would make."""

    cells: int = 0
    stacks: dict[str, tuple[set[int], set[str]]] = field(default_factory=dict)

    @property
    def fullness(self) -> int:
        """In tenths of its area, and one for being a grid; 0 for blocks that do not repeat."""
        sizes = [(len(columns), len(rows)) for columns, rows in self.stacks.values()]
        if not any(columns > 1 for columns, _ in sizes):
            return 0
        return 1 + round(10 * self.cells / sum(columns * rows for columns, rows in sizes))


def arrange(names: Sequence[str]) -> tuple[list[Panel], list[int]]:
    """(panels, names that are no block's). Of the numbers in a name the one counts blocks whose grid is fullest."""
    stacks: dict[str, list[tuple[Place, int]]] = {}
    other = []
    for index, place in enumerate(_places(names)):
        if place is None:
            other.append(index)
        else:
            stacks.setdefault(place.stack, []).append((place, index))
    panels = _besides([_band(stack, members) for stack, members in stacks.items()])
    for panel in panels[MOST_PANELS:]:
        other += [i for band in panel.bands for column in band.columns for i in column.cells if i is not None]
    return panels[:MOST_PANELS], other


def _places(names: Sequence[str]) -> list[Place | None]:
    candidates = [_readings(name) for name in names]
    members = Counter(place.stack for places in candidates for place in places)
    grids: dict[str, _Grid] = {}
    for place in (place for places in candidates for place in places):
        grid = grids.setdefault(place.template, _Grid())
        columns, rows = grid.stacks.setdefault(place.stack, (set(), set()))
        grid.cells += 1
        columns.add(place.number)
        rows.add(place.kind)
    fullness = {key: grid.fullness for key, grid in grids.items()}
    found = []
    for places in candidates:
        scores = [fullness[p.template] or (members[p.stack] >= 3) / 2 for p in places]
        best = max(range(len(places)), key=lambda i: (scores[i], -i), default=None)  # the outermost of equals
        found.append(places[best] if best is not None and scores[best] else None)
    return found


def _readings(name: str) -> list[Place]:
    """Every way to read a name; a number at its end is a place in a Sequential, no block."""
    parts, found = name.split("."), []
    alike = ".".join("#" if part.isdecimal() else part for part in parts)
    for at, part in enumerate(parts[:-1]):
        if re.fullmatch(r"[0-9]{1,6}", part):
            stack, kind = ".".join(parts[:at]), ".".join(parts[at + 1 :])
            found.append(Place(stack, int(part), kind, f"{at} {alike}"))
    return found


def _band(stack: str, members: Sequence[tuple[Place, int]]) -> tuple[list[str], Band]:
    """(kinds of layers, the blocks)."""
    kinds = list(dict.fromkeys(place.kind for place, _ in members))
    blocks: dict[int, dict[str, int]] = {}
    for place, index in members:
        blocks.setdefault(place.number, {})[place.kind] = index
    return kinds, Band(stack, [Column(n, [blocks[n].get(kind) for kind in kinds]) for n in sorted(blocks)])


def _besides(bands: Sequence[tuple[list[str], Band]]) -> list[Panel]:
    """Bands whose kinds are mostly the same share their rows."""
    groups: list[list[tuple[list[str], Band]]] = []
    for kinds, band in bands:
        for group in groups[:MOST_PANELS]:
            others = group[0][0]
            if len(set(others) & set(kinds)) > 0.6 * max(min(len(others), len(kinds)), 1):
                group.append((kinds, band))
                break
        else:
            groups.append([(kinds, band)])
    return [_panel(group) for group in groups]


def _panel(group: Sequence[tuple[list[str], Band]]) -> Panel:
    fullest = max((kinds for kinds, _ in group), key=len)
    rows = list(dict.fromkeys([*fullest, *(kind for kinds, _ in group for kind in kinds)]))
    made = []
    for kinds, band in group:
        at = {kind: i for i, kind in enumerate(kinds)}
        columns = [Column(c.number, [c.cells[at[r]] if r in at else None for r in rows]) for c in band.columns]
        made.append(Band(band.stack, columns))
    return Panel(rows, sorted(made, key=lambda band: natural(band.stack)))


def lines(panel: Panel, room: float, least: float, gap: float) -> list[list[Band]]:
    """A panel's columns on as few lines as fit, as even as they get; no tile is narrower than `least`."""
    most = max(4, int(room // least))
    pieces = []
    for band in panel.bands:
        count = len(band.columns)
        step = math.ceil(count / math.ceil(count / most))
        pieces += [Band(band.stack, band.columns[i : i + step]) for i in range(0, count, step)]
    found: list[list[Band]] = [[]]
    used = 0.0
    for piece in pieces:
        wide = len(piece.columns) * least
        if found[-1] and used + gap + wide > room:
            found.append([piece])
            used = wide
        else:
            used += wide + (gap if found[-1] else 0)
            found[-1].append(piece)
    return found


def short_names(stacks: Sequence[str]) -> list[str]:
    """Names of stacks without what ends all of them: input_blocks.4 for input_blocks.4.1.transformer_blocks."""
    parts = [stack.split(".") for stack in stacks]
    drop = 0
    while (
        len(parts) > 1
        and all(len(words) > drop + 1 for words in parts)
        and (len({words[-1 - drop] for words in parts}) == 1)
    ):
        drop += 1
    return [".".join(words[: len(words) - drop]) for words in parts]
