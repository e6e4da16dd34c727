"""One quantized linear layer by the kernel its plan names, the low-rank branch inside the product where that serves."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ops

if TYPE_CHECKING:
    from .extended import Extended


@dataclass(frozen=True)
class Stored:
    """A packed weight on its device, as comfy-kitchen lays it out."""

    kind: str  # nvfp4, mxfp8, int8, fp8, fp8_row
    shape: tuple[int, int]  # [out, in], padding not counted
    qdata: Tensor
    scale: Tensor  # per tensor [] or per row [out, 1]; mxfp8: the swizzled exponents
    block_scale: Tensor | None = None  # nvfp4: swizzled
    group: int = 0  # of ConvRot; 0: not rotated
    code_max: int = 127  # largest int8 code
    input_scale: Tensor | None = None  # nvfp4: static scale of inputs []
    extension: int = 0  # reserved columns behind in_features, for branches


@dataclass(frozen=True)
class LowRankBranch:
    """All low-rank branches of a layer beside each other: y += up (strength * (down x))."""

    down: Tensor  # [r, in]
    up: Tensor  # [out, r]
    strength: Tensor  # [r] or []: moved without touching a weight
    extended: Extended | None = None  # the same, encoded, where the weight carries it in reserved columns

    @classmethod
    def join(cls, branches: list[LowRankBranch]) -> LowRankBranch:
        """Several as one, concatenated in rank."""
        if len(branches) == 1:
            return branches[0]
        strengths = [b.strength.expand(b.down.shape[0]) for b in branches]
        return cls(torch.cat([b.down for b in branches]), torch.cat([b.up for b in branches], 1), torch.cat(strengths))

    def middle(self, x: Tensor) -> Tensor:
        """strength * (x down^T) [M, r], in x's dtype: from the input as it is, not as a kernel rounds it."""
        return torch.nn.functional.linear(x, self.down) * self.strength.to(x.device, x.dtype)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y [M, out] with the branch added in place; one product, no second output."""
        return y.addmm_(self.middle(x), self.up.T)


Kernel = Callable[[Tensor, Stored, Tensor | None, LowRankBranch | None], Tensor]
KERNELS: dict[str, Kernel] = {}


def run(name: str, x: Tensor, weight: Stored, bias: Tensor | None = None,
        branch: LowRankBranch | None = None) -> Tensor:  # fmt: skip
    """x [..., in] times the weight^T plus bias [out] plus branch, as [..., out] in x's dtype.

    `name` is a plan's kernel. Any shape with in_features last, empty ones included.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not rows.shape[0]:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    return KERNELS[name](rows, weight, bias, branch).reshape(*x.shape[:-1], weight.shape[0])


def kernel(name: str) -> Callable[[Kernel], Kernel]:
    """Registers the way that plans call `name`."""

    def register(function: Kernel) -> Kernel:
        KERNELS[name] = function
        return function

    return register


@kernel("cpu_int8")
@kernel("cpu_widened")
def _cpu_int8(x, weight, bias, branch):
    t, up = (None, None) if branch is None else (branch.middle(x), branch.up)
    return ops.int8_linear_cpu(x, weight.qdata, weight.scale, weight.group, bias, t, up, weight.code_max)


@kernel("cpu_decoded")
def _cpu_decoded(x, weight, bias, branch):
    t, up = (None, None) if branch is None else (branch.middle(x), branch.up)
    return ops.decoded_linear_cpu(
        x, weight.kind, weight.qdata, weight.scale, weight.block_scale, weight.shape[0], weight.group, bias, t, up
    )


@kernel("int8")
def _kitchen_int8(x, weight, bias, branch):
    import comfy_kitchen as ck

    arguments = {"convrot": weight.group > 0, "convrot_groupsize": weight.group or 256, "out_dtype": x.dtype}
    if branch is None:
        return ck.int8_linear(x, weight.qdata, weight.scale, bias, **arguments)
    if _takes_residual():  # added before the only rounding; L is written once and read once
        residual = branch.middle(x) @ branch.up.T
        ones = torch.ones(weight.shape[0], device=x.device, dtype=torch.float32)
        return ck.int8_linear(x, weight.qdata, weight.scale, bias, **arguments, residual=residual, residual_scale=ones)
    return branch.add_to(ck.int8_linear(x, weight.qdata, weight.scale, bias, **arguments), x)


@lru_cache(maxsize=1)
def _takes_residual() -> bool:
    import comfy_kitchen

    return {"residual", "residual_scale"} <= inspect.signature(comfy_kitchen.int8_linear).parameters.keys()


@kernel("int8_fused")
def _int8_fused(x, weight, bias, branch):
    down, strength, up = _factors(branch)
    q, scale, t = ops.rotate_quantize_int8(x, weight.group, down, strength)
    return ops.int8_gemm(q, scale, weight.qdata, weight.scale, bias, t if branch else None, up, x.dtype)


@kernel("weight_only")
def _weight_only(x, weight, bias, branch):
    t, up = (None, None) if branch is None else (branch.middle(x), branch.up)
    return ops.weight_only_gemm(
        x, weight.kind, weight.qdata, weight.scale, weight.block_scale, weight.shape[0], bias, t, up
    )


@kernel("decode")
def _decode(x, weight, bias, branch):
    dense = ops.dequantize(
        weight.kind, weight.qdata, weight.scale, weight.block_scale, *weight.shape, weight.group, x.dtype
    )
    y = torch.nn.functional.linear(x, dense, bias)
    return y if branch is None else branch.add_to(y, x)


def _factors(branch: LowRankBranch | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if branch is None else (branch.down, branch.strength, branch.up)


from . import extended  # noqa: E402,F401 registers its kernels
