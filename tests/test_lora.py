"""A LoRA file in any spelling becomes the same pairs; a fitted pair is the best one of its rank."""

import pytest
import torch
from safetensors.torch import save_file

from tessera import lora
from tessera.quantization import lowrank

SPELLINGS = {
    "kohya": ("{}.lora_up.weight", "{}.lora_down.weight"),
    "PEFT": ("{}.lora_B.weight", "{}.lora_A.weight"),
    "PEFT with its adapter's name": ("{}.lora_B.default.weight", "{}.lora_A.default.weight"),
    "PEFT without weight": ("{}.lora_B", "{}.lora_A"),
    "diffusers": ("{}_lora.up.weight", "{}_lora.down.weight"),
    "diffusers with a dot": ("{}.lora.up.weight", "{}.lora.down.weight"),
}
BASES = ["layers.0.attention.qkv", "diffusion_model.layers.0.w1", "lora_unet_layers_0_w1", "transformer.blocks.0.to_q",
         "lycoris_layers_0_w1"]  # fmt: skip
# Energy that the SVD's best pair would take and ours does not, as a share of the whole. White noise has no gap in its
# spectrum, so that four subspace iterations end a little off the best subspace.
MAX_LOST = {"decaying": 1e-3, "flat": 5e-3}
FP16 = 1e-3  # relative error of the product after rounding both factors


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


UP, DOWN = random(12, 4), random(4, 20, seed=1)


def read(tmp_path, tensors):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    return lora.read(tmp_path / "a.safetensors")


# ---- files


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_pair(tmp_path, spelling, base):
    up, down = (key.format(base) for key in SPELLINGS[spelling])
    pairs = read(tmp_path, {up: UP, down: DOWN})
    assert list(pairs) == [base]
    assert torch.equal(pairs[base].up, UP) and torch.equal(pairs[base].down, DOWN) and pairs[base].rank == 4


def test_spellings_may_be_mixed_in_one_file(tmp_path):
    tensors = {}
    for number, (up, down) in enumerate(SPELLINGS.values()):
        tensors |= {up.format(f"layers.{number}"): UP, down.format(f"layers.{number}"): DOWN}
    assert read(tmp_path, tensors).keys() == {f"layers.{number}" for number in range(len(SPELLINGS))}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_alpha_over_rank_is_folded_into_up(tmp_path, dtype):
    up, down = UP.to(dtype), DOWN.to(dtype)
    pair = read(tmp_path, {"a.lora_up.weight": up, "a.lora_down.weight": down, "a.alpha": torch.tensor(2.0)})["a"]
    assert pair.up.dtype == dtype and torch.equal(pair.up, up / 2) and torch.equal(pair.down, down)


def test_without_alpha_the_scale_is_1(tmp_path):
    for alpha in ({}, {"a.alpha": torch.tensor(4.0)}, {"a.alpha": torch.tensor([4.0])}):
        pair = read(tmp_path, {"a.lora_up.weight": UP, "a.lora_down.weight": DOWN} | alpha)["a"]
        torch.testing.assert_close(pair.weight(), UP @ DOWN)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_bias_difference_is_read_beside_its_pair(tmp_path, prefix):
    """As ComfyUI reads it: alpha belongs to the pair alone."""
    base, bias = "diffusion_model.a", random(12)
    tensors = {f"{base}.lora_up.weight": UP, f"{base}.lora_down.weight": DOWN, f"{base}.alpha": torch.tensor(2.0)}
    pairs = read(tmp_path, tensors | {f"diffusion_model.{prefix}a.diff_b": bias, "b.lora_up": UP, "b.lora_down": DOWN})
    assert torch.equal(pairs[base].bias, bias) and torch.equal(pairs[base].up, UP / 2)
    assert pairs["b"].bias is None


@pytest.mark.parametrize(("base", "bare"), [
    ("diffusion_model.model.diffusion_model.layers.0.w1", "diffusion_model.layers.0.w1"),
    ("diffusion_model.diffusion_model.layers.0.w1", "diffusion_model.layers.0.w1"),
    ("model.diffusion_model.model.diffusion_model.layers.0.w1", "diffusion_model.layers.0.w1"),
    ("diffusion_model.diffusion_model.model.diffusion_model.w1", "diffusion_model.w1"),
    ("diffusion_model.layers.0.w1", "diffusion_model.layers.0.w1"),
    ("layers.0.diffusion_model.w1", "layers.0.diffusion_model.w1"),
])  # fmt: skip
def test_repeated_prefixes_are_stripped(tmp_path, base, bare):
    assert list(read(tmp_path, {f"{base}.lora_up.weight": UP, f"{base}.lora_down.weight": DOWN})) == [bare]


