"""The form of an adapter beside a layer multiplies like its delta, within the loss that it states."""

import pytest
import torch

from adapting import CASES, KINDS, LINEAR, SHAPES, adapter_of, random
from tessera.adapters import Change, Dense, Difference, DoRA, Kronecker, LoHa, LoKr, RowScale, form

STRENGTHS = (0.5, 1.0, -0.7, 2.0)
ALPHA = 1.7
TOLERANCE = 1e-4  # relative L2 of what is exact, fp32


def applied(made, x, weight, strength):
    """What a form adds to a layer's output: pair, extras and bias."""
    base, s = x @ weight.T, torch.tensor(strength)
    added = torch.zeros_like(base)
    if made.pair is not None:
        added += strength * (x @ made.pair.down.float().T @ made.pair.up.float().T)
    for extra in made.extras:
        added += extra(x, base if extra.needs_base else None, s)
    return added if made.bias is None else added + strength * made.bias


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()


def refused():
    raise AssertionError("the weight was decoded, though nothing needs it")


@pytest.mark.parametrize("tolerance", [0.0, 0.02])
@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_form_multiplies_like_its_delta(kind, shape, alpha, tolerance):
    adapter = adapter_of(KINDS[kind](*SHAPES[shape]), alpha)
    weight, x = random(*SHAPES[shape], seed=9), random(2, 5, SHAPES[shape][1], seed=3)
    bias = random(SHAPES[shape][0], seed=4)
    made = form(Change(adapter, bias), SHAPES[shape], lambda: weight, tolerance)
    assert made.loss <= tolerance and made.kind == adapter.kind
    for strength in STRENGTHS:
        wanted = x @ adapter.delta(weight, strength).T + strength * bias
        assert relative(applied(made, x, weight, strength), wanted) < TOLERANCE + 3 * made.loss


@pytest.mark.parametrize("tolerance", [0.0, 0.02])
@pytest.mark.parametrize(("kind", "shape"), [case for case in CASES if case[0] not in ("difference", "replacement")])
def test_dora_by_rows_is_exact_beside_the_layer(kind, shape, tolerance):
    weight, x = random(*SHAPES[shape], seed=9), random(2, 5, SHAPES[shape][1], seed=3)
    rows = weight.norm(dim=1, keepdim=True)
    adapter = adapter_of(KINDS[kind](*SHAPES[shape]), ALPHA, rows * (1 + 0.2 * random(*rows.shape)))
    made = form(Change(adapter), SHAPES[shape], lambda: weight, tolerance)
    assert isinstance(made.extras[0], RowScale) and made.kind == f"DoRA {adapter.inner.kind}"
    for strength in STRENGTHS:
        wanted = x @ adapter.delta(weight, strength).T
        assert relative(applied(made, x, weight, strength), wanted) < TOLERANCE + 3 * made.loss


@pytest.mark.parametrize("kind", [kind for kind in LINEAR if kind not in ("difference", "replacement")])
@pytest.mark.parametrize("shape", SHAPES)
def test_dora_by_columns_is_a_full_difference(kind, shape):
    weight, x = random(*SHAPES[shape], seed=9), random(2, 5, SHAPES[shape][1], seed=3)
    columns = weight.norm(dim=0, keepdim=True)
    adapter = adapter_of(KINDS[kind](*SHAPES[shape]), ALPHA, columns * (1 + 0.2 * random(*columns.shape)))
    made = form(Change(adapter), SHAPES[shape], lambda: weight, 0.02)
    assert made.how == "as a full product" and isinstance(made.extras[0], Dense)  # small layers have no small rank
    for strength in STRENGTHS:
        wanted = x @ adapter.delta(weight, strength).T
        assert relative(applied(made, x, weight, strength), wanted) < TOLERANCE


@pytest.mark.parametrize("kind", ["OFT", "BOFT with rescale"])
def test_dora_by_columns_of_a_rotation_says_that_it_is_right_at_strength_1(kind):
    weight, x = random(24, 24, seed=9), random(5, 24)
    adapter = adapter_of(KINDS[kind](24, 24), ALPHA, weight.norm(dim=0, keepdim=True) * 1.2)
    made = form(Change(adapter), (24, 24), lambda: weight)
    assert made.how.endswith("right at strength 1 only")
    assert relative(applied(made, x, weight, 1.0), x @ adapter.delta(weight).T) < TOLERANCE


