"""Whole workflows through ComfyUI's HTTP API: what a user gets who opens the browser and presses Run."""

import copy
import json
import os
import re
import shutil
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from frontend_workflow import api_format, official, widgets
from host_server import HostError, HostServer

pytestmark = pytest.mark.host

TESTS = Path(__file__).resolve().parent
TINY = TESTS / "tiny" / "tiny_zimage_bf16.safetensors"
EXAMPLES = sorted((TESTS.parent / "example_workflows").glob("*.json"))
PROMPT = "big red star center on white plain"


@pytest.fixture(scope="module")
def host():
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: run scripts/test, or scripts/setup_host.py")
    with HostServer({"tiny": TESTS / "tiny" / "node_pack"}, cpu=True) as server:
        for folder in ("text_encoders", "vae", "loras"):
            server.models(folder)
        shutil.copy(TINY, server.models("diffusion_models") / "tiny.safetensors")
        yield server


# Building workflows


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def quantize(filename, source="tiny.safetensors", **inputs):
    inputs = {"recipe": "z_image_nvfp4", "rank": 32} | inputs
    return node("TesseraQuantize", source=f"diffusion_models/{source}", filename=filename, **inputs)


def sampling(model, seed=5):
    """From a MODEL to a saved picture with the tiny model; nodes prompt, latent, sample, decode, save."""
    sampler = {"seed": seed, "steps": 8, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {
        "prompt": node("TinyPrompt", text=PROMPT),
        "latent": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "sample": node("KSampler", model=model, positive=["prompt", 0], negative=["prompt", 0],
                       latent_image=["latent", 0], **sampler),
        "decode": node("TinyDecode", samples=["sample", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="test"),
    }  # fmt: skip


def whole(strength, filename="whole", **inputs):
    """Quantize, load, correct, sample: one graph."""
    return {
        "quantize": quantize(filename, **inputs),
        "load": node("TesseraDiffusionModelLoader", unet_name=["quantize", 0], weight_dtype="default"),
        "correct": node("TesseraCorrectionLoRA", model=["load", 0], lora_name=["quantize", 1], strength=strength),
        **sampling(["correct", 0]),
    }


def using(model, lora, strength=1.0):
    return {
        "load": node("TesseraDiffusionModelLoader", unet_name=model, weight_dtype="default"),
        "correct": node("TesseraCorrectionLoRA", model=["load", 0], lora_name=lora, strength=strength),
        **sampling(["correct", 0]),
    }


def picture(host, entry):
    (path,) = host.files(entry)
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def model_files(host):
    return {path: path.stat().st_size for path in (host.base / "models").rglob("*") if path.is_file()}


def executed(events):
    return [e["data"]["node"] for e in events if e["type"] == "executing" and e["data"]["node"]]


@pytest.fixture(scope="module")
def first(host):
    """The whole graph at strength 1, in a host that has done nothing before: (history entry, its events)."""
    since = len(host.events)
    entry = host.run(whole(1.0))
    return entry, host.events[since:]


# The main job


def test_one_graph_quantizes_loads_corrects_and_samples(host, first):
    pixels = picture(host, first[0])
    assert pixels.shape == (256, 256, 3)
    assert pixels.std() > 20
    files = {path.name for path in model_files(host)}
    assert {"whole.safetensors", "whole_lora.safetensors"} <= files


def test_report_is_shown_in_the_node(host, first):
    outputs = first[0]["outputs"]["quantize"]
    assert outputs["text"][0].startswith("- whole.safetensors: ")
    assert outputs["tessera_report"][0]["counts"] == {"mxfp8": 15, "nvfp4": 13}


def test_progress_names_the_layer_and_the_time_left(host, first):
    events = [e["data"] for e in first[1]]
    jobs = [e["data"] for e in first[1] if e["type"] == "tessera.job"]
    named = {job["index"]: job for job in jobs if job["layer"] and not job["verifying"]}
    start = named[0]
    assert (start["layer"], start["format"], start["total"]) == ("context_refiner.0.attention.qkv", "mxfp8", 28)
    assert named[27]["layer"] == "noise_refiner.1.feed_forward.w1" and named[27]["seconds_left"] >= 0
    assert named[27]["last"]["name"].startswith("noise_refiner") and named[27]["last"]["error"] > 0
    bars = [d["nodes"]["quantize"] for d in events if "quantize" in d.get("nodes", {})]
    values = [bar["value"] for bar in bars if bar["max"] == 1000]
    assert len(values) > 1 and max(values) == 1000 and values == sorted(values)


def test_strength_runs_again_only_from_the_correction_on(host, first):
    since = len(host.events)
    entry = host.run(whole(0.5))
    events = host.events[since:]
    cached = next(e["data"]["nodes"] for e in events if e["type"] == "execution_cached")
    assert {"quantize", "load", "prompt", "latent"} == set(cached)
    assert executed(events) == ["correct", "sample", "decode", "save"]
    assert (picture(host, entry) != picture(host, first[0])).any()


def test_log_has_one_plan_line_per_format_and_load(host, first):
    lines = [line for line in host.log.splitlines() if "Tessera: whole.safetensors:" in line]
    assert len(lines) == 3 and sum("transcoded 28 layers: weights moved by at most" in line for line in lines) == 1
    for counted in ("15 mxfp8", "13 nvfp4"):
        assert any(f"{counted}: transcode to int8_convrot_256" in line for line in lines)
    said = set(host.progress_texts("load"))
    assert len(said) == 1 and re.fullmatch(r"28 layers transcoded, at most \d[.\d]* % moved", said.pop())
    assert "IMPORT FAILED" not in host.log


def test_correction_beside_the_checkpoint_is_the_one_by_name(host, first):
    named = picture(host, host.run(using("whole.safetensors", "whole_lora.safetensors")))
    beside = picture(host, host.run(using("whole.safetensors", "(beside the checkpoint)")))
    assert (named == beside).all() and (named == picture(host, first[0])).all()


def test_quantizing_a_loaded_model_gives_the_same_layers(host, first):
    source = node("UNETLoader", unet_name="tiny.safetensors", weight_dtype="default")
    host.run({"load": source, "quantize": quantize("from_model", model=["load", 0])})
    folder = host.models("diffusion_models")
    from_file, from_model = (load_file(folder / f"{name}.safetensors") for name in ("whole", "from_model"))
    layers = [key.removesuffix("comfy_quant") for key in from_file if key.endswith(".comfy_quant")]
    assert len(layers) == 28
    assert from_file.keys() == from_model.keys()
    for key in from_file:
        if key.startswith(tuple(layers)):
            assert _bytes(from_file[key]) == _bytes(from_model[key]), key
    loras = host.models("loras")
    expected, found = (load_file(loras / f"{name}_lora.safetensors") for name in ("whole", "from_model"))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def _bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_model_in_a_subfolder_can_be_linked_to_the_loader(host):
    pixels = picture(host, host.run(whole(1.0, filename="below/nested")))
    assert pixels.std() > 20
    assert (host.models("diffusion_models") / "below" / "nested.safetensors").is_file()


# When it does not go well


def test_cancel_leaves_no_file(host):
    wide = {f"layers.{i}.feed_forward.w2.weight": torch.randn(1024, 2816).bfloat16() for i in range(12)}
    save_file(wide, host.models("diffusion_models") / "wide.safetensors")
    before, since = model_files(host), len(host.events)
    prompt = host.queue({"quantize": quantize("cancelled", source="wide.safetensors")})
    host.wait_event("tessera.job", since=since, node="quantize", total=12)
    host.interrupt()
    with pytest.raises(HostError, match="interrupted") as error:
        host.wait(prompt)
    assert error.value.kind == "execution_interrupted"
    jobs = [event["data"] for event in host.events[since:] if event["type"] == "tessera.job"]
    assert jobs[-1]["state"] == "cancelled" and not any(job["index"] == 11 for job in jobs)
    assert model_files(host) == before


def broken_source(path, how):
    if how == "truncated":
        path.write_bytes(TINY.read_bytes()[:-1000])
        return
    tensors = load_file(TINY)
    tensors["layers.1.feed_forward.w2.weight"][3, 4] = float("nan")
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("how", "message"),
    [("truncated", r"truncated\.safetensors: .*"), ("nan", r"nan\.safetensors: layers\.1\.feed_forward\.w2: .*")],
)
def test_bad_source_is_refused_by_file_and_layer(host, how, message):
    broken_source(host.models("diffusion_models") / f"{how}.safetensors", how)
    before = model_files(host)
    with pytest.raises(HostError, match=rf"node quantize \(TesseraQuantize\): ValueError: {message}") as error:
        host.run({"quantize": quantize(f"from_{how}", source=f"{how}.safetensors")})
    assert error.value.kind == "execution_error"
    assert model_files(host) == before


def test_existing_file_is_not_overwritten(host, first):
    before = (host.models("diffusion_models") / "whole.safetensors").read_bytes()
    with pytest.raises(HostError, match=r"whole\.safetensors: already exists"):
        host.run({"quantize": quantize("whole", rank=16)})
    assert (host.models("diffusion_models") / "whole.safetensors").read_bytes() == before


@pytest.mark.parametrize("shape", [None, (3840, 32, 3840)], ids=["other names", "other shapes"])
def test_lora_of_another_model_is_refused(host, first, shape):
    name = "diffusion_model.double_blocks.3.mlp" if shape is None else "diffusion_model.layers.0.attention.out"
    out, rank, into = shape or (64, 4, 64)
    path = host.models("loras") / f"other_{out}.safetensors"
    up, down = torch.ones(out, rank), torch.ones(rank, into)
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, path)
    with pytest.raises(HostError, match=rf"node correct \(TesseraCorrectionLoRA\): ValueError: {path.name}: ") as error:
        host.run(using("whole.safetensors", path.name))
    assert error.value.kind == "execution_error"


