"""Promises of the K-extension: its bytes are the formats' own, its product layer + branch; sliders move no weight."""

import comfy_kitchen as ck
import pytest
import torch

from tessera.formats import MXFP8, NVFP4
from tessera.kernels import kextension as kx
from tessera.kernels import reference as ref
from tessera.kernels.balance import balance
from tessera.quantization import lowrank
from tessera.quantization.moment import Moment

KINDS = pytest.mark.parametrize("kind", ["nvfp4", "mxfp8", "fp8_row"])
SHAPES = pytest.mark.parametrize("shape", [(128, 256), (96, 96), (63, 3840), (300, 208), (16, 32)], ids=str)
EXACT = pytest.mark.parametrize("exact", [False, True], ids=["plain", "hi_lo"])
# relative error of the branch itself, in (plain, hi/lo)
BRANCH_ERROR = {"nvfp4": (0.15, 0.02), "mxfp8": (0.042, 0.002), "fp8_row": (0.042, 0.003)}


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def stored_bytes(tensor):
    return tensor.contiguous().view(torch.uint8)


def same_bytes(found, expected):
    return all(torch.equal(stored_bytes(a), stored_bytes(b)) for a, b in zip(found, expected, strict=True))


def row_scale(x):
    return x.abs().amax(1, keepdim=True) / 448


def operand(kind, x, scale=None):
    """(qdata, scale, scale of the whole or None) as the formats pack x; `scale` is the tensor's or the rows'."""
    if kind == "nvfp4":
        scale = x.abs().amax() / 2688 if scale is None else scale
        entries = NVFP4().pack(NVFP4().encode_scaled(x, scale))
        return entries["weight"], entries["weight_scale"], scale
    if kind == "mxfp8":
        entries = MXFP8().pack(MXFP8().encode(x))
        return entries["weight"], entries["weight_scale"], None
    scale = row_scale(x) if scale is None else scale
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale, scale


def product(kind, x, weight, m, n):
    """fp32 product of two operands (qdata, scale, shared scale), cropped to [m, n]."""
    parts = 3 if kind == "nvfp4" else 2
    return ref.packed_product(kind, x[:parts], weight[:parts])[:m, :n]


def random_branch(shape, rank, part=0.2, seed=5):
    """A LoRA in bf16: rows of A of norm 1, B of `part` of a weight's deviation of 0.02."""
    down = normal(rank, shape[1], seed=seed, scale=shape[1] ** -0.5)
    up = normal(shape[0], rank, seed=seed + 1, scale=0.02 * part)
    return down.bfloat16(), up.bfloat16()


class Layer:
    """A weight with its branches in reserved columns, and the input it is multiplied with."""

    def __init__(self, kind, shape, ranks, exact=False, reserved=0, m=63, seed=0, branch=None):
        self.kind, self.shape, self.m = kind, shape, m
        self.layout = kx.layout(kind, ranks, exact, reserved)
        self.weight = operand(kind, normal(*shape, seed=seed, scale=0.02))
        self.x = normal(m, shape[1], seed=seed + 1)
        self.input = operand(kind, self.x)
        self.down, self.up = branch or random_branch(shape, sum(ranks))
        self.balance = balance(kind, self.down, self.up, self.weight[2])
        assert not isinstance(self.balance, str), self.balance
        q, s = kx.reserve(kind, *self.weight[:2], self.layout.columns)
        self.extended = (q, s, self.weight[2])
        self.extension = kx.encode_up(kind, self.balance.up, self.weight[2], self.layout)
        kx.write(self.extension, q, s, self.layout.columns)

    def base(self):
        return product(self.kind, self.input, self.weight, self.m, self.shape[0])

    def run(self, strength):
        t = ref.branch_middle(self.x, self.balance.down, torch.as_tensor(strength))
        extended = kx.extend_input(self.kind, *self.input[:2], t, self.input[2], self.layout)
        return product(self.kind, (*extended, self.input[2]), self.extended, self.m, self.shape[0])

    def branch(self, strength):
        return ref.branch_middle(self.x, self.down, torch.as_tensor(strength)) @ self.up.float().T


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@KINDS
@SHAPES
def test_reserved_columns_are_what_zero_columns_pack_to(kind, shape):
    x = normal(*shape)
    columns = ref.round_up(shape[1], ref.BLOCKS[kind] or 1)
    qdata, scale, whole = operand(kind, x)
    wider = operand(kind, torch.cat([ref.pad_to(x, shape[0], columns), torch.zeros(shape[0], 64)], 1), whole)
    assert same_bytes(kx.reserve(kind, qdata, scale, 64), wider[:2])