# ---- which form it is


LOW = {"LoRA": 3, "LoRA of a 1x1 convolution": 3, "LoRA with a Tucker core": 3, "LoHa": 4,
       "LoHa with Tucker cores": 4, "LoKr": 24, "LoKr, w2 in factors": 4, "LoKr, both in factors": 4, "GLoRA": 6,
       "GLoRA, old layout": 6}  # fmt: skip


@pytest.mark.parametrize("kind", LOW)
def test_what_has_a_small_rank_is_a_pair_and_exact(kind):
    shape = (24, 24)
    made = form(Change(adapter_of(KINDS[kind](*shape))), shape, lambda: random(*shape))
    assert made.pair.rank == LOW[kind] and not made.extras and (made.how, made.loss) == ("exact", 0.0)


def test_the_weight_is_decoded_only_for_what_depends_on_it():
    for kind in KINDS:
        change = Change(adapter_of(KINDS[kind](24, 24)))
        if kind.startswith("GLoRA"):
            with pytest.raises(AssertionError):
                form(change, (24, 24), refused)
        else:
            form(change, (24, 24), refused)


def test_a_bias_alone_has_neither_pair_nor_extras():
    made = form(Change(None, random(24)), (24, 8), refused)
    assert made.pair is None and not made.extras and made.kind == "bias" and made.nbytes == 96
    torch.testing.assert_close(applied(made, random(2, 8), random(24, 8), 0.5), 0.5 * random(24).expand(2, 24))


def test_a_change_that_reshapes_the_layer_is_refused():
    change = Change(adapter_of(KINDS["LoRA"](30, 20)), None, (30, 20))
    with pytest.raises(ValueError, match=r"it makes the layer \[30, 20\] out of \[24, 16\], which no branch can"):
        form(change, (24, 16), refused)
    assert form(change, (30, 20), refused).pair.rank == 3


def low_rank(out, columns, rank, noise, seed=0):
    """A difference of a rank, and white noise of a share of its norm."""
    low = random(out, rank, seed=seed) @ random(rank, columns, seed=seed + 1)
    rest = random(out, columns, seed=seed + 2)
    return low + noise * low.norm() / rest.norm() * rest


@pytest.mark.parametrize(("out", "columns"), [(256, 256), (512, 96), (96, 500)])
@pytest.mark.parametrize(("rank", "noise"), [(1, 0.0), (7, 0.0), (12, 0.015)])
def test_a_difference_is_reduced_to_the_smallest_rank_within_the_tolerance(out, columns, rank, noise):
    difference = low_rank(out, columns, rank, noise)
    made = form(Change(Difference(difference)), (out, columns), refused, 0.02)
    assert made.pair.rank <= rank and not made.extras
    true = relative(made.pair.weight(), difference)
    assert made.loss == pytest.approx(true, rel=1e-3, abs=1e-6) and made.loss <= 0.02
    assert made.how == f"reduced to rank {made.pair.rank}, losing {100 * made.loss:.1f} %"
    assert (torch.linalg.svdvals(difference)[made.pair.rank - 1 :].norm() / difference.norm()) > 0.02  # one less is not


def test_a_reduction_meets_any_tolerance_or_is_not_done():
    difference = low_rank(256, 256, 12, 0.05)
    for tolerance in (0.2, 0.06, 0.04, 1e-3, 1e-5):
        made = form(Change(Difference(difference)), (256, 256), refused, tolerance)
        assert made.loss <= tolerance and (made.pair is None) == (tolerance < 0.05)


def test_what_cannot_be_reduced_or_must_not_be_is_multiplied_in_full():
    for difference, tolerance in ((random(256, 256), 0.02), (low_rank(256, 256, 4, 0.0), 0.0)):
        made = form(Change(Difference(difference)), (256, 256), refused, tolerance)
        assert made.pair is None and made.how == "as a full product" and made.loss == 0.0
        assert (
            torch.equal(made.extras[0].weight, difference) and made.extras[0].weight.data_ptr() == difference.data_ptr()
        )


def test_a_difference_of_zeros_is_nothing():
    made = form(Change(Difference(torch.zeros(64, 64))), (64, 64), refused)
    assert made.pair is None and not made.extras and made.how == "exact"


