"""Baked LoRAs: what is written is what the model was with them, quantized; what nothing changes stays as it is."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import lora_files
from conftest import TESTS
from synthetic import fingerprint, noise, recipe_file, save
from tessera import additions, cli
from tessera.baking import Bake, correction_beside
from tessera.checkpoint import Checkpoint
from tessera.contents import lora_key
from tessera.job import Job, lora_path
from tessera.matching import Names, Place
from tessera.output import read_branch
from tessera.quantization import calibration, recipe
from tessera.quantization.metrics import relative_error
from tessera.quantization.pipeline import Settings

GOLDEN = TESTS / "golden"
OUT, IN, RANK = 96, 64, 8
QKV, PROJECTION, GATE, SECOND = (
    "layers.0.attention.qkv", "layers.0.attention.out", "layers.0.feed_forward.w1", "layers.1.feed_forward.w1"
)  # fmt: skip
FORMATS = {QKV: "nvfp4", PROJECTION: "mxfp8", GATE: "int8_row", SECOND: "nvfp4"}
EXACT = 1e-6  # relative, of fp32 sums
ROUNDED = 4e-3  # of bf16


def original():
    """Four linears of which two have a bias; a norm, a convolution, an embedder and a token that stay as they are."""
    weights = {f"{name}.weight": noise(OUT, IN, seed=seed) for seed, name in enumerate(FORMATS)}
    weights |= {f"{name}.bias": noise(OUT, seed=20) for name in (QKV, GATE)}
    return weights | {"norm.weight": noise(IN, seed=30), "conv.weight": noise(8, 4, 3, 3, seed=31),
                      "x_embedder.weight": noise(IN, 16, seed=32), "x_embedder.bias": noise(IN, seed=33),
                      "pad_token": noise(1, IN, seed=34)}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder: an original, its quantized model with a correction LoRA, and LoRAs."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "original.safetensors", original())
    recipe_file(tmp_path / "mine.toml", *((format, name) for name, format in FORMATS.items()))
    Job(Checkpoint("original.safetensors"), tmp_path / "model.safetensors", recipe.find("mine.toml"), rank=RANK).run()
    lora_of(tmp_path / "style.safetensors", QKV)
    lora_of(tmp_path / "gate.safetensors", GATE, seed=5)
    return tmp_path


def lora_of(path, *names, kind="lora without alpha", seed=0, prefix="diffusion_model."):
    layers = {f"{prefix}{name}": (kind, original()[f"{name}.weight"]) for name in names}
    return lora_files.save(path, layers, torch.float32, seed)


def tensors_of(path):
    file = Checkpoint(path)
    return {key: file.read(key) for key in file.tensors}


def product(path, name, prefix="diffusion_model."):
    file = Checkpoint(path)
    up, down = (file.read(f"{prefix}{name}.lora_{part}.weight").float() for part in ("B", "A"))
    return up @ down


def bake(*loras, out="baked.safetensors", calibration=None, rank=RANK, **options):
    """(report, model, correction or None) of a baking in the current folder; as the command line does it."""
    options = {"original": None, "correction": correction_beside(Checkpoint("model.safetensors"))} | options
    source = Checkpoint("original.safetensors") if options["original"] else None
    model = Checkpoint("model.safetensors")
    found = [additions.read(*additions.parse(text), source or model) for text in loras]
    work = Bake(model, found, **options | {"original": source}).job(out, Settings(rank=rank), calibration)
    report = work.run()
    return report, Checkpoint(out), Checkpoint(work.lora) if work.lora else None


def same(a, b, keys):
    return all(torch.equal(a.read(k).flatten().view(torch.uint8), b.read(k).flatten().view(torch.uint8)) for k in keys)


def entries(file, name):
    return [key for key in file.tensors if key.rpartition(".")[0].removeprefix(file.prefix) == name]


# ---- with the original


def test_with_the_original_it_is_the_job_of_the_changed_original(folder):
    report, model, correction = bake("style.safetensors:0.8", "gate.safetensors:-0.5", original=True)
    changed = {key: tensor.float() for key, tensor in original().items()}
    changed[f"{QKV}.weight"] += product("style.safetensors", QKV) * 0.8
    changed[f"{GATE}.weight"] += product("gate.safetensors", GATE) * -0.5
    save_file(changed, "changed.safetensors")
    job = Job(Checkpoint("changed.safetensors"), folder / "wanted.safetensors", recipe.find("mine.toml"), rank=RANK)
    expected = job.run()
    wanted, pairs = Checkpoint(job.target), Checkpoint(job.lora)
    for name in FORMATS:
        assert same(model, wanted, [key for key in entries(wanted, name) if not key.endswith(".bias")]), name
    assert correction.tensors.keys() == pairs.tensors.keys() and same(correction, pairs, pairs.tensors)
    assert [(row.name, row.error, row.corrected_error) for row in report.layers] == [
        (row.name, row.error, row.corrected_error) for row in expected.layers
    ]
    source = Checkpoint("original.safetensors")
    assert same(model, source, [k for k in source.tensors if not k.startswith("layers") or k.endswith(".bias")])


@pytest.mark.parametrize("kind", [*lora_files.KINDS, *lora_files.WITH_BIAS])
def test_every_kind_is_in_the_target_at_its_strength(folder, kind):
    """A layer in fp32 holds the target itself."""
    lora_of("kind.safetensors", QKV, kind=kind)
    recipe_file(folder / "exact.toml", ("fp32", QKV), ("nvfp4", "layers.{0,1}.feed_forward.w1"))
    chosen = recipe.find("exact.toml")
    _, model, _ = bake("kind.safetensors:0.7", original=True, recipe=chosen)
    weight, bias = original()[f"{QKV}.weight"].float(), original()[f"{QKV}.bias"].float()
    change = additions.read(folder / "kind.safetensors", 1.0, model).parts[0].change
    if change.adapter is not None:
        assert relative_error(model.weight(QKV), weight) > 0.01
        assert relative_error(model.weight(QKV), weight + change.adapter.delta(weight, 0.7)) < EXACT
    if kind in lora_files.WITH_BIAS:
        moved = 0.7 * Checkpoint("kind.safetensors").read(f"diffusion_model.{QKV}.diff_b").float()
        assert relative_error(model.read(f"{QKV}.bias"), bias + moved) < ROUNDED
        assert relative_error(model.read(f"{QKV}.bias"), bias) > 0.1
    else:
        assert torch.equal(model.read(f"{QKV}.bias"), original()[f"{QKV}.bias"])


def test_what_is_not_quantized_is_merged(folder):
    norm, token, conv = torch.rand(IN), torch.rand(1, IN), original()["conv.weight"].float()
    others = {"norm.diff": norm, "pad_token.diff": token}
    layers = {"conv": (lora_files.locon, conv.flatten(1)), "x_embedder": ("lora", original()["x_embedder.weight"]),
              QKV: ("lora", original()[f"{QKV}.weight"])}  # fmt: skip
    lora_files.save("mixed.safetensors", layers, torch.float32, others=others)
    before = original()
    for with_original in (True, None):
        _, model, _ = bake("mixed.safetensors:2", original=with_original, out=f"{with_original}.safetensors")
        assert relative_error(model.read("norm.weight"), before["norm.weight"].float() + 2 * norm) < ROUNDED
        assert relative_error(model.read("pad_token"), before["pad_token"].float() + 2 * token) < ROUNDED
        up, down = (Checkpoint("mixed.safetensors").read(f"conv.lora_{part}.weight") for part in ("up", "down"))
        wanted = conv + 2 * 3.0 / 4 * (up.flatten(1) @ down.flatten(1)).view(conv.shape)
        assert model.read("conv.weight").shape == conv.shape
        assert relative_error(model.read("conv.weight"), wanted) < ROUNDED
        assert relative_error(model.weight("x_embedder"), before["x_embedder.weight"].float()) > 0.1
        assert torch.equal(model.read("x_embedder.bias"), before["x_embedder.bias"])


# ---- without


def test_without_the_original_untouched_layers_keep_their_bytes_and_pairs(folder):
    before = Checkpoint("model.safetensors"), Checkpoint("model_lora.safetensors")
    report, model, correction = bake("style.safetensors")
    untouched = [name for name in FORMATS if name != QKV]
    assert [row.name for row in report.layers] == [QKV] and model.layers.keys() == FORMATS.keys()
    assert same(model, before[0], before[0].tensors.keys() - set(entries(model, QKV)))
    kept = [key for key in before[1].tensors if QKV not in key]
    assert same(correction, before[1], kept) and set(kept) < correction.tensors.keys()
    assert not torch.equal(model.read(f"{QKV}.weight"), before[0].read(f"{QKV}.weight"))
    said, was = (json.loads(file.metadata["tessera_layers"]) for file in (model, before[0]))
    assert {name: said[name] for name in untouched} == {name: was[name] for name in untouched} and said[QKV] != was[QKV]
    [note] = [note for note in report.warnings if note.startswith("kept byte for byte")]
    assert "3 quantized layers" in note and "pairs of 3 of them" in note
    assert not model.repairs and lora_path(model.path).name == correction.name


def test_without_the_original_errors_count_from_the_corrected_model(folder):
    report, model, correction = bake("style.safetensors:0.5", "gate.safetensors")
    before, pairs = Checkpoint("model.safetensors"), Checkpoint("model_lora.safetensors")
    for row, (name, strength, file) in zip(
        report.layers, ((QKV, 0.5, "style.safetensors"), (GATE, 1.0, "gate.safetensors")), strict=True
    ):
        target = read_branch(pairs, name).add_to(before.weight(name)) + strength * product(file, name)
        stored = model.weight(name)
        corrected = read_branch(correction, name).add_to(stored.clone())
        assert row.name == name and row.error == pytest.approx(relative_error(stored, target), abs=2e-6)
        assert row.corrected_error == pytest.approx(relative_error(corrected, target), abs=2e-6)
        assert row.corrected_error < row.error
    [note] = [note for note in report.warnings if note.startswith("best effort")]
    said = json.loads(before.metadata["tessera_layers"])
    assert f"({(said[QKV][1] + said[GATE][1]) / 2:.4f} in the mean" in note and "model_lora.safetensors" in note


def test_without_a_correction_the_codes_alone_are_the_target(folder):
    report, _, correction = bake("style.safetensors", correction=None)
    target = Checkpoint("model.safetensors").weight(QKV) + product("style.safetensors", QKV)
    assert report.layers[0].error == pytest.approx(relative_error(Checkpoint("baked.safetensors").weight(QKV), target),
                                                   abs=2e-6)  # fmt: skip
    assert set(correction.tensors) == {lora_key(QKV, f"lora_{part}.weight") for part in ("up", "down")}
    assert any("without a correction LoRA" in note for note in report.warnings)


def test_a_bias_of_the_correction_goes_into_the_target(folder):
    moved, pairs = torch.rand(OUT), tensors_of("model_lora.safetensors")
    pairs |= {lora_key(QKV, "diff_b"): moved, lora_key(GATE, "diff_b"): moved.clone()}
    save_file(pairs, "biased.safetensors")
    _, model, correction = bake("style.safetensors", correction=folder / "biased.safetensors")
    bias = original()[f"{QKV}.bias"].float()
    assert relative_error(model.read(f"{QKV}.bias"), bias + moved) < ROUNDED
    assert torch.equal(model.read(f"{GATE}.bias"), original()[f"{GATE}.bias"])
    assert torch.equal(correction.read(lora_key(GATE, "diff_b")), moved)
    assert lora_key(QKV, "diff_b") not in correction.tensors


def test_rank_zero_still_carries_the_pairs_of_layers_that_stay(folder):
    _, _, correction = bake("style.safetensors", rank=0)
    assert {key.split(".lora_")[0] for key in correction.tensors} == {f"diffusion_model.{name}" for name in FORMATS
                                                                      if name != QKV}  # fmt: skip


def test_a_recipe_changes_only_layers_of_another_format(folder):
    recipe_file(folder / "other.toml", ("nvfp4", QKV), ("mxfp8", PROJECTION), ("mxfp8", SECOND))
    report, model, _ = bake("style.safetensors", recipe=recipe.find("other.toml"))
    assert [(row.name, row.format) for row in report.layers] == [(QKV, "nvfp4"), (SECOND, "mxfp8")]
    before = Checkpoint("model.safetensors")
    assert same(model, before, entries(before, PROJECTION) + entries(before, GATE))
    assert model.layers[GATE].format.label == "int8_row"


@pytest.mark.parametrize("name", ["ctq126_mixed", "ctq126_mixed_prefixed", "ctq134_int8_convrot64", "legacy_e4m3"])
def test_files_of_other_tools_are_baked(tmp_path, name):
    """Doubled prefixes in the correction, header markers, legacy scales."""
    model = Checkpoint(GOLDEN / f"{name}.safetensors")
    [layer, *others] = sorted(model.layers)
    path = lora_files.save(tmp_path / "s.safetensors", {f"diffusion_model.{layer}": ("lora", model.weight(layer))})
    work = Bake(model, [additions.read(path, 0.7, model)], correction=correction_beside(model),
                recipe=recipe.loads('default = "fp8_e4m3"') if name.startswith("legacy") else None)  # fmt: skip
    work.job(tmp_path / "baked.safetensors", Settings(rank=RANK)).run()
    baked = Checkpoint(tmp_path / "baked.safetensors")
    formats = ({n: found.format.label for n, found in file.layers.items()} for file in (baked, model))
    assert next(formats) == next(formats)
    assert relative_error(baked.weight(layer), work.source.weight(layer)) < 0.1 and baked.prefix == model.prefix
    for other in others:
        assert relative_error(baked.weight(other), model.weight(other)) < (1e-3 if name.startswith("legacy") else 1e-9)


def test_an_absorb_file_becomes_one_again(folder):
    Job(Checkpoint("original.safetensors"), folder / "absorb.safetensors", recipe.find("mine.toml"),
        settings=Settings(rank=RANK, mode="absorb")).run()  # fmt: skip
    model = Checkpoint("absorb.safetensors")
    found = [additions.read(folder / "style.safetensors", 1.0, model)]
    with pytest.raises(ValueError, match="name it with the word absorb"):
        Bake(model, found).job(folder / "baked.safetensors")
    work = Bake(model, found).job(folder / "baked_absorb.safetensors", Settings(rank=RANK))
    [row] = work.run().layers
    baked = Checkpoint("baked_absorb.safetensors")
    target = model.weight(QKV) + product("style.safetensors", QKV)
    assert relative_error(baked.weight(QKV), target) == pytest.approx(row.corrected_error, abs=2e-6)
    assert work.lora is None
    assert all(layer.absorbs for layer in baked.layers.values()) and correction_beside(model) is None
    assert same(baked, model, entries(model, GATE))


# ---- what is said and refused


def test_metadata_say_what_was_baked(folder):
    for with_original, mode in ((True, "original"), (None, "best effort")):
        _, model, correction = bake("style.safetensors:0.8", "gate.safetensors:0", original=with_original,
                                    out=f"{mode[:4]}.safetensors")  # fmt: skip
        said = json.loads(model.metadata["tessera"])
        digest = fingerprint(folder)["style.safetensors"]
        assert said["baked"]["loras"] == [{"name": "style.safetensors", "sha256": digest, "strength": 0.8}]
        assert said["baked"]["mode"] == mode and said["baked"]["before"]["source"]["name"] == "original.safetensors"
        assert json.loads(correction.metadata["tessera"]) == said | {"model": model.name}


def test_the_order_of_loras_changes_no_byte(folder):
    lora_of("third.safetensors", QKV, seed=9)
    bake("style.safetensors", "third.safetensors:0.3", out="a.safetensors")
    bake("third.safetensors:0.3", "style.safetensors", out="b.safetensors")
    a, b = Checkpoint("a.safetensors"), Checkpoint("b.safetensors")
    assert a.tensors == b.tensors and same(a, b, a.tensors)


def test_the_same_baking_again_is_recognised_and_another_overwrites_nothing(folder):
    bake("style.safetensors")
    before = fingerprint(folder)
    assert "nothing was written" in bake("style.safetensors")[0].warnings[-1]
    with pytest.raises(ValueError, match="already exists"):
        bake("style.safetensors:0.5")
    for out in ("model.safetensors", "original.safetensors", "style.safetensors"):
        with pytest.raises(ValueError, match="must be different files"):
            bake("style.safetensors", out=out, original=True)
    with pytest.raises(ValueError, match="already exists"):
        bake("gate.safetensors", out="original.safetensors")
    assert fingerprint(folder) == before


def test_a_killed_baking_resumes_to_the_same_bytes(folder, capsys):
    command = ["bake", "model.safetensors", "--lora", "style.safetensors:0.8", "--original", "original.safetensors",
               "--resume", "-o"]  # fmt: skip
    assert cli.main([*command, "whole.safetensors"]) == 0
    killed = subprocess.run([sys.executable, "-c", KILLED, str(TESTS), *command, "cut.safetensors"], check=False)
    assert killed.returncode == -signal.SIGKILL and not (folder / "cut.safetensors").exists()
    capsys.readouterr()
    assert cli.main([*command, "cut.safetensors"]) == 0
    assert "resumed: 2 of 4 layers" in capsys.readouterr().out
    for whole, cut in (("whole.safetensors", "cut.safetensors"), ("whole_lora.safetensors", "cut_lora.safetensors")):
        whole, cut = Checkpoint(whole), Checkpoint(cut)
        assert whole.tensors == cut.tensors and same(whole, cut, whole.tensors)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from conftest import load_pack
load_pack()
from tessera import cli, job, journal
journal.INTERVAL, run = 0, job.Job.run
def killed(self, progress):
    return run(self, lambda step: step.index < 2 or os.kill(os.getpid(), signal.SIGKILL))
job.Job.run = killed
cli.main(sys.argv[2:])
"""


