"""Layouts of comfy-kitchen's kind for what layers are transcoded to: the host moves, offloads and decodes them.

Only our `Linear` multiplies them. INT8 has one of its own because the host multiplies its usual one past the layer
(`linear_input_act`), and past the branches that belong to it.
"""

from __future__ import annotations

import torch
from comfy.quant_ops import QuantizedTensor, get_layout_class, register_layout_class

FP8_ROW, INT8 = "TesseraFP8RowLayout", "TesseraINT8Layout"


class TesseraINT8Layout(get_layout_class("TensorWiseINT8Layout")):
    """int8 codes [out, in], fp32 scale [out, 1], rotated in groups."""


class TesseraFP8RowLayout(get_layout_class("TensorCoreFP8E4M3Layout")):
    """E4M3 codes [out, in], fp32 scale [out, 1]."""

    @classmethod
    def quantize(cls, tensor: torch.Tensor, scale=None, **kwargs):
        """Amax scale per row; whatever scale is asked for, since merged weights have another."""
        row = (tensor.float().abs().amax(1, keepdim=True) / 448.0).clamp(min=1e-30)
        codes = (tensor.float() / row).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        return codes, cls.Params(scale=row, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape))

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params) -> torch.Tensor:
        return (qdata.float() * params.scale).to(params.orig_dtype)


def adopt(layer, target: str) -> None:
    """Gives a layer that the host has loaded as INT8 or FP8 the layout of ours."""
    name, layout = (FP8_ROW, TesseraFP8RowLayout) if target == "fp8_row" else (INT8, TesseraINT8Layout)
    register_layout_class(name, layout)
    weight = QuantizedTensor(layer.weight._qdata, name, layer.weight._params)
    layer.layout_type, layer.weight = name, torch.nn.Parameter(weight, requires_grad=False)