@KINDS
@SHAPES
@pytest.mark.parametrize("columns", [64, 192])
def test_strip_gives_back_the_reserved_bytes_whatever_they_hold(kind, shape, columns):
    qdata, scale, whole = operand(kind, normal(*shape))
    reserved = kx.reserve(kind, qdata, scale, columns)
    assert same_bytes(kx.strip(kind, *reserved, columns), (qdata, scale))
    extension = kx.encode_up(kind, normal(shape[0], 16), whole, kx.layout(kind, [16], True, columns))
    kx.write(extension, *reserved, columns)
    stripped = kx.strip(kind, *reserved, columns)
    assert same_bytes(stripped, (qdata, scale))
    assert [t.dtype for t in stripped] == [qdata.dtype, scale.dtype]


@KINDS
@SHAPES
def test_write_touches_only_the_reserved_bytes_and_clear_empties_them(kind, shape):
    qdata, scale, whole = operand(kind, normal(*shape))
    q, s = kx.reserve(kind, qdata, scale, 64)
    empty = q.clone(), s.clone()
    kx.write(kx.encode_up(kind, normal(shape[0], 64, seed=3), whole, kx.layout(kind, [64])), q, s, 64)
    width = qdata.shape[1]
    assert torch.equal(stored_bytes(q)[:, :width], stored_bytes(empty[0])[:, :width])
    assert not torch.equal(stored_bytes(q)[:, width:], stored_bytes(empty[0])[:, width:])
    if ref.BLOCKS[kind]:
        own, count = width * (2 if kind == "nvfp4" else 1) // ref.BLOCKS[kind], 64 // ref.BLOCKS[kind]
        plain = [ref.unswizzle(stored_bytes(t), t.shape[0], t.shape[1]) for t in (s, empty[1])]
        changed = (plain[0] != plain[1]).any(0)
        assert changed.nonzero().flatten().tolist() == list(range(own, own + count))
    kx.clear(kind, q, s, 64)
    assert same_bytes((q, s), empty)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
def test_offsets_are_the_swizzle(kind):
    scales = torch.arange(300 * 21, dtype=torch.int32).view(300, 21)
    assert torch.equal(ref.swizzle(scales).flatten()[kx.offsets(300, 6, 0, 21, scales.device)], scales)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