def test_two_clients_get_what_each_asked_for(host, first):
    body = {"prompt": using("whole.safetensors", "whole_lora.safetensors"), "client_id": uuid.uuid4().hex}
    mine = host.queue({"quantize": quantize("for_me")})
    theirs = host.post("/prompt", body)["prompt_id"]
    assert host.wait(mine)["outputs"]["quantize"]["tessera_report"][0]["model"] == "for_me.safetensors"
    while not (entry := host.get(f"/history/{theirs}").get(theirs)):
        time.sleep(0.05)
    assert entry["status"]["status_str"] == "success"
    assert (picture(host, entry) == picture(host, first[0])).all()


# In place of core's loaders


@pytest.mark.parametrize("kind", ["DiffusionModelLoader", "CLIPLoader"])
def test_loader_has_the_inputs_of_cores(host, kind):
    core = host.object_info(kind.replace("DiffusionModel", "UNET"))
    ours = host.object_info(f"Tessera{kind}")
    assert ours["output"] == core["output"]
    assert ours["input_order"]["required"] == core["input_order"]["required"]
    optional = core["input_order"].get("optional", [])
    assert ours["input_order"].get("optional", [])[: len(optional)] == optional
    for group, names in core["input_order"].items():
        for name in names:
            spec = core["input"][group][name]
            choices = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
            assert ours["input"][group][name][1]["options"] == choices


