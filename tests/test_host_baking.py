"""Inside the real ComfyUI: what nodes have put on a MODEL is in the baked file, and it runs as close to the truth."""

import json

import pytest
import torch

import lora_files
import lora_models
import lora_reference as reference
from comfy_host import PROMPTS, Trajectory, node, relative
from tessera.checkpoint import Checkpoint
from tessera.matching import Names
from tessera.output import read_branch

pytestmark = pytest.mark.host
STRENGTH = 0.7
EXACT = 5e-5  # relative, of fp32 sums
ROUNDED = 4e-3  # of a tensor's own bf16
TRUNK = "diffusion_model."
STYLE = 3.0  # strength: a change that is far above quantization's
KEPT = 13  # quantized layers that it leaves alone


@pytest.fixture(scope="module", params=lora_models.MODELS)
def everything(request, models):
    """(quantized MODEL with a LoRA of every kind on it, the paths of quantized file, original and LoRA)."""
    from tessera import host

    paths = [lora_models.file_of(models, request.param, format) for format in ("nvfp4", "bf16")]
    paths.append(lora_models.every_kind(models, request.param))
    quantized = lora_models.load("ours", paths[0])
    return host.attach_file(quantized, str(paths[2]), STRENGTH)[0], *paths


def found(bake, wanted, before):
    """{key: (relative error of what is baked, its bound)} of every tensor that the LoRA changes."""
    errors, names = {}, Names(bake.source.shapes())
    for key in wanted:
        if torch.equal(wanted[key], before[key]):
            continue
        name = names.key(key.removeprefix(TRUNK))
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in bake.choices:
            errors[key] = relative(bake.source.weight(layer), wanted[key]), EXACT
        else:
            errors[key] = relative(bake.source.read(f"{bake.source.prefix}{name}"), wanted[key]), ROUNDED
    assert bake.source.changes.keys() == {names.key(key.removeprefix(TRUNK)) for key in errors}
    return errors


def test_every_kind_is_baked_into_the_original_as_comfyui_adds_it(everything):
    from tessera import host

    model, _, original, lora = everything
    plain = lora_models.load("stock", original)
    before = reference.weights(plain)
    wanted = reference.changed(plain, [(lora, STRENGTH)], before)
    errors = found(host.bake_of(model, original), wanted, before)
    assert len(errors) > 30 and all(error < bound for error, bound in errors.values()), errors


def test_without_the_original_it_is_baked_into_decoded_and_corrected_weights(everything):
    from tessera import host

    model, quantized, _, lora = everything
    plain, pairs = lora_models.load("stock", quantized), Checkpoint(quantized.with_stem(f"{quantized.stem}_lora"))
    before = reference.weights(plain)
    bake = host.bake_of(model)
    for layer in bake.model.layers:
        before[f"{TRUNK}{layer}.weight"] = read_branch(pairs, layer).add_to(before[f"{TRUNK}{layer}.weight"])
    errors = found(bake, reference.changed(plain, [(lora, STRENGTH)], before), before)
    assert len(errors) > 30 and all(error < bound for error, bound in errors.values()), errors
    assert bake.correction.name == f"{quantized.stem}_lora.safetensors"


# ---- the node


@pytest.fixture(scope="module")
def style(models, tiny):
    """A LoRA of the tiny model's blocks but for the refiners, with a norm."""
    own = Checkpoint(models / "diffusion_models" / tiny["bf16"])
    layers = {f"{TRUNK}{name}": ("lora", own.weight(name)) for name in lora_models.BLOCKS["zimage"]
              if name.startswith("layers.")}  # fmt: skip
    norm = {f"{TRUNK}layers.0.attention_norm1.diff": 0.1 * own.read("layers.0.attention_norm1.weight").float()}
    return lora_files.save(models / "loras" / "style.safetensors", layers, others=norm).name


def load(name):
    return node("TesseraDiffusionModelLoader").execute(name, speed="exact").args[0]


def with_lora(model, name, strength=STYLE, **options):
    return node("TesseraLoRA").execute(model, name, strength, **options).args[0]


def corrected(model, name):
    return node("TesseraCorrectionLoRA").execute(model, name, 1.0).args[0]


@pytest.fixture(scope="module")
def baked(tiny, style):
    """{mode: (model name, lora name, report)} of the tiny model with its correction and the LoRA, baked by the node."""
    model = with_lora(corrected(load(tiny["model"]), tiny["lora"]), style)
    bake = node("TesseraBake").execute
    return {
        "original": bake(model, "baked_original", original=tiny["bf16"]).args,
        "best effort": bake(model, "baked_best_effort").args,
    }


def test_a_baked_model_is_as_close_to_bf16_with_the_lora_as_one_with_the_lora_beside(tiny, style, baked):
    import nodes

    plain = load(tiny["bf16"])
    truth = nodes.LoraLoaderModelOnly().load_lora_model_only(plain, style, STYLE)[0]
    trajectory = Trajectory(truth, PROMPTS[0])

    def error(model):
        errors = trajectory.velocities(model)
        return sum(errors) / len(errors)

    without = corrected(load(tiny["model"]), tiny["lora"])
    beside, without = error(with_lora(without, style)), error(without)
    errors = {mode: error(corrected(load(model), lora)) for mode, (model, lora, _) in baked.items()}
    assert without > 4 * beside, "the LoRA changes too little to tell"
    assert errors["original"] < 1.2 * beside and errors["best effort"] < 1.5 * beside, (beside, errors)


def test_report_and_files_say_what_was_baked(models, tiny, style, baked):
    for mode, (model, lora, report) in baked.items():
        said = json.loads(Checkpoint(models / "diffusion_models" / model).metadata["tessera"])["baked"]
        assert said["mode"] == mode and said["patched"] == ["layers.0.attention_norm1.weight"]
        assert [(found["name"], found["strength"]) for found in said["loras"]] == [(style, STYLE)]
        assert f"baked: {style} at 3" in report and "not quantized: 1" in report and (models / "loras" / lora).is_file()
        assert ("best effort, as no original was given" in report) == (mode == "best effort")
    assert f"kept byte for byte: {KEPT} quantized layers" in baked["best effort"][2]


def test_a_lora_of_a_stock_node_is_baked_too(models, tiny, style):
    """Through the merge guard or as patches: the same bytes as through ours."""
    import nodes

    from tessera import host

    stock = nodes.LoraLoaderModelOnly().load_lora_model_only(load(tiny["model"]), style, STYLE)[0]
    ours = with_lora(load(tiny["model"]), style)
    first, second = host.bake_of(stock), host.bake_of(ours)
    assert first.choices == second.choices
    for name in list(first.choices)[::5]:
        assert relative(first.source.weight(name), second.source.weight(name)) < EXACT, name
    norm = "layers.0.attention_norm1.weight"
    assert torch.equal(first.source.read(norm), second.source.read(norm))


def test_what_cannot_be_baked_is_said(tiny, style):
    bake, model = node("TesseraBake").execute, load(tiny["model"])
    with pytest.raises(ValueError, match=r"strength moves while sampling \(1 from 0 to 0.5\); only a constant"):
        bake(with_lora(model, style, end_percent=0.5), "scheduled")
    with pytest.raises(ValueError, match="nothing to bake"):
        bake(corrected(model, tiny["lora"]), "nothing")
    with pytest.raises(ValueError, match="is not quantized, so it has no formats to take"):
        bake(with_lora(load(tiny["bf16"]), style), "plain")
