"""The host's patches as changes of ours: what each adapter object or tuple adds to one layer, in the same words.

Patches are what `ModelPatcher.patches` holds: (strength, value, strength_model, offset, function). A reason, as text,
stands for a change that nothing beside a weight can be.
"""

from __future__ import annotations

import hashlib
import math

import comfy.weight_adapter
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..adapters import BOFT, OFT, Adapter, Change, Difference, DoRA, GLoRA, LoHa, LoKr, LoRA, Replacement
from .stacking import Placed, shape_of

Patch = tuple  # (strength, value, strength_model, offset, function)
ORDERED = (LoRA, LoHa, Difference)  # kinds whose rows the host reorders by its function, whatever the weight is

_digests: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> digest: a slider hands in the same tensors again


def place(patch: Patch, layer: str, part: str, module: nn.Module) -> Placed | str:
    """A patch on `weight` or `bias` (part) of a linear layer, placed; or why it must be merged into the weight."""
    _, value, strength_model, offset, function = patch
    if strength_model != 1.0:
        return "it scales the weight itself, as merging models does"
    try:
        if part == "bias":
            return Placed(layer, None, Change(None, bias=_bias(value, offset, function, module)))
        out, columns = shape_of(module)
        rows = None if offset is None else _rows(offset)
        length = out if rows is None else rows[1]
        adapter, reshape = _adapter(value)
        change = Change(adapter, reshape=reshape)
        change.check_beside((length, columns))
        order = None if function is None or isinstance(adapter, Replacement) else _order(function, length, adapter)
    except ValueError as reason:
        return str(reason)
    return Placed(layer, rows, change, order)


def reshapes(value) -> bool:
    """Whether the host may give the weight another shape for it."""
    if isinstance(value, comfy.weight_adapter.LoRAAdapter):
        return value.weights[5] is not None
    return isinstance(value, tuple) and len(value) == 2 and value[0] == "diff" and len(value[1]) > 1


def sees_weight(value) -> bool:
    """Whether what a patch adds depends on the weight that it is added to."""
    if isinstance(value, comfy.weight_adapter.LoRAAdapter):
        return value.weights[4] is not None  # dora_scale
    if isinstance(value, comfy.weight_adapter.LoHaAdapter | comfy.weight_adapter.LoKrAdapter):
        return value.weights[-1] is not None
    return not (isinstance(value, tuple) and (len(value) == 1 or value[0] == "diff"))


def row_order(function, rows: int) -> Tensor | None:
    """The order in which a function of the host's takes rows [rows, in] of a difference; None if it does more."""
    probe = torch.arange(2.0 * rows).view(rows, 2)
    try:
        moved = function(probe.clone())
        order = moved[:, 0].div(2).long()
        if sorted(order.tolist()) != list(range(rows)) or not torch.equal(moved, probe[order]):
            return None
    except (RuntimeError, TypeError, ValueError, IndexError):  # it wants more than rows
        return None
    return order


def tensors(value) -> list[Tensor]:
    """All tensors of a patch's value."""
    held = value.weights if isinstance(value, comfy.weight_adapter.WeightAdapterBase) else value
    if isinstance(held, Tensor):
        return [held]
    return [tensor for part in held for tensor in tensors(part)] if isinstance(held, tuple | list) else []


def identity(patches: list[tuple[str, Patch]]) -> str:
    """The same for patches of the same content on the same keys, whatever their strength and objects."""
    found = hashlib.blake2b(digest_size=16)
    for key, (_, value, _, offset, function) in patches:
        numbers = [part for part in _flat(value) if not isinstance(part, Tensor)]
        name = type(value).__name__, getattr(function, "__qualname__", None)
        found.update(repr((key, name, offset, numbers)).encode())
        for tensor in tensors(value):
            found.update(digest(tensor))
    return found.hexdigest()


def digest(tensor: Tensor) -> bytes:
    """Of a tensor's dtype, shape and bytes."""
    known = _digests.get(tensor)
    if known is None:
        flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy()
        found = hashlib.blake2b(repr((tensor.dtype, tensor.shape)).encode(), digest_size=16)
        found.update(flat)
        _digests[tensor] = known = found.digest()
    return known


