"""What a MODEL's nodes have put on it, as something to bake."""

from __future__ import annotations

from pathlib import Path

import comfy.lora

from ..additions import Addition, Edit, Part, sha256
from ..baking import Bake
from ..checkpoint import Checkpoint
from ..matching import Names, Place
from ..quantization.recipe import Recipe
from . import stacking
from .attaching import TRUNK, file_of, lora_beside


def bake_of(patcher, original: Path | None = None, recipe: Recipe | None = None) -> Bake:
    """Everything on a MODEL at its strengths: LoRAs beside its layers, and weight patches of any node.

    Raises ValueError for strengths that move while sampling, and if the MODEL was not loaded from a file of its own.
    """
    path = file_of(patcher)
    if path is None:
        raise ValueError("this MODEL does not say which file it was loaded from; load it with Load Diffusion Model "
                         "(Tessera)")  # fmt: skip
    if getattr(patcher, "hook_patches", None):
        raise ValueError("this MODEL has LoRA hooks, whose strength moves while sampling; only constant strengths can "
                         "be baked: take them off")  # fmt: skip
    file, original = Checkpoint(path), Checkpoint(original) if original else None
    items = [item for item in stacking.entries(patcher) if not item[0].absorbed]
    additions = [_addition(*item) for item in items if not item[0].correction]
    correction = _correction(patcher, [item for item in items if item[0].correction])
    absorbs = any(layer.absorbs for layer in file.layers.values())
    names = Names((original or file).shapes())
    return Bake(file, additions, original, recipe, None if absorbs else correction, _edits(patcher, names))


def _addition(entry: stacking.Entry, strength: float, schedule) -> Addition:
    if schedule is not None:
        raise ValueError(f"{entry.name}: its strength moves while sampling ({schedule}); only a constant strength can "
                         "be baked: clear its curve, start and end")  # fmt: skip
    parts = [Part(Place(p.layer.removeprefix(TRUNK), p.rows), p.change, p.order) for p in entry.changes]
    path = _path(entry)
    return Addition(entry.name, strength, tuple(parts), path, None if path is None else sha256(path))


def _path(entry: stacking.Entry) -> Path | None:
    """The entry's file, if it is of one. Raises ValueError if that has changed since."""
    path = Path(str(entry.identity[0]))
    if not path.is_absolute() or not path.is_file():  # patches of other nodes
        return None
    if path.stat().st_mtime_ns != entry.identity[1]:
        raise ValueError(f"{path.name}: has changed since it was loaded; run its node again")
    return path


def _correction(patcher, attached: list[stacking.Item]) -> Path | None:
    """The correction on the MODEL; else the one that lies beside its file."""
    if len(attached) > 1:
        names = ", ".join(entry.name for entry, _, _ in attached)
        raise ValueError(f"{len(attached)} correction LoRAs are on this MODEL ({names}); a file has one: take the "
                         "others off")  # fmt: skip
    path, beside = _path(attached[0][0]) if attached else None, lora_beside(patcher)
    return path or (None if beside is None else Path(beside))


def _edits(patcher, names: Names) -> dict[str, Edit]:
    """The host's weight patches, by the key in the model's own file, as the host computes them."""
    edits = {}
    for key, patches in patcher.patches.items():
        if key.startswith(TRUNK) and patches:
            edits[names.key(key.removeprefix(TRUNK))] = lambda weight, p=patches, k=key: comfy.lora.calculate_weight(
                p, weight, k
            )
    return edits
