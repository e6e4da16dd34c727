"""Calibration: what the inputs of each layer look like while the model does its own work."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import MXFP8, NVFP4, Format
from .moment import BLOCK, Moment

if TYPE_CHECKING:
    from ..source import Source

MOMENTS = ("full", "block", "diagonal")
FULL_UP_TO = 4096  # in_features; a full moment of 10240 is 419 MB, its blocks of 128 are 5
NOISY: tuple[Format, ...] = (NVFP4(), MXFP8())  # formats whose rounding of the input itself is recorded
SAMPLE = 512  # tokens of each site kept as they are
FINGERPRINT_LAYERS = 8
FINGERPRINT_WEIGHTS = 4096  # of each of them
TABLES = ("embed_tokens", "shared", "lm_head")  # of language models, tied or left out
SMALLEST_NORMAL = 2.0**-14  # of fp16: a host that holds bf16 weights in fp16 loses what is smaller


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32: neither TF32 or bf16 passes nor an autocast of whoever samples."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class Statistics:
    """The inputs [in] of one site. Every forward counts equally, whatever its magnitude (see Accumulator)."""

    tokens: int  # sampled
    mean: Tensor  # [in] E[x]
    amax: Tensor  # [in] max |x_j|
    second: Tensor  # E[x x^T]: [in, in], [blocks, 128, 128] or [in]; a Moment's matrix
    noise: dict[str, Tensor]  # format name -> [in] E[(x_j - quantized x_j)^2]
    sample: Tensor  # some of the tokens themselves [at most SAMPLE, in] in bf16, for what moments cannot tell
    skipped: int = 0  # tokens with NaN or infinity

    @property
    def in_features(self) -> int:
        return self.mean.shape[0]

    def moment(self) -> Moment:
        return Moment(self.second, self.in_features)

    def outline(self) -> Outline:
        return Outline(self.tokens, self.skipped, self.in_features, tuple(self.second.shape), len(self.sample),
                       tuple(self.noise))  # fmt: skip

    def to(self, device: torch.device | str) -> Statistics:
        noise = {name: value.to(device) for name, value in self.noise.items()}
        return Statistics(self.tokens, self.mean.to(device), self.amax.to(device), self.second.to(device), noise,
                          self.sample.to(device), self.skipped)  # fmt: skip


@dataclass(frozen=True)
class Outline:
    """The size of Statistics, without their numbers."""

    tokens: int
    skipped: int
    in_features: int
    second: tuple[int, ...]  # shape
    sample: int  # tokens in it
    noise: tuple[str, ...]  # format names


class Accumulator:
    """Statistics of one site, collected call by call in fp32 (no TF32: a rounded Gram matrix is not positive).

    `weight` times the tokens of a call is its share. The sums live on `device`; the arithmetic runs where x is, with
    one moment of its size there at a time.
    """

    def __init__(self, in_features: int, moment: str = "full", device: torch.device | str = "cpu"):
        if moment not in MOMENTS:
            raise ValueError(f"moment {moment!r}: must be one of {', '.join(MOMENTS)}")
        self.in_features = in_features
        self._tokens, self._skipped, self._weight = 0, 0, 0.0
        self._sum, self._amax = torch.zeros(in_features, device=device), torch.zeros(in_features, device=device)
        self._second = torch.zeros(moment_shape(in_features, moment), device=device)
        self._noise = {format.name: torch.zeros(in_features, device=device) for format in NOISY}
        self._sample = torch.zeros(0, in_features, dtype=torch.bfloat16, device=device)
        self._priority, self._generator = torch.zeros(0), torch.Generator().manual_seed(in_features)

    @staticmethod
    def cost(in_features: int, moment: str) -> int:
        """`nbytes` of an accumulator to be."""
        return moment_bytes(in_features, moment) + in_features * (4 * (2 + len(NOISY)) + 2 * SAMPLE)

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def skipped(self) -> int:
        return self._skipped

    @property
    def nbytes(self) -> int:
        """Held for as long as the site is recorded."""
        sums = (self._sum, self._amax, self._second, *self._noise.values())
        return sum(t.nbytes for t in sums) + SAMPLE * self.in_features * self._sample.itemsize

    @full_precision()
    def add(self, x: Tensor, weight: float = 1.0) -> None:
        """One call's inputs [tokens, in]. Tokens that are not finite are left out and counted."""
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"inputs are {list(x.shape)}, expected [tokens, {self.in_features}]")
        x = x.detach().float()
        finite = torch.isfinite(x.square().sum(1))  # what overflows here would in the moment too
        if not finite.all():
            self._skipped += int((~finite).sum())
            x = x[finite]
        if not len(x):
            return
        device = self._sum.device
        self._second.add_(gram(x, self._second.ndim).to(device), alpha=weight)
        self._sum += (weight * x.sum(0)).to(device)
        self._amax = torch.maximum(self._amax, x.abs().amax(0).to(device))
        for format in NOISY:
            rounding = format.decode(format.encode(x)).sub_(x)
            self._noise[format.name] += (weight * rounding.square_().sum(0)).to(device)
        self._keep_some(x * math.sqrt(weight))
        self._tokens += len(x)
        self._weight += weight * len(x)

    def _keep_some(self, x: Tensor) -> None:
        """Every token gets a random priority, the highest stay: a uniform sample of all calls."""
        priority = torch.cat((self._priority, torch.rand(len(x), generator=self._generator)))
        kept = priority.topk(min(SAMPLE, len(priority))).indices.sort().values
        fresh = kept[kept >= len(self._sample)] - len(self._sample)
        old = kept[kept < len(self._sample)]
        fresh = x[fresh.to(x.device)].to(self._sample.device, torch.bfloat16)
        self._sample = torch.cat((self._sample[old.to(self._sample.device)], fresh))
        self._priority = priority[kept]

    def outline(self) -> Outline:
        second, noise = tuple(self._second.shape), tuple(self._noise)
        return Outline(self._tokens, self._skipped, self.in_features, second, len(self._sample), noise)

    def narrow(self, moment: str) -> None:
        """Keeps only the blocks, or the diagonal, of what was collected and of what follows."""
        kept = Moment(self._second, self.in_features)
        if moment == "diagonal":
            self._second = kept.diagonal_only().matrix
        elif moment == "block":
            self._second = kept.blocks_only().matrix

    def statistics(self) -> Statistics | None:
        """What was collected; None if no token was."""
        if not self._tokens:
            return None
        if self._second.ndim == 1:
            second = self._second / self._weight
        else:  # the two triangles round apart
            second = torch.add(self._second, self._second.mT).div_(2 * self._weight)
        noise = {name: value / self._weight for name, value in self._noise.items()}
        mean = self._sum / self._weight
        sample = (self._sample.float() * math.sqrt(self._tokens / self._weight)).bfloat16()
        return Statistics(self._tokens, mean, self._amax.clone(), second, noise, sample, self._skipped)


