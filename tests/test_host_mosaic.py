"""Inside the real ComfyUI: maps of what is loaded, what ran and what is planned; edits move without measuring again."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import comfy_host
import small_clip
from absorbing import absorb
from comfy_host import node, record, sample
from host_server import HostError, HostServer
from tessera.checkpoint import Checkpoint

pytestmark = pytest.mark.host
LAYER = "layers.1.feed_forward.w1"
EDITED = "layers.1.attention.qkv"


def load(name, kind="TesseraDiffusionModelLoader", **inputs):
    return node(kind).execute(name, **inputs)


def shown(made):
    """layer -> its columns in words, of a node's map; and the whole."""
    [payload] = made.ui["tessera_map"]
    json.dumps(payload, allow_nan=False)
    words = {"format": "formats", "kernel": "kernels", "reason": "reasons", "kept": "formats", "planned": "formats"}
    layers = payload["layers"]
    found = {}
    for index, name in enumerate(layers["name"]):
        row = {column: values[index] for column, values in layers.items()}
        for column, table in words.items():
            if column in row:
                row[column] = payload[table][row[column]] if row[column] >= 0 else ""
        if row["ran"] is not None:
            row["ran"] = {payload["kernels"][kernel]: calls for kernel, calls in row["ran"]}
        found[name] = row
    return found, payload


@pytest.fixture(scope="module")
def errors(models, tiny):
    return json.loads(Checkpoint(models / "diffusion_models" / tiny["model"]).metadata["tessera_layers"])


# ---- loaders


def test_a_loaders_map_says_format_plan_and_what_each_layer_cost(tiny, errors):
    rows, payload = shown(load(tiny["model"]))
    assert payload["kind"] == "loaded" and payload["title"] == tiny["model"] and "file" in dict(payload["facts"])
    quantized = {name: row for name, row in rows.items() if row["format"] not in ("bf16", "keep")}
    assert len(quantized) == 28 and len(rows) > 40 and all(row["ran"] is None for row in rows.values())
    for name, row in quantized.items():
        assert row["error"] == pytest.approx(errors[name][0], rel=1e-3) and row["corrected"] is None
        assert row["kept"] == "int8_convrot_256" and row["path"] == "transcode" and row["kernel"] and row["added"] > 0
    assert rows[LAYER]["format"] == "nvfp4" and "x_embedder" in rows and rows["x_embedder"]["error"] is None


def test_a_file_that_is_not_quantized_has_a_map_too(tiny):
    rows, payload = shown(load(tiny["bf16"]))
    assert payload["formats"] == ["bf16"] and LAYER in rows and dict(payload["facts"]).get("weight error") is None


def test_a_text_encoders_map_names_its_layers_as_its_file_does(models):
    plain = small_clip.save(models / "text_encoders" / "map_bf16.safetensors")
    path = small_clip.quantize(plain, models / "text_encoders" / "map_nvfp4.safetensors", "nvfp4")
    import comfy.sd

    from tessera import host

    clip = host.load_clip(str(path), comfy.sd.CLIPType.LUMINA2, dict(small_clip.OPTIONS))
    rows = {tile.name: tile for tile in host.loaded_map(clip.patcher).tiles}
    assert set(small_clip.NAMES) <= set(rows)
    assert all(rows[name].format == "nvfp4" and rows[name].error > 0 for name in small_clip.NAMES)
    found = node("TesseraInspect").execute(clip=clip)
    assert shown(found)[0][small_clip.NAMES[0]]["ran"] == {}


def test_a_file_that_has_gone_since_leaves_a_map_without_errors(models, tiny):
    path = models / "diffusion_models" / "gone.safetensors"
    shutil.copy(models / "diffusion_models" / tiny["model"], path)
    model = load(path.name).args[0]
    path.unlink()
    rows, payload = shown(node("TesseraInspect").execute(model))
    assert payload["title"] == "gone.safetensors" and rows[LAYER]["error"] is None and rows[LAYER]["path"]


# ---- Inspect


