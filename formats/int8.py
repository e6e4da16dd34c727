"""INT8: one scale per tensor or per row, optionally of the Hadamard-rotated weight (ConvRot, format.md 2)."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import reference as ref
from .base import Format, Quantized, TensorSpec, chunk_rows

HOST_GROUP = 256  # the group a host assumes when the record names none
GROUPS = (256, 64, 16, 4)  # tried in this order: 256 is the most exact, and comfy-kitchen's fused kernel needs it


@dataclass(frozen=True)
class INT8(Format):
    """`convrot_groupsize` 0 stands for the largest of GROUPS that divides in_features; `for_shape` settles it."""

    name: ClassVar[str] = "int8_tensorwise"
    layout: ClassVar[str] = "TensorWiseINT8Layout"

    per_row: bool = False
    convrot: bool = False
    convrot_groupsize: int = 0

    @property
    def label(self) -> str:
        if self.convrot:
            return f"int8_convrot_{self.convrot_groupsize}" if self.convrot_groupsize else "int8_convrot"
        return "int8_row" if self.per_row else "int8"

    @classmethod
    def from_record(cls, record, entries):
        """Row scales are known from the scale's shape: hosts ignore `per_row`, and many files lack it."""
        nested = record.get("params")
        record = (nested if isinstance(nested, dict) else {}) | record  # `params`: legacy nesting
        scale = entries.get("weight_scale")
        convrot = bool(record.get("convrot", False))
        group = record.get("convrot_groupsize", HOST_GROUP)
        if convrot and not (isinstance(group, int) and ref.is_power_of_4(group)):
            raise ValueError(f"convrot group {group!r} is not a power of 4; re-quantize with 4, 16, 64, 256 or 1024")
        return cls(
            full_precision_matrix_mult=bool(record.get("full_precision_matrix_mult", False)),
            per_row=scale is not None and scale.numel != 1,
            convrot=convrot,
            convrot_groupsize=int(group) if convrot else 0,
        )

    def for_shape(self, out_features, in_features):
        if not self.convrot:
            return self
        group = self.convrot_groupsize or next((g for g in GROUPS if in_features % g == 0), 0)
        if not group:
            raise ValueError(
                f"in_features {in_features} is not a multiple of 4, so ConvRot cannot rotate it; use int8_row"
            )
        if not ref.is_power_of_4(group):
            raise ValueError(f"convrot group {group} is not a power of 4; use 4, 16, 64, 256 or 1024")
        if in_features % group:
            raise ValueError(
                f"in_features {in_features} is not a multiple of the ConvRot group {group}; "
                "use a smaller group, int8_row or bf16"
            )
        return dataclasses.replace(self, convrot_groupsize=group)

    def storage(self, out_features, in_features):
        self.for_shape(out_features, in_features)
        return {
            "weight": TensorSpec(torch.int8, (out_features, in_features)),
            "weight_scale": TensorSpec(torch.float32, (out_features, 1) if self.per_row else ()),
        }

    def encode(self, weight: Tensor) -> Quantized:
        """Scale amax/127 (at least 1e-30), round half to even; rotation in fp32."""
        rotated = self.rotate(weight)
        most, least = (rotated.amax(1, True), rotated.amin(1, True)) if self.per_row else rotated.aminmax()[::-1]
        amax = torch.maximum(most, -least)  # of |rotated|, which would be a copy
        return self.encode_with(rotated, (amax / 127.0).clamp(min=1e-30))

    def encode_with(self, rotated: Tensor, scale: Tensor) -> Quantized:
        """Codes nearest to a weight that is rotated already, for a given scale ([out, 1] or [])."""
        rows = chunk_rows(rotated.shape[1])
        scales = scale.split(rows) if scale.ndim else itertools.repeat(scale)
        codes = [
            torch.round(r / s).clamp_(-128, 127).to(torch.int8)
            for r, s in zip(rotated.split(rows), scales, strict=False)
        ]
        return Quantized(torch.cat(codes), scale)

    def decode_rows(self, quantized: Quantized) -> Tensor:
        return self.rotate(quantized.qdata.float() * quantized.scale)

    def rotate(self, weight: Tensor) -> Tensor:
        """The weight [out, in] in the basis it is stored in, and back: the rotation is its own inverse."""
        return ref.rotate(weight, self.convrot_groupsize) if self.convrot else weight

    def pack(self, quantized):
        return {"weight": quantized.qdata, "weight_scale": quantized.scale.float()}

    def unpack(self, entries, out_features, in_features):
        entries = self.check(entries, out_features, in_features)
        return Quantized(entries["weight"], entries["weight_scale"])
