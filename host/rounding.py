"""A merged weight back in its layer's packed form, on the grid of the weight that it replaces."""

from __future__ import annotations

import dataclasses

import comfy.quant_ops
from torch import Tensor

from ..formats import INT8
from ..kernels import kextension
from ..quantization import stochastic
from .carrying import KINDS


def rounded(layer, weight: Tensor, seed: int | None) -> comfy.quant_ops.QuantizedTensor | None:
    """The weight [out, in] in the basis that the layer stores, rounded without bias; None for what only the host packs.

    Reserved columns of the layer are left out: the result has none.
    """
    stored, format = layer.weight, layer.tessera_format
    if format is None or not isinstance(stored, comfy.quant_ops.QuantizedTensor) or stored._layout_cls not in KINDS:
        return None
    params, shape = stored._params, tuple(weight.shape)
    if getattr(params, "transposed", False):  # int8 that the host has turned for one-row inputs
        return None
    blocks = getattr(params, "block_scale", None) is not None
    fields = {"weight_scale": "block_scale", "weight_scale_2": "scale"} if blocks else {"weight_scale": "scale"}
    entries = {suffix: getattr(params, field).to(weight.device) for suffix, field in fields.items()}
    entries["weight"] = stored._qdata.to(weight.device)
    columns = layer.reserved(stored)
    if columns:
        kind = KINDS[stored._layout_cls]
        pair = kextension.strip(kind, entries["weight"], entries["weight_scale"], columns)
        entries["weight"], entries["weight_scale"] = pair
    if isinstance(format, INT8):
        format = dataclasses.replace(
            format, per_row=params.scale.numel() > 1
        )  # a layer does not know it from its record
    made = stochastic.requantize(format, format.unpack(entries, *shape), weight, seed or 0)
    packed = format.pack(made)
    scales = {field: _like(packed[suffix], entries[suffix]) for suffix, field in fields.items()}
    qdata = _like(packed["weight"], entries["weight"])
    return comfy.quant_ops.QuantizedTensor(qdata, stored._layout_cls, dataclasses.replace(params, **scales))


def _like(made: Tensor, entry: Tensor) -> Tensor:
    """The same bytes under the name and shape that the layer keeps them in."""
    return (made if made.dtype == entry.dtype else made.view(entry.dtype)).reshape(entry.shape)
