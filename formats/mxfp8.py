"""MXFP8: E4M3 codes and a power-of-two E8M0 scale per 32 columns (format.md 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import reference as ref
from .base import Format, Quantized, TensorSpec, chunk_rows, join

BLOCK = 32


@dataclass(frozen=True)
class MXFP8(Format):
    name: ClassVar[str] = "mxfp8"
    layout: ClassVar[str] = "TensorCoreMXFP8Layout"

    def storage(self, out_features, in_features):
        rows, columns = ref.round_up(out_features, BLOCK), ref.round_up(in_features, BLOCK)
        scales = (ref.round_up(rows, 128), ref.round_up(columns // BLOCK, 4))
        return {
            "weight": TensorSpec(torch.float8_e4m3fn, (rows, columns)),
            # uint8 rather than float8_e8m0fnu: what convert_to_quant writes, and older safetensors can read
            "weight_scale": TensorSpec(torch.uint8, scales),
        }

    def encode(self, weight: Tensor) -> Quantized:
        """Exponent ceil(log2(amax / 448)), so that nothing saturates, then round to nearest."""
        pieces = weight.split(chunk_rows(weight.shape[1]))
        return join(self._encode_rows(piece, block_scales(_blocks(piece).abs().amax(-1))) for piece in pieces)

    def encode_with(self, weight: Tensor, block_scale: Tensor) -> Quantized:
        """Codes nearest to `weight` for given exponents (uint8 [out, in/32])."""
        rows = chunk_rows(weight.shape[1])
        pieces = zip(weight.split(rows), block_scale.split(rows), strict=True)
        return join(self._encode_rows(piece, exponents) for piece, exponents in pieces)

    def _encode_rows(self, weight: Tensor, block_scale: Tensor) -> Quantized:
        blocked = _blocks(weight)
        step = ref.e8m0_decode(block_scale)
        scaled = blocked / torch.where(step == 0, 1.0, step).unsqueeze(-1)
        scaled = torch.where((step == 0).unsqueeze(-1), 0.0, scaled).clamp(-ref.E4M3_MAX, ref.E4M3_MAX)
        return Quantized(scaled.flatten(-2)[:, : weight.shape[1]].to(torch.float8_e4m3fn), block_scale=block_scale)

    def decode_rows(self, quantized: Quantized) -> Tensor:
        values = _blocks(quantized.qdata.float()) * ref.e8m0_decode(quantized.block_scale).unsqueeze(-1)
        return values.flatten(-2)[:, : quantized.qdata.shape[1]]

    def pack(self, quantized):
        out_features, in_features = quantized.qdata.shape
        codes = quantized.qdata.view(torch.uint8)
        padded = ref.pad_to(codes, ref.round_up(out_features, BLOCK), ref.round_up(in_features, BLOCK))
        return {"weight": padded.view(torch.float8_e4m3fn), "weight_scale": ref.swizzle(quantized.block_scale)}

    def unpack(self, entries, out_features, in_features):
        entries = self.check(entries, out_features, in_features)
        codes = entries["weight"][:out_features, :in_features].contiguous()
        columns = ref.round_up(in_features, BLOCK) // BLOCK
        return Quantized(codes, block_scale=ref.unswizzle(entries["weight_scale"], out_features, columns))


def block_scales(amax: Tensor) -> Tensor:
    """E8M0 exponents (uint8) of blocks whose largest magnitudes are `amax`: the smallest that saturate nothing."""
    exponent = torch.ceil(torch.log2((amax / ref.E4M3_MAX).clamp(min=2.0**-127))).int() + ref.E8M0_BIAS
    return torch.where(amax == 0, 0, exponent.clamp(0, 254)).to(torch.uint8)


def _blocks(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    return ref.pad_to(weight, rows, ref.round_up(columns, BLOCK)).unflatten(-1, (-1, BLOCK))
