"""Inside the real ComfyUI: LoRA nodes in place of ComfyUI's own, stacks, text encoders, strengths that move."""

import itertools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import lora_files
import small_clip
from comfy_host import STEPS, TINY, Trajectory, node, relative, sample
from conftest import ROOT, TESTS
from frontend_workflow import api_format
from host_server import HostError, HostServer

pytestmark = pytest.mark.host
NODES = ("TesseraLoRA", "TesseraLoRAStack")
LAYERS = ("layers.0.attention.qkv", "layers.0.feed_forward.w1", "layers.1.attention.out", "layers.2.feed_forward.w2")
CLIP_LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
CURVE = "0:0, 0.5:1, 1:0.25"


def lora(name, strength_model=1.0, **inputs):
    """The node on a model, as a function."""
    return lambda model: node("TesseraLoRA").execute(model, name, strength_model, **inputs).args[0]


def stack(model, *lines, clip=None):
    return node("TesseraLoRAStack").execute(model, "\n".join(lines), clip).args


def answer(model):
    return sample(model, steps=2)


def save_lora(folder, name, seed, text_encoder=None, model=True):
    """A LoRA for some layers of the tiny model, and for the small text encoder if its file is given."""
    layers = {}
    if model:
        weights = load_file(TINY)
        layers = {f"diffusion_model.{layer}": ("lora", weights[f"{layer}.weight"]) for layer in LAYERS}
    if text_encoder:
        weights = load_file(text_encoder)
        layers |= {f"{small_clip.KEYS}{layer}": ("lora", weights[f"{layer}.weight"]) for layer in CLIP_LAYERS}
    return lora_files.save(folder / name, layers, seed=seed).name


@pytest.fixture(scope="module")
def model(tiny):
    return node("TesseraDiffusionModelLoader").execute(tiny["model"]).args[0]


@pytest.fixture(scope="module")
def encoder(models):
    path = small_clip.save(models / "text_encoders" / "small.safetensors")
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def files(models, encoder):
    """Eight LoRAs for the model; one for both; one for the text encoder alone."""
    names = [save_lora(models / "loras", f"user_{i}.safetensors", 100 * i) for i in range(8)]
    save_lora(models / "loras", "user_both.safetensors", 1000, encoder)
    save_lora(models / "loras", "user_text.safetensors", 2000, encoder, model=False)
    return names


# ---- what the nodes look like


@pytest.mark.parametrize("core", ["LoraLoader", "LoraLoaderModelOnly"])
def test_inputs_are_those_of_cores_node(models, core):
    import nodes

    theirs = nodes.NODE_CLASS_MAPPINGS[core]
    inputs = node("TesseraLoRA").INPUT_TYPES()
    ours = inputs["required"] | inputs["optional"]
    for name, (kind, *options) in theirs.INPUT_TYPES()["required"].items():
        found, said = ours[name]
        if isinstance(kind, list):
            assert found == "COMBO" and said["options"] == kind
        else:
            wanted = {key: value for key, value in (options or [{}])[0].items() if key != "tooltip"}
            assert found == kind and wanted.items() <= said.items(), name
    slots = [name for name, (kind, *_) in ours.items() if kind in ("MODEL", "CLIP")]
    widgets = [name for name in ours if name not in slots]
    assert slots == ["model", "clip"] and widgets[:3] == ["lora_name", "strength_model", "strength_clip"]
    assert set(inputs["required"]) == {"model", "lora_name", "strength_model"}  # the rest has defaults
    assert tuple(node("TesseraLoRA").RETURN_TYPES)[: len(theirs.RETURN_TYPES)] == theirs.RETURN_TYPES


@pytest.mark.parametrize("name", NODES)
def test_every_input_has_a_tooltip_and_the_help_page(models, name):
    schema = node(name).GET_SCHEMA()
    page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n") and schema.description and schema.search_aliases
    for field in schema.inputs:
        assert field.tooltip and f"`{field.id}`" in page, field.id
    assert all(output.tooltip for output in schema.outputs)


# ---- one LoRA, a stack


def test_without_clip_there_is_none_and_the_model_stays_as_it_was(model, files):
    before = answer(model)
    with_lora, clip = node("TesseraLoRA").execute(model, files[0], 0.8).args
    assert clip is None and relative(answer(with_lora), before) > 0.01
    assert torch.equal(answer(model), before)


