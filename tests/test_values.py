"""Every value of E2M1, E4M3, E5M2 and E8M0, both ways: written out from the formats' definitions, not from ours."""

import math

import comfy_kitchen as ck
import pytest
import torch

from tessera.formats import FP8E4M3, FP8E5M2, MXFP8, NVFP4, Quantized
from tessera.formats.mxfp8 import block_scales
from tessera.kernels import cpu
from tessera.kernels import reference as ref

INF, NAN = math.inf, math.nan
FP8 = {torch.float8_e4m3fn: (4, 3, 7), torch.float8_e5m2: (5, 2, 15)}  # exponent and mantissa bits, bias
EVERY_FP8 = pytest.mark.parametrize("dtype", FP8, ids=str)


def minifloat(code, exponent_bits, mantissa_bits, bias):
    """The value of a code, from IEEE 754's rule: subnormals have no hidden 1."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    hidden = 1 if exponent else 0
    return sign * math.ldexp(hidden * (1 << mantissa_bits) + mantissa, max(exponent, 1) - bias - mantissa_bits)


def fp8_values(dtype):
    """Of all 256 codes. E4M3 has no infinity and one NaN of each sign, E5M2 is as IEEE has it."""
    exponent_bits, mantissa_bits, bias = FP8[dtype]
    values = [minifloat(code, exponent_bits, mantissa_bits, bias) for code in range(256)]
    if dtype == torch.float8_e4m3fn:
        values[0x7F] = values[0xFF] = NAN
    else:
        for sign in (0, 0x80):
            values[sign | 0x7C] = -INF if sign else INF
            values[sign | 0x7D] = values[sign | 0x7E] = values[sign | 0x7F] = NAN
    return torch.tensor(values)


def bits(x):
    return x.contiguous().view(torch.int32)


def same(a, b):
    """Equal to the bit, signs of zero included; any NaN is as good as another."""
    both = a.isnan() & b.isnan()
    return bool((both | (bits(a) == bits(b))).all())


def between(values):
    """(midpoint, nearest even code's value) of neighbours among ascending positive values, code by code."""
    for code in range(len(values) - 1):
        yield (values[code] + values[code + 1]) / 2, values[code + (code % 2)]


# ---- E2M1


def test_all_16_values_of_e2m1():
    expected = torch.tensor([minifloat(code, 2, 1, 1) for code in range(16)])
    codes = torch.arange(16, dtype=torch.uint8)
    assert same(ref.e2m1_decode(codes), expected)
    assert torch.equal(ref.e2m1_encode(expected), codes)
    assert expected.tolist()[:8] == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_e2m1_ties_go_to_the_even_code_and_a_hair_beside_them_to_the_nearer():
    values = [minifloat(code, 2, 1, 1) for code in range(8)]
    for code, (middle, even) in enumerate(between(values)):
        for sign in (1, -1):
            x = torch.tensor([middle], dtype=torch.float32)
            below, above = torch.nextafter(x, torch.tensor(0.0)), torch.nextafter(x, torch.tensor(INF))
            found = ref.e2m1_decode(ref.e2m1_encode(torch.cat([below, x, above]) * sign))
            assert found.tolist() == [sign * values[code], sign * even, sign * values[code + 1]], middle


def test_e2m1_beyond_its_largest_saturates_and_nan_is_no_number_it_could_keep():
    x = torch.tensor([5.0, 5.1, 6.0, 7.0, 1e30, INF, -INF, -1e30, 1e-45, -1e-45])
    assert ref.e2m1_decode(ref.e2m1_encode(x)).tolist() == [4, 6, 6, 6, 6, 6, -6, -6, 0, 0]
    assert ref.e2m1_encode(torch.tensor([NAN])).item() & 7 == 7  # so encoders are given finite weights only


def test_the_fast_rounding_is_the_coding():
    grid = torch.cat([torch.linspace(0, 6, 48001), torch.tensor([v for v, _ in between(ref.E2M1_VALUES)])])
    assert same(ref.e2m1_round(grid), ref.e2m1_decode(ref.e2m1_encode(grid)))


# ---- E4M3 and E5M2


@EVERY_FP8
def test_all_256_values_of_fp8(dtype):
    codes, expected = torch.arange(256, dtype=torch.uint8), fp8_values(dtype)
    found = codes.view(dtype).float()
    assert same(found, expected)
    finite = expected.isfinite()
    assert torch.equal(expected[finite].to(dtype).view(torch.uint8), codes[finite])


@EVERY_FP8
def test_fp8_ties_go_to_the_even_code_and_a_hair_beside_them_to_the_nearer(dtype):
    values = [value for value in fp8_values(dtype)[:128].tolist() if math.isfinite(value)]
    for code, (middle, even) in enumerate(between(values)):
        x = torch.tensor([middle], dtype=torch.float32)
        near = torch.cat([torch.nextafter(x, torch.tensor(0.0)), x, torch.nextafter(x, torch.tensor(INF))])
        for sign in (1, -1):
            found = (near * sign).to(dtype).float().tolist()
            assert found == [sign * values[code], sign * even, sign * values[code + 1]], middle


@pytest.mark.parametrize("format", [FP8E4M3(), FP8E5M2()], ids=lambda f: f.name)
def test_fp8_weights_saturate_instead_of_overflowing(format):
    x = torch.tensor([[format.max, 0.0, -format.max, format.max * 0.99, 1e-30, -1e-30, 1.0, -1.0]])
    quantized = format.encode(x)
    assert quantized.scale == 1 and quantized.qdata.float().abs().max() == format.max
    larger = format.encode(x * 3)
    assert torch.equal(larger.qdata.float(), quantized.qdata.float()) and larger.scale == 3


# ---- E8M0


def test_all_256_values_of_e8m0():
    """2^(b - 127); b = 0 is scale 0 as in the host's reader, b = 255 is NaN by the format and never written."""
    found = ref.e8m0_decode(torch.arange(256, dtype=torch.uint8))
    expected = torch.tensor([0.0] + [math.ldexp(1.0, b - 127) for b in range(1, 255)] + [INF])
    assert torch.equal(found, expected)
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
    assert torch.equal(theirs[1:255], found[1:255]) and theirs[255].isnan()


def test_every_e8m0_exponent_is_the_smallest_that_saturates_nothing():
    for b in range(1, 247):  # 448 * 2^(247 - 127) is beyond fp32
        exact = torch.tensor([ref.E4M3_MAX * math.ldexp(1.0, b - 127)])
        found = block_scales(torch.cat([exact * 0.50001, exact, exact * 1.00001])).tolist()
        assert found == [b, b, b + 1], b
    largest = torch.tensor([torch.finfo(torch.float32).max])
    assert block_scales(torch.cat([largest, torch.zeros(1)])).tolist() == [247, 0]


# ---- every code under every scale, as the readers have it


def nvfp4_of_everything():
    """256 rows, row r with block scale code r; 16 columns, column c with code c."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(256, 1)
    return Quantized(codes, torch.tensor(0.25), scales)


def mxfp8_of_everything():
    """8 * 255 rows, rows 8 b ... with exponent b; 32 columns, the 256 codes over 8 rows."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(8, 32)
    exponents = torch.arange(255, dtype=torch.uint8).repeat_interleave(8).reshape(-1, 1)
    return Quantized(codes.view(torch.uint8).repeat(255, 1).view(torch.float8_e4m3fn), block_scale=exponents)


EVERYTHING = {"nvfp4": (NVFP4(), nvfp4_of_everything()), "mxfp8": (MXFP8(), mxfp8_of_everything())}
OF_EVERYTHING = pytest.mark.parametrize(("format", "quantized"), EVERYTHING.values(), ids=EVERYTHING)


def product(format, quantized):
    """In double precision, from the tables above."""
    if isinstance(format, NVFP4):
        values = torch.tensor([minifloat(code, 2, 1, 1) for code in range(16)])[quantized.qdata.long()]
        scales = fp8_values(torch.float8_e4m3fn)[quantized.block_scale.view(torch.uint8).long()] * 0.25
    else:
        values = fp8_values(torch.float8_e4m3fn)[quantized.qdata.view(torch.uint8).long()]
        scales = torch.exp2(quantized.block_scale.double() - 127) * (quantized.block_scale != 0)
    return (values.double() * scales.double()).float()


@OF_EVERYTHING
def test_every_code_under_every_scale_is_their_product(format, quantized):
    expected = product(format, quantized)
    assert same(format.decode(quantized) + 0.0, expected + 0.0)
    again = format.unpack(format.pack(quantized), *quantized.qdata.shape)
    assert same(format.decode(again) + 0.0, expected + 0.0)


@OF_EVERYTHING
def test_the_fast_reader_has_every_code_under_every_scale_too(format, quantized):
    entries = format.pack(quantized)
    scales = (
        (entries["weight_scale_2"], entries["weight_scale"])
        if format.name == "nvfp4"
        else (entries["weight_scale"], None)
    )
    rows, columns = quantized.qdata.shape
    found = cpu.decode_rows(format.name, entries["weight"], *scales, slice(0, rows), columns)
    assert same(found + 0.0, product(format, quantized) + 0.0)


@OF_EVERYTHING
def test_comfy_kitchen_has_every_code_under_every_scale_too(format, quantized):
    entries, shape = format.pack(quantized), quantized.qdata.shape
    if format.name == "nvfp4":
        found = ck.dequantize_nvfp4(
            entries["weight"], entries["weight_scale_2"], entries["weight_scale"], torch.float32
        )
    else:
        exponents = entries["weight_scale"].view(torch.float8_e8m0fnu)
        found = ck.dequantize_mxfp8(entries["weight"], exponents, torch.float32)
    assert same(found[: shape[0], : shape[1]] + 0.0, product(format, quantized) + 0.0)
