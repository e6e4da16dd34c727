"""One quantized layer of a checkpoint: where its tensors are, what shape it has, what rides beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .foreign import Foreign
from .formats import Format, TensorSpec
from .header import shown

DAMAGED = "file damaged or marker stale, make it again from the original"
ROTATED_BY_ONE = "rotated, but with one scale for all rows: legal, less exact than row scales"
BRANCH = ("absorb_up", "absorb_down")  # F16 [out, r], [r, in] beside a layer's other entries
ENTRIES = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "weight_scalar")
LEGACY = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
BRANCH_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Layer:
    """One quantized linear (or embedding) of a checkpoint."""

    key: str  # module path as in the file, prefix included
    format: Format
    shape: tuple[int, int]  # [out, in]; padded where the file does not say the logical shape
    record: dict  # its comfy_quant record, unknown keys kept
    sources: dict[str, str]  # entry suffix -> tensor key in the file
    zero: bool = False  # an all-zero weight with scales of odd shape, 0 or NaN: its entries are made anew
    foreign: Foreign | None = None  # what it is in the file, if no ComfyUI loads it so: `format` is what it becomes

    @property
    def absorbs(self) -> bool:
        """Whether a low-rank branch is part of the layer: its codes alone are not the weight."""
        return BRANCH[0] in self.sources

    @property
    def smoothed(self) -> bool:
        """Whether the input is multiplied by a `pre_quant_scale`, which the codes were divided by."""
        return "pre_quant_scale" in self.sources

    @property
    def dropped(self) -> tuple[str, ...]:
        """Entries that go with the layer as it is in the file, and not with what it becomes."""
        return ("weight_scalar",) if self.foreign is None or self.foreign.exact else ("weight_scalar", "input_scale")

    def canonical_record(self) -> dict:
        """The `comfy_quant` record of the layer as every host loads it, keys that hosts do not know kept."""
        stale = ("params", "group_size") if self.foreign else ("params",)
        return {k: v for k, v in (self.record | self.format.record()).items() if k not in stale}

    def error(self, path: Path, problem: object) -> ValueError:
        return ValueError(f"{path.name}: {self.key}: {problem}")


def check_extras(format: Format, record: dict, specs: Mapping[str, TensorSpec], shape: tuple[int, int]) -> None:
    """Raises ValueError if what stands beside a format's own entries does not fit the layer."""
    check_branch(specs, shape)
    padded = format.name in ("nvfp4", "mxfp8") and record.get("orig_shape") != list(shape)
    check_input_scales(specs, shape, shape[1] - 31 if padded else shape[1])
    if "weight_scale_2" in specs and "weight_scale_2" not in format.storage(*shape):
        raise ValueError(f"has a weight_scale_2, {format.label} has none; {DAMAGED}")


def layer_sources(key: str, tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Entry suffix -> tensor key of everything that belongs to a layer. Raises ValueError for two of one kind."""
    names = (*ENTRIES, *BRANCH)
    sources = {name: f"{key}.{name}" for name in names if f"{key}.{name}" in tensors}
    for old, name in LEGACY.items():
        if f"{key}.{old}" in tensors:
            if name in sources:
                raise ValueError(f"has {old} and {name}, which are the same; {DAMAGED}")
            sources[name] = f"{key}.{old}"
    return sources


def check_record(record: dict) -> None:
    """Raises ValueError for a switch that is neither on nor off."""
    for name in ("full_precision_matrix_mult", "convrot", "per_row"):
        if name in record and record[name] not in (True, False, None):  # 0 and 1 are these, too
            raise ValueError(f"{name} is {shown(repr(record[name])[:80])}, neither true nor false; {DAMAGED}")


def logical_shape(format: Format, record: dict, specs: Mapping[str, TensorSpec]) -> tuple[int, int]:
    """[out, in] of a stored weight: `orig_shape` if the record has a plausible one, else from the storage."""
    if "weight" not in specs or len(specs["weight"].shape) != 2:
        found = f"is {list(specs['weight'].shape)}" if "weight" in specs else "is missing"
        raise ValueError(f"weight {found}, {format.label} needs two dimensions; {DAMAGED}")
    if 0 in specs["weight"].shape:
        raise ValueError(f"weight is {list(specs['weight'].shape)}, a layer of no weights; {DAMAGED}")
    rows, columns = specs["weight"].shape
    stored = (rows, columns * format.codes_per_byte)
    shape = record.get("orig_shape")
    if isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape):
        said = (shape[0], shape[1])
        if format.storage(*said)["weight"].shape == (rows, columns):
            return said
    return stored


def check_input_scales(specs: Mapping[str, TensorSpec], shape: tuple[int, int], least: int) -> None:
    """Raises ValueError for scales of the input that do not fit a layer [out, in], or are no numbers.

    `least`: columns without what may be padding, where the file does not say the logical shape.
    """
    fit = {
        "input_scale": lambda spec: spec.numel == 1,
        "pre_quant_scale": lambda spec: len(spec.shape) == 1 and least <= spec.numel <= shape[1],
    }
    for name, fits in fit.items():
        spec = specs.get(name)
        if spec is not None and not (fits(spec) and spec.dtype.is_floating_point and spec.dtype.itemsize > 1):
            needed = "one number" if name == "input_scale" else f"[{shape[1]}]"
            raise ValueError(f"{name} is {spec}, a layer of {list(shape)} needs {needed} in float32; {DAMAGED}")


def check_branch(specs: Mapping[str, TensorSpec], shape: tuple[int, int]) -> None:
    """Raises ValueError if a layer has half a branch, or one that does not fit its [out, in]."""
    found = {part: specs[part] for part in BRANCH if part in specs}
    if not found:
        return
    missing = [part for part in BRANCH if part not in found]
    if missing:
        raise ValueError(f"{missing[0]} is missing, half a branch is none; {DAMAGED}")
    up, down = found.values()
    rank = up.shape[-1] if up.shape else 0
    if rank == 0 or up.shape != (shape[0], rank) or down.shape != (rank, shape[1]):
        raise ValueError(f"absorb_up is {up} and absorb_down is {down}, a layer of {list(shape)} needs "
                         f"[{shape[0]}, r] and [r, {shape[1]}]; {DAMAGED}")  # fmt: skip
    if up.dtype not in BRANCH_DTYPES or down.dtype not in BRANCH_DTYPES:
        raise ValueError(f"absorb_up is {up} and absorb_down is {down}, they must be float16, bfloat16 or float32; "
                         f"{DAMAGED}")  # fmt: skip
