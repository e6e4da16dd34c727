"""What this machine does with each format, what is missing, and what to do about it: one screen."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from dataclasses import asdict, dataclass

import torch

from . import formats
from .kernels import dispatch
from .kernels.dispatch import DECODE, Plan
from .kernels.facts import DeviceFacts, read_facts
from .version import VERSION

LABELS = ("nvfp4", "mxfp8", "fp8_e4m3", "fp8_e5m2", "int8_row", "int8_convrot_256", "int8_convrot_64")
SHAPE = (10240, 3840)  # a feed-forward layer of Z-Image
PACKAGES = ("torch", "triton", "comfy-kitchen", "safetensors", "numpy")


@dataclass(frozen=True)
class Diagnosis:
    """Facts of one device, and the plan of every format on it."""

    device: str
    facts: DeviceFacts
    plans: dict[str, Plan]  # by format label, for a layer of `SHAPE`

    def verdict(self) -> str:
        """One sentence: what to do, if anything."""
        fixes = sorted({plan.fix for plan in self.plans.values() if plan.fix})
        if fixes:
            return f"To run every format at its best: {'; '.join(fixes)}."
        slow = [label for label, plan in self.plans.items() if plan.path == DECODE]
        if slow:
            return f"Decoded for every call on this device: {', '.join(slow)}. Nothing to install would change that."
        return "Every format runs by its best kernel for this device."

    def lines(self) -> list[str]:
        width = max(len(label) for label in self.plans)
        found = [f"Tessera {VERSION} on {self.facts.name or self.device}: {self.facts}"]
        if self.facts.driver:
            found.append(f"driver: CUDA {'.'.join(map(str, self.facts.driver))}")
        found += [f"{label:{width}}  {plan}" for label, plan in self.plans.items()]
        return [*found, "", self.verdict()]

    def markdown(self) -> str:
        """For an issue report."""
        rows = [f"| {label} | {plan.path} | {plan.target or 'as stored'} | {plan.kernel} | {plan.reason} | {plan.fix} |"
                for label, plan in self.plans.items()]  # fmt: skip
        packages = ", ".join(f"{name} {version}" for name, version in versions().items())
        return "\n".join([f"**Tessera {VERSION}**, {self.facts}", "", packages, "",
                          "| format | path | kept as | kernel | reason | fix |", "|---|---|---|---|---|---|", *rows,
                          "", self.verdict()])  # fmt: skip

    def as_dict(self) -> dict:
        facts = asdict(self.facts) | {"backends": sorted(self.facts.backends), "features": sorted(self.facts.features)}
        plans = {label: asdict(plan) for label, plan in self.plans.items()}
        return {"device": self.device, "versions": versions(), "facts": facts, "plans": plans,
                "verdict": self.verdict()}  # fmt: skip


def diagnose(device: str | None = None, facts: DeviceFacts | None = None) -> Diagnosis:
    """The device's facts (the first GPU's, without a name) and plans. Raises ValueError if torch has no such device."""
    name = device or default_device()
    found = facts or read_facts(_device(name))
    plans = {label: dispatch.plan(formats.parse(label), found, shape=SHAPE) for label in LABELS}
    return Diagnosis(name, found, plans)


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "xpu" if hasattr(torch, "xpu") and torch.xpu.is_available() else "cpu"


def versions() -> dict[str, str]:
    """What is installed, by package; those that are not are left out."""
    found = {"python": platform.python_version(), "platform": sys.platform}
    for name in PACKAGES:
        for known in importlib.metadata.distributions(name=name):
            found[name] = known.version
            break
    return found


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r}: torch knows no such device; use cpu, cuda, cuda:1, mps or xpu") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch {torch.__version__} sees no GPU; use cpu, or install a CUDA build")
    return device
