"""The form of an adapter beside a layer multiplies like its delta, within the loss that it states."""

import pytest
import torch

from adapting import CASES, KINDS, SHAPES, adapter_of, random
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