def statistics(model):
    """Of the first layer's input, uneven and with a mean."""
    site = calibration.Accumulator(IN)
    site.add(torch.randn(512, IN, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, IN) + 1)
    return calibration.Calibration({QKV: site.statistics()}, {QKV: QKV}, calibration.fingerprint(model), 1)


def test_statistics_of_the_original_are_used(folder):
    known = statistics(Checkpoint("original.safetensors"))
    report, _, _ = bake("style.safetensors", original=True, calibration=known, out="a.safetensors")
    row = next(row for row in report.layers if row.name == QKV)
    assert report.calibrated == 1 and row.corrected_output_error < row.output_error < row.error
    report, _, _ = bake("style.safetensors", calibration=known, out="b.safetensors")
    assert report.calibrated == 1 and any(
        "nothing can tell whether they are this model's" in n for n in report.warnings
    )
    foreign = statistics(Checkpoint("model.safetensors"))
    with pytest.raises(ValueError, match="statistics of another model"):
        bake("style.safetensors", original=True, calibration=foreign, out="c.safetensors")


def test_nothing_to_bake_is_said(folder):
    with pytest.raises(ValueError, match="nothing to bake"):
        bake("style.safetensors:0")
    save_file({"norm.diff": torch.rand(IN)}, "norm.safetensors")
    with pytest.raises(ValueError, match="changes none of its quantized layers"):
        bake("norm.safetensors")


