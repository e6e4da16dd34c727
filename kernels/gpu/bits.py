"""Number formats inside a kernel, by integer arithmetic: the same bits on every GPU and in Triton's interpreter.

fp8 conversions exist from SM 8.9 only and saturate differently; an IEEE division and a few integer instructions do not.
Codes travel as int32; NaN stays NaN, as in kernels/reference.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import INTERPRETED


@triton.jit
def float_bits(x):
    """fp32 -> int32 with the same bits."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def bits_float(bits):
    """int32 -> fp32 with the same bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def magnitude_bits(x):
    """Bits of |x|, which order as the magnitudes do, NaN above all: a maximum of them cannot lose a NaN."""
    return float_bits(x) & 0x7FFFFFFF


@triton.jit
def at_most(x, largest):
    """min(x, largest) that keeps NaN."""
    return tl.where(x > largest, largest, x)


@triton.jit
def rounded(x):
    """Nearest integer, ties to even, of |x| < 2^22: above 1.5 * 2^23 the spacing of fp32 is 1."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def divide(x, divisor, inverse):
    """The IEEE quotient x / divisor, for inverse = div_rn(1, divisor), without div_rn's subroutine for each element.

    Markstein: q + (x - q divisor) inverse is rounded correctly. Infinite x gives NaN; subnormal remainders are inexact.
    """
    if INTERPRETED:  # its fma rounds twice
        return tl.math.div_rn(x, divisor)
    else:
        q = x * inverse
        return tl.fma(tl.fma(-q, divisor, x), inverse, q)


@triton.jit
def e2m1_encode(x):
    """Code 0..15 nearest to fp32 x, ties to even, saturating at 6, NaN too."""
    bits = float_bits(x)
    value = bits_float(bits & 0x7FFFFFFF)
    value = tl.where(value < 6.0, value, 6.0)
    m = float_bits(value)
    below_1 = float_bits(value + 4194304.0)  # 2^22: fp32 is spaced by 0.5 there, so the sum rounds to it
    above_1 = ((m + 0x1FFFFF + ((m >> 22) & 1)) >> 22) - 252  # keep one mantissa bit
    return (tl.where(value < 1.0, below_1, above_1) & 7) | ((bits >> 28) & 8)


@triton.jit
def e2m1_decode(code):
    """fp32 value of a code 0..15."""
    magnitude = bits_float((code & 7) << 22) * 8.507059173023462e37  # 2^126: moves the exponent's bias, subnormals too
    return bits_float(float_bits(magnitude) | ((code & 8) << 28))


@triton.jit
def e4m3_encode(x):
    """Code 0..255 nearest to fp32 x with |x| <= 448, ties to even; NaN is 0x7F."""
    bits = float_bits(x)
    m = bits & 0x7FFFFFFF
    subnormal = float_bits(bits_float(m) + 16384.0) & 0xF  # 2^14: fp32 is spaced by 2^-9 there, as subnormal codes are
    normal = ((m + 0x7FFFF + ((m >> 20) & 1)) >> 20) - 960  # keep three mantissa bits; bias 127 -> 7
    code = tl.where(m < 0x3C800000, subnormal, normal)  # 2^-6
    code = tl.where(m > 0x7F800000, 0x7F, code)
    return code | ((bits >> 24) & 0x80)


@triton.jit
def e4m3_decode(code):
    """fp32 value of a code 0..255."""
    magnitude = bits_float((code & 0x7F) << 20) * 1.329227995784916e36  # 2^120: bias 7 -> 127, subnormals too
    magnitude = tl.where((code & 0x7F) == 0x7F, float("nan"), magnitude)
    return bits_float(float_bits(magnitude) | ((code & 0x80) << 24))


@triton.jit
def e8m0_decode(exponent):
    """2^(b - 127) in fp32; b = 0 is 0, as in the host's reader (format.md 2.2)."""
    return bits_float(exponent << 23)


@triton.jit
def e8m0_ceil(x):
    """The smallest exponent b with 2^(b - 127) >= x, of fp32 x >= 0; at most 254."""
    bits = float_bits(x)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    above = tl.where(exponent == 0, mantissa > 0x400000, mantissa != 0).to(tl.int32)  # 0x400000: subnormal 2^-127
    return tl.minimum(exponent + above, 254)


@triton.jit
def nvfp4_encode(x, sx, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """fp32 x [ROWS, WIDTH] -> bytes [ROWS, WIDTH/2], even column in the high nibble, and E4M3 scales [.., WIDTH/16]."""
    blocks = tl.reshape(x, [ROWS, WIDTH // 16, 16])
    amax = bits_float(tl.max(magnitude_bits(blocks), 2))
    divisor = tl.where(sx == 0.0, float("inf"), sx)
    ratio = tl.math.div_rn(tl.math.div_rn(amax, 6.0), divisor)
    scale = e4m3_encode(at_most(ratio, 448.0))
    scale = tl.where(amax == 0.0, 0, scale)  # whatever sx is
    step = sx * e4m3_decode(scale)
    divisor = tl.where(step == 0.0, 1.0, step)
    scaled = divide(blocks, divisor[:, :, None], tl.math.div_rn(1.0, divisor)[:, :, None])
    codes = e2m1_encode(tl.where((step == 0.0)[:, :, None], 0.0, scaled))
    even, odd = tl.split(tl.reshape(codes, [ROWS, WIDTH // 2, 2]))
    return ((even << 4) | odd).to(tl.uint8), scale.to(tl.uint8)


@triton.jit
def mxfp8_encode(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """fp32 x [ROWS, WIDTH] -> E4M3 bytes [ROWS, WIDTH] and E8M0 exponents [ROWS, WIDTH/32] that saturate nothing."""
    blocks = tl.reshape(x, [ROWS, WIDTH // 32, 32])
    exponent = e8m0_ceil(tl.math.div_rn(bits_float(tl.max(magnitude_bits(blocks), 2)), 448.0))
    inverse = bits_float((254 - exponent) << 23)[:, :, None]  # of a power of two: the product is the exact quotient
    scaled = tl.where(exponent[:, :, None] == 0, 0.0, blocks * inverse)
    scaled = tl.where(scaled < -448.0, -448.0, at_most(scaled, 448.0))
    return tl.reshape(e4m3_encode(scaled), [ROWS, WIDTH]).to(tl.uint8), exponent.to(tl.uint8)