@dataclass
class Calibration:
    """Statistics of a model's layers. Layers that read the same tensor share a site, named after the first of them."""

    sites: Mapping[str, Statistics]
    layers: dict[str, str]  # module path -> site
    model: str  # fingerprint of the model they belong to
    runs: int = 0  # forwards recorded
    notes: list[str] = field(default_factory=list)

    def of(self, layer: str) -> Statistics | None:
        """The statistics of a layer's input, or None if it was not recorded."""
        site = self.layers.get(layer)
        return None if site is None else self.sites[site]

    def digest(self) -> str:
        """sha256 of all numbers: two calibrations with one digest make the same file."""
        seen = hashlib.sha256(json.dumps([self.model, sorted(self.layers.items())]).encode())
        for site in sorted(self.sites):
            statistics = self.sites[site]
            seen.update(f"{site}:{statistics.tokens}".encode())
            noise = [value for _, value in sorted(statistics.noise.items())]
            for tensor in (statistics.mean, statistics.amax, statistics.second, statistics.sample.float(), *noise):
                seen.update(tensor.cpu().contiguous().numpy())
        return seen.hexdigest()


def moment_shape(in_features: int, moment: str) -> tuple[int, ...]:
    """The shape of a moment's matrix."""
    shapes = {
        "full": (in_features, in_features),
        "block": (-(-in_features // BLOCK), BLOCK, BLOCK),
        "diagonal": (in_features,),
    }
    return shapes[moment]


def moment_bytes(in_features: int, moment: str) -> int:
    return 4 * math.prod(moment_shape(in_features, moment))


def gram(x: Tensor, ndim: int) -> Tensor:
    """x^T x of inputs [tokens, in] as a moment's matrix of that many dimensions."""
    if ndim == 1:
        return x.square().sum(0)
    if ndim == 2:
        return x.T @ x
    tiles = F.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).transpose(0, 1)
    return torch.bmm(tiles.mT, tiles)


def fingerprint(source: Source) -> str:
    """sha256 of a model's layers: names, shapes, and numbers from some of them, as bf16 so that a host's cast to
    another 16-bit type changes nothing. Without tables that a file may hold twice and a host once."""
    layers = sorted(k for k, s in source.shapes().items() if k.endswith(".weight") and len(s) == 2)
    layers = [key for key in layers if key.split(".")[-2] not in TABLES]
    seen = hashlib.sha256(json.dumps([[key, *source.shapes()[key]] for key in layers]).encode())
    for key in layers[:: max(1, len(layers) // FINGERPRINT_LAYERS)]:
        weight = source.weight(key.removesuffix(".weight")).flatten()
        sample = weight[:: max(1, weight.numel() // FINGERPRINT_WEIGHTS)]
        sample = torch.where(sample.abs() < SMALLEST_NORMAL, 0.0, sample).bfloat16()
        seen.update(sample.contiguous().view(torch.uint8).numpy())
    return seen.hexdigest()
