"""Inputs quantized by our kernels are the reference's, bit for bit where sums have one order only.

Without a GPU the kernels run in Triton's interpreter, which must be switched on before Triton is imported: this file
then runs itself in a process of its own.
"""

import os

import pytest
import torch

pytest.importorskip("triton")

import interpreted
from tessera.formats import MXFP8, NVFP4
from tessera.kernels import reference as ref

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"


def compiled_or_interpreted(test):
    """Runs on a GPU, or in the process that the test below starts."""
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETING, reason="no GPU")(test))


BF16 = torch.bfloat16
SHAPES = ((1, 96), (63, 80), (130, 144), (16, 100))  # [M, K]
SHAPES_AND_DTYPES = (*((shape, BF16) for shape in SHAPES), (SHAPES[1], torch.float32), (SHAPES[3], torch.float16))


@pytest.mark.skipif(INTERPRETING, reason="is the interpreter")
def test_kernels_keep_their_promises_in_the_interpreter():
    interpreted.run(__file__)


@pytest.fixture
def kernels(monkeypatch):
    """The launchers; outputs start as poison: NaN, and bytes of 0x7F."""
    from tessera.kernels.gpu import activations

    monkeypatch.setattr(activations, "_empty", interpreted.poisoned)
    return activations


def tensors(*shape, dtype=BF16, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * scale
    return (x * torch.exp(torch.randn(shape[0], 1, generator=generator))).to(dtype).to(DEVICE)


def branch(rank, k, dtype=BF16):
    down = tensors(rank, k, dtype=dtype, seed=1, scale=0.1)
    return down, torch.linspace(-1, 2, rank, device=DEVICE)


def tensor_scale(x):
    return x.float().abs().amax() / 2688 if x.numel() else torch.ones((), device=DEVICE)


def nvfp4(x, sx):
    packed = NVFP4().pack(NVFP4().encode_scaled(x.float(), sx))
    return packed["weight"], packed["weight_scale"]


def mxfp8(x):
    packed = MXFP8().pack(MXFP8().encode(x.float()))
    return packed["weight"], packed["weight_scale"]


def assert_bytes(found, expected):
    """Codes and scales are the expected ones in dtype, shape and every byte."""
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a, b = a.view(torch.uint8), b.view(torch.uint8)
        assert torch.equal(a, b), f"{(a != b).sum()} of {a.numel()} bytes differ, first at {(a != b).nonzero()[0]}"


def assert_near_codes(found, expected, share=0.999):
    """int8 codes, of which a few lie across a rounding tie, as sums in another order do."""
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference == 0).float().mean() >= share


def assert_projection(t, x, down, s):
    """t within one rounding to x's dtype of the fp32 product; the interpreter truncates where a GPU rounds."""
    expected = (x.double() @ down.double().T) * s.double()
    size = (x.double().abs() @ down.double().abs().T) * s.double().abs()
    step = torch.finfo(x.dtype).eps
    assert t.dtype == x.dtype
    assert ((t.double() - expected).abs() <= expected.abs() * step + size * 1e-6).all()


@compiled_or_interpreted
@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_DTYPES)
def test_int8_without_rotation_is_the_reference_bit_for_bit(kernels, shape, dtype):
    x = tensors(*shape, dtype=dtype)
    x[0] = 0  # scale 1e-30, codes 0
    q, scale, t = kernels.rotate_quantize_int8(x, 0)
    assert t is None
    assert_bytes((q, scale), ref.quantize_rows(x))


@compiled_or_interpreted
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, BF16))
@pytest.mark.parametrize(
    ("group", "shape"), ((4, (3, 12)), (16, (63, 80)), (64, (33, 320)), (256, (17, 768)), (256, (1, 256)))
)
def test_int8_rotates_in_fp32(kernels, group, shape, dtype):
    x = tensors(*shape, dtype=dtype)
    q, scale, _ = kernels.rotate_quantize_int8(x, group)
    expected, expected_scale = ref.quantize_rows(x, group)
    assert_near_codes(q, expected)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)


@compiled_or_interpreted
@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_DTYPES)
def test_nvfp4_and_mxfp8_bytes_are_the_references(kernels, shape, dtype):
    x = tensors(*shape, dtype=dtype)
    x[0, :40] = 0
    x[-1, -3:] = torch.tensor([-0.0, 1e-6, -1e-6])
    sx = tensor_scale(x)
    assert_bytes(kernels.quantize_nvfp4(x, sx)[:2], nvfp4(x, sx))
    assert_bytes(kernels.quantize_mxfp8(x)[:2], mxfp8(x))
    (nv, mx, t) = kernels.dual_quantize(x, sx)
    assert t is None
    assert_bytes(nv, nvfp4(x, sx))
    assert_bytes(mx, mxfp8(x))


@compiled_or_interpreted
def test_values_beyond_a_static_scale_saturate(kernels):
    x = tensors(20, 64)
    sx = tensor_scale(x) / 7
    assert_bytes(kernels.quantize_nvfp4(x, sx)[:2], nvfp4(x, sx))


