"""What this machine does with each format, what is missing, and what to do about it: one screen."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import formats
from .kernels import dispatch
from .kernels.dispatch import CU130, DECODE, HOST, NATIVE, Plan
from .kernels.facts import DeviceFacts, read_facts
from .quantization.report import size
from .version import VERSION

LABELS = ("nvfp4", "mxfp8", "fp8_e4m3", "fp8_e5m2", "int8_row", "int8_convrot_256", "int8_convrot_64")
SHAPE = (10240, 3840)  # a feed-forward layer of Z-Image
PACKAGES = ("torch", "triton", "triton-windows", "comfy-kitchen", "safetensors", "numpy", "comfyui-frontend-package")
SHORT = {"comfyui-frontend-package": "frontend"}
TORCH, KITCHEN = "update torch", "reinstall comfy-kitchen"  # remedies as plans name them, besides CU130
CUDA13_DRIVER = "580"  # the oldest NVIDIA driver for CUDA 13
DRIVER_FILE = Path("/proc/driver/nvidia/version")  # Linux


@dataclass(frozen=True)
class Fix:
    """Something to do, and the exact command if one does it."""

    what: str
    command: str = ""
    optional: bool = False  # every format runs well without


@dataclass(frozen=True)
class Backend:
    """One of comfy-kitchen's sets of kernels."""

    name: str
    on: bool
    why: str = ""  # it is not


@dataclass(frozen=True)
class ComfyUI:
    """What only the running host knows."""

    version: str
    cache_folder: str  # of transcoded layers
    cache_files: int
    cache_bytes: int
    merge_guard: str  # on or off, and who says so
    cpu_only: bool = False  # started with --cpu


@dataclass(frozen=True)
class Diagnosis:
    """Facts of one device, and the plan of every format on it."""

    device: str
    facts: DeviceFacts
    plans: dict[str, Plan]  # by format label, for a layer of `SHAPE`
    backends: Sequence[Backend] = ()
    driver: str = ""  # version of the NVIDIA driver, where it is known
    comfyui: ComfyUI | None = None

    def verdict(self) -> str:
        """One sentence: what to do, if anything."""
        fixes = [fix.what for fix in self.fixes() if not fix.optional]
        if fixes:
            return f"To run every format at its best: {'; '.join(fixes)}."
        slow = [label for label, plan in self.plans.items() if plan.path == DECODE]
        if slow:
            return f"Decoded for every call on this device: {', '.join(slow)}. Nothing to install would change that."
        return "Every format runs by its best kernel for this device."

    def fixes(self) -> list[Fix]:
        """What to install, the most important first."""
        return [*_without_gpu(self), *_remedies(self.facts, self.plans), *_triton(self.facts)]

    def lines(self) -> list[str]:
        width = max(len(label) for label in self.plans)
        found = [f"Tessera {VERSION} on {self.facts.name or self.device}: {self.facts}", self.verdict()]
        for fix in self.fixes():
            found += [
                f"  {'optional: ' if fix.optional else ''}{fix.what}",
                *([f"    {fix.command}"] * bool(fix.command)),
            ]
        found += ["", *(f"{name}: {text}" for name, text in self.machine())]
        return [*found, "", *(f"{label:{width}}  {plan}" for label, plan in self.plans.items())]

    def machine(self) -> list[tuple[str, str]]:
        """Names and values of what this machine and its software are."""
        facts, known = self.facts, versions()
        newest = f"CUDA {facts.driver[0]}.{facts.driver[1]}" if facts.driver else ""
        driver = " runs ".join(filter(None, (self.driver, newest)))
        packages = [(SHORT.get(name, name), known[name]) for name in (*PACKAGES, "python") if name in known]
        backends = [f"{b.name} on" if b.on else f"{b.name} off ({b.why})" for b in self.backends]
        found = [
            ("device", " ".join(filter(None, (facts.name, f"({facts.gpu})" * bool(facts.gpu), facts.gfx))) or str(
                facts.cpu or self.device)),
            ("memory", size(facts.memory) if facts.memory else ""), ("driver", driver), *packages,
            ("platform", known["platform"]), ("comfy-kitchen backends", "; ".join(backends)),
        ]  # fmt: skip
        return [(name, text) for name, text in [*found, *self._host()] if text]

    def _host(self) -> list[tuple[str, str]]:
        if self.comfyui is None:
            return [("ComfyUI", "not running in this process; the Tessera tab in ComfyUI knows its cache and settings")]
        host = self.comfyui
        cache = f"{size(host.cache_bytes)} in {host.cache_files} files" if host.cache_files else "empty"
        started = ", started with --cpu" if host.cpu_only else ""
        return [("ComfyUI", host.version + started), ("merge guard", host.merge_guard),
                ("transcoding cache", f"{cache}, {host.cache_folder}")]  # fmt: skip

    def markdown(self) -> str:
        """For an issue report: nothing in it says who or where the user is."""
        rows = [f"| {label} | {plan.path} | {plan.target or 'as stored'} | {plan.kernel} | {plan.reason} | {plan.fix} |"
                for label, plan in self.plans.items()]  # fmt: skip
        fixes = [f"- {fix.what}" + (f": `{fix.command}`" if fix.command else "") for fix in self.fixes()]
        machine = [f"- {name}: {_placeless(text)}" for name, text in self.machine()]
        lines = [f"**Tessera {VERSION}**, {self.facts}", "", self.verdict(), *fixes, "", *machine, "",
                 "| format | path | kept as | kernel | reason | fix |", "|---|---|---|---|---|---|", *rows]  # fmt: skip
        return without_home("\n".join(lines))

    def as_dict(self) -> dict:
        facts = asdict(self.facts) | {"backends": sorted(self.facts.backends), "features": sorted(self.facts.features)}
        return {
            "version": VERSION, "device": self.device, "versions": versions(), "facts": facts, "driver": self.driver,
            "machine": [[name, without_home(text)] for name, text in self.machine()],
            "plans": {label: asdict(plan) for label, plan in self.plans.items()},
            "backends": [asdict(backend) for backend in self.backends],
            "fixes": [asdict(fix) for fix in self.fixes()], "verdict": self.verdict(),
            "comfyui": self.comfyui and asdict(self.comfyui) | {
                "cache_folder": without_home(self.comfyui.cache_folder)},
        }  # fmt: skip


