"""The kinds of adapters: what each adds to a weight [out, in], as ComfyUI 0.30-0.33 computes it.

Factors are flattened to two dimensions when an adapter is made, so that one of a 1 x 1 convolution fits a linear layer
(and a larger kernel's is [out, in * kh * kw]). Constructors called `of` take a file's own tensors; they raise
ValueError for tensors that do not belong together. OFT and BOFT are in `rotations`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..quantization.lowrank import LowRank, rounded
from .base import Adapter, fits, flat, fp32


@dataclass(frozen=True, eq=False)
class LoRA(Adapter):
    """up @ down, alpha / rank folded into up."""

    kind: ClassVar[str] = "LoRA"
    pair: LowRank

    @classmethod
    def of(cls, up: Tensor, down: Tensor, alpha: float | None = None, mid: Tensor | None = None) -> LoRA:
        """up [out, r], down [r, in], mid [r, r, kh, kw] (LoCon's Tucker core)."""
        shapes = f"up {list(up.shape)} and down {list(down.shape)}"
        rank = down.shape[0] if down.ndim else 0
        if up.ndim < 2 or down.ndim < 2 or not flat(up).shape[1] == rank > 0:
            raise ValueError(f"{shapes} are no [out, r] and [r, in]")
        if mid is not None:
            if mid.ndim != 4 or mid.shape[0] != rank or mid.shape[1] != rank or flat(down).shape[1] != down.shape[1]:
                raise ValueError(f"mid {list(mid.shape)} does not fit {shapes}, it must be [r, r, kh, kw]")
            down = rounded(torch.einsum("rskl,si->rikl", mid.float(), flat(down).float()), down.dtype)
        scale = 1.0 if alpha is None else alpha / rank
        up, down = flat(up), flat(down)
        return cls(LowRank(up if scale == 1.0 else rounded(up.float() * scale, up.dtype), down))

    def check(self, shape: tuple[int, int]) -> None:
        fits(self.kind, self.pair.shape, shape)

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        up, down = fp32(weight, self.pair.up, self.pair.down)
        return up @ down * strength

    def tensors(self) -> list[Tensor]:
        return [self.pair.up, self.pair.down]


@dataclass(frozen=True, eq=False)
class LoHa(Adapter):
    """scale * (w1_a @ w1_b) o (w2_a @ w2_b), an entrywise product of rank r1 * r2 (FedPara, arXiv 2108.06098)."""

    kind: ClassVar[str] = "LoHa"
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float = 1.0

    @classmethod
    def of(cls, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, alpha: float | None = None,
           t1: Tensor | None = None, t2: Tensor | None = None) -> LoHa:  # fmt: skip
        """w_a [out, r] and w_b [r, in]; with Tucker cores t [r, s, kh, kw] they are [r, out] and [s, in]."""
        if (t1 is None) != (t2 is None):
            raise ValueError(f"hada_{'t1' if t1 is None else 't2'} is missing")
        rank = w1_b.shape[0] if w1_b.ndim else 0
        first, second = _factors("hada_w1", w1_a, w1_b, t1), _factors("hada_w2", w2_a, w2_b, t2)
        found = [[a.shape[0], b.shape[1]] for a, b in (first, second)]
        if found[0] != found[1]:
            raise ValueError(f"hada_w1 is {found[0]} and hada_w2 is {found[1]}, they must be alike")
        return cls(*first, *second, 1.0 if alpha is None else alpha / rank)

    def check(self, shape: tuple[int, int]) -> None:
        fits(self.kind, (self.w1_a.shape[0], self.w1_b.shape[1]), shape)

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        w1_a, w1_b, w2_a, w2_b = fp32(weight, *self.tensors())
        return (w1_a @ w1_b).mul_(w2_a @ w2_b).mul_(strength * self.scale)

    def tensors(self) -> list[Tensor]:
        return [self.w1_a, self.w1_b, self.w2_a, self.w2_b]

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0] * self.w2_b.shape[0]


