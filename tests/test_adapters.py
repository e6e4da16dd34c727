"""What an adapter adds to a weight is what ComfyUI's calculate_weight adds, for every kind, shape and strength."""

import logging

import pytest
import torch

from adapting import CASES, KINDS, SHAPES, adapter_of, random
from tessera.adapters import BOFT, OFT, Change, Difference, DoRA, GLoRA, LoHa, LoKr, LoRA

BASE, KEY = "diffusion_model.layer", "diffusion_model.layer.weight"
STRENGTHS = (0.5, 1.0, -0.7, 2.0)
ALPHA = 1.7
HOST_FAILS = "LoKr with a Tucker core"  # torch.kron refuses its strides; below it equals its product
COMPARED = [case for case in CASES if case[0] != HOST_FAILS]
WITH_DORA = [case for case in COMPARED if case[0] not in ("difference", "replacement")]
TOLERANCE = 2e-5  # relative L2, fp32


def host_delta(tensors, weight, strength, caplog):
    """What the host adds to a weight; its errors, which it only logs, fail the test."""
    import comfy.lora

    caplog.clear()
    patches = comfy.lora.load_lora({BASE + suffix: t.clone() for suffix, t in tensors.items()}, {BASE: KEY})
    with caplog.at_level(logging.WARNING):
        merged = comfy.lora.calculate_weight([(strength, patches[KEY], 1.0, None, None)], weight.clone(), KEY)
    assert not caplog.records, caplog.text
    return merged - weight


def dora_scales(weight):
    rows, columns = (weight.norm(dim=dim, keepdim=True) for dim in (1, 0))
    return {
        "by rows": rows * (1 + 0.2 * random(*rows.shape)),
        "by columns": columns * (1 + 0.2 * random(*columns.shape)),
    }


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()


@pytest.mark.host
@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize(("kind", "shape"), COMPARED)
def test_delta_is_what_the_host_adds(models, caplog, kind, alpha, shape):
    tensors, weight = KINDS[kind](*SHAPES[shape]), random(*SHAPES[shape], seed=9)
    adapter = adapter_of(tensors, alpha)
    adapter.check(tuple(weight.shape))
    given = tensors if alpha is None else tensors | {".alpha": torch.tensor(alpha)}
    if isinstance(adapter, BOFT) and alpha is None:
        given = tensors | {".alpha": torch.tensor(0.0)}  # the host fails without; its 0 is no bound
    for strength in STRENGTHS:
        assert relative(adapter.delta(weight, strength), host_delta(given, weight, strength, caplog)) < TOLERANCE


@pytest.mark.host
@pytest.mark.parametrize("axis", ["by rows", "by columns"])
@pytest.mark.parametrize(("kind", "shape"), WITH_DORA)
def test_dora_delta_is_what_the_host_adds(models, caplog, kind, axis, shape):
    tensors, weight = KINDS[kind](*SHAPES[shape]), random(*SHAPES[shape], seed=9)
    scale = dora_scales(weight)[axis]
    adapter = adapter_of(tensors, ALPHA, scale)
    adapter.check(tuple(weight.shape))
    given = tensors | {".alpha": torch.tensor(ALPHA), ".dora_scale": scale}
    for strength in STRENGTHS:
        assert relative(adapter.delta(weight, strength), host_delta(given, weight, strength, caplog)) < TOLERANCE
