"""A job writes what the recipe says and the pipeline computed, the same every time, or nothing at all."""

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter

import pytest
import torch
from safetensors import safe_open

import killed
from synthetic import block, fingerprint, noise, qwen, recipe_file, save, zimage
from tessera import formats
from tessera.checkpoint import Checkpoint, read_header
from tessera.formats import TensorSpec
from tessera.job import Job, Step, lora_path, natural
from tessera.progress import Cost, Estimate
from tessera.quantization import pipeline, recipe
from tessera.quantization.pipeline import Settings
from tessera.quantization.report import LayerReport, Report
from tessera.version import VERSION
from tessera.writer import Writer

COUNTS = {
    "z_image_nvfp4": {"nvfp4": 102, "mxfp8": 66},
    "z_image_mxfp8": {"mxfp8": 161},
    "int8_convrot": {"int8_convrot_256": 170},
}
RANK = 16
MAX_ERROR = {"nvfp4": 0.088, "mxfp8": 0.029, "int8_convrot_256": 0.0088}  # relative L2 of normal noise
MIN_GAIN = {"nvfp4": 0.06, "mxfp8": 0.06, "int8_convrot_256": 0.06}  # share of the error a rank of 16 takes at dim 256
SAMPLE = slice(None, None, 17)  # layers whose bytes are computed once more


def blocks_recipe(folder, **rules):
    """A recipe for `block()`: format by linear, nvfp4 for all unless said."""
    pairs = [(format, f"layers.0.*.{name}") for name, format in rules.items()] or [("nvfp4", "layers.**")]
    return recipe.find(recipe_file(folder / "mine.toml", *pairs))


@pytest.fixture
def folder(tmp_path):
    """An output folder beside a source of one block."""
    save(tmp_path / "source.safetensors", block())
    (tmp_path / "out").mkdir()
    return tmp_path


def job(folder, chosen=None, source="source.safetensors", name="model.safetensors", **options):
    options = {"rank": 8} | options
    chosen = chosen or blocks_recipe(folder)
    return Job(Checkpoint(folder / source), folder / "out" / name, chosen, **options)


# ---- the seed recipes on Z-Image


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tmp_path_factory.mktemp("source") / "z_image_bf16.safetensors", zimage(), metadata={"author": "Zoë"})


@pytest.fixture(scope="module", params=COUNTS)
def made(request, source, tmp_path_factory):
    """(finished job, its report, the model, the LoRA) of one seed recipe."""
    target = tmp_path_factory.mktemp(request.param) / "model.safetensors"
    work = Job(Checkpoint(source), target, recipe.builtin(request.param), rank=RANK, seed=5)
    report = work.run()
    return work, report, Checkpoint(target), Checkpoint(lora_path(target))


def test_recipe_quantizes_the_published_number_of_layers(made):
    work, report, model, _ = made
    expected = COUNTS[work.recipe.name]
    assert Counter(layer.format.label for layer in model.layers.values()) == expected
    assert report.counts() == expected and work.warnings == []
    assert len(model.shapes()) == 453 and model.repairs == []


def test_stored_layers_are_what_the_pipeline_computes(made):
    work, _, model, lora = made
    for name in list(model.layers)[SAMPLE]:
        layer = model.layers[name]
        seed = pipeline.layer_seed(5, name)
        expected = pipeline.quantize(layer.format, work.source.weight(name), Settings(rank=RANK), seed)
        entries = {suffix: model.read(f"{name}.{suffix}") for suffix in expected.entries}
        assert all(same_bytes(entries[suffix], tensor) for suffix, tensor in expected.entries.items()), name
        for part in ("up", "down"):
            assert torch.equal(lora.read(f"diffusion_model.{name}.lora_{part}.weight"), getattr(expected.branch, part))


def same_bytes(a, b):
    flat = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*flat)


def test_everything_else_is_copied_bit_for_bit(made):
    work, report, model, _ = made
    kept = [key for key in work.source.tensors if key.removesuffix(".weight") not in model.layers]
    assert report.kept == len(kept) == 453 - len(model.layers)
    for key in kept:
        assert same_bytes(model.read(key), work.source.read(key)), key


def test_lora_corrects_every_quantized_layer(made):
    _, report, model, lora = made
    parts = {f"diffusion_model.{name}.lora_{part}.weight" for name in model.layers for part in ("up", "down")}
    assert set(lora.tensors) == parts
    for row in report.layers:
        up, down = (lora.tensors[f"diffusion_model.{row.name}.lora_{part}.weight"] for part in ("up", "down"))
        assert up == TensorSpec(torch.float16, (row.shape[0], RANK))
        assert down == TensorSpec(torch.float16, (RANK, row.shape[1]))
        assert row.error < MAX_ERROR[row.format], row
        assert row.corrected_error < (1 - MIN_GAIN[row.format]) * row.error, row


