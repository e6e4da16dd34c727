"""How a quantizing kernel reads its input and projects it on the low-rank branch in the same sweep."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import INTERPRETED


@triton.jit
def load_input(x_ptr, up_ptr, rows, columns, M, K):
    """x [rows, columns] as stored, or with `up` the fp32 SwiGLU of a gate x; zero outside [M, K]."""
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    offsets = rows.to(tl.int64)[:, None] * K + columns[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    if up_ptr is not None:
        up = tl.load(up_ptr + offsets, mask=inside, other=0.0)
        return once(swiglu(x.to(tl.float32), up.to(tl.float32), x_ptr.dtype.element_ty == tl.float16))
    elif x_ptr.dtype.element_ty == tl.float32:
        return once(x)
    else:
        return x


@triton.jit
def once(x):
    """fp32 x, opaque to the compiler, which would repeat its arithmetic in the layout of every dot, 2 to 8 times."""
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def swiglu(gate, up, SATURATE: tl.constexpr):
    """silu(gate) * up; SATURATE: NaN to 0 and +-65504 at most, as the host does to fp16."""
    y = gate / (1.0 + tl.exp(-gate)) * up
    if SATURATE:
        y = tl.where(y > 65504.0, 65504.0, tl.where(y < -65504.0, -65504.0, y))
        y = tl.where(y != y, 0.0, y)
    return y


@triton.jit
def project(t, x, x_ptr, down_ptr, columns, K, R, RANK: tl.constexpr):
    """t [rows, RANK] + x [rows, columns] @ down [R, columns]^T, multiplied in the dtype of x_ptr, summed in fp32."""
    ranks = tl.arange(0, RANK)
    inside = (ranks < R)[:, None] & (columns < K)[None, :]
    down = tl.load(down_ptr + ranks[:, None] * K + columns[None, :], mask=inside, other=0.0)
    if INTERPRETED:
        return tl.dot(x.to(tl.float32), tl.trans(down.to(tl.float32)), t)
    elif x_ptr.dtype.element_ty == tl.float32:
        return tl.dot(x.to(tl.float32), tl.trans(down.to(tl.float32)), t, input_precision="tf32x3")
    else:
        return tl.dot(x.to(x_ptr.dtype.element_ty), tl.trans(down.to(x_ptr.dtype.element_ty)), t)


@triton.jit
def finish_projection(t, s_ptr, s_step, x_ptr, rows, M, R, RANK: tl.constexpr):
    """t * s in x's dtype, zero outside [M, R]; s_step 0: one s for all."""
    ranks = tl.arange(0, RANK)
    if s_ptr is not None:
        t = t * tl.load(s_ptr + ranks * s_step, mask=ranks < R, other=0.0)[None, :]
    t = tl.where((rows < M)[:, None], t, 0.0)
    return t.to(x_ptr.dtype.element_ty)


@triton.jit
def store_projection(t, t_ptr, rows, M, R, RANK: tl.constexpr):
    ranks = tl.arange(0, RANK)
    inside = (rows < M)[:, None] & (ranks < R)[None, :]
    tl.store(t_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :], t, mask=inside)
