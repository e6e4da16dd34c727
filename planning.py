"""Plans a model: allocates formats and ranks to a size or an error, and says why as a recipe."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

from . import edits as by_hand
from . import writer
from .contents import METADATA_SPARE, Contents, lora_key
from .formats import Format, TensorSpec
from .publication import write_text
from .quantization import allocation, recipe
from .quantization.allocation import Option
from .quantization.layer_map import KEEP, label
from .quantization.patterns import natural
from .quantization.pipeline import CORRECTION
from .quantization.recipe import Recipe
from .quantization.report import size
from .survey import Survey
from .words import first_of

UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "b": 1}


@dataclass(frozen=True)
class PlannedLayer:
    """One layer's choice. `damage` is the expected one, rank included; `nbytes` counts its LoRA too."""

    format: Format | None
    rank: int | None
    reason: str
    nbytes: int = 0
    damage: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What every layer becomes, the exact bytes of the files that a job makes of it, and the error to expect."""

    name: str
    survey: Survey
    layers: dict[str, PlannedLayer]
    model_bytes: int
    lora_bytes: int
    wish: str  # what was asked for
    seconds: float = 0.0
    options: Mapping[str, Sequence[Option]] = field(default_factory=dict, repr=False)  # what layers could be
    before: Mapping[str, PlannedLayer] = field(default_factory=dict)  # layers edited by hand, as they were allocated
    edits: str = ""
    remarks: tuple[str, ...] = ()  # about edits

    @property
    def nbytes(self) -> int:
        return self.model_bytes + self.lora_bytes

    @property
    def error(self) -> float:
        """Root of the summed damages."""
        return sum(layer.damage for layer in self.layers.values()) ** 0.5

    @property
    def rank(self) -> int:
        """The largest of a layer; what a job is told."""
        return max((layer.rank or 0 for layer in self.layers.values()), default=0)

    def toml(self) -> str:
        """The recipe as a file's text, each layer with its score."""
        kept = "outside the model's blocks or no linear layer"
        return recipe.dumps(self.name, self.description(), self.layers, KEEP, kept)

    def recipe(self) -> Recipe:
        """What Job takes."""
        return recipe.loads(self.toml(), self.name)

    def description(self) -> str:
        return (f"Planned for {self.survey.source.name}, {self.wish}: model {size(self.model_bytes)}, correction LoRA "
                f"{size(self.lora_bytes)}, expected error {self.error:.4g}; by {self.survey.method}.")  # fmt: skip

    def counts(self) -> dict[str, int]:
        words = [label(layer.format) + (f" r{layer.rank}" if layer.rank else "") for layer in self.layers.values()]
        return {word: words.count(word) for word in sorted(set(words), key=lambda w: (-words.count(w), w))}

    def rows(self) -> list[dict]:
        """A row per planned layer: choice, scores in every format, indicators."""
        return [row | self._choice(row["layer"]) for row in self.survey.rows()]

    def _choice(self, name: str) -> dict:
        layer = self.layers[name]
        return {"format": label(layer.format), "rank": layer.rank or 0, "bytes": layer.nbytes, "damage": layer.damage}

    def as_dict(self) -> dict:
        return self.survey.as_dict() | {
            "name": self.name, "wish": self.wish, "bytes": self.nbytes, "model_bytes": self.model_bytes,
            "lora_bytes": self.lora_bytes, "error": self.error, "counts": self.counts(), "layers": self.rows(),
            "seconds": self.seconds, "edited": sorted(self.before),
        }  # fmt: skip

    def summary(self) -> list[str]:
        """The totals as a few lines of plain text."""
        counts = ", ".join(f"{n} {word}" for word, n in self.counts().items())
        return [
            f"{self.name}: {size(self.nbytes)} = model {size(self.model_bytes)} + correction LoRA "
            f"{size(self.lora_bytes)}; asked for {self.wish}",
            f"layers: {counts}",
            f"expected error {self.error:.4g}; scored by {self.survey.method}",
            *([f"edited by hand: {len(self.before)} layers ({first_of(self.before)}), whatever was asked for"]
              if self.before else []),
            *self.remarks,
        ]  # fmt: skip

    def markdown(self) -> str:
        return self.survey.markdown(self.summary(), self.layers)

    def save(self, path: Path) -> Path:
        """Writes the recipe, atomically. Raises ValueError if the file exists."""
        check_recipe_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self.toml())
        return path


