"""The powers of two that bring a branch's two factors under the scales of the GEMM it rides in.

The K-extension stores s d t beside q(x) and B / d beside Wq, under the scales that x and W already have. A power of two
per rank moves magnitude from one factor to the other without rounding either: (d t)(B / d) = t B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference as ref

PEAK = 6.0  # the largest value of a call, in root mean squares of it: of t, and of x where its own is not known
HEADROOM = 0.5  # of the input's range is t's at strength 1, so that strengths to 2 do not saturate; all, if B needs it
LOSS = 1e-4  # relative error that folding d into a factor may leave: the smallest fp16 numbers lose bits
RANGE = {"nvfp4": ref.E4M3_MAX * ref.E2M1_MAX, "fp8_row": ref.E4M3_MAX, "fp8": ref.E4M3_MAX}
"""The largest value of the kinds that have a shared scale, in units of it."""


@dataclass(frozen=True)
class Balance:
    """A branch's factors as the K-extension stores them; strengths multiply x down^T as before."""

    down: Tensor  # d_j A_j [R, K], in down's dtype
    up: Tensor  # B_j / d_j, fp32 [N, R]; 0 where A_j is 0
    exponents: Tensor  # log2 of d, int32 [R]
    rho_t: float  # the part of the input's range that t' is expected to take at strength 1; 0: no shared scale
    rho_b: float  # the part of the weight's range that B' takes, at most 1; 0: no shared scale

    @property
    def powers(self) -> Tensor:
        """d, fp32 [R]: for a caller that multiplies t by strength * d rather than keep `down`."""
        return _power(self.exponents)


def balance(
    kind: str,
    down: Tensor,
    up: Tensor,
    weight_scale: Tensor | None = None,
    rms: Tensor | float | None = None,
    input_scale: Tensor | None = None,
    headroom: float = 1.0,
) -> Balance | str:
    """Factors for the K-extension of down A [R, K] and up B [N, R], or why it cannot serve: then add the branch apart.

    d_j = c 2^round(-log2 ||A_j||): equal magnitudes over the ranks; c makes both factors take the same part of their
    range. weight_scale is [] for nvfp4 and fp8, [N, 1] for fp8_row; mxfp8 has no shared scale and no limit.
    max|t_j| is taken as ||A_j|| max|x|, which suits inputs without outliers; `rms` of x ([K] or a number) together with
    a static `input_scale` [] says it better, [K] alone a little. `headroom`: how many times larger than needed the
    caller makes the scale of x; what stands under it is floating point, so that 2 to 16 cost x nothing and let t be as
    many times larger.
    """
    a, b = down.float(), up.float()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return "the branch has values that are not finite; repair the LoRA file"
    reach = _reach(a, rms, input_scale) / headroom
    live = (reach > 0) & torch.isfinite(reach)
    b = torch.where(live, b, 0.0)  # t_j is 0 there: whatever B_j is must not decide the others' range
    part = _part(kind, b, weight_scale).double()
    if kind in RANGE and not torch.isfinite(part).all():
        return f"the {kind} weight has scale 0 where the branch has values: nothing can be stored there"
    exponents = _exponents(kind, reach, part, live)
    if isinstance(exponents, str):
        return exponents
    power, inverse = _power(exponents), _power(-exponents)
    folded, spread = (a * power.unsqueeze(1)).to(down.dtype), b * inverse
    for name, factor, back in (("down", a, folded.float() * inverse.unsqueeze(1)), ("up", b.T, (spread * power).T)):
        kept = (back - factor).double().norm(dim=1) <= LOSS * factor.double().norm(dim=1)
        if not kept.all():
            rank = int((~kept).nonzero()[0])
            return f"the {name} factor of rank {rank} leaves its dtype's range when scaled by 2^{exponents[rank]}"
    rho_t, rho_b = (reach * power).amax(), (part * inverse).amax()
    return Balance(folded, spread, exponents, *((rho_t.item(), rho_b.item()) if kind in RANGE else (0.0, 0.0)))


def _reach(down: Tensor, rms: Tensor | float | None, input_scale: Tensor | None) -> Tensor:
    """max|t_j| expected, over max|x| [R]; in fp64, where no square of fp32 leaves the range."""
    down = down.double()
    if rms is None:  # a static scale alone says nothing of how far t stays below it
        return torch.linalg.vector_norm(down, dim=1)
    rms = torch.as_tensor(rms, device=down.device).double()
    largest = PEAK * rms.square().mean().sqrt()
    if input_scale is not None:
        largest = RANGE["nvfp4"] * input_scale.to(down.device).double()
    return PEAK * torch.linalg.vector_norm(down * rms, dim=1) / largest


def _part(kind: str, up: Tensor, weight_scale: Tensor | None) -> Tensor:
    """The largest part of the weight's range that each B_j takes, over all rows [R]."""
    if kind not in RANGE:
        return up.abs().amax(0)
    largest = RANGE[kind] * weight_scale.float().to(up.device).reshape(-1, 1)
    return torch.where(up == 0, 0.0, up.abs() / largest).amax(0)


def _exponents(kind: str, reach: Tensor, part: Tensor, live: Tensor) -> Tensor | str:
    """log2 of d [R] (int32): equal parts of the ranges, t's at most HEADROOM, B's at most 1, or why that cannot be."""
    level = torch.where(live, -torch.log2(torch.where(live, reach, 1.0)).round(), 0.0)
    if not live.any():
        return level.int()
    if kind not in RANGE:  # only ratios inside a block matter: stay near the factors' own magnitudes
        return torch.where(live, level - level[live].mean().round(), 0.0).int().clamp(-126, 126)
    equal = torch.log2((part * torch.exp2(-level)).amax() / (reach * torch.exp2(level)).amax()) / 2
    wanted = level + (equal.round() if torch.isfinite(equal) else 0.0)
    highest = -torch.log2(reach)
    lowest = torch.where(part > 0, torch.ceil(torch.log2(part)), -torch.inf)
    crowded = live & (lowest > highest)
    if crowded.any():
        rank = int(crowded.nonzero()[0])
        return (
            f"rank {rank} of the branch is too large to share the {kind} weight's scale: t may take {reach[rank]:.2g} "
            f"of the input's range and B {part[rank]:.2g} of the weight's, their product must stay below 1"
        )
    exponents = torch.maximum(torch.minimum(wanted, torch.floor(highest + math.log2(HEADROOM))), lowest)
    return torch.where(live, exponents, 0.0).int().clamp(-126, 126)


def _power(exponents: Tensor) -> Tensor:
    """2^e as fp32, from its bits: exp2 may round. int32 e in [-126, 127]."""
    return ((exponents.clamp(-126, 127) + 127) << 23).view(torch.float32)
