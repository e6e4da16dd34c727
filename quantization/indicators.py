"""What can be read off a weight without running anything: the indicators that quant_probe publishes.

Shown beside measured damage, never used to decide: on MiniLM they rank layers hardly better than chance
(docs/algorithms.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHTS = (0.6, 0.3, 0.1)  # of kurtosis, dynamic range and aspect ratio in quant_probe's score


@dataclass(frozen=True)
class Indicators:
    """As quant_probe's README defines them (github.com/insecure-erasure/quant_probe, 894ec7b)."""

    kurtosis: float  # excess: 0 for normal noise
    dynamic_range: float  # max |w| - min |w|
    aspect_ratio: float  # longer side over shorter


def of(weight: Tensor) -> Indicators:
    """The indicators of a weight [out, in]."""
    magnitude = weight.abs()
    spread = (magnitude.amax() - magnitude.amin()).item()
    centred = (weight - weight.mean()).square_()
    variance = centred.mean()
    kurtosis = (centred.square_().mean() / variance.square() - 3).item() if variance > 0 else 0.0
    return Indicators(kurtosis, spread, max(weight.shape) / min(weight.shape))


def quant_probe_scores(layers: Mapping[str, Indicators]) -> dict[str, float]:
    """quant_probe's sensitivity in 0..1: kurtosis between the Tukey fences of all layers, dynamic range and aspect
    ratio between least and most of their kind."""
    quartiles = torch.tensor([i.kurtosis for i in layers.values()]).quantile(torch.tensor([0.25, 0.75])).tolist()
    fence = 1.5 * (quartiles[1] - quartiles[0])
    low, high = quartiles[0] - fence, quartiles[1] + fence
    scores = {}
    for name, found in layers.items():
        peers = [i for other, i in layers.items() if kind(other) == kind(name)]
        parts = (
            _position(min(max(found.kurtosis, low), high), (low, high)),
            _position(found.dynamic_range, [i.dynamic_range for i in peers]),
            _position(found.aspect_ratio, [i.aspect_ratio for i in peers]),
        )
        scores[name] = sum(weight * part for weight, part in zip(WEIGHTS, parts, strict=True))
    return scores


def kind(layer: str) -> str:
    """A layer's path without block numbers: layers of one kind do the same work in different blocks."""
    return ".".join("#" if part.isdecimal() else part for part in layer.split("."))


def _position(value: float, peers) -> float:
    low, high = min(peers), max(peers)
    return (value - low) / (high - low) if high > low else 0.0
