"""The branches of a stack by themselves: joined, sliced, beside what is no product, and quiet under torch.compile."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tessera.adapters import OFT, Change, Difference, DoRA, LoRA, form
from tessera.branch import Branches, Part, Strengths
from tessera.injection import Injection
from tessera.quantization.lowrank import LowRank

LAYER = "0"


def cast(tensor, device, dtype):
    return tensor.to(device, dtype)


class Patcher:
    """Stands in for the host's ModelPatcher: a model and its additional models."""

    def __init__(self, model, branches):
        self.model, self._side = model, type("Side", (), {"model": branches})

    def get_additional_models_with_key(self, key):
        return [self._side]


class Stacked:
    """A small model with changes on its first layer, and what that layer should give."""

    def __init__(self, *changes, rows=None):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        self.plain = copy.deepcopy(self.model[0])
        self.changes, self.rows = changes, rows or [None] * len(changes)
        parts = []
        for entry, (change, part) in enumerate(zip(changes, self.rows, strict=True)):
            weight = self.weight(part)
            parts.append(Part(entry, form(change, tuple(weight.shape), lambda weight=weight: weight), part))
        self.branches = Branches({LAYER: parts}, {LAYER: (6, 4)}, torch.nn.Linear)
        self.strengths = Strengths([1.0] * len(changes))
        self.injection = Injection("key", self.strengths, cast)
        self.patcher = Patcher(self.model, self.branches)
        self.injection.inject(self.patcher)

    def weight(self, rows):
        weight = self.plain.weight.detach()
        return weight if rows is None else weight.narrow(0, *rows)

    def wanted(self, x, strengths):
        y = self.plain(x)
        for change, rows, strength in zip(self.changes, self.rows, strengths, strict=True):
            start, length = rows or (0, 6)
            added = y.new_zeros(len(x), length)
            if change.adapter is not None:
                added = added + x @ change.adapter.delta(self.weight(rows), strength).T
            if change.bias is not None:
                added = added + strength * change.bias
            y = y + torch.nn.functional.pad(added, (start, 6 - start - length))
        return y


def lora(rank=2, out=6, seed=1, bias=None):
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(out, rank, generator=generator), torch.randn(rank, 4, generator=generator)
    return Change(LoRA(LowRank(up, down)), bias)


def turned():
    return Change(OFT(torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(3)) * 0.3, None))


STACKS = {
    "one": lambda: Stacked(lora()),
    "two of other ranks": lambda: Stacked(lora(2), lora(3, seed=2)),
    "a slice": lambda: Stacked(lora(out=3), rows=[(2, 3)]),
    "a slice beside a whole": lambda: Stacked(lora(), lora(out=3, seed=2), rows=[None, (1, 3)]),
    "with a bias": lambda: Stacked(lora(bias=torch.randn(6))),
    "a slice with a bias": lambda: Stacked(lora(out=3, bias=torch.randn(3)), rows=[(2, 3)]),
    "a bias alone": lambda: Stacked(Change(None, torch.randn(6))),
    "a full difference": lambda: Stacked(Change(Difference(torch.randn(6, 4)))),
    "what turns the product": lambda: Stacked(turned()),
    "what scales the product, beside a LoRA": lambda: Stacked(
        lora(seed=5), Change(DoRA(lora().adapter, torch.rand(6, 1) + 0.5))
    ),
    "a turned slice": lambda: Stacked(
        Change(OFT(torch.randn(2, 2, 2) * 0.2, None)), lora(seed=4), rows=[(2, 4), None]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_adds_what_each_entry_adds_to_the_weight(name):
    stacked, x = STACKS[name](), torch.randn(5, 4)
    for first in (1.0, 0.5, -0.7, 2.0):
        strengths = [first, 0.3, 1.1][: len(stacked.changes)]
        stacked.strengths.set(strengths)
        torch.testing.assert_close(stacked.model[0](x), stacked.wanted(x, strengths), rtol=1e-4, atol=1e-5)


def test_a_slice_leaves_the_other_rows_alone():
    stacked, x = STACKS["a slice"](), torch.randn(5, 4)
    y, plain = stacked.model[0](x), stacked.plain(x)
    assert torch.equal(y[:, :2], plain[:, :2]) and torch.equal(y[:, 5:], plain[:, 5:])


def test_without_its_injection_a_model_is_itself():
    stacked, x = STACKS["what scales the product, beside a LoRA"](), torch.randn(5, 4)
    stacked.injection.eject(stacked.patcher)
    assert torch.equal(stacked.model[0](x), stacked.plain(x)) and not stacked.model[0]._forward_hooks


def test_layers_that_share_an_input_share_one_down_factor():
    pairs = {name: form(lora(rank, seed=rank), (6, 4), None) for name, rank in (("a", 2), ("b", 3), ("c", 1))}
    parts = {name: [Part(0, found)] for name, found in pairs.items()}
    shapes = dict.fromkeys(parts, (6, 4))
    branches = Branches(parts, shapes, torch.nn.Linear, [("a", "other", "b")]).build()
    a, b, c = branches.items
    assert a.group is b.group is not c.group and (a.span, b.span, c.span) == ((0, 2), (2, 5), (0, 1))
    strengths, x = Strengths([0.5]), torch.randn(3, 4)
    for item, name in zip((a, b, c), pairs, strict=True):
        y = item.add(torch.zeros(3, 6), x, strengths, cast)
        torch.testing.assert_close(y, 0.5 * x @ pairs[name].pair.weight().T)
    copied = copy.deepcopy(branches)
    assert copied.items[0].group is copied.groups[0] is copied.items[1].group is not a.group


def test_factors_are_joined_when_the_host_loads_them_and_every_byte_is_planned_before():
    first, second = lora(2, bias=torch.randn(6)), lora(3, seed=2)
    parts = [Part(n, form(change, (6, 4), None)) for n, change in enumerate((first, second))]
    branches = Branches({LAYER: parts}, {LAYER: (6, 4)}, torch.nn.Linear)
    planned = branches.planned()
    assert not branches.built and planned == sum(t.nbytes for change in (first, second) for t in change.tensors())
    held = sum(p.nbytes for _, module in branches.named_modules() for p in module.parameters(recurse=False))
    assert branches.built and held == planned == sum(tensor.nbytes for tensor in branches.state_dict().values())


def test_setting_strengths_keeps_every_tensor_that_kernels_hold():
    strengths = Strengths([1.0, 2.0])
    vector, scalar = strengths.vector(((0, 2), (1, 1)), torch.device("cpu")), strengths.scalar(1, torch.device("cpu"))
    strengths.set([0.5, 3.0])
    assert vector.tolist() == [0.5, 0.5, 3.0] and scalar.item() == 3.0
    assert strengths.vector(((0, 2), (1, 1)), torch.device("cpu")) is vector
    with pytest.raises(ValueError, match="1 strengths for 2 LoRAs"):
        strengths.set([1.0])


@pytest.mark.parametrize("name", ["one", "with a bias", "what scales the product, beside a LoRA"])
def test_strengths_and_steps_compile_once(name):
    torch._dynamo.reset()
    stacked = STACKS[name]()
    counter = CompileCounter()
    compiled, x = torch.compile(stacked.model, backend=counter), torch.randn(5, 4)
    with torch.inference_mode():
        for _ in range(3):  # the first steps may specialise
            compiled(x)
        warm = counter.frame_count
        for strength in (0.25, 0.5, 1.5, 2.0):
            stacked.strengths.set([strength] * len(stacked.changes))
            torch.testing.assert_close(compiled(x), stacked.model(x))
        assert counter.frame_count == warm
