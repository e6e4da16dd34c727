"""Embedding tables that stay packed: NVFP4 and MXFP8 rows are decoded as they are looked up.

The host looks up FP8 and INT8 tables itself and has no way for block scales: decoded whole, Qwen3-4B's table is 778 MB
instead of 219 as NVFP4.
"""

from __future__ import annotations

import json

import comfy.float
import comfy.ops
import comfy.quant_ops
import torch
from torch import Tensor

from ..kernels.reference import decode_gathered

FORMATS = ("nvfp4", "mxfp8")


def with_packed_rows(base, compute: torch.dtype):
    """The host's operations `base` with an `Embedding` that also takes tables of FORMATS."""

    class Embedding(PackedRows, base.Embedding):
        tessera_compute = compute

    base.Embedding = Embedding
    return base


class PackedRows:
    """For an `Embedding` of the host's: loads, saves and looks up a packed table; all others are the host's affair."""

    tessera_compute: torch.dtype

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args):
        marked = state_dict.get(f"{prefix}comfy_quant")
        name = json.loads(marked.numpy().tobytes()).get("format") if marked is not None else None
        if name in FORMATS:
            del state_dict[f"{prefix}comfy_quant"]
            self.quant_format, self.layout_type = name, comfy.quant_ops.QUANT_ALGOS[name]["comfy_tensor_layout"]
            self.weight = torch.nn.Parameter(self._packed(state_dict, prefix), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        if name in FORMATS and f"{prefix}weight" in missing_keys:
            missing_keys.remove(f"{prefix}weight")

    def _packed(self, state_dict, prefix):
        """The table's entries, taken out of the state dict, as the host holds a packed weight."""
        codes, tiled = state_dict.pop(f"{prefix}weight"), state_dict.pop(f"{prefix}weight_scale")
        if self.quant_format == "nvfp4":
            scales = {"scale": state_dict.pop(f"{prefix}weight_scale_2"),
                      "block_scale": tiled.view(torch.float8_e4m3fn)}  # fmt: skip
        else:
            scales = {"scale": tiled.view(torch.float8_e8m0fnu)}
        shape = (self.num_embeddings, self.embedding_dim)
        layout = comfy.quant_ops.get_layout_class(self.layout_type)
        params = layout.Params(**scales, orig_dtype=self.tessera_compute, orig_shape=shape)
        codes = codes.to(comfy.quant_ops.QUANT_ALGOS[self.quant_format]["storage_t"])
        return comfy.quant_ops.QuantizedTensor(codes, self.layout_type, params)

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        if not self._is_packed(self.weight):
            return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        found = {} if destination is None else destination
        found.update(self.weight.state_dict(f"{prefix}weight"))
        record = json.dumps({"format": self.quant_format}).encode()
        found[f"{prefix}comfy_quant"] = torch.tensor(list(record), dtype=torch.uint8)
        return found

    def forward_comfy_cast_weights(self, input: Tensor, out_dtype=None) -> Tensor:
        if not self._is_packed(self.weight) or self.weight_function:
            return super().forward_comfy_cast_weights(input, out_dtype=out_dtype)
        weight, _, stream = comfy.ops.cast_bias_weight(
            self, device=input.device, dtype=self.weight.dtype, offloadable=True
        )
        decoded = not self._is_packed(weight)  # whole, by the host on the way
        rows = torch.nn.functional.embedding(input, weight) if decoded else self._decoded(weight, input)
        comfy.ops.uncast_bias_weight(self, weight, None, stream)
        return rows.to(self.weight.dtype if out_dtype is None else out_dtype)

    def _decoded(self, weight, tokens: Tensor) -> Tensor:
        params = weight._params
        rows = decode_gathered(self.quant_format, weight._qdata, params.scale, getattr(params, "block_scale", None),
                               tokens.flatten(), self.embedding_dim)  # fmt: skip
        return rows.view(*tokens.shape, self.embedding_dim)

    def _is_packed(self, weight) -> bool:
        return getattr(self, "quant_format", None) in FORMATS and isinstance(weight, comfy.quant_ops.QuantizedTensor)

    # Where the host merges a LoRA into a quantized table, it becomes a dense one until the patch is taken out

    def convert_weight(self, weight, **kwargs):
        return weight.dequantize() if isinstance(weight, comfy.quant_ops.QuantizedTensor) else weight

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False):
        weight = comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed or 0)
        if return_weight:
            return weight
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
