"""Rounding a changed weight onto its own grid: unbiased, repeatable, and nothing moves that has no need to."""

import pytest
import torch

from tessera.formats import FP8E4M3, FP8E5M2, INT8, MXFP8, NVFP4, Quantized
from tessera.formats.fp8 import FP8Row
from tessera.quantization import scales, stochastic

FORMATS = {
    "nvfp4": NVFP4(), "nvfp4_swept": NVFP4(), "mxfp8": MXFP8(), "int8": INT8(), "int8_row": INT8(per_row=True),
    "int8_convrot": INT8(per_row=True, convrot=True, convrot_groupsize=64),
    "fp8_e4m3": FP8E4M3(), "fp8_e5m2": FP8E5M2(), "fp8_row": FP8Row(),
}  # fmt: skip
SHAPES = ((48, 128), (33, 64))


def encoded(name, shape=SHAPES[0], seed=1):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[0, :32] = 0  # whole blocks of zeros
    encode = (lambda w: scales.encode(FORMATS[name], w)) if name == "nvfp4_swept" else FORMATS[name].encode
    return weight, encode(weight)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def _bytes(x):
    return x.reshape(-1).view(torch.uint8)


def same(a: Quantized, b: Quantized) -> bool:
    def equal(x, y):
        return x is y is None or (x.dtype == y.dtype and torch.equal(_bytes(x), _bytes(y)))

    return equal(a.qdata, b.qdata) and equal(a.scale, b.scale) and equal(a.block_scale, b.block_scale)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 64)])
@pytest.mark.parametrize("name", FORMATS)
def test_an_untouched_weight_keeps_every_byte(name, shape):
    format, (_, stored) = FORMATS[name], encoded(name, shape)
    assert same(stochastic.requantize(format, stored, format.decode(stored), seed=7), stored)


@pytest.mark.parametrize("name", FORMATS)
def test_the_mean_of_many_roundings_is_the_weight(name):
    format, (_, stored) = FORMATS[name], encoded(name)
    decoded = format.decode(stored)
    change = torch.randn(SHAPES[0], generator=torch.Generator().manual_seed(2)) * 1e-3
    change = torch.where(change * decoded < 0, change, 0.0)  # towards zero: what grows beyond the grid saturates
    wanted = decoded + change
    made = torch.stack([format.decode(stochastic.requantize(format, stored, wanted, seed)) for seed in range(400)])
    noise = made.std(0).square().mean().sqrt()
    offset = (made.mean(0) - wanted).square().mean().sqrt()
    assert offset < 1.3 * noise / 400**0.5  # what chance alone leaves
    retained = ((made.mean(0) - decoded) * change).sum() / change.square().sum()
    assert abs(retained - 1) < 0.02


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(name):
    format, (weight, stored) = FORMATS[name], encoded(name)
    wanted = format.decode(stored) + 1e-3 * weight.flip(0)
    first, again, other = (stochastic.requantize(format, stored, wanted, seed) for seed in (3, 3, 4))
    assert same(first, again)
    assert not torch.equal(first.qdata.view(torch.uint8), other.qdata.view(torch.uint8))


@pytest.mark.parametrize("name", FORMATS)
def test_a_value_far_beyond_the_grid_is_held_by_a_larger_scale(name):
    format, (_, stored) = FORMATS[name], encoded(name)
    wanted = format.decode(stored)
    wanted[5, 17] = 50 * wanted.abs().max()
    made = format.decode(stochastic.requantize(format, stored, wanted, seed=1))
    assert abs(made[5, 17] / wanted[5, 17] - 1) < 0.35  # one step of the coarsest grid, 4 for 6; not a fiftieth
    if name in ("mxfp8", "int8_row", "fp8_row"):  # nothing but its row or block has its scale
        far = torch.arange(48) != 5
        assert torch.equal(made[far], wanted[far])


def test_only_blocks_that_overflow_get_another_scale():
    format, (_, stored) = NVFP4(), encoded("nvfp4_swept")
    wanted = format.decode(stored)
    block = wanted[3, 16:32]
    block *= 1.5 * 6 * stored.scale * stored.block_scale[3, 1].float() / block.abs().max()
    made = stochastic.requantize(format, stored, wanted, seed=1)
    changed = made.block_scale.float() != stored.block_scale.float()
    assert changed.sum() == 1 and changed[3, 1]
    assert made.block_scale.float()[3, 1] * stored.scale * 6 >= block.abs().max() * (1 - 1e-6)
    still = torch.ones_like(wanted, dtype=torch.bool)
    still[3, 16:32] = False
    assert torch.equal(format.decode(made)[still], wanted[still])


def test_a_block_that_grows_a_little_saturates_and_its_others_stay():
    format, (_, stored) = NVFP4(), encoded("nvfp4_swept")
    wanted = format.decode(stored)
    row, column = 3, wanted[3].abs().argmax()
    wanted[row, column] *= 1.1
    made = stochastic.requantize(format, stored, wanted, seed=1)
    assert torch.equal(made.block_scale.view(torch.uint8), stored.block_scale.view(torch.uint8))
    assert (format.decode(made) != format.decode(stored)).sum() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_swept", "mxfp8", "fp8_e4m3"])
def test_decoding_in_16_bits_moves_no_code(name, dtype):
    format, (_, stored) = FORMATS[name], encoded(name)
    assert same(stochastic.requantize(format, stored, format.decode(stored).to(dtype), seed=1), stored)


def test_a_float_between_two_neighbours_takes_either_in_proportion():
    generator = torch.Generator().manual_seed(0)
    values = torch.full((20000,), 4.5)  # between 4 and 6: a quarter of the way
    rounded = stochastic.round_float(values, mantissa=1, smallest=0, generator=generator)
    assert set(rounded.unique().tolist()) == {4.0, 6.0}
    assert abs((rounded == 6).float().mean().item() - 0.25) < 0.02
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    assert torch.equal(stochastic.round_float(grid, 1, 0, generator), grid)


def test_a_merged_lora_adds_little_to_the_weight_error():
    """algorithms.md 14: nvfp4 and a LoRA of 2 % of the norm, total error .112; the host's dither leaves .186."""
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(3)) * 0.02
    stored = scales.encode(NVFP4(), weight)
    lora = torch.randn(512, 8, generator=torch.Generator().manual_seed(4)) @ torch.randn(8, 512)
    lora *= 0.02 * weight.norm() / lora.norm()
    decoded = NVFP4().decode(stored)
    made = NVFP4().decode(stochastic.requantize(NVFP4(), stored, decoded + lora, seed=5))
    assert relative(made, weight + lora) < 0.115
    applied = made - decoded
    assert 0.9 < ((applied * lora).sum() / lora.square().sum()).item() < 1.05
    assert (applied - lora).norm() / lora.norm() < 4


def test_plain_formats_are_refused_by_name():
    from tessera.formats import BF16

    weight = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="bf16 has no codes"):
        stochastic.requantize(BF16(), BF16().encode(weight), weight, seed=1)
