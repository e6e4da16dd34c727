"""The merge guard: LoRAs of ComfyUI's own nodes run beside the layers of our models, instead of inside their weights.

Stock nodes call `clone.add_patches(...)`. On patchers of models from our loaders that method first does what it does,
and then whatever can run beside a linear layer moves from `patches` into the stack. Norms, convolutions and what only
the host can compute stay with it. Nodes that save or scale whole weights are given the patches back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import uuid
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
from comfy.patcher_extension import CallbacksMP
from safetensors import safe_open

from ..injection import module_at
from ..words import first_of
from . import adapters, attaching, patchable, settings, stacking, wiring
from .adapters import Patch
from .carrying import names_only
from .stacking import Entry

log = logging.getLogger("tessera")

KEY = "tessera.guard"
NAME = "LoRA of a ComfyUI node"
PROBES = 3  # tensors of the correction LoRA that a patch is compared with
Patches = list[tuple[str, Patch]]  # (key of the parameter, patch), in the order they came


@dataclass(frozen=True, eq=False)
class Taken(Entry):
    """An entry that was patches: they are kept, to give them back."""

    patches: tuple[tuple[str, Patch], ...] = ()
    positions: tuple[int, ...] = ()  # of them among the patches that came together
    left: tuple[tuple[str, str], ...] = ()  # (key, why) of those that must be merged


def install(patcher) -> None:
    """Guards a patcher and all clones of it."""
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, _guard_clone)
    _guard(patcher)


def merged_hint(patcher) -> str | None:
    """What to tell if the host merges patches into quantized weights of a MODEL or CLIP's patcher; None if not."""
    quantized = attaching.quantized_layers(patcher) if patcher.patches else set()
    layers = sorted(quantized & {patchable.layer_of(key) for key in patcher.patches if key.endswith(".weight")})
    if not layers:
        return None
    text = f"{len(layers)} quantized layers have a LoRA merged by ComfyUI ({first_of(layers)}): "
    if KEY in patcher.callbacks.get(CallbacksMP.ON_CLONE, {}):
        return text + "rounded without bias, but most of a weak LoRA is noise; Load LoRA (Tessera) runs it beside them"
    return text + "its rounding costs more than 4-bit quantization itself; load the model with Tessera's loader, or " \
                  "replace the LoRA node by Load LoRA (Tessera)"  # fmt: skip


def _guard_clone(_, clone) -> None:
    _guard(clone)


def _guard(patcher) -> None:
    """On the instance, not by a subclass, whose signatures would drift from the host's (design/host.md 26)."""
    for name, function in (("add_patches", _add_patches), ("model_state_dict_for_saving", _state_dict_for_saving)):
        setattr(patcher, name, _Method(patcher, name, function))


class _Method:
    """A method of one patcher, which it does not keep alive: patchers are freed when the last reference goes."""

    def __init__(self, patcher, name: str, function):
        self._patcher, self._function = weakref.ref(patcher), function
        self._original = getattr(type(patcher), name)

    def __call__(self, *args, **kwargs):
        patcher = self._patcher()
        if patcher is None:
            raise ReferenceError("the model of this call is gone; keep the clone in a variable")
        return self._function(patcher, functools.partial(self._original, patcher), *args, **kwargs)


def _add_patches(patcher, original, *args, **kwargs):
    """As the host's, and with its result: the keys that were patched, beside their layers or not."""
    before, version = {key: len(patches) for key, patches in patcher.patches.items()}, patcher.patches_uuid
    with _ejected(patcher):
        with names_only():
            keys = original(*args, **kwargs)
        new = [(key, patch) for key, patches in patcher.patches.items() for patch in patches[before.get(key, 0) :]]
        linear = [item for item in new if patchable.is_linear(patcher.model, item[0])]
        alone = {key for key, patch in linear if patch[2] != 1.0 or adapters.reshapes(patch[1])}
        if alone:  # what scales or enlarges a weight must find in it all that is added
            _give_back(patcher, alone, before)
            linear = [item for item in linear if item[0] not in alone]
        correction = bool(linear) and _is_correction(patcher, linear)
        taking = linear and (correction or settings.merge_guard())
        if taking and _take(patcher, linear, before, correction) == len(new):
            patcher.patches_uuid = version  # no weight has changed: another uuid would have them all loaded again
    return keys


@contextlib.contextmanager
def _ejected(patcher):
    """Around changes of a stack. A clone says that it is injected when what it was cloned from is: the host would
    inject it on leaving, into the model that another patcher runs."""
    owner = patcher.model.__dict__.get(wiring.KEY, lambda: None)
    copied = patcher.is_injected and owner() is not patcher
    if copied:
        patcher.is_injected = False
    try:
        with patcher.use_ejected():
            yield
    finally:
        patcher.is_injected = copied or patcher.is_injected


def _state_dict_for_saving(patcher, original, *args, **kwargs):
    """As the host's, with taken patches merged; a correction LoRA stays a file of its own."""
    apart = [entry.name for entry, _, _ in stacking.entries(patcher) if not entry.absorbed]
    if any(not entry.correction for entry, _, _ in _taken(patcher)):
        patcher = patcher.clone()
        _give_back(patcher)
        comfy.model_management.load_models_gpu([patcher])
        return patcher.model_state_dict_for_saving(*args, **kwargs)
    if apart:
        log.warning("Tessera: the model is saved without what runs beside its weights: %s", first_of(apart))
    return original(*args, **kwargs)


