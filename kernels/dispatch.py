"""Which way each quantized layer is multiplied on a device: decided once, at load, from facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..formats import Format

NATIVE, DECODE = "native", "decode"
SPEEDS = ("auto", "exact")


@dataclass(frozen=True)
class DeviceFacts:
    """What decides a plan. Tests make their own; `read_facts` reads a real device."""

    type: str  # cpu, cuda, mps, xpu, ...
    sm: tuple[int, int] | None = None  # compute capability of an NVIDIA GPU
    cuda: tuple[int, int] | None = None  # what torch was built for
    torch: tuple[int, int] = (2, 13)
    backends: frozenset[str] = frozenset({"eager"})  # comfy-kitchen's enabled ones

    def __str__(self) -> str:
        gpu = f" SM {self.sm[0]}.{self.sm[1]}" if self.sm else ""
        cuda = f", CUDA {self.cuda[0]}.{self.cuda[1]}" if self.cuda else ""
        backends = ", ".join(sorted(self.backends))
        return f"{self.type}{gpu}, torch {self.torch[0]}.{self.torch[1]}{cuda}, comfy-kitchen {backends}"


@dataclass(frozen=True)
class Plan:
    """native: comfy-kitchen multiplies the codes; decode: the weight is decoded for each call, then a plain GEMM."""

    path: str
    reason: str


def read_facts(device: torch.device) -> DeviceFacts:
    """The facts of a device of this process."""
    import comfy_kitchen

    backends = {name for name, b in comfy_kitchen.list_backends().items() if b["available"] and not b["disabled"]}
    nvidia = device.type == "cuda" and torch.version.hip is None
    return DeviceFacts(
        device.type,
        torch.cuda.get_device_capability(device) if nvidia else None,
        _version(torch.version.cuda) if torch.version.cuda else None,
        _version(torch.__version__),
        frozenset(backends),
    )


def plan(format: Format, facts: DeviceFacts, speed: str = "auto") -> Plan:
    """The path of a layer in that format, and why. Same bytes as comfy-kitchen's own choice wherever both are exact."""
    if speed == "exact":
        return Plan(DECODE, "speed is set to exact")
    if format.full_precision_matrix_mult:
        return Plan(DECODE, "the file asks for full-precision multiplication")
    if format.name == "int8_tensorwise":
        return Plan(NATIVE, f"comfy-kitchen int8 on {facts.type}")
    if facts.sm is None:
        device = "ROCm" if facts.type == "cuda" else facts.type  # torch calls AMD's GPUs cuda too
        return Plan(DECODE, f"comfy-kitchen and torch multiply no {format.name} on {device}")
    return _nvidia(format.name, facts)


def _nvidia(name: str, facts: DeviceFacts) -> Plan:
    sm = f"SM {facts.sm[0]}.{facts.sm[1]}"
    if name in ("nvfp4", "mxfp8"):
        if facts.sm < (10, 0):
            return Plan(DECODE, f"{name} needs a Blackwell GPU (SM 10.0), this is {sm}")
        if name == "mxfp8" and facts.torch < (2, 10):
            return Plan(DECODE, f"mxfp8 needs torch 2.10, this is {facts.torch[0]}.{facts.torch[1]}: update torch")
        if name == "nvfp4" and (facts.cuda is None or facts.cuda < (13, 0)):
            return Plan(DECODE, "nvfp4 needs torch built for CUDA 13: install torch from the cu130 index")
        if name == "nvfp4" and "cuda" not in facts.backends:
            return Plan(DECODE, "comfy-kitchen's CUDA backend is not available: reinstall comfy-kitchen")
        return Plan(NATIVE, f"comfy-kitchen {name} on {sm}")
    if not name.startswith("float8"):
        raise ValueError(f"format {name}: has no rule in kernels/dispatch.py; add one")
    if facts.sm < (8, 9):
        return Plan(DECODE, f"fp8 needs SM 8.9, this is {sm}")
    return Plan(NATIVE, f"torch scaled_mm fp8 on {sm}")


def summary(plans: Iterable[tuple[str, Plan]]) -> list[str]:
    """One line per distinct (format label, plan), with how many layers it has, the most first."""
    counts = Counter((label, p.path, p.reason) for label, p in plans)
    return [f"{n} {label}: {path} ({reason})" for (label, path, reason), n in counts.most_common()]


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split("+")[0].split(".")[:2]
    return int(major), int(minor)
