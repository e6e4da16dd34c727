"""In the real ComfyUI: pictures and latents compared, a correction swept over its strengths in one run."""

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from browser import TESTS, example, for_tiny
from comfy_host import TINY, node, picture, sample
from frontend_workflow import api_format
from host_server import HostError, HostServer

pytestmark = pytest.mark.host
LAYER = "diffusion_model.layers.0.feed_forward.w1"


def load(name):
    return node("TesseraDiffusionModelLoader").execute(name).args[0]


def correct(model, lora, strength):
    return node("TesseraCorrectionLoRA").execute(model, lora, strength).args[0]


def sweep(model, lora, strengths):
    return node("TesseraStrengthSweep").execute(model, strengths, lora).args


# One set of weights


def test_each_model_of_a_sweep_is_the_correction_at_its_strength(tiny):
    model = load(tiny["model"])
    swept, strengths = sweep(model, tiny["lora"], "1, 0, 0.5")
    assert strengths == [1, 0, 0.5]
    for each, strength in zip(swept, strengths, strict=True):
        assert torch.equal(sample(each, steps=1), sample(correct(model, tiny["lora"], strength), steps=1))
    assert torch.equal(sample(swept[1], steps=1), sample(model, steps=1))


def test_a_sweep_reads_its_file_once_and_loads_nothing_between_strengths(tiny, monkeypatch):
    import comfy.model_patcher
    import comfy.utils

    from tessera import lora

    model, reads = load(tiny["model"]), []
    whole = lora.read_adapters
    monkeypatch.setattr(lora, "read_adapters", lambda path, *rest: reads.append(path) or whole(path, *rest))
    swept, _ = sweep(model, tiny["lora"], "0..1.5 step 0.5")
    assert len(reads) == 1
    factors = {id(side.model) for each in swept for side in each.get_nested_additional_models()}
    assert len(factors) == 1 and {id(each.model) for each in swept} == {id(model.model)}
    weight = model.model.get_submodule(LAYER).weight
    before = weight._qdata.data_ptr(), weight._qdata.clone()
    sample(swept[1], steps=1)  # brings the factors to the device
    monkeypatch.setattr(comfy.utils, "load_torch_file", lambda *_, **__: pytest.fail("read a file"))
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", lambda *_, **__: pytest.fail("loaded a model"))
    found = [sample(each, steps=2) for each in swept[1:]]
    assert not any(torch.equal(found[0], other) for other in found[1:])
    now = model.model.get_submodule(LAYER).weight
    assert now._qdata.data_ptr() == before[0] and torch.equal(now._qdata, before[1])


@pytest.mark.parametrize(("text", "said"), [("0, x", "'x' is not a number"), ("", "there is none")])
def test_strengths_that_are_none_are_refused_before_the_run(models, text, said):
    assert said in node("TesseraStrengthSweep").validate_inputs(strengths=text)


def test_what_no_correction_was_made_for_is_not_swept(tiny):
    with pytest.raises(ValueError, match="no correction LoRA was made"):
        sweep(load(tiny["model"]), "", "0, 1")


# Compared


def compare(a, b, **labels):
    return node("TesseraCompare").execute(a, b, **labels)


def test_the_correction_is_nearer_to_the_original_by_every_number(tiny):
    reference, model = sample(load(tiny["bf16"])), load(tiny["model"])
    plain, corrected = (sample(correct(model, tiny["lora"], strength)) for strength in (0, 1))
    for make in (lambda latent: {"samples": latent}, lambda latent: picture(latent)[None]):
        far, near = (compare(make(reference), make(other)).args for other in (plain, corrected))
        assert near[3] > far[3] and near[4] > far[4] and near[5] < far[5] and near[6] > far[6]


def test_equal_pictures_are_called_identical(models):
    a = torch.rand(2, 64, 80, 3)
    output = compare(a, a, label_a="first", label_b="again")
    report, heat, beside, *numbers = output.args
    assert report.startswith("**again** against **first**") and report.count("| identical |") == 3
    assert numbers == [math.inf, 1.0, 0.0, 1.0] or numbers == pytest.approx([math.inf, 1.0, 0.0, 1.0])
    assert heat.shape[0] == beside.shape[0] == 2 and heat.dtype == torch.float32
    assert output.ui["text"] == [report] and len(output.ui["images"]) == 2


