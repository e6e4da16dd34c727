"""Every way of multiplying by a quantized weight on the CPU gives the reference's numbers; no wrong one is chosen."""

import pytest
import torch

from tessera import formats
from tessera.kernels import cpu
from tessera.kernels import reference as ref
from tessera.kernels.cpu import ONEDNN, WIDENED, CPUFacts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}  # of the result, relative L2
SHAPES = (  # M, N, K, group; both sides of every chunk size, nothing a multiple of a tile
    (0, 5, 64, 64), (1, 1, 1, 0), (1, 65, 256, 256), (3, 17, 1024, 1024), (33, 40, 63, 0), (63, 96, 80, 16),
    (130, 513, 12, 4), (515, 70, 192, 64), (2049, 3, 64, 64),
)  # fmt: skip

AVX512 = CPUFacts("AVX512", vnni=True, bf16=True, onednn=True, saturates=False)
AVX2 = CPUFacts("AVX2", vnni=False, bf16=False, onednn=True, saturates=True)
ARM = CPUFacts("DEFAULT", vnni=False, bf16=False, onednn=False, saturates=False)


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh buffers hold NaN, so that a row or column that is never written shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def onednn():
    if not cpu.facts().onednn:
        pytest.skip(f"oneDNN's int8 product is not for this CPU: {cpu.facts()}")


def layer(m, n, k, group, dtype, code_max=64, rank=3):
    x = torch.randn(m, k).to(dtype)
    weight = torch.randint(-code_max, code_max + 1, (n, k), dtype=torch.int8)
    scale = torch.rand(n, 1) * 0.01 + 1e-3
    return x, weight, scale, group, torch.randn(n).to(dtype), torch.randn(m, rank).to(dtype), torch.randn(n, rank)


def quantized_product(x, weight, scale, group, bias=None, t=None, up=None):
    """The reference with x quantized per row, in fp32."""
    y = ref.int8_product(*ref.quantize_rows(x, group), weight, scale)
    return plus(y, bias, t, up)


def exact_product(x, weight, scale, group, bias=None, t=None, up=None):
    """The reference with nothing rounded but the stored weight, in fp64."""
    rotated = ref.rotate(x, group) if group else x
    return plus(rotated.double() @ (weight.double() * scale.double()).T, bias, t, up)


def plus(y, bias, t, up):
    y = y if bias is None else y + bias
    return y if t is None else y + t.to(y.dtype) @ up.to(y.dtype).T


