"""Error feedback: exact codes, a naive float64 GPTQ beside it, errors below those of swept scales, stated fallbacks."""

import itertools

import pytest
import torch

from tessera import formats
from tessera.formats import INT8, MXFP8, NVFP4
from tessera.kernels import reference as ref
from tessera.quantization import gptq, pipeline
from tessera.quantization.moment import BLOCK, Moment

LABELS = ("nvfp4", "mxfp8", "int8", "int8_row", "int8_convrot_64", "int8_convrot_256")
SHAPES = [(96, 256), (1, 256), (63, 512), (100, 72), (40, 200), (96, 80)]
KINDS = ("full", "block", "diagonal")
WHERE = [(formats.parse(label), shape) for label in LABELS for shape in SHAPES
         if "convrot" not in label or shape[1] % 256 == 0]  # fmt: skip
CASES = pytest.mark.parametrize(("format", "shape"), WHERE, ids=lambda value: getattr(value, "label", str(value)))
DENSE = pytest.mark.parametrize("label", LABELS)

# Output error for correlated inputs over that of `pipeline.encode` (swept scales, or the format's own): at most.
# Measured: nvfp4 .28-.44 / .28-.52 / .62-.85, mxfp8 .34-.49 / .36-.49, int8 .37-.52 / .38-.52 / 1,
# convrot .26-.40 / .34-.44 / .69-.90 for full / block / diagonal moments.
RATIO = {
    "nvfp4": {"full": 0.5, "block": 0.6, "diagonal": 0.9},
    "mxfp8": {"full": 0.55, "block": 0.55, "diagonal": 1.0},
    "int8": {"full": 0.6, "block": 0.6, "diagonal": 1.0},
    "int8_row": {"full": 0.6, "block": 0.6, "diagonal": 1.0},
    "int8_convrot_64": {"full": 0.45, "block": 0.5, "diagonal": 0.95},
    "int8_convrot_256": {"full": 0.45, "block": 0.5, "diagonal": 0.95},
}
DEAD = {"int8_convrot_64": 3.0, "int8_convrot_256": 3.0}  # rotation spreads a group's error over dead channels too
DESCENT = 0.99  # what three sweeps leave of the damped objective, at most; measured .84 to .985


