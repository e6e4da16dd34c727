"""Inside the real ComfyUI: our loader runs every variant of a file as the stock loader runs the good one."""

import json
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import synthetic
from comfy_host import TINY, node, relative, sample
from tessera import formats
from tessera.checkpoint import Checkpoint
from tessera.job import Job
from tessera.quantization import recipe

pytestmark = pytest.mark.host
LINEAR = "**.feed_forward.{w1,w2,w3}"


def ours(name, **inputs):
    return node("TesseraDiffusionModelLoader").execute(name, **inputs).args[0]


def stock(name):
    import nodes

    return nodes.UNETLoader().load_unet(name, "default")[0]


@pytest.fixture
def variant(models, tiny):
    """Saves an edited copy of the quantized tiny model: edit(tensors, metadata) -> file name."""

    def save(name, edit):
        path = models / "diffusion_models" / tiny["model"]
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata())
        tensors = load_file(path)
        tensors = edit(tensors, metadata) or tensors
        save_file(tensors, path.with_name(name), metadata=metadata)
        return name

    return save


@pytest.fixture
def quantized(models):
    """The tiny model with its feed-forward layers in one format -> file name."""

    def make(label):
        name = f"ffn_{label}.safetensors"
        path = models / "diffusion_models" / name
        if not path.exists():
            rule = recipe.Rule(formats.parse(label), (LINEAR,), "test")
            Job(Checkpoint(TINY), path, recipe.Recipe(label, "", (rule,)), rank=0).run()
        return name

    return make


def test_plain_checkpoint_samples_as_with_the_stock_loader(tiny):
    assert torch.equal(sample(ours(tiny["bf16"])), sample(stock(tiny["bf16"])))


def test_exact_nvfp4_recipe_samples_as_with_the_stock_loader(tiny):
    """On CPU the host decodes NVFP4 and MXFP8 for each call, as `exact` does."""
    assert torch.equal(sample(ours(tiny["model"], speed="exact")), sample(stock(tiny["model"])))


EMULATED = ["nvfp4", "mxfp8", "fp8_e4m3", "fp8_e5m2"]
LABELS = [*EMULATED, "int8", "int8_row", "int8_convrot", "int8_convrot_16"]


@pytest.mark.parametrize("label", EMULATED)
def test_exact_samples_each_emulated_format_as_with_the_stock_loader(quantized, label):
    name = quantized(label)
    assert torch.equal(sample(ours(name, speed="exact")), sample(stock(name)))


@pytest.mark.parametrize("label", LABELS)
def test_auto_samples_near_the_decoded_weights(quantized, label):
    """What rounding of inputs and transcoding may change: a few tenths of a percent of the latent (tiny-model.md)."""
    name = quantized(label)
    assert relative(sample(ours(name)), sample(ours(name, speed="exact"))) < 0.02


@pytest.mark.parametrize("label", LABELS)
def test_exact_speed_multiplies_the_decoded_weight(quantized, models, label):
    model = ours(quantized(label), speed="exact")
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    name = "layers.1.feed_forward.w1"
    weight = Checkpoint(models / "diffusion_models" / quantized(label)).weight(name)
    layer = model.model.get_submodule(f"diffusion_model.{name}")
    assert layer.tessera_plan.path == "decode"
    assert relative(layer(x), x.float() @ weight.T) < 6e-3  # bf16: decoded weight, input and output rounding


def header_only(tensors, metadata):
    for key in [k for k in tensors if k.endswith(".comfy_quant")]:
        del tensors[key]


def tensors_only(tensors, metadata):
    metadata.pop("_quantization_metadata")


def prefixed(tensors, metadata):
    metadata.pop("_quantization_metadata")
    return {f"model.diffusion_model.{k}": v for k, v in tensors.items()}


def scales_as_bytes(tensors, metadata):
    for key, value in tensors.items():
        if value.dtype == torch.float8_e4m3fn and key.endswith("weight_scale"):
            tensors[key] = value.view(torch.uint8)


