"""Format: how one linear weight is stored. The one abstraction of the pack."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

FORMATS: dict[str, type[Format]] = {}
"""Every format by its `comfy_quant` name; a subclass enters when it is defined."""

BYTE_VIEWS = {(torch.int8, torch.uint8), (torch.float8_e8m0fnu, torch.uint8)}
"""(found, needed) dtypes that hold the same bytes under another name, besides uint8 for any byte."""

CHUNK = 1 << 20  # weights handled at once

Entries = dict[str, Tensor]
"""Tensors of one layer as a checkpoint stores them, by suffix: weight, weight_scale, weight_scale_2, ..."""


@dataclass(frozen=True)
class Quantized:
    """A weight [out, in] as codes and scales: logical order, no padding, no packing."""

    qdata: Tensor  # one code per weight [out, in]
    scale: Tensor | None = None  # per tensor [] or per row [out, 1]
    block_scale: Tensor | None = None  # per block [out, in/block]

    def split(self) -> Iterator[Quantized]:
        """The same weight in pieces of some rows, so that temporaries stay small whatever the layer's size."""
        for first in range(0, self.qdata.shape[0], step := chunk_rows(self.qdata.shape[1])):
            rows = slice(first, first + step)
            scale = self.scale if self.scale is None or self.scale.ndim == 0 else self.scale[rows]
            yield Quantized(self.qdata[rows], scale, None if self.block_scale is None else self.block_scale[rows])


def chunk_rows(in_features: int) -> int:
    """Rows of a weight to work on at once."""
    return max(1, CHUNK // in_features)


def join(pieces: Iterable[Quantized]) -> Quantized:
    """Row pieces of one weight put together; the inverse of `split`."""
    pieces = list(pieces)
    block_scale = None if pieces[0].block_scale is None else torch.cat([p.block_scale for p in pieces])
    scale = pieces[0].scale
    if scale is not None and scale.ndim:
        scale = torch.cat([p.scale for p in pieces])
    return Quantized(torch.cat([p.qdata for p in pieces]), scale, block_scale)


@dataclass(frozen=True)
class Format:
    """How one linear weight is stored. The fields of a subclass are its `comfy_quant` record.

    encode/decode turn numbers [out, in] into codes and back; pack/unpack turn codes into checkpoint entries and back.
    """

    name: ClassVar[str] = ""
    layout: ClassVar[str] = ""  # comfy-kitchen's layout class
    codes_per_byte: ClassVar[int] = 1  # along in_features, in the stored weight

    full_precision_matrix_mult: bool = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.name:
            FORMATS[cls.name] = cls

    @property
    def label(self) -> str:
        """Short name as recipes and reports write it; `formats.parse` reads it back."""
        return self.name

    def record(self) -> dict:
        """The layer's `comfy_quant` JSON object; fields at their default are left out."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return {"format": self.name} | {k: v for k, v in fields.items() if v != defaults[k]}

    @classmethod
    def from_record(cls, record: dict, entries: dict[str, TensorSpec]) -> Format:
        """The format a `comfy_quant` record describes; `entries` decides what the record leaves open."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in record.items() if k in names})

    def for_shape(self, out_features: int, in_features: int) -> Format:
        """This format settled for a weight of that shape. Raises ValueError if it cannot store one."""
        return self

    def storage(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """dtype and shape of every checkpoint entry of a weight of that shape, before any number is computed."""
        raise NotImplementedError

    def encode(self, weight: Tensor) -> Quantized:
        """Round-to-nearest codes of a finite fp32 weight [out, in] with this format's standard scales."""
        raise NotImplementedError

    def decode(self, quantized: Quantized) -> Tensor:
        """fp32 weight [out, in] that the codes stand for."""
        weight = torch.empty(quantized.qdata.shape, device=quantized.qdata.device)
        first = 0
        for piece in quantized.split():
            last = first + piece.qdata.shape[0]
            weight[first:last] = self.decode_rows(piece)
            first = last
        return weight

    def decode_rows(self, quantized: Quantized) -> Tensor:
        """`decode` of a few rows; what a subclass implements."""
        raise NotImplementedError

    def pack(self, quantized: Quantized) -> Entries:
        """Codes and scales as checkpoint entries, exactly of `storage`'s dtypes and shapes."""
        raise NotImplementedError

    def unpack(self, entries: Entries, out_features: int, in_features: int) -> Quantized:
        """The inverse of pack. Raises ValueError naming the first entry that does not fit the shape."""
        raise NotImplementedError

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Bytes of all entries of one weight in the file, markers not counted."""
        return sum(spec.nbytes for spec in self.storage(out_features, in_features).values())

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        return 8 * self.nbytes(out_features, in_features) / (out_features * in_features)

    def check(self, entries: Entries, out_features: int, in_features: int) -> Entries:
        """The entries with their stored dtypes viewed as this format's; ValueError if one is missing or misshaped."""
        checked = {}
        for suffix, spec in self.storage(out_features, in_features).items():
            if suffix not in entries:
                raise ValueError(f"{suffix} is missing, {self.label} needs it as {spec}")
            found = entries[suffix]
            if found.numel() == spec.numel and (found.ndim <= 1 or found.numel() == 1):
                found = found.reshape(spec.shape)  # scalars as [1] or [1, 1], row scales as [out]
            if tuple(found.shape) != spec.shape:
                raise ValueError(f"{suffix} is {tuple(found.shape)}, {self.label} needs {spec.shape}")
            checked[suffix] = self._as(suffix, found, spec.dtype)
        return checked

    def _as(self, suffix: str, found: Tensor, dtype: torch.dtype) -> Tensor:
        """An entry in its own dtype: bytes are viewed, never cast by value; scales of another precision are cast."""
        if found.dtype == dtype:
            return found
        if (found.dtype, dtype) in BYTE_VIEWS or (found.dtype == torch.uint8 and dtype.itemsize == 1):
            return found.view(dtype)
        if dtype == torch.float32 and found.dtype in (torch.float16, torch.bfloat16, torch.float64):
            return found.to(dtype)
        raise ValueError(f"{suffix} is {_short(found.dtype)}, {self.label} needs {_short(dtype)}")


@dataclass(frozen=True)
class TensorSpec:
    """dtype and shape of one stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{_short(self.dtype)} {list(self.shape)}"


@dataclass(frozen=True)
class Plain(Format):
    """An unquantized weight: no scales, no `comfy_quant` record."""

    dtype: ClassVar[torch.dtype]

    def storage(self, out_features, in_features):
        return {"weight": TensorSpec(self.dtype, (out_features, in_features))}

    def encode(self, weight):
        return Quantized(weight.to(self.dtype))

    def decode_rows(self, quantized):
        return quantized.qdata.float()

    def pack(self, quantized):
        return {"weight": quantized.qdata}

    def unpack(self, entries, out_features, in_features):
        return Quantized(self.check(entries, out_features, in_features)["weight"])


def marker(record: dict) -> Tensor:
    """A `comfy_quant` record as its tensor: UTF-8 JSON bytes."""
    return torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)


def require_finite(weight: Tensor) -> None:
    """Raises ValueError saying where the first NaN or infinity is; no format can store one."""
    finite = torch.isfinite(weight)
    if not finite.all():
        bad = (~finite).nonzero()
        row, column = bad[0].tolist()
        raise ValueError(
            f"{len(bad)} values are not finite, the first at [{row}, {column}] is {weight[row, column].item()}; "
            "no format stores that, repair the source or take an intact one"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
