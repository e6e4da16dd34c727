"""OFT and BOFT: adapters that turn the outputs of a layer, R W (arXiv 2306.07280, 2311.06243), as ComfyUI does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Adapter, fp32


@dataclass(frozen=True, eq=False)
class OFT(Adapter):
    """strength^2 * (R - I)^T W, R block-diagonal [k, n, n]: strength counts twice in ComfyUI. alpha > 0 bounds the norm
    of the blocks. (A file's `rescale` is not applied by ComfyUI.)"""

    kind: ClassVar[str] = "OFT"
    blocks: Tensor
    alpha: float | None = None

    def __post_init__(self):
        if self.blocks.ndim != 3 or self.blocks.shape[1] != self.blocks.shape[2] or not self.blocks.numel():
            raise ValueError(f"oft_blocks is {list(self.blocks.shape)}, it must be [blocks, n, n]")

    def check(self, shape: tuple[int, int]) -> None:
        _check_outputs(self.kind, self.blocks.shape[0], self.blocks.shape[1], shape)

    def turn(self) -> Tensor:
        """(R - I)^T, fp32 [k, n, n]: what a block of outputs is multiplied by, to be added."""
        return cayley(self.blocks, self.alpha).transpose(-1, -2)

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        turned = fp32(weight, self.turn())[0] @ weight.unflatten(0, self.blocks.shape[:2])
        return turned.flatten(0, 1).mul_(strength * strength)

    def decomposed(self, weight: Tensor, strength: float) -> Tensor:
        return self.delta(weight).mul_(strength * self.decomposed_scale)

    @property
    def decomposed_scale(self) -> float:
        """With DoRA ComfyUI multiplies by alpha, though it is a bound: without alpha no rotation is left."""
        return self.alpha or 0.0

    def tensors(self) -> list[Tensor]:
        return [self.blocks]


@dataclass(frozen=True, eq=False)
class BOFT(Adapter):
    """strength * (rescale * B W - W), B a product of m butterfly stages of I + strength (R - I), blocks [m, k, b, b].

    rescale is [out, 1]. A file without alpha, which ComfyUI fails on, has no bound.
    """

    kind: ClassVar[str] = "BOFT"
    blocks: Tensor
    rescale: Tensor | None = None
    alpha: float | None = None

    def __post_init__(self):
        if self.blocks.ndim != 4 or self.blocks.shape[2] != self.blocks.shape[3] or not self.blocks.numel():
            raise ValueError(f"oft_blocks is {list(self.blocks.shape)}, it must be [stages, blocks, b, b]")
        if self.blocks.shape[2] % 2:
            raise ValueError(f"oft_blocks is {list(self.blocks.shape)}, blocks of a butterfly are of even size")
        if self.rescale is not None:
            outputs = self.blocks.shape[1] * self.blocks.shape[2]
            if self.rescale.ndim < 2 or self.rescale.shape[0] != outputs or self.rescale.numel() != outputs:
                raise ValueError(f"rescale is {list(self.rescale.shape)}, it must be [{outputs}, 1]")
            object.__setattr__(self, "rescale", self.rescale.flatten(1))

    def check(self, shape: tuple[int, int]) -> None:
        stages, count, size, _ = self.blocks.shape
        _check_outputs(self.kind, count, size, shape)
        if shape[0] % (2 ** (stages - 1) * size):
            raise ValueError(f"the BOFT's {stages} stages of blocks of {size} do not divide {shape[0]} outputs")

    def turn(self) -> Tensor:
        """R - I of every stage, fp32 [m, k, b, b]."""
        return cayley(self.blocks, self.alpha)

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        return self._turned(weight, strength).mul_(strength)

    def _turned(self, weight: Tensor, strength: float) -> Tensor:
        turn = fp32(weight, self.turn())[0] * strength
        added = butterfly(turn, weight.T).T
        if self.rescale is None:
            return added
        rescale = fp32(weight, self.rescale)[0]
        return weight * (rescale - 1) + added * rescale

    def decomposed(self, weight: Tensor, strength: float) -> Tensor:
        return self._turned(weight, strength) * self.decomposed_scale

    @property
    def decomposed_scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha

    def tensors(self) -> list[Tensor]:
        return [self.blocks] if self.rescale is None else [self.blocks, self.rescale]


def cayley(blocks: Tensor, bound: float | None) -> Tensor:
    """R - I of R = (I + Q)(I - Q)^-1, Q = blocks - blocks^T held to norm `bound` if it is larger: fp32 [..., n, n]."""
    q = blocks.float()
    q = q - q.transpose(-1, -2)
    norm = q.norm() + 1e-8
    if bound is not None and 0 < bound < norm:
        q = q * (bound / norm)
    return 2 * q @ torch.linalg.inv(torch.eye(q.shape[-1], device=q.device) - q)  # R - I without a cancellation


def butterfly(turn: Tensor, x: Tensor) -> Tensor:
    """What the stages I + turn [m, k, b, b] add to x [..., out]; stage i joins entries 2^i * b / 2 apart."""
    size, added = turn.shape[-1], torch.zeros_like(x)
    for stage, blocks in enumerate(turn):
        apart = 2**stage * size // 2
        gathered = (x + added).unflatten(-1, (-1, 2, apart)).transpose(-1, -2).flatten(-3).unflatten(-1, (-1, size))
        turned = torch.einsum("bij,...bj->...bi", blocks, gathered).flatten(-2)
        added = added + turned.unflatten(-1, (-1, apart, 2)).transpose(-1, -2).flatten(-3)
    return added


def _check_outputs(kind: str, count: int, size: int, shape: tuple[int, int]) -> None:
    if count * size != shape[0]:
        raise ValueError(f"the {kind} turns {count} x {size} outputs, the layer has {shape[0]}")
