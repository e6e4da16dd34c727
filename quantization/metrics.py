"""How far one tensor is from another."""

from __future__ import annotations

import math

from torch import Tensor

SQUARABLE = (1e-15, 1e18)  # norms whose squares, and those of their parts, are exact enough in fp32

CHUNK = 1 << 20  # numbers at once: torch's fp32 norm of a whole large layer is off by up to half a percent on CPU


def norm(x: Tensor) -> float:
    """Frobenius norm, exact to fp32 whatever the size of tensor and numbers."""
    return math.sqrt(math.fsum(_length(chunk.float()) ** 2 for chunk in x.flatten().split(CHUNK)))


def relative_error(approximation: Tensor, truth: Tensor) -> float:
    """||a - t|| / ||t|| in the Frobenius norm; 0 for a zero tensor met exactly."""
    pieces = zip(approximation.flatten().split(CHUNK), truth.flatten().split(CHUNK), strict=True)
    distance = math.sqrt(math.fsum(_length(a.float() - t.float()) ** 2 for a, t in pieces))
    length = norm(truth)
    return distance / length if length else (0.0 if distance == 0 else math.inf)


def _length(x: Tensor) -> float:
    """Of a few numbers; their squares must not vanish, or a lost layer would be one without error."""
    length = x.norm().item()
    return length if SQUARABLE[0] < length < SQUARABLE[1] else x.double().norm().item()


def psnr(image: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures with values in 0..1; inf if they are equal."""
    return decibels((image.float() - truth.float()).square().mean().item())


def decibels(mse: float, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio of a mean squared error; inf if there is none."""
    return 10 * math.log10(peak**2 / mse) if mse else math.inf
