"""Layers as no ComfyUI loads them, brought into a format that it does: exactly where it can be, else by encoding anew.

Three kinds are known: weights with one scale per row or square block (convert_to_quant), MXFP8 with a spare scale for
the whole tensor (its "hybrid", which `markers.infer` renames), and block formats whose scales lie row by row instead of
in cuBLAS' 128 x 4 tiles (NVIDIA's ModelOpt and files made for vLLM).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .formats import INT8, MXFP8, NVFP4, Entries, Format, Quantized, TensorSpec, require_finite
from .kernels import reference as ref

if TYPE_CHECKING:
    from .layer import Layer

SCALED = {
    "int8_blockwise": torch.int8,
    "float8_e4m3fn_rowwise": torch.float8_e4m3fn,
    "float8_e4m3fn_blockwise": torch.float8_e4m3fn,
}
"""convert_to_quant's formats with fp32 scales per row or block: the dtype of their codes."""

TILED = {"nvfp4": (NVFP4, 16), "mxfp8": (MXFP8, 32)}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SAMPLE = 512  # rows of block scales that are looked at: whole tiles, which both orders keep in the same bytes
WIDEST = 8192  # block scales of one row: in_features of 131,072
ENOUGH = 2048  # scales, to tell one order from the other
CLEARER = 0.03  # by how much the right order must leave less unexplained, and by how many standard deviations
DEVIATIONS = 8.0


@dataclass(frozen=True)
class Foreign:
    """What a layer is in the file, and how it becomes what its `Layer.format` says."""

    name: str
    exact: bool  # whether every number stays the same
    said: dict = field(default_factory=dict)  # its record in the file; empty if it has none

    def decode(self, stored: Entries) -> Tensor:
        """fp32 weight [out, in] of codes [out, in] with scales [out], [out, 1] or [out/b, in/b]."""
        codes, scale = stored["weight"], stored["weight_scale"].float()
        scale = scale.reshape(-1, 1) if scale.ndim < 2 else scale
        grid = (scale.shape[0], codes.shape[0] // scale.shape[0], scale.shape[1], codes.shape[1] // scale.shape[1])
        return (codes.float().reshape(grid) * scale[:, None, :, None]).reshape(codes.shape)

    def entries(self, format: Format, stored: Entries) -> Entries:
        """The layer as the format stores it. Raises ValueError if its scales hold no numbers."""
        if not self.exact:
            weight = self.decode(stored)
            require_finite(weight)
            return format.pack(format.encode(weight))
        scale = stored["weight_scale"]
        if isinstance(format, MXFP8):
            return format.pack(Quantized(_bytes(stored["weight"], torch.float8_e4m3fn),
                                         block_scale=_bytes(scale, torch.uint8)))  # fmt: skip
        packed = _bytes(stored["weight"], torch.uint8)
        codes = torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)  # low nibble first, as its scales go
        return format.pack(Quantized(codes, stored["weight_scale_2"].float().reshape(()),
                                     _bytes(scale, torch.float8_e4m3fn)))  # fmt: skip


