"""Smoothing: moves the difficulty of outlier input channels into the weight, W x = (W s)(x / s) (SmoothQuant,
arXiv 2211.10438)."""

from __future__ import annotations

import torch
from torch import Tensor

EXPONENTS = (0.25, 0.5)
MIN_GAIN = 0.03  # of the layer's output error; less is not worth a multiplication of the input on every call
RANGE = 1e4  # of s: fp16 inputs stay in their range


def factors(weight: Tensor, amax: Tensor, exponent: float) -> Tensor:
    """s [in] = amax_x^a / amax_W^(1-a) with geometric mean 1, for a weight [out, in] and input maxima [in].

    Channels without input or without weight get 1.
    """
    columns = weight.abs().amax(0)
    alive = (amax > 0) & (columns > 0)
    logs = torch.where(
        alive, exponent * amax.clamp(min=1e-30).log() - (1 - exponent) * columns.clamp(min=1e-30).log(), 0
    )
    logs = torch.where(alive, logs - logs[alive].mean() if alive.any() else logs, 0)
    return logs.exp().clamp(1 / RANGE, RANGE)