def diagnose(device: str | None = None, facts: DeviceFacts | None = None, comfyui: ComfyUI | None = None) -> Diagnosis:
    """The device's facts (the first GPU's, without a name) and plans. Raises ValueError if torch has no such device."""
    name = device or default_device()
    found = facts or read_facts(_device(name))
    plans = {label: dispatch.plan(formats.parse(label), found, shape=SHAPE) for label in LABELS}
    return Diagnosis(name, found, plans, kitchen_backends(found), driver_version(), comfyui)


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


def kitchen_backends(facts: DeviceFacts) -> list[Backend]:
    """comfy-kitchen's backends, those that are on first, and why the others are not."""
    import comfy_kitchen

    found = []
    for name, state in comfy_kitchen.list_backends().items():
        on = bool(state["available"]) and not state["disabled"]
        missing = state.get("unavailable_reason") or "not installed"
        why = "" if on else _why_off(name, facts) if state["available"] else without_home(str(missing))
        found.append(Backend(name, on, " ".join(why.split())[:200]))
    return sorted(found, key=lambda backend: (not backend.on, backend.name))


def driver_version() -> str:
    """Of the NVIDIA driver; empty where there is none or the system does not say."""
    try:
        text = DRIVER_FILE.read_text(encoding="utf-8", errors="replace")[:400]
    except OSError:
        return ""
    found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else ""


def without_home(text: str) -> str:
    """A text with ~ for the user's own folder, however it is written."""
    home = os.path.expanduser("~")
    for path in sorted({home, os.path.realpath(home), home.replace("\\", "/")}, key=len, reverse=True):
        if len(path.strip("/\\")) > 2:  # else it is a whole disk
            text = re.sub(re.escape(path) + r"(?![\w.-])", "~", text, flags=re.IGNORECASE)
    return text


