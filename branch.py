"""What a stack of LoRAs adds to each layer of a model: one low-rank product, and what is none, unmerged.

The factors of all LoRAs on a layer are joined in rank; each rank is multiplied by the strength of its LoRA, which lies
in a small vector outside. The modules here hold only factors, so that the host counts, offloads and clones them as a
model of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapters import Form
from .kernels.linear import LowRankBranch

Rows = tuple[int, int] | None
"""(start, length) of a layer's output; None: all of it."""
Runs = tuple[tuple[int, int], ...]
"""(entry, rank) of neighbouring ranks."""
Cast = Callable[[Tensor, torch.device, torch.dtype], Tensor]


class Strengths:
    """The strengths of a stack's entries as the tensors that kernels read; setting them writes those, nothing else."""

    def __init__(self, values: Iterable[float]):
        self.values = [float(value) for value in values]
        self._tensors: dict[tuple[Runs, torch.device], Tensor] = {}
        self._entries: dict[Runs, Tensor] = {}  # of each rank

    def vector(self, runs: Runs, device: torch.device) -> Tensor:
        """[r] on that device, the same tensor at every call: graphs read it there."""
        found = self._tensors.get((runs, device))
        if found is None:
            found = self._tensors[runs, device] = self._spread(runs).to(device)
        return found

    def scalar(self, entry: int, device: torch.device) -> Tensor:
        """[] on that device."""
        return self.vector(((entry, 1),), device)[0]

    def prepare(self, branches: Branches, device: torch.device) -> None:
        """Makes every tensor that the branches will read there: a graph must not."""
        for runs in branches.build().runs:
            self.vector(runs, device)

    def set(self, values: Iterable[float]) -> None:
        """Takes effect at the next forward; nothing is reloaded or recompiled."""
        values = [float(value) for value in values]
        if len(values) != len(self.values):
            raise ValueError(f"{len(values)} strengths for {len(self.values)} LoRAs; give one for each")
        if values != self.values:
            self.values = values
            now = torch.tensor(values, dtype=torch.float32)
            for (runs, _), tensor in self._tensors.items():
                tensor.copy_(now[self._entries[runs]])

    def _spread(self, runs: Runs) -> Tensor:
        if runs not in self._entries:
            self._entries[runs] = torch.tensor([entry for entry, rank in runs for _ in range(rank)], dtype=torch.long)
        return torch.tensor(self.values, dtype=torch.float32)[self._entries[runs]]


@dataclass(frozen=True)
class Part:
    """What one entry does to one layer, or to `rows` of its output."""

    entry: int
    form: Form
    rows: Rows = None
    exact: bool = True  # its own accuracy counts: a kernel that encodes factors stores both as hi + lo
    absorbed: bool = False  # it is part of the weight: without it the layer is wrong, not less exact


class Group(nn.Module):
    """The down factors of layers that are called with the same input, one below the other."""

    def __init__(self, linear: type[nn.Module], down: Tensor, runs: Runs, exact: tuple[bool, ...]):
        super().__init__()
        self.stacked = _holding(linear, down)
        self.runs, self.exact = runs, exact

    @property
    def rank(self) -> int:
        return self.stacked.weight.shape[0]