def with_our_loaders(prompt):
    ours = {"UNETLoader": "TesseraDiffusionModelLoader", "CLIPLoader": "TesseraCLIPLoader"}
    swapped = copy.deepcopy(prompt)
    for node in swapped.values():
        node["class_type"] = ours.get(node["class_type"], node["class_type"])
    return swapped


def complaints(host, prompt):
    """[(type, details)] of what validation says, by node; {} if it accepts."""
    try:
        prompt_id = host.queue(prompt)
    except HostError as refused:
        assert refused.kind == "refused", refused
        return {id: [(e["type"], e["details"]) for e in errors] for id, errors in refused.node_errors.items()}
    with pytest.raises(HostError, match="Error:"):  # stand-in files cannot be loaded
        host.wait(prompt_id)
    return {}


@pytest.mark.parametrize("name", ["image_z_image_turbo", "image_z_image_turbo_int8"])
def test_official_template_is_valid_with_our_loaders(host, name):
    prompt = api_format(official(name), host.object_info())
    swapped = with_our_loaders(prompt)
    kinds = [node["class_type"] for node in swapped.values()]
    assert kinds.count("TesseraDiffusionModelLoader") == kinds.count("TesseraCLIPLoader") == 1 and len(kinds) == 10
    files = {node["class_type"]: node["inputs"] for node in prompt.values()}
    wanted = [
        host.models("diffusion_models") / files["UNETLoader"]["unet_name"],
        host.models("text_encoders") / files["CLIPLoader"]["clip_name"],
        host.models("vae") / files["VAELoader"]["vae_name"],
    ]
    for path in wanted:
        path.unlink(missing_ok=True)
    without_files = complaints(host, prompt)
    assert [[kind for kind, _ in errors] for errors in without_files.values()] == [["value_not_in_list"]] * 3
    assert complaints(host, swapped) == without_files
    for path in wanted:
        save_file({"nothing": torch.zeros(1)}, path)
    assert complaints(host, prompt) == complaints(host, swapped) == {}


