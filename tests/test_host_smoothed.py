"""Inside the real ComfyUI: LoRAs of its own nodes on layers with a pre_quant_scale, merged, offloaded and dynamic."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from absorbing import absorb
from comfy_host import TINY, node, relative
from tessera import formats
from tessera.checkpoint import Checkpoint

pytestmark = pytest.mark.host
LAYER = "layers.0.feed_forward.w1"
KEY = f"diffusion_model.{LAYER}"
SMOOTHED, PLAIN, ABSORBED = "smoothed_layer.safetensors", "unsmoothed_layer.safetensors", "absorb_layer.safetensors"
LORA = "random"


@pytest.fixture(scope="module", autouse=True)
def effect(models):
    """Saves one nvfp4 layer with and without smoothing, in absorb mode, and LoRAs for it -> delta [out, in]."""
    draw = torch.Generator().manual_seed(1)
    for name, scale in ((SMOOTHED, torch.randn(256, generator=draw).div(2).exp()), (PLAIN, None)):
        tensors = load_file(TINY)
        weight = tensors.pop(f"{LAYER}.weight").float()
        format = formats.parse("nvfp4").for_shape(*weight.shape)
        entries = format.pack(format.encode(weight if scale is None else weight / scale))
        entries |= {"comfy_quant": formats.marker(format.record())}
        entries |= {} if scale is None else {"pre_quant_scale": scale}
        tensors |= {f"{LAYER}.{suffix}": tensor.contiguous() for suffix, tensor in entries.items()}
        save_file(tensors, models / "diffusion_models" / name)
    absorb(TINY, models / "diffusion_models" / ABSORBED, {LAYER: "nvfp4"}, smoothed={LAYER})
    up, down = torch.randn(768, 8, generator=draw), torch.randn(8, 256, generator=draw)
    up *= weight.norm() / (up @ down).norm()  # as large as the weight, far above what rounding does
    pair = {f"{KEY}.lora_up.weight": up, f"{KEY}.lora_down.weight": down}
    save_file(pair, models / "loras" / f"{LORA}.safetensors")
    save_file(pair | {f"{KEY}.dora_scale": (weight + up @ down).norm(dim=1, keepdim=True)},
              models / "loras" / "dora.safetensors")  # fmt: skip
    return up @ down


@pytest.fixture(autouse=True)
def merging(monkeypatch):
    """The merge guard would run these LoRAs beside the layers."""
    monkeypatch.setenv("TESSERA_MERGE_GUARD", "0")


def ours(name, speed="exact"):
    """Smoothed layers as they are stored; `auto` transcodes them on a CPU, without smoothing."""
    return node("TesseraDiffusionModelLoader").execute(name, speed=speed).args[0]


def with_lora(model, strength=1.0, name=LORA):
    import nodes

    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, f"{name}.safetensors", strength)[0]


def layer_of(model):
    return model.model.get_submodule(KEY)


def inputs(name):
    """What smoothing is made for: channels as unequal as the layer's pre_quant_scale makes them equal."""
    x = torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(0))
    return x if name == PLAIN else x / layer_of(ours(name)).pre_quant_scale


def merged(model, x):
    """The layer's output with the model loaded whole, as `load_models_gpu` does it."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])
    model.pre_run()
    output = layer_of(model)(x)
    model.cleanup()
    return output


def offloaded(model, x):
    """With every layer offloaded: the host patches decoded weights at each call."""
    model.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    try:
        assert len(layer_of(model).weight_function) == len(model.patches) <= 1
        return layer_of(model)(x)
    finally:
        model.unpatch_model(torch.device("cpu"))


def partly_unloaded(model, x):
    """Loaded whole first, then freed: the host takes the merged weight out and patches at each call."""
    model.patch_model(torch.device("cpu"))
    try:
        model.partially_unload(torch.device("cpu"), 1 << 40)
        assert len(layer_of(model).weight_function) == len(model.patches) <= 1
        return layer_of(model)(x)
    finally:
        model.unpatch_model(torch.device("cpu"))


def dynamic(model, x, resident=False, want_requant=False):
    """With dynamic VRAM, from where a weight has been copied to the device: the rest needs CUDA's virtual memory."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.ops
    from comfy.model_patcher import LowVramPatch

    layer = layer_of(model)
    pair = [layer.weight, layer.bias]
    copied = torch.empty(comfy.memory_management.vram_aligned_size(pair), dtype=torch.uint8)
    comfy.model_management.cast_to_gathered(pair, copied)
    layer.seed_key = KEY
    layer.weight_lowvram_function = LowVramPatch(f"{KEY}.weight", model.patches) if model.patches else None
    geometry = comfy.memory_management.tensors_to_geometries(pair)
    layer._prefetch = {"signature": 1 if resident else None, "resident": False, "xfer_dest": copied,
                       "needs_cast": False, "cast_dest": None, "cast_geometry": geometry}  # fmt: skip
    try:
        arguments = (layer, torch.float32, torch.device("cpu"), torch.float32, torch.float32, want_requant)
        weight, _ = comfy.ops.resolve_cast_module_with_vbar(*arguments)
        if resident:  # the next call finds the patched weight on the device
            weight, _ = comfy.ops.resolve_cast_module_with_vbar(*arguments)
        weight = weight.dequantize() if hasattr(weight, "dequantize") else weight
        scale = getattr(layer, "pre_quant_scale", None)
        return (x if scale is None else x * scale) @ weight.float().T
    finally:
        layer.weight_lowvram_function = None
        del layer._prefetch