@dataclass(frozen=True, eq=False)
class LoKr(Adapter):
    """scale * kron(w1, w2), each of them whole (one matrix) or in two factors (a @ b) (LyCORIS, arXiv 2309.14859)."""

    kind: ClassVar[str] = "LoKr"
    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    scale: float = 1.0

    @classmethod
    def of(cls, w1: Tensor | None = None, w2: Tensor | None = None, w1_a: Tensor | None = None,
           w1_b: Tensor | None = None, w2_a: Tensor | None = None, w2_b: Tensor | None = None,
           t2: Tensor | None = None, alpha: float | None = None) -> LoKr:  # fmt: skip
        """alpha counts only if w1 or w2 is factored, by w2's rank before w1's; a whole matrix goes before factors."""
        dim = None
        if w1 is None and w1_b is not None:
            dim = w1_b.shape[0]
        if w2 is None and w2_b is not None:
            dim = w2_b.shape[0]
        first = _whole_or_factors("lokr_w1", w1, w1_a, w1_b, None)
        second = _whole_or_factors("lokr_w2", w2, w2_a, w2_b, t2)
        return cls(first, second, 1.0 if alpha is None or dim is None else alpha / dim)

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """[out, in] of w1 and of w2."""
        return tuple((factors[0].shape[0], factors[-1].shape[1]) for factors in (self.w1, self.w2))

    def check(self, shape: tuple[int, int]) -> None:
        first, second = self.sizes
        fits(self.kind, (first[0] * second[0], first[1] * second[1]), shape)

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        first, second = (fp32(weight, *factors) for factors in (self.w1, self.w2))
        return torch.kron(_product(first) * (strength * self.scale), _product(second))

    def tensors(self) -> list[Tensor]:
        return [*self.w1, *self.w2]

    @property
    def rank(self) -> int:
        """The most that the rank of the whole can be."""
        return math.prod(min(min(factor.shape) for factor in factors) for factors in (self.w1, self.w2))