def test_report_and_metadata_hold_the_errors_of_the_file(made):
    work, report, model, lora = made
    errors = json.loads(model.metadata["tessera_layers"])
    assert errors.keys() == {row.name for row in report.layers} == model.layers.keys()
    for row in report.layers[SAMPLE]:
        weight, stored = work.source.weight(row.name), model.weight(row.name)
        up, down = (lora.read(f"diffusion_model.{row.name}.lora_{part}.weight").float() for part in ("up", "down"))
        plain, corrected = ((x - weight).norm() / weight.norm() for x in (stored, stored + up @ down))
        assert errors[row.name] == pytest.approx([float(plain), float(corrected)], abs=2e-6)
        assert (row.error, row.corrected_error) == pytest.approx(errors[row.name], abs=1e-6)


def test_provenance_names_version_recipe_source_and_seed(made, source):
    work, _, model, lora = made
    provenance = json.loads(model.metadata["tessera"])
    assert provenance["version"] == VERSION and provenance["seed"] == 5 and provenance["rank"] == RANK
    assert provenance["recipe"] == {"name": work.recipe.name, "sha256": work.recipe.digest}
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert provenance["source"] == {"name": source.name, "sha256": digest}
    assert provenance["lora"] == lora.name and model.metadata["author"] == "Zoë"
    assert json.loads(lora.metadata["tessera"]) == provenance | {"model": model.name}


def test_header_and_tensors_mark_the_same_layers(made):
    model = made[2]
    header = json.loads(model.metadata["_quantization_metadata"])
    markers = [key for key in model.tensors if key.endswith(".comfy_quant")]
    tensors = {key.removesuffix(".comfy_quant"): json.loads(bytes(model.read(key).tolist())) for key in markers}
    assert header == {"format_version": "1.0", "layers": tensors} and tensors.keys() == model.layers.keys()


def test_safetensors_reads_the_file_and_sizes_are_the_reports(made):
    _, report, model, lora = made
    for file, nbytes in ((model, report.model_bytes), (lora, report.lora_bytes)):
        with safe_open(file.path, "pt") as opened:
            assert set(opened.keys()) == set(file.tensors)
        assert file.path.stat().st_size == nbytes
    for row in report.layers:
        stored = sum(model.tensors[f"{row.name}.{suffix}"].nbytes for suffix in model.layers[row.name].sources)
        assert row.nbytes == stored


# ---- the same bytes every time


def test_two_runs_give_the_same_bytes(folder):
    job(folder).run()
    first = fingerprint(folder / "out")
    job(folder, overwrite=True).run()
    assert fingerprint(folder / "out") == first and len(first) == 2


def test_a_layers_bytes_do_not_depend_on_other_layers(folder):
    job(folder, blocks_recipe(folder, qkv="nvfp4", out="mxfp8", w1="int8_row")).run()
    name, weights = "layers.0.feed_forward.w1", block()
    alone = save(folder / "alone.safetensors", {f"{name}.weight": weights[f"{name}.weight"]})
    job(folder, blocks_recipe(folder, w1="int8_row"), alone.name, "alone.safetensors").run()
    for suffix in ("", "_lora"):
        both = [Checkpoint(folder / "out" / f"{stem}{suffix}.safetensors") for stem in ("model", "alone")]
        shared = [key for key in both[1].tensors if name in key]
        assert shared and all(same_bytes(both[0].read(key), both[1].read(key)) for key in shared)


def test_seed_changes_the_correction_only_where_codes_do_not_wait_for_it(folder):
    for seed in (0, 1):
        settings = Settings(rank=8, rounding="sweep")
        job(folder, name=f"seed{seed}.safetensors", seed=seed, rank=None, settings=settings).run()
    models = [Checkpoint(folder / "out" / f"seed{seed}.safetensors") for seed in (0, 1)]
    loras = [Checkpoint(folder / "out" / f"seed{seed}_lora.safetensors") for seed in (0, 1)]
    assert all(same_bytes(models[0].read(key), models[1].read(key)) for key in models[0].tensors)
    assert not all(same_bytes(loras[0].read(key), loras[1].read(key)) for key in loras[0].tensors)