def test_stack_is_chained_nodes_bit_for_bit(model, files):
    for count in (1, 2, 8):
        strengths = dict(zip(files[:count], itertools.cycle([0.8, -0.5, 1.25]), strict=False))
        found = answer(stack(model, *(f"{name} : {strength}" for name, strength in strengths.items()))[0])
        chained = model
        for name, strength in reversed(strengths.items()):
            chained = lora(name, strength)(chained)
        assert torch.equal(answer(chained), found), count


@pytest.mark.parametrize("count", [2, 8])
def test_order_of_a_stack_changes_no_bit(model, files, count):
    lines = [f"{name} : {0.1 * i - 0.3:.2f}" for i, name in enumerate(files[:count])]
    found = answer(stack(model, *lines)[0])
    for order in (lines[::-1], lines[1::2] + lines[::2]):
        assert torch.equal(answer(stack(model, *order)[0]), found)


def test_muted_and_zero_lines_are_not_there(model, files):
    wanted = answer(stack(model, f"{files[0]} : 0.7")[0])
    lines = ["# a note", f"#{files[1]} : 1", "# gone.safetensors : 1", "", f"{files[0]} : .7", f"{files[2]} : 0"]
    assert torch.equal(answer(stack(model, *lines)[0]), wanted)
    assert stack(model, f"# {files[0]}")[0] is model and stack(model)[0] is model


def test_same_file_twice_counts_twice(model, files):
    once = answer(stack(model, f"{files[0]} : 0.75")[0])
    twice = answer(stack(model, f"{files[0]} : 0.5", f"{files[0]} : 0.25")[0])
    assert relative(twice, once) < 0.01 < relative(twice, answer(stack(model, f"{files[0]} : 0.5")[0]))


def test_two_stacks_of_one_model_do_not_meet(model, files):
    first, second = stack(model, files[0])[0], stack(model, files[1], f"{files[2]} : 0.5")[0]
    alone = answer(first), answer(second)
    assert torch.equal(answer(first), alone[0]) and torch.equal(answer(second), alone[1])
    assert relative(*alone) > 0.01


# ---- text encoders


@pytest.mark.parametrize("label", ["nvfp4", "int8_convrot"])
def test_text_encoder_lora_equals_decoded_weight_and_delta(models, encoder, model, files, label):
    from tessera.checkpoint import Checkpoint

    path = small_clip.quantize(encoder, models / "text_encoders" / f"small_{label}.safetensors", label)
    loaded = quantized_clip(path)
    before = small_clip.encode(loaded)
    same, clip = node("TesseraLoRA").execute(model, "user_text.safetensors", 1.0, loaded, strength_clip=0.6).args
    assert same is model
    truth, file = small_clip.stock(encoder), load_file(models / "loras" / "user_text.safetensors")
    for layer in small_clip.NAMES:
        weight = Checkpoint(path).weight(layer)
        if layer in CLIP_LAYERS:
            up, down, alpha = (file[f"{small_clip.KEYS}{layer}.{part}"].float()
                               for part in ("lora_up.weight", "lora_down.weight", "alpha"))  # fmt: skip
            weight = weight + 0.6 * alpha / len(down) * up @ down
        parameter = torch.nn.Parameter(weight, requires_grad=False)
        small_clip.transformer(truth).get_submodule(layer).weight = parameter
    wanted = small_clip.encode(truth)
    assert relative(small_clip.encode(clip), wanted) < 1e-4 < 1e-2 < relative(before, wanted)  # factors are fp16
    assert torch.equal(small_clip.encode(loaded), before)
    twice = stack(model, "user_text.safetensors : 0 : 0.6", clip=loaded)[1]
    assert torch.equal(small_clip.encode(twice), small_clip.encode(clip))
    path.unlink()


def quantized_clip(path):
    import comfy.sd

    from tessera import host

    return host.load_clip(str(path), comfy.sd.CLIPType.LUMINA2, small_clip.OPTIONS, "exact")


def test_a_file_for_both_changes_both_each_by_its_strength(model, encoder, files, caplog):
    clip = small_clip.stock(encoder)
    before = small_clip.encode(clip)
    for strengths, changed in (((1, 1), (True, True)), ((1, 0), (True, False)), ((0, 1), (False, True))):
        with caplog.at_level("INFO"):
            caplog.clear()
            found = node("TesseraLoRA").execute(model, "user_both.safetensors", strengths[0], clip, strengths[1]).args
        assert (found[0] is not model, found[1] is not clip) == changed
        assert torch.equal(small_clip.encode(found[1]), before) != changed[1]
        said = [record.getMessage() for record in caplog.records if "user_both" in record.getMessage()]
        assert len(said) == sum(changed) and not any("fit no layer" in text for text in said), said


