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
from .linear import PREPARE, Gated, Input, LowRankBranch, Prepared, Stored, dense, kernel

NVFP4_RANGE = ref.E4M3_MAX * ref.E2M1_MAX


@dataclass(frozen=True)
class Extended:
    """Branches of a layer, encoded for its reserved columns; strengths stay outside."""

    powers: Tensor  # d [r]: t is multiplied by it, up was divided
    layout: Layout
    extension: Extension


def powers(weight: Stored, branch: LowRankBranch) -> Tensor | str:
    """d [r], the powers of two that balance a layer's own ranks for its weight (balance.py), or why they must go beside
    it."""
    branch = branch.own()
    scale = None if weight.kind == "mxfp8" else weight.scale
    found = balance(weight.kind, branch.down, branch.up, scale, input_scale=weight.input_scale)
    return found if isinstance(found, str) else torch.exp2(found.exponents.double()).float().to(branch.down.device)


def encode(weight: Stored, branch: LowRankBranch, ranks: Sequence[int], exact: Sequence[bool],
           powers: Tensor) -> Extended | str:  # fmt: skip
    """Stacked branches of these ranks for the reserved columns of that weight, or why they must be added beside it.

    `exact` ones have both factors as hi + lo: LoRAs whose own accuracy counts. Siblings share their stacked down
    [t, in] and its powers [t]; up is 0 in the columns of the others.
    """
    if not weight.extension:
        return "no columns are reserved"
    layout = kextension.layout(weight.kind, ranks, exact, weight.extension)
    if isinstance(layout, str):
        return layout
    if layout.columns > weight.extension:
        return f"the branches need {layout.columns} columns, {weight.extension} are reserved"
    scale = None if weight.kind == "mxfp8" else weight.scale
    up = branch.up.float()
    if branch.span is not None:
        up = torch.nn.functional.pad(up, (branch.span[0], len(powers) - branch.span[1]))
    return Extended(powers, layout, kextension.encode_up(weight.kind, up / powers, scale, layout))


def scales(weight: Stored) -> Tensor:
    """The scales that lie in tiles, or per row: what an extension is written beside."""
    return weight.block_scale if weight.kind == "nvfp4" else weight.scale


def place(weight: Stored, extended: Extended) -> None:
    """Puts the branches into the reserved columns; no other byte of the weight is touched."""
    kextension.write(extended.extension, weight.qdata, scales(weight), weight.extension)


@kernel("nvfp4")
@kernel("mxfp8")
@kernel("fp8_row")
def _block_linear(x, weight, bias, branch, prepared):
    """The branch inside the product where the weight carries it (`branch.extended`), else beside it."""
    x_q = prepared or quantized(x, weight, branch)
    y = ops.block_product(weight.kind, x_q.q, x_q.scale, x_q.tensor_scale, weight.qdata, scales(weight), weight.scale,
                          bias, x.shape[0], weight.shape[0], x.dtype)  # fmt: skip
    return y if branch is None or branch.extended is not None else branch.add_to(y, dense(x))


def quantized(x: Input, weight: Stored, branch: LowRankBranch | None) -> Prepared:
    """x for that kind of weight, the branch's middle in its last columns if the branch rides inside."""
    kind, columns, inside = weight.kind, weight.extension, None if branch is None else branch.extended
    if isinstance(x, Gated) and kind != "mxfp8" and (kind == "fp8_row" or weight.input_scale is None):
        x = x.dense()  # its largest value must be known first
    gate, up = (x.gate, x.up) if isinstance(x, Gated) else (x, None)
    sx = input_scale(gate, weight)
    if inside is None:
        q, scale, _ = ops.quantize_blocks(kind, gate, up, sx, None, None, columns)
        return Prepared(q, scale, sx)
    strengths = branch.strength * inside.powers
    if inside.layout.direct:
        q, scale, _ = ops.quantize_blocks(kind, gate, up, sx, branch.down, strengths, columns)
        return Prepared(q, scale, sx)
    q, scale, t = ops.quantize_blocks(kind, gate, up, sx, branch.down, strengths, 0)
    t = ref.pad_to(t, q.shape[0], t.shape[1])
    q, scale = kextension.extend_input(kind, q, scale, t, sx, inside.layout)
    return Prepared(q, scale, sx)


PREPARE |= {"nvfp4": quantized, "mxfp8": quantized, "fp8_row": quantized}


def both(x: Tensor, nvfp4: Stored, mxfp8: Stored, branch: LowRankBranch | None,
         inside: tuple[Extended | None, Extended | None]) -> tuple[Prepared, Prepared] | None:  # fmt: skip
    """x for siblings in two formats, read once; None where the branch takes another way for one of them."""
    sx = input_scale(x, nvfp4)
    if branch is None or inside == (None, None):
        found = ops.dual_quantize(x, sx, None, None, nvfp4.extension, mxfp8.extension)
    elif None in inside or not all(extended.layout.direct for extended in inside):
        return None
    else:
        strengths = branch.strength * inside[0].powers
        found = ops.dual_quantize(x, sx, branch.down, strengths, nvfp4.extension, mxfp8.extension)
    return Prepared(found[0], found[1], sx), Prepared(found[2], found[3], input_scale(x, mxfp8))


def input_scale(x: Tensor, weight: Stored) -> Tensor:
    """What all of x (nvfp4) or each row of it (fp8_row) is divided by; mxfp8 has none, which is 1."""
    if weight.kind == "mxfp8":
        return torch.ones((), device=x.device)
    if weight.kind == "fp8_row":
        return (x.float().abs().amax(1, keepdim=True) / ref.E4M3_MAX).clamp(min=1e-30)
    if weight.input_scale is not None:
        return weight.input_scale.float().reshape(())
    return (x.abs().amax().float() / NVFP4_RANGE).clamp(min=1e-30)