@pytest.mark.parametrize(("tensors", "words"), [
    ({"a.lora_up.weight": UP}, "a: lora_down is missing; the file is incomplete"),
    ({"a.lora_A.weight": DOWN}, "a: lora_up is missing; the file is incomplete"),
    ({"a.alpha": torch.tensor(4.0)}, "a: lora_up is missing"),
    ({"a.lora_up.weight": UP, "a.lora_down.weight": random(3, 20)},
     r"a: up \[12, 4\] and down \[3, 20\] are no \[out, r\] and \[r, in\]; for a LoRA of conv"),
    ({"a.lora_up.weight": UP, "a.lora_down.weight": DOWN, "a.alpha": random(4)}, r"a: alpha is \[4\], not one number"),
    ({"a.lora_up.weight": random(12, 0), "a.lora_down.weight": random(0, 20), "a.alpha": torch.tensor(1.0)},
     r"a: up \[12, 0\] and down \[0, 20\]"),
    ({"a.lora_up.weight": random(12, 4, 1, 1), "a.lora_down.weight": random(4, 20, 3, 3)}, r"a: up \[12, 4, 1, 1\]"),
    ({"a.lora_up.weight": UP, "a.lora_down.weight": DOWN, "a.dora_scale": UP}, "a.dora_scale: a dora_scale adapter"),
    ({"a.hada_w1_a": UP}, "a.hada_w1_a: a hada adapter; .*Load LoRA"),
    ({"a.lokr_w1": UP}, "a.lokr_w1: a lokr adapter"),
    ({"a.oft_blocks": UP}, "a.oft_blocks: a oft adapter"),
    ({"a.lora_mid.weight": UP}, "a.lora_mid.weight: a lora_mid adapter"),
    ({"a.diff": UP}, "a.diff: a diff adapter"),
    ({"a.diff_b": random(12)}, "a.diff_b: a bias difference without a low-rank pair; .*Load LoRA"),
    ({"a.lora_up.weight": UP, "a.diff_b": random(12)}, "a: lora_down is missing"),
    ({"a.lora_up.weight": UP, "a.lora_down.weight": DOWN, "a.diff_b": random(11)},
     r"a: diff_b is float32 \[11\], the layer has 12 outputs; .*damaged"),
    ({"a.lora_up.weight": UP, "a.lora_down.weight": DOWN, "a.diff_b": random(12, 1)},
     r"a: diff_b is float32 \[12, 1\]"),
    ({"a.lora_up.weight": UP, "a.lora_down.weight": DOWN, "a.diff_b": torch.ones(12, dtype=torch.int8)},
     r"a: diff_b is int8 \[12\]"),
    ({"a.weight": UP}, "a.weight: not a LoRA tensor; .*Load LoRA"),
    ({"scalar": UP}, "scalar: not a LoRA tensor"),
])  # fmt: skip
def test_anything_else_is_refused_by_name(tmp_path, tensors, words):
    with pytest.raises(ValueError, match=rf"^a\.safetensors: {words}"):
        read(tmp_path, tensors)


@pytest.mark.parametrize(
    "second", ["diffusion_model.a.lora_B.weight", "diffusion_model.model.diffusion_model.a.lora_up.weight"]
)
def test_one_factor_in_two_spellings_is_refused(tmp_path, second):
    tensors = {
        "diffusion_model.a.lora_up.weight": torch.zeros(4, 2),
        "diffusion_model.a.lora_down.weight": torch.zeros(2, 4),
    }
    save_file(tensors | {second: torch.zeros(4, 2)}, tmp_path / "twice.safetensors")
    with pytest.raises(ValueError, match=r"twice\.safetensors: .*twice, in two spellings"):
        lora.read(tmp_path / "twice.safetensors")


# ---- fitting


def decaying(rows, columns, seed=0):
    """A matrix whose singular values fall like 1/sqrt(n), as a quantization residual's do at worst."""
    size = min(rows, columns)
    u, v = (torch.linalg.qr(random(n, size, seed=seed + i)).Q for i, n in enumerate((rows, columns)))
    return (u * torch.arange(1, size + 1).rsqrt()) @ v.T


@pytest.mark.parametrize("spectrum", ["flat", "decaying"])
@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (96, 400), (400, 96), (33, 65)])
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_fit_captures_what_the_truncated_svd_does(spectrum, rows, columns, rank):
    error = {"flat": random, "decaying": decaying}[spectrum](rows, columns, seed=3)
    best = torch.linalg.svdvals(error)[:rank].square().sum()
    captured = error.square().sum() - (error - lowrank.fit(error, rank).weight()).square().sum()
    lost = (best - captured) / error.square().sum()
    assert -1e-5 < lost < MAX_LOST[spectrum]


def test_fit_is_exact_for_a_matrix_of_that_rank():
    error = UP @ DOWN
    torch.testing.assert_close(lowrank.fit(error, 4).weight(), error, rtol=0, atol=1e-5)


def test_fit_is_the_same_for_the_same_seed():
    error = random(64, 48)
    first, again, other = (lowrank.fit(error, 8, seed) for seed in (7, 7, 8))
    assert torch.equal(first.up, again.up) and torch.equal(first.down, again.down)
    assert not torch.equal(first.up, other.up)


@pytest.mark.parametrize(("rows", "columns"), [(5, 40), (40, 5), (1, 7), (3, 3)])
def test_rank_beyond_the_shape_is_cut_to_it_and_exact(rows, columns):
    error = random(rows, columns)
    pair = lowrank.fit(error, 32)
    assert pair.rank == min(rows, columns) and pair.shape == (rows, columns)
    torch.testing.assert_close(pair.weight(), error, rtol=0, atol=1e-5)


def test_zero_error_gives_a_zero_finite_branch():
    pair = lowrank.fit(torch.zeros(16, 24), 4).half()
    assert pair.up.isfinite().all() and pair.down.isfinite().all() and not pair.weight().any()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_half_balances_the_factors_and_keeps_the_product(scale):
    fitted = lowrank.fit(random(64, 96) * scale, 16)
    half = fitted.half()
    assert half.up.dtype == half.down.dtype == torch.float16 and half.nbytes == (64 + 96) * 16 * 2
    norms = half.up.float().norm(dim=0), half.down.float().norm(dim=1)
    torch.testing.assert_close(norms[0], norms[1], rtol=10 * FP16, atol=0)
    distance = (half.weight() - fitted.weight()).norm() / fitted.weight().norm()
    assert distance < FP16
