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
from ..checkpoint import BRANCH, read_header
from ..quantization.lowrank import LowRank

BRANCHES = "_tessera_branches"  # on a model: {LoRA file: Attached}
ABSORBED = "tessera.absorbed"  # key of a model's own branch
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


class _Carried:
    """Makes ComfyUI load a text encoder's branch with it: encoding loads what patches carry, not additional models."""

    def __init__(self, side: comfy.model_patcher.ModelPatcher):
        self.side = side

    def models(self) -> list[comfy.model_patcher.ModelPatcher]:
        return [self.side]


def attach_own(patcher, file: str, pairs: dict[str, LowRank], text_encoder: bool = False) -> None:
    """Puts the branches that are part of a model, by module path, beside its layers: at strength 1 for good."""
    matched, _ = branch.match(file, pairs, {name: (name, None) for name in pairs}, patcher.model)
    side, own = _side(patcher, matched), branch.SideBranch(ABSORBED, 1.0, absorbed=True)
    patcher.set_additional_models(ABSORBED, [side])
    patcher.set_injections(ABSORBED, [comfy.patcher_extension.PatcherInjection(own.inject, own.eject)])
    if text_encoder:
        options = patcher.model_options["transformer_options"]
        options.setdefault("patches", {})[ABSORBED] = [_Carried(side)]


def absorbed_layers(patcher) -> int:
    """How many layers of a MODEL have a branch that is part of it; 0 for all but absorb models from our loader."""
    sides = patcher.get_additional_models_with_key(ABSORBED)
    return len(sides[0].model.layers) if sides else 0


def absorbed_text(patcher) -> list[str]:
    """What to tell about a model's own branches; nothing if it has none."""
    layers = absorbed_layers(patcher)
    if not layers:
        return []
    [side] = patcher.get_additional_models_with_key(ABSORBED)
    return [f"{layers} layers with a low-rank branch inside the file (absorb mode): always on, "
            f"{side.model_size() / 1e6:.1f} MB"]  # fmt: skip


def lacks_branch(patcher) -> bool:
    """Whether a MODEL is an absorb file from another loader, which has dropped the branches that are part of it."""
    path = _file_of(patcher)
    if absorbed_layers(patcher) or path is None or path.suffix not in (".safetensors", ".sft"):
        return False
    return any(key.rpartition(".")[2] in BRANCH for key in read_header(path)[1])


def _branches(patcher, path: Path) -> Attached:
    """Read from disk once per model and file, so that moving a slider reads nothing; freed with the model."""
    stat = path.stat()
    identity = (stat.st_mtime_ns, stat.st_size, patcher.load_device)
    kept: dict[Path, Attached] = patcher.model.__dict__.setdefault(BRANCHES, {})
    cached = kept.get(path)
    if cached is None or cached.identity != identity:
        pairs, unmatched = branch.match(path.name, lora.read(path), _targets(patcher), patcher.model)
        side = _side(patcher, pairs)
        cached = Attached(identity, side, tuple(side.model.layers), tuple(unmatched))
        kept[path] = cached
    return cached


def _side(patcher, pairs) -> comfy.model_patcher.ModelPatcher:
    """The branches [(module path, pair, rows)] of a model as a model of their own."""
    module = branch.Branches(pairs, comfy.ops.manual_cast.Linear)
    side = comfy.model_patcher.ModelPatcher(module, patcher.load_device, patcher.offload_device)
    side.cached_patcher_init = (_copy_branches, (module, patcher.load_device, patcher.offload_device))
    return side


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
    path = _file_of(patcher)
    if path is None:
        return None
    name = f"{path.stem}_lora.safetensors"
    beside = path.with_name(name)
    return str(beside) if beside.is_file() else folder_paths.get_full_path("loras", name)


def _file_of(patcher) -> Path | None:
    """The file a MODEL was loaded from, where its loader says so."""
    made = getattr(patcher, "cached_patcher_init", None)
    return Path(made[1][0]) if made and isinstance(made[1][0], str) else None


def names_of(items: Iterable[str], limit: int = 3) -> str:
    """The first few of a list in words."""
    items = list(items)
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")
