"""NVFP4: E2M1 codes, an E4M3 scale per 16 columns, one fp32 scale per tensor (format.md 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import reference as ref
from .base import Format, Quantized, TensorSpec, chunk_rows, join

BLOCK = 16


@dataclass(frozen=True)
class NVFP4(Format):
    name: ClassVar[str] = "nvfp4"
    layout: ClassVar[str] = "TensorCoreNVFP4Layout"
    codes_per_byte: ClassVar[int] = 2

    def storage(self, out_features, in_features):
        rows, columns = ref.round_up(out_features, BLOCK), ref.round_up(in_features, BLOCK)
        scales = (ref.round_up(rows, 128), ref.round_up(columns // BLOCK, 4))
        return {
            "weight": TensorSpec(torch.uint8, (rows, columns // 2)),
            "weight_scale": TensorSpec(torch.float8_e4m3fn, scales),
            "weight_scale_2": TensorSpec(torch.float32, ()),
        }

    def encode(self, weight: Tensor) -> Quantized:
        """Round to nearest with amax scales, bit-identical to comfy-kitchen's quantizer (0.2.26 to 0.2.40) except that
        an all-zero weight gets scale 1, not 0; so does one so small that its scale is 0 in fp32."""
        scale = weight.abs().amax() / (ref.E4M3_MAX * ref.E2M1_MAX)
        scale = scale if scale > 0 else torch.ones_like(scale)
        return self.encode_scaled(weight, scale)

    def encode_scaled(self, weight: Tensor, scale: Tensor) -> Quantized:
        """Round to nearest with amax block scales under a given tensor scale []."""
        amaxes = torch.cat([blocks(chunk).abs().amax(-1) for chunk in weight.split(chunk_rows(weight.shape[1]))])
        block_scale = (amaxes / ref.E2M1_MAX / scale).clamp(max=ref.E4M3_MAX).to(torch.float8_e4m3fn)
        return self.encode_with(weight, scale, block_scale)

    def encode_with(self, weight: Tensor, scale: Tensor, block_scale: Tensor) -> Quantized:
        """Codes nearest to `weight` for given scales; a block whose scale is 0 gets codes 0."""
        rows = chunk_rows(weight.shape[1])
        pieces = zip(weight.split(rows), block_scale.split(rows), strict=True)
        return join(self._encode_rows(chunk, scale, chunk_scale) for chunk, chunk_scale in pieces)

    def _encode_rows(self, weight: Tensor, scale: Tensor, block_scale: Tensor) -> Quantized:
        step = scale * block_scale.float()
        scaled = blocks(weight) / torch.where(step == 0, 1.0, step).unsqueeze(-1)
        scaled = torch.where((step == 0).unsqueeze(-1), 0.0, scaled)
        codes = ref.e2m1_encode(scaled.flatten(-2)[:, : weight.shape[1]])
        return Quantized(codes, scale, block_scale)

    def decode_rows(self, quantized: Quantized) -> Tensor:
        step = quantized.scale * quantized.block_scale.float()
        values = blocks(ref.e2m1_decode(quantized.qdata)) * step.unsqueeze(-1)
        return values.flatten(-2)[:, : quantized.qdata.shape[1]]

    def pack(self, quantized):
        out_features, in_features = quantized.qdata.shape
        rows, columns = ref.round_up(out_features, BLOCK), ref.round_up(in_features, BLOCK)
        block_scale = ref.swizzle(quantized.block_scale.view(torch.uint8)).view(torch.float8_e4m3fn)
        return {
            "weight": ref.pack_nibbles(ref.pad_to(quantized.qdata, rows, columns)),
            "weight_scale": block_scale,
            "weight_scale_2": quantized.scale.float().reshape(()),
        }

    def unpack(self, entries, out_features, in_features):
        entries = self.check(entries, out_features, in_features)
        codes = ref.unpack_nibbles(entries["weight"])[:out_features, :in_features]
        stored = entries["weight_scale"].view(torch.uint8)
        block_scale = ref.unswizzle(stored, out_features, ref.round_up(in_features, BLOCK) // BLOCK)
        return Quantized(codes, entries["weight_scale_2"], block_scale.view(torch.float8_e4m3fn))


def blocks(weight: Tensor) -> Tensor:
    """[out, in] -> [out, in/16, 16], columns zero-padded to a multiple of 16."""
    rows, columns = weight.shape
    return ref.pad_to(weight, rows, ref.round_up(columns, BLOCK)).unflatten(-1, (-1, BLOCK))