def formats_missing(tensors, metadata):
    metadata.pop("_quantization_metadata")
    for key in [k for k in tensors if k.endswith(".comfy_quant")]:
        tensors[key] = formats.marker({"group_size": 16})


@pytest.mark.parametrize("edit", [header_only, tensors_only, prefixed, scales_as_bytes, formats_missing],
                         ids=lambda f: f.__name__)  # fmt: skip
def test_file_variants_sample_like_the_canonical_file(variant, tiny, edit):
    name = variant(f"variant_{edit.__name__}.safetensors", edit)
    assert torch.equal(sample(ours(name)), sample(ours(tiny["model"])))


def test_legacy_e5m2_file_loads_with_its_own_format(quantized, models):
    """The host labels every legacy scaled_fp8 layer e4m3 and decodes e5m2 weights wrongly without a word."""
    path = models / "diffusion_models" / quantized("fp8_e5m2")
    tensors = {k: v for k, v in load_file(path).items() if not k.endswith(".comfy_quant")}
    legacy = {k.replace(".weight_scale", ".scale_weight"): v for k, v in tensors.items()}
    save_file(legacy | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e5m2)}, path.with_name("legacy.safetensors"))
    assert torch.equal(sample(ours("legacy.safetensors")), sample(ours(quantized("fp8_e5m2"))))


def test_a_packed_layer_that_detection_reads_is_decoded(models, tiny):
    """ComfyUI reads widths from cap_embedder.1; packed into half its columns, the model is taken for another."""
    path = models / "diffusion_models" / "packed_embedder.safetensors"
    rule = recipe.Rule(formats.NVFP4(), ("cap_embedder.1",), "test")
    report = Job(Checkpoint(TINY), path, recipe.Recipe("embedder", "", (rule,)), rank=0).run()
    assert "cap_embedder.1: nvfp4, but ComfyUI knows models by this shape" in report.warnings[0]
    model = ours(path.name)
    assert tuple(model.model.get_submodule("diffusion_model.cap_embedder.1").weight.shape) == (256, 64)
    assert relative(sample(model), sample(ours(tiny["bf16"]))) < 0.3


def test_plans_can_be_queried_and_are_logged_once(tiny, caplog):
    from tessera import host

    with caplog.at_level(logging.INFO, "tessera"):
        model = ours(tiny["model"])
    plans = host.plans(model)
    assert len(plans) == 28 and all(plan.path == "transcode" and "on cpu" in plan.reason for _, plan in plans.values())
    assert host.plans(model.clone()) == plans
    lines = [r.message for r in caplog.records if r.name == "tessera"]
    assert len(lines) == len({(label, plan) for label, plan in plans.values()}) + 1
    assert any("nvfp4: transcode to int8_convrot_256 (comfy-kitchen and torch multiply no nvfp4 on cpu" in line
               for line in lines)  # fmt: skip
    assert any("transcoded 28 layers: weights moved by at most" in line for line in lines)


def test_a_deep_copy_is_loaded_again_with_our_layers(tiny):
    model = ours(tiny["model"])
    copy = model.clone(force_deepcopy=True)
    assert copy.model is not model.model
    layer = copy.model.get_submodule("diffusion_model.layers.0.feed_forward.w1")
    assert layer.tessera_plan.path == "transcode"
    assert torch.equal(sample(copy), sample(model))


@pytest.mark.parametrize(("edit", "words"), [
    (lambda t, m: t.pop("layers.0.feed_forward.w2.weight_scale_2") and None, "weight_scale_2 is missing"),
    (lambda t, m: m.update({"_quantization_metadata": json.dumps({"layers": {"nowhere": {"format": "nvfp4"}}})}),
     "nowhere: marked as quantized"),
    (lambda t, m: t.update({"layers.0.feed_forward.w2.comfy_quant": formats.marker({"format": "fp3"})})
     or (m.pop("_quantization_metadata") and None), "'fp3' is not loadable"),
])  # fmt: skip
def test_bad_files_are_refused_before_loading(variant, edit, words):
    with pytest.raises(ValueError, match=rf"bad\.safetensors: .*{words}"):
        ours(variant("bad.safetensors", edit))