def test_a_file_for_the_model_leaves_the_text_encoder_alone(model, encoder, files):
    clip = small_clip.stock(encoder)
    found = node("TesseraLoRA").execute(model, files[0], 1.0, clip).args
    assert found[0] is not model and found[1] is clip


def test_a_file_that_fits_neither_is_refused(models, model, encoder):
    up, down = torch.ones(64, 4), torch.ones(4, 64)
    name = "diffusion_model.double_blocks.3.mlp"
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, models / "loras" / "user_other.sft")
    clip = small_clip.stock(encoder)
    for inputs in ({}, {"clip": clip}):
        with pytest.raises(ValueError, match=r"user_other\.sft: 0 of 1 LoRA layers match this model"):
            node("TesseraLoRA").execute(model, "user_other.sft", 1.0, **inputs)


# ---- strengths that move


def shares(trajectory):
    """Where in sampling each step is: this model's noise level is 3 t / (1 + 2 t), t falling from 1 to 0."""
    sigmas = [sigma.max().item() for _, sigma, _ in trajectory.calls]
    return [1 - sigma / (3 - 2 * sigma) for sigma in sigmas]


def strengths_seen(model):
    """The strengths that a layer's branch has at each step of a sampling."""
    import comfy.patcher_extension

    seen, clone = [], model.clone()
    layer = model.model.get_submodule(f"diffusion_model.{LAYERS[0]}")

    def record(executor, *args, **kwargs):
        seen.append(list(layer.tessera_branch_pair[1].values))
        return executor(*args, **kwargs)

    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", record)
    sample(clone)
    return seen


@pytest.mark.parametrize(
    ("inputs", "factor"),
    [
        ({"curve": CURVE}, lambda s: 2 * s if s < 0.5 else 1 - 1.5 * (s - 0.5)),
        ({"start_percent": 0.3}, lambda s: s >= 0.3),
        ({"end_percent": 0.4}, lambda s: s < 0.4),
        ({"start_percent": 0.2, "end_percent": 0.6, "curve": CURVE},
         lambda s: (0.2 <= s < 0.6) * (2 * s if s < 0.5 else 1 - 1.5 * (s - 0.5))),
    ],
    ids=["curve", "start", "end", "all"],
)  # fmt: skip
def test_strength_moves_over_sampling(model, files, inputs, factor):
    """Another LoRA of the same model keeps its own."""
    moving = lora(files[0], 0.8, **inputs)(lora(files[1], 0.5)(model))
    wanted = [0.8 * factor(share) for share in shares(Trajectory(model))]
    assert len(wanted) == STEPS and len(set(wanted)) > 1
    for values, value in zip(strengths_seen(moving), wanted, strict=True):
        assert sorted(values) == pytest.approx(sorted([0.5, value]), abs=1e-4)


def test_a_step_outside_is_the_models_own_and_inside_the_whole_loras(model, files):
    moving = Trajectory(lora(files[0], 1.0, start_percent=0.3)(model))
    off, on = moving.velocities(model), moving.velocities(lora(files[0], 1.0)(model))
    for share, without, whole in zip(shares(moving), off, on, strict=True):
        assert (without == 0, whole == 0) == (share < 0.3, share >= 0.3), share


def test_a_schedule_does_not_outlast_its_sampling(model, files):
    still, moving = lora(files[0], 1.0)(model), lora(files[0], 1.0, end_percent=0.3)(model)
    before = answer(still)
    assert relative(answer(moving), before) > 1e-3
    assert torch.equal(answer(still), before)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"curve": "half"}, "curve: 'half' is no point; write "),
        ({"curve": "0:1, 2:1"}, "curve: '2:1' is no point; write "),
        ({"start_percent": 0.6, "end_percent": 0.4}, "start_percent 0.6"),
    ],
)
def test_a_bad_schedule_is_told(model, files, inputs, message):
    with pytest.raises(ValueError) as error:
        lora(files[0], **inputs)(model)
    assert str(error.value).startswith(message)


# ---- through ComfyUI's own server