def dynamic_resident(model, x):
    return dynamic(model, x, resident=True)


def dynamic_requantized(model, x):
    return dynamic(model, x, want_requant=True)


EXACT = [offloaded, partly_unloaded, dynamic]
REQUANTIZED = [merged, dynamic_resident, dynamic_requantized]


def change(run, name, x, delta):
    """(relative error of the LoRA's effect on the output, its gain): 0 and 1 where it is exact."""
    model = ours(name)
    added, wanted = run(with_lora(model), x) - run(model, x), x @ delta.T
    return relative(added, wanted), ((added * wanted).sum() / wanted.square().sum()).item()


@pytest.mark.parametrize("run", EXACT)
@pytest.mark.parametrize("name", [SMOOTHED, PLAIN, ABSORBED])
def test_an_unmerged_lora_has_its_whole_effect(run, name, effect):
    error, gain = change(run, name, inputs(name), effect)
    assert error < 1e-5 and abs(gain - 1) < 1e-5


@pytest.mark.parametrize("run", [offloaded, partly_unloaded, merged])
@pytest.mark.parametrize("name", [SMOOTHED, ABSORBED])
def test_a_transcoded_layer_is_no_longer_smoothed_and_loras_have_their_effect(run, name, effect):
    model, x = ours(name, "auto"), inputs(name)
    assert not hasattr(layer_of(model), "pre_quant_scale") and layer_of(model).tessera_plan.path == "transcode"
    added = run(with_lora(model), x) - run(model, x)
    assert relative(added, x @ effect.T) < 0.03


@pytest.mark.parametrize("run", REQUANTIZED)
@pytest.mark.parametrize("name", [SMOOTHED, ABSORBED])
def test_a_merged_lora_is_as_near_to_its_effect_as_on_a_layer_without_smoothing(run, name, effect):
    x = inputs(name)
    (error, gain), (usual, usual_gain) = change(run, name, x, effect), change(run, PLAIN, x, effect)
    assert error < 1.1 * usual < 0.3 and abs(gain - usual_gain) < 0.03


def test_the_stock_loader_misses_most_of_its_effect(effect):
    """Nothing of ours runs there; `tessera inspect` tells which layers are smoothed."""
    import nodes

    model, x = nodes.UNETLoader().load_unet(SMOOTHED, "default")[0], inputs(SMOOTHED)
    assert relative(offloaded(with_lora(model), x) - offloaded(model, x), x @ effect.T) > 0.5


@pytest.mark.parametrize("run", [*EXACT, *REQUANTIZED])
@pytest.mark.parametrize("name", [SMOOTHED, ABSORBED])
def test_without_the_lora_the_output_is_what_it_was(run, name):
    model, x = ours(name), inputs(name)
    before, codes = run(model, x), layer_of(model).weight._qdata.clone()
    assert not torch.equal(run(with_lora(model), x), before)
    assert torch.equal(run(model, x), before) and torch.equal(layer_of(model).weight._qdata, codes)
    assert layer_of(model).weight_function == [] and layer_of(model).weight_lowvram_function is None


def test_adapters_that_look_at_the_weight_see_the_true_one(models):
    """DoRA scales each row by the norm of the whole weight."""
    import comfy.lora

    model, x, key = with_lora(ours(SMOOTHED), name="dora"), inputs(SMOOTHED), f"{KEY}.weight"
    weight = Checkpoint(models / "diffusion_models" / SMOOTHED).weight(LAYER)
    wanted = comfy.lora.calculate_weight(model.patches[key], weight, key)
    assert relative(offloaded(model, x), x @ wanted.T) < 1e-5
    assert relative(merged(model, x), x @ wanted.T) < 0.25


def test_what_is_saved_is_what_was_merged():
    model = with_lora(ours(SMOOTHED))
    saved = model.patch_weight_to_device(f"{KEY}.weight", return_weight=True)
    merged(model, inputs(SMOOTHED))
    assert torch.equal(saved._qdata, layer_of(model).weight._qdata)


def test_deep_copies_take_the_lora_too(effect):
    model, x = ours(SMOOTHED), inputs(SMOOTHED)
    clone = model.clone(force_deepcopy=True)
    assert relative(offloaded(with_lora(clone), x) - offloaded(clone, x), x @ effect.T) < 1e-5


def test_the_host_may_treat_a_wrapped_patch_as_its_own(effect):
    """Memory, prefetching and pins of dynamic VRAM ask the patch; a pin is kept in what they ask."""
    from comfy.model_patcher import LowVramPatch

    model = with_lora(ours(SMOOTHED))
    layer, own = layer_of(model), LowVramPatch(f"{KEY}.weight", model.patches)
    layer.weight_lowvram_function = own
    wrapped = layer.weight_lowvram_function
    assert wrapped is not own and wrapped.is_lowvram_patch and wrapped is layer.weight_lowvram_function
    assert wrapped.memory_required() == own.memory_required() > 0
    wrapped.prepare(None, None, copy=False, commit=True)
    assert own.prepared_patches is not None
    wrapped.clear_prepared()
    assert own.prepared_patches is None and copy.copy(wrapped).key == own.key


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_scale_that_cannot_be_undone_is_refused(models, value):
    tensors = load_file(models / "diffusion_models" / SMOOTHED)
    tensors[f"{LAYER}.pre_quant_scale"][3] = value
    save_file(tensors, models / "diffusion_models" / "no_scale.safetensors")
    with pytest.raises(ValueError, match=rf"no_scale\.safetensors: {LAYER}: pre_quant_scale has a zero or no number"):
        ours("no_scale.safetensors")
