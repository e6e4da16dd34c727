"""Which parameters of a model a branch can stand in for, and which only a change of the weight reaches."""

from __future__ import annotations

import functools
import inspect
import re

import torch

from ..injection import FUSED, module_at
from . import adapters
from .adapters import Patch


def unable(model: torch.nn.Module, patch: Patch, key: str, merged: list[Patch]) -> str | None:
    """Why a patch must be left to the host, for a reason that lies in the model; `merged`: what is in the weight."""
    if any(adapters.reshapes(other[1]) for other in merged):
        return "another LoRA makes the layer larger"
    if merged and adapters.sees_weight(patch[1]):
        return "it depends on a weight that ComfyUI has changed by merging"
    if getattr(module_at(model, layer_of(key)), "layout_type", None) == FUSED and _is_bypassed(model, layer_of(key)):
        return "ComfyUI multiplies the layer without calling it, so that nothing can run beside"
    return None


def is_quantized(model: torch.nn.Module, key: str) -> bool:
    """Whether a parameter is a packed weight."""
    return key.endswith(".weight") and getattr(module_at(model, layer_of(key)), "layout_type", None) is not None


def _is_bypassed(model: torch.nn.Module, layer: str) -> bool:
    """Whether the layer is one that a block of the host's gives to `linear_input_act`."""
    parts = layer.split(".")
    return any(
        ".".join(parts[cut:]) in fused_in(type(module_at(model, ".".join(parts[:cut])))) for cut in range(1, len(parts))
    )


@functools.cache
def fused_in(cls: type) -> frozenset[str]:
    """Paths below a block whose layers its code gives to `linear_input_act`."""
    try:
        code = inspect.getsource(cls) if cls.__module__.startswith("comfy.") else ""
    except (OSError, TypeError):  # without source, as in a frozen build
        code = ""
    found = re.findall(r"linear_input_act\(\s*self([\w.\[\]]+)", code)
    return frozenset(re.sub(r"\[(\d+)\]", r".\1", path).strip(".") for path in found)


def is_linear(model: torch.nn.Module, key: str) -> bool:
    """Whether a parameter is the weight or bias of a linear layer of the host's, which runs by being called."""
    layer, _, part = key.rpartition(".")
    if part not in ("weight", "bias") or not layer:
        return False
    module = module_at(model, layer)
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return hasattr(module, "comfy_cast_weights") and all(isinstance(size, int) for size in sizes)


def layer_of(key: str) -> str:
    return key.rpartition(".")[0]
