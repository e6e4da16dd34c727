"""Forms: how an adapter runs beside a layer, as a low-rank pair where it has one, else by extras.

Where neither is exact, the full difference is reduced to the smallest rank within a tolerance, or multiplied as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantization.lowrank import LowRank, reduce, rounded
from .base import Adapter, Change
from .extras import Butterfly, Dense, Extra, Kronecker, Rotation, RowScale
from .kinds import Difference, DoRA, GLoRA, LoHa, LoKr, LoRA, Replacement
from .rotations import BOFT, OFT

SMALL_RANK = 64  # up to which a product of ranks is written out as a pair: it then shares the layer's one product
MAX_RANK = 256  # of a reduced difference, and at most an eighth of the smaller side
FULL = "as a full product"


@dataclass(frozen=True, eq=False)
class Form:
    """strength * (pair and bias) and the extras' own additions, side by side.

    `how` is for the report; `loss` is the relative Frobenius error of what was reduced.
    """

    pair: LowRank | None
    extras: tuple[Extra, ...]
    kind: str
    how: str = "exact"
    loss: float = 0.0
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        parameters = [parameter for extra in self.extras for parameter in extra.parameters()]
        tensors = [*parameters, *([] if self.bias is None else [self.bias])]
        return sum(tensor.nbytes for tensor in tensors) + (self.pair.nbytes if self.pair else 0)


@dataclass(frozen=True)
class _Parts:
    pair: LowRank | None = None
    extras: tuple[Extra, ...] = ()
    how: str = "exact"
    loss: float = 0.0


@dataclass(frozen=True)
class _Layer:
    """What a form may need to know: the layer's weight (decoded only if asked for), the tolerance, where to compute."""

    weight: Callable[[], Tensor]
    tolerance: float
    device: str
    rows: Tensor | None = None  # fp32 [out]: factors of the adapter's rows, from DoRA


def form(change: Change, shape: tuple[int, int], weight: Callable[[], Tensor], tolerance: float = 0.02,
         device: str = "cpu") -> Form:  # fmt: skip
    """How a change runs beside a layer [out, in].

    weight() gives its decoded fp32 weight and is called only if that is needed. A reduction may lose `tolerance` of the
    difference's norm; 0 means none. `device` is where large products are made. Raises ValueError if the change does not
    fit the layer.
    """
    change.check_beside(shape)
    layer = _Layer(weight, tolerance, device)
    parts = _Parts() if change.adapter is None else _parts(change.adapter, layer)
    return Form(parts.pair, parts.extras, change.kind, parts.how, parts.loss, change.bias)


def _parts(adapter: Adapter, layer: _Layer) -> _Parts:
    return _BUILDERS[type(adapter)](adapter, layer)


def _lora(adapter: LoRA, layer: _Layer) -> _Parts:
    return _Parts(_scaled(adapter.pair, layer.rows))


def _glora(adapter: GLoRA, layer: _Layer) -> _Parts:
    pair = adapter.pair(layer.weight()).to("cpu")
    pair = LowRank(rounded(pair.up, adapter.dtype), rounded(pair.down, adapter.dtype))
    return _Parts(_scaled(pair, layer.rows))


def _loha(adapter: LoHa, layer: _Layer) -> _Parts:
    """Of small ranks the rows of Khatri and Rao: the product's columns are products of columns."""
    out, columns = adapter.w1_a.shape[0], adapter.w1_b.shape[1]
    if adapter.rank > SMALL_RANK:
        parts = _difference(_on(layer, adapter), layer, adapter.dtype)
        # a large pair is exact and may still be smaller than the whole
        if parts.pair is not None or not parts.extras or 2 * adapter.rank * (out + columns) > out * columns:
            return parts
    w1_a, w1_b, w2_a, w2_b = (tensor.float() for tensor in adapter.tensors())
    up = (w1_a.unsqueeze(2) * w2_a.unsqueeze(1)).flatten(1) * adapter.scale
    down = (w1_b.unsqueeze(1) * w2_b.unsqueeze(0)).flatten(0, 1)
    pair = LowRank(rounded(up, adapter.dtype), rounded(down, adapter.dtype))
    return _Parts(_scaled(pair, layer.rows))


