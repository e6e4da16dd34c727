"""The branch module by itself: exact, sliced, and quiet under torch.compile."""

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


def corrected(rows=None, out_features=6):
    """(model, its plain copy, attachment, the branch's product [out, in])."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    plain = torch.nn.Linear(4, 6)
    plain.load_state_dict(model[0].state_dict())
    pair = LowRank(torch.randn(out_features, 2), torch.randn(2, 4))
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


def test_strengths_and_steps_compile_once():
    torch._dynamo.reset()
    model, _, side, _ = corrected()
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