@compiled_or_interpreted
def test_a_tensor_scale_of_zero_gives_zeros(kernels):
    codes, scales, _ = kernels.quantize_nvfp4(
        torch.zeros(5, 32, dtype=BF16, device=DEVICE), torch.zeros((), device=DEVICE)
    )
    assert not codes.any()
    assert not scales.view(torch.uint8).any()


@compiled_or_interpreted
def test_extreme_magnitudes_keep_the_references_exponents(kernels):
    """Powers of two times 448 and their neighbours, the smallest and the largest numbers of fp32, one per block."""
    exact = 448.0 * torch.exp2(torch.arange(-120.0, 119.0, 7))
    values = torch.cat(
        (exact, exact * (1 + 2**-8), exact * (1 - 2**-8), torch.tensor([1e-45, 1e-38, 2.0**-127 * 448, 3e38]))
    )
    x = torch.zeros(len(values), 32, device=DEVICE)
    x[:, 5] = values
    x[:, 6] = -values / 3
    assert_bytes(kernels.quantize_mxfp8(x)[:2], mxfp8(x))


@compiled_or_interpreted
@pytest.mark.parametrize("seed", range(3))
def test_ties_round_to_even_in_every_format(kernels, seed):
    """Numbers on the midpoints of E2M1 and E4M3 under scales that are powers of two."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-24, 25, (32, 64), generator=generator) / 4.0
    steps[:, ::16] = 6.0  # block scale exactly 1 under sx = 1
    x = steps.to(DEVICE)
    assert_bytes(kernels.quantize_nvfp4(x, torch.ones((), device=DEVICE))[:2], nvfp4(x, torch.ones((), device=DEVICE)))
    m = torch.randint(0, 2**9, (32, 64), generator=generator).float() * torch.exp2(
        torch.randint(-12, 1, (32, 64), generator=generator)
    )
    m[:, ::32] = 448.0
    assert_bytes(kernels.quantize_mxfp8(m.to(DEVICE))[:2], mxfp8(m.to(DEVICE)))


@compiled_or_interpreted
@pytest.mark.parametrize(
    ("shape", "rank", "dtype"),
    (
        ((1, 96), 1, BF16),
        ((63, 144), 5, BF16),
        ((33, 80), 33, BF16),
        ((17, 80), 3, torch.float16),
        ((17, 80), 3, torch.float32),
    ),
)
def test_branch_reads_the_input_before_rotation_and_rounding(kernels, shape, rank, dtype):
    x = tensors(*shape, dtype=dtype)
    down, s = branch(rank, shape[1], dtype)
    sx = tensor_scale(x)
    q, _, t = kernels.rotate_quantize_int8(x, 16, down, s)
    assert_projection(t, x, down, s)
    assert_near_codes(q, ref.quantize_rows(x, 16)[0])
    *nv, t = kernels.quantize_nvfp4(x, sx, down, s)
    assert_projection(t, x, down, s)
    assert_bytes(nv, nvfp4(x, sx))
    *mx, t = kernels.quantize_mxfp8(x, down, s[:1].reshape(()))
    assert_projection(t, x, down, s[:1])
    assert_bytes(mx, mxfp8(x))
    *_, t = kernels.dual_quantize(x, sx, down)
    assert_projection(t, x, down, torch.ones(1, device=DEVICE))


@compiled_or_interpreted
@pytest.mark.parametrize(
    ("shape", "rank", "extension"), (((1, 96), 1, 64), ((63, 80), 33, 64), ((33, 128), 70, 128), ((2, 64), 130, 192))
)
def test_extension_columns_are_the_quantized_branch(kernels, shape, rank, extension):
    """The same bytes as of [x | t | 0], for the t that the same kernel returns without an extension."""
    x = tensors(*shape)
    down, s = branch(rank, shape[1])
    sx = tensor_scale(x)

    def joined(block, t):
        zeros = x.new_zeros(shape[0], ref.round_up(shape[1], block) - shape[1])
        return torch.cat((x, zeros, t, x.new_zeros(shape[0], extension - rank)), 1)

    nv, mx, t = kernels.dual_quantize(x, sx, down, s, (extension, 0))
    assert_bytes(nv, nvfp4(joined(16, t), sx))
    assert_bytes(mx, mxfp8(x))
    *nv, none = kernels.quantize_nvfp4(x, sx, down, s, extension)
    assert none is None
    assert_bytes(nv, nvfp4(joined(16, t), sx))
    *mx, none = kernels.quantize_mxfp8(x, down, s, extension)
    assert none is None
    assert_bytes(mx, mxfp8(joined(32, t)))

    nv, mx, none = kernels.dual_quantize(x, sx, down, s, (extension, extension))
    assert none is None
    assert_bytes(nv, nvfp4(joined(16, t), sx))
    assert_bytes(mx, mxfp8(joined(32, t)))


@compiled_or_interpreted
@pytest.mark.parametrize("shape", ((1, 96), (63, 80), (130, 128)))
def test_an_extension_without_a_branch_is_empty(kernels, shape):
    x = tensors(*shape)
    sx = tensor_scale(x)

    def behind(block):
        return torch.cat((x, x.new_zeros(shape[0], ref.round_up(shape[1], block) - shape[1] + 64)), 1)

    nv, mx, none = kernels.dual_quantize(x, sx, extensions=(64, 64))
    assert none is None
    assert_bytes(nv, nvfp4(behind(16), sx))
    assert_bytes(mx, mxfp8(behind(32)))
    assert_bytes(kernels.quantize_nvfp4(x, sx, extension=64)[:2], nvfp4(behind(16), sx))


@compiled_or_interpreted
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, BF16))
def test_swiglu_is_not_rounded_before_its_codes(kernels, dtype):
    gate, up = tensors(33, 128, dtype=dtype), tensors(33, 128, dtype=dtype, seed=2)
    down, s = branch(7, 128, dtype)
    v = ref.swiglu(gate, up)
    q, scale, t = kernels.swiglu_quantize_int8(gate, up, 64, down, s)
    expected, expected_scale = ref.quantize_rows(v, 64)
    assert_near_codes(q, expected)
    torch.testing.assert_close(scale, expected_scale, rtol=2e-6, atol=0)
    size = (v.abs().double() @ down.double().abs().T) * s.abs()
    exact = (v.double() @ down.double().T) * s
    assert ((t.double() - exact).abs() <= (size + exact.abs()) * torch.finfo(dtype).eps + size * 1e-6).all()

    sx = tensor_scale(v)
    same = [kernels.swiglu_quantize_nvfp4(gate, up, sx)[:2], kernels.swiglu_quantize_mxfp8(gate, up)[:2]]
    for found, expected in zip(same, (nvfp4(v, sx), mxfp8(v)), strict=True):
        for a, b in zip(found, expected, strict=True):  # exp differs by an ulp between libraries
            assert (a.view(torch.uint8) == b.view(torch.uint8)).float().mean() >= 0.999


@compiled_or_interpreted
def test_swiglu_of_fp16_saturates_as_the_host_does(kernels):
    gate = torch.tensor(
        [[60000.0, 60000.0, -60000.0, torch.inf, torch.nan] + [1.0] * 27], dtype=torch.float16, device=DEVICE
    )
    up = torch.tensor([[60000.0, -60000.0, 60000.0, 2.0, 1.0] + [1.0] * 27], dtype=torch.float16, device=DEVICE)
    assert_bytes(kernels.swiglu_quantize_mxfp8(gate, up)[:2], mxfp8(ref.swiglu(gate, up)))
    q, scale, _ = kernels.swiglu_quantize_int8(gate, up, 0)
    assert_bytes((q, scale), ref.quantize_rows(ref.swiglu(gate, up)))


@compiled_or_interpreted
def test_nan_stays_visible(kernels):
    x = tensors(3, 64)
    x[1, 7] = torch.nan
    sx = torch.ones((), device=DEVICE)
    assert kernels.rotate_quantize_int8(x, 0)[1].isnan().flatten().tolist() == [False, True, False]
    codes, scales, _ = kernels.quantize_nvfp4(x, sx)
    stored = ref.unswizzle(scales.view(torch.uint8), 3, 4).view(torch.float8_e4m3fn).float()
    assert stored.isnan().nonzero().tolist() == [[1, 0]]
    codes, _, _ = kernels.quantize_mxfp8(x)
    assert codes[:3].float().isnan().nonzero().tolist() == [[1, 7]]


@compiled_or_interpreted
def test_no_rows_give_empty_outputs(kernels):
    x = torch.empty(0, 64, dtype=BF16, device=DEVICE)
    down, s = branch(3, 64)
    sx = torch.ones((), device=DEVICE)
    q, scale, t = kernels.rotate_quantize_int8(x, 64, down, s)
    assert (q.shape, scale.shape, t.shape) == ((0, 64), (0, 1), (0, 3))
    codes, scales, none = kernels.quantize_nvfp4(x, sx, down, s, 64)
    assert (codes.shape, scales.shape, none) == ((0, 64), (0, 8), None)
    codes, scales, t = kernels.quantize_mxfp8(x, down, s)
    assert (codes.shape, scales.shape, t.shape) == ((0, 64), (0, 4), (0, 3))


@compiled_or_interpreted
def test_refusals_name_the_value_and_the_remedy(kernels):
    x = tensors(2, 96)
    with pytest.raises(ValueError, match="in_features 96 is not a multiple of the ConvRot group 64"):
        kernels.rotate_quantize_int8(x, 64)
    with pytest.raises(ValueError, match="convrot group 32"):
        kernels.rotate_quantize_int8(x, 32)
    with pytest.raises(ValueError, match=r"not contiguous; call \.contiguous"):
        kernels.quantize_mxfp8(tensors(96, 96).T)
    with pytest.raises(ValueError, match="extension of 64 columns for a branch of rank 65"):
        kernels.quantize_mxfp8(x, *branch(65, 96), extension=64)
    with pytest.raises(ValueError, match=r"input is torch\.float64"):
        kernels.quantize_mxfp8(x.double())