def test_misfits_are_named(folder):
    save_file({f"{QKV}.diff": torch.rand(OUT, IN + 1)}, "wide.safetensors")
    with pytest.raises(ValueError, match=rf"wide.safetensors: {QKV}: the difference is \[96, 65\]"):
        bake("wide.safetensors")
    tensors = tensors_of(lora_of(folder / "reshape.safetensors", QKV))
    tensors[f"diffusion_model.{QKV}.reshape_weight"] = torch.tensor([OUT + 1, IN])
    save_file(tensors, "reshape.safetensors")
    with pytest.raises(ValueError, match="cannot be baked"):
        bake("reshape.safetensors")
    save(folder / "other.safetensors", {f"{QKV}.weight": noise(OUT, IN + 16)})
    model, other = Checkpoint("model.safetensors"), Checkpoint("other.safetensors")
    with pytest.raises(ValueError, match="this is not that file's original"):
        Bake(model, [additions.read(folder / "gate.safetensors", 1.0, model)], other)
    foreign = lora_of(folder / "foreign.safetensors", QKV, prefix="far.")
    with pytest.raises(ValueError, match="corrects another model"):
        bake("style.safetensors", correction=foreign)


# ---- names


@pytest.mark.parametrize(("base", "place"), [
    (f"diffusion_model.{QKV}", Place(QKV)), (f"model.diffusion_model.{QKV}", Place(QKV)), (QKV, Place(QKV)),
    (f"transformer.{QKV}", Place(QKV)), (f"base_model.model.{QKV}", Place(QKV)),
    ("lora_unet_layers_0_attention_qkv", Place(QKV)), ("lycoris_layers_0_feed_forward_w1", Place(GATE)),
    ("transformer.layers.0.attention.to_q", Place(QKV, (0, 32))),
    ("layers.0.attention.to_k", Place(QKV, (32, 32))),
    ("lora_transformer_layers_0_attention_to_v", Place(QKV, (64, 32))),
    ("transformer.layers.0.attention.to_out.0", Place(PROJECTION)), ("norm", Place("norm")),
    ("diffusion_model.pad_token", Place("pad_token")),
    ("diffusion_model.blocks.0.key_norm", Place("blocks.0.key_norm.scale")),
    ("transformer.all_x_embedder.2-1", Place("x_embedder")),
    ("layers.7.attention.qkv", None), ("lora_te1_text_model_encoder_layers_0_mlp_fc1", None),
])  # fmt: skip
def test_base_names_are_found(base, place):
    shapes = {key: tuple(tensor.shape) for key, tensor in original().items()}
    assert Names(shapes | {"blocks.0.key_norm.scale": (IN,)}).find(base) == place