@dataclass(frozen=True, eq=False)
class GLoRA(Adapter):
    """scale * (W a + b) with a and b of rank r each (arXiv 2306.07967); LyCORIS has stored it in two layouts.

    New: a1 [in, r], a2 [r, in], b1 [out, r], b2 [r, in]. Old: a2 [in, r], a1 [r, in], b2 [out, r], b1 [r, in].
    """

    kind: ClassVar[str] = "GLoRA"
    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    alpha: float | None = None

    @classmethod
    def of(cls, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, alpha: float | None = None) -> GLoRA:
        if any(tensor.ndim < 2 for tensor in (a1, a2, b1, b2)):
            raise ValueError(f"{_shapes(a1=a1, a2=a2, b1=b1, b2=b2)} must be matrices")
        made = cls(flat(a1), flat(a2), flat(b1), flat(b2), alpha)
        if not made._new and not made._old:
            raise ValueError(f"{_shapes(a1=a1, a2=a2, b1=b1, b2=b2)} share no rank")
        return made

    @property
    def _old(self) -> bool:
        return self.b2.shape[1] == self.b1.shape[0] == self.a1.shape[0] == self.a2.shape[1] > 0

    @property
    def _new(self) -> bool:
        return self.b2.shape[0] == self.b1.shape[1] == self.a1.shape[1] == self.a2.shape[0] > 0

    def factors(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """(in -> r of a, r -> in of a, up of b, down of b, scale): of a square weight's tensors only its size tells
        the layouts apart."""
        old = self._old and (not self._new or shape[0] == shape[1] == self.a2.shape[0])
        rank = self.a1.shape[0] if old else self.a2.shape[0]
        scale = 1.0 if self.alpha is None else self.alpha / rank
        return (self.a2, self.a1, self.b2, self.b1, scale) if old else (self.a1, self.a2, self.b1, self.b2, scale)

    def check(self, shape: tuple[int, int]) -> None:
        a_in, a_out, up, down, _ = self.factors(shape)
        fits(self.kind, (up.shape[0], down.shape[1]), shape)
        if not a_in.shape[0] == a_out.shape[1] == shape[1]:
            raise ValueError(f"the GLoRA's {_shapes(a1=self.a1, a2=self.a2)} do not fit a layer {list(shape)}")

    def pair(self, weight: Tensor) -> LowRank:
        """The fp32 pair of rank 2 r that this is beside a weight; scale is in up."""
        *tensors, scale = self.factors(tuple(weight.shape))
        a_in, a_out, up, down = fp32(weight, *tensors)
        return LowRank(torch.cat((up, weight @ a_in), 1) * scale, torch.cat((down, a_out)))

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        return self.pair(weight).weight() * strength

    def tensors(self) -> list[Tensor]:
        return [self.a1, self.a2, self.b1, self.b2]


@dataclass(frozen=True, eq=False)
class Difference(Adapter):
    """A full difference, added as it is."""

    kind: ClassVar[str] = "difference"
    diff: Tensor

    def check(self, shape: tuple[int, int]) -> None:
        fits(self.kind, tuple(self.diff.shape), shape)

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        return fp32(weight, self.diff)[0] * strength

    def tensors(self) -> list[Tensor]:
        return [self.diff]


@dataclass(frozen=True, eq=False)
class Replacement(Adapter):
    """Another weight in this one's place, at any strength (`set`)."""

    kind: ClassVar[str] = "replacement"
    weight: Tensor

    def check(self, shape: tuple[int, int]) -> None:
        fits(self.kind, tuple(self.weight.shape), shape)

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        return fp32(weight, self.weight)[0] - weight

    def tensors(self) -> list[Tensor]:
        return [self.weight]


@dataclass(frozen=True, eq=False)
class DoRA(Adapter):
    """strength * (scale * (W + inner) / norm - W) (arXiv 2402.09353), as ComfyUI does it.

    A scale [out, 1] goes with the norms of W's rows, a scale [1, in] with those of the columns of W + inner.
    """

    inner: Adapter
    scale: Tensor

    def __post_init__(self):
        if self.scale.ndim < 2 or any(n != 1 for n in self.scale.shape[2:]):
            raise ValueError(f"dora_scale is {list(self.scale.shape)}, it must be [out, 1] or [1, in]")
        object.__setattr__(self, "scale", flat(self.scale))

    @property
    def kind(self) -> str:
        return f"DoRA {self.inner.kind}"

    def check(self, shape: tuple[int, int]) -> None:
        self.inner.check(shape)
        if tuple(self.scale.shape) not in ((shape[0], 1), (1, shape[1])):
            raise ValueError(f"dora_scale is {list(self.scale.shape)}, a layer {list(shape)} needs [{shape[0]}, 1] or "
                             f"[1, {shape[1]}]")  # fmt: skip

    def by_rows(self, out: int) -> bool:
        """Whether the norm is over the output axis: of each row of W."""
        return self.scale.shape[0] == out

    def row_factors(self, weight: Tensor) -> Tensor:
        """scale / ||W's row||, fp32 [out, 1] (or [1, in] for a single output)."""
        norm = weight.norm(dim=1, keepdim=True) + torch.finfo(torch.float32).eps
        return fp32(weight, self.scale)[0] / norm

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        changed = self.inner.decomposed(weight, strength).add_(weight)
        if self.by_rows(len(weight)):
            factors = self.row_factors(weight)
        else:
            norm = changed.norm(dim=0, keepdim=True) + torch.finfo(torch.float32).eps
            factors = fp32(weight, self.scale)[0] / norm
        return changed.mul_(factors).sub_(weight).mul_(strength)

    def tensors(self) -> list[Tensor]:
        return [*self.inner.tensors(), self.scale]


def _product(factors: list[Tensor]) -> Tensor:
    return factors[0] if len(factors) == 1 else factors[0] @ factors[1]


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())


def _factors(name: str, a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two factors [out, r] and [r, in]; a Tucker core is multiplied into the second."""
    found = f"{name}_a {list(a.shape)} and {name}_b {list(b.shape)}"
    if a.ndim != 2 or b.ndim < 2:
        raise ValueError(f"{found} are no [out, r] and [r, in]")
    if core is not None:
        if core.ndim != 4 or b.ndim != 2 or (core.shape[0], core.shape[1]) != (a.shape[0], b.shape[0]):
            raise ValueError(f"{found} do not fit their Tucker core {list(core.shape)}")
        return a.T.contiguous(), flat(rounded(torch.einsum("ijkl,jr->irkl", core.float(), b.float()), b.dtype))
    if not a.shape[1] == b.shape[0] > 0:
        raise ValueError(f"{found} are no [out, r] and [r, in]")
    return a, flat(b)


def _whole_or_factors(name: str, whole: Tensor | None, a: Tensor | None, b: Tensor | None,
                      core: Tensor | None) -> tuple[Tensor, ...]:  # fmt: skip
    if whole is not None:
        if whole.ndim < 2:
            raise ValueError(f"{name} is {list(whole.shape)}, not a matrix")
        return (flat(whole),)
    if a is None or b is None:
        missing = name if a is None and b is None else f"{name}_{'a' if a is None else 'b'}"
        raise ValueError(f"{missing} is missing")
    return _factors(name, a, b, core)