class Branch(nn.Module):
    """All that a stack adds to one layer; its down factors are rows `span` of its group's."""

    def __init__(self, parts: list[Part], shape: tuple[int, int], linear: type[nn.Module], dtype: torch.dtype | None):
        super().__init__()
        self.shape, self.fired = shape, 0
        self.absorbed = any(part.absorbed for part in parts)
        pairs = [part for part in parts if part.form.pair is not None]
        self.runs: Runs = tuple((part.entry, part.form.pair.rank) for part in pairs)
        self.exact = tuple(part.exact for part in pairs)
        self.up = _holding(linear, _joined_up(pairs, shape[0], dtype)) if pairs else None
        biased = [part for part in parts if part.form.bias is not None]
        self.bias_runs: Runs = tuple((part.entry, 1) for part in biased)
        rows = [_placed(part.form.bias.unsqueeze(1), part.rows, shape[0]).squeeze(1) for part in biased]
        self.bias = _Held(torch.stack(rows)) if rows else None  # [b, out]
        beside = [(part, extra) for part in parts for extra in part.form.extras]
        self.extras = nn.ModuleList(extra for _, extra in beside)
        self.places = tuple((part.entry, part.rows) for part, _ in beside)
        self.entries = tuple(part.entry for part in parts)
        self.kinds = tuple(part.form.kind for part in parts)
        self.__dict__["group"], self.span = None, (0, 0)  # past nn.Module: a layer does not own its siblings' factors

    @property
    def rank(self) -> int:
        return 0 if self.up is None else self.up.weight.shape[1]

    @property
    def needs_base(self) -> bool:
        """Whether some part changes the layer's own product: that must be there by itself first."""
        return any(extra.needs_base for extra in self.extras)

    def count(self) -> None:
        """Notes that it was used."""
        if self.fired < 2:  # enough to tell; a number that keeps changing would make torch.compile start over
            self.fired += 1

    def forget(self) -> None:
        """As if it had not been used."""
        self.__dict__["fired"] = 0  # past nn.Module's slow __setattr__

    def product(self, x: Tensor, strengths: Strengths, cast: Cast) -> LowRankBranch | None:
        """Its low-rank part on x's device and in x's dtype; None if it has none."""
        if self.up is None:
            return None
        down = cast(self.group.stacked.weight[slice(*self.span)], x.device, x.dtype)
        return LowRankBranch(down, cast(self.up.weight, x.device, x.dtype), strengths.vector(self.runs, x.device))

    def biased(self, bias: Tensor | None, x: Tensor, strengths: Strengths, cast: Cast) -> Tensor | None:
        """The layer's bias [out] with the stack's differences on it."""
        if self.bias is None:
            return bias
        change = strengths.vector(self.bias_runs, x.device) @ cast(self.bias.weight, x.device, torch.float32)
        return change.to(x.dtype) if bias is None else (bias.float() + change).to(x.dtype)

    def beside(self, y: Tensor, x: Tensor, strengths: Strengths, base: Tensor | None) -> Tensor:
        """y [..., out] with the parts that are no low-rank product; `base` is the layer's product without its bias."""
        for extra, (entry, rows) in zip(self.extras, self.places, strict=True):
            part = base if base is None or rows is None else base.narrow(-1, *rows)
            change = extra(x, part, strengths.scalar(entry, x.device)).to(y.dtype)
            if rows is not None:
                change = nn.functional.pad(change, (rows[0], self.shape[0] - rows[0] - rows[1]))
            y = y + change
        return y

    def add(self, y: Tensor, x: Tensor, strengths: Strengths, cast: Cast, bias: Tensor | None = None) -> Tensor:
        """All of it, on the output y [..., out] of a layer with that bias: what a forward hook does."""
        self.count()
        base = y if bias is None or not self.needs_base else y - bias.to(y.device, y.dtype)
        added = self.beside(y, x, strengths, base)
        if (change := self.biased(None, x, strengths, cast)) is not None:
            added = added + change.to(y.dtype)
        branch = self.product(x, strengths, cast)
        if branch is None:
            return added
        t = branch.middle(x.reshape(-1, x.shape[-1]))
        return torch.addmm(added.reshape(-1, y.shape[-1]), t.to(y.dtype), branch.up.T.to(y.dtype)).reshape(y.shape)