def test_a_slice_changes_its_rows_only(folder):
    third = original()[f"{QKV}.weight"][:32]
    lora_files.save("slice.safetensors", {"transformer.layers.0.attention.to_k": ("lora without alpha", third)})
    recipe_file(folder / "exact.toml", ("fp32", QKV))
    _, model, _ = bake("slice.safetensors", original=True, recipe=recipe.find("exact.toml"))
    moved = model.weight(QKV) - original()[f"{QKV}.weight"].float()
    assert moved[32:64].abs().min() > 0 and not moved[:32].any() and not moved[64:].any()


# ---- the command line


def run(capsys, command):
    capsys.readouterr()
    code = cli.main(command.split())
    return code, *capsys.readouterr()


def test_command_bakes_and_finds_the_correction_beside(folder, capsys):
    code, out, err = run(capsys, "bake model.safetensors -o new.safetensors --lora style.safetensors:0.8 --json")
    report = json.loads(out)
    assert code == 0 and "best effort" in err and "correction model_lora.safetensors" in err
    assert report["baked"]["loras"][0]["strength"] == 0.8 and report["lora"] == "new_lora.safetensors"
    assert [layer["name"] for layer in report["layers"]] == [QKV]
    assert correction_beside(Checkpoint("new.safetensors")).name == "new_lora.safetensors"
    code, out, _ = run(capsys, "verify new.safetensors --against original.safetensors --lora new_lora.safetensors")
    assert code == 0 and "4 layers verified" in out