# Example workflows


def example(host, name, **changes):
    """An example in API format with other values in it: `node type=dict of inputs`."""
    workflow = json.loads((TESTS.parent / "example_workflows" / f"{name}.json").read_text())
    prompt = api_format(workflow, host.object_info())
    for kind, inputs in changes.items():
        (only,) = (node for node in prompt.values() if node["class_type"] == kind)
        only["inputs"] |= inputs
    return prompt


def for_tiny(prompt):
    """The same graph with the tiny model's two ends in place of a text encoder and a VAE."""
    drop = {id for id, node in prompt.items() if node["class_type"] in ("TesseraCLIPLoader", "VAELoader")}
    prompt = {id: node for id, node in copy.deepcopy(prompt).items() if id not in drop}
    for entry in prompt.values():
        if entry["class_type"] == "CLIPTextEncode":
            entry |= node("TinyPrompt", text=PROMPT)
        if entry["class_type"] == "VAEDecode":
            entry |= node("TinyDecode", samples=entry["inputs"]["samples"])
        if entry["class_type"] == "EmptySD3LatentImage":
            entry["inputs"] |= {"width": 128, "height": 128}
    return prompt


def test_examples_are_in_the_template_browser(host):
    assert sorted(host.get("/workflow_templates")["tessera"]) == [path.stem for path in EXAMPLES]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_complete(host, path):
    workflow, nodes = json.loads(path.read_text()), host.object_info()
    used = [n for n in workflow["nodes"] if n["type"] in nodes]
    notes = [n for n in workflow["nodes"] if n["type"] not in nodes]
    assert [n["type"] for n in notes] == ["MarkdownNote"]
    for each in used:
        assert len(each.get("widgets_values", [])) <= len(widgets(nodes[each["type"]])), each["type"]
        schema = nodes[each["type"]]["input"]
        known = set(schema.get("required", {})) | set(schema.get("optional", {}))
        assert {slot["name"] for slot in each["inputs"]} <= known
        names = [slot["name"] for slot in each["outputs"]]
        assert names == nodes[each["type"]]["output_name"][: len(names)]  # later versions may have more
    thumbnail = path.with_suffix(".jpg")
    assert thumbnail.stat().st_size < 100_000
    with Image.open(thumbnail) as image:
        assert min(image.size) >= 256


def test_example_quantize_and_save_runs(host):
    source = {"source": "diffusion_models/tiny.safetensors", "filename": "example_nvfp4"}
    entry = host.run(example(host, "tessera_quantize_and_save", TesseraQuantize=source))
    report = next(o["text"][0] for id, o in entry["outputs"].items() if "tessera_report" not in o)
    assert report.startswith("- example_nvfp4.safetensors: ")
    assert (host.models("loras") / "example_nvfp4_lora.safetensors").is_file()


SETUPS = {"nvfp4": ("z_image_nvfp4", 28), "mxfp8": ("z_image_mxfp8", 27), "int8_convrot": ("int8_convrot", 35)}
"""Name -> (recipe, layers of the tiny model that it quantizes)."""