def test_the_same_job_again_takes_the_files_that_are_there(tmp_path):
    source = save(tmp_path / "source.safetensors", block())
    chosen = recipe.find(recipe_file(tmp_path / "r.toml", ("nvfp4", "layers.**")))

    def run(**changes):
        return Job(Checkpoint(source), tmp_path / "out.safetensors", chosen, rank=4, **changes).run()

    first, before = run(), fingerprint(tmp_path)
    again = run()
    assert fingerprint(tmp_path) == before and "nothing was written" in again.warnings[-1]
    for mine, theirs in zip(again.layers, first.layers, strict=True):
        assert (mine.name, mine.format, mine.nbytes) == (theirs.name, theirs.format, theirs.nbytes)
        assert mine.error == pytest.approx(theirs.error, abs=1e-6)
        assert mine.corrected_error == pytest.approx(theirs.corrected_error, abs=1e-6)
    assert (again.model_bytes, again.lora_bytes, again.kept) == (first.model_bytes, first.lora_bytes, first.kept)
    with pytest.raises(ValueError, match="already exists"):
        run(seed=1)
    save(source, block() | {"extra": torch.zeros(3)})
    with pytest.raises(ValueError, match="already exists"):
        run()


def test_a_source_in_memory_gives_the_same_tensors(folder):
    @dataclasses.dataclass
    class Memory:
        """A model that is no file, as the host hands it over."""

        weights: dict
        name: str = "MODEL"
        prefix: str = ""
        path: None = None
        metadata: dict = dataclasses.field(default_factory=dict)

        def records(self):
            return {}

        def __post_init__(self):
            self.tensors = {key: TensorSpec(t.dtype, tuple(t.shape)) for key, t in self.weights.items()}
            self.nbytes = sum(spec.nbytes for spec in self.tensors.values())

        def shapes(self):
            return {key: spec.shape for key, spec in self.tensors.items()}

        def read(self, key):
            return self.weights[key]

        def weight(self, name):
            return self.weights[f"{name}.weight"].float()

        def quantized(self, name):
            return False

    job(folder).run()
    Job(Memory(block()), folder / "out" / "memory.safetensors", blocks_recipe(folder), rank=8).run()
    file, memory = (Checkpoint(folder / "out" / f"{stem}.safetensors") for stem in ("model", "memory"))
    assert all(same_bytes(file.read(key), memory.read(key)) for key in file.tensors)
    assert json.loads(memory.metadata["tessera"])["source"] == {"name": "MODEL", "sha256": None}


# ---- shapes, prefixes, kinds of sources


@pytest.mark.parametrize("label", ["nvfp4", "mxfp8"])
def test_padded_layers_carry_their_shape(folder, label):
    save(folder / "odd.safetensors", {"layers.0.a.w.weight": noise(100, 72), "layers.0.b.w.weight": noise(128, 64)})
    job(folder, recipe.find(recipe_file(folder / "r.toml", (label, "**.w"))), "odd.safetensors").run()
    model = Checkpoint(folder / "out" / "model.safetensors")
    assert model.layers["layers.0.a.w"].record == {"format": label, "orig_shape": [100, 72]}
    assert model.layers["layers.0.b.w"].record == {"format": label}
    assert model.weight("layers.0.a.w").shape == (100, 72)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_prefixed_source_keeps_its_prefix_and_the_lora_has_exactly_one(folder, prefix):
    save(folder / "prefixed.safetensors", block(), prefix)
    job(folder).run()
    job(folder, source="prefixed.safetensors", name="prefixed.safetensors").run()
    bare, prefixed = (Checkpoint(folder / "out" / f"{stem}.safetensors") for stem in ("model", "prefixed"))
    assert set(prefixed.tensors) == {prefix + key for key in bare.tensors}
    assert all(same_bytes(prefixed.read(prefix + key), bare.read(key)) for key in bare.tensors)
    assert json.loads(prefixed.metadata["_quantization_metadata"])["layers"].keys() == {
        layer.key for layer in prefixed.layers.values()
    }
    loras = [read_header(lora_path(file.path))[1] for file in (bare, prefixed)]
    assert loras[0] == loras[1] and all(key.count("diffusion_model.") == 1 for key in loras[1])


def test_text_encoder_gets_no_lora_and_says_so(folder):
    save(folder / "qwen.safetensors", qwen())
    work = job(folder, recipe.builtin("int8_convrot"), "qwen.safetensors")
    report = work.run()
    assert report.lora is None and list(fingerprint(folder / "out")) == ["model.safetensors"]
    assert any("no correction LoRA" in warning for warning in report.warnings)
    model = Checkpoint(folder / "out" / "model.safetensors")
    assert "model.embed_tokens" not in model.layers and len(model.layers) == 2


