"""FP8 codes with a scale per row, as a layout of comfy-kitchen's: what MXFP8 layers become on SM 8.9 and 9.0."""

from __future__ import annotations

import torch
from comfy.quant_ops import QuantizedTensor, get_layout_class, register_layout_class

LAYOUT = "TesseraFP8RowLayout"
_BASE = get_layout_class("TensorCoreFP8E4M3Layout")


class TesseraFP8RowLayout(_BASE):
    """E4M3 codes [out, in], fp32 scale [out, 1]: the host moves, offloads and decodes it, our `Linear` multiplies."""

    @classmethod
    def quantize(cls, tensor: torch.Tensor, scale=None, **kwargs):
        """Amax scale per row; whatever scale is asked for, since merged weights have another."""
        row = (tensor.float().abs().amax(1, keepdim=True) / 448.0).clamp(min=1e-30)
        codes = (tensor.float() / row).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        return codes, cls.Params(scale=row, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape))

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params) -> torch.Tensor:
        return (qdata.float() * params.scale).to(params.orig_dtype)


def adopt(layer) -> None:
    """Makes a layer that the host has loaded as FP8 one with row scales."""
    register_layout_class(LAYOUT, TesseraFP8RowLayout)
    weight = layer.weight
    params = TesseraFP8RowLayout.Params(
        scale=weight._params.scale.float(), orig_dtype=weight._params.orig_dtype, orig_shape=weight._params.orig_shape
    )
    layer.layout_type = LAYOUT
    layer.weight = torch.nn.Parameter(QuantizedTensor(weight._qdata, LAYOUT, params), requires_grad=False)
