"""LoRAs of the host on smoothed layers: added to the weight that the layer stands for, not to the one it stores.

A layer with a `pre_quant_scale` c [in] stores W / c and computes (x * c) (W / c)^T. What the host adds to the stored
weight would act on x * c, so it is added to W here, and the sum is divided by c again.
"""

from __future__ import annotations

import comfy.model_management
from torch import Tensor


class Smoothed:
    """For a `Linear` of the host's: puts this basis around each place where the host changes its weight.

    `convert_weight` and `set_weight` when it merges a patch or saves a merged model, `weight_function` where a layer
    is offloaded, `weight_lowvram_function` with dynamic VRAM (host 0.30 to 0.33).
    """

    def true_weight(self, stored: Tensor) -> Tensor:
        scale = self._scale(stored)
        return stored if scale is None else stored * scale

    def stored_weight(self, true: Tensor) -> Tensor:
        scale = self._scale(true)
        return true if scale is None else true / scale

    def _scale(self, weight: Tensor) -> Tensor | None:
        scale = getattr(self, "pre_quant_scale", None)
        return None if scale is None else comfy.model_management.cast_to_device(scale, weight.device, weight.dtype)

    def convert_weight(self, weight, *args, **kwargs):
        return self.true_weight(super().convert_weight(weight, *args, **kwargs))

    def set_weight(self, weight, *args, **kwargs):
        return super().set_weight(self.stored_weight(weight), *args, **kwargs)

    def forward_comfy_cast_weights(self, input, *args, **kwargs):
        functions = self.weight_function
        if not functions or getattr(self, "pre_quant_scale", None) is None:
            return super().forward_comfy_cast_weights(input, *args, **kwargs)
        self.weight_function = [self.true_weight, *functions, self.stored_weight]
        try:
            return super().forward_comfy_cast_weights(input, *args, **kwargs)
        finally:
            self.weight_function = functions

    @property
    def weight_lowvram_function(self):
        return vars(self).get("_tessera_lowvram")

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, patch):
        smoothed = patch is not None and getattr(self, "pre_quant_scale", None) is not None
        vars(self)["_tessera_lowvram"] = _TrueBasis(patch, self) if smoothed else patch


class _TrueBasis:
    """A patch of the host's in the true basis; in all else (memory, pins, prefetching) it is that patch."""

    def __init__(self, patch, layer: Smoothed):
        self._patch, self._layer = patch, layer

    def __getattr__(self, name):
        if name in ("_patch", "_layer"):  # while being copied there is nothing to ask yet
            raise AttributeError(name)
        return getattr(self._patch, name)

    def __call__(self, stored: Tensor) -> Tensor:
        return self._layer.stored_weight(self._patch(self._layer.true_weight(stored)))
