"""The difference of two checkpoints is the LoRA that gives one from the other, as near as its rank allows."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import killed
from absorbing import absorb
from extracting import (
    FP16,
    LABELS,
    LAYERS,
    NORM,
    PREFIXES,
    QKV,
    extract,
    product,
    quantized,
    random,
    statistics,
    tuned_block,
    write_calibrated,
    write_pair,
)
from synthetic import block, noise, qwen, save
from tessera import formats, lora
from tessera.checkpoint import Checkpoint
from tessera.quantization import lowrank, pipeline
from tessera.quantization.difference import Wish
from tessera.quantization.metrics import relative_error


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path)


@pytest.fixture
def calibrated(tmp_path):
    return write_calibrated(tmp_path)


# ---- a fine-tune


def test_a_low_rank_difference_is_recovered_to_fp16(pair):
    base, tuned = (Checkpoint(path) for path in pair)
    report, tensors = extract(*pair, wish=Wish(rank=8))
    for row in report.layers:
        difference = tuned.weight(row.name) - base.weight(row.name)
        assert relative_error(product(tensors, row.name), difference) < FP16
        assert row.loss == pytest.approx(relative_error(product(tensors, row.name), difference), abs=1e-4)
        assert row.error == pytest.approx(relative_error(base.weight(row.name), tuned.weight(row.name)), rel=1e-4)
    assert [row.name for row in report.layers] == LAYERS and not report.correction
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_factors_are_of_equal_norm_and_no_alpha_is_needed(pair):
    _, tensors = extract(*pair, wish=Wish(rank=4))
    assert {key.rpartition("lora_")[2] for key in tensors} == {"up.weight", "down.weight"}
    up, down = (tensors[f"diffusion_model.{QKV}.lora_{part}.weight"].float() for part in ("up", "down"))
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-2)


def test_the_correction_reader_reads_it(pair):
    report, tensors = extract(*pair)
    pairs = lora.read(pair[0].with_name("lora.safetensors"))
    assert pairs.keys() == {f"diffusion_model.{row.name}" for row in report.layers}
    assert torch.equal(pairs[f"diffusion_model.{QKV}"].weight(), product(tensors, QKV))


@pytest.mark.parametrize("tuned_prefix", PREFIXES)
@pytest.mark.parametrize("base_prefix", PREFIXES)
def test_prefixes_make_no_difference(tmp_path, pair, base_prefix, tuned_prefix):
    _, expected = extract(*pair)
    files = [save(tmp_path / f"{name}_prefixed.safetensors", load_file(path), prefix)
             for name, path, prefix in zip(("a", "b"), pair, (base_prefix, tuned_prefix), strict=True)]  # fmt: skip
    _, tensors = extract(*files, tmp_path / "other.safetensors")
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in tensors)


def test_equal_layers_are_left_out_and_counted(tmp_path):
    base, tuned = tuned_block()
    tuned[f"{QKV}.weight"] = base[f"{QKV}.weight"]
    report, tensors = extract(save(tmp_path / "a.safetensors", base), save(tmp_path / "b.safetensors", tuned))
    assert [row.name for row in report.layers] == [name for name in LAYERS if name != QKV]
    assert not any(QKV in key for key in tensors) and report.equal == 3  # it, a norm and a bias


@pytest.mark.parametrize("kinds", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                                   (torch.float16, torch.bfloat16)])  # fmt: skip
@pytest.mark.parametrize("swapped", [False, True])
def test_a_difference_of_stored_dtypes_alone_is_none(tmp_path, kinds, swapped):
    """Rounding of one file to 16 bits is nearly white noise: a rank of it would be a large file of nothing."""
    coarse, fine = kinds
    weights = {key: random(*tensor.shape, seed=i).to(fine) for i, (key, tensor) in enumerate(block().items())}
    files = {fine: weights, coarse: {key: tensor.to(coarse) for key, tensor in weights.items()}}
    files[coarse][f"{QKV}.weight"] = files[coarse][f"{QKV}.weight"] * 2
    paths = [save(tmp_path / f"{str(kind)[6:]}.safetensors", files[kind]) for kind in kinds]
    report, _ = extract(*(reversed(paths) if swapped else paths), target=tmp_path / "lora.safetensors")
    assert [row.name for row in report.layers] == [QKV] and not report.vectors


def test_vectors_are_plain_differences_in_fp32(tmp_path):
    base, tuned = tuned_block()
    extra = {"pad_token": noise(1, 128, seed=5), f"{QKV}.bias": noise(96, seed=6), "norm.weight": noise(64, seed=7),
             "norm.bias": noise(64, seed=8)}  # fmt: skip
    moved = {key: tensor + 1 for key, tensor in (extra | {f"{NORM}.weight": base[f"{NORM}.weight"]}).items()}
    report, tensors = extract(save(tmp_path / "a.safetensors", base | extra),
                              save(tmp_path / "b.safetensors", tuned | moved))  # fmt: skip
    expected = {"pad_token.diff": "pad_token", f"{QKV}.diff_b": f"{QKV}.bias", "norm.diff": "norm.weight",
                "norm.diff_b": "norm.bias", f"{NORM}.diff": f"{NORM}.weight"}  # fmt: skip
    for key, name in expected.items():
        difference = moved[name].float() - (base | extra)[name].float()
        assert torch.equal(tensors[f"diffusion_model.{key}"], difference), key
    assert {f"diffusion_model.{key}" for key in expected} == {key for key in tensors if ".lora_" not in key}
    assert [w for w in report.warnings if w.startswith("pad_token: written, but ComfyUI applies no LoRA")]
    assert set(report.vectors) == {"pad_token", "norm.weight", "norm.bias", f"{NORM}.weight"}


def test_a_bias_alone_is_a_difference(tmp_path):
    base = block() | {f"{QKV}.bias": noise(96)}
    tuned = base | {f"{QKV}.bias": noise(96, seed=1)}
    report, tensors = extract(save(tmp_path / "a.safetensors", base), save(tmp_path / "b.safetensors", tuned))
    assert list(tensors) == [f"diffusion_model.{QKV}.diff_b"] and report.vectors == [f"{QKV}.bias"]
    assert not report.layers and "plain differences: layers.0.attention.qkv.bias" in report.markdown()


def test_what_no_lora_holds_is_named_with_its_reason(tmp_path):
    base, tuned = tuned_block()
    base |= {"conv.weight": noise(8, 4, 3, 3), "same.weight": noise(8, 4, 3, 3), "old.weight": noise(8, 8),
             "table": noise(4, 8), "ids": torch.arange(4)}  # fmt: skip
    tuned |= {"conv.weight": noise(8, 4, 3, 3, seed=1), "same.weight": base["same.weight"], "new.weight": noise(8, 8),
              "table": noise(4, 8, seed=1), "ids": torch.arange(1, 5)}  # fmt: skip
    report, tensors = extract(save(tmp_path / "a.safetensors", base), save(tmp_path / "b.safetensors", tuned))
    assert report.left_out == {
        "conv.weight": "differs, but [8, 4, 3, 3] is neither a linear layer nor a vector",
        "table": "differs, but [4, 8] is neither a linear layer nor a vector",
        "ids": "int64: not real numbers", "old.weight": "only in a.safetensors", "new.weight": "only in b.safetensors",
    }  # fmt: skip
    assert len(tensors) == 2 * len(LAYERS)
    assert "left out, only in a.safetensors: old.weight" in report.markdown()


def test_a_pattern_chooses_layers(pair):
    report, _ = extract(*pair, layers="layers.*.attention.{qkv,x} **.w1")
    assert [row.name for row in report.layers] == [QKV, "layers.0.feed_forward.w1"]


# ---- a tolerance


def test_the_tolerance_takes_the_smallest_rank_that_meets_it(tmp_path):
    base = {f"{name}.weight": noise(96, 128, seed=i) for i, name in enumerate("abcd")}
    strengths = torch.logspace(0, -3, 96)
    u, v = (torch.linalg.qr(random(n, 96, seed=n)).Q for n in (96, 128))
    tuned = {key: w.float() + 0.01 * (u * strengths ** (1 + i)) @ v.T for i, (key, w) in enumerate(base.items())}
    files = save(tmp_path / "a.safetensors", base), save(tmp_path / "b.safetensors", tuned)
    report, tensors = extract(*files, wish=Wish(tolerance=0.05))
    assert len({row.rank for row in report.layers}) == 4
    for row in report.layers:
        difference = tuned[f"{row.name}.weight"] - base[f"{row.name}.weight"].float()
        found = relative_error(product(tensors, row.name), difference)
        energies = torch.linalg.svdvals(difference.double()).square()
        least = (1 - energies.cumsum(0) / energies.sum()).sqrt()  # after each rank
        assert found <= 0.05 and row.loss == pytest.approx(found, rel=1e-3)
        assert row.rank == int((least > 0.05).sum()) + 1


def test_a_tolerance_below_what_fp16_holds_ends(pair):
    report, _ = extract(*pair, wish=Wish(tolerance=1e-6, max_rank=40))
    assert {row.rank for row in report.layers} == {40} and all(row.loss < FP16 for row in report.layers)


def test_the_highest_rank_caps_it_and_is_told(tmp_path):
    base = block()
    files = quantized(tmp_path / "base.safetensors", base, "nvfp4"), save(tmp_path / "tuned.safetensors", base)
    report, _ = extract(*files, wish=Wish(tolerance=0.05, max_rank=16))
    assert {row.rank for row in report.layers} == {16} and all(row.loss > 0.05 for row in report.layers)
    assert report.warnings == [f"{', '.join(LAYERS)}: more than 0.05 is lost at the highest rank allowed"]


def test_a_rank_above_the_layer_is_its_own(tmp_path):
    base, tuned = {"a.weight": noise(5, 64)}, {"a.weight": noise(5, 64, seed=1)}
    report, _ = extract(save(tmp_path / "a.safetensors", base), save(tmp_path / "b.safetensors", tuned))
    assert report.layers[0].rank == 5 and report.layers[0].loss < FP16


# ---- a correction


@pytest.mark.parametrize("label", LABELS)
def test_a_correction_is_the_best_pair_for_the_residual_of_every_format(tmp_path, label):
    original = save(tmp_path / "original.safetensors", block())
    base = quantized(tmp_path / "published.safetensors", block(), label, prefix="model.diffusion_model.")
    report, tensors = extract(base, original, wish=Wish(rank=16))
    assert report.correction and [row.name for row in report.layers] == LAYERS and len(tensors) == 6
    for row in report.layers:
        residual = Checkpoint(original).weight(row.name) - Checkpoint(base).weight(row.name)
        branch = lowrank.fit(residual, 16, pipeline.layer_seed(0, row.name)).half()
        assert torch.equal(tensors[f"diffusion_model.{row.name}.lora_up.weight"], branch.up)
        assert torch.equal(tensors[f"diffusion_model.{row.name}.lora_down.weight"], branch.down)
        truth = Checkpoint(original).weight(row.name)
        found = pipeline.layer_errors(Checkpoint(base).weight(row.name), branch, truth)
        assert (row.error, row.corrected_error) == pytest.approx(found, rel=1e-4)
        assert row.corrected_error < 0.85 * row.error and row.format == formats.parse(label).for_shape(96, 128).label


def test_it_is_the_lora_that_was_written_with_the_model(tmp_path):
    """Quantizing without statistics and extracting afterwards give the same bytes."""
    killed.source(tmp_path)
    killed.job(tmp_path, calibrated=False).run()
    wanted = load_file(tmp_path / "out" / "absorb_lora.safetensors")
    files = tmp_path / "out" / "absorb.safetensors", tmp_path / "source.safetensors"
    _, tensors = extract(*files, tmp_path / "new.safetensors", wish=Wish(rank=2))
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[key], wanted[key]) for key in wanted)


def test_unscaled_fp8_is_corrected_norms_included_and_the_report_says_how_to_load_it(tmp_path):
    original = block()
    base = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in original.items()}
    files = save(tmp_path / "fp8.safetensors", base), save(tmp_path / "original.safetensors", original)
    report, tensors = extract(*files)
    assert report.correction and {row.format for row in report.layers} == {"float8_e4m3fn"}
    difference = original[f"{NORM}.weight"].float() - base[f"{NORM}.weight"].float()
    assert torch.equal(tensors[f"diffusion_model.{NORM}.diff"], difference)
    assert any("plain differences, which ComfyUI patches into the model" in warning for warning in report.warnings)


def test_padding_that_the_file_does_not_tell_is_cut_off(tmp_path):
    original = {"a.weight": noise(70, 100), "b.weight": noise(64, 64, seed=1)}
    base = quantized(tmp_path / "base.safetensors", original, "nvfp4", ["a", "b"])
    assert Checkpoint(base).layers["a"].shape != (70, 100)
    report, tensors = extract(base, save(tmp_path / "original.safetensors", original))
    assert report.layers[0].shape == (70, 100) and product(tensors, "a").shape == (70, 100)
    assert report.layers[0].corrected_error < 0.5 * report.layers[0].error


def test_the_branch_of_an_absorb_base_is_part_of_its_weight(tmp_path):
    original = save(tmp_path / "original.safetensors", block())
    base = absorb(original, tmp_path / "absorb.safetensors", dict.fromkeys(LAYERS, "nvfp4"), 8, smoothed=(QKV,))
    report, tensors = extract(base, original)
    truth, stored = Checkpoint(original).weight(QKV), Checkpoint(base).weight(QKV)
    assert relative_error(stored + product(tensors, QKV), truth) < 0.8 * relative_error(stored, truth)
    assert [w for w in report.warnings if "absorb.safetensors is in absorb mode: the low-rank branch of 3 layers" in w]


def test_quantized_and_original_the_wrong_way_round_are_told(tmp_path):
    files = save(tmp_path / "a.safetensors", block()), quantized(tmp_path / "b.safetensors", block(), "nvfp4")
    report, _ = extract(*files)
    assert not report.correction and "to correct a quantized file make it the base" in report.warnings[0]


def test_two_quantized_files_of_different_formats_are_compared_decoded(tmp_path):
    files = [quantized(tmp_path / f"{label}.safetensors", block(), label) for label in ("nvfp4", "int8_row")]
    report, tensors = extract(*files, wish=Wish(rank=96))
    stored = [Checkpoint(path).weight(QKV) for path in files]
    assert relative_error(product(tensors, QKV), stored[1] - stored[0]) < 2 * FP16 and not report.correction


# ---- weighted by the inputs


def test_weighting_lowers_the_output_error_and_is_the_pipelines_fit(calibrated):
    base, original, known = calibrated
    plain, _ = extract(base, original, base.with_name("plain.safetensors"), wish=Wish(rank=8))
    report, tensors = extract(base, original, wish=Wish(rank=8), calibration=known)
    for row in report.layers:
        biased = row.name == QKV
        moment = pipeline.moment_of(known.of(row.name), biased, [])
        truth, stored = Checkpoint(original).weight(row.name), Checkpoint(base).weight(row.name)
        branch = lowrank.fit(truth - stored, 8, pipeline.layer_seed(0, row.name), moment).half()
        assert torch.equal(tensors[f"diffusion_model.{row.name}.lora_up.weight"], branch.up)
        energies = [moment.energy(w) for w in (truth, truth - stored, truth - stored - branch.weight())]
        assert row.output_error == pytest.approx((energies[1] / energies[0]) ** 0.5, rel=1e-4)
        assert row.corrected_output_error == pytest.approx((energies[2] / energies[0]) ** 0.5, rel=1e-4)
        assert row.loss == pytest.approx((energies[2] / energies[1]) ** 0.5, rel=1e-4)
        other = load_file(base.with_name("plain.safetensors"))
        unweighted = moment.energy(truth - stored - product(other, row.name))
        assert energies[2] < 0.6 * unweighted < energies[1]
    assert all(row.output_error is None for row in plain.layers) and "output error" not in plain.markdown()
    assert "mean output error of 3 calibrated layers" in report.markdown()


def test_a_tolerance_is_of_the_output_where_inputs_are_known(calibrated):
    base, original, known = calibrated
    report, tensors = extract(base, original, wish=Wish(tolerance=0.3), calibration=known)
    moment = known.of(LAYERS[0]).moment()
    for row in report.layers:
        assert row.loss <= 0.3 and row.rank < 96
    moment = pipeline.moment_of(known.of(LAYERS[0]), False, [])
    residual = Checkpoint(original).weight(LAYERS[0]) - Checkpoint(base).weight(LAYERS[0])
    left = moment.energy(residual - product(tensors, LAYERS[0])) / moment.energy(residual)
    assert left**0.5 == pytest.approx(report.layers[0].loss, rel=1e-3)


def test_the_bias_makes_up_for_what_the_pair_leaves_of_the_mean_input(calibrated):
    base, original, known = calibrated
    _, tensors = extract(base, original, wish=Wish(rank=4), calibration=known)
    mean, bias = known.of(QKV).mean, Checkpoint(original).read(f"{QKV}.bias").float()
    wanted = Checkpoint(original).weight(QKV) @ mean + bias
    weight = Checkpoint(base).weight(QKV) + product(tensors, QKV)
    found = weight @ mean + bias + tensors[f"diffusion_model.{QKV}.diff_b"]
    assert relative_error(found, wanted) < 1e-5
    assert relative_error(weight @ mean + bias, wanted) > 1e-3
    assert [key for key in tensors if key.endswith("diff_b")] == [f"diffusion_model.{QKV}.diff_b"]


def test_a_bias_that_its_quantizer_corrected_keeps_what_the_pair_does_not_give_back(tmp_path):
    """Without statistics: the bias of the base has E x added for a mean input x, of which the pair takes A B x."""
    source = block() | {f"{QKV}.bias": noise(96, seed=3).float()}
    original = save(tmp_path / "original.safetensors", source)
    base = quantized(tmp_path / "base.safetensors", source, "nvfp4")
    mean = random(128, seed=4)
    residual = Checkpoint(original).weight(QKV) - Checkpoint(base).weight(QKV)
    tensors = load_file(base)
    tensors[f"{QKV}.bias"] = tensors[f"{QKV}.bias"] + residual @ mean
    save_file(tensors, base)
    _, found = extract(base, original, wish=Wish(rank=8))
    assert relative_error(found[f"diffusion_model.{QKV}.diff_b"], -(product(found, QKV) @ mean)) < 2 * FP16


def test_statistics_of_either_model_will_do_and_silent_layers_are_told(pair):
    for path in pair:
        known = statistics(Checkpoint(path), [QKV])
        report, _ = extract(*pair, calibration=known, overwrite=True)
        assert [row.output_error is not None for row in report.layers] == [name == QKV for name in LAYERS]
        assert any(w.startswith("no statistics for 2 of 3 layers (first: layers.0.attention.out)")
                   for w in report.warnings)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("wish", [Wish(rank=8), Wish(tolerance=0.3)])
def test_a_gpu_finds_the_same_pairs(calibrated, wish):
    base, original, known = calibrated
    expected, _ = extract(base, original, base.with_name("cpu.safetensors"), wish=wish, calibration=known)
    report, tensors = extract(base, original, wish=wish, calibration=known, device="cuda")
    for row, truth in zip(report.layers, expected.layers, strict=True):
        assert row.rank == truth.rank and row.loss == pytest.approx(truth.loss, rel=1e-3)
        assert product(tensors, row.name).isfinite().all()


# ---- text encoders and whole checkpoints


@pytest.mark.parametrize(("rename", "prefix"), [(("model.", "model.language_model."), "text_encoders.transformer."),
                                                (("model.", "model."), "text_encoders.transformer.")])  # fmt: skip
def test_a_text_encoder_is_named_as_the_host_names_its_layers(tmp_path, rename, prefix):
    base = qwen()
    tuned = {key.replace(*rename, 1): tensor.float() + 0.001 * random(*tensor.shape) for key, tensor in base.items()}
    report, tensors = extract(save(tmp_path / "a.safetensors", base), save(tmp_path / "b.safetensors", tuned))
    modules = [key.removesuffix(".weight") for key in base]
    assert {key.split(".lora_")[0].removesuffix(".diff") for key in tensors} == {prefix + name for name in modules}
    assert f"{prefix}model.norm.diff" in tensors and len(report.layers) == 3


@pytest.mark.parametrize(("width", "name"), [(768, "clip_l"), (1280, "clip_g")])
def test_clip_is_named_by_its_width(tmp_path, width, name):
    base = {"text_model.embeddings.token_embedding.weight": noise(4, width),
            "text_model.encoder.layers.0.mlp.fc1.weight": noise(8, width, seed=1)}  # fmt: skip
    tuned = base | {"text_model.encoder.layers.0.mlp.fc1.weight": noise(8, width, seed=2)}
    _, tensors = extract(save(tmp_path / "a.safetensors", base), save(tmp_path / "b.safetensors", tuned))
    assert f"text_encoders.{name}.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight" in tensors


def test_a_whole_checkpoint_gives_model_and_text_encoder_and_says_what_it_leaves(tmp_path):
    base, tuned = tuned_block()
    encoder = {f"text_encoders.qwen3_4b.transformer.{key}": tensor for key, tensor in qwen().items()}
    moved = {key: tensor + 1 for key, tensor in encoder.items()}
    paths = []
    for name, model, text in (("a", base, encoder), ("b", tuned, moved)):
        whole = {f"model.diffusion_model.{key}": tensor for key, tensor in model.items()}
        paths.append(save(tmp_path / f"{name}.safetensors", whole | text | {"vae.conv.weight": noise(4, 4)}))
    report, tensors = extract(*paths)
    bases = {key.split(".lora_")[0].removesuffix(".diff") for key in tensors}
    assert bases == {f"diffusion_model.{name}" for name in LAYERS} | {key.removesuffix(".weight") for key in encoder}
    assert len([w for w in report.warnings if "1 tensors belong to neither" in w and "vae.conv.weight" in w]) == 2
    alone, fewer = extract(paths[0], save(tmp_path / "c.safetensors", tuned), tmp_path / "alone.safetensors")
    assert len(fewer) == 6 and "only in a.safetensors" in alone.left_out.values()
