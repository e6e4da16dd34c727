"""The branch module by itself: exact, sliced, and quiet under torch.compile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tessera.branch import Branches, SideBranch
from tessera.quantization.lowrank import LowRank


class Patcher:
    """Stands in for the host's ModelPatcher: a model and its additional models."""

    def __init__(self, model, branches):
        self.model, self._side = model, type("Side", (), {"model": branches})

    def get_additional_models_with_key(self, key):
        return [self._side]


def corrected(rows=None, out_features=6, bias=None):
    """(model, its plain copy, attachment, the branch's product [out, in])."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    plain = torch.nn.Linear(4, 6)
    plain.load_state_dict(model[0].state_dict())
    pair = LowRank(torch.randn(out_features, 2), torch.randn(2, 4), bias)
    branches = Branches([("0", pair, rows)], torch.nn.Linear)
    side = SideBranch("key", 1.0)
    side.inject(Patcher(model, branches))
    return model, plain, side, pair.weight()


def test_branch_adds_strength_times_the_product():
    model, plain, side, product = corrected()
    x = torch.randn(5, 4)
    for strength in (1.0, 0.0, 0.5, 2.0):
        side.set_strength(strength)
        torch.testing.assert_close(model[0](x), plain(x) + strength * x @ product.T)


def test_a_slice_leaves_the_other_rows_alone():
    model, plain, _, product = corrected(rows=(2, 3), out_features=3)
    x = torch.randn(5, 4)
    expected = plain(x)
    expected[:, 2:5] += x @ product.T
    torch.testing.assert_close(model[0](x), expected)


def test_a_bias_difference_is_scaled_with_the_product():
    bias = torch.randn(6)
    model, plain, side, product = corrected(bias=bias)
    x = torch.randn(5, 4)
    for strength in (1.0, 0.0, 0.5, 2.0):
        side.set_strength(strength)
        torch.testing.assert_close(model[0](x), plain(x) + strength * (x @ product.T + bias))


def test_a_bias_difference_of_a_slice_leaves_the_other_rows_alone():
    bias = torch.randn(3)
    model, plain, side, product = corrected(rows=(2, 3), out_features=3, bias=bias)
    side.set_strength(0.5)
    x = torch.randn(5, 4)
    expected = plain(x)
    expected[:, 2:5] += 0.5 * (x @ product.T + bias)
    torch.testing.assert_close(model[0](x), expected)


def test_a_bias_is_carried_and_counted_with_its_pair():
    pair = LowRank(torch.randn(6, 2), torch.randn(2, 4), torch.randn(6))
    half = pair.half()
    assert torch.equal(half.bias, pair.bias) and torch.equal(pair.to("cpu").bias, pair.bias)
    assert half.nbytes == (6 + 4) * 2 * 2 + 6 * 4
    stored = Branches([("0", half, None)], torch.nn.Linear).state_dict()
    assert sum(t.nbytes for t in stored.values()) == half.nbytes


@pytest.mark.parametrize("bias", [None, torch.ones(6)], ids=["pair", "pair with bias"])
def test_strengths_and_steps_compile_once(bias):
    torch._dynamo.reset()
    model, _, side, _ = corrected(bias=bias)
    counter = CompileCounter()
    compiled, x = torch.compile(model, backend=counter), torch.randn(5, 4)
    with torch.inference_mode():
        for _ in range(3):  # the first steps may specialise
            compiled(x)
        warm = counter.frame_count
        for strength in (0.25, 0.5, 1.5, 2.0):
            side.set_strength(strength)
            torch.testing.assert_close(compiled(x), model(x))
        assert counter.frame_count == warm
