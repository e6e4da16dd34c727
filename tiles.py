"""A layer map as data: one tile per layer of a model, and what the browser gets of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .header import shown
from .quantization.layer_map import KEEP, label

if TYPE_CHECKING:
    from .quantization.allocation import Option

VERSION = 1
PLAN, JOB, LOADED, INSPECTED, FILE = "plan", "job", "loaded", "inspected", "file"
WEIGHT, OUTPUT, SHARE = "weight error", "output error", "share of the model's error"  # what a tile's error is of
EXACT = (KEEP, "bf16", "fp16", "fp32")  # formats that are no quantization
MOST_CHARACTERS = 98_000  # of a payload of some 300 layers; options of rarer ranks are left out for it


@dataclass(frozen=True)
class Tile:
    """One layer. Errors are relative; `sensitivity` is what its coarsest format would do to the model."""

    name: str
    format: str  # label; `keep` or a dtype where the layer is not quantized
    shape: tuple[int, ...]  # [out, in]
    nbytes: int
    error: float | None = None
    corrected: float | None = None  # with its low-rank branch
    sensitivity: float | None = None
    kernel: str = ""  # that is planned
    ran: Mapping[str, int] | None = None  # forward calls by the kernel that ran; None: nobody counts
    path: str = ""  # native, transcode, ...
    reason: str = ""
    rank: int = 0  # of its branch
    strength: float | None = None  # of the branch
    edited: bool = False
    done: bool = True  # False: a job has not come to it yet
    kept: str = ""  # format it is kept in, where that is not the file's
    added: float | None = None  # to its weight error, by transcoding
    planned: str = ""  # format and rank before edits
    planned_rank: int = 0

    @property
    def bits(self) -> float:
        """Per weight."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    @property
    def quantized(self) -> bool:
        return self.format not in EXACT


@dataclass(frozen=True)
class Mosaic:
    """All tiles of a model in the file's order, and a few facts about it, ready to show."""

    title: str
    kind: str
    facts: Sequence[tuple[str, str]]
    tiles: Sequence[Tile]
    options: Mapping[str, Sequence[Option]] | None = None  # by layer, what a plan may choose from
    nbytes: int = 0  # of the plan's files
    edits: str = ""
    measure: str = WEIGHT  # what `error` is of

    def payload(self) -> dict:
        """What the browser gets: columns with a value for every layer, words by their index in a list.

        `done`, `kept`, `added`, `planned` and `planned_rank` are there only where they say something.
        """
        formats, kernels, reasons = _Words(), _Words(), _Words()
        tiles = self.tiles
        columns = {
            "name": [shown(t.name) for t in tiles],
            "format": [formats.index(t.format) for t in tiles],
            "shape": [list(t.shape) for t in tiles],
            "bits": [round(t.bits, 2) for t in tiles],
            "nbytes": [t.nbytes for t in tiles],
            **{word: [_rounded(getattr(t, word)) for t in tiles]
               for word in ("error", "corrected", "sensitivity", "strength")},
            "kernel": [kernels.index(t.kernel) for t in tiles],
            "ran": [None if t.ran is None else [[kernels.index(k), n] for k, n in _most_first(t.ran)] for t in tiles],
            "path": [t.path for t in tiles],
            "reason": [reasons.index(t.reason) for t in tiles],
            "rank": [t.rank for t in tiles],
            "edited": [int(t.edited) for t in tiles],
        }  # fmt: skip
        if not all(t.done for t in tiles):
            columns["done"] = [int(t.done) for t in tiles]
        if any(t.kept for t in tiles):
            columns |= {"kept": [formats.index(t.kept) for t in tiles], "added": [_rounded(t.added) for t in tiles]}
        if any(t.edited for t in tiles):
            columns["planned"] = [formats.index(t.planned) for t in tiles]
            columns["planned_rank"] = [t.planned_rank for t in tiles]
        options, fixed = self._options(formats, MOST_CHARACTERS - len(json.dumps([columns, reasons.words])))
        return {
            "version": VERSION, "title": shown(self.title), "kind": self.kind, "measure": self.measure,
            "facts": [[name, shown(text)] for name, text in self.facts],
            "formats": formats.words, "kernels": kernels.words, "reasons": reasons.words,
            "layers": columns, "options": options, "fixed": fixed, "edits": self.edits,
        }  # fmt: skip

    def text(self) -> str:
        """The facts, and how many layers have which format, as two lines."""
        counts = Counter(tile.format for tile in self.tiles)
        facts = ", ".join(f"{name} {value}" for name, value in self.facts)
        return "\n".join(
            [f"{shown(self.title)}: {facts}", ", ".join(f"{n} {word}" for word, n in counts.most_common())]
        )

    def table(self) -> str:
        """All layers in markdown."""
        head = ["layer", "format", "shape", "bits", "MB", self.measure, "with correction", "rank"]
        rows = [[shown(t.name).replace("|", "\\|"), t.format, " x ".join(map(str, t.shape)), f"{t.bits:.2f}",
                 f"{t.nbytes / 1e6:.2f}", *("" if e is None else percent(e) for e in (t.error, t.corrected)),
                 str(t.rank or "")] for t in self.tiles]  # fmt: skip
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))

    def _options(self, formats: _Words, room: int) -> tuple[list | None, dict | None]:
        """(per layer [format, rank, bytes, damage], what else the files hold). The chosen options' damages are exact,
        so that their sum is the plan's; of many ranks the rarest are left out, which can still be typed."""
        if self.options is None:
            return None, None
        ranks = self._ranks(room)
        found, chosen_bytes = [], 0
        for tile in self.tiles:
            rows = []
            for option in self.options.get(tile.name, ()):
                word = label(option.format)
                chosen = (word, option.rank) == (tile.format, tile.rank)
                chosen_bytes += option.nbytes if chosen else 0
                if chosen or option.rank in ranks or (word, option.rank) == (tile.planned, tile.planned_rank):
                    damage = option.damage if chosen else _rounded(option.damage)
                    rows.append([formats.index(word), option.rank, option.nbytes, damage])
            found.append(rows)
        return found, {"nbytes": self.nbytes - chosen_bytes}

    def _ranks(self, room: int) -> set[int]:
        """Those that every layer offers: 0, and as many of the most used ones as there is room for, in characters."""
        options = [option for menu in self.options.values() for option in menu]
        cost = Counter()
        for option in options:
            cost[option.rank] += len(f"[0, {option.rank}, {option.nbytes}, {_rounded(option.damage)}], ")
        used = Counter(tile.rank for tile in self.tiles)
        kept, room = {0}, room - cost[0] - 16 * len(self.tiles)  # chosen ones are exact, which takes more
        for rank in sorted(cost.keys() - {0}, key=lambda rank: (-used[rank], rank)):
            if cost[rank] <= room:
                kept.add(rank)
                room -= cost[rank]
        return kept


@dataclass
class _Words:
    """Distinct words in order of appearance."""

    words: list[str] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def index(self, word: str) -> int:
        if not word:
            return -1
        word = shown(word)
        if word not in self._places:
            self._places[word] = len(self.words)
            self.words.append(word)
        return self._places[word]


def _most_first(ran: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(ran.items(), key=lambda item: -item[1])


def _rounded(value: float | None) -> float | None:
    """To four digits; None for what is no number, which JSON does not have."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def percent(value: float) -> str:
    return f"{100 * value:.3g} %"