def test_rank_zero_writes_no_lora(folder):
    report = job(folder, rank=0).run()
    assert report.lora is None and list(fingerprint(folder / "out")) == ["model.safetensors"]


def test_rank_beyond_the_layer_is_the_layers(folder):
    job(folder, rank=500).run()
    lora = Checkpoint(folder / "out" / "model_lora.safetensors")
    assert {spec.shape for spec in lora.tensors.values()} == {(96, 96), (96, 128)}


def test_plain_formats_need_no_marker_and_no_lora(folder):
    report = job(folder, blocks_recipe(folder, qkv="fp16", out="bf16")).run()
    model = Checkpoint(folder / "out" / "model.safetensors")
    assert model.layers == {} and report.lora is None and len(fingerprint(folder / "out")) == 1
    assert model.tensors["layers.0.attention.qkv.weight"].dtype == torch.float16


def test_all_zero_layer_stays_zero(folder):
    save(
        folder / "zero.safetensors", {"layers.0.a.w.weight": torch.zeros(64, 64), "layers.0.b.w.weight": noise(64, 64)}
    )
    report = job(folder, recipe.find(recipe_file(folder / "r.toml", ("nvfp4", "**"))), "zero.safetensors").run()
    assert report.layers[0].error == report.layers[0].corrected_error == 0
    assert not Checkpoint(folder / "out" / "model.safetensors").weight("layers.0.a.w").any()


def test_already_quantized_source_is_reported(folder):
    job(folder).run()
    again = Job(Checkpoint(folder / "out" / "model.safetensors"), folder / "out" / "again.safetensors",
                blocks_recipe(folder, qkv="mxfp8"), rank=0)  # fmt: skip
    assert "1 layers are already quantized in the source (first: layers.0.attention.qkv)" in again.warnings[0]
    again.run()
    first, second = (Checkpoint(folder / "out" / f"{stem}.safetensors") for stem in ("model", "again"))
    assert second.layers["layers.0.attention.qkv"].format.label == "mxfp8"
    assert torch.equal(second.weight("layers.0.attention.out"), first.weight("layers.0.attention.out"))


def test_kept_layers_marked_in_the_header_only_stay_marked(folder):
    weight, format = noise(64, 64).float(), formats.NVFP4()
    tensors = {f"layers.0.a.w.{k}": t for k, t in format.pack(format.encode(weight)).items()}
    tensors["layers.0.b.w.weight"] = noise(64, 64)
    header = json.dumps({"format_version": "1.0", "layers": {"layers.0.a.w": {"format": "nvfp4"}}})
    save(folder / "half.safetensors", tensors, "model.diffusion_model.", {"_quantization_metadata": header})
    job(folder, recipe.find(recipe_file(folder / "r.toml", ("mxfp8", "**.b.w"))), "half.safetensors").run()
    model = Checkpoint(folder / "out" / "model.safetensors")
    assert {name: layer.format.label for name, layer in model.layers.items()} == {
        "layers.0.a.w": "nvfp4", "layers.0.b.w": "mxfp8",
    }  # fmt: skip
    assert torch.equal(model.weight("layers.0.a.w"), format.decode(format.encode(weight)))
    header = json.loads(model.metadata["_quantization_metadata"])["layers"]
    assert header.keys() == {layer.key for layer in model.layers.values()}


def test_long_metadata_in_any_script_is_carried_over(folder):
    text = "文😀" * 40_000  # six and twelve bytes each as JSON
    save(folder / "wordy.safetensors", block(), metadata={"comment": text})
    job(folder, source="wordy.safetensors").run()
    assert Checkpoint(folder / "out" / "model.safetensors").metadata["comment"] == text


# ---- nothing at all


class Cancelled(Exception):
    pass


LAYERS = ["layers.0.attention.out", "layers.0.attention.qkv", "layers.0.feed_forward.w1"]


def test_progress_names_every_layer_in_order(folder):
    steps = []
    job(folder).run(steps.append)
    assert [step.layer for step in steps] == [*LAYERS, "verifying", *(f"verifying {name}" for name in LAYERS)]
    assert [step.index for step in steps[:3]] == [0, 1, 2] and {step.total for step in steps} == {3}
    assert steps[0].seconds_left is None and all(step.seconds_left >= 0 for step in steps[1:3])
    assert str(Step(3, 10, "a.b", 61.5)) == "3/10 a.b, 1:01 left"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", [*LAYERS, "verifying", f"verifying {LAYERS[2]}"])
