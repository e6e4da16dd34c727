"""What decides how a layer runs on a device: read once, or made up by a test."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch

from . import cpu as cpu_kernels
from .cpu import CPUFacts

SINGLE = "float32"


@dataclass(frozen=True)
class DeviceFacts:
    """What decides a plan. Tests make their own; `read_facts` reads a real device."""

    type: str  # cpu, cuda, mps, xpu, ...
    sm: tuple[int, int] | None = None  # compute capability of an NVIDIA GPU
    cuda: tuple[int, int] | None = None  # what torch was built for
    torch: tuple[int, int] = (2, 13)
    backends: frozenset[str] = frozenset({"eager"})  # comfy-kitchen's enabled ones
    triton: tuple[int, int] | None = None
    driver: tuple[int, int] | None = None  # the newest CUDA that the driver runs
    features: frozenset[str] = frozenset()  # what comfy-kitchen's functions take, by signature: residual, input_act
    gfx: str = ""  # architecture of an AMD GPU
    name: str = ""
    memory: int = 0  # bytes of the device in all; 0: unknown
    dtype: str = "bfloat16"  # that the host computes in
    cpu: CPUFacts | None = None  # of the CPU, where that is the device

    @property
    def gpu(self) -> str:
        return f"SM {self.sm[0]}.{self.sm[1]}" if self.sm else ""

    @property
    def device_name(self) -> str:
        return "ROCm" if self.type == "cuda" and self.sm is None else self.type

    @property
    def fuses(self) -> bool:
        """Whether our Triton kernels run here; they are compiled for 3.6 and later."""
        return self.sm is not None and self.triton is not None and self.triton >= (3, 6)

    @property
    def residual(self) -> bool:
        """Whether comfy-kitchen's int8 adds a residual in its epilogue (0.2.40)."""
        return "residual" in self.features

    @property
    def rdna3(self) -> bool:
        """comfy-kitchen's HIP GEMMs are written for gfx11 and gfx12."""
        return self.gfx.startswith(("gfx11", "gfx12"))

    def __str__(self) -> str:
        where = str(self.cpu) if self.cpu else " ".join(filter(None, (self.type, self.gpu or self.gfx)))
        cuda = f", CUDA {_dotted(self.cuda)}" if self.cuda else ""
        triton = f", Triton {_dotted(self.triton)}" if self.triton else ""
        backends = ", ".join(sorted(self.backends))
        return f"{where}, torch {_dotted(self.torch)}{cuda}{triton}, comfy-kitchen {backends}"


def read_facts(device: torch.device, dtype: torch.dtype | None = torch.bfloat16) -> DeviceFacts:
    """The facts of a device of this process; `dtype` is the one the host computes in."""
    import comfy_kitchen

    backends = {name for name, b in comfy_kitchen.list_backends().items() if b["available"] and not b["disabled"]}
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    nvidia = on_gpu and torch.version.hip is None
    return DeviceFacts(
        device.type,
        torch.cuda.get_device_capability(device) if nvidia else None,
        _version(torch.version.cuda) if torch.version.cuda else None,
        _version(torch.__version__),
        frozenset(backends),
        triton_version(),
        _driver() if nvidia else None,
        frozenset(inspect.signature(comfy_kitchen.int8_linear).parameters) & {"residual", "input_act"},
        properties.gcnArchName.split(":")[0] if on_gpu and not nvidia else "",
        properties.name if on_gpu else "",
        properties.total_memory if on_gpu else 0,
        str(dtype).removeprefix("torch.") if dtype else SINGLE,
        cpu_kernels.facts() if device.type == "cpu" else None,
    )


def triton_version() -> tuple[int, int] | None:
    """The installed Triton's version; None without it. Triton itself is not imported."""
    from importlib import metadata, util

    if util.find_spec("triton") is None:
        return None
    found = [name for name in ("triton", "triton-windows", "pytorch-triton") if _installed(name)]
    return _version(metadata.version(found[0])) if found else None


def _installed(name: str) -> bool:
    from importlib import metadata

    return any(True for _ in metadata.distributions(name=name))


def _driver() -> tuple[int, int]:
    number = torch._C._cuda_getDriverVersion()
    return number // 1000, number % 1000 // 10


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
