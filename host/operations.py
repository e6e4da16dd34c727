"""The host's mixed-precision operations with a `Linear` of ours, for one file while it is loaded and after."""

from __future__ import annotations

from dataclasses import dataclass, field

import comfy.ops
import torch

from ..formats import FORMATS, Format, Plain
from ..kernels import dispatch
from ..kernels.dispatch import Plan
from ..kernels.facts import DeviceFacts
from ..transcode import Cache
from .planned import Planned
from .smoothed import Smoothed


@dataclass
class Loading:
    """What every layer of one file shares while it is loaded; `plans` and `costs` collect what was decided."""

    facts: DeviceFacts
    speed: str = "auto"
    room: bool = True
    device: str = "cpu"  # where transcoding computes
    text_encoder: bool = False
    cache: Cache | None = None
    plans: dict[str, tuple[str, Plan]] = field(default_factory=dict)  # layer -> (label of the file's format, plan)
    costs: dict[str, tuple[float, float]] = field(default_factory=dict)  # layer -> (distance, added error)

    def taken(self, kernel: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype that a kernel gets inputs in: off the CPU 16 bits, as tensor cores take them. Text encoders, which
        the host computes in fp32, get bf16 by its own kernels too: fp16 would overflow in some."""
        exact = kernel == dispatch.HOST and not self.text_encoder
        if self.facts.type == "cpu" or dtype != torch.float32 or exact or kernel == "decode":
            return dtype
        return torch.bfloat16

    def plan(self, format: Format, shape: tuple[int, int]) -> Plan:
        return dispatch.plan(format, self.facts, self.speed, shape, self.room)


def operations(compute: torch.dtype, loading: Loading, text_encoder: bool = False):
    """The host's mixed-precision ops with a `Linear` that runs our plans."""
    facts, speed = loading.facts, loading.speed
    disabled = {
        name for name, cls in FORMATS.items()
        if not issubclass(cls, Plain) and dispatch.plan(cls(), facts, speed).kernel != dispatch.HOST
    }  # fmt: skip
    base = comfy.ops.mixed_precision_ops({}, compute, full_precision_mm=text_encoder, disabled=disabled)

    class Linear(Planned, Smoothed, base.Linear):
        tessera_loading = loading

    class Operations(base):
        pass

    Operations.Linear = Linear
    return Operations