def test_cancelling_anywhere_leaves_the_folder_as_it_was(folder, where, overwrite):
    if overwrite:
        (folder / "out" / "model.safetensors").write_bytes(b"old model")
        (folder / "out" / "model_lora.safetensors").write_bytes(b"old lora")
    work = job(folder, overwrite=overwrite)
    before = fingerprint(folder)

    def progress(step):
        if step.layer == where:
            assert len(fingerprint(folder)) == len(before) + 3  # the hidden halves and the journal are there
            raise Cancelled

    with pytest.raises(Cancelled):
        work.run(progress)
    assert fingerprint(folder) == before


def spoiled(name, value):
    def edit(weights):
        weights[f"{name}.weight"][5, 7] = value

    return edit


@pytest.mark.parametrize(("edit", "rules", "words"), [
    (spoiled(LAYERS[1], float("nan")), {},
     r"layers\.0\.attention\.qkv: 1 values are not finite, the first at \[5, 7\] is nan; .*source"),
    (spoiled(LAYERS[2], float("inf")), {"w1": "mxfp8"}, r"feed_forward\.w1: 1 values are not finite, .* is inf"),
    (spoiled(LAYERS[0], 1e8), {}, r"attention\.out: \d+ of 768 blocks of 16 would become zero .*; use mxfp8"),
    (None, {"out": "int8_convrot_256"},
     r"attention\.out: in_features 128 is not a multiple of the ConvRot group 256; use a smaller .*rule 1"),
    (None, {"nothing": "nvfp4"}, r"recipe mine quantizes none of its layers; choose a recipe for this model"),
    (lambda w: w.update({f"{LAYERS[0]}.weight": torch.ones(96, 128, dtype=torch.int8)}), {},
     r"attention\.out: weight is int8 \[96, 128\] without scales, Tessera cannot decode it; use the original"),
])  # fmt: skip
def test_what_cannot_be_quantized_is_named_and_nothing_is_written(folder, edit, rules, words):
    weights = block()
    if edit:
        edit(weights)
    save(folder / "bad.safetensors", weights)
    chosen, before = blocks_recipe(folder, **rules), fingerprint(folder)
    with pytest.raises(ValueError, match=rf"^bad\.safetensors: .*{words}"):
        job(folder, chosen, "bad.safetensors").run()
    assert fingerprint(folder) == before


@pytest.mark.parametrize(("target", "options", "words"), [
    ("out/taken.safetensors", {}, r"taken\.safetensors: already exists; choose another name"),
    ("out/a.safetensors", {"lora": "out/taken.safetensors"}, r"taken\.safetensors: already exists"),
    ("out/folder.safetensors", {"overwrite": True}, r"folder\.safetensors: is a folder; choose another name"),
    ("source.safetensors", {"overwrite": True}, r"source, target and LoRA must be different files; choose"),
    ("out/../source.safetensors", {"overwrite": True}, r"must be different files"),
    ("link.safetensors", {"overwrite": True}, r"must be different files"),
    ("out/a.safetensors", {"lora": "out/a.safetensors"}, r"must be different files"),
    ("out/a.safetensors", {"lora": "source.safetensors", "overwrite": True}, r"must be different files"),
    ("nowhere/a.safetensors", {}, r"nowhere: no such folder; create it or choose another"),
    ("out/a.gguf", {}, r"a\.gguf: name it \.safetensors"),
    ("out/a.safetensors", {"lora": "out/a.bin"}, r"a\.bin: name it \.safetensors"),
    ("out/a.safetensors", {"rank": -1}, r"rank -1: must be 0"),
    ("out/a.safetensors", {"device": "warp"}, r"device 'warp': .*; use cpu"),
])  # fmt: skip
def test_a_bad_target_is_refused_and_every_file_left_alone(folder, target, options, words):
    (folder / "out" / "taken.safetensors").write_bytes(b"mine")
    (folder / "out" / "folder.safetensors").mkdir()
    (folder / "link.safetensors").symlink_to(folder / "source.safetensors")
    chosen, before = blocks_recipe(folder), fingerprint(folder)
    if "lora" in options:
        options = options | {"lora": folder / options["lora"]}
    with pytest.raises(ValueError, match=words):
        Job(Checkpoint(folder / "source.safetensors"), folder / target, chosen, **options).run()
    assert fingerprint(folder) == before