def check_recipe_path(path: Path) -> None:
    """Raises ValueError if no recipe can be written there."""
    if path.suffix != ".toml":
        raise ValueError(f"{path}: name it .toml, that is how a recipe is recognised")
    if path.exists():
        raise ValueError(f"{path}: already exists; choose another name")


def plan(survey: Survey, name: str, target: Target, edits: str = "") -> Plan:
    """The allocation with the least expected error whose files, model and correction LoRA together, are no larger than
    the target; or the smallest one with no more than the target's error. Headers are counted. Then `edits` are made,
    whatever they do to the target.

    Raises ValueError that states the smallest possible size if the target is below it, or names an edit's line.
    """
    started, sizes = time.monotonic(), _Sizes(survey)
    if target.nbytes is not None and sizes.smallest > target.nbytes:
        raise ValueError(f"target size {size(target.nbytes)} is below the smallest possible, {size(sizes.smallest)} "
                         f"({sizes.smallest:,} bytes), with every layer in its cheapest format")  # fmt: skip
    plans = []
    for ranks in dict.fromkeys(((0,), survey.menu.ranks)):  # without ranks there is no second file
        if (chosen := sizes.fit(ranks, target)) is not None:
            plans.append((allocation.total(chosen)[1], *sizes.files(chosen), chosen))
    if not plans:
        allocation.allocate(sizes.options, target_damage=target.error**2)  # says what can be reached
    best = min(plans, key=lambda p: (p[0], p[1] + p[2]) if target.nbytes is not None else (p[1] + p[2], p[0]))
    _, model_bytes, lora_bytes, chosen = best
    layers = {n: _planned(survey, n, option) for n, option in chosen.items()}
    layers |= {n: PlannedLayer(None, None, f"kept: {why}") for n, why in survey.kept.items()}
    found, remarks = by_hand.apply(edits, sizes.options, survey.source.shapes(), survey.kept)
    changed = {n: option for n, option in found.items() if option != chosen[n]}
    if changed:
        model_bytes, lora_bytes = sizes.files(chosen | changed)
    edited = {n: _edited(_planned(survey, n, option), layers[n]) for n, option in changed.items()}
    return Plan(name, survey, layers | edited, model_bytes, lora_bytes, str(target), time.monotonic() - started,
                sizes.options, {n: layers[n] for n in sorted(edited, key=natural)}, edits, tuple(remarks))  # fmt: skip


def _planned(survey: Survey, name: str, option: Option) -> PlannedLayer:
    scores = survey.damages[name]
    said = ", ".join(f"{word} {damage:.3g}" for word, damage in sorted(scores.items(), key=lambda kv: -kv[1]))
    reason = f"score {option.damage:.3g}" + (f" with rank {option.rank}" if option.rank else "")
    reason = f"{reason} (squared error alone: {said or 'no format fits its shape'})"
    rank = None if option.format is None else option.rank
    return PlannedLayer(option.format, rank, reason, option.nbytes, option.damage)


def _edited(layer: PlannedLayer, before: PlannedLayer) -> PlannedLayer:
    planned = label(before.format) + (f" rank {before.rank}" if before.rank else "")
    return replace(layer, reason=f"edited by hand, {planned} was planned: {layer.reason}")