def stand_ins(host, **files):
    for folder, name in files.items():
        path = host.models(folder) / f"{name}.safetensors"
        if not path.exists():
            save_file({"nothing": torch.zeros(1)}, path)


@pytest.mark.parametrize("setup", SETUPS)
def test_example_setup_is_the_official_template_with_our_nodes(host, setup):
    stand_ins(host, text_encoders="qwen_3_4b", vae="ae", diffusion_models=f"z_image_turbo_{setup}")
    if setup == "int8_convrot":
        stand_ins(host, text_encoders="qwen_3_4b_int8_convrot")
    ours = example(host, f"tessera_z_image_{setup}")
    assert complaints(host, ours) == {}
    theirs = with_our_loaders(api_format(official("image_z_image_turbo"), host.object_info()))
    values = [{each["class_type"]: given(each) for each in graph.values()} for graph in (ours, theirs)]
    added = {"TesseraCorrectionLoRA", "TesseraInspect", "PreviewImage"}
    assert {kind: v for kind, v in values[0].items() if kind not in added} == values[1]
    assert {"TesseraCorrectionLoRA", "TesseraInspect"} <= values[0].keys()


def given(entry):
    """A node's values apart from what everybody changes, files, prompt, names, and what only our loaders have."""
    free = {"unet_name", "clip_name", "vae_name", "text", "filename_prefix", "speed", "cache"}
    return {name: v for name, v in entry["inputs"].items() if name not in free and not isinstance(v, list)}


@pytest.mark.parametrize("setup", SETUPS)
def test_example_setup_runs_and_shows_its_layers(host, setup):
    name = f"z_image_turbo_{setup}"
    (host.models("diffusion_models") / f"{name}.safetensors").unlink(missing_ok=True)
    recipe, layers = SETUPS[setup]
    host.run({"quantize": quantize(name, recipe=recipe)})
    prompt = for_tiny(example(host, f"tessera_z_image_{setup}"))
    outputs = host.run(prompt)["outputs"]
    by_kind = {prompt[id]["class_type"]: output for id, output in outputs.items()}
    assert picture(host, {"outputs": {"": by_kind["SaveImage"]}}).std() > 20
    rows = by_kind["TesseraInspect"]["tessera_rows"][0]["layers"]
    assert len(rows) == layers and all(row["runs"] and row["ranks"] and row["strengths"] == [1.0] for row in rows)


def test_examples_bake_and_extract_run(host, first):
    folder, loras = host.models("diffusion_models"), host.models("loras")
    if not (folder / "z_image_turbo_int8_convrot.safetensors").exists():
        host.run({"quantize": quantize("z_image_turbo_int8_convrot", recipe="int8_convrot", rank=0)})
    shutil.copy(TINY, folder / "z_image_turbo_bf16.safetensors")
    (loras / "z_image_turbo_int8_convrot_lora.safetensors").unlink(missing_ok=True)
    since = len(host.events)
    host.run(example(host, "tessera_extract"))
    assert any(text.startswith("corrects ") for event in host.events[since:] if (text := event["data"].get("text")))
    up, down = torch.randn(256, 4), torch.randn(4, 256)
    layer = "diffusion_model.layers.0.attention.out"
    save_file({f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}, loras / "your_lora.safetensors")
    shutil.copy(folder / "whole.safetensors", folder / "z_image_turbo_nvfp4.safetensors")
    host.run(example(host, "tessera_bake"))
    baked = load_file(folder / "z_image_turbo_nvfp4_baked.safetensors")
    plain = load_file(folder / "z_image_turbo_nvfp4.safetensors")
    assert [key for key in plain if _bytes(plain[key]) != _bytes(baked[key])]
    assert (loras / "z_image_turbo_nvfp4_baked_lora.safetensors").is_file()


def needed(prompt, kind):
    """What runs when all but the nodes that one node needs are muted."""
    found = [id for id, entry in prompt.items() if entry["class_type"] == kind]
    for id in found:
        found += [value[0] for value in prompt[id]["inputs"].values() if isinstance(value, list)]
    return {id: prompt[id] for id in found}


