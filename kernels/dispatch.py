"""Which way each quantized layer is multiplied on a device: decided once, at load, from facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .facts import SINGLE, DeviceFacts, read_facts
from .reference import ROTATED_GROUPS

if TYPE_CHECKING:
    from ..formats import Format

__all__ = ["DECODE", "NATIVE", "SPEEDS", "TRANSCODE", "WEIGHT_ONLY", "DeviceFacts", "Plan", "plan", "read_facts",
           "summary"]  # fmt: skip

NATIVE, TRANSCODE, WEIGHT_ONLY, DECODE = "native", "transcode", "weight-only", "decode"
SPEEDS = ("auto", "exact")

HOST = "host"  # ComfyUI's own op: comfy-kitchen or torch picks
INT8_BOUND, FP8_BOUND = 0.010, 1e-4  # most that transcoding may add to a layer's relative weight error
CU130 = "install torch from the cu130 index"

# Rounding of inputs: relative error on activations with outlier channels (kernels.md 2)
ACTIVATIONS = {
    "nvfp4": 0.094,
    "mxfp8": 0.0265,
    "fp8_row": 0.025,
    "fp8": 0.025,
    "int8_row": 0.043,
    "int8_convrot": 0.009,
}


@dataclass(frozen=True)
class Plan:
    """native: the stored codes are multiplied; transcode: those of `target`, made once at load; weight-only: codes are
    decoded inside the product; decode: the weight is decoded for each call, then a plain GEMM."""

    path: str
    reason: str
    kernel: str = HOST  # which function multiplies; `kernels.linear` knows them by name
    target: str = ""  # label of the format that the layer is kept in, where that is not the file's
    code_max: int = 127  # largest int8 code of a transcoded weight
    bound: float = 0.0  # most that transcoding may add to the relative weight error; above it the layer is decoded
    input_error: float = 0.0  # expected rounding of inputs, relative
    fix: str = ""  # what the user can do for a faster path

    def __str__(self) -> str:
        to = f" to {self.target}" if self.target else ""
        fix = f"; for the native path {self.fix}" if self.fix else ""
        return f"{self.path}{to} ({self.reason}{fix})"


def plan(format: Format, facts: DeviceFacts, speed: str = "auto", shape: tuple[int, int] | None = None,
         room: bool = True) -> Plan:  # fmt: skip
    """The path of a layer in that format and shape [out, in], and why.

    `room`: whether the model still fits the device if its 4-bit layers take 8 bits. Raises ValueError for a format
    without a rule.
    """
    if speed == "exact":
        return Plan(DECODE, "speed is set to exact")
    if format.full_precision_matrix_mult:
        return Plan(DECODE, "the file asks for full-precision multiplication")
    if format.name == "int8_tensorwise":
        return _int8(format, facts, shape)
    if format.name not in ("nvfp4", "mxfp8", "float8_e4m3fn", "float8_e5m2"):
        raise ValueError(f"format {format.name}: has no rule in kernels/dispatch.py; add one")
    native, missing, fix = _native(format.name, facts, shape)
    if native is not None:
        return native
    return _transcoded(format.name, facts, shape, room, missing, fix)


def _native(name: str, facts: DeviceFacts, shape) -> tuple[Plan | None, str, str]:
    """(the native plan, or None, what is missing, what to do about it)."""
    sm, where = facts.sm, facts.gpu
    if sm is None:
        return None, f"comfy-kitchen and torch multiply no {name} on {facts.device_name}", ""
    if name.startswith("float8"):
        if sm < (8, 9):
            return None, f"fp8 needs SM 8.9, this is {where}", ""
        return Plan(NATIVE, f"torch scaled_mm fp8 on {where}", input_error=ACTIVATIONS["fp8"]), "", ""
    if sm < (10, 0):
        return None, f"{name} needs a Blackwell GPU (SM 10.0), this is {where}", ""
    if name == "mxfp8":
        if facts.torch < (2, 10):
            found = f"{facts.torch[0]}.{facts.torch[1]}"
            return None, f"mxfp8 needs torch 2.10, this is {found}", "update torch"
        return Plan(NATIVE, f"torch scaled_mm mxfp8 on {where}", "mxfp8", input_error=ACTIVATIONS[name]), "", ""
    if facts.cuda is None or facts.cuda < (13, 0):
        found = f"CUDA {facts.cuda[0]}" if facts.cuda else "no CUDA"
        return None, f"nvfp4 needs torch built for CUDA 13, this one is for {found}: native path disabled", CU130
    if "cuda" not in facts.backends:
        return None, "comfy-kitchen's CUDA backend is not available", "reinstall comfy-kitchen"
    if shape is not None and (shape[0] % 8 or shape[1] % 32):
        return None, f"nvfp4 GEMMs take out_features in eights and in_features in 32s, this is {list(shape)}", ""
    return Plan(NATIVE, f"comfy-kitchen nvfp4 on {where}", "nvfp4", input_error=ACTIVATIONS[name]), "", ""


def _transcoded(name: str, facts: DeviceFacts, shape, room: bool, missing: str, fix: str) -> Plan:
    """The best way for a format that the device does not multiply: another format, made once, if one serves."""
    row_fp8 = name == "mxfp8" and facts.sm is not None and (8, 9) <= facts.sm < (10, 0)
    if row_fp8 and (shape is None or not (shape[0] % 16 or shape[1] % 16)):
        return Plan(TRANSCODE, f"{missing}; torch scaled_mm fp8 by rows", "fp8_row", "fp8_row", bound=FP8_BOUND,
                    input_error=ACTIVATIONS["fp8_row"], fix=fix)  # fmt: skip
    group = _group(shape)
    if not group:
        return _decode(
            f"{missing}; in_features {shape[1]} is not a multiple of 16, so ConvRot does not serve", facts, fix
        )
    kernel, served = _int8_kernel(facts, group)
    if not kernel:
        return _decode(f"{missing}; {served}", facts, fix)
    if not room and name == "nvfp4":
        return instead(Plan(TRANSCODE, f"{missing}; 8 bits a weight do not fit into memory", fix=fix), facts)
    safe = facts.cpu.code_max if facts.cpu else 127
    if safe < 127:
        served += f" with codes to {safe}, beyond which sums overflow without VNNI"
    return Plan(TRANSCODE, f"{missing}; {served}", kernel, f"int8_convrot_{group}", safe, INT8_BOUND,
                ACTIVATIONS["int8_convrot"], fix)  # fmt: skip


def _group(shape: tuple[int, int] | None) -> int:
    """The ConvRot group of a transcoded layer: 256 is the most exact, and comfy-kitchen's fused kernel needs it."""
    return 256 if shape is None else next((g for g in (256, 64, 16) if shape[1] % g == 0), 0)