def _take(patcher, linear: Patches, before: dict[str, int], correction: bool) -> int:
    """Moves patches into the stack; how many."""
    able, reasons = [], []
    for key, patch in linear:
        reason = patchable.unable(patcher.model, patch, key, patcher.patches[key][: before.get(key, 0)])
        reasons.append((key, reason)) if reason else able.append((key, patch))
    moved: Patches = []
    for strength in {patch[0]: None for _, patch in able}:  # one, as nodes call it
        together = [item for item in able if item[1][0] == strength]
        entry, left = _entry(patcher, together, correction)
        reasons += left
        if entry is not None:
            stacking.attach(patcher, entry, float(strength))
            moved += [together[position] for position in entry.positions]
    _remove(patcher, moved)
    reasons = [item for item in reasons if patchable.is_quantized(patcher.model, item[0])]
    if reasons:
        names = sorted({patchable.layer_of(key) for key, _ in reasons})
        log.warning("Tessera: LoRA of a ComfyUI node: %d layers get it merged, rounded without bias (%s), as %s",
                    len(names), first_of(names), Counter(why for _, why in reasons).most_common(1)[0][0])  # fmt: skip
    return len(moved)


def _entry(patcher, items: Patches, correction: bool) -> tuple[Taken | None, list[tuple[str, str]]]:
    """(what of the patches can run beside layers, (key, why not) of the others), made once per content."""
    identity = "patches", adapters.identity(items), correction
    known = stacking.kept(patcher).entry(identity)
    if known is not None:
        return known, list(known.left)
    placed, positions, left = [], [], []
    for position, (key, patch) in enumerate(items):
        layer, _, part = key.rpartition(".")
        found = adapters.place(patch, layer, part, module_at(patcher.model, layer))
        if isinstance(found, str):
            left.append((key, found))
        else:
            placed.append(found)
            positions.append(position)
    if not placed:
        return None, left
    taken = tuple(items[position] for position in positions)
    entry = Taken(identity, NAME, placed, correction, left=tuple(left), patches=taken, positions=tuple(positions))
    _announce(entry)
    return entry, left


def _announce(entry: Taken) -> None:
    """In the log, once for each content."""
    if entry.correction:
        log.warning("Tessera: a ComfyUI node got this model's correction LoRA, which merging would lose: it corrects "
                    "%d layers from beside their weights instead; Error-Correction LoRA (Tessera) is the node for it",
                    len(entry.layers))  # fmt: skip
        return
    kinds = Counter(placed.change.kind for placed in entry.changes)
    said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    log.info("Tessera: a LoRA of a ComfyUI node runs beside %d layers (%s) and is merged into none of their weights; "
             "the setting Tessera, Merge guard switches that off", len(entry.layers), said)  # fmt: skip


def _remove(patcher, moved: Patches) -> None:
    gone = {id(patch) for _, patch in moved}
    for key in {key for key, _ in moved}:
        patcher.patches[key] = [patch for patch in patcher.patches[key] if id(patch) not in gone]
        if not patcher.patches[key]:
            del patcher.patches[key]


def _taken(patcher) -> list[stacking.Item]:
    return [item for item in stacking.entries(patcher) if isinstance(item[0], Taken)]


def _give_back(patcher, keys: set[str] | None = None, before: dict[str, int] | None = None) -> None:
    """Puts the patches of some keys back to be merged, behind the first `before` of each; without keys all but those of
    corrections."""
    places, items, given = Counter(before or {}), [], 0
    for entry, strength, schedule in stacking.entries(patcher):
        back = _back(entry, keys)
        for key, patch in back:
            patches = patcher.patches.get(key, [])
            patcher.patches[key] = [*patches[: places[key]], (strength, *patch[1:]), *patches[places[key] :]]
            places[key] += 1
        given += len(back)
        rest = _without(entry, back) if back else entry
        items += [(rest, strength, schedule)] if rest is not None else []
    if not given:
        return
    stacking.replace(patcher, items)
    patcher.patches_uuid = uuid.uuid4()
    log.info("Tessera: %d patches of ComfyUI's LoRA nodes are merged after all, as a node asks for the weights", given)


def _back(entry: Entry, keys: set[str] | None) -> Patches:
    if not isinstance(entry, Taken):
        return []
    if keys is None:
        return [] if entry.correction else list(entry.patches)
    return [item for item in entry.patches if item[0] in keys]


def _without(entry: Taken, back: Patches) -> Taken | None:
    """What is left of an entry."""
    gone = {id(patch) for _, patch in back}
    kept = [
        (placed, item) for placed, item in zip(entry.changes, entry.patches, strict=True) if id(item[1]) not in gone
    ]
    if not kept:
        return None
    changes, patches = (list(part) for part in zip(*kept, strict=True))
    identity = *entry.identity, tuple(sorted({key for key, _ in back}))
    return dataclasses.replace(entry, identity=identity, changes=changes, patches=tuple(patches))


def _is_correction(patcher, linear: Patches) -> bool:
    """Whether the patches are the model's own correction LoRA: some tensors of its file, bit for bit."""
    path = attaching.lora_beside(patcher)
    if path is None:
        return False
    stat = Path(path).stat()
    probes = _probes(path, stat.st_mtime_ns, stat.st_size)
    return bool(probes) and probes <= {adapters.digest(t) for _, patch in linear for t in adapters.tensors(patch[1])}


@functools.lru_cache(maxsize=16)
def _probes(path: str, *_version: int) -> frozenset[bytes]:
    """Digests of a few factors of a LoRA file."""
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2]  # noqa: SIM118 not a dict
        return frozenset(adapters.digest(file.get_tensor(name)) for name in names[:: max(1, len(names) // PROBES)])