def error(y, expected):
    return ((y.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_onednn_multiplies_the_codes_that_the_reference_does(onednn, shape, dtype):
    arguments = layer(*shape, dtype)
    y = cpu.onednn_linear(*arguments)
    assert y.dtype == dtype and y.shape == shape[:2]
    # a sum near a tie may round to the next code, as the rotation adds in another order
    assert error(y, quantized_product(*arguments)) < ROUNDING[dtype] + (5e-4 if shape[3] else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_widened_codes_round_nothing_but_the_result(shape, dtype):
    arguments = layer(*shape, dtype, code_max=127)
    y = cpu.widened_linear(*arguments)
    assert y.dtype == dtype and y.shape == shape[:2]
    assert error(y, exact_product(*arguments)) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoded_rows_are_multiplied_once_each(shape, dtype):
    x, weight, scale, _, bias, t, up = layer(*shape, dtype, code_max=127)
    seen = []

    def decode_rows(rows):
        seen.extend(range(*rows.indices(len(weight))))
        return weight[rows].float() * scale[rows]

    y = cpu.decoded_linear(x, decode_rows, len(weight), bias, t, up)
    assert y.dtype == dtype and y.shape == shape[:2]
    assert error(y, exact_product(x, weight, scale, 0, bias, t, up)) < ROUNDING[dtype]
    assert seen == list(range(len(weight)))


def test_decoded_rows_in_bf16_err_as_bf16_does():
    x, weight, scale, _, bias, t, up = layer(63, 40, 80, 0, torch.bfloat16)
    y = cpu.decoded_linear(x, lambda rows: weight[rows] * scale[rows], 40, bias, t, up, compute=torch.bfloat16)
    assert error(y, exact_product(x, weight, scale, 0, bias, t, up)) < 2 * ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("linear", (cpu.onednn_linear, cpu.widened_linear))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("branch", (True, False))
def test_bias_and_branch_are_each_optional(onednn, linear, bias, branch):
    x, weight, scale, group, b, t, up = layer(35, 48, 64, 16, torch.float32)
    extra = {"bias": b if bias else None, "t": t if branch else None, "up": up if branch else None}
    y = linear(x, weight, scale, group, **extra)
    assert error(y, exact_product(x, weight, scale, group, **extra)) < 0.01


@pytest.mark.parametrize("shape", ((1, 1), (5, 63), (130, 96), (257, 80)), ids=str)
@pytest.mark.parametrize("label", ("nvfp4", "mxfp8", "fp8_e4m3", "fp8_e5m2", "int8_row", "int8_convrot_16"))
def test_looked_up_rows_are_the_references_bit_for_bit(label, shape):
    if label == "int8_convrot_16":
        shape = (shape[0], 64)
    format = formats.parse(label).for_shape(*shape)
    entries = format.pack(format.encode(torch.randn(shape)))
    kind = {"nvfp4": "nvfp4", "mxfp8": "mxfp8"}.get(label, label.split("_")[0])
    scale, block_scale = entries["weight_scale"], None
    if kind == "nvfp4":
        scale, block_scale = entries["weight_scale_2"], entries["weight_scale"]
    for rows in (slice(0, shape[0]), slice(shape[0] // 2, shape[0]), slice(0, 0)):
        arguments = (
            kind,
            entries["weight"],
            scale,
            block_scale,
            rows,
            shape[1],
            getattr(format, "convrot_groupsize", 0),
        )
        assert torch.equal(cpu.decode_rows(*arguments), ref.decode_rows(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", (0, 1, 63, 130))
@pytest.mark.parametrize("strength", (torch.tensor(0.7), torch.tensor([0.5, 0.0, -2.0])), ids=("one", "each"))
def test_the_branchs_middle_is_the_references_before_its_rounding(strength, m, dtype):
    x, down = torch.randn(m, 96).to(dtype), torch.randn(3, 96).to(dtype)
    t = cpu.branch_middle(x, down, strength)
    assert t.dtype == torch.float32 and t.shape == (m, 3)
    assert error(t, ref.branch_middle(x.double(), down, strength.double())) < 1e-6
    assert torch.equal(cpu.branch_middle(x, down, torch.tensor(0.0)), torch.zeros(m, 3))


@pytest.mark.parametrize("linear", (cpu.onednn_linear, cpu.widened_linear))
def test_one_scale_for_the_tensor_equals_the_same_scale_per_row(onednn, linear):
    x, weight, _, group, *_ = layer(35, 48, 64, 64, torch.float32)
    scale = torch.tensor(0.02)
    assert torch.equal(linear(x, weight, scale, group), linear(x, weight, scale.expand(48, 1), group))


@pytest.mark.parametrize("linear", (cpu.onednn_linear, cpu.widened_linear))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_non_contiguous_input_and_weight_change_nothing(onednn, linear, dtype):
    x, weight, scale, group, *_ = layer(40, 48, 64, 64, dtype)
    expected = linear(x, weight, scale, group)
    for strided in (x.T.contiguous().T, torch.cat([x, x], 1)[:, :64]):  # BLAS adds in another order
        assert error(linear(strided, weight.T.contiguous().T, scale, group), expected) < ROUNDING[dtype] + 5e-4
    y = cpu.decoded_linear(x.T.contiguous().T, lambda rows: weight[rows].float(), 48)
    assert error(y, cpu.decoded_linear(x, lambda rows: weight[rows].float(), 48)) < ROUNDING[dtype]


@pytest.mark.parametrize("linear", (cpu.onednn_linear, cpu.widened_linear))
def test_zero_rows_and_tiny_scales_give_finite_results(onednn, linear):
    x, weight, scale, group, bias, *_ = layer(40, 48, 64, 64, torch.float16)
    x[3] = 0
    scale[5] = 1e-30
    y = linear(x, weight, scale, group, bias)
    assert y.isfinite().all()
    assert torch.equal(y[3], bias)


@pytest.mark.parametrize("group", (0, 4, 16, 64, 256, 1024))
def test_rotation_in_two_steps_is_the_references(group):
    x = torch.randn(5, 2048)
    expected = ref.rotate(x, group) if group else x
    assert error(cpu.rotate(x, group), expected) < 1e-6


def codes_of_sign(code, n, k):
    """Weight rows of one code and rows of its negative: sums of one sign, the largest that 16-bit pairs can meet."""
    weight = torch.full((n, k), code, dtype=torch.int8)
    weight[n // 2 :] = -code
    return weight


@pytest.mark.parametrize("shape", ((1, 4, 2), (1, 65, 63), (64, 64, 64), (33, 40, 3840)), ids=str)
def test_codes_made_for_this_cpu_multiply_exactly(onednn, shape):
    m, n, k = shape
    x = torch.ones(m, k)
    x[:, k // 2 :] = -1  # codes 127 and -127: 255 and 1 with the zero point
    x[: m // 2] = 1
    weight = codes_of_sign(cpu.facts().code_max, n, k)
    x_codes, x_scale = ref.quantize_rows(x)
    expected = (x_codes.double() @ weight.double().T) * x_scale
    assert torch.equal(cpu.onednn_linear(x, weight, torch.ones(n, 1), 0), expected.float())


def test_saturation_is_found_exactly_where_full_codes_multiply_wrongly(onednn):
    x, weight = torch.ones(64, 64), codes_of_sign(cpu.CODE_MAX, 64, 64)
    right = error(cpu.onednn_linear(x, weight, torch.ones(64, 1), 0), x @ weight.float().T) < 1e-6
    assert right is not cpu.facts().saturates


@pytest.mark.vnni
def test_full_codes_multiply_exactly_with_vnni(onednn):
    if cpu.facts().saturates:
        pytest.skip(f"needs a CPU whose int8 product does not saturate, this is {cpu.facts()}")
    arguments = layer(130, 65, 192, 0, torch.float32, code_max=127)
    assert error(cpu.onednn_linear(*arguments), quantized_product(*arguments)) < ROUNDING[torch.float32]


@pytest.mark.parametrize("m", (0, 1, 63, 64, 4608))
@pytest.mark.parametrize("code_max", (7, 64, 65, 127))
@pytest.mark.parametrize("facts", (AVX512, AVX2, ARM), ids=lambda f: f.capability)
def test_a_way_that_the_cpu_gets_wrong_is_never_chosen(facts, code_max, m):
    path, reason = cpu.choose(m, 3840, 3840, facts, code_max)
    assert path in (ONEDNN, WIDENED) and reason
    if path == ONEDNN:
        assert facts.onednn and not (facts.saturates and code_max > 64)


def test_many_rows_are_multiplied_as_integers_where_that_is_exact():
    assert cpu.choose(4608, 3840, 3840, AVX512)[0] == ONEDNN
    assert cpu.choose(4608, 3840, 3840, AVX2, AVX2.code_max)[0] == ONEDNN
    assert cpu.choose(4608, 3840, 3840, AVX2) == (WIDENED, "AVX2 without VNNI multiplies codes above 64 wrongly")
    assert cpu.choose(1, 3840, 3840, AVX512)[0] == WIDENED
    assert (AVX512.code_max, AVX2.code_max, ARM.code_max) == (127, 64, 127)


def test_int8_linear_takes_the_chosen_way(onednn, monkeypatch):
    for facts in (AVX512, AVX2, ARM):
        monkeypatch.setattr(cpu, "facts", lambda facts=facts: facts)
        for m, code_max in ((1, 64), (70, 64), (70, 127)):
            arguments = layer(m, 48, 64, 64, torch.float32)
            chosen = cpu.choose(m, 48, 64, facts, code_max)[0] == ONEDNN
            linear = cpu.onednn_linear if chosen else cpu.widened_linear
            assert torch.equal(cpu.int8_linear(*arguments, code_max=code_max), linear(*arguments))


def test_bf16_is_multiplied_in_bf16_only_where_it_is_not_emulated():
    assert cpu.compute_dtype(torch.bfloat16, AVX512) == torch.bfloat16
    assert cpu.compute_dtype(torch.bfloat16, AVX2) == torch.float32
    for facts in (AVX512, AVX2, ARM):
        assert cpu.compute_dtype(torch.float16, facts) == cpu.compute_dtype(torch.float32, facts) == torch.float32


def test_facts_are_read_without_an_error_and_named():
    facts = cpu.facts()
    assert facts is cpu.facts()
    assert facts.onednn or not facts.saturates
    assert str(AVX2) == "CPU AVX2, oneDNN int8, saturating"
