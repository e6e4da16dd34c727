"""Inside the real ComfyUI: an absorb file's branches are part of the model, from load to unload and in every clone."""

import gc
import logging
import re
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from absorbing import absorb
from comfy_host import TINY, PastHooks, node, picture, relative, sample
from tessera import formats
from tessera.checkpoint import BRANCH, Checkpoint
from tessera.quantization import recipe
from tessera.quantization.metrics import psnr

pytestmark = pytest.mark.host
NVFP4, MXFP8, INT8 = "layers.0.feed_forward.w1", "layers.0.attention.out", "layers.1.feed_forward.w2"
SMOOTHED = "layers.1.feed_forward.w1"
NAME = "tiny_absorb.safetensors"


@pytest.fixture(scope="module", autouse=True)
def file(tiny, models):
    """The tiny model in absorb mode: the NVFP4 recipe's layers, one in int8, one with a pre_quant_scale."""
    chosen = recipe.builtin("z_image_nvfp4").resolve(Checkpoint(TINY).shapes())
    labels = {name: choice.format.label for name, choice in chosen.items() if choice.format}
    labels |= {NVFP4: "nvfp4", SMOOTHED: "nvfp4", MXFP8: "mxfp8", INT8: "int8_convrot_64"}
    return Checkpoint(absorb(TINY, models / "diffusion_models" / NAME, labels, smoothed={SMOOTHED}))


@pytest.fixture(scope="module")
def decoded(file):
    """The same model with plain weights: what codes, smoothing and branch stand for."""
    weights = {f"{name}.weight": file.weight(name) for name in file.layers}
    save_file(load_file(TINY) | weights, file.path.with_name("decoded.safetensors"))
    return stock("decoded.safetensors")


NEAR = {"exact": 1e-3, "auto": 0.03}
"""How near a layer is to its weight: decoded, or with codes and inputs in int8, as a CPU multiplies it."""


def ours(name=NAME, **inputs):
    return node("TesseraDiffusionModelLoader").execute(name, **inputs).args[0]


def stock(name=NAME):
    import nodes

    return nodes.UNETLoader().load_unet(name, "default")[0]


def correct(model, lora, strength):
    return node("TesseraCorrectionLoRA").execute(model, lora, strength).args[0]


def noise(columns=256):
    return torch.randn(1, 7, columns, generator=torch.Generator().manual_seed(0))