def test_what_cannot_be_compared_is_refused_naming_both(models):
    a, latent = torch.zeros(1, 64, 64, 3), {"samples": torch.zeros(1, 16, 8, 8)}
    with pytest.raises(ValueError, match="a is an image, b is a latent"):
        compare(a, latent)
    with pytest.raises(ValueError, match="original is 64 x 64, 3 channels, quantized is 32 x 64, 3 channels"):
        compare(a, a[:, :, :32], label_a="original", label_b="quantized")


# The example


@pytest.fixture(scope="module")
def server(tiny, models):
    """A host with the files that the example names: the tiny model, quantized, and its correction."""
    with HostServer({"tiny": TESTS / "tiny" / "node_pack"}, cpu=True) as host:
        for folder in ("text_encoders", "vae"):
            host.models(folder)
        shutil.copy(TINY, host.models("diffusion_models") / "z_image_turbo_bf16.safetensors")
        for folder, name, target in (("diffusion_models", tiny["model"], ""), ("loras", tiny["lora"], "_lora")):
            shutil.copy(models / folder / name, host.models(folder) / f"z_image_turbo_nvfp4{target}.safetensors")
        yield host


def swept_example(host, compared=False):
    """(the example for the tiny model in API format, ids by type)."""
    workflow = for_tiny(example("tessera_strength_sweep"), steps=2)
    prompt = api_format(workflow, host.object_info())
    ids = {entry["class_type"]: id for id, entry in prompt.items()}
    if compared:
        images, reference = (prompt[ids["TesseraSweepGrid"]]["inputs"][name] for name in ("images", "reference_image"))
        prompt["compare"] = {"class_type": "TesseraCompare", "inputs": {"a": reference, "b": images}}
    return prompt, ids


def test_the_example_sweeps_in_one_run(server):
    prompt, ids = swept_example(server, compared=True)
    since = len(server.events)
    outputs = server.run(prompt)["outputs"]
    report = outputs[ids["TesseraSweepGrid"]]["text"][0]
    rows = [row for row in report.splitlines() if row.startswith("| ")][1:]
    assert [row.split()[1].strip("*,") for row in rows] == ["0", "0.5", "1", "1.5"]
    assert report.startswith("best strength ") and "; at 0 latent error" in report
    shown = server.files({"outputs": {"": outputs[ids["TesseraSweepGrid"]]}})
    with Image.open(shown[0]) as grid, Image.open(shown[1]) as curve:
        assert curve.size == (960, 540)
        assert grid.width > 3 * 256 and grid.height > 2 * 256  # three columns: the reference, then the strengths
        assert (np.asarray(grid) == (0, 0x9E, 0x73)).all(-1).sum() > 1000  # the frame
    assert len(outputs["compare"]["text"]) == 4 and len(outputs["compare"]["images"]) == 4
    sampled = [e["data"]["node"] for e in server.events[since:] if e["type"] == "executing" and e["data"]["node"]]
    assert len([id for id in sampled if prompt[id]["class_type"] == "KSampler"]) == 2
    assert server.progress_texts(ids["TesseraStrengthSweep"], since) == [
        "4 strengths; corrects 28 layers, 28 of 28 quantized ones"
    ]


def test_the_example_without_its_original_shows_the_grid(server):
    prompt, ids = swept_example(server)
    grid = prompt[ids["TesseraSweepGrid"]]["inputs"]
    for name in ("reference_image", "reference_latent"):
        del grid[name]
    report = server.run(prompt)["outputs"][ids["TesseraSweepGrid"]]["text"][0]
    assert report.startswith("4 strengths; no reference is connected")


def test_a_sweep_of_no_numbers_is_refused_before_it_runs(server):
    prompt, ids = swept_example(server)
    prompt[ids["TesseraStrengthSweep"]]["inputs"]["strengths"] = "0..much"
    with pytest.raises(HostError, match="'much' is not a number; write them as") as error:
        server.run(prompt)
    assert error.value.kind == "refused"
