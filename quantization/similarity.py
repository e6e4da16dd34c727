"""How alike two pictures or two latents are: PSNR, SSIM, relative L2 and cosine, summed in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .metrics import CHUNK, decibels

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM: Wang et al., IEEE TIP 13(4), 2004, section III


@dataclass(frozen=True)
class Similarity:
    """b against the reference a."""

    psnr: float  # dB; inf: they are equal
    ssim: float  # -1..1; nan where no 11x11 window fits
    relative_l2: float  # ||b - a|| / ||a||
    cosine: float

    @property
    def identical(self) -> bool:
        return self.psnr == math.inf

    def words(self) -> tuple[str, str, str, str]:
        """Its numbers as they are shown: PSNR, SSIM, relative L2, cosine."""
        psnr = "identical" if self.identical else f"{self.psnr:.2f} dB"
        ssim = "too small" if math.isnan(self.ssim) else f"{self.ssim:.4f}"
        return psnr, ssim, f"{100 * self.relative_l2:.3g} %", f"{self.cosine:.6f}"


def of_pictures(a: Tensor, b: Tensor, names: tuple[str, str] = ("a", "b")) -> tuple[Similarity, list[Similarity]]:
    """(of all as one, of each pair) for pictures [n, h, w, c] with values in 0..1; one picture meets each of the other.

    Raises ValueError if sizes differ or a number is none.
    """
    a, b = paired(a, b, names, "{2} x {1}, {3} channels")
    return _of(a.movedim(-1, 1), b.movedim(-1, 1), [1.0] * len(a), 1.0)


def of_latents(a: Tensor, b: Tensor, names: tuple[str, str] = ("a", "b")) -> tuple[Similarity, list[Similarity]]:
    """The same for latents [n, c, ..., h, w]; PSNR and SSIM by the range of the numbers in each a, as they have no
    given one."""
    a, b = paired(a, b, names)
    return _of(a, b, [_range(one) for one in a], _range(a))


def paired(a: Tensor, b: Tensor, names: tuple[str, str] = ("a", "b"), text: str = "") -> tuple[Tensor, Tensor]:
    """Both with as many entries; `text` formats a shape for the message.

    Raises ValueError if sizes differ, there is nothing to compare, or a number is none.
    """
    for name, x in zip(names, (a, b), strict=True):
        if not x.numel():
            raise ValueError(f"{name}: is empty, {list(x.shape)}: there is nothing to compare")
        if not all(torch.isfinite(part).all() for part in x.flatten().split(CHUNK)):
            raise ValueError(f"{name}: holds NaN or infinity; what made it has overflowed, so there is nothing to "
                             "compare (a model in fp16, or a damaged file?)")  # fmt: skip
    if a.shape[1:] != b.shape[1:]:
        said = [text.format(*x.shape) if text and x.ndim == 4 else str(list(x.shape[1:])) for x in (a, b)]
        raise ValueError(f"{names[0]} is {said[0]}, {names[1]} is {said[1]}: only equal sizes can be compared; give "
                         "both samplers the same width and height, or scale one first")  # fmt: skip
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise ValueError(f"{names[0]} has {len(a)} pictures, {names[1]} has {len(b)}: give equally many, or one that "
                         "all others are compared with")  # fmt: skip
    count = max(len(a), len(b))
    return a.expand(count, *a.shape[1:]), b.expand(count, *b.shape[1:])


def _range(x: Tensor) -> float:
    return float(x.max() - x.min()) or 1.0


def _of(a: Tensor, b: Tensor, peaks: list[float], peak: float) -> tuple[Similarity, list[Similarity]]:
    sums = [_sums(one, other) for one, other in zip(a, b, strict=True)]
    ssims = [ssim(one, other, peak) for one, other, peak in zip(a, b, peaks, strict=True)]
    each = [_similarity(s, own, found, a[0].numel()) for s, own, found in zip(sums, peaks, ssims, strict=True)]
    total = tuple(math.fsum(column) for column in zip(*sums, strict=True))
    return _similarity(total, peak, math.fsum(ssims) / len(ssims), a.numel()), each


def _sums(a: Tensor, b: Tensor) -> tuple[float, float, float, float]:
    """(||b - a||^2, ||a||^2, ||b||^2, a.b)."""
    found = [0.0] * 4
    for x, y in zip(a.flatten().split(CHUNK), b.flatten().split(CHUNK), strict=True):
        x, y = x.double(), y.double()
        for place, value in enumerate(((y - x).square().sum(), x.square().sum(), y.square().sum(), (x * y).sum())):
            found[place] += value.item()
    return tuple(found)


def _similarity(sums: tuple[float, ...], peak: float, ssim: float, count: int) -> Similarity:
    distance, a, b, product = sums
    relative = math.sqrt(distance / a) if a else (math.inf if distance else 0.0)
    cosine = product / math.sqrt(a * b) if a and b else (1.0 if a == b else 0.0)
    return Similarity(decibels(distance / count, peak), ssim, relative, min(cosine, 1.0))


def ssim(a: Tensor, b: Tensor, peak: float = 1.0) -> float:
    """Mean structural similarity of [..., h, w], over all planes: gaussian windows of 11x11, sigma 1.5, that lie wholly
    inside. Equations 13 to 17 of Wang et al., 2004. nan if none does.
    """
    a, b = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))
    if min(a.shape[-2:]) < WINDOW:
        return math.nan
    return math.fsum(_ssim(x.double(), y.double(), peak) for x, y in zip(a, b, strict=True)) / len(a)


def _ssim(a: Tensor, b: Tensor, peak: float) -> float:
    """Of one plane [h, w]."""
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    mean_a, mean_b, aa, bb, ab = _blurred(torch.stack([a, b, a * a, b * b, a * b]))
    variances = (aa - mean_a * mean_a) + (bb - mean_b * mean_b)
    covariance = ab - mean_a * mean_b
    above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (above / ((mean_a * mean_a + mean_b * mean_b + c1) * (variances + c2))).mean().item()


def _blurred(planes: Tensor) -> Tensor:
    """[n, h, w] -> [n, h - 10, w - 10]; shifted sums, as torch's fp64 convolution needs many times the memory."""
    place = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-0.5 * (place / SIGMA) ** 2)
    weights = (weights / weights.sum()).tolist()
    for dim in (-2, -1):
        size = planes.shape[dim] - WINDOW + 1
        blurred = planes.narrow(dim, 0, size) * weights[0]
        for start, weight in enumerate(weights[1:], 1):
            blurred.add_(planes.narrow(dim, start, size), alpha=weight)
        planes = blurred
    return planes
