"""LowRank: the error-correction branch of a layer, W ~ decode(Q) + up @ down."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLING = 16
ITERATIONS = 8  # a quantization residual is nearly white: 4 leave 5 % of what the rank can take


@dataclass(frozen=True)
class LowRank:
    """up [out, r] @ down [r, in], added to a layer's weight; strength 1 is the whole of it."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight it corrects."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes

    def to(self, device: str) -> LowRank:
        return LowRank(self.up.to(device), self.down.to(device))

    def weight(self) -> Tensor:
        """The fp32 product [out, in]."""
        return self.up.float() @ self.down.float()

    def add_to(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """weight [out, in] (fp32) + strength * the product, in place: no second matrix is made."""
        return weight.addmm_(self.up.float(), self.down.float(), alpha=strength)

    def half(self) -> LowRank:
        """The factors in fp16, of equal norm per rank: their largest entries are roots of the singular values."""
        norms = self.up.norm(dim=0), self.down.norm(dim=1)
        balance = torch.where((norms[0] > 0) & (norms[1] > 0), (norms[0] / norms[1]).sqrt(), 1.0)
        up, down = self.up / balance, self.down * balance.unsqueeze(1)
        return LowRank(up.half().contiguous(), down.half().contiguous())


def fit(error: Tensor, rank: int, seed: int = 0) -> LowRank:
    """The best rank-r approximation of a weight error [out, in] in the Frobenius norm, as fp32 factors.

    up = top-r eigenvectors of E E^T, down = up^T E, by subspace iteration (Halko, Martinsson, Tropp 2011, alg. 4.4):
    the inverse-free form of QERA (arXiv 2410.06040) with R = I. Same seed, same factors.
    """
    rank = min(rank, *error.shape)
    width = min(rank + OVERSAMPLING, *error.shape)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(error.shape[1], width, generator=generator).to(error.device)
    basis = torch.linalg.qr(error @ start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(error @ (error.T @ basis)).Q
    projected = basis.T @ error
    gram = projected @ projected.T
    top = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors[:, -rank:].flip(1)
    return LowRank(basis @ top, top.T @ projected)
