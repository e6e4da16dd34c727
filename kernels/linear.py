"""One quantized linear layer by the kernel its plan names, the low-rank branch inside the product where that serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
class Gated:
    """silu(gate) * up [..., in], not computed yet: a kernel that quantizes it need not store it."""

    gate: Tensor
    up: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.gate.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.gate.dtype

    @property
    def device(self) -> torch.device:
        return self.gate.device

    @property
    def requires_grad(self) -> bool:
        return self.gate.requires_grad

    def reshape(self, *shape: int) -> Gated:
        return Gated(self.gate.reshape(*shape), self.up.reshape(*shape))

    def dense(self) -> Tensor:
        """The product as the host's Lumina blocks compute it."""
        product = torch.nn.functional.silu(self.gate) * self.up
        if product.dtype == torch.float16:
            return torch.nan_to_num(product, nan=0.0, posinf=65504, neginf=-65504)
        return product


@dataclass(frozen=True)
class Prepared:
    """An input as a kernel multiplies it: quantized, and projected on the branch."""

    q: Tensor
    scale: Tensor
    tensor_scale: Tensor | None = None  # nvfp4
    t: Tensor | None = None  # [M, r], strengths applied; None if it stands in q, or there is no branch


@dataclass(frozen=True)
class LowRankBranch:
    """All low-rank branches of a layer as one: y += up (strength * (down x))."""

    down: Tensor  # [t, in], of all layers that share the input
    up: Tensor  # [out, r]
    strength: Tensor  # [t] or []: moved without touching a weight
    span: tuple[int, int] | None = None  # which of the t ranks are this layer's; None: all
    extended: Extended | None = None  # the same, encoded, where the weight carries it in reserved columns

    def own(self) -> LowRankBranch:
        """Without the ranks of other layers."""
        if self.span is None:
            return self
        part = slice(*self.span)
        return LowRankBranch(self.down[part], self.up, self.strength[part] if self.strength.ndim else self.strength)

    def middle(self, x: Tensor) -> Tensor:
        """strength * (down x) [M, t], in x's dtype: from the input as it is, not as a kernel rounds it."""
        if x.device.type == "cpu" and x.dtype != torch.float32:  # 16-bit products are emulated on many CPUs
            return (torch.nn.functional.linear(x.float(), self.down.float()) * self.strength).to(x.dtype)
        return torch.nn.functional.linear(x, self.down) * self.strength.to(x.dtype)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y [M, out] with the branch added in place; one product, no second output."""
        return y.addmm_(self.own().middle(x), self.up.T)

    def mine(self, t: Tensor) -> Tensor:
        """This layer's columns of a middle [M, t] that was computed for all."""
        return t if self.span is None else t[:, slice(*self.span)].contiguous()


Input = Tensor | Gated
Kernel = Callable[[Input, Stored, Tensor | None, LowRankBranch | None, Prepared | None], Tensor]
KERNELS: dict[str, Kernel] = {}
PREPARE: dict[str, Callable[[Input, Stored, LowRankBranch | None], Prepared]] = {}
"""Kernels whose quantized input can serve several layers."""


def run(name: str, x: Input, weight: Stored, bias: Tensor | None = None, branch: LowRankBranch | None = None,
        prepared: Prepared | None = None) -> Tensor:  # fmt: skip
    """x [..., in] times the weight^T plus bias [out] plus branch, as [..., out] in x's dtype.

    `name` is a plan's kernel. Any shape with in_features last, empty ones included. `prepared` is x as `prepare` made
    it for a layer with the same kind of weight and the same branch's down.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not rows.shape[0]:
        return torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)
    return KERNELS[name](rows, weight, bias, branch, prepared).reshape(*x.shape[:-1], weight.shape[0])


def prepare(name: str, x: Input, weight: Stored, branch: LowRankBranch | None) -> Prepared:
    """The quantized input of a kernel in PREPARE, for `run` with this weight or a sibling's."""
    return PREPARE[name](x.reshape(-1, x.shape[-1]), weight, branch)


