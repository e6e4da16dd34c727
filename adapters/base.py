"""What all kinds of adapters share: a change of one weight, and of one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


class Adapter(ABC):
    """What a file changes of one weight; every adapter sees the base weight, never another's result."""

    kind: ClassVar[str]

    @abstractmethod
    def check(self, shape: tuple[int, int]) -> None:
        """Raises ValueError if this cannot change a weight [out, in]."""

    @abstractmethod
    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """The fp32 addition [out, in] to an fp32 weight, on its device: the host's calculate_weight less the weight."""

    def decomposed(self, weight: Tensor, strength: float) -> Tensor:
        """What the host hands to its weight_decompose (DoRA) for this adapter: without strength, if it is linear."""
        return self.delta(weight)

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Its factors."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that products of its factors are kept in."""
        return self.tensors()[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())


@dataclass(frozen=True, eq=False)
class Change:
    """All that one file does to one layer. `bias` [out] is added to the layer's bias, times strength; `reshape` pads
    the weight with zeros to that shape before the adapter is added."""

    adapter: Adapter | None
    bias: Tensor | None = None
    reshape: tuple[int, ...] | None = None

    @property
    def kind(self) -> str:
        return "bias" if self.adapter is None else self.adapter.kind

    def tensors(self) -> list[Tensor]:
        return ([] if self.adapter is None else self.adapter.tensors()) + ([] if self.bias is None else [self.bias])

    def check(self, shape: tuple[int, int]) -> None:
        """Raises ValueError if this cannot change a linear layer whose weight is [out, in]."""
        if self.adapter is not None:
            self.adapter.check(self.reshape or shape)
        out = (self.reshape or shape)[0]
        if self.bias is not None and self.bias.shape != (out,):
            raise ValueError(f"the bias difference is {list(self.bias.shape)}, the layer has {out} outputs")

    def check_beside(self, shape: tuple[int, int]) -> None:
        """Raises ValueError if this cannot run beside a linear layer [out, in], whose shape no branch changes."""
        self.check(shape)
        if self.reshapes(shape):
            raise ValueError(f"it makes the layer {list(self.reshape)} out of {list(shape)}, which no branch can")

    def reshapes(self, shape: tuple[int, int]) -> bool:
        """Whether it gives a weight of that shape another one."""
        return self.reshape is not None and tuple(self.reshape) != tuple(shape)


def flat(tensor: Tensor) -> Tensor:
    """[a, b, ...] as [a, b * ...]."""
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def fp32(weight: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Tensors in fp32 on a weight's device."""
    return [tensor.to(weight.device, torch.float32) for tensor in tensors]


def fits(kind: str, found: tuple[int, ...], shape: tuple[int, int]) -> None:
    if tuple(found) != tuple(shape):
        raise ValueError(f"the {kind} is {list(found)}, the layer {list(shape)}")
