"""The one stack of LoRAs on a patcher: what is in it, and its branches as a model of their own, as the host has it."""

from __future__ import annotations

import copy
import dataclasses
import uuid
from collections import OrderedDict
from dataclasses import dataclass

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.quant_ops
import torch
from torch import Tensor

from ..adapters import Change, Dense, Form, form
from ..branch import Branches, Part, Rows, Strengths
from ..injection import Injection, module_at
from ..schedule import Schedule
from . import scheduling, wiring
from .carrying import cast

KEPT = "_tessera_kept"  # on a model: Kept
STACK = "tessera_stack"  # attachment of a patcher: Stack
MOST_KEPT, MOST_BUILT = 24, 3  # stacks that a model remembers; those whose factors were joined already


@dataclass(frozen=True)
class Placed:
    """One change at its layer."""

    layer: str  # path of the module
    rows: Rows
    change: Change
    order: Tensor | None = None  # of the rows that the host puts the change's rows in


@dataclass(frozen=True, eq=False)
class Entry:
    """One LoRA, of a file or of ComfyUI's own nodes: the same identity has the same effect."""

    identity: tuple
    name: str
    changes: list[Placed]
    correction: bool = False  # what quantization lost: its own rounding counts less than a user's LoRA's
    absorbed: bool = False  # part of the file: without it the weights are wrong
    tolerance: float = 0.02  # that reducing may lose of a change, relative; 0: nothing

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(placed.layer for placed in self.changes))


Item = tuple[Entry, float, Schedule | None]


@dataclass(frozen=True, eq=False)
class Stack:
    """What a patcher carries. Immutable: clones share it."""

    key: str
    items: tuple[Item, ...]
    strengths: Strengths


@dataclass(eq=False)
class Made:
    """A stack's branches for one model, whatever the strengths."""

    side: comfy.model_patcher.ModelPatcher
    entries: tuple[Entry, ...]
    forms: dict[tuple, list[Form]]  # by identity of the entry


class Kept:
    """The last stacks of a model, so that moving a slider reads, fits and joins nothing. Freed with the model."""

    def __init__(self):
        self.stacks: OrderedDict[tuple, Made] = OrderedDict()
        self.quantized: frozenset[str] | None = None  # paths of its quantized layers

    def __deepcopy__(self, memo):
        return Kept()

    def entry(self, identity: tuple) -> Entry | None:
        return next((e for made in self.stacks.values() for e in made.entries if e.identity == identity), None)

    def forms(self, identity: tuple) -> list[Form] | None:
        return next((made.forms[identity] for made in self.stacks.values() if identity in made.forms), None)

    def add(self, key: tuple, made: Made) -> None:
        self.stacks[key] = made
        built = [k for k, other in self.stacks.items() if other.side.model.built]
        many = max(len(self.stacks) - MOST_KEPT, 0)
        for old in [*built[: max(len(built) - MOST_BUILT, 0)], *list(self.stacks)[:many]]:
            self.stacks.pop(old, None)


def kept(patcher) -> Kept:
    """What the patcher's model remembers."""
    return patcher.model.__dict__.setdefault(KEPT, Kept())


def entries(patcher) -> list[Item]:
    """(entry, strength, schedule) of everything in a patcher's stack."""
    stack: Stack | None = patcher.get_attachment(STACK)
    return [] if stack is None else list(stack.items)


def attach(patcher, entry: Entry, strength: float, schedule: Schedule | None = None) -> None:
    """Adds an entry to a patcher's stack, in place. No weight of the model changes, none is reloaded."""
    if strength != 0:  # at 0 the model stays itself, bit for bit
        replace(patcher, [*entries(patcher), (entry, float(strength), schedule)])


def summary(patcher, entry: Entry) -> list[tuple[Placed, Form]]:
    """How each change of an entry rides beside its layer."""
    return list(zip(entry.changes, _forms(patcher, entry), strict=True))


def replace(patcher, items: list[Item]) -> None:
    """Gives a patcher that stack in the place of the one it has; their order changes no bit. None: no stack."""
    _drop(patcher)
    if not items:
        return
    items.sort(key=lambda item: (str(item[0].identity), item[1], str(item[2])))
    made = _made(patcher, [item[0] for item in items])
    key, strengths = f"tessera.{uuid.uuid4().hex}", Strengths(strength for _, strength, _ in items)
    injection, side = Injection(key, strengths, cast), made.side.clone()
    patcher.set_additional_models(key, [side])
    patcher.set_injections(key, [comfy.patcher_extension.PatcherInjection(injection.inject, injection.eject)])
    patcher.set_attachments(STACK, Stack(key, tuple(items), strengths))
    if is_text_encoder(patcher):
        options = patcher.model_options.setdefault("transformer_options", {})
        options.setdefault("patches", {})[key] = [_Carried(side)]
    if any(schedule is not None for _, _, schedule in items):
        schedules = [schedule for _, _, schedule in items]
        scheduling.conduct(patcher, key, scheduling.Conductor(strengths, strengths.values, schedules))


