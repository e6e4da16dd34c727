"""How far one tensor is from another."""

from __future__ import annotations

import math

from torch import Tensor

CHUNK = 1 << 20  # numbers at once: torch's fp32 norm of a whole large layer is off by up to half a percent on CPU


def norm(x: Tensor) -> float:
    """Frobenius norm, exact to fp32 whatever the size."""
    return math.sqrt(math.fsum(chunk.float().norm().item() ** 2 for chunk in x.flatten().split(CHUNK)))


def relative_error(approximation: Tensor, truth: Tensor) -> float:
    """||a - t|| / ||t|| in the Frobenius norm; 0 for a zero tensor met exactly."""
    pieces = zip(approximation.flatten().split(CHUNK), truth.flatten().split(CHUNK), strict=True)
    distance = math.sqrt(math.fsum((a.float() - t.float()).norm().item() ** 2 for a, t in pieces))
    length = norm(truth)
    return distance / length if length else (0.0 if distance == 0 else math.inf)


def psnr(image: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures with values in 0..1; inf if they are equal."""
    mse = (image.float() - truth.float()).square().mean().item()
    return 10 * math.log10(1 / mse) if mse else math.inf
