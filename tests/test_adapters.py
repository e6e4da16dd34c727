"""What an adapter adds to a weight is what ComfyUI's calculate_weight adds, for every kind, shape and strength."""

import logging

import pytest
import torch

from adapting import CASES, KINDS, SHAPES, adapter_of, lokr, random
from tessera.adapters import BOFT, Change, Difference, DoRA, GLoRA, LoKr

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


# ---- what the host says otherwise, or not at all


def test_a_lokr_with_a_tucker_core_is_its_product():
    tensors = KINDS[HOST_FAILS](*SHAPES["square"])
    weight = torch.zeros(SHAPES["square"])
    core, a, b = (tensors[f".lokr_{name}"] for name in ("t2", "w2_a", "w2_b"))
    whole = LoKr.of(w1=tensors[".lokr_w1"], w2=a.T @ core[..., 0, 0] @ b)
    torch.testing.assert_close(adapter_of(tensors).delta(weight), whole.delta(weight))
    torch.testing.assert_close(adapter_of(tensors, ALPHA).delta(weight), whole.delta(weight) * (ALPHA / len(b)))


def test_alpha_of_a_lokr_counts_by_the_rank_that_is_factored():
    """By w2's before w1's, and not at all with both whole."""
    weight = torch.zeros(24, 24)
    for factored, rank in (((False, False), None), ((True, False), 5), ((False, True), 5), ((True, True), 5)):
        tensors = KINDS["LoKr"](24, 24) if rank is None else lokr(24, 24, factored, rank=rank)
        plain, scaled = (adapter_of(tensors, alpha).delta(weight) for alpha in (None, ALPHA))
        torch.testing.assert_close(scaled, plain * (ALPHA / rank if rank else 1))


def test_the_layouts_of_a_glora_are_told_apart_by_the_weight():
    """Four tensors of [4, 12] and [12, 4] are rank 4 on [12, 12] in the old layout, rank 12 on [4, 4] in the new."""
    made = GLoRA.of(random(4, 12), random(12, 4), random(4, 12, seed=1), random(12, 4, seed=1), ALPHA)
    for size, rank in ((12, 4), (4, 12)):
        made.check((size, size))
        *_, scale = made.factors((size, size))
        assert scale == ALPHA / rank
    with pytest.raises(ValueError, match=r"the GLoRA is \[4, 4\], the layer \[5, 5\]"):
        made.check((5, 5))


def test_oft_counts_strength_twice_and_boft_bends():
    """Quirks of the host's, which a plan that scales deltas must know."""
    weight = random(24, 24)
    turned = adapter_of(KINDS["OFT"](24, 24))
    torch.testing.assert_close(turned.delta(weight, 0.5), turned.delta(weight) / 4)
    bent = adapter_of(KINDS["BOFT"](24, 24))
    assert relative(bent.delta(weight, 0.5), bent.delta(weight) / 4) > 0.02
    assert relative(bent.delta(weight, 0.5), bent.delta(weight) / 2) > 0.02


def test_oft_turns_and_keeps_norms():
    weight = random(24, 40)
    for kind in ("OFT", "BOFT"):
        turned = weight + adapter_of(KINDS[kind](24, 40)).delta(weight)
        torch.testing.assert_close(turned.norm(dim=0), weight.norm(dim=0))
        assert relative(turned, weight) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_adds_nothing_and_the_weight_is_left_alone(kind):
    weight = random(24, 24)
    kept = weight.clone()
    added = adapter_of(KINDS[kind](24, 24), ALPHA).delta(weight, 0.0)
    assert torch.equal(weight, kept) and (kind == "replacement" or not added.any())


@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_factors_are_multiplied_in_fp32(kind):
    tensors = {key: tensor.half() for key, tensor in KINDS[kind](24, 24).items()}
    wide = {key: tensor.float() for key, tensor in tensors.items()}
    weight = random(24, 24)
    found, wanted = (adapter_of(t, 2.0, random(24, 1).half()).delta(weight) for t in (tensors, wide))
    # alpha and Tucker cores are folded into a factor in its own dtype
    assert found.dtype == torch.float32 and relative(found, wanted) < 1e-3


def test_identity_and_bytes_of_an_adapter():
    made = adapter_of(KINDS["LoHa"](24, 24), ALPHA, random(24, 1))
    assert made.kind == "DoRA LoHa" and made.nbytes == 4 * (24 * 2 * 4 + 24) and made.dtype == torch.float32
    assert Change(made, random(24)).kind == "DoRA LoHa" and Change(None, random(24)).kind == "bias"
    assert len(Change(made, random(24)).tensors()) == 6


# ---- what does not fit a layer


@pytest.mark.parametrize(("kind", "words"), [
    ("LoRA", r"the LoRA is \[24, 24\], the layer \[24, 25\]"),
    ("LoHa", r"the LoHa is \[24, 24\], the layer \[24, 25\]"),
    ("LoKr", r"the LoKr is \[24, 24\], the layer \[24, 25\]"),
    ("GLoRA", r"the GLoRA is \[24, 24\], the layer \[24, 25\]"),
    ("difference", r"the difference is \[24, 24\], the layer \[24, 25\]"),
    ("replacement", r"the replacement is \[24, 24\], the layer \[24, 25\]"),
])  # fmt: skip
def test_an_adapter_for_another_layer_is_refused(kind, words):
    change = Change(adapter_of(KINDS[kind](24, 24)))
    change.check((24, 24))
    with pytest.raises(ValueError, match=words):
        change.check((24, 25))


@pytest.mark.parametrize(("change", "words"), [
    (Change(adapter_of(KINDS["OFT"](24, 24))), r"the OFT turns 2 x 12 outputs, the layer has 36"),
    (Change(adapter_of(KINDS["BOFT"](24, 24))), r"the BOFT turns 6 x 4 outputs, the layer has 36"),
    (Change(BOFT(random(3, 9, 4, 4))), "the BOFT's 3 stages of blocks of 4 do not divide 36 outputs"),
    (Change(None, random(24)), r"the bias difference is \[24\], the layer has 36 outputs"),
    (Change(DoRA(adapter_of(KINDS["LoRA"](36, 24)), random(24, 1))),
     r"dora_scale is \[24, 1\], a layer \[36, 24\] needs \[36, 1\] or \[1, 24\]"),
    (Change(Difference(random(24)), None), r"the difference is \[24\], the layer \[36, 24\]"),
    (Change(adapter_of(KINDS["LoRA"](36, 24)), None, (40, 24)), r"the LoRA is \[36, 24\], the layer \[40, 24\]"),
])  # fmt: skip
def test_what_does_not_fit_a_layer_of_36_by_24_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        change.check((36, 24))


@pytest.mark.host
def test_a_reshaped_weight_is_padded_before_its_lora(models, caplog):
    tensors = KINDS["LoRA"](30, 20) | {".reshape_weight": torch.tensor([30, 20])}
    weight, padded = random(24, 16), torch.zeros(30, 20)
    padded[:24, :16] = weight
    change = Change(adapter_of(tensors), None, (30, 20))
    change.check((24, 16))
    import comfy.lora

    (patch,) = comfy.lora.load_lora({BASE + suffix: t for suffix, t in tensors.items()}, {BASE: KEY}).values()
    merged = comfy.lora.calculate_weight([(0.5, patch, 1.0, None, None)], weight.clone(), KEY)
    torch.testing.assert_close(padded + change.adapter.delta(padded, 0.5), merged)