def _drop(patcher) -> None:
    stack: Stack | None = patcher.get_attachment(STACK)
    if stack is not None:
        patcher.remove_injections(stack.key)
        patcher.remove_additional_models(stack.key)
        patcher.model_options.get("transformer_options", {}).get("patches", {}).pop(stack.key, None)
        scheduling.dismiss(patcher, stack.key)
        patcher.remove_attachments(STACK)


class _Carried:
    """Makes ComfyUI load a text encoder's branches with it: encoding loads what patches carry, no additional models."""

    def __init__(self, side: comfy.model_patcher.ModelPatcher):
        self.side = side

    def models(self) -> list[comfy.model_patcher.ModelPatcher]:
        return [self.side]


def is_text_encoder(patcher) -> bool:
    return not hasattr(patcher.model, "diffusion_model")


def _made(patcher, stacked: list[Entry]) -> Made:
    """The branches of these entries, made once per model."""
    memory, key = kept(patcher), (patcher.load_device, *(entry.identity for entry in stacked))
    if key in memory.stacks:
        memory.stacks.move_to_end(key)
        return memory.stacks[key]
    forms = {entry.identity: _forms(patcher, entry) for entry in stacked}
    parts: dict[str, list[Part]] = {}
    for number, entry in enumerate(stacked):
        for placed, found in zip(entry.changes, forms[entry.identity], strict=True):
            part = Part(number, found, placed.rows, not entry.correction, entry.absorbed)
            parts.setdefault(placed.layer, []).append(part)
    shapes = {name: shape_of(module_at(patcher.model, name)) for name in parts}
    branches = Branches(parts, shapes, comfy.ops.manual_cast.Linear, wiring.sharing(patcher.model), _dtype(patcher))
    side = comfy.model_patcher.ModelPatcher(branches, patcher.load_device, patcher.offload_device, branches.planned())
    side.cached_patcher_init = (_copy_branches, (branches, patcher.load_device, patcher.offload_device))
    made = Made(side, tuple(stacked), forms)
    memory.add(key, made)
    return made


def _copy_branches(module, load_device, offload_device, disable_dynamic=False):
    """A fresh patcher of copied branches, for deep clones on other devices."""
    return comfy.model_patcher.ModelPatcher(copy.deepcopy(module), load_device, offload_device)


def _forms(patcher, entry: Entry) -> list[Form]:
    """How each change rides beside its layer, found once per model: fitting one takes seconds."""
    known = kept(patcher).forms(entry.identity)
    if known is not None:
        return known
    found = []
    for placed in entry.changes:
        comfy.model_management.throw_exception_if_processing_interrupted()
        shape = shape_of(module_at(patcher.model, placed.layer))
        shape = shape if placed.rows is None else (placed.rows[1], shape[1])

        def weight(placed=placed):
            whole = base_weight(patcher, placed.layer)
            return whole if placed.rows is None else whole.narrow(0, *placed.rows)

        device = str(patcher.load_device)
        found.append(_ordered(form(placed.change, shape, weight, entry.tolerance, device), placed, entry.name))
    return found


def _ordered(found: Form, placed: Placed, name: str) -> Form:
    """The form with its rows in the host's order. Raises ValueError for parts that follow the layer's own rows."""
    if placed.order is None:
        return found
    if any(not isinstance(extra, Dense) or extra.fixed for extra in found.extras):
        raise ValueError(f"{name}: {placed.layer}: ComfyUI changes the order of this layer's rows, which {found.kind} "
                         "cannot follow; load this LoRA with a model that is not quantized")  # fmt: skip
    order = placed.order
    pair = found.pair and dataclasses.replace(found.pair, up=found.pair.up[order])
    extras = tuple(Dense(extra.weight[order]) for extra in found.extras)
    return dataclasses.replace(found, pair=pair, extras=extras, bias=None if found.bias is None else found.bias[order])


def base_weight(patcher, layer: str) -> Tensor:
    """The fp32 weight [out, in] that a layer stands for on the CPU: decoded, its smoothing undone, no LoRA merged."""
    module, key = module_at(patcher.model, layer), f"{layer}.weight"
    merged = patcher.backup.get(key)
    weight = module.weight if merged is None else merged.weight
    value = weight.dequantize() if isinstance(weight, comfy.quant_ops.QuantizedTensor) else weight
    value = value.detach().to("cpu", torch.float32)
    scale = getattr(module, "pre_quant_scale", None)
    return value if scale is None else value * scale.detach().to("cpu", torch.float32)


def shape_of(module: torch.nn.Module) -> tuple[int, int]:
    """[out, in] of a linear layer."""
    return module.out_features, module.in_features


def _dtype(patcher) -> torch.dtype | None:
    """What factors are kept in: off the CPU what the model computes in, so that no step converts them; on it the
    file's own."""
    if patcher.load_device.type == "cpu":
        return None
    dtype = patcher.model_dtype() if hasattr(patcher.model, "get_dtype") else torch.bfloat16
    cast_to = getattr(patcher.model, "manual_cast_dtype", None)
    return cast_to or (dtype if dtype in (torch.bfloat16, torch.float16, torch.float32) else torch.bfloat16)
