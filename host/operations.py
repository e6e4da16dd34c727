"""The host's mixed-precision operations with a `Linear` of ours: the kernel of its plan, branches in the product."""

from __future__ import annotations

import dataclasses
import json
import logging
import weakref
from collections import Counter

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import torch
from torch import Tensor

from .. import transcode
from ..branch import Branch, SideBranch
from ..checkpoint import BRANCH
from ..formats import FORMATS, Format, Plain, TensorSpec, from_record, marker
from ..kernels import dispatch, extended, kextension, linear
from ..kernels.dispatch import Plan
from ..kernels.facts import DeviceFacts
from ..kernels.linear import LowRankBranch, Stored
from ..kernels.ops import PADS
from ..kernels.reference import round_up
from ..quantization.lowrank import LowRank
from . import fp8_row
from .smoothed import Smoothed

log = logging.getLogger("tessera")

KINDS = {
    "TensorCoreNVFP4Layout": "nvfp4", "TensorCoreMXFP8Layout": "mxfp8", "TensorWiseINT8Layout": "int8",
    "TensorCoreFP8E4M3Layout": "fp8", "TensorCoreFP8E5M2Layout": "fp8", fp8_row.LAYOUT: "fp8_row",
}  # fmt: skip
EXTENDED = ("nvfp4", "mxfp8", "fp8_row")  # kernels that take branches in reserved columns of the weight
OLD = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")


@dataclasses.dataclass
class Loading:
    """What every layer of one file shares while it is loaded; `plans` collects what was decided."""

    facts: DeviceFacts
    speed: str = "auto"
    room: bool = True
    device: str = "cpu"  # where transcoding computes
    cache: transcode.Cache | None = None
    plans: dict[str, tuple[str, Plan]] = dataclasses.field(default_factory=dict)
    costs: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)  # layer -> (distance, added error)

    def plan(self, format: Format, shape: tuple[int, int]) -> Plan:
        return dispatch.plan(format, self.facts, self.speed, shape, self.room)


def operations(compute: torch.dtype, loading: Loading, text_encoder: bool = False):
    """The host's mixed-precision ops with a `Linear` that runs our plans."""
    facts, speed = loading.facts, loading.speed
    disabled = {
        name for name, cls in FORMATS.items()
        if not issubclass(cls, Plain) and dispatch.plan(cls(), facts, speed).kernel != dispatch.HOST
    }  # fmt: skip
    base = comfy.ops.mixed_precision_ops({}, compute, full_precision_mm=text_encoder, disabled=disabled)

    class Linear(Planned, Smoothed, base.Linear):
        tessera_loading = loading

    class Operations(base):
        pass

    Operations.Linear = Linear
    return Operations