def test_a_target_that_appears_meanwhile_is_not_replaced(folder):
    target = folder / "out" / "model.safetensors"

    def progress(step):
        if step.layer.startswith("verifying"):
            target.write_bytes(b"another program's")

    with pytest.raises(ValueError, match="already exists"):
        job(folder).run(progress)
    assert list(fingerprint(folder / "out")) == ["model.safetensors"] and target.read_bytes() == b"another program's"


def test_a_source_that_shrinks_while_being_read_is_noticed(folder):
    def progress(step):
        if step.index == 1:
            with open(folder / "source.safetensors", "r+b") as file:
                file.truncate(20_000)

    with pytest.raises(ValueError, match=r"source\.safetensors: .*file ends inside the tensor; it changed"):
        job(folder).run(progress)
    assert fingerprint(folder / "out") == {}


@contextlib.contextmanager
def disk_of(nbytes):
    """The largest file this process may write."""
    resource = pytest.importorskip("resource", reason="file size limits are POSIX's")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("nbytes", "file"), [(10_000, "model"), (150_000, "model_lora")])
def test_a_full_disk_is_said_and_nothing_is_left(folder, nbytes, file):
    save(folder / "wide.safetensors", {"layers.0.a.w.weight": noise(256, 256)})
    work = job(folder, recipe.find(recipe_file(folder / "r.toml", ("nvfp4", "**"))), "wide.safetensors", rank=128)
    with disk_of(nbytes), pytest.raises(ValueError, match=rf"{file}\.safetensors: needs .* GB .*; free some space"):
        work.run()
    assert fingerprint(folder / "out") == {}


@pytest.mark.parametrize(("file", "key"), [
    ("model", "layers.0.attention.qkv.weight"),
    ("model", "layers.0.attention.qkv.weight_scale"),
    ("model", "final.bias"),
    ("model_lora", "diffusion_model.layers.0.feed_forward.w1.lora_down.weight"),
])  # fmt: skip
def test_verification_catches_one_flipped_bit_in_the_closed_file(folder, monkeypatch, file, key):
    finish = Writer.finish

    def finish_on_a_bad_disk(writer, metadata):
        path = finish(writer, metadata)
        if writer.path.stem == file:
            with open(path, "r+b") as hidden:
                offset = read_header(path)[2][key]
                hidden.seek(offset)
                byte = hidden.read(1)[0]
                hidden.seek(offset)
                hidden.write(bytes([byte ^ 1]))
        return path

    monkeypatch.setattr(Writer, "finish", finish_on_a_bad_disk)
    with pytest.raises(RuntimeError, match=rf"{file}\.safetensors: .*reads back .*nothing was saved"):
        job(folder).run()
    assert fingerprint(folder / "out") == {}


def test_legacy_layers_that_a_recipe_keeps_are_refused(folder):
    weight = noise(64, 64).float()
    tensors = {f"layers.0.{n}.w.weight": weight.to(torch.float8_e4m3fn) for n in "ab"}
    tensors |= {f"layers.0.{n}.w.scale_weight": torch.ones(1) for n in "ab"}
    save(folder / "legacy.safetensors", tensors | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)})
    one, both = (recipe.find(recipe_file(folder / f"{p}.toml", ("mxfp8", f"**.{p}.w"))) for p in ("a", "{a,b}"))
    with pytest.raises(ValueError, match=r"legacy\.safetensors: layers\.0\.b\.w: is in the legacy scaled_fp8 layout"):
        job(folder, one, "legacy.safetensors")
    job(folder, both, "legacy.safetensors").run()
    assert set(Checkpoint(folder / "out" / "model.safetensors").layers) == {"layers.0.a.w", "layers.0.b.w"}


def test_codes_that_only_a_host_decodes_are_not_quantized_again(folder):
    tensors = {"a.w.weight": torch.ones(64, 32, dtype=torch.int8), "a.w.weight_scale": torch.ones(64)}
    tensors["a.w.comfy_quant"] = formats.marker({"format": "convrot_w4a4"})
    save(folder / "w4a4.safetensors", tensors)
    chosen = recipe.find(recipe_file(folder / "r.toml", ("int8_row", "**")))
    with pytest.raises(ValueError, match=r"w4a4\.safetensors: a\.w: format 'convrot_w4a4', Tessera cannot decode it"):
        job(folder, chosen, "w4a4.safetensors").run()
    assert fingerprint(folder / "out") == {}


def test_layers_are_worked_on_in_the_models_order():
    names = ["layers.10.a", "layers.2.a", "final", "layers.2.b"]
    assert sorted(names, key=natural) == ["final", "layers.2.a", "layers.2.b", "layers.10.a"]