def test_inspect_shows_the_kernels_that_ran_and_the_correction_beside_them(tiny, errors):
    corrected = node("TesseraCorrectionLoRA").execute(load(tiny["model"]).args[0], tiny["lora"], 1.0).args[0]
    rows, _ = shown(node("TesseraInspect").execute(corrected))
    assert all(row["ran"] == {} for row in rows.values() if row["kernel"])
    sample(corrected, steps=3)
    made = node("TesseraInspect").execute(corrected, after="latent", color="kernel")
    rows, payload = shown(made)
    ran = [row for row in rows.values() if row["kernel"]]
    assert len(ran) == 28 and all(sum(row["ran"].values()) >= 3 for row in ran)
    assert rows[LAYER]["strength"] == 1.0 and rows[LAYER]["rank"] == 32
    assert rows[LAYER]["corrected"] == pytest.approx(errors[LAYER][1], rel=1e-3) and payload["kind"] == "inspected"
    picture = made.args[1]
    assert picture.shape[0] == 1 and tuple(picture.shape[2:]) == (1200, 3) and 0 <= picture.min() <= picture.max() <= 1
    half = node("TesseraCorrectionLoRA").execute(load(tiny["model"]).args[0], tiny["lora"], 0.5).args[0]
    rows, _ = shown(node("TesseraInspect").execute(half))
    assert rows[LAYER]["strength"] == 0.5 and rows[LAYER]["corrected"] is None  # nobody has measured that


def test_an_absorb_files_layers_count_with_their_own_branch(models):
    absorb(comfy_host.TINY, models / "diffusion_models" / "map_absorb.safetensors", {LAYER: "nvfp4"})
    rows, _ = shown(load("map_absorb.safetensors"))
    assert rows[LAYER]["strength"] == 1.0 and rows[LAYER]["rank"] > 0


def test_inspect_looks_into_a_file_without_loading_it(tiny, errors, monkeypatch):
    import comfy.sd

    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", None)
    made = node("TesseraInspect").execute(file=f"diffusion_models/{tiny['model']}", color="error")
    rows, payload = shown(made)
    assert payload["kind"] == "file" and rows[LAYER]["error"] == pytest.approx(errors[LAYER][0], rel=1e-3)
    assert f"| {LAYER} | nvfp4 | " in made.args[0] and "bits per weight" in made.ui["text"][0]
    assert made.args[1].shape[2] == 1200


def test_inspect_needs_one_thing_to_look_at(tiny):
    with pytest.raises(ValueError, match="nothing is connected to model or clip"):
        node("TesseraInspect").execute()
    model = load(tiny["bf16"]).args[0]
    with pytest.raises(ValueError, match="model and clip are both connected"):
        node("TesseraInspect").execute(model=model, clip=model)


def test_layers_of_another_loader_are_shown_without_a_plan(tiny, errors):
    import nodes

    stock = nodes.UNETLoader().load_unet(tiny["model"], "default")[0]
    rows, _ = shown(node("TesseraInspect").execute(stock))
    assert rows[LAYER]["format"] == "nvfp4" and rows[LAYER]["reason"] == "from another loader"
    assert rows[LAYER]["error"] == pytest.approx(errors[LAYER][0], rel=1e-3) and rows[LAYER]["kernel"] == ""


# ---- Plan


@pytest.fixture(scope="module")
def planned(models):
    """(a plan of the tiny model as a function of target and edits, its calls so far)."""
    shutil.copy(comfy_host.TINY, models / "diffusion_models" / "tiny_to_map.safetensors")
    model = load("tiny_to_map.safetensors").args[0]
    recorded, calls = record(model, comfy_host.CALIBRATION_PAIRS[:1]), []
    handle = model.model.diffusion_model.register_forward_hook(lambda *_: calls.append(1))

    def plan(target=0.0083, edits="", recorded=recorded, **inputs):
        inputs = {"mxfp8": False, "ranks": "0", "calls": 1, "minutes": 0.01} | inputs
        return node("TesseraPlan").execute(model, target, recorded, edits=edits, name="map", **inputs)

    yield plan, calls
    handle.remove()


