"""How far one tensor is from another."""

from __future__ import annotations

import math

from torch import Tensor


def relative_error(approximation: Tensor, truth: Tensor) -> float:
    """||a - t|| / ||t|| in the Frobenius norm; 0 for a zero tensor met exactly."""
    norm = truth.float().norm().item()
    distance = (approximation.float() - truth.float()).norm().item()
    return distance / norm if norm else (0.0 if distance == 0 else math.inf)


def psnr(image: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures with values in 0..1; inf if they are equal."""
    mse = (image.float() - truth.float()).square().mean().item()
    return 10 * math.log10(1 / mse) if mse else math.inf