def forward(model, layer):
    """(input, the layer's output) on the injected model, as a sampling step would compute it."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])
    model.pre_run()
    module = model.model.get_submodule(f"diffusion_model.{layer}")
    x = noise(module.in_features)
    output = module(x)
    model.cleanup()
    return x, output


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.model.modules())


def holds(model, file, layer=NVFP4, speed="auto"):
    """Whether the layer is the whole weight: decode(codes) alone is far from it."""
    x, output = forward(model, layer)
    whole, alone = (x @ file.weight(layer, absorbed=absorbed).T for absorbed in (True, False))
    return relative(output, whole) < NEAR[speed] and relative(output, alone) > 1.5 * relative(output, whole)


# ---- what is computed


@pytest.mark.parametrize("speed", ["auto", "exact"])
def test_sampling_equals_the_decoded_weights(decoded, speed):
    assert relative(sample(ours(speed=speed)), sample(decoded)) < {"exact": 5e-3, "auto": 0.02}[speed]


@pytest.mark.parametrize("speed", ["auto", "exact"])
@pytest.mark.parametrize("layer", [NVFP4, MXFP8, SMOOTHED])
def test_each_layer_is_its_codes_and_its_branch(file, layer, speed):
    assert holds(ours(speed=speed), file, layer, speed)


def test_the_whole_weight_is_nearer_to_the_original_than_the_codes_alone(file):
    original = Checkpoint(TINY)
    for name in file.layers:
        whole, alone = file.weight(name), file.weight(name, absorbed=False)
        assert relative(whole, original.weight(name)) < relative(alone, original.weight(name)) / 2


def test_a_file_with_its_own_prefix_samples_alike(file):
    tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in load_file(file.path).items()}
    save_file(tensors, file.path.with_name("absorb_prefixed.safetensors"))
    assert torch.equal(sample(ours("absorb_prefixed.safetensors")), sample(ours()))


def test_a_packed_layer_that_detection_reads_is_decoded_with_its_branch(models):
    path = models / "diffusion_models" / "absorb_embedder.safetensors"
    file = Checkpoint(absorb(TINY, path, {"cap_embedder.1": "nvfp4"}))
    model = ours(path.name)
    layer = model.model.get_submodule("diffusion_model.cap_embedder.1")
    assert relative(layer.weight, file.weight("cap_embedder.1")) < 5e-3  # bf16
    assert not model.get_nested_additional_models()


# ---- as long as the model lives


def clone_of_a_loaded_model(model):
    forward(model, NVFP4)
    return model.clone()


COPIES = {
    "clone": lambda m: m.clone(),
    "clone of a clone": lambda m: m.clone().clone(),
    "clone of a loaded model": clone_of_a_loaded_model,
    "deep copy": lambda m: m.clone(force_deepcopy=True),
    "deep clone for another GPU": lambda m: m.deepclone_multigpu(m.load_device),
    "without dynamic loading": lambda m: m.clone(disable_dynamic=True),
    "loaded again": lambda m: m.cached_patcher_init[0](*m.cached_patcher_init[1], disable_dynamic=True),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_carry_the_branch_once(file, copy):
    model = ours()
    made = COPIES[copy](model)
    for _ in range(2):  # switching back and forth
        assert holds(made, file) and holds(model, file)


def test_unloading_leaves_no_hook_and_reloading_brings_the_branch_back(file):
    import comfy.model_management

    model = ours()
    before = sample(model)
    comfy.model_management.unload_all_models()
    assert hooks(model) == 0
    assert torch.equal(sample(model), before) and holds(model, file)


def test_every_byte_of_the_branches_is_accounted(file):
    import comfy.model_management

    model = ours()
    [side] = model.get_nested_additional_models()
    stored = sum(spec.nbytes for key, spec in file.tensors.items() if key.rpartition(".")[2] in BRANCH)
    assert side.model_size() == stored
    assert not any(part in key for key in model.model.state_dict() for part in BRANCH)
    comfy.model_management.load_models_gpu([model, side])
    assert side.loaded_size() == stored and side.load_device == model.load_device


def test_a_released_model_is_freed():
    import comfy.model_management

    model = ours()
    sample(model, steps=1)
    alive = weakref.ref(model.model)
    comfy.model_management.unload_all_models()
    del model
    gc.collect()
    comfy.model_management.cleanup_models()
    gc.collect()
    assert alive() is None


# ---- what the user is told


def test_the_log_and_the_node_say_that_branches_run(file, caplog):
    from tessera import host

    with caplog.at_level(logging.INFO):
        model = ours()
    line = f"{len(file.layers)} layers with a low-rank branch inside the file (absorb mode): always on"
    assert f"{NAME}: {line}" in caplog.text and line in "\n".join(host.plan_lines(model))
    assert "unexpected" not in caplog.text and "missing" not in caplog.text


@pytest.mark.parametrize(("layer", "level", "words"), [
    (INT8, logging.ERROR, r"1 of \d+ layers ran past their absorbed branch, .*: do not trust this picture\. Quantize"),
    (NVFP4, logging.WARNING, r"1 of \d+ absorbed branches were not used .*: their layers did not run; if another ext"),
], ids=["int8", "nvfp4"])  # fmt: skip
def test_a_layer_that_runs_past_its_branch_is_reported_once(layer, level, words, caplog):
    """Only int8 layers have a fused linear (`linear_input_act`): there the picture is wrong for sure."""
    model = ours()
    with PastHooks(model, f"diffusion_model.{layer}"):
        for _ in range(2):
            sample(model, steps=2)
            model.eject_model()
    [told] = [record for record in caplog.records if re.search(words, record.getMessage())]
    assert told.levelno == level and layer in told.getMessage()
    assert "correction" not in told.getMessage() or layer == INT8  # there it is the way out


def test_the_slider_explains_that_there_is_nothing_to_slide(file):
    from tessera.nodes.lora import BESIDE

    with pytest.raises(ValueError, match=rf"absorb model: .* {len(file.layers)} layers .* always fully on, .*another"):
        correct(ours(), BESIDE, 0.5)
    with pytest.raises(ValueError, match=r"its loader has dropped .*Load Diffusion Model \(Tessera\)"):
        correct(stock(), BESIDE, 0.5)


def test_another_lora_stacks_on_the_branch(file, tiny, models):
    model = ours()
    base = f"diffusion_model.{NVFP4}"
    stored = load_file(models / "loras" / tiny["lora"])
    delta = stored[f"{base}.lora_up.weight"].float() @ stored[f"{base}.lora_down.weight"].float()
    x, before = forward(model, NVFP4)
    for strength in (0.5, 1.0):
        added = forward(correct(model, tiny["lora"], strength), NVFP4)[1] - before
        assert relative(added, strength * x @ delta.T) < 2e-3
    assert torch.equal(forward(model, NVFP4)[1], before)


def test_the_stock_loader_warns_and_is_wrong(decoded, tiny, caplog):
    """Figures as in docs/format.md: what a picture is worth without its branches."""
    with caplog.at_level(logging.WARNING):
        alone = stock()
    assert "unet unexpected" in caplog.text and f"{NVFP4}.absorb_up" in caplog.text
    truth, mine, theirs = (picture(sample(model)) for model in (stock(tiny["bf16"]), ours(), alone))
    assert psnr(mine, truth) > psnr(theirs, truth) + 15


# ---- files that have lost something


@pytest.mark.parametrize(("edit", "words"), [
    (lambda t: [t.pop(f"{NVFP4}.{part}") for part in BRANCH], f"{NVFP4}: absorb_up and absorb_down are missing, but"),
    (lambda t: t.pop(f"{NVFP4}.absorb_down"), f"{NVFP4}: absorb_down is missing, half a branch"),
])  # fmt: skip
def test_files_without_all_their_branches_are_refused_before_loading(file, edit, words):
    from safetensors import safe_open

    with safe_open(file.path, "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(file.path)
    edit(tensors)
    save_file(tensors, file.path.with_name("absorb_lost.safetensors"), metadata=metadata)
    with pytest.raises(ValueError, match=rf"absorb_lost\.safetensors: {words}"):
        ours("absorb_lost.safetensors")


def test_a_branch_that_comes_to_no_layer_is_refused(file):
    tensors = load_file(file.path)
    tensors |= {key.replace(NVFP4, "layers.0.elsewhere"): t.clone() for key, t in tensors.items() if NVFP4 in key}
    save_file(tensors, file.path.with_name("absorb_stray.safetensors"))
    count = len(file.layers)
    with pytest.raises(ValueError, match=rf"absorb_stray\.safetensors: only {count} of {count + 1} branches belong"):
        ours("absorb_stray.safetensors")


# ---- pre_quant_scale and input_scale


@pytest.fixture(scope="module")
def plain_layer(models):
    """Saves the tiny model with one layer in a format and extra entries -> file name."""

    def save(name, label, **extra):
        tensors = load_file(TINY)
        weight = tensors.pop(f"{NVFP4}.weight").float()
        format = formats.parse(label).for_shape(*weight.shape)
        entries = format.pack(format.encode(weight / extra.get("pre_quant_scale", torch.ones(1)).float()))
        entries |= {"comfy_quant": formats.marker(format.record())} | extra
        tensors |= {f"{NVFP4}.{suffix}": tensor.contiguous() for suffix, tensor in entries.items()}
        save_file(tensors, models / "diffusion_models" / name)
        return name

    return save


SCALE = torch.exp2(torch.arange(256) % 5 - 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pre_quant_scale_is_applied_once_by_every_loader(plain_layer, models, dtype):
    name = plain_layer("smoothed.safetensors", "nvfp4", pre_quant_scale=SCALE.to(dtype))
    file = Checkpoint(models / "diffusion_models" / name)
    entries, layer = file.entries(file.layers[NVFP4]), file.layers[NVFP4]
    weight = layer.format.decode(layer.format.unpack(entries, *layer.shape)) * SCALE
    assert torch.equal(file.weight(NVFP4), weight)
    x, output = forward(ours(name), NVFP4)  # transcoded: folded back
    assert relative(output, x @ weight.T) < NEAR["auto"]
    for model in (ours(name, speed="exact"), stock(name)):
        x, output = forward(model, NVFP4)
        assert relative(output, x @ weight.T) < 1e-5
        assert model.model.get_submodule(f"diffusion_model.{NVFP4}").pre_quant_scale.dtype == dtype  # kept as written
        half = model.model.get_submodule(f"diffusion_model.{NVFP4}")(x.bfloat16())
        assert relative(half, x @ weight.T) < 1e-2


def test_the_branch_sees_the_input_before_the_smoothing(file):
    assert holds(ours(speed="exact"), file, SMOOTHED, "exact")
    x, output = forward(ours(speed="exact"), SMOOTHED)
    wrong = x @ file.weight(SMOOTHED, absorbed=False).T + (x * (torch.arange(256) % 4 - 2.0).exp2()) @ (
        file.branch(SMOOTHED).weight().T
    )
    assert relative(output, wrong) > 0.1


@pytest.mark.parametrize("label", ["mxfp8", "int8_row", "int8_convrot_64", "fp8_e4m3"])
def test_only_nvfp4_honours_pre_quant_scale_so_that_others_are_refused(plain_layer, label, caplog):
    name = plain_layer(f"smoothed_{label}.safetensors", label, pre_quant_scale=SCALE)
    with pytest.raises(ValueError, match=rf"{name}: {NVFP4}: ComfyUI ignores the pre_quant_scale of"):
        ours(name)
    with caplog.at_level(logging.WARNING):
        layer = stock(name).model.get_submodule(f"diffusion_model.{NVFP4}")
    assert not hasattr(layer, "pre_quant_scale") and f"{NVFP4}.pre_quant_scale" in caplog.text


def test_input_scale_loads_and_changes_nothing_where_activations_stay_exact(plain_layer, caplog):
    name = plain_layer("static.safetensors", "nvfp4", input_scale=torch.tensor(0.002))
    plain = plain_layer("dynamic.safetensors", "nvfp4")
    with caplog.at_level(logging.WARNING):
        for load in (lambda name: ours(name, speed="exact"), stock):
            assert load(name).model.get_submodule(f"diffusion_model.{NVFP4}").input_scale.shape == ()
            assert torch.equal(forward(load(name), NVFP4)[1], forward(load(plain), NVFP4)[1])
    assert "unexpected" not in caplog.text


def test_input_scale_has_the_meaning_of_weight_scale_2(models):
    """x ~ e2m1 * (input_scale * e4m3): amax / 2688 just holds the largest, a smaller one clips."""
    import comfy.quant_ops

    x = noise()[0]
    for factor, largest in ((1.0, x.abs().max()), (0.5, x.abs().max() / 2)):
        scale = factor * x.abs().max() / 2688
        stored = comfy.quant_ops.QuantizedTensor.from_float(x, "TensorCoreNVFP4Layout", scale=scale)
        assert stored._params.scale == scale
        torch.testing.assert_close(stored.dequantize().abs().max(), largest, rtol=1e-3, atol=0)