def test_edits_and_targets_move_without_measuring_again(planned):
    plan, calls = planned
    first = plan()
    measured = len(calls)
    assert measured > 0
    rows, payload = shown(first)
    was = rows[EDITED]["format"]
    now = "int8_convrot_256" if was != "int8_convrot_256" else "keep"
    edited = plan(edits=f"{EDITED} = {now}  # mine")
    smaller = plan(target=0.0079)
    assert len(calls) == measured
    after, changed = shown(edited)
    assert after[EDITED]["format"] == now and after[EDITED]["edited"] == 1 and after[EDITED]["planned"] == was
    assert all(row["format"] == rows[name]["format"] for name, row in after.items() if name != EDITED)
    assert changed["edits"] == f"{EDITED} = {now}  # mine" and "edited by hand" in edited.args[1]
    chosen = edited.args[0].resolve(Checkpoint(comfy_host.TINY).shapes())[EDITED]
    assert "edited by hand" in chosen.reason and (chosen.format.label if chosen.format else "keep") == now
    assert shown(smaller)[1]["facts"] != payload["facts"]
    assert tuple(edited.args[3].shape[2:]) == (1200, 3)
    without = plan(target=0.0075, recorded=None, int8_convrot=False)
    assert set(shown(without)[1]["formats"]) == {"keep", "nvfp4"} and len(calls) == measured  # nothing to put to it
    plan()
    assert len(calls) > measured  # one survey is kept, and that was another


def test_a_mistake_in_edits_is_told_before_anything_is_measured(planned):
    plan, calls = planned
    measured = len(calls)
    with pytest.raises(ValueError, match=r"edits, line 1 \(layers nvfp4\): write PATTERN = FORMAT"):
        plan(edits="layers nvfp4", ranks="0, 4")
    with pytest.raises(ValueError, match="give a target size or a target error"):
        plan(target=0.0, edits=f"{EDITED} = keep")
    assert len(calls) == measured


def test_a_survey_that_is_kept_holds_no_model(models):
    shutil.copy(comfy_host.TINY, models / "diffusion_models" / "tiny_to_map.safetensors")
    model = load("tiny_to_map.safetensors").args[0]
    node("TesseraPlan").execute(model, 0.0083, name="held", mxfp8=False, ranks="0")
    patcher, inner = weakref.ref(model), weakref.ref(model.model)
    del model
    gc.collect()
    assert patcher() is None and inner() is None


# ---- over HTTP, in API format, as without a browser


@pytest.fixture(scope="module")
def server(models, tiny):
    with HostServer({"tiny": Path(__file__).parent / "tiny" / "node_pack"}, cpu=True) as host:
        for folder in ("diffusion_models", "loras", "text_encoders"):
            host.models(folder)
        shutil.copy(models / "diffusion_models" / tiny["model"], host.models("diffusion_models"))
        yield host


def test_a_workflow_saves_maps_of_a_file_and_of_a_loaded_model(server, tiny):
    def step(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    entry = server.run({
        "file": step("TesseraInspect", file=f"diffusion_models/{tiny['model']}", color="error"),
        "save": step("SaveImage", images=["file", 1], filename_prefix="file"),
        "load": step("TesseraDiffusionModelLoader", unet_name=tiny["model"], weight_dtype="default"),
        "model": step("TesseraInspect", model=["load", 0], color="kernel"),
        "keep": step("SaveImage", images=["model", 1], filename_prefix="model"),
    })  # fmt: skip
    sizes = [Image.open(path).size for path in server.files(entry)]
    assert len(sizes) == 2 and all(width == 1200 and height > 300 for width, height in sizes)
    kinds = {name: output["tessera_map"][0]["kind"] for name, output in entry["outputs"].items()
             if "tessera_map" in output}  # fmt: skip
    assert kinds == {"file": "file", "load": "loaded", "model": "inspected"}
    [error] = [np.asarray(Image.open(path)) for path in server.files(entry) if path.name.startswith("file")]
    assert len(np.unique(error.reshape(-1, 3), axis=0)) > 20
    with pytest.raises(HostError) as failed:
        server.run({"none": step("TesseraInspect")})
    assert "nothing is connected to model or clip" in str(failed.value)