@pytest.fixture(scope="module")
def host():
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: run scripts/test, or scripts/setup_host.py")
    packs = {"tiny": TESTS / "tiny" / "node_pack", "small_clip": TESTS / "small_clip.py"}
    with HostServer(packs, cpu=True) as server:
        shutil.copy(TINY, server.models("diffusion_models") / "tiny.safetensors")
        encoder = small_clip.save(server.models("text_encoders") / "small.safetensors")
        save_lora(server.models("loras"), "both.safetensors", 1, encoder)
        save_lora(server.models("loras"), "model.safetensors", 2)
        yield server


def step(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph(**loras):
    """Model and text encoder through one LoRA node to a saved picture and a printed embedding."""
    ((name, entry),) = loras.items()
    sampler = {"seed": 5, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    made = {
        "load": step("UNETLoader", unet_name="tiny.safetensors", weight_dtype="default"),
        "clip": step("SmallCLIP", name="small.safetensors"),
        name: entry,
        "prompt": step("TinyPrompt", text="big red star center on white plain"),
        "latent": step("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "sample": step("KSampler", model=[name, 0], positive=["prompt", 0], negative=["prompt", 0],
                       latent_image=["latent", 0], **sampler),
        "decode": step("TinyDecode", samples=["sample", 0]),
        "save": step("SaveImage", images=["decode", 0], filename_prefix="test"),
    }  # fmt: skip
    return made | ({"encode": step("SmallEncode", clip=[name, 1])} if "clip" in entry["inputs"] else {})


def results(host, prompt):
    """(picture, embedding or None)"""
    entry = host.run(prompt)
    with Image.open(host.files(entry)[0]) as image:
        pixels = np.asarray(image).astype(float)
    return pixels, entry["outputs"].get("encode", {}).get("embedding")


@pytest.mark.parametrize("kind", ["LoraLoader", "LoraLoaderModelOnly"])
def test_node_type_can_be_swapped_in_an_api_file(host, kind):
    inputs = {"model": ["load", 0], "lora_name": "both.safetensors", "strength_model": 0.9}
    if kind == "LoraLoader":
        inputs |= {"clip": ["clip", 0], "strength_clip": 0.7}
    (core, core_text), (ours, our_text) = (results(host, graph(lora=step(k, **inputs))) for k in (kind, "TesseraLoRA"))
    (bare, bare_text), _ = (results(host, graph(lora=step(kind, **inputs | dict.fromkeys(
        [name for name in inputs if name.startswith("strength")], 0.0)))) for _ in range(2))  # fmt: skip
    assert np.abs(ours - core).mean() < 0.1 * np.abs(bare - core).mean()  # core's is rounded to bf16
    if kind == "LoraLoader":
        text, core_text, bare_text = (torch.tensor(values) for values in (our_text, core_text, bare_text))
        assert relative(text, core_text) < 0.1 * relative(bare_text, core_text)


def executed(host, prompt):
    """(nodes that ran, nodes whose result was there)"""
    since = len(host.events)
    host.run(prompt)
    events = host.events[since:]
    ran = [e["data"]["node"] for e in events if e["type"] == "executing" and e["data"]["node"]]
    return ran, set(next(e["data"]["nodes"] for e in events if e["type"] == "execution_cached"))


def one(strength, **inputs):
    return graph(one=step("TesseraLoRA", model=["load", 0], clip=["clip", 0], lora_name="both.safetensors",
                          strength_model=strength, strength_clip=0.5, **inputs))  # fmt: skip


def stacked(*lines):
    return graph(stack=step("TesseraLoRAStack", model=["load", 0], clip=["clip", 0], stack="\n".join(lines)))


def test_strength_runs_only_what_is_behind_it(host):
    host.run(one(0.5))
    ran, cached = executed(host, one(0.75))
    assert cached == {"load", "clip", "prompt", "latent"}
    assert set(ran) == {"one", "sample", "decode", "save", "encode"}
    host.run(stacked("both.safetensors : 0.5", "model.safetensors : 1"))
    ran, cached = executed(host, stacked("both.safetensors : 0.6", "# model.safetensors : 1"))
    assert cached == {"load", "clip", "prompt", "latent"}
    assert set(ran) == {"stack", "sample", "decode", "save", "encode"}


def test_example_workflow_runs_as_it_is_opened_and_with_a_lora(host):
    workflow = json.loads((ROOT / "example_workflows" / "tessera_lora_stack.json").read_text())
    prompt = api_format(workflow, host.object_info())
    ids = {entry["class_type"]: id for id, entry in prompt.items()}
    stack = prompt[ids["TesseraLoRAStack"]]["inputs"]
    text = prompt[ids["CLIPTextEncode"]]["inputs"]
    assert text["clip"] == [ids["TesseraLoRAStack"], 1] and stack["clip"] == [ids["TesseraCLIPLoader"], 0]
    for kind in ("TesseraCLIPLoader", "VAELoader", "TesseraCorrectionLoRA"):
        del prompt[ids[kind]]
    prompt |= {
        ids["TesseraDiffusionModelLoader"]: graph(one=step("", clip=0))["load"],
        ids["CLIPTextEncode"]: step("TinyPrompt", text="big red star center on white plain"),
        ids["VAEDecode"]: step("TinyDecode", samples=[ids["KSampler"], 0]),
        "clip": step("SmallCLIP", name="small.safetensors"),
    }
    stack |= {"model": [ids["TesseraDiffusionModelLoader"], 0], "clip": ["clip", 0]}
    prompt[ids["EmptySD3LatentImage"]]["inputs"] |= {"width": 128, "height": 128}
    prompt[ids["KSampler"]]["inputs"]["steps"] = 2
    bare, _ = results(host, prompt)
    stack["stack"] += "\nmodel.safetensors : 1"
    found, _ = results(host, prompt)
    assert bare.std() > 20 and np.abs(found - bare).mean() > 1


def test_a_file_that_was_replaced_is_read_again(host):
    lines = ["model.safetensors : 1"]
    before, _ = results(host, stacked(*lines))
    assert executed(host, stacked(*lines))[0] == []
    save_lora(host.models("loras"), "model.safetensors", 3)
    after, _ = results(host, stacked(*lines))
    assert np.abs(after - before).mean() > 1


def test_node_tells_what_became_of_each_file(host):
    since = len(host.events)
    host.run(stacked("both.safetensors : 0.55", "model.safetensors : 0.45"))
    (text,) = host.progress_texts("stack", since)
    lines = [line.removeprefix("• ") for line in text.splitlines()]
    assert [line.split(":")[0] for line in lines] == ["both.safetensors", "text encoder", "model.safetensors"]
    assert f"{len(LAYERS)} layers, unmerged ({len(LAYERS)} LoRA)" in text
    for line in lines:
        assert f"Tessera: {line}" in host.log


@pytest.mark.parametrize(
    ("prompt", "node_id", "message"),
    [
        (stacked("both.safetensors : 1", "modle.safetensors : 1"), "stack",
         'line 2: there is no "modle.safetensors" in models/loras; did you mean model.safetensors?'),
        (stacked("", "both.safetensors : much"), "stack", 'line 2: both.safetensors: "much" is not one or two numbers'),
        (one(1.0, curve="half"), "one", "curve: 'half' is no point"),
        (one(101.0), "one", "Value 101.0 bigger than max of 100"),
    ],
    ids=["name", "number", "curve", "strength"],
)  # fmt: skip
def test_a_mistake_is_told_before_anything_runs(host, prompt, node_id, message):
    with pytest.raises(HostError) as error:
        host.queue(prompt)
    assert error.value.kind == "refused"
    assert any(message in f"{said['message']} {said['details']}" for said in error.value.node_errors[node_id])


@pytest.mark.parametrize("name", NODES)
def test_help_page_and_extension_are_served(host, name):
    page = host._open(f"{host.url}/extensions/tessera/docs/{name}.md").decode()
    assert page == (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    served = host.get("/extensions")
    assert {"/extensions/tessera/lora_stack.js", "/extensions/tessera/lora_stack_text.js"} <= set(served)


def test_a_lora_that_comfyui_merges_before_it_is_pointed_out(files, tiny, caplog):
    """Models of other loaders are left as they are, with a hint; on ours the guard has nothing merged."""
    import nodes

    stock = nodes.UNETLoader().load_unet(tiny["model"], "default")[0]
    ours = node("TesseraDiffusionModelLoader").execute(tiny["model"]).args[0]
    for loaded, said in ((stock, True), (ours, False)):
        merged = nodes.LoraLoaderModelOnly().load_lora_model_only(loaded, files[0], 1.0)[0]
        caplog.clear()
        with caplog.at_level("INFO", "tessera"):
            lora(files[1])(merged)
            node("TesseraCorrectionLoRA").execute(merged, tiny["lora"], 1.0)
        assert caplog.text.count("4 quantized layers have a LoRA merged by ComfyUI") == (2 if said else 0)