def inputs(width, tokens, seed=0):
    """Correlated columns, power ~ k^-1.4 in a random basis, one in fifty of them 8 times as loud."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(tokens, width, generator=generator) * torch.arange(1, width + 1) ** -0.7
    x = latent @ torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    x = x / x.square().mean().sqrt()
    x[:, torch.randperm(width, generator=generator)[: max(1, width // 50)]] *= 8
    return x


def weight(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 0.02 * (torch.rand(shape[0], 1, generator=generator) + 0.5)


def moment(width, kind="full", scale=1.0):
    x = inputs(width, 8 * width)
    full = Moment(scale * (x.T @ x) / len(x), width)
    return {"full": full, "block": full.blocks_only(), "diagonal": full.diagonal_only()}[kind]


def codes(quantized):
    """All bytes of a quantized weight."""
    parts = (quantized.qdata, quantized.scale, quantized.block_scale)
    return torch.cat([p.contiguous().flatten().view(torch.uint8) for p in parts if p is not None])


def rows_alike(a, b):
    """Share of rows with the same codes."""
    return (a.qdata.view(torch.uint8) == b.qdata.view(torch.uint8)).all(1).float().mean().item()


def energies(error, metric):
    """(E R E^T)_ii of each row, in float64."""
    return torch.einsum("ij,jk,ik->i", error.double(), metric.double(), error.double())


# What comes out


@pytest.mark.parametrize("kind", KINDS)
@CASES
def test_codes_are_stored_exactly_and_err_less_than_without_feedback(format, shape, kind):
    format, w, truth = format.for_shape(*shape), weight(shape), moment(shape[1])
    notes = []
    quantized = gptq.quantize(format, w, moment(shape[1], kind), notes)
    decoded = format.decode(quantized)
    assert decoded.shape == w.shape and torch.isfinite(decoded).all() and not notes
    stored = format.unpack(format.pack(quantized), *shape)
    assert torch.equal(codes(stored), codes(quantized)) and torch.equal(format.decode(stored), decoded)
    without = truth.energy(w - format.decode(pipeline.encode(format, w)))
    assert (truth.energy(w - decoded) / without) ** 0.5 <= RATIO[format.label][kind]


@pytest.mark.parametrize("kind", KINDS)
@DENSE
def test_white_inputs_cost_nothing(label, kind):
    """Where columns tell nothing of each other, feedback errs as swept scales do."""
    format, w = formats.parse(label).for_shape(64, 256), weight((64, 256))
    white = Moment(torch.eye(256), 256)
    metric = {"full": white, "block": white.blocks_only(), "diagonal": white.diagonal_only()}[kind]
    error = (w - format.decode(gptq.quantize(format, w, metric, []))).norm()
    assert error <= 1.001 * (w - format.decode(pipeline.encode(format, w))).norm()


@pytest.mark.parametrize("label", ["mxfp8", "int8", "int8_row"])
def test_diagonal_moment_is_the_formats_own_rounding(label):
    format, w = formats.parse(label), weight((40, 200))
    assert torch.equal(codes(gptq.quantize(format, w, moment(200, "diagonal"), [])), codes(format.encode(w)))


def test_diagonal_moment_sweeps_scales_for_the_columns_that_count():
    """NVFP4 with a diagonal: every block takes the candidate of least weighted error, as a search over all shows."""
    format, w, metric = NVFP4(), weight((16, 64)), moment(64, "diagonal")
    found = format.decode(gptq.quantize(format, w, metric, [])) - w
    scale = pipeline.scales.global_scale(w)
    amax = w.view(16, 4, 16).abs().amax(-1)
    trials = []
    for factor in pipeline.scales.CANDIDATES:
        block_scale = (amax * (factor / 6) / scale).clamp(max=448).to(torch.float8_e4m3fn)
        trials.append(format.decode(format.encode_with(w, scale, block_scale)) - w)
    power = metric.diagonal() + 0.01 * metric.diagonal().mean()
    best = (torch.stack(trials).square() * power).view(-1, 16, 4, 16).sum(-1).amin(0)
    torch.testing.assert_close((found.square() * power).view(16, 4, 16).sum(-1), best, rtol=1e-5, atol=0)


# A naive float64 GPTQ (algorithms.md 4)


def naive(format, w, metric):
    """Column by column, with the inverse; steps asked of the same grid. The decoded weight in the stored basis."""
    if isinstance(format, INT8) and format.convrot:
        group = format.convrot_groupsize
        turn = torch.block_diag(*[ref.rotate(torch.eye(group), group).double()] * (w.shape[1] // group))
        w, metric = format.rotate(w), turn.T @ metric @ turn
    grid = gptq.grid(format, w)
    columns = w.shape[1]
    damped = metric + gptq.DAMPINGS[0] * metric.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))  # not inv: torch 2.13's LU fails with 2 MKL threads
    upper = torch.linalg.cholesky(inverse, upper=True)
    values = w.double().clone()
    for k in range(columns):
        if k % grid.width == 0:
            importance = upper.diagonal()[k : k + grid.width] ** -2
            step = grid.steps(values[:, k : k + grid.width].T.float(), importance.float().unsqueeze(1))
        rounded = grid.round(values[:, k].float(), step).double()
        error = (values[:, k] - rounded) / upper[k, k]
        values[:, k] = rounded
        values[:, k + 1 :] -= torch.outer(error, upper[k, k + 1 :])
    return values


@pytest.mark.parametrize("kind", KINDS)
@DENSE
def test_agrees_with_naive_gptq_in_float64(label, kind):
    """Rows whose codes differ have met a tie within fp32's rounding: at most one in twenty."""
    shape = (60, 512)
    format, w, metric = formats.parse(label).for_shape(*shape), weight(shape), moment(512, kind)
    tiles = metric.tiles().double()
    truth = naive(format, w, torch.block_diag(*tiles))
    found = gptq.quantize(format, w, metric, [], sweeps=0)
    stored = format.decode(found)
    stored = format.rotate(stored) if isinstance(format, INT8) else stored
    same = ((stored - truth).abs() < 1e-5 * truth.abs().amax()).all(1)
    assert same.float().mean() >= 0.95
    whole = torch.block_diag(*tiles)
    basis = format.rotate(w) - truth.float() if isinstance(format, INT8) else w - truth.float()
    back = format.rotate(basis) if isinstance(format, INT8) else basis
    ratio = energies(w - format.decode(found), whole).sum() / energies(back, whole).sum()
    assert abs(ratio - 1) < 0.01


# Coordinate descent


@pytest.mark.parametrize("kind", ["full", "block"])
@DENSE
def test_no_sweep_of_descent_makes_a_row_worse(label, kind):
    shape = (63, 512)
    format, w, metric = formats.parse(label).for_shape(*shape), weight(shape), moment(512, kind)
    turned = isinstance(format, INT8) and format.convrot  # it works in the stored basis
    tiles, ridge, _ = gptq._regular(metric.rotated(format.convrot_groupsize) if turned else metric, [])
    damped = torch.block_diag(*tiles) + ridge * torch.eye(512)
    basis = format.rotate if isinstance(format, INT8) else (lambda x: x)
    steps = []
    for sweeps in range(4):
        error = basis(w - format.decode(gptq.quantize(format, w, metric, [], sweeps)))
        steps.append(energies(error, damped))
    for before, after in itertools.pairwise(steps):
        assert (after <= before * (1 + 1e-5)).all()
    assert steps[3].sum() < DESCENT * steps[0].sum()


