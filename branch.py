"""Low-rank branches beside the layers of a model: exact, unmerged, at any strength.

The weights live in a module of their own, so that the host counts, offloads and clones them; forward hooks add
strength * (up(down(x)) + bias) to a layer's output; strength is a 0-d tensor that belongs to one attachment, not to the
weights.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .quantization.lowrank import LowRank

log = logging.getLogger("tessera")

Rows = tuple[int, int] | None
Targets = Mapping[str, tuple[str, Rows]]
FUSED = "TensorWiseINT8Layout"  # the host's `linear_input_act` multiplies these without calling the layer
HOOKS = "_tessera_hooks"  # on the model: attachment key -> (weak patcher, hook handles)


class Branch(nn.Module):
    """up(down(x)) + bias for one layer, or for `rows` (start, length) of its output."""

    def __init__(self, pair: LowRank, rows: Rows, linear: type[nn.Module]):
        super().__init__()
        self.down = _linear(linear, pair.down)
        self.up = _linear(linear, pair.up, pair.bias)
        self.rows = rows
        self.fired = 0

    @property
    def fuses(self) -> bool:
        """Whether it changes the whole output by a product alone, so that it can be part of the layer's own product."""
        return self.rows is None and self.up.bias is None

    def count(self) -> None:
        """Notes that it was used."""
        if self.fired < 2:  # enough to tell; a number that keeps changing would make torch.compile start over
            self.fired += 1

    def add(self, output: Tensor, x: Tensor, strength: Tensor) -> Tensor:
        """output [..., out] + strength * branch(x [..., in]), in x's dtype."""
        self.count()
        # strength meets the r-wide middle, where it costs least; on any device without a copy, as it is 0-d
        biased = self.up.bias is not None  # and is to be scaled too
        delta = self.up(self.down(x)) * strength if biased else self.up(self.down(x) * strength)
        delta = delta.to(output.dtype)
        if self.rows is None:
            return output + delta
        start, length = self.rows
        return torch.cat((output[..., :start], output[..., start : start + length] + delta,
                          output[..., start + length :]), dim=-1)  # fmt: skip


class Branches(nn.Module):
    """All branches of one LoRA file; `layers` says, in the same order, which module each belongs to."""

    def __init__(self, pairs: list[tuple[str, LowRank, Rows]], linear: type[nn.Module]):
        super().__init__()
        self.layers = [name for name, _, _ in pairs]
        self.items = nn.ModuleList(Branch(pair, rows, linear) for _, pair, rows in pairs)


