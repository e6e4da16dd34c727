"""Where the host's blocks let neighbouring layers work together: shared inputs, and a gate inside the next layer.

Reversible and per clone: everything is set at inject time and taken back at eject time. Data, not code, says where.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import comfy.patcher_extension
import torch
from torch import Tensor

from ..kernels.linear import Gated
from .carrying import Siblings
from .planned import Planned

KEY, PLACES = "tessera.wiring", "_tessera_places"
SIBLINGS = {  # class of the host's -> attributes that are called one after the other with the same input
    "comfy.ldm.lumina.model.FeedForward": ("w1", "w3"),
    "comfy.text_encoders.llama.MLP": ("gate_proj", "up_proj"),
    "comfy.text_encoders.llama.Attention": ("q_proj", "k_proj", "v_proj"),
}
GATES = {"comfy.ldm.lumina.model.FeedForward": ("_forward_silu_gating", "w2")}
"""Class -> (method that computes silu(a) * b, the layer that gets it and nothing else does)."""
GATING = ("int8_fused", "nvfp4", "mxfp8", "fp8_row")  # kernels that quantize a gated input without storing it


class Wiring:
    """Connects the layers of a model's blocks, for as long as a patcher is loaded."""

    def inject(self, patcher) -> None:
        self.eject(patcher)
        done = []
        for siblings, module, method, target in _places(patcher.model):
            shared = Siblings(siblings)
            for layer in siblings:
                layer.__dict__["tessera_siblings"] = shared
                done.append((layer, "tessera_siblings"))
            if target is not None:
                setattr(module, method, _gate(module, method, target))
                done.append((module, method))
        patcher.model.__dict__[KEY] = (weakref.ref(patcher), done)

    def eject(self, patcher) -> None:
        """Takes everything back, unless another patcher has wired the model since."""
        owner, done = patcher.model.__dict__.get(KEY, (lambda: patcher, ()))
        if owner() is not patcher and owner() is not None:
            return
        for module, name in done:
            if name == "tessera_siblings":
                module.__dict__["tessera_siblings"] = None
            else:
                module.__dict__.pop(name, None)  # the class's own method stands behind it
        patcher.model.__dict__.pop(KEY, None)


def _places(model: torch.nn.Module) -> list[tuple[list[Planned], torch.nn.Module, str, Planned | None]]:
    """(siblings, block, its gating method, the layer behind it) of a model, found once: plans do not change."""
    if PLACES not in model.__dict__:
        found = []
        for module in model.modules():
            kind = _kind(type(module))
            layers = [getattr(module, name, None) for name in SIBLINGS.get(kind, ())]
            layers = layers if all(isinstance(layer, Planned) and layer.tessera_plan for layer in layers) else []
            method, name = GATES.get(kind, ("", ""))
            target = getattr(module, name, None) if name else None
            gates = isinstance(target, Planned) and target.tessera_plan and target.tessera_plan.kernel in GATING
            if layers or gates:
                found.append((layers, module, method, target if gates else None))
        model.__dict__[PLACES] = found
    return model.__dict__[PLACES]


@functools.cache
def _kind(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _gate(module: torch.nn.Module, method: str, target: Planned) -> Callable[[Tensor, Tensor], Tensor | Gated]:
    """Hands both factors on to the layer that multiplies them while quantizing; to hooks, what they expect."""
    layer, computed = weakref.ref(target), getattr(type(module), method)
    owner = weakref.ref(module)

    def gate(a: Tensor, b: Tensor) -> Tensor | Gated:
        if layer()._forward_hooks or layer()._forward_pre_hooks:
            return computed(owner(), a, b)
        return Gated(a, b)

    return gate


def wire(patcher) -> None:
    """Lets the layers of a loaded model share inputs and gates; clones inherit it."""
    wiring = Wiring()
    patcher.set_injections(KEY, [comfy.patcher_extension.PatcherInjection(wiring.inject, wiring.eject)])
