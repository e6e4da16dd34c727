"""LowRank: the error-correction branch of a layer, W ~ decode(Q) + up @ down."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .moment import Moment

OVERSAMPLING = 16
ITERATIONS = 8  # a quantization residual is nearly white: 4 leave 5 % of what the rank can take


@dataclass(frozen=True)
class LowRank:
    """up [out, r] @ down [r, in], added to a layer's weight; strength 1 is the whole of it."""

    up: Tensor
    down: Tensor
    bias: Tensor | None = None  # [out], added to the layer's bias: `diff_b` in a LoRA file

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight it corrects."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def to(self, device: str) -> LowRank:
        bias = None if self.bias is None else self.bias.to(device)
        return LowRank(self.up.to(device), self.down.to(device), bias)

    def weight(self) -> Tensor:
        """The fp32 product [out, in]."""
        return self.up.float() @ self.down.float()

    def add_to(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """weight [out, in] (fp32) + strength * the product, in place: no second matrix is made."""
        return weight.addmm_(self.up.float(), self.down.float(), alpha=strength)

    def half(self) -> LowRank:
        """The factors in fp16, of equal norm per rank: their largest entries are roots of the singular values.

        The bias stays as it is."""
        norms = self.up.norm(dim=0), self.down.norm(dim=1)
        balance = torch.where((norms[0] > 0) & (norms[1] > 0), (norms[0] / norms[1]).sqrt(), 1.0)
        up, down = self.up / balance, self.down * balance.unsqueeze(1)
        return LowRank(up.half().contiguous(), down.half().contiguous(), self.bias)


def fit(error: Tensor, rank: int, seed: int = 0, moment: Moment | None = None) -> LowRank:
    """The rank-r AB that minimises ||(E - AB) R^1/2|| for a weight error E [out, in] and R = E[x x^T], as fp32 factors.

    up = top-r eigenvectors of E R E^T, down = up^T E, by subspace iteration (Halko, Martinsson, Tropp 2011, alg. 4.4):
    QERA's optimum (arXiv 2410.06040) with neither root nor inverse of R, so that R may be singular, blocks or a
    diagonal. Without a moment R = I: the truncated SVD. Same seed, same factors.
    """
    rank = min(rank, *error.shape)
    width = min(rank + OVERSAMPLING, *error.shape)
    weighted = error if moment is None else moment.times(error)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(error.shape[1], width, generator=generator).to(error.device)
    basis = torch.linalg.qr(weighted @ start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(weighted @ (error.T @ basis)).Q
    projected = basis.T @ error
    gram = (basis.T @ weighted) @ projected.T
    top = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors[:, width - rank :].flip(1)
    return LowRank(basis @ top, top.T @ projected)
