"""The kernel that rotates rows and rounds them to int8: one sweep for the rows' largest numbers, one for the codes."""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import at_most, bits_float, divide, magnitude_bits, rounded
from .rotation import SPAN as _SPAN
from .rotation import hadamard, rotate_span, rotation_norm
from .rows import finish_projection, load_input, project, store_projection

SPAN = tl.constexpr(_SPAN)


@triton.jit
def int8_quantize_kernel(
    x_ptr, up_ptr, q_ptr, scale_ptr, down_ptr, s_ptr, t_ptr, M, K, R, s_step,
    GROUP: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """q [M, K], scale [M] of x, or of swiglu(x, up), rotated in groups; t [M, R] of the unrotated rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = tl.arange(0, 64)
    spans = tl.cdiv(K, SPAN)
    WIDE: tl.constexpr = up_ptr is not None or x_ptr.dtype.element_ty == tl.float32
    h = hadamard(GROUP, tl.bfloat16 if WIDE else x_ptr.dtype.element_ty)
    amax = tl.zeros([ROWS, 64], dtype=tl.int32)
    t = tl.zeros([ROWS, RANK], dtype=tl.float32)
    for span in tl.range(0, spans, num_stages=STAGES):
        first = span * SPAN + o
        a = load_input(x_ptr, up_ptr, rows, first, M, K)
        b = load_input(x_ptr, up_ptr, rows, first + 64, M, K)
        c = load_input(x_ptr, up_ptr, rows, first + 128, M, K)
        d = load_input(x_ptr, up_ptr, rows, first + 192, M, K)
        if down_ptr is not None:
            t = project(t, a, x_ptr, down_ptr, first, K, R, RANK)
            t = project(t, b, x_ptr, down_ptr, first + 64, K, R, RANK)
            t = project(t, c, x_ptr, down_ptr, first + 128, K, R, RANK)
            t = project(t, d, x_ptr, down_ptr, first + 192, K, R, RANK)
        a, b, c, d = rotate_span(a, b, c, d, h, GROUP)
        ab = tl.maximum(magnitude_bits(a), magnitude_bits(b))
        amax = tl.maximum(amax, tl.maximum(ab, tl.maximum(magnitude_bits(c), magnitude_bits(d))))
    if down_ptr is not None:
        t = finish_projection(t, s_ptr, s_step, x_ptr, rows, M, R, RANK)
        store_projection(t, t_ptr, rows, M, R, RANK)

    scale = tl.math.div_rn(bits_float(tl.max(amax, 1)) * rotation_norm(GROUP), 127.0)
    scale = tl.where(scale < 1e-30, 1e-30, scale)
    tl.store(scale_ptr + rows, scale, mask=rows < M)
    inverse = tl.math.div_rn(1.0, scale)
    for span in tl.range(0, spans, num_stages=STAGES):
        first = (spans - 1 - span) * SPAN + o  # backwards: what was read last is still in L2
        a = load_input(x_ptr, up_ptr, rows, first, M, K)
        b = load_input(x_ptr, up_ptr, rows, first + 64, M, K)
        c = load_input(x_ptr, up_ptr, rows, first + 128, M, K)
        d = load_input(x_ptr, up_ptr, rows, first + 192, M, K)
        a, b, c, d = rotate_span(a, b, c, d, h, GROUP)
        _store(a, scale, inverse, q_ptr, rows, first, M, K, GROUP)
        _store(b, scale, inverse, q_ptr, rows, first + 64, M, K, GROUP)
        _store(c, scale, inverse, q_ptr, rows, first + 128, M, K, GROUP)
        _store(d, scale, inverse, q_ptr, rows, first + 192, M, K, GROUP)


@triton.jit
def _store(x, scale, inverse, q_ptr, rows, columns, M, K, GROUP: tl.constexpr):
    q = rounded(divide(x * rotation_norm(GROUP), scale[:, None], inverse[:, None]))
    q = at_most(q, 127.0)
    q = tl.where(q < -127.0, -127.0, q)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    tl.store(q_ptr + rows.to(tl.int64)[:, None] * K + columns[None, :], q.to(tl.int8), mask=inside)
