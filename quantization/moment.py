"""Second moments of a layer's input, E[x x^T]: the metric in which a weight error becomes an output error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import reference as ref

BLOCK = 128  # columns of a diagonal block
ROWS = 1 << 22  # numbers worked on at once


@dataclass(frozen=True)
class Moment:
    """R = E[x x^T] of inputs [in]: `matrix` is [in, in], or [n, B, B] on the diagonal (zero-padded), or [in] of it."""

    matrix: Tensor
    in_features: int

    @property
    def kind(self) -> str:
        return {1: "diagonal", 2: "full", 3: "block"}[self.matrix.ndim]

    @property
    def block(self) -> int:
        """Columns that are known together."""
        return {1: 1, 2: self.in_features, 3: self.matrix.shape[-1]}[self.matrix.ndim]

    def to(self, device: torch.device | str) -> Moment:
        return Moment(self.matrix.to(device), self.in_features)

    def diagonal(self) -> Tensor:
        """E[x_j^2] [in]."""
        if self.matrix.ndim == 1:
            return self.matrix
        return self.matrix.diagonal(dim1=-2, dim2=-1).flatten()[: self.in_features]

    def times(self, rows: Tensor) -> Tensor:
        """rows [n, in] @ R."""
        if self.matrix.ndim == 1:
            return rows * self.matrix
        if self.matrix.ndim == 2:
            return rows @ self.matrix
        product = torch.empty_like(rows)  # the only copy: rows may be a whole weight
        parts = rows.split(self.block, 1), product.split(self.block, 1), self.matrix
        for part, into, tile in zip(*parts, strict=True):
            into.copy_(part @ tile[: part.shape[1], : part.shape[1]])
        return product

    def energy(self, rows: Tensor) -> float:
        """tr(rows R rows^T), summed in pieces: E ||rows x||^2."""
        pieces = rows.split(max(1, ROWS // self.in_features))
        return max(0.0, math.fsum((self.times(piece) * piece).sum().item() for piece in pieces))

    def centred(self, mean: Tensor) -> Moment:
        """The moment of x - mean [in]."""
        if self.matrix.ndim == 1:
            return Moment((self.matrix - mean.square()).clamp(min=0), self.in_features)
        if self.matrix.ndim == 2:
            return Moment(self.matrix - torch.outer(mean, mean), self.in_features)
        count, block, _ = self.matrix.shape
        tiles = F.pad(mean, (0, count * block - self.in_features)).view(count, block)
        return Moment(self.matrix - tiles.unsqueeze(1) * tiles.unsqueeze(2), self.in_features)

    def scaled(self, factor: Tensor) -> Moment:
        """The moment of x * factor [in]."""
        if self.matrix.ndim == 1:
            return Moment(self.matrix * factor.square(), self.in_features)
        if self.matrix.ndim == 2:
            return Moment(self.matrix * factor * factor.unsqueeze(1), self.in_features)
        count, block, _ = self.matrix.shape
        tiles = F.pad(factor, (0, count * block - self.in_features)).view(count, block)
        return Moment(self.matrix * tiles.unsqueeze(1) * tiles.unsqueeze(2), self.in_features)

    def rotated(self, group: int) -> Moment:
        """The moment of x rotated in groups of that many columns; blocks narrower than a group are joined first."""
        if self.matrix.ndim == 2:
            return Moment(ref.rotate(ref.rotate(self.matrix, group).T.contiguous(), group), self.in_features)
        blocks = self._joined(group).matrix
        count, block, _ = blocks.shape
        once = ref.rotate(blocks.flatten(0, 1), group).view(count, block, block).transpose(1, 2)
        return Moment(ref.rotate(once.flatten(0, 1), group).view(count, block, block), self.in_features)

    def diagonal_only(self) -> Moment:
        return Moment(self.diagonal().clone(), self.in_features)

    def blocks_only(self) -> Moment:
        """Without what joins columns of different blocks of 128."""
        if self.matrix.ndim != 2:
            return self
        count = -(-self.in_features // BLOCK)
        padded = F.pad(self.matrix, (0, count * BLOCK - self.in_features) * 2).unflatten(0, (count, BLOCK))
        tiles = [padded[i, :, i * BLOCK : (i + 1) * BLOCK] for i in range(count)]
        return Moment(torch.stack(tiles), self.in_features)

    def shrunk(self, share: float) -> Moment:
        """(1 - share) R + share diag(R): what few tokens say of pairs of columns counts less."""
        if self.matrix.ndim == 1:
            return self
        matrix = self.matrix * (1 - share)
        matrix.diagonal(dim1=-2, dim2=-1).add_(share * self.matrix.diagonal(dim1=-2, dim2=-1))
        return Moment(matrix, self.in_features)

    def tiles(self) -> Tensor:
        """R as square tiles on the diagonal [t, c, c], c a multiple of 32; columns beyond in_features have 1 alone.

        Without such columns the tiles are the matrix itself, not a copy."""
        matrix = self._joined(BLOCK).matrix if self.matrix.ndim == 1 else self.matrix
        tiles = matrix if matrix.ndim == 3 else matrix.unsqueeze(0)
        if self.in_features % 32 and matrix.ndim == 2:
            tiles = F.pad(tiles, (0, -self.in_features % 32) * 2)
        unused = tiles.shape[0] * tiles.shape[1] - self.in_features
        if unused:
            tiles = tiles.clone()
            tiles[-1].diagonal()[-unused:] = 1
        return tiles

    def _joined(self, group: int) -> Moment:
        """Blocks at least `group` wide that a group divides; what joins two old blocks is taken as zero."""
        if self.matrix.ndim == 1:
            count = -(-self.in_features // group)
            tiles = F.pad(self.matrix, (0, count * group - self.in_features)).view(count, group)
            return Moment(torch.diag_embed(tiles), self.in_features)
        count, block, _ = self.matrix.shape
        if block >= group:
            return self
        times = group // block
        tiles = F.pad(self.matrix, (0, 0, 0, 0, 0, -count % times)).unflatten(0, (-1, times))
        wide = tiles.new_zeros(tiles.shape[0], times, block, times, block)
        for i in range(times):
            wide[:, i, :, i] = tiles[:, i]
        return Moment(wide.flatten(3, 4).flatten(1, 2), self.in_features)
