"""What every format does to every layer of a model, measured: what a plan is made from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from . import formats
from .checkpoint import DETECTION, EMBEDDINGS
from .formats import BF16, Format, Plain, TensorSpec
from .job import is_text_encoder
from .progress import Step
from .quantization import architecture, indicators, measurement
from .quantization.calibration import Calibration, fingerprint
from .quantization.layer_map import label
from .quantization.measurement import Measurement
from .quantization.patterns import natural
from .quantization.pipeline import layer_seed
from .source import Source

if TYPE_CHECKING:
    from .planning import PlannedLayer

FORMATS = ("nvfp4", "int8_convrot", "mxfp8", "bf16")
RANKS = (0, 16, 32, 64)
ROWS = 1024  # of each weight that are measured where no model runs
LOCAL_OUTPUT = "relative output error of each layer by itself, from the calibration"
LOCAL_WEIGHT = "relative weight error of each layer by itself, as nothing was calibrated"
PROXY = "no model was run: single-layer scores from TesseraPlan with a calibration are a far better guide"


@dataclass(frozen=True)
class Menu:
    """What the allocation may choose from. `bf16` keeps a layer that is stored so; without it all are quantized."""

    formats: tuple[Format, ...]
    ranks: tuple[int, ...] = RANKS

    @classmethod
    def of(cls, labels: Iterable[str] = FORMATS, ranks: Iterable[int] = RANKS) -> Menu:
        """Raises ValueError for a word that is no format, for none at all, or a rank below 0 or above 256."""
        found = tuple(dict.fromkeys(formats.parse(word) for word in labels))
        if all(isinstance(format, Plain) for format in found):
            raise ValueError(f"no format to quantize with; choose among {', '.join(FORMATS[:-1])}")
        ranks = tuple(sorted({0, *ranks}))
        if ranks[0] < 0 or ranks[-1] > 256:
            raise ValueError(f"rank {ranks[0] if ranks[0] < 0 else ranks[-1]}: must be 0 (no correction) to 256")
        return cls(found, ranks)

    def ranks_of(self, format: Format | None) -> tuple[int, ...]:
        return (0,) if format is None or isinstance(format, Plain) else self.ranks


@dataclass(frozen=True)
class Outline:
    """A source without its weights: what plans need of one, and all that is kept of a model in memory."""

    name: str
    prefix: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorSpec]
    nbytes: int
    known: Mapping[str, tuple[int, ...]]
    path: None = None

    @classmethod
    def of(cls, source: Source) -> Outline:
        return cls(source.name, source.prefix, source.metadata, source.tensors, source.nbytes, source.shapes())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self.known)


@dataclass
class Survey:
    """A model's layers as measured: `damages` is what each (layer, format label) does to the output at rank 0."""

    source: Source | Outline
    menu: Menu
    layers: dict[str, Measurement]
    kept: dict[str, str]  # layer -> why it must stay as it is
    damages: dict[str, dict[str, float]]  # squared errors; their sum is the model's
    method: str
    calibrated: frozenset[str] = frozenset()  # layers with statistics
    activations: frozenset[str] = frozenset()  # labels whose damage includes rounding the layer's input
    notes: list[str] = field(default_factory=list)

    def options(self, name: str) -> list[tuple[Format | None, int, float]]:
        """(format, rank, damage) of everything the layer may become."""
        found: list[tuple[Format | None, int, float]] = []
        for word, error in self.layers[name].errors.items():
            activations = word in self.activations
            for rank in self.menu.ranks_of(error.format):
                damage = self.damages[name][word] * error.remaining(rank, activations)
                found.append((error.format, rank, damage))
        return found + ([(None, 0, 0.0)] if self.may_keep(name) else [])

    def may_keep(self, name: str) -> bool:
        """Whether leaving the layer alone is on the menu: where bf16 is and the source stores no more than that."""
        return not self.layers[name].errors or (BF16() in self.menu.formats and _is_16_bit(self.source, name))

    def rows(self) -> list[dict]:
        """A row per layer: scores in every format, and quant_probe's indicators, which decide nothing."""
        found = {name: layer.indicators for name, layer in self.layers.items()}
        probed = indicators.quant_probe_scores(found)
        return [
            {"layer": name, "shape": list(self.layers[name].shape), "scores": self.damages[name]}
            | asdict(found[name]) | {"quant_probe": probed[name]}
            for name in sorted(found, key=natural)
        ]  # fmt: skip

    def as_dict(self) -> dict:
        return {"source": self.source.name, "method": self.method, "kept": self.kept, "notes": self.notes,
                "layers": self.rows()}  # fmt: skip

    def markdown(self, summary: Sequence[str] = (), planned: Mapping[str, PlannedLayer] | None = None) -> str:
        """Totals, notes and one table row per layer, with what was planned for it if anything was."""
        summary = summary or [f"{self.source.name}: {len(self.layers)} layers scored by {self.method}"]
        lines = [*(f"- {line}" for line in summary), *(f"- note: {note}" for note in self.notes), ""]
        words = list(dict.fromkeys(word for scores in self.damages.values() for word in scores))
        choice = ["format", "rank", "MB"] if planned else []
        head = ["layer", *choice, *(f"score {w}" for w in words), "kurtosis", "range", "aspect"]
        rule = "-|-|" if planned else "-|"
        lines += [f"| {' | '.join(head)} |", f"|{rule}{'-:|' * (len(head) - rule.count('|'))}"]
        for row in self.rows():
            cells = [row["layer"]]
            if planned:
                layer = planned[row["layer"]]
                cells += [label(layer.format), str(layer.rank or ""), f"{layer.nbytes / 1e6:.2f}"]
            cells += [f"{row['scores'][w]:.3g}" if w in row["scores"] else "" for w in words]
            cells += [f"{row['kurtosis']:.2f}", f"{row['dynamic_range']:.3g}", f"{row['aspect_ratio']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def survey(
    source: Source, menu: Menu, calibration: Calibration | None = None, rows: int | None = ROWS, device: str = "cpu",
    seed: int = 0, progress: Callable[[Step], None] = lambda step: None,
) -> Survey:  # fmt: skip
    """Every layer that may be packed in every format of the menu, one layer in memory at a time; damages are local
    errors until a model is probed. Layers that the architecture keeps are never demoted."""
    _refuse_foreign(source, calibration)
    shapes, known = source.shapes(), architecture.detect(source.shapes())
    names = [k.removesuffix(".weight") for k, s in shapes.items() if k.endswith(".weight") and len(s) == 2]
    kept = {name: why for name in names if (why := _why_kept(source, known, name))}
    names = sorted((name for name in names if name not in kept), key=natural)
    if not names:
        raise ValueError(f"{source.name}: has no layer that may be packed; is it a model?")
    if is_text_encoder(shapes):  # nothing can attach a LoRA to a CLIP yet
        menu = replace(menu, ranks=(0,))
    weights = {name: shapes[f"{name}.weight"][0] * shapes[f"{name}.weight"][1] for name in names}
    found, started, done = {}, time.monotonic(), 0
    for index, name in enumerate(names):
        left = (time.monotonic() - started) * (sum(weights.values()) - done) / done if done else None
        share = done / sum(weights.values())
        progress(Step(index, len(names), f"measuring {name}", left, share=share))
        statistics = calibration.of(name) if calibration is not None else None
        settled = _settled(menu, known, source, name, shapes[f"{name}.weight"])
        weight = source.weight(name).to(device)
        try:
            found[name] = measurement.measure(
                weight, settled, menu.ranks, statistics and statistics.to(device), layer_seed(seed, name), rows
            )
        except ValueError as problem:
            raise ValueError(f"{source.name}: {name}: {problem}") from None
        done += weights[name]
    return _local_survey(source, menu, found, kept, known, calibration)