def _flat(value) -> list:
    held = value.weights if isinstance(value, comfy.weight_adapter.WeightAdapterBase) else value
    return [part for item in held for part in _flat(item)] if isinstance(held, tuple | list) else [held]


def _adapter(value) -> tuple[Adapter, tuple[int, int] | None]:
    """(adapter, the shape the host pads the weight to). Raises ValueError for what is not known by its very class."""
    read = _READERS.get(type(value))
    if read is not None:
        return read(*value.weights)
    kind, data = _tuple(value)
    if kind == "diff" and len(data) > 1 and data[1].get("pad_weight"):
        return Difference(data[0]), tuple(data[0].shape)
    if kind == "diff":
        return Difference(data[0]), None
    if kind == "set":
        return Replacement(data[0]), None
    raise ValueError(f"only ComfyUI knows what to do with a {kind!r} patch")


def _tuple(value) -> tuple[str, tuple]:
    """(kind, data) of a patch that is no adapter object."""
    if not isinstance(value, tuple):
        raise ValueError(f"a {type(value).__name__} is nothing that can run beside a layer")
    kind, data = ("diff", value) if len(value) == 1 else value[:2]
    if not isinstance(data, tuple) or not data or not isinstance(data[0], Tensor):
        raise ValueError(f"a {kind!r} patch without a tensor")
    return kind, data


def _lora(up, down, alpha, mid, dora_scale, reshape):
    return _decomposed(LoRA.of(up, down, alpha, mid), dora_scale), None if reshape is None else tuple(reshape)


def _loha(w1_a, w1_b, alpha, w2_a, w2_b, t1, t2, dora_scale):
    return _decomposed(LoHa.of(w1_a, w1_b, w2_a, w2_b, alpha, t1, t2), dora_scale), None


def _lokr(w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, t2, dora_scale):
    return _decomposed(LoKr.of(w1, w2, w1_a, w1_b, w2_a, w2_b, t2, alpha), dora_scale), None


def _glora(a1, a2, b1, b2, alpha, dora_scale):
    return _decomposed(GLoRA.of(a1, a2, b1, b2, alpha), dora_scale), None


def _oft(blocks, rescale, alpha, dora_scale):
    return _decomposed(OFT(blocks, alpha), dora_scale), None


def _boft(blocks, rescale, alpha, dora_scale):
    return _decomposed(BOFT(blocks, rescale, alpha), dora_scale), None


_READERS = {
    comfy.weight_adapter.LoRAAdapter: _lora, comfy.weight_adapter.LoHaAdapter: _loha,
    comfy.weight_adapter.LoKrAdapter: _lokr, comfy.weight_adapter.GLoRAAdapter: _glora,
    comfy.weight_adapter.OFTAdapter: _oft, comfy.weight_adapter.BOFTAdapter: _boft,
}  # fmt: skip


def _decomposed(inner: Adapter, scale: Tensor | None) -> Adapter:
    return inner if scale is None else DoRA(inner, scale)


def _rows(offset) -> tuple[int, int]:
    dim, start, length = offset
    if dim != 0:
        raise ValueError("it changes a slice of the layer's inputs")
    return start, length


def _order(function, rows: int, adapter: Adapter) -> Tensor:
    order = row_order(function, rows) if isinstance(adapter, ORDERED) else None
    if order is None:
        raise ValueError(f"ComfyUI converts it by {getattr(function, '__name__', 'a function')}, which does more than "
                         f"reorder rows of a {adapter.kind}")  # fmt: skip
    return order


def _bias(value, offset, function, module: nn.Module) -> Tensor:
    """A difference of the bias [out]; `set` and what else there may be are the host's."""
    kind, data = _tuple(value)
    if kind != "diff" or offset is not None or (len(data) > 1 and data[1].get("pad_weight")):
        raise ValueError(f"a {kind!r} patch of a part of the bias" if offset else f"a {kind!r} patch of the bias")
    if math.prod(data[0].shape) != module.out_features or data[0].ndim != 1:
        raise ValueError(f"the bias difference is {list(data[0].shape)}, the layer has {module.out_features} outputs")
    if function is None:
        return data[0]
    order = row_order(function, module.out_features)
    if order is None:
        raise ValueError("ComfyUI converts the bias by a function of its own")
    return data[0][order]
