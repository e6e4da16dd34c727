"""Extras: parts of an adapter that are no low-rank pair, as modules beside a layer.

Each gives the addition [..., out] to a layer's output, strength applied, in the input's dtype. `base` is the layer's
product W x without bias. Parameters are nn.Parameters of modules without children: those the host counts and moves.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantization.lowrank import rounded
from .rotations import butterfly


class Extra(nn.Module):
    """forward(x [..., in], base [..., out] or None, strength, a 0-d tensor) -> the addition [..., out]."""

    needs_base: bool = False
    fixed: bool = False  # the same at any strength


class Dense(Extra):
    """strength * D x of a full difference [out, in]; with `fixed` V x - base: another weight V in the layer's place."""

    def __init__(self, weight: Tensor, fixed: bool = False):
        super().__init__()
        self.weight = _parameter(weight)
        self.fixed = self.needs_base = fixed

    def forward(self, x: Tensor, base: Tensor | None, strength: Tensor) -> Tensor:
        product = F.linear(x, self.weight.to(x))
        return product - base if self.fixed else product * strength


class RowScale(Extra):
    """strength * scale [out] * base."""

    needs_base = True

    def __init__(self, scale: Tensor):
        super().__init__()
        self.scale = _parameter(scale)

    def forward(self, x: Tensor, base: Tensor | None, strength: Tensor) -> Tensor:
        return base * self.scale.to(x) * strength


class Kronecker(Extra):
    """strength * rows * kron(w1, w2) x, each of the two one matrix or two factors, multiplied in the cheapest order."""

    def __init__(self, w1: tuple[Tensor, ...], w2: tuple[Tensor, ...], scale: float = 1.0, rows: Tensor | None = None):
        super().__init__()
        self.sides = (w1[-1].shape[1], w2[-1].shape[1])
        steps = cheapest_order([list(reversed(factors)) for factors in (_cheaper(w1), _cheaper(w2))])
        self.steps = tuple((axis, f"factor{number}") for number, (axis, _) in enumerate(steps))
        factors = [factor for _, factor in steps]
        smallest = min(range(len(factors)), key=lambda i: factors[i].numel())
        if scale != 1.0:
            factors[smallest] = rounded(factors[smallest].float() * scale, factors[smallest].dtype)
        for (_, name), factor in zip(self.steps, factors, strict=True):
            self.register_parameter(name, _parameter(factor))  # no ParameterList: the host moves what has no children
        self.rows = None if rows is None else _parameter(rows)

    def forward(self, x: Tensor, base: Tensor | None, strength: Tensor) -> Tensor:
        sides = x.unflatten(-1, self.sides)  # [..., in1, in2]
        for axis, name in self.steps:
            factor = getattr(self, name).to(x)
            sides = F.linear(sides, factor) if axis else factor @ sides
        added = sides.flatten(-2) * strength
        return added if self.rows is None else added * self.rows.to(x)


class Rotation(Extra):
    """strength^2 * rows * turn base, turn block-diagonal [k, n, n] (OFT)."""

    needs_base = True

    def __init__(self, turn: Tensor, rows: Tensor | None = None):
        super().__init__()
        self.turn = _parameter(turn)
        self.rows = None if rows is None else _parameter(rows)

    def forward(self, x: Tensor, base: Tensor | None, strength: Tensor) -> Tensor:
        blocks = base.unflatten(-1, self.turn.shape[:2])
        added = torch.einsum("kmn,...kn->...km", self.turn.to(x), blocks).flatten(-2) * (strength * strength)
        return added if self.rows is None else added * self.rows.to(x)


class Butterfly(Extra):
    """strength * rows * (rescale * B base - base), B of stages I + strength * turn, turn [m, k, b, b] (BOFT)."""

    needs_base = True

    def __init__(self, turn: Tensor, rescale: Tensor | None = None, rows: Tensor | None = None):
        super().__init__()
        self.turn = _parameter(turn)
        self.rescale = None if rescale is None else _parameter(rescale)
        self.rows = None if rows is None else _parameter(rows)

    def forward(self, x: Tensor, base: Tensor | None, strength: Tensor) -> Tensor:
        added = butterfly(self.turn.to(x) * strength, base)
        if self.rescale is not None:
            added = base * (self.rescale - 1).to(x) + added * self.rescale.to(x)
        added = added * strength
        return added if self.rows is None else added * self.rows.to(x)


def cheapest_order(sides: list[list[Tensor]]) -> list[tuple[int, Tensor]]:
    """(axis, factor [to, from]) in the order of fewest multiplications; the factors of an axis keep theirs."""
    first, second = (len(factors) for factors in sides)
    places = itertools.combinations(range(first + second), first)
    return min((_interleaved(sides, chosen) for chosen in places), key=_multiplications)


def _interleaved(sides: list[list[Tensor]], chosen: tuple[int, ...]) -> list[tuple[int, Tensor]]:
    queues = [iter(factors) for factors in sides]
    count = sum(len(factors) for factors in sides)
    return [(axis, next(queues[axis])) for axis in (0 if i in chosen else 1 for i in range(count))]


def _multiplications(steps: list[tuple[int, Tensor]]) -> int:
    size = [next(factor.shape[1] for axis, factor in steps if axis == side) for side in (0, 1)]
    total = 0
    for axis, factor in steps:
        total += factor.numel() * size[1 - axis]
        size[axis] = factor.shape[0]
    return total


def _cheaper(factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Factors multiplied out where the product is smaller than they are."""
    if len(factors) == 1 or sum(factor.numel() for factor in factors) < factors[0].shape[0] * factors[1].shape[1]:
        return factors
    return (rounded(factors[0].float() @ factors[1].float(), factors[0].dtype),)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)
