"""Low-rank branches beside a model's layers, as the host wants them: clones, injections, additional models."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import folder_paths

from .. import branch, lora

BRANCHES = "_tessera_branches"  # on a model: {LoRA file: Attached}
TRUNK = "diffusion_model."


@dataclass(frozen=True)
class Attached:
    """A LoRA's branches for one model, shared by every strength: the host sees them as a model of its own."""

    identity: tuple
    patcher: comfy.model_patcher.ModelPatcher
    layers: tuple[str, ...]
    unmatched: tuple[str, ...]


def attach_lora(patcher, path: str, strength: float) -> tuple[comfy.model_patcher.ModelPatcher, Attached]:
    """(clone with the LoRA's branches beside its layers, what was attached). No weight of the model changes.

    Raises ValueError if no key of the file fits the model, or a pair does not fit its layer.
    """
    attached = _branches(patcher, Path(path))
    clone, key = patcher.clone(), f"tessera.{uuid.uuid4().hex}"
    if strength != 0:  # at 0 the clone is the model itself, bit for bit
        side = branch.SideBranch(key, strength)
        clone.set_additional_models(key, [attached.patcher.clone()])
        clone.set_injections(key, [comfy.patcher_extension.PatcherInjection(side.inject, side.eject)])
    return clone, attached


def _branches(patcher, path: Path) -> Attached:
    """Read from disk once per model and file, so that moving a slider reads nothing; freed with the model."""
    stat = path.stat()
    identity = (stat.st_mtime_ns, stat.st_size, patcher.load_device)
    kept: dict[Path, Attached] = patcher.model.__dict__.setdefault(BRANCHES, {})
    cached = kept.get(path)
    if cached is None or cached.identity != identity:
        pairs, unmatched = branch.match(path.name, lora.read(path), _targets(patcher), patcher.model)
        module = branch.Branches(pairs, comfy.ops.manual_cast.Linear)
        side = comfy.model_patcher.ModelPatcher(module, patcher.load_device, patcher.offload_device)
        side.cached_patcher_init = (_copy_branches, (module, patcher.load_device, patcher.offload_device))
        cached = Attached(identity, side, tuple(module.layers), tuple(unmatched))
        kept[path] = cached
    return cached


def _copy_branches(module, load_device, offload_device, disable_dynamic=False):
    """A fresh patcher of copied branches, for deep clones on other devices."""
    return comfy.model_patcher.ModelPatcher(copy.deepcopy(module), load_device, offload_device)


def _targets(patcher) -> dict[str, tuple[str, tuple[int, int] | None]]:
    """LoRA base name -> (module path, rows (start, length) or None), in every spelling the host knows."""
    targets = {}
    for name, key in comfy.lora.model_lora_keys_unet(patcher.model, {}).items():
        rows = None
        if isinstance(key, tuple):
            key, (dim, start, length) = key[0], key[1]
            if dim != 0:
                continue
            rows = (start, length)
        if key.endswith(".weight"):
            targets[name] = (key.removesuffix(".weight"), rows)
            targets.setdefault(name.removeprefix(TRUNK), targets[name])  # bare keys
    return targets


def coverage(patcher, attached: Attached) -> str:
    """How many of the model's quantized layers a LoRA covers, in words."""
    quantized = quantized_layers(patcher)
    covered = len(quantized & set(attached.layers))
    text = f"corrects {len(attached.layers)} layers, {covered} of {len(quantized)} quantized ones"
    if attached.unmatched:
        text += f"; {len(attached.unmatched)} keys fit no layer ({names_of(attached.unmatched)})"
    return text


def quantized_layers(patcher) -> set[str]:
    """Module paths of the layers whose weight is quantized, from any loader."""
    return {name for name, module in patcher.model.named_modules() if getattr(module, "layout_type", None) is not None}


def lora_beside(patcher) -> str | None:
    """The `<checkpoint>_lora.safetensors` of a MODEL: in the checkpoint's folder, or among the loras."""
    made = getattr(patcher, "cached_patcher_init", None)
    path = Path(made[1][0]) if made and isinstance(made[1][0], str) else None
    if path is None:
        return None
    name = f"{path.stem}_lora.safetensors"
    beside = path.with_name(name)
    return str(beside) if beside.is_file() else folder_paths.get_full_path("loras", name)


def names_of(items: Iterable[str], limit: int = 3) -> str:
    """The first few of a list in words."""
    items = list(items)
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")
