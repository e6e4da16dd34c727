"""Strengths that move while the host samples: written before each call of the model, where kernels read them."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.patcher_extension

from ..branch import Strengths
from ..schedule import Schedule


class Conductor:
    """Sets a stack's strengths for the step that is to come."""

    def __init__(self, strengths: Strengths, full: Sequence[float], schedules: Sequence[Schedule | None]):
        self._strengths, self._full, self._schedules = strengths, list(full), list(schedules)

    def __call__(self, executor, x, t, *args, **kwargs):
        """Around the host's `apply_model`: t [batch] are the noise levels."""
        share = share_done(executor.class_obj.model_sampling, float(t.max()))
        factors = (1.0 if s is None else s.factor(share) for s in self._schedules)
        self._strengths.set(full * factor for full, factor in zip(self._full, factors, strict=True))
        return executor(x, t, *args, **kwargs)


def share_done(sampling, sigma: float) -> float:
    """Which share of sampling is behind at that noise level, as the host's start_percent and end_percent mean it."""
    low, high = 0.0, 1.0
    for _ in range(20):  # to a millionth; each try is cheap, and a model's curve may be any that falls
        middle = (low + high) / 2
        if float(sampling.percent_to_sigma(middle)) > sigma * (1 + 1e-6):
            low = middle
        else:
            high = middle
    return high if high > 2e-6 else 0.0


def conduct(patcher, key: str, conductor: Conductor) -> None:
    """Has the conductor run before every step of a patcher and its clones."""
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, key, conductor)


def dismiss(patcher, key: str) -> None:
    patcher.remove_wrappers_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, key)
