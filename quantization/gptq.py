"""Rounding with error feedback: each column's rounding error is made good by the columns still to be rounded.

GPTQ (arXiv 2210.17323) with block scales chosen from the compensated columns, then cyclic coordinate descent on the
codes (QuantEase, arXiv 2309.01885), which GPTQ's greedy order leaves something to. Weights are held transposed,
[in, out], so that a column is contiguous; a block-diagonal moment makes all its blocks one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import INT8, MXFP8, NVFP4, Format, Quantized
from ..formats import mxfp8 as mx
from ..formats.base import join
from ..kernels import reference as ref
from . import scales
from .calibration import full_precision
from .moment import BLOCK, Moment

FORMATS = (NVFP4, MXFP8, INT8)  # those with error feedback
DAMPINGS = (0.01, 0.1, 1.0, 10.0)  # of the mean diagonal, in this order until Cholesky succeeds
SOLVED = 512  # columns of a triangular matrix that is inverted at once
SWEEPS = 3  # of coordinate descent
AT_ONCE = 1 << 23  # weights worked on together on CPU: 32 MB a copy, of which there are five
MANY_AT_ONCE = 1 << 26  # elsewhere, where every row waits for the same few thousand launches


class Singular(ValueError):
    """No damping makes the moment positive definite."""


class Grid(Protocol):
    """How the columns of a format are rounded, `width` of them sharing their steps."""

    width: int

    def steps(self, columns: Tensor, importance: Tensor) -> Tensor:
        """Steps [n] for columns [width, n]; importance [width, n or 1] weighs their squared errors."""

    def round(self, column: Tensor, step: Tensor) -> Tensor:
        """The representable numbers [n] nearest to a column."""

    def quantized(self, values: Tensor, steps: Tensor) -> Quantized:
        """Codes of representable values [out, in] with steps [out, in/width]."""

    def rows(self, rows: slice) -> Grid:
        """The grid of some of the rows."""


@dataclass(frozen=True)
class NVFP4Grid:
    format: NVFP4
    scale: Tensor
    width: int = 16

    def steps(self, columns, importance):
        return scales.best_steps(columns, self.scale, importance)

    def round(self, column, step):
        ratio = column.abs() * torch.where(step == 0, 0.0, 1 / step)
        return torch.copysign(ref.e2m1_round(ratio.clamp_(max=ref.E2M1_MAX)) * step, column)

    def quantized(self, values, steps):
        return self.format.encode_with(values, self.scale, (steps / self.scale).to(torch.float8_e4m3fn))

    def rows(self, rows):
        return self


@dataclass(frozen=True)
class MXFP8Grid:
    format: MXFP8
    width: int = 32

    def steps(self, columns, importance):
        return ref.e8m0_decode(mx.block_scales(columns.abs().amax(0)))

    def round(self, column, step):
        ratio = (column * torch.where(step == 0, 0.0, 1 / step)).clamp_(-ref.E4M3_MAX, ref.E4M3_MAX)
        return ratio.to(torch.float8_e4m3fn).float() * step

    def quantized(self, values, steps):
        exponents = torch.where(steps == 0, 0.0, torch.log2(steps) + ref.E8M0_BIAS).round().to(torch.uint8)
        return self.format.encode_with(values, exponents)

    def rows(self, rows):
        return self


@dataclass(frozen=True)
class INT8Grid:
    """Row scales are those of the whole row, fixed before the first column."""

    format: INT8
    scale: Tensor  # [out]
    width: int = 16

    def steps(self, columns, importance):
        return self.scale.repeat(columns.shape[1] // len(self.scale))

    def round(self, column, step):
        return torch.round(column / step).clamp_(-128, 127) * step

    def quantized(self, values, steps):
        return self.format.encode_with(values, self.scale.unsqueeze(1) if self.format.per_row else self.scale[0])

    def rows(self, rows):
        return INT8Grid(self.format, self.scale[rows])


def grid(format: Format, weight: Tensor) -> Grid:
    """The grid of a weight [out, in] in its stored basis, for one of FORMATS."""
    if isinstance(format, NVFP4):
        return NVFP4Grid(format, scales.global_scale(weight))
    if isinstance(format, MXFP8):
        return MXFP8Grid(format)
    amax = weight.abs().amax(1) if format.per_row else weight.abs().amax().expand(weight.shape[0])
    return INT8Grid(format, (amax / 127.0).clamp(min=1e-30))


def quantize(format: Format, weight: Tensor, moment: Moment, notes: list[str], sweeps: int = SWEEPS) -> Quantized:
    """Codes of a weight [out, in] (fp32) that minimise tr((W - Q) R (W - Q)^T), by error feedback.

    The format is one of FORMATS, R the `moment` of the layer's own input. `notes` gets every damping above the first.
    Raises Singular if no damping makes R positive definite, ValueError if the format cannot hold the weight's range.
    Rows are independent: they are worked on some at a time, with four copies of those in memory.
    """
    if moment.kind == "diagonal":
        sweeps = 0  # nothing that a column could make good for another
    if isinstance(format, INT8):
        weight = format.rotate(weight)
        moment = moment.rotated(format.convrot_groupsize) if format.convrot else moment
    rounding = grid(format, weight)
    with full_precision():
        tiles, ridge, inverse = _regular(moment, notes)
        pieces = [
            _rows(
                rounding.rows(slice(first, first + count)), weight[first : first + count], tiles, ridge, inverse, sweeps
            )
            for first, count in _chunks(weight)
        ]
    quantized = join(pieces)
    if isinstance(format, NVFP4):
        scales.refuse_vanished(weight, quantized.block_scale)
    return quantized


def _chunks(weight: Tensor) -> list[tuple[int, int]]:
    rows, columns = weight.shape
    count = max(1, (AT_ONCE if weight.device.type == "cpu" else MANY_AT_ONCE) // columns)
    return [(first, min(count, rows - first)) for first in range(0, rows, count)]


def _regular(moment: Moment, notes: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """The moment's tiles [t, c, c], the damping [] that makes them positive definite, and the inverse of both as U^T U.

    R = V V^T with V upper is the Cholesky factor of R turned by 180 degrees; the upper U is V's inverse. R itself is
    never inverted. Holds three matrices of its size: with 10240 columns one is 419 MB.
    """
    tiles, mean = moment.tiles(), moment.diagonal().mean()
    mean = torch.where(mean == 0, 1.0, mean)  # without any input, weights count equally
    for damping in DAMPINGS:
        turned = tiles.flip(1, 2)
        turned.diagonal(dim1=1, dim2=2).add_(damping * mean)
        factor, info = torch.linalg.cholesky_ex(turned)
        del turned
        if not info.any() and torch.isfinite(factor.diagonal(dim1=1, dim2=2)).all():
            if damping != DAMPINGS[0]:
                notes.append(f"damping {damping:g} of the mean instead of {DAMPINGS[0]:g}: the moment is near singular")
            _invert(factor)
            return tiles, damping * mean, factor.flip(1, 2)
    raise Singular("the second moment of its input is not positive definite at any damping")


def _invert(lower: Tensor) -> None:
    """Lower triangular matrices [t, c, c] become their inverses, in place, by halves."""
    size = lower.shape[1]
    if size <= SOLVED:
        identity = torch.eye(size, device=lower.device).expand_as(lower)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    first, last, below = lower[:, :half, :half], lower[:, half:, half:], lower[:, half:, :half]
    _invert(first)
    _invert(last)
    below.copy_(torch.bmm(last, torch.bmm(below, first)).neg_())


def _rows(rounding: Grid, weight: Tensor, tiles: Tensor, ridge: Tensor, inverse: Tensor, sweeps: int) -> Quantized:
    """Some rows [n, in] rounded: `tiles` [1, in, in] one after the other, [t, 128, 128] all at once."""
    count, size, _ = tiles.shape
    columns = weight.shape[1]
    target = F.pad(weight, (0, count * size - columns)).T.unflatten(0, (count, size)).transpose(0, 1).contiguous()
    values = target.clone()  # [c, t, n]
    steps = _feed_back(values, inverse, rounding)
    for _ in range(sweeps):
        _descend(values, target, tiles, ridge, steps, rounding)
    flat = values.transpose(0, 1).flatten(0, 1)[:columns].T.contiguous()
    steps = steps.transpose(0, 1).flatten(0, 1)[: -(-columns // rounding.width)].T.contiguous()
    return rounding.quantized(flat, steps)


def _feed_back(values: Tensor, inverse: Tensor, rounding: Grid) -> Tensor:
    """Rounds values [c, t, n] in place, each error spread over the later columns; the steps [c/width, t, n]."""
    size, steps = values.shape[0], []
    importance = inverse.diagonal(dim1=1, dim2=2).T.square().reciprocal()  # [c, t]
    for first in range(0, size, BLOCK):
        last = min(first + BLOCK, size)
        errors = torch.empty_like(values[first:last])
        for start in range(first, last, rounding.width):
            stop = start + rounding.width
            part = values[start:stop]
            step = rounding.steps(part.flatten(1), _spread(importance[start:stop], values.shape[2]))
            steps.append(step.view(part.shape[1:]))
            for j in range(start, stop):
                rounded = rounding.round(values[j].flatten(), step).view_as(values[j])
                error = (values[j] - rounded).div_(inverse[:, j, j].unsqueeze(1))
                values[j] = rounded
                errors[j - first] = error
                if j + 1 < stop:
                    values[j + 1 : stop] -= inverse[:, j, j + 1 : stop].T.unsqueeze(2) * error
            _subtract(values[stop:last], inverse[:, start:stop, stop:last], errors[start - first : stop - first])
        _subtract(values[last:], inverse[:, first:last, last:], errors)
    return torch.stack(steps)


def _descend(values: Tensor, target: Tensor, tiles: Tensor, ridge: Tensor, steps: Tensor, rounding: Grid) -> None:
    """One sweep of coordinate descent over the codes, steps as they are: each column, given all others, is optimal for
    the tiles with the ridge on their diagonal."""
    size, error = values.shape[0], target - values
    slope = torch.bmm(tiles, error.transpose(0, 1)).transpose(0, 1).contiguous()  # [c, t, n]
    slope.add_(error.mul_(ridge))
    del error
    diagonal = tiles.diagonal(dim1=1, dim2=2) + ridge  # [t, c]
    for first in range(0, size, BLOCK):
        last = min(first + BLOCK, size)
        moved = torch.empty_like(values[first:last])
        for start in range(first, last, rounding.width):
            stop, step = start + rounding.width, steps[start // rounding.width].flatten()
            for j in range(start, stop):
                best = values[j] + slope[j] / diagonal[:, j].unsqueeze(1)
                rounded = rounding.round(best.flatten(), step).view_as(best)
                moved[j - first] = rounded - values[j]
                values[j] = rounded
                if j + 1 < stop:
                    slope[j + 1 : stop] -= tiles[:, j, j + 1 : stop].T.unsqueeze(2) * moved[j - first]
            _subtract(slope[stop:last], tiles[:, start:stop, stop:last], moved[start - first : stop - first])
        _subtract(slope[last:], tiles[:, first:last, last:], moved)


def _subtract(later: Tensor, coefficients: Tensor, errors: Tensor) -> None:
    """later [l, t, n] -= coefficients [t, e, l]^T errors [e, t, n], in place."""
    if later.shape[0]:
        later -= torch.bmm(coefficients.mT, errors.transpose(0, 1)).transpose(0, 1)


def _spread(importance: Tensor, rows: int) -> Tensor:
    """[width, t] -> [width, t * rows], or [width, 1] for a single tile."""
    return importance if importance.shape[1] == 1 else importance.repeat_interleave(rows, 1)