def test_a_foreign_writers_padding_is_no_branch(kind):
    qdata, scale, whole = operand(kind, normal(64, 96))
    own = 96 // ref.BLOCKS[kind]
    where = kx.offsets(128, scale.shape[1] // 4, own, scale.shape[1] - own, scale.device)
    stored_bytes(scale).flatten()[where] = 255  # NaN in either scale format
    x = operand(kind, normal(5, 96, seed=1))
    x_wide = (*kx.reserve(kind, *x[:2], 64), x[2])
    weight = (*kx.reserve(kind, qdata, scale, 64), whole)
    assert torch.equal(product(kind, x_wide, weight, 5, 64), product(kind, x, (qdata, scale, whole), 5, 64))


@KINDS
@EXACT
@pytest.mark.parametrize("m", [0, 1, 63, 130])
@pytest.mark.parametrize("k", [96, 100, 3840])
def test_extended_input_is_the_quantized_concatenation_bit_for_bit(kind, exact, m, k):
    x, t = normal(m, k), normal(m, 21, seed=1, scale=0.7).bfloat16()
    scale = {"nvfp4": torch.tensor(5.0 / 2688), "fp8_row": row_scale(x) if m else torch.zeros(0, 1)}.get(kind)
    qdata, x_scale, _ = operand(kind, x, scale)
    layout = kx.layout(kind, [21], exact)
    middle = kx.extended_middle(kind, t, scale, layout)
    both = torch.cat([ref.pad_to(x, m, ref.round_up(k, ref.BLOCKS[kind] or 1)), middle], 1)
    found = kx.extend_input(kind, qdata, x_scale, t, scale, layout)
    expected = operand(kind, both, scale)[:2]
    assert torch.equal(stored_bytes(found[0]), stored_bytes(expected[0]))
    if kind != "fp8_row":
        assert torch.equal(stored_bytes(found[1]), stored_bytes(expected[1]))
    if not exact:
        assert layout.direct and torch.equal(middle, ref.pad_to(t.float(), m, 64))


@EXACT
@pytest.mark.parametrize("m", [1, 63, 128])
@pytest.mark.parametrize("k", [96, 3840])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_kitchen_quantizes_the_concatenation_to_the_same_bytes(exact, m, k, padded):
    x, t = normal(m, k), normal(m, 16, seed=1, scale=0.7).bfloat16()
    sx = x.abs().amax() / 2688
    layout = kx.layout("nvfp4", [16], exact)
    middle = kx.extended_middle("nvfp4", t, sx, layout)
    found = kx.extend_input("nvfp4", *ck.quantize_nvfp4(x, sx, pad_16x=padded), t, sx, layout)
    assert same_bytes(found, ck.quantize_nvfp4(torch.cat([x, middle], 1), sx, pad_16x=padded))
    layout = kx.layout("mxfp8", [16], exact)
    middle = kx.extended_middle("mxfp8", t, None, layout)
    found = kx.extend_input("mxfp8", *ck.quantize_mxfp8(x, pad_32x=padded), t, None, layout)
    assert same_bytes(found, ck.quantize_mxfp8(torch.cat([x, middle], 1), pad_32x=padded))


@KINDS
def test_reference_codes_are_the_formats_own(kind):
    x = torch.cat([normal(33, 96), torch.zeros(1, 96), normal(2, 96, scale=1e-30), normal(2, 96, scale=1e30)])
    if kind == "nvfp4":
        scale = torch.tensor(0.01)
        codes, block_scale = ref.nvfp4_codes(x, scale)
        expected = NVFP4().encode_scaled(x, scale)
        assert same_bytes((codes, block_scale), (expected.qdata, expected.block_scale))
        assert not ref.nvfp4_codes(x, torch.tensor(0.0))[0].any()  # never NaN
    elif kind == "mxfp8":
        expected = MXFP8().encode(x)
        assert same_bytes(ref.mxfp8_codes(x), (expected.qdata, expected.block_scale))
    else:
        assert torch.isfinite(ref.fp8_codes(x, row_scale(x)).float()).all()
        assert torch.isfinite(ref.fp8_codes(x, torch.tensor(1e-9)).float()).all()


@KINDS
@EXACT
def test_one_gemm_is_the_layer_plus_the_decoded_branch(kind, exact):
    layer = Layer(kind, (96, 208), [20], exact)
    t = ref.branch_middle(layer.x, layer.balance.down, torch.tensor(1.0))
    q, s = kx.extend_input(kind, *layer.input[:2], t, layer.input[2], layer.layout)
    decoded = []
    for qdata, scale, whole in ((q, s, layer.input[2]), layer.extended):
        values = ref.packed_decode(kind, *(qdata, scale, whole)[: 3 if kind == "nvfp4" else 2])
        decoded.append(values[:, -layer.layout.columns :])
    branch = (decoded[0] @ decoded[1].T)[: layer.m, :96]
    assert branch.norm() > 0
    torch.testing.assert_close(layer.run(1.0), layer.base() + branch, rtol=1e-5, atol=1e-5)


@KINDS
@EXACT
@pytest.mark.parametrize("rank", [1, 16, 21, 32, 64])
def test_error_of_the_branch_is_the_formats_rounding(kind, exact, rank):
    layer = Layer(kind, (256, 512), [rank], exact, m=128)
    assert relative(layer.run(1.0) - layer.base(), layer.branch(1.0)) < BRANCH_ERROR[kind][exact]


def corrected(kind, heavy, size=1024, m=256, rank=32):
    """Output errors (none, exact branch, K-extension) of a layer with an activation-weighted correction."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(size, size, generator=generator)
    if heavy:  # Student t with 4 degrees of freedom
        weight = weight / (torch.randn(4, size, size, generator=generator).square().mean(0)).sqrt()
    weight *= 0.02
    channels = torch.exp(1.1 * torch.randn(size, generator=generator))
    x = torch.randn(m, size, generator=generator) * channels
    packed, rounded = operand(kind, weight), operand(kind, x)
    decoded = ref.packed_decode(kind, *packed[: 3 if kind == "nvfp4" else 2])
    pair = lowrank.fit(weight - decoded, rank, moment=Moment(channels.square(), size))
    down, up = pair.down.bfloat16(), pair.up.bfloat16()
    factors = balance(kind, down, up, packed[2])
    layout = kx.layout(kind, [rank])
    wide = kx.reserve(kind, *packed[:2], layout.columns)
    kx.write(kx.encode_up(kind, factors.up, packed[2], layout), *wide, layout.columns)
    t = ref.branch_middle(x, factors.down, torch.tensor(1.0)).bfloat16()
    extended = kx.extend_input(kind, *rounded[:2], t, rounded[2], layout)
    truth, base = x @ weight.T, product(kind, rounded, packed, m, size)
    exact = base + ref.branch_middle(x, down, torch.tensor(1.0)) @ up.float().T
    inside = product(kind, (*extended, rounded[2]), (*wide, packed[2]), m, size)
    return [relative(y, truth) for y in (base, exact, inside)]


@KINDS
@pytest.mark.parametrize("heavy", [False, True], ids=["gaussian", "heavy"])
def test_correction_in_the_gemm_costs_little_against_the_exact_one(kind, heavy):
    none, exact, inside = corrected(kind, heavy)
    assert exact < 0.95 * none  # the correction is worth something
    assert inside - exact < (0.0008 if kind == "nvfp4" else 0.0001)


@KINDS
@EXACT
def test_strength_moves_no_byte_of_the_weight_and_scales_the_branch(kind, exact):
    layer = Layer(kind, (96, 208), [16], exact)
    before = [stored_bytes(t).clone() for t in layer.extended if t is not None and t.ndim]
    for strength in (0.0, 0.5, 1.0, 2.0, -1.0):
        y = layer.run(strength)
        if strength == 0.0:
            torch.testing.assert_close(y, layer.base(), rtol=1e-6, atol=1e-6)
        else:
            assert relative(y - layer.base(), layer.branch(strength)) < BRANCH_ERROR[kind][exact]
    after = [stored_bytes(t) for t in layer.extended if t is not None and t.ndim]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@KINDS
@pytest.mark.parametrize("strengths", [(1.0, 0.7, -0.5), (1.0, 0.0, 2.0), (0.0, 1.0, 0.0)])
def test_several_loras_share_one_branch_each_with_its_strength(kind, strengths):
    ranks, shape = (32, 8, 4), (96, 208)
    pairs = [random_branch(shape, r, part, seed=9 + r) for r, part in zip(ranks, (0.05, 0.1, 0.2), strict=True)]
    stacked = torch.cat([d for d, _ in pairs]), torch.cat([u for _, u in pairs], 1)
    layer = Layer(kind, shape, ranks, (False, True, True), branch=stacked)
    strength = torch.cat([torch.full((r,), s) for r, s in zip(ranks, strengths, strict=True)])
    found = layer.run(strength) - layer.base()
    assert relative(found, layer.branch(strength)) < BRANCH_ERROR[kind][0]
    if strengths[0] == 0.0:
        assert relative(found, layer.branch(strength)) < 1.5 * BRANCH_ERROR[kind][1]  # only a hi/lo one is on


@KINDS
def test_zero_branch_is_the_layer(kind):
    for down, up in ((torch.zeros(8, 208), normal(96, 8)), (normal(8, 208), torch.zeros(96, 8))):
        layer = Layer(kind, (96, 208), [8], branch=(down.bfloat16(), up.bfloat16()))
        torch.testing.assert_close(layer.run(1.0), layer.base(), rtol=1e-6, atol=1e-6)


@KINDS
def test_dead_ranks_do_not_decide_the_others_balance(kind):
    down, up = random_branch((96, 208), 16)
    alive = balance(kind, down, up, operand(kind, normal(96, 208, scale=0.02))[2])
    dead_down, dead_up = torch.cat([down, torch.zeros_like(down[:2])]), torch.cat([up, up[:, :2] * 1e30], 1)
    dead_up[:, 15] = 0  # a column of B that is zero beside a row of A that is not
    layer = Layer(kind, (96, 208), [18], branch=(dead_down, dead_up))
    assert torch.equal(layer.balance.exponents[:15], alive.exponents[:15])
    assert not layer.balance.up[:, 16:].any() and torch.isfinite(layer.run(1.0)).all()
    expected = ref.branch_middle(layer.x, down[:15], torch.tensor(1.0)) @ up[:, :15].float().T
    assert relative(layer.run(1.0) - layer.base(), expected) < BRANCH_ERROR[kind][0]


@KINDS
@pytest.mark.parametrize("exponent", [-90, -20, 20, 90])
def test_magnitude_may_sit_in_either_factor(kind, exponent):
    down, up = random_branch((96, 208), 16)
    plain = Layer(kind, (96, 208), [16], branch=(down, up))
    moved = Layer(kind, (96, 208), [16], branch=(down * 2.0**exponent, up * 2.0**-exponent))
    if kind == "mxfp8":  # balanced within the branch only: the powers of two stay, the codes do not change
        assert torch.equal(stored_bytes(plain.extension.qdata), stored_bytes(moved.extension.qdata))
    else:
        assert torch.equal(plain.balance.down, moved.balance.down) and torch.equal(plain.balance.up, moved.balance.up)
    assert torch.equal(plain.run(1.0), moved.run(1.0))


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_balance_is_exact_and_keeps_the_product(kind, dtype):
    down, up = (t.to(dtype) for t in random_branch((96, 512), 24, 0.05))
    down = down * torch.exp2(torch.arange(24) % 5 - 2.0).to(dtype).unsqueeze(1)
    found = balance(kind, down, up, operand(kind, normal(96, 512, scale=0.02))[2])
    power = found.powers
    assert torch.equal(power, torch.exp2(found.exponents.double()).float())
    assert found.down.dtype == dtype
    lost = found.down.float() / power.unsqueeze(1) - down.float()
    assert lost.norm() <= (0 if dtype == torch.bfloat16 else 1e-4) * down.float().norm()
    assert torch.equal(found.up * power, up.float())
    norms = found.down.float().norm(dim=1)
    assert norms.max() / norms.min() < 2.01
    if kind != "mxfp8":
        assert 0 < found.rho_t <= 0.5 and 0 < found.rho_b <= 1


def test_known_input_statistics_replace_the_guess():
    down, up = random_branch((96, 512), 16)
    scale = operand("nvfp4", normal(96, 512, scale=0.02))[2]
    guess = balance("nvfp4", down, up, scale)
    assert torch.equal(balance("nvfp4", down, up, scale, rms=37.0).exponents, guess.exponents)
    scaled = balance("nvfp4", down, up, scale, input_scale=torch.tensor(1e-9))
    assert torch.equal(scaled.exponents, guess.exponents)  # a scale without the rms under it says nothing
    known = balance("nvfp4", down, up, scale, rms=torch.ones(512), input_scale=torch.tensor(96.0 / 2688))
    assert known.rho_t * known.rho_b < guess.rho_t * guess.rho_b / 8  # outliers leave the branch more room


@pytest.mark.parametrize("kind", ["nvfp4", "fp8_row"])
def test_headroom_in_the_inputs_scale_admits_a_larger_branch_and_costs_the_input_nothing(kind):
    shape, x = (96, 208), normal(63, 208, seed=1)
    down, up = random_branch(shape, 16, 1.5)
    weight = operand(kind, normal(*shape, scale=0.02))
    assert isinstance(balance(kind, down, up, weight[2]), str)
    found = balance(kind, down, up, weight[2], headroom=8.0)
    assert found.rho_t <= 0.5 and found.rho_b <= 1
    tight = operand(kind, x)
    roomy = operand(kind, x, tight[2] * 8)
    parts = 3 if kind == "nvfp4" else 2
    error = [relative(ref.packed_decode(kind, *o[:parts])[:63, :208], x) for o in (tight, roomy)]
    assert error[1] < error[0] * 1.001
    layout = kx.layout(kind, [16])
    wide = kx.reserve(kind, *weight[:2], 64)
    kx.write(kx.encode_up(kind, found.up, weight[2], layout), *wide, 64)
    t = ref.branch_middle(x, found.down, torch.tensor(1.0))
    y = product(kind, (*kx.extend_input(kind, *roomy[:2], t, roomy[2], layout), roomy[2]), (*wide, weight[2]), 63, 96)
    branch = ref.branch_middle(x, down, torch.tensor(1.0)) @ up.float().T
    assert relative(y - product(kind, roomy, weight, 63, 96), branch) < BRANCH_ERROR[kind][0]


@pytest.mark.parametrize("kind", ["nvfp4", "fp8_row"])
def test_a_branch_that_cannot_share_the_scale_says_why(kind):
    down, up = random_branch((96, 208), 16)
    scale = operand(kind, normal(96, 208, scale=0.02))[2]
    reason = balance(kind, down, up * 100, scale)
    assert isinstance(reason, str) and "too large to share" in reason and kind in reason
    assert "scale 0" in balance(kind, down, up, torch.zeros_like(scale))
    assert not isinstance(balance("mxfp8", down, up * 100), str)  # no shared scale, no limit
    assert "not finite" in balance(kind, down * torch.nan, up, scale)
    spread = torch.cat([down[:8] * 1e-4, down[8:] * 1e4]).half()  # fp16 cannot hold it balanced
    assert "range" in balance(kind, (spread.float() * 1e-4).half(), up.half() * 1e-3, scale * 1e6)


@KINDS
def test_middles_beyond_the_range_saturate_and_stay_finite(kind):
    layer = Layer(kind, (96, 208), [16])
    y = layer.run(1e6)
    assert torch.isfinite(y).all()
    if kind != "mxfp8":
        assert (y - layer.base()).norm() < 1e-2 * layer.branch(1e6).norm()


@pytest.mark.parametrize(
    ("kind", "ranks", "exact", "reserved", "columns"),
    [
        ("nvfp4", [32], False, 0, 64),
        ("nvfp4", [64], False, 0, 64),
        ("nvfp4", [65], False, 0, 128),
        ("nvfp4", [16], True, 0, 64),
        ("nvfp4", [21], True, 0, 128),  # hi and lo in blocks of their own
        ("mxfp8", [21], True, 0, 64),
        ("mxfp8", [32], True, 0, 128),
        ("fp8_row", [32, 16], [False, True], 64, 128),
        ("fp8_row", [4], False, 128, 128),
        ("nvfp4", [], False, 64, 64),
        ("nvfp4", [80], True, 0, 256),
    ],
)
def test_capacity(kind, ranks, exact, reserved, columns):
    layout = kx.layout(kind, ranks, exact, reserved)
    assert layout.columns == columns
    taken = [c for run in layout.runs for c in range(run.column, run.column + run.rank)]
    assert len(taken) == len(set(taken)) and all(c < columns for c in taken)


def test_more_columns_than_pay_are_refused_with_a_reason():
    assert "256" in kx.layout("nvfp4", [257])
    assert "256" in kx.layout("mxfp8", [100, 10], [True, False])


def test_wrong_operands_are_named():
    qdata, scale, whole = operand("nvfp4", normal(32, 64))
    with pytest.raises(ValueError, match="int8 has no K-extension"):
        kx.reserve("int8", qdata, scale, 64)
    with pytest.raises(ValueError, match="multiples of 64"):
        kx.reserve("nvfp4", qdata, scale, 32)
    with pytest.raises(ValueError, match="128x4"):
        kx.reserve("nvfp4", qdata, scale[:64], 64)
    extension = kx.encode_up("nvfp4", normal(48, 4), whole, kx.layout("nvfp4", [4]))
    with pytest.raises(ValueError, match="48 rows, the operand 32"):
        kx.write(extension, *kx.reserve("nvfp4", qdata, scale, 64), 64)
    with pytest.raises(ValueError, match="takes 64 columns, 128 are reserved"):
        kx.write(extension, *kx.reserve("nvfp4", qdata, scale, 128), 128)
    with pytest.raises(ValueError, match="rank 5 in a layout for 4"):
        kx.encode_up("nvfp4", normal(32, 5), whole, kx.layout("nvfp4", [4]))
    with pytest.raises(ValueError, match="1 hi/lo choices for 2"):
        kx.layout("nvfp4", [4, 4], [True])


@KINDS
@EXACT
def test_extending_the_input_compiles_without_a_graph_break(kind, exact):
    layer = Layer(kind, (32, 64), [4], exact, m=5)
    t = ref.branch_middle(layer.x, layer.balance.down, torch.tensor(1.0))
    arguments = (kind, *layer.input[:2], t, layer.input[2], layer.layout)
    compiled = torch.compile(kx.extend_input, backend="eager", fullgraph=True)
    assert same_bytes(compiled(*arguments), kx.extend_input(*arguments))
