"""The regular Hadamard rotation inside a kernel (kernels/reference.py `rotate`), as fp32-accurate matrix products.

A 64-wide factor goes through the tensor cores: its entries are 0 and +-1, so products are exact. Group 256 is
h (x) h64: four neighbouring 64-column products, then one radix-4 butterfly between them, with no data moved.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bits import bits_float, float_bits
from .tiles import INTERPRETED

SPAN = 256  # columns that are rotated together


@triton.jit
def hadamard(GROUP: tl.constexpr, DTYPE: tl.constexpr):
    """[64, 64] of 0, +-1: the group's matrix times sqrt(GROUP), repeated on the diagonal; of 256 its 64-wide factor."""
    o = tl.arange(0, 64)
    differ = o[:, None] ^ o[None, :]
    threes = differ & (differ >> 1) & 0x15  # base-4 digits of row and column that add up to 3: factor -1
    odd = (threes ^ (threes >> 2) ^ (threes >> 4)) & 1
    return tl.where(differ < GROUP, 1 - 2 * odd, 0).to(tl.float32).to(DTYPE)  # the interpreter casts no integer to bf16


@triton.jit
def rotate_64(x, h):
    """x [rows, 64] @ h with fp32 sums; h in x's dtype. fp32 x is the exact sum of three bf16 numbers, and h is bf16."""
    if INTERPRETED:
        return tl.dot(x.to(tl.float32), h.to(tl.float32))
    elif x.dtype == tl.float32:
        high = bits_float(float_bits(x) & -65536)
        rest = x - high
        middle = bits_float(float_bits(rest) & -65536)
        y = tl.dot((rest - middle).to(tl.bfloat16), h)
        y = tl.dot(middle.to(tl.bfloat16), h, y)
        return tl.dot(high.to(tl.bfloat16), h, y)
    else:
        return tl.dot(x, h)


@triton.jit
def rotate_span(a, b, c, d, h, GROUP: tl.constexpr):
    """Four neighbours [rows, 64] times sqrt(GROUP) times the rotation by h = hadamard(GROUP); group 0: fp32 of them."""
    if GROUP == 0:
        return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)
    else:
        a, b, c, d = rotate_64(a, h), rotate_64(b, h), rotate_64(c, h), rotate_64(d, h)
        if GROUP == 256:
            return (a + b) + (c - d), (a + b) - (c - d), (a - b) + (c + d), (b - a) + (c + d)
        else:
            return a, b, c, d


@triton.jit
def rotation_norm(GROUP: tl.constexpr):
    """1/sqrt(GROUP), a power of two; 1 for group 0."""
    return 1.0 if GROUP == 0 else 0.5 if GROUP == 4 else 0.25 if GROUP == 16 else 0.125 if GROUP == 64 else 0.0625