class _Sizes:
    """Bytes of plans for one survey: what each option adds, and the whole files as a job writes them."""

    def __init__(self, survey: Survey):
        self.survey, self.source = survey, survey.source
        self._shapes = self.source.shapes()
        self.options = {name: self._layer(name) for name in survey.layers}
        cheapest = {n: _cheapest(menu) for n, menu in self.options.items()}
        self.smallest = sum(self.files(cheapest))
        self._fixed = self.smallest - allocation.total(cheapest)[0]

    def fit(self, ranks: Sequence[int], target: Target) -> dict[str, Option] | None:
        """The best plan of those ranks; None if there is none.

        The shares of the headers are known for a layer to a few bytes; what a whole plan is over is taken off.
        """
        options = {n: [o for o in menu if o.rank in ranks] for n, menu in self.options.items()}
        if target.error is not None:
            least = sum(min(o.damage for o in menu) for menu in options.values())
            return allocation.allocate(options, target_damage=target.error**2) if least <= target.error**2 else None
        overhead = METADATA_SPARE if max(ranks) else 0  # of a second file
        room = target.nbytes - self._fixed - overhead
        while room >= sum(_cheapest(menu).nbytes for menu in options.values()):
            chosen = allocation.allocate(options, room)
            over = sum(self.files(chosen)) - target.nbytes
            if over <= 0:
                return chosen
            room -= over
        cheapest = {n: _cheapest(menu) for n, menu in options.items()}
        return cheapest if sum(self.files(cheapest)) <= target.nbytes else None

    def files(self, chosen: Mapping[str, Option]) -> tuple[int, int]:
        """(bytes of the model, bytes of its correction LoRA)."""
        packed = {n: o for n, o in chosen.items() if o.format is not None}
        return file_sizes(self._contents(self.source, packed, {n: o.rank for n, o in packed.items()}))

    def _layer(self, name: str) -> list[Option]:
        key, weight = f"{self.source.prefix}{name}", f"{name}.weight"
        tensors = {k: spec for k, spec in self.source.tensors.items() if k.rpartition(".")[0] == key}
        alone = SimpleNamespace(name=self.source.name, prefix=self.source.prefix, metadata={}, tensors=tensors,
                                shapes=lambda: {weight: self._shapes[weight]})  # fmt: skip
        empty = self._contents(alone, {}, {}).reserve()
        found = []
        for format, rank, damage in self.survey.options(name):
            one = Option(format, rank, 0, damage)
            files = self._contents(alone, {} if format is None else {name: one}, {name: rank})
            nbytes = self._share(files.specs() | files.optional()) + files.reserve() - empty
            found.append(replace(one, nbytes=nbytes + self._share(files.lora_specs())))
        return found

    def _share(self, specs: Mapping[str, TensorSpec]) -> int:
        most = self.source.nbytes
        header = sum(len(json.dumps({k: writer.entry(s, most)}, separators=(",", ":"))) - 1 for k, s in specs.items())
        return header + sum(spec.nbytes for spec in specs.values())

    def _contents(self, source, packed: Mapping[str, Option], ranks: Mapping[str, int]) -> Contents:
        lora = Path("lora.safetensors") if any(ranks.values()) else None
        known = frozenset(packed) & self.survey.calibrated
        formats = {n: o.format for n, o in packed.items()}
        return Contents(source, Path("model.safetensors"), lora, formats, ranks, {}, CORRECTION, known)


def _cheapest(menu: Sequence[Option]) -> Option:
    return min(menu, key=lambda o: (o.nbytes, o.damage, str(o)))


def file_sizes(files: Contents) -> tuple[int, int]:
    """(bytes of the model, bytes of its correction LoRA) as a job writes them.

    Exact without statistics; with them at most this much, as smoothing and biases are settled layer by layer.
    """
    _, model = writer.layout(files.specs() | files.optional(), files.reserve())
    if files.lora is None:
        return model, 0
    specs = files.lora_specs()
    biases = {lora_key(n, "diff_b") for n in files.formats if n not in files.calibrated}
    unwritten = sum(spec.nbytes for key, spec in specs.items() if key in biases)
    return model, writer.layout(specs, METADATA_SPARE)[1] - unwritten


@dataclass(frozen=True)
class Target:
    """What to plan for: the largest size in bytes, or the largest error. Raises ValueError unless it is one of them."""

    nbytes: int | None = None
    error: float | None = None

    def __post_init__(self):
        if (self.nbytes is None) == (self.error is None):
            raise ValueError("give a target size or a target error, one of the two")
        if self.error is not None and not self.error > 0:
            raise ValueError(f"target error {self.error}: must be above 0, 0.02 is 2 %")

    def __str__(self) -> str:
        return f"error at most {self.error:.4g}" if self.nbytes is None else f"at most {size(self.nbytes)}"


def parse_ranks(text: str) -> tuple[int, ...]:
    """Ranks in a text such as `0, 16, 32`. Raises ValueError for what is no number."""
    words = text.replace(",", " ").split()
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"ranks {text!r}: write whole numbers, as in 0, 16, 32, 64")
    return tuple(map(int, words))


def parse_size(text: str) -> int:
    """Bytes of `4.84GB`, `4.6 GiB`, `800MB`. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]+)\s*", text.lower())
    if not found or found[2] not in UNITS or float(found[1]) <= 0:
        raise ValueError(f"size {text!r}: write a number and a unit, as in 4.84GB, 4.5GiB or 800MB")
    return int(float(found[1]) * UNITS[found[2]])