class Planned:
    """For a `Linear` of the host's: plans the layer when it is loaded, and multiplies as the plan says.

    Where the host must decode the weight (LoRA patches on offloaded layers, training, forced casts) its own forward
    runs, and branches are added behind it.
    """

    tessera_loading: Loading
    tessera_plan: Plan | None = None
    tessera_branch: LowRank | None = None  # of an absorb file, until the loader attaches it
    tessera_format: Format | None = None  # the layer is kept in
    tessera_code_max: int = 127

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tessera_branches: list[tuple[Branch, SideBranch]] = []
        self.tessera_runs: Counter[str] = Counter()  # forward calls by the kernel that ran
        self._scanned = lambda: None
        self._encoded: tuple = (None, None)  # (which branches, Extended or why not)
        self._placed: tuple = (lambda: None, None)  # (weak: the buffer, the Extended that stands in it)

    # Loading

    def _load_from_state_dict(self, state_dict, prefix, *args):
        parts = [state_dict.pop(f"{prefix}{part}", None) for part in BRANCH]
        if parts[0] is not None:
            self.tessera_branch = LowRank(*parts)
        format = _format(state_dict.get(f"{prefix}comfy_quant"))
        plan = None if format is None else self.tessera_loading.plan(format, self._orig_shape)
        self.tessera_format = format
        if plan is not None and plan.path == dispatch.TRANSCODE:
            plan = self._transcode(state_dict, prefix, format, plan)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if plan is None:
            return
        if plan.target == "fp8_row":
            fp8_row.adopt(self)
        if plan.kernel in EXTENDED:
            self._reserve(plan.kernel)
        self.tessera_plan, self.tessera_code_max = plan, plan.code_max
        # what the host's own forward does, where it has to: decode, unless its kernel is the plan
        self._full_precision_mm = (
            self._full_precision_mm or plan.kernel != dispatch.HOST or plan.path == dispatch.DECODE
        )
        self.tessera_loading.plans[prefix.rstrip(".")] = (format.label, plan)

    def _transcode(self, state_dict, prefix: str, format: Format, plan: Plan) -> Plan:
        """Puts the layer into the state dict as its target format; the plan that it then has."""
        entries = {suffix: state_dict[f"{prefix}{suffix}"] for suffix in OLD if f"{prefix}{suffix}" in state_dict}
        name, loading = prefix.rstrip("."), self.tessera_loading
        target = transcode.target_format(plan, self.in_features)
        key = transcode.digest(entries, plan) if loading.cache is not None else ""
        made = loading.cache.read(name, key, target) if loading.cache is not None else None
        if made is None:
            made = transcode.transcode(format, entries, self._orig_shape, plan, loading.device)
            if loading.cache is not None:
                loading.cache.add(name, key, made)
        if made.added > plan.bound:
            return dataclasses.replace(
                dispatch.instead(plan, loading.facts),
                reason=f"{plan.target} would add {made.added:.4f} to the weight error, more than {plan.bound}",
            )
        loading.costs[name] = (made.distance, made.added)
        for suffix in entries:
            del state_dict[f"{prefix}{suffix}"]
        state_dict.update({f"{prefix}{suffix}": tensor for suffix, tensor in made.entries.items()})
        record = {"format": "float8_e4m3fn"} if plan.target == "fp8_row" else made.format.record()
        state_dict[f"{prefix}comfy_quant"] = marker(record)
        self.tessera_format = made.format
        return plan

    def _reserve(self, kind: str) -> None:
        """Gives the packed weight columns for branches: to the host they are padding."""
        rank = 0 if self.tessera_branch is None else self.tessera_branch.rank
        columns = min(kextension.MOST, max(kextension.STEP, round_up(3 * rank, kextension.STEP)))
        weight, params = self.weight, self.weight._params
        tiled = "block_scale" if kind == "nvfp4" else "scale"
        qdata, scale = kextension.reserve(kind, weight._qdata, getattr(params, tiled), columns)
        params = dataclasses.replace(params, **{tiled: scale})
        wide = comfy.quant_ops.QuantizedTensor(qdata, weight._layout_cls, params)
        self.weight = torch.nn.Parameter(wide, requires_grad=False)

    def _extension(self, weight) -> int:
        """Reserved columns of a packed weight; none where the host has put another in its place."""
        kind = KINDS[weight._layout_cls]
        if kind not in EXTENDED or self.tessera_plan.kernel != kind:
            return 0
        columns = weight._qdata.shape[1] * (2 if kind == "nvfp4" else 1)
        return columns - round_up(self.in_features, PADS[kind][1])

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        found = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        weight = self.weight
        columns = self._extension(weight) if isinstance(weight, comfy.quant_ops.QuantizedTensor) and (
            self.tessera_plan is not None) else 0  # fmt: skip
        if columns:
            keys = f"{prefix}weight", f"{prefix}weight_scale"
            pair = kextension.strip(KINDS[weight._layout_cls], found[keys[0]], found[keys[1]], columns)
            found.update(zip(keys, pair, strict=True))
        return found

    # Running

    def forward(self, input, *args, **kwargs):
        if not self._plan_runs(input):
            return self._host_forward(input, *args, **kwargs)
        comfy.ops.run_every_op()
        x = input
        scale = getattr(self, "pre_quant_scale", None)
        if scale is not None:
            x = input * comfy.model_management.cast_to_device(scale, input.device, input.dtype)
        weight, bias, stream = comfy.ops.cast_bias_weight(
            self, input=None, dtype=self.weight.dtype, device=input.device, bias_dtype=input.dtype, offloadable=True,
            compute_dtype=input.dtype, want_requant=True,
        )  # fmt: skip
        y = self._multiply(x, input, weight, bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return y

    def _plan_runs(self, input: Tensor) -> bool:
        return (
            self.tessera_plan is not None
            and self.tessera_plan.kernel != dispatch.HOST
            and isinstance(self.weight, comfy.quant_ops.QuantizedTensor)
            and not isinstance(input, comfy.quant_ops.QuantizedTensor)
            and not input.requires_grad
            and not getattr(self, "comfy_force_cast_weights", False)
            and not self.weight_function
            and not self.bias_function
        )

    def _host_forward(self, input, *args, **kwargs):
        y = super().forward(input, *args, **kwargs)
        if self.tessera_plan is not None:
            self._count("host" if self.tessera_plan.kernel == dispatch.HOST else "host, decoded")
        return _added(y, input, self.tessera_branches)

    def _multiply(self, x: Tensor, input: Tensor, weight, bias: Tensor | None) -> Tensor:
        """The product of x, and the branches of `input`: the same, but for smoothing."""
        if not isinstance(weight, comfy.quant_ops.QuantizedTensor):  # the host has merged a LoRA while casting
            self._count("host, decoded")
            y = torch.nn.functional.linear(x, weight, bias)
            fused, beside = None, self.tessera_branches
        else:
            stored = self._stored(weight, x)
            fused, beside = self._joined(input, stored) if x is input else (None, self.tessera_branches)
            self._count(self.tessera_plan.kernel)
            y = linear.run(self.tessera_plan.kernel, x, stored, bias, fused)
        return _added(y, input, beside)

    def _joined(self, x: Tensor, stored: Stored) -> tuple[LowRankBranch | None, list[tuple[Branch, SideBranch]]]:
        """(all branches of the whole output as one, concatenated in rank; those that change only some rows)."""
        whole = [(item, side) for item, side in self.tessera_branches if item.fuses]
        beside = [(item, side) for item, side in self.tessera_branches if not item.fuses]
        for item, _ in whole:
            item.count()
        cast = comfy.model_management.cast_to_device
        parts = [
            LowRankBranch(cast(item.down.weight, x.device, x.dtype), cast(item.up.weight, x.device, x.dtype),
                          side.strength_on(x.device)) for item, side in whole
        ]  # fmt: skip
        if not parts:
            return None, beside
        joined = LowRankBranch.join(parts)
        return (self._carried(stored, joined, whole) if stored.extension else joined), beside

    def _carried(self, stored: Stored, branch: LowRankBranch, whole: list) -> LowRankBranch:
        """The branch with its codes in the weight's reserved columns, where they fit; else as it was."""
        which = tuple(id(item) for item, _ in whole), stored.qdata.device, stored.extension
        if self._encoded[0] != which:
            ranks = [item.down.weight.shape[0] for item, _ in whole]
            self._encoded = which, extended.encode(stored, branch, ranks, [side.absorbed for _, side in whole])
        found = self._encoded[1]
        if isinstance(found, str):
            return branch
        buffer, standing = self._placed
        if buffer() is not stored.qdata or standing is not found:
            if torch.compiler.is_compiling():  # a graph must not write into a weight
                return branch
            extended.place(stored, found)
            self._placed = weakref.ref(stored.qdata), found
        return dataclasses.replace(branch, extended=found)

    def _stored(self, weight, x: Tensor) -> Stored:
        params, kind = weight._params, KINDS[weight._layout_cls]
        scale = getattr(self, "input_scale", None)
        if scale is not None:
            scale = comfy.model_management.cast_to_device(scale, x.device, None)
        group = params.convrot_groupsize if getattr(params, "convrot", False) else 0
        return Stored(kind, self._orig_shape, weight._qdata, params.scale, getattr(params, "block_scale", None), group,
                      self._safe_codes() if kind == "int8" else 127, scale, self._extension(weight))  # fmt: skip

    def _safe_codes(self) -> int:
        """The largest int8 code: that of the plan, unless the host has put another weight in its place."""
        if torch.compiler.is_compiling() or self.tessera_plan.code_max == 127:
            return self.tessera_code_max
        codes = self.weight._qdata
        if self._scanned() is not codes:
            self._scanned = weakref.ref(codes)
            self.tessera_code_max = max(-int(codes.min()), int(codes.max()), 1)
        return self.tessera_code_max

    def set_weight(self, *args, **kwargs):
        self.tessera_code_max = 127  # a merged LoRA's codes use the whole range
        return super().set_weight(*args, **kwargs)

    def _count(self, kernel: str) -> None:
        if not torch.compiler.is_compiling():  # a number that keeps changing would make it start over
            self.tessera_runs[kernel] += 1

    def _forward(self, input, weight, bias):
        if self._full_precision_mm and isinstance(weight, comfy.quant_ops.QuantizedTensor):
            weight = weight.dequantize()  # the host leaves int8 to its kernel even where a decode is asked for
        return super()._forward(input, weight, bias)

    # Branches

    def attach_branch(self, item: Branch, side: SideBranch) -> Detach:
        """Adds a branch to the product, at the side's strength; the handle takes it out again."""
        pair = (item, side)
        self.tessera_branches, self._encoded = [*self.tessera_branches, pair], (None, None)
        return Detach(self, pair)


class Detach:
    """What `register_forward_hook` gives, for a branch inside a layer."""

    def __init__(self, layer: Planned, pair: tuple[Branch, SideBranch]):
        self._layer, self._pair = weakref.ref(layer), pair

    def remove(self) -> None:
        layer = self._layer()
        if layer is not None:
            layer.tessera_branches = [pair for pair in layer.tessera_branches if pair is not self._pair]
            layer._encoded = (None, None)


def _added(y: Tensor, x: Tensor, branches: list[tuple[Branch, SideBranch]]) -> Tensor:
    for item, side in branches:
        y = item.add(y, x, side.strength_on(torch.device("cpu")))  # 0-d of the CPU: meets any device without a copy
    return y


def _format(marked: Tensor | None) -> Format | None:
    if marked is None:
        return None
    record = json.loads(marked.numpy().tobytes())
    known = record.get("format") in FORMATS and "num_experts" not in record
    return from_record(record, {"weight_scale": TensorSpec(torch.float32, (1, 1))}) if known else None