def test_a_file_of_no_known_architecture_is_refused(models):
    format, w = formats.NVFP4(), torch.randn(64, 64)
    entries = {f"a.{k}": v for k, v in format.pack(format.encode(w)).items()}
    entries["a.comfy_quant"] = formats.marker(format.record())
    save_file(entries, models / "diffusion_models" / "unknown.safetensors")
    with pytest.raises(ValueError, match=r"unknown\.safetensors: ComfyUI does not know this model"):
        ours("unknown.safetensors")


def test_a_loaded_model_quantizes_to_the_same_bytes_as_its_file(models, tiny):
    from tessera import host

    target = models / "diffusion_models" / "from_memory.safetensors"
    Job(host.model_source(stock(tiny["bf16"])), target, recipe.builtin("z_image_nvfp4")).run()
    loras = target.with_name("from_memory_lora.safetensors"), models / "loras" / tiny["lora"]
    for mine, truth in ((target, models / "diffusion_models" / tiny["model"]), loras):
        mine, truth = load_file(mine), load_file(truth)
        assert mine.keys() == truth.keys()
        for key, value in truth.items():
            assert torch.equal(mine[key].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), key


def test_loras_of_a_loaded_model_are_merged_before_quantizing(models, tiny):
    import comfy.model_management
    import nodes

    from tessera import host

    up, down = torch.randn(768, 2) * 0.1, torch.randn(2, 256) * 0.1
    base = "diffusion_model.layers.0.feed_forward.w1"
    save_file({f"{base}.lora_up.weight": up, f"{base}.lora_down.weight": down}, models / "loras" / "style.safetensors")
    model = nodes.LoraLoaderModelOnly().load_lora_model_only(stock(tiny["bf16"]), "style.safetensors", 0.5)[0]
    sample(model)  # leaves the merged weight resident, the original in the backup
    source = host.model_source(model)
    expected = Checkpoint(TINY).weight("layers.0.feed_forward.w1") + 0.5 * up @ down
    torch.testing.assert_close(source.weight("layers.0.feed_forward.w1"), expected, rtol=0, atol=1e-5)
    comfy.model_management.unload_all_models()  # as making room for the job does
    torch.testing.assert_close(source.weight("layers.0.feed_forward.w1"), expected, rtol=0, atol=1e-5)


def test_a_quantized_model_is_no_source(tiny):
    from tessera import host

    with pytest.raises(ValueError, match=r"is already quantized .*quantize from the original file"):
        host.model_source(ours(tiny["model"]))


@pytest.fixture(scope="module")
def scaled(models):
    """All 453 Z-Image keys, 30 blocks, at width 256."""
    return synthetic.save(models / "diffusion_models" / "scaled.safetensors", synthetic.hostable_zimage())


COUNTS = {
    "z_image_nvfp4": {"nvfp4": 102, "mxfp8": 66},
    "z_image_mxfp8": {"mxfp8": 161},
    "int8_convrot": {"int8_convrot_256": 170},
}


@pytest.mark.parametrize("name", COUNTS)
def test_scaled_z_image_has_the_recipes_layers_and_loads_with_both_loaders(scaled, name):
    target = scaled.with_name(f"scaled_{name}.safetensors")
    report = Job(Checkpoint(scaled), target, recipe.builtin(name), rank=0).run()
    assert report.counts() == COUNTS[name]
    first, second = (sample(load(target.name), steps=1) for load in (ours, stock))
    assert relative(first, second) < 0.02 and torch.isfinite(first).all()