def kernel(name: str) -> Callable[[Kernel], Kernel]:
    """Registers the way that plans call `name`."""

    def register(function: Kernel) -> Kernel:
        KERNELS[name] = function
        return function

    return register


def _factors(branch: LowRankBranch | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if branch is None or not branch.up.shape[1]:
        return None, None, None
    branch = branch.own()
    return branch.down, branch.strength, branch.up


def dense(x: Input) -> Tensor:
    """The input as a tensor."""
    return x.dense() if isinstance(x, Gated) else x


@kernel("cpu_int8")
@kernel("cpu_widened")
def _cpu_int8(x, weight, bias, branch, prepared):
    return ops.int8_linear_cpu(
        dense(x), weight.qdata, weight.scale, weight.group, bias, *_factors(branch), weight.code_max
    )


@kernel("cpu_decoded")
def _cpu_decoded(x, weight, bias, branch, prepared):
    return ops.decoded_linear_cpu(dense(x), weight.kind, weight.qdata, weight.scale, weight.block_scale,
                                  weight.shape[0], weight.group, bias, *_factors(branch))  # fmt: skip


@kernel("int8")
def _kitchen_int8(x, weight, bias, branch, prepared):
    x = dense(x)
    y = ops.kitchen_int8(x, weight.qdata, weight.scale, weight.group, bias, None)
    return y if branch is None else branch.add_to(y, x)


@kernel("int8_residual")
def _kitchen_int8_residual(x, weight, bias, branch, prepared):
    """The branch is added in the epilogue, before the only rounding."""
    x = dense(x)
    residual = None if branch is None else branch.own().middle(x) @ branch.up.T
    return ops.kitchen_int8(x, weight.qdata, weight.scale, weight.group, bias, residual)


@kernel("int8_fused")
def _int8_fused(x, weight, bias, branch, prepared):
    x_q = prepared or _rotated(x, weight, branch)
    fits = branch is not None and x_q.t is not None and branch.up.shape[1] > 0
    t, up = (branch.mine(x_q.t), branch.up) if fits else (None, None)
    y = ops.int8_gemm(x_q.q, x_q.scale, weight.qdata, weight.scale, bias, t, up, x.dtype)
    return y if branch is None or x_q.t is not None else branch.add_to(y, dense(x))


def _rotated(x: Input, weight: Stored, branch: LowRankBranch | None) -> Prepared:
    """x rotated and quantized, and projected on the branch where that is not too wide."""
    if branch is not None and branch.down.shape[0] > ops.MAX_RANK:
        branch = None
    down, strength = (None, None) if branch is None else (branch.down, branch.strength)
    gate, up = (x.gate, x.up) if isinstance(x, Gated) else (x, None)
    q, scale, t = ops.rotate_quantize_int8(gate, up, weight.group, down, strength)
    return Prepared(q, scale, t=None if branch is None else t)


PREPARE["int8_fused"] = _rotated


@kernel("weight_only")
def _weight_only(x, weight, bias, branch, prepared):
    x = dense(x)
    branch = None if branch is None else branch.own()
    if branch is not None and branch.up.shape[1] > ops.MAX_RANK:
        return branch.add_to(_weight_only(x, weight, bias, None, None), x)
    t, up = (None, None) if branch is None or not branch.up.shape[1] else (branch.middle(x), branch.up)
    return ops.weight_only_gemm(
        x, weight.kind, weight.qdata, weight.scale, weight.block_scale, weight.shape[0], bias, t, up
    )


@kernel("decode")
def _decode(x, weight, bias, branch, prepared):
    x, (n, k) = dense(x), weight.shape
    dequantized = ops.dequantize(
        weight.kind, weight.qdata, weight.scale, weight.block_scale, n, k, weight.group, x.dtype
    )
    y = torch.nn.functional.linear(x, dequantized, bias)
    return y if branch is None else branch.add_to(y, x)


from . import extended  # noqa: E402,F401 registers its kernels