def _local_survey(source, menu, found: dict[str, Measurement], kept, known, calibration) -> Survey:
    damages = {n: {w: e.energy / len(found) for w, e in m.errors.items()} for n, m in found.items()}
    silent = [n for n, m in found.items() if any(e.output is None for e in m.errors.values())]
    calibrated = calibration is not None and len(silent) < len(found)
    notes = [PROXY] + ([known.warning] if known.warning else [])
    if calibrated and silent:
        notes.append(f"{len(silent)} layers have no statistics and count by their weight error (first: {silent[0]})")
    sampled = [m.rows for m in found.values() if m.rows < m.shape[0]]
    if sampled:
        notes.append(f"{len(sampled)} of {len(found)} layers: {max(sampled)} evenly spaced rows stand for all")
    if bare := [n for n, m in found.items() if not m.errors]:
        notes.append(f"{len(bare)} layers fit no format of the menu and are kept (first: {bare[0]})")
    notes.append(f"architecture {known.name}: {len(kept)} layers are kept whatever the size")
    method = LOCAL_OUTPUT if calibrated else LOCAL_WEIGHT
    known_inputs = frozenset(found) - frozenset(silent) if calibration is not None else frozenset()
    return Survey(source, menu, found, kept, damages, f"{method} (root mean square over layers)", known_inputs,
                  notes=notes)  # fmt: skip


def _refuse_foreign(source: Source, calibration: Calibration | None) -> None:
    if calibration is not None and calibration.model != (here := fingerprint(source)):
        raise ValueError(f"{source.name}: statistics of another model ({calibration.model[:12]}, this one is "
                         f"{here[:12]}); record them with this model, or plan without")  # fmt: skip


def _why_kept(source: Source, known, name: str) -> str | None:
    if source.quantized(name):
        return "quantized already"
    if DETECTION.search(name):
        return "ComfyUI knows the model by this weight's shape"
    return "looked up by row" if EMBEDDINGS.search(name) else known.keeps(name)


def _settled(menu: Menu, known, source: Source, name: str, shape) -> list[Format]:
    """The menu's formats for this layer; none of 4 bits where the architecture asks for more."""
    found = []
    for format in menu.formats:
        if isinstance(format, Plain) and _is_16_bit(source, name):
            continue  # keeping it is the same
        if format.codes_per_byte > 1 and known.eases(name):
            continue
        try:
            found.append(format.for_shape(*shape))
            found[-1].storage(*shape)
        except ValueError:
            found = [f for f in found if f is not format]
    return found


def _is_16_bit(source: Source, name: str) -> bool:
    return source.tensors[f"{source.prefix}{name}.weight"].dtype in (torch.bfloat16, torch.float16)