def _placeless(text: str) -> str:
    """A text with the last three names of every path that is not below the user's folder."""
    return re.sub(r"(?:[A-Za-z]:)?(?:[/\\][^/\\,;()]+){4,}", lambda path: ".../" + "/".join(
        re.split(r"[/\\]", path[0])[-3:]), without_home(text))  # fmt: skip


def _why_off(name: str, facts: DeviceFacts) -> str:
    """Why ComfyUI has switched off a backend that is there."""
    if name == "cuda" and (facts.cuda is None or facts.cuda < (13, 0)):
        return "ComfyUI uses it with torch for CUDA 13 and later"
    if name == "triton":
        return "ComfyUI uses it when started with --enable-triton-backend; Tessera's own Triton kernels do not need it"
    return "switched off"


def _remedies(facts: DeviceFacts, plans: Mapping[str, Plan]) -> list[Fix]:
    """What plans ask for, and what would give an NVIDIA GPU a fast path for formats that have none."""
    wanted = {plan.fix for plan in plans.values() if plan.fix}
    slow = any(plan.path == DECODE or (plan.path == NATIVE and plan.kernel == HOST and label.startswith("int8"))
               for label, plan in plans.items())  # fmt: skip
    if slow and facts.sm is not None and facts.sm >= (7, 5):
        old = facts.cuda is None or facts.cuda < (13, 0)
        wanted |= {CU130} if old else {KITCHEN} - (facts.backends & {"cuda"} and {KITCHEN})
    fixes = []
    if CU130 in wanted and facts.driver and facts.driver < (13, 0):
        fixes.append(Fix(f"update the NVIDIA driver to {CUDA13_DRIVER} or newer: this one runs CUDA {facts.driver[0]}."
                         f"{facts.driver[1]} at most"))  # fmt: skip
    return fixes + [Fix(what, _command(what, facts)) for what in sorted(wanted)]


def _command(what: str, facts: DeviceFacts) -> str:
    if what == KITCHEN:
        known = versions().get("comfy-kitchen")  # the host pins it
        return f"{_pip()} --force-reinstall --no-deps comfy-kitchen{f'=={known}' if known else ''}"
    index = "cu130" if what == CU130 or facts.driver is None or facts.driver >= (13, 0) else "cu128"
    return f"{_pip()} --upgrade torch torchvision torchaudio --index-url https://download.pytorch.org/whl/{index}"


def _pip() -> str:
    """pip of the Python that runs this; ComfyUI's portable version for Windows spells its folder so."""
    portable = Path(sys.executable).parent.name == "python_embeded"
    return (r".\python_embeded\python.exe -s" if portable else "python") + " -m pip install"


def _triton(facts: DeviceFacts) -> list[Fix]:
    if facts.sm is None or facts.sm < (8, 0) or facts.fuses:
        return []
    package = "triton-windows" if sys.platform == "win32" else "triton"
    found = f"this is {facts.triton[0]}.{facts.triton[1]}" if facts.triton else "there is none"
    return [Fix(f"install Triton 3.6 or newer ({found}): less time per layer on this GPU",
                f"{_pip()} --upgrade {package}", optional=True)]  # fmt: skip


def _without_gpu(found: Diagnosis) -> list[Fix]:
    """Where torch does not use the NVIDIA GPU whose driver is running."""
    if found.facts.type != "cpu" or not found.driver or torch.cuda.is_available():
        return []
    if torch.version.cuda is None:
        return [Fix(f"an NVIDIA driver is here, but torch {torch.__version__} is built without CUDA",
                    _command(CU130, found.facts))]  # fmt: skip
    return [Fix(f"torch {torch.__version__} does not reach the NVIDIA GPU (driver {found.driver}): update the driver "
                f"to {CUDA13_DRIVER} or newer, and see that CUDA_VISIBLE_DEVICES does not hide it")]  # fmt: skip


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r}: torch knows no such device; use cpu, cuda, cuda:1, mps or xpu") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch {torch.__version__} sees no GPU; use cpu, or install a CUDA build")
    return device