def test_a_reduction_is_the_same_every_time():
    first, again = (form(Change(Difference(low_rank(256, 256, 9, 0.01))), (256, 256), refused) for _ in range(2))
    assert torch.equal(first.pair.up, again.pair.up) and torch.equal(first.pair.down, again.pair.down)


def test_the_rank_of_a_reduction_is_capped():
    """By an eighth of the smaller side: beyond that the full product is about as cheap."""
    assert form(Change(Difference(low_rank(256, 256, 32, 0.0))), (256, 256), refused).pair.rank == 32
    assert form(Change(Difference(low_rank(256, 256, 33, 0.0))), (256, 256), refused, 1e-3).pair is None


def test_a_large_loha_is_reduced_if_it_can_be_else_the_cheaper_of_pair_and_product():
    def loha(rank, out=256, columns=256, second=None):
        other = second or (random(out, rank, seed=2), random(rank, columns, seed=3))
        return LoHa.of(random(out, rank), random(rank, columns, seed=1), *other)

    flat = (torch.ones(256, 1), torch.ones(1, 256))  # times ones: the product has the rank of the first alone
    made = form(Change(loha(12, second=[torch.cat([part] * 12, dim) for dim, part in ((1, flat[0]), (0, flat[1]))])),
                (256, 256), refused)  # fmt: skip
    assert made.pair.rank == 12 and made.how.startswith("reduced to rank 12")
    made = form(Change(loha(9, 512, 512)), (512, 512), refused)
    assert made.pair.rank == 81 and made.how == "exact"
    made = form(Change(loha(12)), (256, 256), refused)
    assert made.pair is None and made.how == "as a full product"


def test_a_replacement_takes_the_layers_place_at_any_strength():
    other, weight, x = random(24, 16), random(24, 16, seed=1), random(5, 16)
    made = form(Change(adapter_of({".set_weight": other})), (24, 16), refused)
    (extra,) = made.extras
    assert extra.fixed and extra.needs_base
    for strength in STRENGTHS:
        torch.testing.assert_close(x @ weight.T + applied(made, x, weight, strength), x @ other.T, rtol=1e-4, atol=1e-4)


# ---- Kronecker products


FACTORED = [(False, False), (True, False), (False, True), (True, True)]


def large_lokr(factored, out=(8, 60), columns=(12, 40), rank=5):
    """w1 of rank 8 or 5, w2 of 40 or 5."""
    parts = {}
    for number, (rows, width), split in zip((1, 2), zip(out, columns, strict=True), factored, strict=True):
        whole = {f"w{number}": random(rows, width, seed=number)}
        factors = {f"w{number}_a": random(rows, rank), f"w{number}_b": random(rank, width, seed=number)}
        parts |= factors if split else whole
    return LoKr.of(**parts, alpha=2.0)


@pytest.mark.parametrize("factored", FACTORED[:3])
@pytest.mark.parametrize("sizes", [((8, 60), (12, 40)), ((60, 8), (12, 40)), ((7, 31), (33, 5)), ((30, 30), (30, 30))])
def test_a_kronecker_product_is_never_written_out(factored, sizes):
    adapter = large_lokr(factored, *sizes, rank=5 if sizes[0][0] != 7 else 4)
    shape = sizes[0][0] * sizes[0][1], sizes[1][0] * sizes[1][1]
    made = form(Change(adapter), shape, refused)
    if adapter.rank <= 64:
        assert made.pair.rank == adapter.rank
        return
    (extra,) = made.extras
    assert isinstance(extra, Kronecker) and made.how == "factored" and made.loss == 0.0
    stored = sum(parameter.numel() for parameter in extra.parameters())
    assert stored <= sum(tensor.numel() for tensor in adapter.tensors()) < shape[0] * shape[1] / 4
    x = random(2, 3, shape[1])
    for strength in STRENGTHS:
        wanted = x @ adapter.delta(torch.zeros(shape), strength).T
        assert relative(applied(made, x, torch.zeros(shape), strength), wanted) < TOLERANCE


def multiplications(extra):
    """Of one input vector, as the module's steps do them."""
    size, total = list(extra.sides), 0
    for axis, name in extra.steps:
        factor = getattr(extra, name)
        assert factor.shape[1] == size[axis]
        total += factor.numel() * size[1 - axis]
        size[axis] = factor.shape[0]
    return total