def _int8(format: Format, facts: DeviceFacts, shape) -> Plan:
    group = format.for_shape(*shape).convrot_groupsize if shape and format.convrot else format.convrot_groupsize
    error = ACTIVATIONS["int8_convrot" if format.convrot else "int8_row"]
    if facts.cpu:
        if not facts.cpu.onednn or facts.cpu.code_max < 127:
            why = "int8 sums would overflow without VNNI" if facts.cpu.onednn else "torch has no int8 product here"
            return Plan(NATIVE, f"{why}, so codes are widened to fp32", "cpu_widened")
        return Plan(NATIVE, "oneDNN int8 on cpu", "cpu_int8", input_error=error)
    kernel, served = _int8_kernel(facts, group)
    return Plan(NATIVE, served, kernel or HOST, input_error=error)


def _int8_kernel(facts: DeviceFacts, group: int) -> tuple[str, str]:
    """(kernel, reason) of an int8 product with that ConvRot group; an empty kernel if the device has no fast one."""
    where = facts.gpu or facts.device_name
    if facts.cpu:
        if not facts.cpu.onednn:
            return "", "torch has no oneDNN int8 product here"
        return "cpu_int8", "oneDNN int8 on cpu"
    if facts.sm is None:
        serves = {"cuda": "hip", "xpu": "triton"}.get(facts.type)  # torch calls AMD's GPUs cuda too
        if serves in facts.backends and (facts.type == "xpu" or facts.rdna3):
            return "int8", f"comfy-kitchen int8 ({serves}) on {where}"
        return "", f"comfy-kitchen's int8 is not fast on {where}"
    kitchen = facts.sm >= (7, 5) and facts.cuda is not None and facts.cuda >= (13, 0) and "cuda" in facts.backends
    fused = facts.fuses and facts.sm >= (8, 0) and facts.dtype != SINGLE and group in ROTATED_GROUPS
    if kitchen and (group in (0, 256) or not fused):
        return ("int8_residual" if facts.residual else "int8"), f"comfy-kitchen int8 on {where}"
    if fused:
        return "int8_fused", f"Tessera's Triton int8 on {where}"
    lacking = CU130 if facts.cuda is None or facts.cuda < (13, 0) else "reinstall comfy-kitchen"
    return "", f"no int8 product without comfy-kitchen's CUDA backend or Triton on {where}: {lacking}"


def instead(plan: Plan, facts: DeviceFacts) -> Plan:
    """What a layer gets that must not be transcoded after all: its codes decoded in the product, or for each call."""
    if facts.fuses and facts.sm >= (8, 0) and facts.dtype != SINGLE:
        return Plan(WEIGHT_ONLY, plan.reason, "weight_only", fix=plan.fix)
    return _decode(plan.reason, facts, plan.fix)


def _decode(reason: str, facts: DeviceFacts, fix: str = "") -> Plan:
    return Plan(DECODE, reason, "cpu_decoded" if facts.cpu else "decode", fix=fix)


def summary(plans: Iterable[tuple[str, Plan]]) -> list[str]:
    """One line per distinct (format label, plan), with how many layers it has, the most first."""
    counts = Counter((label, str(plan)) for label, plan in plans)
    return [f"{n} {label}: {text}" for (label, text), n in counts.most_common()]