def test_command_takes_the_original_and_a_recipe(folder, capsys):
    command = "bake model.safetensors -o new.safetensors --lora style.safetensors --original original.safetensors"
    code, out, _ = run(capsys, f"{command} --recipe mine.toml --rank 4 --correction none")
    assert code == 0 and "layers: 2 nvfp4, 1 mxfp8, 1 int8_row" in out and "rank 4" in out


def test_command_lists_what_fits_nothing(folder, capsys):
    lora_files.save("two.safetensors", {QKV: ("lora", original()[f"{QKV}.weight"]), "far.away": ("lora", noise(8, 8))})
    code, _, err = run(capsys, "bake model.safetensors -o new.safetensors --lora two.safetensors")
    assert code == 1 and "1 of 2 keys fit nothing in model.safetensors" in err and "far.away" in err
    assert not (folder / "new.safetensors").exists()
    code, out, _ = run(capsys, "bake model.safetensors -o new.safetensors --lora two.safetensors --skip-unmatched")
    assert code == 0 and "two.safetensors: left out, as they fit nothing: far.away" in out


def test_strengths_are_read_after_a_colon():
    cases = {"a.sft": ("a.sft", 1.0), "x/a.sft:-0.5": ("x/a.sft", -0.5), "C:\\x\\a.sft": ("C:\\x\\a.sft", 1.0)}
    for text, (name, strength) in cases.items():
        path, found = additions.parse(text)
        assert (str(path), found) == (name, strength)
    with pytest.raises(ValueError, match="is not a finite number"):
        additions.parse("a.safetensors:nan")