def _lokr(adapter: LoKr, layer: _Layer) -> _Parts:
    if adapter.rank > SMALL_RANK:
        return _Parts(None, (Kronecker(adapter.w1, adapter.w2, adapter.scale, layer.rows),), "factored")
    (up1, down1), (up2, down2) = (_split(factors) for factors in (adapter.w1, adapter.w2))
    up, down = torch.kron(up1, up2) * adapter.scale, torch.kron(down1, down2)
    pair = LowRank(rounded(up, adapter.dtype), rounded(down, adapter.dtype))
    return _Parts(_scaled(pair, layer.rows))


def _oft(adapter: OFT, layer: _Layer) -> _Parts:
    return _Parts(None, (Rotation(adapter.turn(), layer.rows),))


def _boft(adapter: BOFT, layer: _Layer) -> _Parts:
    rescale = None if adapter.rescale is None else adapter.rescale.flatten()
    return _Parts(None, (Butterfly(adapter.turn(), rescale, layer.rows),))


def _full(adapter: Difference, layer: _Layer) -> _Parts:
    return _difference(adapter.diff, layer, adapter.dtype)


def _replacement(adapter: Replacement, layer: _Layer) -> _Parts:
    return _Parts(None, (Dense(adapter.weight, fixed=True),), FULL)


def _dora(adapter: DoRA, layer: _Layer) -> _Parts:
    """By rows, m = scale / ||W row||: (m - 1) * W and the inner adapter with its rows times m. By columns in full."""
    weight = layer.weight()
    if adapter.by_rows(len(weight)) and adapter.scale.shape[1] == 1:
        factors = adapter.row_factors(weight)[:, 0].cpu()
        rows = factors if not isinstance(adapter.inner, OFT | BOFT) else factors * adapter.inner.decomposed_scale
        inner = _parts(adapter.inner, _Layer(lambda: weight, layer.tolerance, layer.device, rows))
        return _Parts(inner.pair, (RowScale(factors - 1), *inner.extras), inner.how, inner.loss)
    parts = _difference(adapter.delta(weight), layer, adapter.inner.dtype)
    if isinstance(adapter.inner, OFT | BOFT):
        return _Parts(parts.pair, parts.extras, f"{parts.how}, right at strength 1 only", parts.loss)
    return parts


_BUILDERS = {LoRA: _lora, GLoRA: _glora, LoHa: _loha, LoKr: _lokr, OFT: _oft, BOFT: _boft, Difference: _full,
             Replacement: _replacement, DoRA: _dora}  # fmt: skip


def _difference(delta: Tensor, layer: _Layer, dtype: torch.dtype) -> _Parts:
    """A full difference [out, in], reduced if it can be within the tolerance."""
    if layer.rows is not None:
        delta = delta * layer.rows.to(delta.device).unsqueeze(1)
    if layer.tolerance > 0:
        cap = min(min(delta.shape) // 8, MAX_RANK)
        found = reduce(delta.to(layer.device).float(), layer.tolerance, cap)
        if found is not None:
            pair, loss = found
            if pair.rank == 0:
                return _Parts()
            return _Parts(pair.to("cpu"), (), f"reduced to rank {pair.rank}, losing {100 * loss:.1f} %", loss)
    kept = rounded(delta, dtype).cpu()
    loss = 0.0 if kept.dtype == delta.dtype else _relative(kept, delta)
    return _Parts(None, (Dense(kept),), FULL, loss)


def _relative(found: Tensor, wanted: Tensor) -> float:
    norm = wanted.norm().item()
    return (found.to(wanted.device).float() - wanted).norm().item() / norm if norm else 0.0


def _on(layer: _Layer, adapter: LoHa) -> Tensor:
    """The adapter's delta on the layer's device; it needs no weight but for where to be."""
    return adapter.delta(torch.empty(0, device=layer.device))


def _scaled(pair: LowRank, rows: Tensor | None) -> LowRank:
    if rows is None:
        return pair
    return LowRank(rounded(pair.up.float() * rows.to(pair.up.device).unsqueeze(1), pair.up.dtype), pair.down)


def _split(factors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """A matrix as two factors of its smallest rank."""
    if len(factors) == 2 and factors[0].shape[1] <= min(factors[0].shape[0], factors[1].shape[1]):
        return factors[0].float(), factors[1].float()
    whole = factors[0].float() if len(factors) == 1 else factors[0].float() @ factors[1].float()
    if whole.shape[0] <= whole.shape[1]:
        return torch.eye(whole.shape[0], device=whole.device), whole
    return whole, torch.eye(whole.shape[1], device=whole.device)