@dataclass
class SideBranch:
    """One attachment: its key on patchers and its strength. Everything else is taken from the patcher at inject time,
    so that clones, deep clones and copies on other devices get their own hooks."""

    key: str
    strength: float
    absorbed: bool = False  # the branch is part of the weights: without it the layer is wrong, not less exact
    _tensor: Tensor = field(init=False)
    _copies: dict[torch.device, Tensor] = field(init=False, default_factory=dict)
    _warned: bool = field(init=False, default=False)

    def __post_init__(self):
        self._tensor = torch.tensor(float(self.strength))

    def set_strength(self, strength: float) -> None:
        """Takes effect at the next forward; nothing is reloaded or recompiled."""
        for tensor in (self._tensor, *self._copies.values()):
            tensor.fill_(float(strength))

    def strength_on(self, device: torch.device) -> Tensor:
        """The strength as a 0-d tensor of that device, the same one at every call: kernels and graphs read it there."""
        if device.type == "cpu":
            return self._tensor
        if device not in self._copies:
            self._copies[device] = self._tensor.to(device)
        return self._copies[device]

    def inject(self, patcher) -> None:
        """Hooks this patcher's model; an earlier attachment of the same key is replaced."""
        registry = patcher.model.__dict__.setdefault(HOOKS, {})
        for handle in registry.pop(self.key, (None, ()))[1]:
            handle.remove()
        branches: Branches = patcher.get_additional_models_with_key(self.key)[0].model
        modules, handles = dict(patcher.model.named_modules()), []  # one walk: faster than a path per layer
        for name, item in zip(branches.layers, branches.items, strict=True):
            item.fired = 0
            attach = getattr(modules[name], "attach_branch", None)  # a layer of ours takes it into its own product
            handles.append(attach(item, self) if attach else modules[name].register_forward_hook(self._hook(item)))
        registry[self.key] = (weakref.ref(patcher), handles)

    def eject(self, patcher) -> None:
        """Unhooks the model; does nothing if another patcher has hooked it since."""
        registry = patcher.model.__dict__.get(HOOKS, {})
        if self.key not in registry or registry[self.key][0]() is not patcher:
            return
        for handle in registry.pop(self.key)[1]:
            handle.remove()
        self._warn_unserved(patcher)

    def _hook(self, item: Branch):
        return lambda module, inputs, output: item.add(output, inputs[0], self._tensor)

    def _warn_unserved(self, patcher) -> None:
        """Some hosts run a fused linear that passes hooks by (`linear_input_act`): say so, once per attachment."""
        branches: Branches = patcher.get_additional_models_with_key(self.key)[0].model
        silent = [name for name, item in zip(branches.layers, branches.items, strict=True) if not item.fired]
        # twice: a run that was cancelled inside its first step has silent layers too
        if not silent or self._warned or max(item.fired for item in branches.items) < 2:
            return
        self._warned = True
        fused = [name for name in silent if _may_be_fused(patcher.model.get_submodule(name))]
        if self.absorbed and fused:
            log.error("Tessera: %d of %d layers ran past their absorbed branch, or not at all (first: %s). In ComfyUI "
                      "0.30 and later some models run int8 layers by a fused kernel that no branch can join, and "
                      "WITHOUT THEIR BRANCH THEY ARE WRONG: do not trust this picture. Quantize these layers again in "
                      "nvfp4 or mxfp8, or the model in correction mode",
                      len(fused), len(branches.layers), fused[0])  # fmt: skip
        elif not self.absorbed:
            log.warning("Tessera: %d of %d layers ran past their branch, or not at all (first: %s): they are not "
                        "corrected", len(silent), len(branches.layers), silent[0])  # fmt: skip
        else:
            log.warning("Tessera: %d of %d absorbed branches were not used (first: %s): their layers did not run; if "
                        "another extension runs them in its own way, the picture is wrong, remove that extension",
                        len(silent), len(branches.layers), silent[0])  # fmt: skip


def _may_be_fused(module: nn.Module) -> bool:
    return getattr(module, "layout_type", None) == FUSED


def match(file: str, pairs: Mapping[str, LowRank], targets: Targets, model: nn.Module):
    """([(module path, pair, rows)], base names that fit nothing).

    Raises ValueError if no name fits, or if a pair does not fit the layer it names.
    """
    matched, unmatched = [], []
    for base, pair in pairs.items():
        if base not in targets:
            unmatched.append(base)
            continue
        name, rows = targets[base]
        module = model.get_submodule(name)
        _check_fit(file, base, pair, module, rows)
        matched.append((name, pair, rows))
    if not matched:
        first = f"; first unmatched key {unmatched[0]}" if unmatched else ""
        raise ValueError(
            f"{file}: 0 of {len(pairs)} LoRA layers match this model{first}; it was made for another model"
        )
    return matched, unmatched


def _check_fit(file: str, base: str, pair: LowRank, module: nn.Module, rows: Rows) -> None:
    shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if None in shape:
        raise ValueError(
            f"{file}: {base}: is a {type(module).__name__}, not a linear layer; only those can be corrected"
        )
    wanted = (rows[1] if rows else shape[0], shape[1])
    found = (pair.up.shape[0], pair.down.shape[1])
    if found != wanted:
        raise ValueError(
            f"{file}: {base}: the LoRA is {list(found)}, the layer {list(wanted)}; it was made for another model"
        )


def _linear(cls: type[nn.Module], weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    layer = cls(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