def seeded(prompt, seed):
    prompt = copy.deepcopy(prompt)
    for entry in prompt.values():
        if entry["class_type"] == "KSampler":
            entry["inputs"] |= {"steps": 2, "seed": seed}
    return prompt


def test_example_calibrate_plan_quantize_compare_is_valid_and_runs(host):
    name = "tessera_calibrate_plan_quantize_compare"
    for folder, file in {"diffusion_models": "z_image_turbo_bf16", "text_encoders": "qwen_3_4b", "vae": "ae"}.items():
        save_file({"nothing": torch.zeros(1)}, host.models(folder) / f"{file}.safetensors")
    assert complaints(host, example(host, name)) == {}
    shutil.copy(TINY, host.models("diffusion_models") / "z_image_turbo_bf16.safetensors")
    prompt = for_tiny(example(host, name, TesseraPlan={"target_size_gb": 0.0085, "calls": 1}))
    host.run(needed(seeded(prompt, 1), "TesseraSaveCalibration"))  # groups 2 and 3 muted, as the note says
    since = len(host.events)
    entry = host.run(seeded(prompt, 0))
    steps = ["KSampler", "TesseraSaveCalibration", "TesseraPlan", "TesseraQuantize", "TesseraDiffusionModelLoader",
             "TesseraCorrectionLoRA", "KSampler", "TesseraInspect", "TesseraCompare"]  # fmt: skip
    kinds = [prompt[id]["class_type"] for id in executed(host.events[since:])]
    assert [kind for kind in kinds if kind in steps] == steps
    outputs = {prompt[id]["class_type"]: output for id, output in entry["outputs"].items()}
    plan, report = outputs["TesseraPlan"]["tessera_plan"][0], outputs["TesseraQuantize"]["tessera_report"][0]
    assert report["model"] == "z_image_turbo_bf16_planned.safetensors"
    user, layers = host.base / "user" / "tessera", report["layers"]
    assert (user / "calibrations" / "z_image_turbo_00002.safetensors").is_file()
    assert (user / "recipes" / "planned.toml").is_file()
    sizes = [(host.models("diffusion_models") / report["model"]).stat().st_size,
             (host.models("loras") / report["lora"]).stat().st_size]  # fmt: skip
    assert sizes == [report["model_bytes"], report["lora_bytes"]] and sum(sizes) <= plan["bytes"] <= 8_500_000
    assert report["basis"] == f"calibrated: {len(layers)} of {len(layers)} layers, by 4 model calls"
    assert len(report["counts"]) > 1
    (correction,) = (id for id, entry in prompt.items() if entry["class_type"] == "TesseraCorrectionLoRA")
    ranked = sum(row["rank"] > 0 for row in layers)
    said = f"corrects {ranked} layers, {ranked} of {len(layers)} quantized ones"
    assert ranked and said in host.progress_texts(correction, since)
    shown = []
    for key in ("a_images", "b_images"):
        (file,) = host.files({"outputs": {"": outputs["ImageCompare"]}}, key)
        with Image.open(file) as image:
            shown.append(np.asarray(image).astype(int))
    before, after = shown
    assert before.shape == (256, 256, 3) and (before != after).any()
    assert np.sqrt(np.mean((before - after) ** 2)) < 0.1 * before.std()


def test_an_absorb_model_is_named_so_needs_no_lora_and_samples(host):
    made = quantize("inside", mode="absorb", rank=16)
    graph = {
        "quantize": made,
        "load": node("TesseraDiffusionModelLoader", unet_name=["quantize", 0], weight_dtype="default"),
        **sampling(["load", 0]),
    }
    entry = host.run(graph)
    report = entry["outputs"]["quantize"]["tessera_report"][0]
    assert (report["model"], report["lora"], report["mode"]) == ("inside_absorb.safetensors", None, "absorb")
    assert (host.models("diffusion_models") / "inside_absorb.safetensors").is_file()
    assert picture(host, entry).std() > 20


def test_quantize_seed_does_not_change_by_itself(host):
    """The frontend rolls every `seed` after a run unless told not to; that would quantize again each time."""
    fields = [name for name, _ in widgets(host.object_info("TesseraQuantize"))]
    assert None not in fields
