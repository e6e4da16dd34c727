"""A quantized `Linear` that runs its plan: decided, transcoded and given room for branches when it is loaded."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections import Counter
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import torch
from torch import Tensor

from .. import transcode
from ..checkpoint import BRANCH
from ..formats import FORMATS, Format, TensorSpec, from_record, marker
from ..kernels import dispatch, linear
from ..kernels.dispatch import Plan
from ..kernels.linear import Gated, Stored
from ..quantization.lowrank import LowRank
from . import layouts, rounding
from .carrying import EXTENDED, KINDS, Carrying, cast

if TYPE_CHECKING:
    from .operations import Loading

EXACT = "decoded, exact step"  # how calls are counted that a precision schedule made exact
ENTRIES = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")


class Planned(Carrying):
    """For a `Linear` of the host's: plans the layer when it is loaded, and multiplies as the plan says.

    Where the host must decode the weight (LoRA patches on offloaded layers, training, forced casts) its own forward
    runs, and branches are added behind it.
    """

    tessera_loading: Loading
    tessera_branch: LowRank | None = None  # of an absorb file, until the loader attaches it
    tessera_exact = False  # this call: decode the kept weight, whatever the plan (host/precision.py)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tessera_runs: Counter[str] = Counter()  # forward calls by the kernel that ran
        self._scanned = lambda: None
        self._code_max = 127

    # Loading

    def _load_from_state_dict(self, state_dict, prefix, *args):
        parts = [state_dict.pop(f"{prefix}{part}", None) for part in BRANCH]
        if parts[0] is not None:
            self.tessera_branch = LowRank(*parts)
        format = read_format(state_dict.get(f"{prefix}comfy_quant"))
        plan = None if format is None else self.tessera_loading.plan(format, self._orig_shape)
        self.tessera_format = format
        if plan is not None and plan.path == dispatch.TRANSCODE:
            plan = self._transcode(state_dict, prefix, format, plan)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if plan is None:
            return
        if plan.path == dispatch.TRANSCODE:
            layouts.adopt(self, plan.target)
        if plan.kernel in EXTENDED:
            self.reserve(plan.kernel, 0 if self.tessera_branch is None else self.tessera_branch.rank)
        self.tessera_plan, self._code_max = plan, plan.code_max
        # what the host's own forward does, where it has to run: decode, unless its kernel is the plan
        native = plan.kernel == dispatch.HOST and plan.path != dispatch.DECODE
        self._full_precision_mm = not native
        self.tessera_loading.plans[prefix.rstrip(".")] = (format.label, plan)

    def _transcode(self, state_dict, prefix: str, format: Format, plan: Plan) -> Plan:
        """Puts the layer into the state dict as its target format; the plan that it then has."""
        entries = {suffix: state_dict[f"{prefix}{suffix}"] for suffix in ENTRIES if f"{prefix}{suffix}" in state_dict}
        name, loading = prefix.rstrip("."), self.tessera_loading
        made = _made(name, format, entries, self._orig_shape, plan, loading)
        if made.added > plan.bound:
            why = f"{plan.target} would add {made.added:.2%} to the weight error, more than {plan.bound:.2%}"
            return dataclasses.replace(dispatch.instead(plan, loading.facts), reason=why)
        loading.costs[name] = (made.distance, made.added)
        for suffix in entries:
            del state_dict[f"{prefix}{suffix}"]
        state_dict.update({f"{prefix}{suffix}": tensor for suffix, tensor in made.entries.items()})
        record = {"format": "float8_e4m3fn"} if plan.target == "fp8_row" else made.format.record()
        state_dict[f"{prefix}comfy_quant"] = marker(record)
        self.tessera_format = made.format
        return plan

    @property
    def comfy_force_cast_weights(self) -> bool:
        """The host sets it on every text encoder, to get fp32 outputs: those it gets from our kernels, too."""
        return vars(self).get("_tessera_forced", False) and not self.tessera_loading.text_encoder

    @comfy_force_cast_weights.setter
    def comfy_force_cast_weights(self, forced: bool) -> None:
        vars(self)["_tessera_forced"] = forced

    # Running

    def forward(self, input, *args, **kwargs):
        if not self._plan_runs(input):
            return self._host_forward(linear.dense(input), *args, **kwargs)
        comfy.ops.run_every_op()
        given, scale = input, getattr(self, "pre_quant_scale", None)
        input = x = self._taken(given)
        if scale is not None:
            input = linear.dense(input)
            scale = comfy.model_management.cast_to_device(scale, given.device, given.dtype)
            x = self._taken(linear.dense(given) * scale)
        weight, bias, stream = comfy.ops.cast_bias_weight(
            self, input=None, dtype=self.weight.dtype, device=input.device, bias_dtype=input.dtype, offloadable=True,
            compute_dtype=given.dtype, want_requant=True,
        )  # fmt: skip
        y = self._multiply(x, input, weight, bias, given)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return y.to(given.dtype)

    def _taken(self, input: Tensor | Gated) -> Tensor | Gated:
        """The input in the dtype that kernels take."""
        dtype = self.tessera_loading.taken(self.tessera_plan.kernel, input.dtype)
        return input if input.dtype == dtype else linear.dense(input).to(dtype)

    def _plan_runs(self, input: Tensor | Gated) -> bool:
        return (
            self.tessera_plan is not None
            and not self.tessera_exact
            and self.tessera_plan.kernel != dispatch.HOST
            and isinstance(self.weight, comfy.quant_ops.QuantizedTensor)
            and not isinstance(input, comfy.quant_ops.QuantizedTensor)
            and not input.requires_grad
            and not self.comfy_force_cast_weights
            and not self.weight_function
            and not self.bias_function
        )

    def _host_forward(self, input, *args, **kwargs):
        plan = self.tessera_plan
        native = plan is not None and plan.kernel == dispatch.HOST and not self._full_precision_mm
        y = super().forward(self._taken(input) if native else input, *args, **kwargs).to(input.dtype)
        if plan is not None:
            self._count("host" if native else EXACT if self.tessera_exact else "host, decoded")
        return self.added(y, input, self._bias(input))

    def _multiply(self, x: Tensor | Gated, input: Tensor | Gated, weight, bias: Tensor | None,
                  given: Tensor | Gated) -> Tensor:  # fmt: skip
        """The product of x, and the branches of `input`: the same, but for smoothing; siblings share what was given."""
        if not isinstance(weight, comfy.quant_ops.QuantizedTensor):  # the host has merged a LoRA while casting
            self._count("host, decoded")
            y = torch.nn.functional.linear(linear.dense(x), weight.to(x.dtype), bias)
            return self.added(y, linear.dense(input), bias)
        kernel, stored = self.tessera_plan.kernel, self._stored(weight, x)
        self._count(kernel)
        item, strengths = self.tessera_branch_pair or (None, None)
        if item is not None and (x is not input or item.needs_base):  # a branch sees the input as it is, unsmoothed
            return self.added(linear.run(kernel, x, stored, bias), linear.dense(input), bias)
        if item is not None:
            item.count()
            bias = item.biased(bias, x, strengths, cast)
        branch, prepared = (None, None) if x is not input else self.joined(kernel, x, stored, given)
        y = linear.run(kernel, x, stored, bias, branch, prepared)
        return y if item is None else item.beside(y, linear.dense(x) if item.extras else x, strengths, None)

    def _bias(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else cast(self.bias, x.device, x.dtype)

    def _stored(self, weight, x: Tensor | Gated) -> Stored:
        params, kind = weight._params, KINDS[weight._layout_cls]
        scale = getattr(self, "input_scale", None)
        if scale is not None:
            scale = comfy.model_management.cast_to_device(scale, x.device, None)
        group = params.convrot_groupsize if getattr(params, "convrot", False) else 0
        return Stored(kind, self._orig_shape, weight._qdata, params.scale, getattr(params, "block_scale", None), group,
                      self._safe_codes() if kind == "int8" else 127, scale, self.reserved(weight))  # fmt: skip

    def _safe_codes(self) -> int:
        """The largest int8 code: that of the plan, unless the host has put another weight in its place."""
        if torch.compiler.is_compiling() or self.tessera_plan.code_max == 127:
            return self._code_max
        codes = self.weight._qdata
        if self._scanned() is not codes:
            self._scanned = weakref.ref(codes)
            self._code_max = max(-int(codes.min()), int(codes.max()), 1)
        return self._code_max

    def convert_weight(self, weight, *args, **kwargs):
        if isinstance(weight, comfy.quant_ops.QuantizedTensor):
            weight = weight.to(dtype=torch.float32)  # 16 bits would move values off their grid
        return super().convert_weight(weight, *args, **kwargs)

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """Rounds without bias, where the host's dither moves even values that are on the grid."""
        self._code_max = 127  # a merged LoRA's codes use the whole range
        merged = rounding.rounded(self, self.stored_weight(weight), seed)
        if merged is None:
            return super().set_weight(weight, inplace_update, seed, return_weight, **kwargs)
        if return_weight:
            return merged
        self.weight = torch.nn.Parameter(merged, requires_grad=False)
        return None

    def _count(self, kernel: str) -> None:
        if not torch.compiler.is_compiling():  # a number that keeps changing would make it start over
            self.tessera_runs[kernel] += 1

    def _forward(self, input, weight, bias):
        if self._full_precision_mm and isinstance(weight, comfy.quant_ops.QuantizedTensor):
            weight = weight.dequantize()  # the host leaves int8 to its kernel even where a decode is asked for
        return super()._forward(input, weight, bias)


def _made(name: str, format: Format, entries, shape, plan: Plan, loading: Loading) -> transcode.Transcoded:
    """The transcoded layer: from the cache if that has it, else made, and kept there."""
    if loading.cache is None:
        return transcode.transcode(format, entries, shape, plan, loading.device)
    key = transcode.digest(entries, plan)
    made = loading.cache.read(name, key, transcode.target_format(plan, shape[1]))
    if made is None:
        made = transcode.transcode(format, entries, shape, plan, loading.device)
        loading.cache.add(name, key, made)
    return made


def read_format(marked: Tensor | None) -> Format | None:
    """The format of a `comfy_quant` tensor; None if there is none, or one that only the host knows."""
    if marked is None:
        return None
    record = json.loads(marked.numpy().tobytes())
    known = record.get("format") in FORMATS and "num_experts" not in record
    return from_record(record, {"weight_scale": TensorSpec(torch.float32, (1, 1))}) if known else None