# What must not matter


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", ["nvfp4", "mxfp8", "int8_convrot_64"])
def test_rows_at_once_do_not_matter(label, kind, monkeypatch):
    """Same codes from pieces of 7 and 20 rows; of 1 row, BLAS sums in another order and a tie may fall otherwise."""
    shape = (22, 256)
    format, w, metric = formats.parse(label).for_shape(*shape), weight(shape), moment(256, kind)
    whole = gptq.quantize(format, w, metric, [])
    for rows, alike in ((7, 1.0), (20, 1.0), (1, 0.9)):
        monkeypatch.setattr(gptq, "AT_ONCE", rows * 256)
        pieces = gptq.quantize(format, w, metric, [])
        assert rows_alike(pieces, whole) >= alike, rows
        assert pieces.qdata.shape == whole.qdata.shape
        errors = [metric.energy(w - format.decode(q)) for q in (pieces, whole)]
        assert abs(errors[0] / errors[1] - 1) < 5e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(96, 256), (100, 72), (40, 200)], ids=str)
@pytest.mark.parametrize("label", ["nvfp4", "mxfp8", "int8_row"])
def test_unit_of_the_inputs_does_not_matter(label, shape, kind):
    """x and 2^k x have the same codes, padded columns or not: damping is relative to the columns there are."""
    format, w = formats.parse(label), weight(shape)
    quantized = gptq.quantize(format, w, moment(shape[1], kind), [])
    for scale in (2.0**-20, 2.0**-50, 2.0**20):
        assert torch.equal(codes(gptq.quantize(format, w, moment(shape[1], kind, scale), [])), codes(quantized))


def at_threads(count, function):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("label", ["nvfp4", "mxfp8", "int8_convrot_64"])
def test_same_bytes_at_the_same_number_of_threads(label):
    """Another number changes the order of sums: most rows keep their codes, the error stays."""
    shape = (31, 384)
    format, w, metric = formats.parse(label).for_shape(*shape), weight(shape), moment(384)
    found = {n: [at_threads(n, lambda: gptq.quantize(format, w, metric, [])) for _ in range(2)] for n in (1, 2)}
    for first, again in found.values():
        assert torch.equal(codes(first), codes(again))
    one, two = found[1][0], found[2][0]
    assert rows_alike(one, two) >= 0.9
    errors = [metric.energy(w - format.decode(q)) for q in (one, two)]
    assert abs(errors[0] / errors[1] - 1) < 5e-3


