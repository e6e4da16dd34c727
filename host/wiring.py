"""Where the host's blocks let neighbouring layers work together: shared inputs, and a gate inside the next layer.

Reversible and per clone: everything is set at inject time and taken back at eject time. Data, not code, says where.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

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
        for place in _places(patcher.model):
            for layer in place.layers:
                layer.__dict__["tessera_siblings"] = place.siblings
            if place.gate is not None:
                place.module.__dict__[place.method] = place.gate
        patcher.model.__dict__[KEY] = weakref.ref(patcher)

    def eject(self, patcher) -> None:
        """Takes everything back, unless another patcher has wired the model since."""
        owner = patcher.model.__dict__.get(KEY)
        if owner is None or owner() not in (patcher, None):
            return
        for place in _places(patcher.model):
            for layer in place.layers:
                layer.__dict__["tessera_siblings"] = None
            place.module.__dict__.pop(place.method, None)  # the class's own method stands behind it
        patcher.model.__dict__.pop(KEY, None)


@dataclass(frozen=True, eq=False)
class Place:
    """A block whose layers share an input, or that hands its gate on."""

    module: torch.nn.Module
    paths: tuple[str, ...]  # of the siblings
    layers: tuple[Planned, ...]
    siblings: Siblings | None
    method: str  # that computes the gate
    gate: Callable | None


class Places(list):
    """Of one model: a copied one finds its own."""

    def __deepcopy__(self, memo):
        return None


def _places(model: torch.nn.Module) -> Places:
    """Found once: plans do not change."""
    if model.__dict__.get(PLACES) is None:
        model.__dict__[PLACES] = found = Places()
        for path, module in model.named_modules():
            kind = _kind(type(module))
            names = SIBLINGS.get(kind, ())
            layers = tuple(getattr(module, name, None) for name in names)
            shared = bool(layers) and all(isinstance(layer, Planned) and layer.tessera_plan for layer in layers)
            layers = layers if shared else ()
            method, name = GATES.get(kind, ("", ""))
            target = getattr(module, name, None) if name else None
            gates = isinstance(target, Planned) and target.tessera_plan and target.tessera_plan.kernel in GATING
            if layers or gates:
                paths = tuple(f"{path}.{name}" for name in names) if layers else ()
                siblings = Siblings(list(layers)) if layers else None
                gate = _gate(module, method, target) if gates else None
                found.append(Place(module, paths, layers, siblings, method, gate))
    return model.__dict__[PLACES]


def sharing(model: torch.nn.Module) -> list[tuple[str, ...]]:
    """Paths of layers that are called with the same input and quantize it once."""
    return [place.paths for place in _places(model) if place.paths]


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
