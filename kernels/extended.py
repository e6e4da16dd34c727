"""Block-scaled and fp8 layers whose branches ride in reserved columns of their own GEMM (kextension.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kextension, ops
from . import reference as ref
from .balance import balance
from .kextension import Extension, Layout
from .linear import LowRankBranch, Stored, kernel

NVFP4_RANGE = ref.E4M3_MAX * ref.E2M1_MAX


@dataclass(frozen=True)
class Extended:
    """Branches of a layer, encoded for its reserved columns; strengths stay outside."""

    powers: Tensor  # d [r]: t is multiplied by it, up was divided
    layout: Layout
    extension: Extension

    def strengths(self, branch: LowRankBranch) -> Tensor:
        """strength * d [r]: what multiplies x down^T."""
        return branch.strength * self.powers


def encode(weight: Stored, branch: LowRankBranch, ranks: Sequence[int], exact: Sequence[bool]) -> Extended | str:
    """Stacked branches of these ranks for the reserved columns of that weight, or why they must be added beside it.

    `exact` ones have both factors as hi + lo: LoRAs whose own accuracy counts.
    """
    if not weight.extension:
        return "no columns are reserved"
    layout = kextension.layout(weight.kind, ranks, exact, weight.extension)
    if isinstance(layout, str):
        return layout
    if layout.columns > weight.extension:
        return f"the branches need {layout.columns} columns, {weight.extension} are reserved"
    scale = None if weight.kind == "mxfp8" else weight.scale
    found = balance(weight.kind, branch.down, branch.up, scale, input_scale=weight.input_scale)
    if isinstance(found, str):
        return found
    powers = torch.exp2(found.exponents.double()).float().to(branch.down.device)
    return Extended(powers, layout, kextension.encode_up(weight.kind, found.up, scale, layout))


def scales(weight: Stored) -> Tensor:
    """The scales that lie in tiles, or per row: what an extension is written beside."""
    return weight.block_scale if weight.kind == "nvfp4" else weight.scale


def place(weight: Stored, extended: Extended | None) -> None:
    """Puts the branches into the reserved columns, or empties them; no other byte of the weight is touched."""
    if extended is None:
        kextension.clear(weight.kind, weight.qdata, scales(weight), weight.extension)
    else:
        kextension.write(extended.extension, weight.qdata, scales(weight), weight.extension)


@kernel("nvfp4")
@kernel("mxfp8")
@kernel("fp8_row")
def _block_linear(x: Tensor, weight: Stored, bias: Tensor | None, branch: LowRankBranch | None) -> Tensor:
    """The branch inside the product where the weight carries it (`branch.extended`), else beside it."""
    inside = branch.extended if branch is not None else None
    operand, scale, sx = _quantized(x, weight, branch, inside)
    y = ops.block_product(weight.kind, operand, scale, sx, weight.qdata, scales(weight), weight.scale, bias,
                          x.shape[0], weight.shape[0], x.dtype)  # fmt: skip
    return y if branch is None or inside is not None else branch.add_to(y, x)


def _quantized(x: Tensor, weight: Stored, branch: LowRankBranch | None,
               inside: Extended | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(codes, scales, tensor or row scale) of x, with the branch's middle in the last columns if it rides inside."""
    kind, columns = weight.kind, weight.extension
    sx = input_scale(x, weight)
    if not columns:
        q, scale, _ = ops.quantize_blocks(kind, x, sx, None, None, 0)
        return q, scale, sx
    if inside is None:
        q, scale, _ = ops.quantize_blocks(kind, x, sx, None, None, columns)
        return q, scale, sx
    strengths = inside.strengths(branch)
    if inside.layout.direct:
        q, scale, _ = ops.quantize_blocks(kind, x, sx, branch.down, strengths, columns)
        return q, scale, sx
    q, scale, t = ops.quantize_blocks(kind, x, sx, branch.down, strengths, 0)
    t = ref.pad_to(t, q.shape[0], t.shape[1])
    q, scale = kextension.extend_input(kind, q, scale, t, sx, inside.layout)
    return q, scale, sx


def input_scale(x: Tensor, weight: Stored) -> Tensor:
    """What all of x (nvfp4) or each row of it (fp8_row) is divided by; mxfp8 has none, which is 1."""
    if weight.kind == "mxfp8":
        return torch.ones((), device=x.device)
    if weight.kind == "fp8_row":
        return (x.float().abs().amax(1, keepdim=True) / ref.E4M3_MAX).clamp(min=1e-30)
    if weight.input_scale is not None:
        return weight.input_scale.float().reshape(())
    return (x.abs().amax().float() / NVFP4_RANGE).clamp(min=1e-30)