@pytest.mark.parametrize("columns", [200, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_weight_and_moment_are_left_as_they_were(kind, columns):
    w, metric = weight((40, columns)), moment(columns, kind)
    before = w.clone(), metric.matrix.clone()
    for label in ("nvfp4", "mxfp8", "int8_row"):
        gptq.quantize(formats.parse(label), w, metric, [])
    assert torch.equal(w, before[0]) and torch.equal(metric.matrix, before[1])


@pytest.mark.parametrize("width", [32, 96, 352])
def test_triangular_inverse_by_halves_is_the_inverse(width, monkeypatch):
    monkeypatch.setattr(gptq, "SOLVED", 32)
    x = inputs(width, 8 * width)
    lower = torch.linalg.cholesky(x.T @ x / len(x) + 0.01 * torch.eye(width)).expand(2, -1, -1).clone()
    before = lower.double()
    gptq._invert(lower)
    assert not lower.triu(1).any()
    assert (lower.double() @ before - torch.eye(width)).abs().max() < 1e-4


# Bad input


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_zero_weight_stays_zero(label, kind):
    format = formats.parse(label).for_shape(32, 256)
    decoded = format.decode(gptq.quantize(format, torch.zeros(32, 256), moment(256, kind), []))
    assert not decoded.any()


@pytest.mark.parametrize("label", ["nvfp4", "mxfp8"])
def test_zero_blocks_take_part_in_the_feedback(label):
    """Zero weights amid others are codes like all: finite, and no worse in the output than left at zero."""
    format, w, metric = formats.parse(label), weight((63, 256)), moment(256)
    w[:, 32:64] = 0
    w[5] = 0
    decoded = format.decode(gptq.quantize(format, w, metric, []))
    assert torch.isfinite(decoded).all() and not decoded[5].any()
    kept = decoded.clone()
    kept[:, 32:64] = 0
    assert metric.energy(w - decoded) <= metric.energy(w - kept)


@pytest.mark.parametrize("kind", KINDS)
@DENSE
def test_dead_channels_keep_their_weights(label, kind):
    """A channel that never had an input keeps a weight that is near its own: another prompt may wake it."""
    format, w = formats.parse(label).for_shape(63, 256), weight((63, 256))
    x = inputs(256, 2048)
    dead = torch.arange(0, 256, 5)
    x[:, dead] = 0
    full = Moment(x.T @ x / len(x), 256)
    metric = {"full": full, "block": full.blocks_only(), "diagonal": full.diagonal_only()}[kind]
    notes = []
    decoded = format.decode(gptq.quantize(format, w, metric, notes))
    plain = format.decode(format.encode(w))
    assert torch.isfinite(decoded).all() and not notes
    assert (w - decoded)[:, dead].norm() <= DEAD.get(label, 1.5) * (w - plain)[:, dead].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_no_input_at_all_is_swept_scales(kind):
    w, zero = weight((40, 256)), Moment(torch.zeros(256, 256), 256)
    metric = {"full": zero, "block": zero.blocks_only(), "diagonal": zero.diagonal_only()}[kind]
    notes = []
    found = gptq.quantize(NVFP4(), w, metric, notes)
    swept = (w - NVFP4().decode(pipeline.encode(NVFP4(), w))).norm()
    assert (w - NVFP4().decode(found)).norm() <= 1.001 * swept and not notes


@pytest.mark.parametrize("format", [NVFP4(), MXFP8()], ids=lambda f: f.label)
def test_one_huge_weight_is_refused_or_harmless(format):
    """It takes the range of NVFP4's one tensor scale, and the others vanish: said, not stored."""
    w, metric = weight((64, 256)), moment(256)
    w[3, 7] = 1e5
    if isinstance(format, NVFP4):
        with pytest.raises(ValueError, match=r"blocks of 16 would become zero .* use mxfp8 or int8_convrot"):
            gptq.quantize(format, w, metric, [])
        return
    decoded = format.decode(gptq.quantize(format, w, metric, []))
    rows = [row for row in range(64) if row != 3]
    assert (w - decoded)[rows].norm() < 0.06 * w[rows].norm()


@pytest.mark.parametrize("kind", ["full", "block"])
def test_few_tokens_of_rank_one_need_no_more_than_the_first_damping(kind):
    x = inputs(256, 1)
    full = Moment(x.T @ x, 256)
    notes = []
    decoded = NVFP4().decode(
        gptq.quantize(NVFP4(), weight((8, 256)), full if kind == "full" else full.blocks_only(), notes)
    )
    assert torch.isfinite(decoded).all() and not notes


@pytest.mark.parametrize(("negative", "damping"), [(0.005, None), (0.05, "0.1"), (0.5, "1"), (5.0, "10")])
def test_damping_that_a_moment_needs_is_noted(negative, damping):
    """A moment that rounding made indefinite, its least eigenvalue -negative times the mean."""
    basis = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(0))).Q
    values = torch.full((128,), (128 + negative) / 127)
    values[0] = -negative
    matrix = basis * values @ basis.T
    notes = []
    decoded = NVFP4().decode(gptq.quantize(NVFP4(), weight((8, 128)), Moment((matrix + matrix.T) / 2, 128), notes))
    assert torch.isfinite(decoded).all()
    said = [] if damping is None else [f"damping {damping} of the mean instead of 0.01: the moment is near singular"]
    assert notes == said


BROKEN = {"negative": -torch.eye(BLOCK), "NaN": torch.full((BLOCK, BLOCK), float("nan")),
          "indefinite": 1e3 * (1 - torch.eye(BLOCK))}  # fmt: skip


@pytest.mark.parametrize("matrix", BROKEN.values(), ids=BROKEN)
def test_moment_that_no_damping_mends_is_refused(matrix):
    with pytest.raises(gptq.Singular, match="not positive definite at any damping"):
        gptq.quantize(NVFP4(), weight((8, BLOCK)), Moment(matrix, BLOCK), [])


# Hardware


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@DENSE
def test_cuda_agrees_with_cpu(label):
    """Sums in another order: nine rows in ten keep their codes, the output error agrees within 1 %."""
    shape = (300, 512)
    format, w, metric = formats.parse(label).for_shape(*shape), weight(shape), moment(512)
    cpu = gptq.quantize(format, w, metric, [])
    cuda = gptq.quantize(format, w.cuda(), metric.to("cuda"), [])
    found = formats.Quantized(*(None if t is None else t.cpu() for t in (cuda.qdata, cuda.scale, cuda.block_scale)))
    assert rows_alike(found, cpu) >= 0.9
    errors = [metric.energy(w - format.decode(q)) for q in (found, cpu)]
    assert abs(errors[0] / errors[1] - 1) < 0.01
