"""Bake: LoRAs at their strengths into a new quantized checkpoint, and a new correction LoRA for it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from . import checks, lora
from .additions import Addition, BakedSource, Edit, sha256
from .checkpoint import LAYER_ERRORS, PROVENANCE, Checkpoint
from .contents import lora_key
from .formats import Format, Plain
from .job import Job, lora_path
from .matching import Names
from .quantization import calibration as calibrations
from .quantization import pipeline
from .quantization.calibration import Calibration
from .quantization.layer_map import LayerChoice, Rule
from .quantization.lowrank import LowRank
from .quantization.pipeline import Settings
from .quantization.recipe import Recipe
from .source import Baked

ORIGINAL, BEST_EFFORT = "original", "best effort"
NONE = "none"  # instead of a correction's path


@dataclass
class Bake:
    """One baking: a quantized model, and what to put into it.

    With `original` every layer is quantized anew from it. Without, layers that nothing changes keep their bytes, the
    others are quantized from what the file holds, its `correction` included. Raises ValueError, before anything is
    written, for whatever it can know up front.
    """

    model: Checkpoint
    additions: Sequence[Addition]
    original: Checkpoint | None = None
    recipe: Recipe | None = None  # None: every layer's format as it is
    correction: Path | None = None  # the model's correction LoRA
    edits: Mapping[str, Edit] = field(default_factory=dict)  # by tensor key without prefix
    choices: dict[str, LayerChoice] = field(init=False)  # layers that are quantized anew
    warnings: list[str] = field(init=False, default_factory=list)
    source: BakedSource = field(init=False)

    def __post_init__(self):
        mattering = [addition for addition in self.additions if addition.strength != 0]
        self.additions = sorted(mattering, key=lambda a: (str(a.sha256), a.strength))  # the same sums in any order
        if not self.model.layers and self.original is None:
            self.original = self.model  # nothing was lost yet
        if not self.additions and not self.edits:
            raise ValueError("there is nothing to bake: no LoRA, or all of strength 0; add one with its strength")
        self._base = self.original or self.model
        self._pairs = self._read_correction() if self.correction and not self.original else {}
        anew = self._anew() if self.original else {}
        changed = BakedSource(self._base, self.additions, self.edits).changes
        touched = {key.removesuffix(".weight") for key in changed if key.endswith(".weight")}
        self.choices = anew if self.original else self._requantized(touched)
        self._refuse_opaque(touched)
        if not self.choices:
            raise ValueError(f"{self.model.name}: what is to be baked changes none of its quantized layers, so there "
                             "is nothing to quantize; give --original or a recipe to do it all the same")  # fmt: skip
        pairs = {name: pair for name, pair in self._pairs.items() if name in self.choices}
        self.source = BakedSource(self._base, self.additions, self.edits, pairs)

    @property
    def mode(self) -> str:
        return ORIGINAL if self.original else BEST_EFFORT

    @property
    def absorbs(self) -> bool:
        return any(layer.absorbs for layer in self.model.layers.values())

    def job(self, target: Path, settings: Settings | None = None, calibration: Calibration | None = None,
            **options) -> Job:  # fmt: skip
        """The job that does it; `options` are the job's own. A file in absorb mode becomes one again."""
        settings, notes = settings or Settings(), self.notes()
        if self.absorbs:
            settings = dataclasses.replace(settings, mode=pipeline.ABSORB, smoothing=None)
        if calibration is not None:
            notes += self._check_statistics(calibration)
        made = Job(self.source, Path(target), self._layer_recipe(), settings=settings, calibration=calibration,
                   baked=Baked(self._said(), self._carried()), **options)  # fmt: skip
        for mine in filter(None, (made.target, made.lora)):
            for theirs in (self.model.path, self.correction, *(addition.path for addition in self.additions)):
                checks.refuse_same_file(mine, theirs)
        made.warnings[:0] = notes
        return made

    def notes(self) -> list[str]:
        """What was decided, in words."""
        names = ", ".join(f"{a.name} at {a.strength:g}" for a in self.additions) or "weight patches of other nodes"
        notes = [f"baked: {names}"]
        if self.original:
            notes.append(f"every layer is quantized anew, from {self.original.name}")
        else:
            staying = self.model.layers.keys() - self.choices.keys()
            paired = staying & self._pairs.keys()
            carried = f"; the correction pairs of {len(paired)} of them are carried over" if self._pairs else ""
            notes += [self._best_effort(),
                      f"kept byte for byte: {len(staying)} quantized layers that nothing changes{carried}"]  # fmt: skip
        plain = [key for key in self.source.changes if key.removesuffix(".weight") not in self.choices]
        notes += [f"merged into tensors that are not quantized: {len(plain)}"] if plain else []
        notes += [note for addition in self.additions for note in addition.notes]
        return [*notes, *self.source.notes(), *self.warnings]

    def _best_effort(self) -> str:
        """What errors are measured against, and what they leave out."""
        said = _json(self.model, LAYER_ERRORS)
        numbers = [row[-1 if name in self._pairs or self.model.layers[name].absorbs else 0]
                   for name, row in said.items() if name in self.choices and name in self.model.layers]  # fmt: skip
        lost = f" ({sum(numbers) / len(numbers):.4f} in the mean, its metadata say)" if numbers else ""
        corrected = f"with its correction {self.correction.name}" if self._pairs else "without a correction LoRA"
        return (f"best effort, as no original was given: errors are measured against {self.model.name} decoded "
                f"{corrected}, plus what is baked; what that file had lost of its original{lost} is not counted and "
                "stays")  # fmt: skip

    def _anew(self) -> dict[str, LayerChoice]:
        """Every layer that the recipe quantizes; without one, those that the model has quantized, in their formats."""
        if self.recipe is not None:
            return self._chosen()
        if not self.model.layers:
            raise ValueError(f"{self.model.name}: is not quantized, so it has no formats to take; give a recipe")
        shapes = self.original.shapes()
        for name, layer in self.model.layers.items():
            found = shapes.get(f"{name}.weight")
            if found != layer.shape:
                state = f"is {list(found)}" if found else "is missing"
                raise ValueError(f"{self.original.name}: {name}: {state}, in {self.model.name} it is "
                                 f"{list(layer.shape)}; this is not that file's original")  # fmt: skip
        return self._as_it_is(self.model.layers)

    def _requantized(self, touched: set[str]) -> dict[str, LayerChoice]:
        """Layers that are changed, and those to which a recipe gives another format."""
        choices = self._as_it_is(touched & self.model.layers.keys())
        chosen = self._chosen() if self.recipe is not None else {}
        return choices | {name: choice for name, choice in chosen.items() if not self._has(name, choice.format)}

    def _as_it_is(self, names) -> dict[str, LayerChoice]:
        return {name: LayerChoice(self.model.layers[name].format, f"as in {self.model.name}", None) for name in names}

    def _chosen(self) -> dict[str, LayerChoice]:
        layer_map = self.recipe.resolve(self._base.shapes())
        checks.refuse_problems(self._base, layer_map.problems)
        self.warnings += [*self.recipe.notes, *layer_map.warnings]
        return {name: choice for name, choice in layer_map.items() if choice.format is not None}

    def _has(self, name: str, format: Format) -> bool:
        """Whether the model stores a layer in that format already."""
        layer = self.model.layers.get(name)
        if layer is not None:
            legacy = layer.sources.get("weight_scale", "").endswith("scale_weight")  # which no output keeps
            return layer.format.label == format.label and not legacy
        spec = self.model.tensors[f"{self.model.prefix}{name}.weight"]
        return isinstance(format, Plain) and format.dtype == spec.dtype

    def _refuse_opaque(self, touched: set[str]) -> None:
        """Raises ValueError for layers whose numbers only the host can read."""
        opaque = {
            key.removeprefix(self.model.prefix): record.get("format") for key, record in self.model.opaque.items()
        }
        found = sorted(opaque.keys() & (touched | self.choices.keys()))
        if self.original:
            found = [] if self.recipe is not None else sorted(opaque)
        if found:
            raise ValueError(f"{self.model.name}: {found[0]}: is in format {opaque[found[0]]!r}, which Tessera cannot "
                             "write; give the original and a recipe")  # fmt: skip

    def _layer_recipe(self) -> Recipe:
        """The choices as rules, a rule for all layers that agree."""
        groups: dict[tuple, list[str]] = {}
        for name, choice in sorted(self.choices.items()):
            groups.setdefault((choice.format, choice.reason, choice.rank), []).append(name)
        rules = [Rule(format, tuple(rf"\A{re.escape(name)}\.weight\Z" for name in names), reason, True, rank=rank)
                 for (format, reason, rank), names in groups.items()]  # fmt: skip
        name = self.recipe.name if self.recipe else f"as in {self.model.name}"
        return Recipe(name, "baked", tuple(rules), default_reason="nothing changes it")

    def _read_correction(self) -> dict[str, LowRank]:
        """The correction's pairs by layer. Raises ValueError if one fits none of the model's."""
        names, shapes, found = Names(self.model.shapes()), self.model.shapes(), {}
        for base, pair in lora.read(self.correction).items():
            place = names.find(base)
            if place is None or place.rows or shapes.get(f"{place.name}.weight") != pair.shape:
                raise ValueError(f"{self.correction.name}: {base}: fits no layer of {self.model.name}; it corrects "
                                 "another model: give the right one, or none")  # fmt: skip
            found[place.name] = pair
        return found

    def _carried(self) -> dict[str, Tensor]:
        """The pairs of layers that stay, by their key in the new correction."""
        carried = {}
        for name, pair in self._pairs.items():
            if name not in self.choices:
                carried |= {lora_key(name, "lora_up.weight"): pair.up, lora_key(name, "lora_down.weight"): pair.down}
                carried |= {} if pair.bias is None else {lora_key(name, "diff_b"): pair.bias}
        return carried

    def _said(self) -> dict:
        """For the metadata of the files."""
        correction = {"name": self.correction.name, "sha256": sha256(self.correction)} if self._pairs else None
        return {"mode": self.mode, "loras": [addition.said() for addition in self.additions],
                "patched": sorted(self.edits), "model": self.model.name, "correction": correction,
                "before": _json(self.model, PROVENANCE) or None}  # fmt: skip

    def _check_statistics(self, calibration: Calibration) -> list[str]:
        """What to say of them. Raises ValueError if they are those of another model."""
        if not self.original:
            return ["statistics are recorded with the original: without it nothing can tell whether they are this "
                    "model's, only that the layers have their widths"]  # fmt: skip
        known = [calibrations.fingerprint(source) for source in (self.original, self.source)]
        if calibration.model not in known:
            checks.refuse_foreign(self.original, known[0], calibration)
        return []


def correction_beside(model: Checkpoint) -> Path | None:
    """`<model>_lora.safetensors` beside a file, unless its correction is part of it."""
    path = lora_path(model.path)
    absorbs = any(layer.absorbs for layer in model.layers.values())
    return path if path.is_file() and not absorbs else None


def _json(file: Checkpoint, key: str) -> dict:
    """A JSON object of a file's metadata; empty if it has none that is ours."""
    try:
        said = json.loads(file.metadata.get(key, "{}"))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
