"""Sampling steps that multiply in full precision between others on the fast kernels: same weights, two plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.model_patcher
import comfy.patcher_extension
import torch

from . import attaching, loading
from .planned import Planned

KEY = "tessera.precision"
LOADER = "load the file with Load Diffusion Model (Tessera), speed auto"


@dataclass(frozen=True)
class Steps:
    """The first and the last steps of a sampler's run."""

    first: int
    last: int

    def exact(self, sigmas: Sequence[float], sigma: float) -> bool:
        """Whether a call at that noise level belongs to one of them; `sigmas`: where each step begins, and the end."""
        step = step_of(sigmas, sigma)
        return step < self.first or step >= len(sigmas) - 1 - self.last

    def __str__(self) -> str:
        parts = [f"the {which} {count}" for which, count in (("first", self.first), ("last", self.last)) if count]
        return " and ".join(parts) or "no"


def step_of(sigmas: Sequence[float], sigma: float) -> int:
    """Which step, from 0, a noise level lies in: samplers that look ahead within a step also call between its ends."""
    begun = [i for i, begins in enumerate(sigmas[:-1]) if begins >= sigma * (1 - 1e-5)]
    return begun[-1] if begun else 0


class Precision:
    """Around the host's `apply_model`: the layers of the model that is called decode, in the steps that are exact."""

    def __init__(self, steps: Steps):
        self._steps = steps

    def __call__(self, executor, x, t, *args, **kwargs):
        """t [batch]: the noise levels. A call from outside a sampler has no step, and stays fast."""
        sigmas = _sigmas((*args, *kwargs.values()))
        if sigmas is None or not self._steps.exact(sigmas.tolist(), float(t.max())):
            return executor(x, t, *args, **kwargs)
        with exactly(executor.class_obj):
            return executor(x, t, *args, **kwargs)


def _sigmas(given) -> torch.Tensor | None:
    """The noise levels of all steps, from the transformer_options among a call's arguments."""
    options = (value for value in given if isinstance(value, dict) and "sample_sigmas" in value)
    return next(options, {}).get("sample_sigmas")


@contextmanager
def exactly(model: torch.nn.Module) -> Iterator[None]:
    """Lets every planned layer of a model decode what it keeps; no weight is touched."""
    layers = [(module, module._full_precision_mm) for module in model.modules() if isinstance(module, Planned)]
    for layer, _ in layers:  # past nn.Module's slow __setattr__
        layer.__dict__.update(tessera_exact=True, _full_precision_mm=True)  # the second: what the host's forward reads
    try:
        yield
    finally:
        for layer, before in layers:
            layer.__dict__.update(tessera_exact=False, _full_precision_mm=before)


def schedule_precision(patcher, first: int, last: int) -> tuple[comfy.model_patcher.ModelPatcher, str]:
    """(clone that is exact in those steps, what to tell). An earlier schedule is replaced.

    Raises ValueError for a model whose layers are quantized, but not planned by our loader.
    """
    clone, plans = patcher.clone(), loading.plans(patcher)
    if not plans:
        others = len(attaching.quantized_layers(patcher))
        if others:
            raise ValueError(f"{others} quantized layers of this model are run by ComfyUI, which has one way only; "
                             f"{LOADER}")  # fmt: skip
        return clone, "no quantized layers: every step is exact as it is"
    fast = [plan for _, plan in plans.values() if plan.path != "decode"]
    if not fast:
        return clone, f"every step is exact as it is (speed exact, or no kernel for this device); {LOADER}, to be fast"
    clone.remove_wrappers_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, KEY)
    if first or last:
        made = Precision(Steps(first, last))
        clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, KEY, made)
    said = f"{Steps(first, last)} steps exact: {len(fast)} of {len(plans)} quantized layers change their way"
    kept = sum(plan.path == "transcode" for plan in fast)
    return clone, said + (f"; {kept} are kept in the format that loading turned them into" if kept else "")