class Branches(nn.Module):
    """The branches of a stack, by the path of their layer; `siblings` are paths of layers that share an input.

    Factors are joined when they are first needed: of stacks that nodes build up one on the other, only the last runs.
    """

    def __init__(self, parts: Mapping[str, list[Part]], shapes: Mapping[str, tuple[int, int]],
                 linear: type[nn.Module], siblings: Iterable[tuple[str, ...]] = (),
                 dtype: torch.dtype | None = None):  # fmt: skip
        super().__init__()
        self.layers = list(parts)
        self.items, self.groups = nn.ModuleList(), nn.ModuleList()
        self._plan = parts, shapes, linear, list(siblings), dtype
        self.runs: set[Runs] = set()  # of all strengths that they read

    @property
    def built(self) -> bool:
        return self._plan is None

    def build(self) -> Branches:
        """Joins the factors, if that has not been done."""
        if self._plan is not None:
            (parts, shapes, linear, siblings, dtype), self._plan = self._plan, None
            self.items.extend(Branch(parts[name], shapes[name], linear, dtype) for name in self.layers)
            by_name = dict(zip(self.layers, self.items, strict=True))
            for names in self._together(siblings):
                self._group([(by_name[name], parts[name]) for name in names], linear, dtype)
            self.runs = {module.runs for module in (*self.items, *self.groups)}
            self.runs |= {item.bias_runs for item in self.items}
            self.runs |= {((entry, 1),) for item in self.items for entry, _ in item.places}
        return self

    def planned(self) -> int:
        """Bytes of all factors before they are joined: the host asks for the size of every stack that nodes build."""
        parts, shapes, _, siblings, dtype = self._plan
        total = sum(_bytes(parts[name], shapes[name][0], dtype) for name in self.layers)
        for names in self._together(siblings):
            factors = [p.form.pair.down for name in names for p in parts[name] if p.form.pair is not None]
            total += sum(f.numel() for f in factors) * _dtype(factors, dtype).itemsize if factors else 0
        return total

    def _together(self, siblings: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """The layers, those that share an input together."""
        shared = [tuple(name for name in names if name in self.layers) for names in siblings]
        alone = set(self.layers) - {name for names in shared for name in names}
        return [*filter(None, shared), *((name,) for name in self.layers if name in alone)]

    def named_modules(self, *args, **kwargs):
        """What the host walks through to load a model: then its factors must be there."""
        self.build()
        return super().named_modules(*args, **kwargs)

    def state_dict(self, *args, **kwargs):
        self.build()
        return super().state_dict(*args, **kwargs)

    def _group(self, members: list[tuple[Branch, list[Part]]], linear: type[nn.Module], dtype) -> None:
        members = [(item, parts) for item, parts in members if item.rank]
        if not members:
            return
        factors = [part.form.pair.down for _, parts in members for part in parts if part.form.pair is not None]
        runs = tuple(run for item, _ in members for run in item.runs)
        exact = tuple(flag for item, _ in members for flag in item.exact)
        group = Group(linear, torch.cat([f.to(_dtype(factors, dtype)) for f in factors]), runs, exact)
        self.groups.append(group)
        start = 0
        for item, _ in members:
            item.__dict__["group"], item.span = group, (start, start + item.rank)
            start += item.rank


class _Held(nn.Module):
    """A tensor in a module of its own: the host moves those, and not what lies beside other modules."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


def _joined_up(parts: list[Part], out_features: int, dtype: torch.dtype | None) -> Tensor:
    factors = [_placed(part.form.pair.up, part.rows, out_features) for part in parts]
    return torch.cat([factor.to(_dtype(factors, dtype)) for factor in factors], 1)


def _bytes(parts: list[Part], out_features: int, dtype: torch.dtype | None) -> int:
    """Of a layer's up factors, bias differences and what stands beside them."""
    ups = [part.form.pair.up for part in parts if part.form.pair is not None]
    biases = [part.form.bias for part in parts if part.form.bias is not None]
    total = sum(tensor.nbytes for part in parts for extra in part.form.extras for tensor in extra.state_dict().values())
    total += out_features * sum(up.shape[1] for up in ups) * _dtype(ups, dtype).itemsize if ups else 0
    return total + out_features * len(biases) * _dtype(biases, None).itemsize if biases else total


def _placed(factor: Tensor, rows: Rows, out_features: int) -> Tensor:
    """A factor [length, r] of some rows as one of all rows."""
    if rows is None:
        return factor
    return nn.functional.pad(factor, (0, 0, rows[0], out_features - rows[0] - rows[1]))


def _dtype(factors: list[Tensor], dtype: torch.dtype | None) -> torch.dtype:
    found = factors[0].dtype
    for factor in factors[1:]:
        found = torch.promote_types(found, factor.dtype)
    return dtype or found


def _holding(linear: type[nn.Module], weight: Tensor) -> nn.Module:
    """A layer of the host's that holds the factor: it knows how to keep it where memory is, and counts it."""
    layer = linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
