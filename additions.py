"""LoRAs at their strengths, and a checkpoint as it is with them in its weights."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import lora
from .adapters import Change, Difference, Replacement
from .matching import Names, Place
from .quantization.lowrank import LowRank
from .source import Source
from .words import first_of

Edit = Callable[[Tensor], Tensor]
"""A tensor in fp32 -> what becomes of it: for changes that only a host can compute."""
SHOWN = 20  # keys that a message lists


@dataclass(frozen=True)
class Part:
    """What a LoRA does to one place of a model. `order`: of the change's rows that the layer's rows take."""

    place: Place
    change: Change
    order: Tensor | None = None


@dataclass(frozen=True)
class Addition:
    """A LoRA at one strength; `sha256` is that of its file."""

    name: str
    strength: float
    parts: tuple[Part, ...]
    path: Path | None = None
    sha256: str | None = None
    notes: tuple[str, ...] = ()

    def said(self) -> dict:
        return {"name": self.name, "sha256": self.sha256, "strength": self.strength}


def parse(text: str) -> tuple[Path, float]:
    """(file, strength) of `FILE` or `FILE:STRENGTH`. Raises ValueError for a strength that is not finite."""
    name, _, number = text.rpartition(":")
    try:
        strength = float(number) if name else 1.0
    except ValueError:  # the colon of a drive, or of a name
        return Path(text), 1.0
    if not math.isfinite(strength):
        raise ValueError(f"{text}: strength {number} is not a finite number; write FILE:0.8, for instance")
    return Path(name or text), strength


def read(path: Path, strength: float, source: Source, skip_unmatched: bool = False) -> Addition:
    """A LoRA file, matched by name to what it changes. Raises ValueError listing the keys that fit nothing, unless
    they may be skipped."""
    file, names, parts, unmatched = lora.read_adapters(path), Names(source.shapes()), [], []
    for base, change in file.changes.items():
        place = names.find(base)
        if place is None:
            unmatched.append(base)
        else:
            parts.append(Part(place, change))
    if unmatched and not (parts and skip_unmatched):
        leave = "; --skip-unmatched leaves them out" if parts else "; it was made for another model"
        raise ValueError(f"{path.name}: {len(unmatched)} of {len(file.changes)} keys fit nothing in {source.name}"
                         f"{leave}: {first_of(unmatched, SHOWN)}")  # fmt: skip
    notes = [f"{path.name}: left out, as they fit nothing: {first_of(unmatched, SHOWN)}"] if unmatched else []
    for reason, count in Counter(file.ignored.values()).items():
        first = next(key for key, why in file.ignored.items() if why == reason)
        notes.append(f"{path.name}: {count} keys ignored (first: {first}): {reason}")
    return Addition(path.name, strength, tuple(parts), path, sha256(path), tuple(notes))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class BakedSource:
    """A checkpoint with LoRAs in its weights: W + the sum of delta_i(W, s_i) in fp32, each of W alone, so in any order.

    `edits` are by tensor key without prefix; `corrections`, by layer, belong to W. Raises ValueError if something does
    not fit what it changes.
    """

    def __init__(self, base: Source, additions: Iterable[Addition], edits: Mapping[str, Edit] | None = None,
                 corrections: Mapping[str, LowRank] | None = None):  # fmt: skip
        self.name, self.prefix, self.metadata, self.tensors = base.name, base.prefix, base.metadata, base.tensors
        self.nbytes, self.path, self._base, self._corrections = base.nbytes, base.path, base, dict(corrections or {})
        self._shapes, self._unbiased = base.shapes(), Counter()
        self.changes: dict[str, list[Edit]] = {}  # by key without prefix: what is added to the tensor, given the tensor
        for addition in additions:
            for part in addition.parts:
                self._take(addition, part)
        for key, edit in (edits or {}).items():
            self._tensor(f"a weight patch of {key}", key)
            self._add(key, partial(_edited, edit))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def quantized(self, name: str) -> bool:
        return self._base.quantized(name)

    def records(self) -> dict[str, dict]:
        return self._base.records()

    def notes(self) -> list[str]:
        return [f"{name}: {count} bias differences left out, as ComfyUI does: their layers have no bias"
                for name, count in self._unbiased.items()]  # fmt: skip

    def weight(self, name: str) -> Tensor:
        weight = self._base.weight(name)
        if name in self._corrections:
            weight = self._corrections[name].add_to(weight)
        return self._changed(f"{name}.weight", weight)

    def read(self, key: str) -> Tensor:
        tensor, name = self._base.read(key), key.removeprefix(self.prefix)
        pair = self._corrections.get(name.removesuffix(".bias")) if name.endswith(".bias") else None
        if name not in self.changes and (pair is None or pair.bias is None):
            return tensor
        whole = tensor.float() if pair is None or pair.bias is None else tensor.float() + pair.bias.float()
        return self._changed(name, whole).to(tensor.dtype)

    def _changed(self, key: str, tensor: Tensor) -> Tensor:
        changed = tensor
        for delta in self.changes.get(key, ()):
            changed = changed + delta(tensor)
        return changed

    def _take(self, addition: Addition, part: Part) -> None:
        """Settles what a part adds to which tensors."""
        place, change, where = part.place, part.change, f"{addition.name}: {part.place.name}"
        key = place.name if f"{place.name}.weight" not in self._shapes else f"{place.name}.weight"
        self._tensor(where, key)
        shape = self._shapes[key] if place.rows is None else (place.rows[1], *self._shapes[key][1:])
        if change.reshape is not None and tuple(change.reshape) != shape:
            raise ValueError(f"{where}: changes the layer's shape to {list(change.reshape)}, which cannot be baked; "
                             "leave this LoRA out, and load it beside the baked file")  # fmt: skip
        try:
            Change(change.adapter, change.bias).check(_seen(change, shape))
        except ValueError as problem:
            raise ValueError(f"{where}: {problem}; it was made for another model") from None
        if change.adapter is not None:
            self._add(key, partial(_delta, part, addition.strength))
        if change.bias is not None and f"{place.name}.bias" in self._shapes:
            self._add(f"{place.name}.bias", partial(_bias, part, addition.strength))
        elif change.bias is not None:
            self._unbiased[addition.name] += 1

    def _tensor(self, where: str, key: str) -> None:
        """Raises ValueError unless the key is that of numbers which can be added to."""
        if key not in self._shapes:
            raise ValueError(f"{where}: not in {self.name}; it was made for another model, or by a loader that renames "
                             "tensors: give the file that was loaded")  # fmt: skip
        spec = self.tensors[f"{self.prefix}{key}"]
        if not (self.quantized(key.removesuffix(".weight")) or spec.dtype.is_floating_point):
            raise ValueError(f"{where}: is {spec} in {self.name}, which Tessera cannot decode; give the original and a "
                             "recipe")  # fmt: skip

    def _add(self, key: str, delta: Edit) -> None:
        self.changes.setdefault(key, []).append(delta)


def _seen(change: Change, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape as its adapter sees it: [out, everything else], but for what is added as it is."""
    plain = isinstance(change.adapter, Difference | Replacement)
    return shape if plain and _whole(change).ndim == len(shape) else (*shape[:1], math.prod(shape[1:]))


def _whole(change: Change) -> Tensor:
    return change.adapter.tensors()[0]


def _delta(part: Part, strength: float, tensor: Tensor) -> Tensor:
    """What an adapter adds to a tensor, in its shape."""
    start, length = part.place.rows or (0, tensor.shape[0])
    rows = tensor[start : start + length]
    delta = part.change.adapter.delta(rows.reshape(_seen(part.change, tuple(rows.shape))), strength)
    return _placed(part, delta.reshape(rows.shape), tensor)


def _bias(part: Part, strength: float, tensor: Tensor) -> Tensor:
    return _placed(part, strength * part.change.bias.float(), tensor)


def _placed(part: Part, delta: Tensor, tensor: Tensor) -> Tensor:
    """A change of some rows as one of the whole tensor."""
    delta = delta if part.order is None else delta[part.order]
    if part.place.rows is None:
        return delta
    whole, (start, length) = torch.zeros_like(tensor), part.place.rows
    whole[start : start + length] = delta
    return whole


def _edited(edit: Edit, tensor: Tensor) -> Tensor:
    return edit(tensor.clone()) - tensor
