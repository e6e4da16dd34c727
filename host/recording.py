"""Calibration in the graph: hooks collect each layer's input statistics while the user's own sampler runs.

The recording clone carries the hooks in an injection; what they collect lives in a Recorder, which knows no model.
The sampler's result is the same to the bit.
"""

from __future__ import annotations

import sys
import uuid
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import comfy.model_management
import comfy.patcher_extension
import torch
from torch import nn

from ..injection import HOOKS
from ..quantization.calibration import Calibration, fingerprint
from ..quantization.recorder import DEFAULTS, GB, Forward, Recorder, RecordOptions
from .attaching import TRUNK
from .memory import clip_source, model_source
from .probe_calls import ProbeCall, Probes, replaying

__all__ = ["ProbeCall", "RecordOptions", "Recorder", "calibration_of", "record"]


def record(model, options: RecordOptions = DEFAULTS):
    """(clone of a MODEL's patcher or of a CLIP, Recorder): whatever runs through the clone is recorded.

    Raises ValueError if the model is quantized already, or if not even diagonal moments fit the memory limit.
    """
    clone = model.clone()
    patcher = getattr(clone, "patcher", clone)
    text_encoder = patcher is not clone
    source = clip_source(model) if text_encoder else model_source(model)
    trunk = f"{source.name}.transformer" if text_encoder else TRUNK.rstrip(".")
    widths = {name: layer.in_features for name, layer in linear_layers(patcher.model.get_submodule(trunk))}
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    recorder = Recorder(fingerprint(source), widths, options, int(options.memory * GB) or free // 2)
    key = f"tessera.calibrate.{uuid.uuid4().hex}"
    hooks = _Hooks(key, trunk, recorder)
    patcher.set_injections(key, [comfy.patcher_extension.PatcherInjection(hooks.inject, hooks.eject)])
    if options.probes and not text_encoder:
        probes = Probes(options.probes, options.seed, recorder.probes, recorder.note)
        patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, key, probes.watch)
    return clone, recorder


def calibration_of(recorded) -> Calibration:
    """The Calibration of what a CALIBRATION socket carries. Raises ValueError if nothing was recorded yet."""
    calibration = recorded.calibration() if isinstance(recorded, Recorder) else recorded
    if not calibration.sites:
        raise ValueError("nothing was recorded yet: connect the sampler's output through TesseraSaveCalibration, take "
                         "its calibration; if the sampler did not run again, change its seed")  # fmt: skip
    return calibration


def linear_layers(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer below a module with its path; the host's own ones are no nn.Linear."""
    for name, module in root.named_modules():
        if name and hasattr(module, "in_features") and hasattr(module, "out_features"):
            yield name, module


@dataclass(frozen=True)
class _Hooks:
    """The recording clone's injection; the model it hooks is that of the patcher it is given, and not held."""

    key: str
    trunk: str
    recorder: Recorder

    def inject(self, patcher) -> None:
        registry = patcher.model.__dict__.setdefault(HOOKS, {})
        for handle in registry.pop(self.key, (None, ()))[1]:
            handle.remove()
        owner, forward = weakref.ref(patcher), Forward()
        root = patcher.model.get_submodule(self.trunk)
        handles = [
            root.register_forward_pre_hook(_uncompiled(self._begin(owner, forward))),
            root.register_forward_hook(_uncompiled(_end(forward))),
        ]
        for name, module in linear_layers(root):
            handles.append(module.register_forward_pre_hook(_uncompiled(self._observe(name, owner, forward))))
        registry[self.key] = (owner, handles)

    def eject(self, patcher) -> None:
        """Unhooks the model; does nothing if another patcher has hooked it since."""
        registry = patcher.model.__dict__.get(HOOKS, {})
        if self.key in registry and registry[self.key][0]() in (None, patcher):
            for handle in registry.pop(self.key)[1]:
                handle.remove()

    def _begin(self, owner: weakref.ref, forward: Forward):
        def begin(module, inputs):
            if owner() is not None and not replaying():
                self.recorder.begin(forward)

        return begin

    def _observe(self, name: str, owner: weakref.ref, forward: Forward):
        def observe(module, inputs):
            if owner() is None or replaying() or not inputs:
                return
            if not forward.running:  # some hosts prepare conditioning with single layers, before the forward
                forward.seen.clear()
            self.recorder.add(name, inputs[0], forward)

        return observe


def _end(forward: Forward):
    def end(module, inputs, output):
        forward.seen.clear()
        forward.running = False

    return end


def _uncompiled(hook):
    """A hook that torch.compile leaves alone."""
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook
