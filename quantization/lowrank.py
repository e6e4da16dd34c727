"""LowRank: the error-correction branch of a layer, W ~ decode(Q) + up @ down."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .moment import Moment

OVERSAMPLING = 16
FP16_LOSS = 2.0**-10  # relative; rounding alone is 2^-12.5
BLOCK, GROWING_ITERATIONS = 64, 2  # of a subspace that grows until it holds enough
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


def reduce(matrix: Tensor, tolerance: float, cap: int, seed: int = 0) -> tuple[LowRank, float] | None:
    """The truncated SVD of the smallest rank that keeps a matrix [out, in] within a relative Frobenius loss.

    (fp16 factors, their measured loss), or None if no rank up to `cap` is enough. The subspace grows by blocks
    (Martinsson and Voronin 2015, randQB) until it holds enough of ||D||^2, so that a matrix which cannot be reduced
    costs a few narrow products only. A matrix of zeros has rank 0.
    """
    total = _energy(matrix)
    if total == 0.0:
        return LowRank(matrix.new_zeros(matrix.shape[0], 0), matrix.new_zeros(0, matrix.shape[1])), 0.0
    cap = min(cap, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    basis, projected = matrix.new_empty(matrix.shape[0], 0), matrix.new_empty(0, matrix.shape[1])
    while cap > 0 and basis.shape[1] < min(cap + OVERSAMPLING, *matrix.shape):
        basis, projected = _grown(matrix, basis, projected, generator)
        rows = projected.double()  # what is left is a small difference
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1).to(basis.dtype)
        left = total - values.cumsum(0)
        enough = (left[:cap] <= tolerance * tolerance * total).nonzero()
        if len(enough):
            top = vectors[:, : enough[0, 0] + 1]
            return _measured(matrix, LowRank(basis @ top, top.T @ projected), total, tolerance)
        # what the ranks still to come can take is at most the smallest value found, each; a subspace errs a little
        if left[-1] - 1.2 * max(0, cap - len(values)) * values[-1] > tolerance * tolerance * total:
            return None
    return None


def _grown(matrix: Tensor, basis: Tensor, projected: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A basis Q [out, w] and Q^T D [w, in], wider by the block that holds most of what Q leaves of D."""
    width = min(BLOCK, min(matrix.shape) - basis.shape[1])
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    for _ in range(GROWING_ITERATIONS + 1):
        block = torch.linalg.qr(matrix @ start - basis @ (projected @ start)).Q
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q  # again: rounding lets Q back in
        rows = block.T @ matrix
        start = rows.T
    return torch.cat((basis, block), 1), torch.cat((projected, rows))


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """An fp32 tensor in a narrower dtype; in fp32 if that would lose more than rounding does (fp16 has no small
    numbers: alpha / rank times a small factor may lie below them)."""
    narrow = tensor.to(dtype)
    if dtype is not torch.float16 or (narrow.float() - tensor).norm() <= FP16_LOSS * tensor.norm():
        return narrow
    return tensor


def _energy(matrix: Tensor) -> float:
    """The sum of squares in double, by slices: no second matrix is made."""
    return sum(rows.double().square().sum().item() for rows in matrix.split(256))


def _measured(matrix: Tensor, pair: LowRank, total: float, tolerance: float) -> tuple[LowRank, float] | None:
    """The pair in fp16 with its loss against the matrix; as it was if fp16 makes it too large; None if it is anyway."""
    for factors in (pair.half(), pair):
        left = sum((part - up.float() @ factors.down.float()).double().square().sum().item()
                   for part, up in zip(matrix.split(256), factors.up.split(256), strict=True))  # fmt: skip
        loss = (left / total) ** 0.5
        if loss <= tolerance:
            return factors, loss
    return None