def _bytes(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def recognise(record: dict, specs: Mapping[str, TensorSpec], marked: bool) -> tuple[Foreign, Format] | None:
    """What a layer is if it must be changed before ComfyUI loads it. Raises ValueError if it cannot be."""
    name, weight, scale = record.get("format"), specs.get("weight"), specs.get("weight_scale")
    if not isinstance(name, str) or weight is None or scale is None:
        return None
    if name in SCALED:
        full = bool(record.get("full_precision_matrix_mult", False))
        _check_scaled(name, record, weight, scale)
        nested = record.get("params")
        if record.get("convrot") or (isinstance(nested, dict) and nested.get("convrot")):
            raise ValueError(f"{name} with convrot, which no tool writes; re-quantize from the original")
        return Foreign(name, False, record), INT8(full_precision_matrix_mult=full, per_row=True)
    if name in TILED and _in_rows(name, weight, scale):
        tensor_scale = specs.get("weight_scale_2")
        if name == "nvfp4" and (tensor_scale is None or tensor_scale.numel != 1 or tensor_scale.dtype not in FLOATS):
            raise ValueError(f"weight_scale_2 is {tensor_scale or 'missing'}, nvfp4 needs one number in float32; "
                             "re-quantize from the original")  # fmt: skip
        return untiled(name, record, marked), TILED[name][0]()
    return None


def untiled(name: str, record: dict, marked: bool) -> Foreign:
    """A block format with its scales row by row. Raises ValueError for one that cannot be known for sure."""
    if name == "nvfp4" and marked:  # whoever writes rows packs low nibbles first, whoever writes markers high ones
        raise ValueError("weight_scale lies row by row, nvfp4 needs 128 x 4 tiles; which 4 bits of a byte come first "
                         "is then unknown, make it again with another tool")  # fmt: skip
    return Foreign(f"{name} with scales row by row", True, record if marked else {})


def either(name: str, shape: tuple[int, int]) -> bool:
    """Whether the scales of a layer [out, in] have one shape in either order.

    Only where they are whole tiles: whoever pads scales to tiles also writes them in tiles.
    """
    return shape[0] % 128 == 0 and shape[1] % (4 * TILED[name][1]) == 0


def enough(scale: TensorSpec) -> bool:
    """Whether block scales [rows, columns] can tell their order, and are not too many to look at in an instant."""
    return len(scale.shape) == 2 and 8 <= scale.shape[1] <= WIDEST and scale.numel >= ENOUGH


def by_row(stored: list[Tensor], name: str) -> bool:
    """Whether block scales [rows, columns] as stored, rows a multiple of 128, lie row by row.

    Rows and columns of a weight differ in size, so the right order explains more of its scales by one number per row
    and one per column. Where nothing tells, they lie in tiles; so they do where padding shows only in that order.
    """
    tiled, rows, count = 0.0, 0.0, sum(scale.numel() for scale in stored)
    for scale in stored:
        raw = scale.view(torch.uint8) if scale.dtype.itemsize == 1 else scale
        if _padding(ref.unswizzle(raw, *raw.shape)) > _padding(raw):
            return False
        values = raw.float() if name == "mxfp8" else raw.view(torch.float8_e4m3fn).float().clamp(min=2**-9).log2()
        values = torch.nan_to_num(values)
        rows += _unexplained(values)
        tiled += _unexplained(ref.unswizzle(values, *values.shape))
    return rows < tiled * (1 - max(CLEARER, DEVIATIONS * math.sqrt(2 / count)))


def _padding(scales: Tensor) -> int:
    """How many scales lie in rows at the bottom, or columns at the right, that are zero throughout."""
    rows, columns = scales.shape
    used = scales.float() != 0
    last = [(used.any(axis).nonzero().max().item() + 1) if used.any() else 0 for axis in (1, 0)]
    return rows * columns - last[0] * last[1]


def _unexplained(values: Tensor) -> float:
    """Sum of squares beside the means of rows and columns."""
    values = values - values.mean()
    return (values - values.mean(1, keepdim=True) - values.mean(0, keepdim=True)).square().sum().item()


def lines(layers: Mapping[str, Layer]) -> list[str]:
    """What a report says of the foreign layers: one line for each kind."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers.values():
        if layer.foreign is not None:
            kinds.setdefault(layer.foreign.name, []).append(layer)
    texts = []
    for name, found in kinds.items():
        first = found[0]
        how = "laid out anew, exactly" if first.foreign.exact else f"decoded and encoded as {first.format.label}"
        texts.append(f"{len(found)} layers of {name}, which no ComfyUI loads (first: {first.key}): {how}")
    return texts


def _check_scaled(name: str, record: dict, weight: TensorSpec, scale: TensorSpec) -> None:
    if len(weight.shape) != 2 or weight.dtype != SCALED[name] or 0 in weight.shape:
        wanted = str(SCALED[name]).removeprefix("torch.")
        raise ValueError(f"weight is {weight}, {name} needs two dimensions of {wanted}; re-quantize from the original")
    if scale.dtype not in FLOATS or not scaled_shape(name, weight.shape, scale.shape, record.get("group_size")):
        raise ValueError(f"weight_scale is {scale}, {name} needs float32, one for each "
                         f"{'row' if name.endswith('rowwise') else 'square block'} of {list(weight.shape)}; "
                         "re-quantize from the original")  # fmt: skip


def scaled_shape(name: str, weight: tuple[int, ...], scale: tuple[int, ...], group: object = None) -> bool:
    """Whether scales of that shape are those of the format."""
    rows, columns = weight
    if name.endswith("rowwise"):
        return scale in ((rows,), (rows, 1))
    if len(scale) != 2 or 0 in scale or rows % scale[0] or columns % scale[1]:
        return False
    block = rows // scale[0]
    return block == columns // scale[1] and (type(group) is not int or group == block)


def _in_rows(name: str, weight: TensorSpec, scale: TensorSpec) -> bool:
    """Whether the scales have the shape of their blocks, which is not the one of their tiles."""
    cls, block = TILED[name]
    if len(weight.shape) != 2 or len(scale.shape) != 2 or 0 in weight.shape or scale.dtype.itemsize != 1:
        return False
    rows, columns = weight.shape[0], weight.shape[1] * cls.codes_per_byte
    storage = cls().storage(rows, columns)
    fits = weight.dtype.itemsize == 1 and scale.shape == (rows, math.ceil(columns / block)) and columns % block == 0
    return fits and scale.shape != storage["weight_scale"].shape