@pytest.mark.parametrize(("tensors", "layer", "format", "why"), [
    ({"cap_embedder.1.weight": noise(64, 64)}, "cap_embedder.1", "nvfp4", "knows models by this shape"),
    (qwen(), "model.embed_tokens", "mxfp8", "looks embeddings up by row"),
])  # fmt: skip
def test_layers_only_our_loader_can_take_are_warned_about(tmp_path, tensors, layer, format, why):
    source = save(tmp_path / "source.safetensors", tensors)
    chosen = recipe.find(recipe_file(tmp_path / "r.toml", (format, layer)))
    assert any(w.startswith(f"{layer}: {format}") and why in w for w in
               Job(Checkpoint(source), tmp_path / "out.safetensors", chosen).warnings)  # fmt: skip
    int8 = recipe.find(recipe_file(tmp_path / "i.toml", ("int8_row", layer)))
    assert not any(why in w for w in Job(Checkpoint(source), tmp_path / "out.safetensors", int8).warnings)


# ---- with statistics


@pytest.fixture(scope="module", params=["correction", "absorb"])
def calibrated(request, tmp_path_factory):
    """(finished job, its report, the model, its LoRA or None) of a job with statistics for some of its layers."""
    folder = tmp_path_factory.mktemp(f"calibrated_{request.param}")
    killed.source(folder)
    work = killed.job(folder, request.param)
    report = work.run()
    return work, report, Checkpoint(work.target), Checkpoint(work.lora) if work.lora else None


def expected_layer(work, name):
    bias = work.source.read(f"{name}.bias").float() if f"{name}.bias" in work.source.tensors else None
    return pipeline.quantize(work.formats()[name], work.source.weight(name), work.settings,
                             pipeline.layer_seed(work.seed, name), work.calibration.of(name), bias)  # fmt: skip


def test_calibrated_layers_are_what_the_pipeline_computes(calibrated):
    work, report, model, lora = calibrated
    for row in report.layers:
        expected = expected_layer(work, row.name)
        for suffix, tensor in expected.entries.items():
            stored = model.read(f"{row.name}.{suffix}")
            assert same_bytes(stored, tensor.bfloat16() if suffix == "bias" else tensor), (row.name, suffix)
        for part in ("up", "down"):
            key = f"diffusion_model.{row.name}.lora_{part}.weight" if lora else f"{row.name}.absorb_{part}"
            assert torch.equal((lora or model).read(key), getattr(expected.branch, part))
        numbers = (expected.error, expected.corrected_error, expected.output_error, expected.corrected_output_error)
        assert (row.error, row.corrected_error, row.output_error, row.corrected_output_error) == numbers
        assert row.calibrated == (row.name in killed.CALIBRATED) == (row.output_error is not None)


def test_a_corrected_bias_takes_the_sources_place_and_the_loras_part_of_it_is_diff_b(calibrated):
    work, _, model, lora = calibrated
    biased = [name for name in killed.LAYERS if f"{name}.bias" in work.source.tensors]
    for name in biased:
        changed = not torch.equal(model.read(f"{name}.bias"), work.source.read(f"{name}.bias"))
        assert changed == (name in killed.CALIBRATED) and model.read(f"{name}.bias").dtype == torch.bfloat16
    if lora:
        parts = {key for key in lora.tensors if key.endswith(".diff_b")}
        assert parts == {f"diffusion_model.{name}.diff_b" for name in biased if name in killed.CALIBRATED}
        assert all(lora.tensors[key] == TensorSpec(torch.float32, (killed.OUT,)) for key in parts)


def test_an_absorb_file_says_so_and_its_branches_are_part_of_its_weights(tmp_path, calibrated):
    work, report, model, lora = calibrated
    provenance = json.loads(model.metadata["tessera"])
    assert provenance["mode"] == work.settings.mode == report.mode
    assert provenance["calibration"] == work.calibration.digest()
    assert (lora is None) == (report.lora is None) == ("tessera_warning" in model.metadata) == (report.mode == "absorb")
    if report.mode == "absorb":
        assert "Only Tessera's Diffusion Model Loader" in model.metadata["tessera_warning"]
        for row in report.layers:
            weight = work.source.weight(row.name)
            errors = [float((model.weight(row.name, absorbed=part) - weight).norm() / weight.norm()) for part in (0, 1)]
            assert errors == pytest.approx([row.error, row.corrected_error], rel=1e-4) and errors[0] > 2 * errors[1]