@pytest.mark.parametrize(("w1", "w2", "best"), [
    # [60, 8] x 40 columns first costs 60 * 8 * 40 + 10 * 40 * 60, last 10 * 40 * 8 + 60 * 8 * 10
    (((60, 8),), ((10, 40),), 10 * 40 * 8 + 60 * 8 * 10),
    (((8, 60),), ((40, 10),), 8 * 60 * 10 + 40 * 10 * 8),
    # factors: down to 2 x 3, then up again
    (((30, 2), (2, 30)), ((30, 3), (3, 30)), 60 * 30 + 90 * 2 + 90 * 2 + 60 * 30),
    # factors that are larger than their product are multiplied out
    (((10, 9), (9, 10)), ((20, 20),), 100 * 20 + 400 * 10),
])  # fmt: skip
def test_kronecker_products_run_in_the_cheapest_order(w1, w2, best):
    w1, w2 = (tuple(random(*shape, seed=i) for i, shape in enumerate(shapes)) for shapes in (w1, w2))
    extra = Kronecker(w1, w2, 0.5)
    assert multiplications(extra) == best
    first, second = (factors[0] if len(factors) == 1 else factors[0] @ factors[1] for factors in (w1, w2))
    x = random(4, first.shape[1] * second.shape[1])
    assert relative(extra(x, None, torch.tensor(2.0)), x @ torch.kron(first, second).T) < TOLERANCE


# ---- as modules


def every_extra():
    """(name, module, adapter, weight), one of each."""
    weight = random(480, 480)
    rows = weight.norm(dim=1, keepdim=True) * 1.1
    cases = {"Kronecker": large_lokr((False, False)), "Dense": Difference(random(480, 480)),
             "Rotation": adapter_of(KINDS["OFT"](480, 480)),
             "Butterfly": adapter_of(KINDS["BOFT with rescale"](480, 480)),
             "RowScale and Kronecker": DoRA(large_lokr((False, False)), rows),
             "replacement": adapter_of({".set_weight": random(480, 480, seed=5)})}  # fmt: skip
    for name, adapter in cases.items():
        yield name, form(Change(adapter), (480, 480), lambda: weight), adapter, weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extras_compute_in_the_inputs_dtype(dtype):
    for name, made, adapter, weight in every_extra():
        x = (random(3, 480) / 10).to(dtype)
        base, strength = (x.float() @ weight.T).to(dtype), torch.tensor(0.5)
        added = sum(extra(x, base, strength).float() for extra in made.extras)
        assert {extra(x, base, strength).dtype for extra in made.extras} == {dtype}
        wanted = x.float() @ adapter.delta(weight, 0.5).T
        assert relative(added, wanted) < 12 * torch.finfo(dtype).eps, name


def test_extras_are_parameters_without_children_that_the_host_can_move():
    """Its loader counts and moves parameters of modules that have no others below them."""
    for name, made, _, _ in every_extra():
        for extra in made.extras:
            assert not list(extra.children()) and not list(extra.buffers()), name
            assert not any(parameter.requires_grad for parameter in extra.parameters())
            assert all(parameter.is_contiguous() for parameter in extra.parameters())
        assert made.nbytes == sum(p.nbytes for extra in made.extras for p in extra.parameters())


def test_extras_take_any_leading_shape():
    for _, made, adapter, weight in every_extra():
        for leading in ((), (1,), (2, 3), (0,), (2, 1, 3)):
            x = random(*leading, 480)
            added = applied(made, x, weight, 1.0)
            assert added.shape == (*leading, 480)
            torch.testing.assert_close(added, x @ adapter.delta(weight).T, rtol=1e-3, atol=1e-2)


def test_extras_compile_in_one_graph_and_a_new_strength_compiles_nothing():
    for name, made, adapter, weight in every_extra():
        torch._dynamo.reset()
        graphs = []

        def counted(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        def added(x, base, strength, extras=made.extras):
            return sum(extra(x, base, strength) for extra in extras)

        compiled, x = torch.compile(added, backend=counted, fullgraph=True, dynamic=False), random(3, 480)
        for strength in STRENGTHS:
            found = compiled(x, x @ weight.T, torch.tensor(strength))
            assert relative(found, x @ adapter.delta(weight, strength).T) < TOLERANCE, name
        assert len(graphs) == 1, name
    torch._dynamo.reset()
