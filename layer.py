"""One quantized layer of a checkpoint: where its tensors are, what shape it has, what rides beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .formats import Format, TensorSpec

DAMAGED = "file damaged or marker stale, make it again from the original"
BRANCH = ("absorb_up", "absorb_down")  # F16 [out, r], [r, in] beside a layer's other entries
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

    @property
    def absorbs(self) -> bool:
        """Whether a low-rank branch is part of the layer: its codes alone are not the weight."""
        return BRANCH[0] in self.sources

    @property
    def smoothed(self) -> bool:
        """Whether the input is multiplied by a `pre_quant_scale`, which the codes were divided by."""
        return "pre_quant_scale" in self.sources

    def error(self, path: Path, problem: object) -> ValueError:
        return ValueError(f"{path.name}: {self.key}: {problem}")


def logical_shape(format: Format, record: dict, specs: Mapping[str, TensorSpec]) -> tuple[int, int]:
    """[out, in] of a stored weight: `orig_shape` if the record has a plausible one, else from the storage."""
    if "weight" not in specs or len(specs["weight"].shape) != 2:
        found = f"is {list(specs['weight'].shape)}" if "weight" in specs else "is missing"
        raise ValueError(f"weight {found}, {format.label} needs two dimensions; {DAMAGED}")
    rows, columns = specs["weight"].shape
    stored = (rows, columns * format.codes_per_byte)
    shape = record.get("orig_shape")
    if isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape):
        said = (shape[0], shape[1])
        if format.storage(*said)["weight"].shape == (rows, columns):
            return said
    return stored


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
