"""A stack's branches on the layers of a model, for as long as its patcher is loaded."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, field

import torch
from torch import nn

from .branch import Branch, Branches, Cast, Strengths

log = logging.getLogger("tessera")

FUSED = "TensorWiseINT8Layout"  # the host's `linear_input_act` multiplies these without calling the layer
HOOKS = "_tessera_hooks"  # on the model: what is injected -> (weak patcher, handles)
STACK = "tessera.stack"  # the one stack that a model carries at a time


@dataclass
class Injection:
    """A stack's place on patchers: its key and its strengths. Everything else is taken from the patcher at inject
    time, so that clones, deep clones and copies on other devices get their own hooks."""

    key: str
    strengths: Strengths
    cast: Cast
    _warned: bool = field(init=False, default=False)

    def inject(self, patcher) -> None:
        """Puts the branches on this patcher's model, in the place of any that are there."""
        registry = patcher.model.__dict__.setdefault(HOOKS, {})
        for handle in registry.pop(STACK, (None, ()))[1]:
            handle.remove()
        branches = self._branches(patcher)
        self.strengths.prepare(branches, getattr(patcher, "load_device", torch.device("cpu")))
        handles = []
        for name, item in zip(branches.layers, branches.items, strict=True):
            item.forget()
            module = module_at(patcher.model, name)
            if hasattr(module, "attach_branch"):  # a layer of ours takes it into its own product
                handles.append(module.attach_branch(item, self.strengths))
            else:
                handles.append(module.register_forward_hook(_adding(item, self.strengths, self.cast)))
        registry[STACK] = (weakref.ref(patcher), handles)

    def eject(self, patcher) -> None:
        """Takes them off the model; does nothing if another patcher has put its own there since."""
        registry = patcher.model.__dict__.get(HOOKS, {})
        if STACK not in registry or registry[STACK][0]() is not patcher:
            return
        for handle in registry.pop(STACK)[1]:
            handle.remove()
        self._warn_unserved(patcher)

    def _branches(self, patcher) -> Branches:
        return patcher.get_additional_models_with_key(self.key)[0].model

    def _warn_unserved(self, patcher) -> None:
        """Some hosts run a fused linear that passes hooks by (`linear_input_act`): say so, once per injection."""
        if self._warned:
            return
        branches = self._branches(patcher)
        items = dict(zip(branches.layers, branches.items, strict=True))
        silent = [name for name, item in items.items() if not item.fired]
        # twice: a run that was cancelled inside its first step has silent layers too
        if not silent or max(item.fired for item in items.values()) < 2:
            return
        self._warned = True
        absorbed = [name for name in silent if items[name].absorbed]
        fused = [name for name in absorbed if _may_be_fused(module_at(patcher.model, name))]
        if fused:
            log.error("Tessera: %d of %d layers ran past their absorbed branch, or not at all (first: %s). In ComfyUI "
                      "0.30 and later some models run int8 layers by a fused kernel that no branch can join, and "
                      "WITHOUT THEIR BRANCH THEY ARE WRONG: do not trust this picture. Quantize these layers again in "
                      "nvfp4 or mxfp8, or the model in correction mode", len(fused), len(items), fused[0])  # fmt: skip
        elif absorbed:
            log.warning("Tessera: %d of %d absorbed branches were not used (first: %s): their layers did not run; if "
                        "another extension runs them in its own way, the picture is wrong, remove that extension",
                        len(absorbed), len(items), absorbed[0])  # fmt: skip
        rest = [name for name in silent if not items[name].absorbed]
        if rest:
            log.warning("Tessera: %d of %d layers ran past their branch, or not at all (first: %s): they are not "
                        "corrected, and no LoRA acts on them", len(rest), len(items), rest[0])  # fmt: skip


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module of that path; faster than `get_submodule`, as a slider asks for every layer."""
    for part in path.split("."):
        found = model._modules.get(part)
        model = getattr(model, part) if found is None else found  # a compiled module answers for what it wraps
    return model


def _adding(item: Branch, strengths: Strengths, cast: Cast):
    def add(module, inputs, output):
        bias = getattr(module, "bias", None) if item.needs_base else None
        return item.add(output, inputs[0], strengths, cast, bias)

    return add


def _may_be_fused(module: nn.Module) -> bool:
    return getattr(module, "layout_type", None) == FUSED