def test_the_same_calibrated_job_again_takes_the_files_that_are_there(calibrated):
    work, report, *_ = calibrated
    folder = work.target.parent.parent
    before = fingerprint(folder)
    again = killed.job(folder, work.settings.mode).run()
    assert fingerprint(folder) == before and "nothing was written" in again.warnings[-1]
    for mine, theirs in zip(again.layers, report.layers, strict=True):
        same = ("name", "format", "nbytes", "rank", "calibrated")
        assert [getattr(mine, field) for field in same] == [getattr(theirs, field) for field in same]
        for field in ("error", "corrected_error", "output_error", "corrected_output_error"):
            assert getattr(mine, field) == pytest.approx(getattr(theirs, field), abs=1e-6)
    with pytest.raises(ValueError, match="already exists"):
        killed.job(folder, work.settings.mode, calibrated=False).run()


def test_report_shows_output_errors_and_what_was_not_calibrated(calibrated):
    report = calibrated[1]
    text = report.markdown()
    assert "calibrated: 1 of 8 layers" in text and "mean output error: 0." in text
    assert "no statistics for 7 of 8 layers" in text
    words = "with branch" if report.mode == "absorb" else "with correction"
    header = next(line for line in text.splitlines() if line.startswith("| layer "))
    assert header == f"| layer | format | MB | weight error | {words} | output error | {words} | s |"


def test_remarks_about_layers_are_said_once_with_how_many_they_are_about():
    rows = [LayerReport(f"l{n}", "nvfp4", (1, 1), 1, 0.1, notes=("odd",) if n < 3 else ()) for n in range(5)]
    rows[4].notes = ("alone",)
    report = Report("m", None, "s", "r", 0, 0, rows)
    assert report.remarks() == ["3 layers (first: l0): odd", "l4: alone"]


def test_mean_with_correction_counts_layers_without_one_as_they_are():
    rows = [LayerReport("a", "nvfp4", (1, 1), 1, 0.2, 0.1), LayerReport("b", "mxfp8", (1, 1), 1, 0.04)]
    assert "mean weight error: 0.1200, with correction 0.0700" in Report("m", "l", "s", "r", 8, 0, rows).summary()


def test_statistics_of_another_model_are_refused(tmp_path):
    killed.source(tmp_path)
    other = Checkpoint(save(tmp_path / "other.safetensors", {f"{name}.weight": noise(8, 64) for name in killed.LAYERS}))
    chosen = recipe.find(tmp_path / "mine.toml")
    with pytest.raises(
        ValueError, match=r"other\.safetensors: statistics of another model \(.*; record them with this"
    ):
        Job(other, tmp_path / "new.safetensors", chosen,
            calibration=killed.statistics(Checkpoint(tmp_path / "source.safetensors")))  # fmt: skip


@pytest.mark.parametrize("mode", ["correction", "absorb"])
def test_a_layers_own_rank_counts_and_rank_zero_has_no_branch(folder, mode):
    path = folder / "ranks.toml"
    path.write_text(
        '[[rule]]\nnvfp4 = ["**.qkv"]\nrank = 3\nreason = "a"\n[[rule]]\nnvfp4 = ["**.out"]\nrank = 0\nreason = "b"\n'
        '[[rule]]\nint8_row = ["**.w1"]\nreason = "c"\n'
    )
    work = Job(Checkpoint(folder / "source.safetensors"), folder / "out" / "absorb.safetensors", recipe.find(path),
               settings=Settings(rank=5, mode=mode))  # fmt: skip
    report = work.run()
    assert {row.name.rpartition(".")[2]: row.rank for row in report.layers} == {"qkv": 3, "out": 0, "w1": 5}
    assert [row.corrected_error is None for row in report.layers] == [row.rank == 0 for row in report.layers]
    file = Checkpoint(work.lora or work.target)
    ranks = {key: min(spec.shape) for key, spec in file.tensors.items() if "lora_" in key or "absorb_" in key}
    assert sorted(ranks.values()) == [3, 3, 5, 5]


def test_seconds_left_follow_what_layers_of_each_kind_took():
    costs = {f"{kind}{n}": Cost(kind, 2.0) for kind in "ab" for n in range(3)}
    estimate = Estimate(costs)
    assert estimate.seconds_left() is None and estimate.share() == 0
    estimate.done("a0", 4.0)
    assert estimate.seconds_left() == 5 * 4.0  # b as much off as a, until measured
    estimate.done("b0", 1.0)
    assert estimate.seconds_left() == 2 * 4.0 + 2 * 1.0 and estimate.share() == pytest.approx(5 / 15)
    estimate.width = 2
    assert estimate.seconds_left() == 5.0
