"""FP8: E4M3 or E5M2 codes with one fp32 scale per tensor (format.md 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import reference as ref
from .base import Format, Quantized, TensorSpec


@dataclass(frozen=True)
class FP8(Format):
    dtype: ClassVar[torch.dtype]
    max: ClassVar[float]

    def storage(self, out_features, in_features):
        weight = TensorSpec(self.dtype, (out_features, in_features))
        return {"weight": weight, "weight_scale": TensorSpec(torch.float32, ())}

    def encode(self, weight: Tensor) -> Quantized:
        scale = weight.abs().amax() / self.max
        scale = scale if scale > 0 else torch.ones_like(scale)  # also where dividing the smallest numbers gives 0
        return Quantized((weight / scale).clamp(-self.max, self.max).to(self.dtype), scale)

    def decode_rows(self, quantized: Quantized) -> Tensor:
        return quantized.qdata.float() * quantized.scale

    def pack(self, quantized):
        return {"weight": quantized.qdata, "weight_scale": quantized.scale.float().reshape(())}

    def unpack(self, entries, out_features, in_features):
        entries = self.check(entries, out_features, in_features)
        return Quantized(entries["weight"], entries["weight_scale"])


@dataclass(frozen=True)
class FP8E4M3(FP8):
    name: ClassVar[str] = "float8_e4m3fn"
    layout: ClassVar[str] = "TensorCoreFP8E4M3Layout"
    dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn
    max: ClassVar[float] = ref.E4M3_MAX


@dataclass(frozen=True)
class FP8E5M2(FP8):
    name: ClassVar[str] = "float8_e5m2"
    layout: ClassVar[str] = "TensorCoreFP8E5M2Layout"
    dtype: ClassVar[torch.dtype] = torch.float8_e5m2
    max: ClassVar[float] = ref.E5M2_MAX


@dataclass(frozen=True)
class FP8Row(FP8):
    """E4M3 codes with one fp32 scale per row: what MXFP8 is multiplied as on GPUs without block scales. No file format.

    The scale is the power of two of the row's largest block, so that MXFP8 codes keep their bits (kernels.md 3).
    """

    layout: ClassVar[str] = "TesseraFP8RowLayout"
    dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn
    max: ClassVar[float] = ref.E4M3_MAX

    @property
    def label(self) -> str:
        return "fp8_row"

    def storage(self, out_features, in_features):
        weight = TensorSpec(self.dtype, (out_features, in_features))
        return {"weight": weight, "weight_scale": TensorSpec(torch.float32, (out_features, 1))}

    def encode(self, weight: Tensor) -> Quantized:
        scale = ref.power_of_2_scale(weight.abs().amax(1, keepdim=True), self.max)
        return Quantized((weight / scale).clamp(-self.max, self.max).to(self.dtype), scale)

    def pack(self, quantized):
        return {"weight": quantized.qdata, "weight_scale": quantized.scale.float()}
