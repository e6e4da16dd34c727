"""Inside the real ComfyUI: LoRAs of its own nodes run beside our models' layers; what cannot is rounded fairly."""

import gc
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import comfy_host
import lora_models
import lora_reference as reference
import test_host_clip as clips
from comfy_host import node, relative
from test_host_clip import encoder, quantized  # noqa: F401 fixtures

pytestmark = pytest.mark.host
TRUNK = "diffusion_model."
QKV, W1, W2 = (f"layers.1.{name}" for name in ("attention.qkv", "feed_forward.w1", "feed_forward.w2"))
FORMATS = ("nvfp4", "mxfp8", "int8_convrot")
MERGED = {"nvfp4": (0.08, 0.14), "mxfp8": (0.03, 0.02), "int8_convrot": (0.015, 0.0)}
"""Relative error of a merged weight: ours at most, the host's at least. Unmerged .095, .027, .009 of another weight."""


@pytest.fixture(scope="module", params=FORMATS)
def format(request):
    return request.param


@pytest.fixture(scope="module")
def model(models, format):
    return load(models, format)


@pytest.fixture(scope="module")
def nvfp4(models):
    return load(models, "nvfp4")


def load(models, format, loader="ours, exact"):
    return lora_models.load(loader, lora_models.file_of(models, "zimage", format))


@pytest.fixture(scope="module")
def style(models):
    """A plain LoRA of five layers, one of them by slices, of 10 % of the weights -> file name."""
    own = load_file(comfy_host.TINY)
    layers = {f"{TRUNK}{layer}": own[f"{layer}.weight"] for layer in (W1, W2, "noise_refiner.0.attention.out")}
    for number, name in enumerate(("to_q", "to_k", "to_v")):
        layers[f"transformer.layers.1.attention.{name}"] = own[f"{QKV}.weight"][256 * number : 256 * number + 256]
    return save(models, "style_guard", layers)


def save(models, name, layers, scale=0.1, others=None, rank=4):
    generator, tensors = torch.Generator().manual_seed(len(name)), dict(others or {})
    for base, weight in layers.items():
        up = torch.randn(weight.shape[0], rank, generator=generator)
        down = torch.randn(rank, weight.shape[1], generator=generator)
        up *= scale * weight.float().norm() / (up @ down).norm()
        tensors |= {f"{base}.lora_up.weight": up, f"{base}.lora_down.weight": down, f"{base}.alpha": torch.tensor(4.0)}
    save_file(tensors, models / "loras" / f"{name}.safetensors")
    return f"{name}.safetensors"


def stock_lora(model, file, strength=1.0, loader=None):
    import nodes

    return (loader or nodes.LoraLoaderModelOnly()).load_lora_model_only(model, file, strength)[0]


def stack(patcher):
    from tessera.host import stacking

    return [(entry, strength) for entry, strength, _ in stacking.entries(patcher)]


def layers_with(patcher, names=(QKV, W1, W2)):
    generator = torch.Generator().manual_seed(3)
    inputs = {}
    for name in names:
        module = patcher.model.get_submodule(f"{TRUNK}{name}")
        inputs[f"{TRUNK}{name}"] = torch.randn(1, 64, module.in_features, generator=generator)
    return inputs


def check(patcher, base, files, bound=2e-4, layers=(QKV, W1, W2)):
    """What the layers add to the base's outputs is what the files add to the decoded weights, in fp32."""
    inputs, before = layers_with(base, layers), reference.weights(base)
    after = reference.changed(base, files, before)
    without, found = reference.outputs(base, inputs), reference.outputs(patcher, inputs)
    for layer, x in inputs.items():
        wanted = reference.product(after, layer, x) - reference.product(before, layer, x)
        assert relative(found[layer] - without[layer], wanted) < bound, layer
    assert all(torch.equal(reference.outputs(base, inputs)[layer], y) for layer, y in without.items())


@pytest.mark.parametrize("loader", ["LoraLoaderModelOnly", "LoraLoader"])
def test_a_stock_node_gives_the_decoded_weight_and_its_delta(models, model, style, loader):
    import nodes

    made = stock_lora(model, style, 0.7) if loader == "LoraLoaderModelOnly" else (
        nodes.LoraLoader().load_lora(model, None, style, 0.7, 0.7)[0])  # fmt: skip
    assert not made.patches and len(stack(made)) == 1
    check(made, model, [(models / "loras" / style, 0.7)])


def test_every_kind_through_a_stock_node_is_what_our_node_gives(models, nvfp4):
    """Norms and a token, which only the host patches, included."""
    from tessera import host

    file, call = lora_models.every_kind(models, "zimage"), lora_models.call("zimage")
    mine = host.attach_file(nvfp4, str(file), 0.7)[0]
    made = stock_lora(nvfp4, file.name, 0.7)
    assert {key.removeprefix(TRUNK) for key in made.patches} == {
        "layers.0.attention_norm1.weight", "layers.1.ffn_norm1.weight", "layers.2.attention.q_norm.weight",
        "x_pad_token"}  # fmt: skip
    assert relative(reference.answer(made, call), reference.answer(mine, call)) < 1e-5
    assert relative(reference.answer(made, call), reference.answer(nvfp4, call)) > 0.05


def test_the_host_is_told_which_keys_were_patched_all_the_same(models, nvfp4):
    """LoraLoader warns NOT LOADED of the others."""
    patches = loaded_patches(models, nvfp4, lora_models.every_kind(models, "zimage").name)
    clone, plain = nvfp4.clone(), load(models, "nvfp4", "stock").clone()
    assert set(clone.add_patches(patches, 0.5)) == set(plain.add_patches(patches, 0.5)) == set(patches)


def loaded_patches(models, patcher, file):
    import comfy.lora

    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    return comfy.lora.load_lora(load_file(models / "loras" / file), keys, log_missing=False)


def test_models_of_the_stock_loader_are_left_alone_with_a_hint(models, style):
    from tessera.host import guard

    plain = load(models, "nvfp4", "stock")
    made = stock_lora(plain, style)
    assert len(made.patches) == 4 and not stack(made)
    assert "4 quantized layers have a LoRA merged by ComfyUI" in guard.merged_hint(made)
    assert "load the model with Tessera's loader" in guard.merged_hint(made) and guard.merged_hint(plain) is None


def test_chained_nodes_add_up_in_any_order(models, nvfp4, style):
    own = load_file(comfy_host.TINY)
    other = save(models, "other_guard", {f"{TRUNK}{W1}": own[f"{W1}.weight"], f"{TRUNK}{QKV}": own[f"{QKV}.weight"]})
    one = stock_lora(stock_lora(nvfp4, style, 0.5), other, -1.0)
    two = stock_lora(stock_lora(nvfp4, other, -1.0), style, 0.5)
    check(one, nvfp4, [(models / "loras" / style, 0.5), (models / "loras" / other, -1.0)])
    inputs = layers_with(nvfp4)
    first, second = reference.outputs(one, inputs), reference.outputs(two, inputs)
    assert all(torch.equal(first[layer], second[layer]) for layer in inputs)


def test_two_clones_keep_their_own_strengths(models, nvfp4, style):
    weak, strong = stock_lora(nvfp4, style, 0.3), stock_lora(nvfp4, style, 1.5)
    for _ in range(2):
        check(weak, nvfp4, [(models / "loras" / style, 0.3)])
        check(strong, nvfp4, [(models / "loras" / style, 1.5)])


def test_deep_copies_carry_it_and_guard_what_comes(models, nvfp4, style):
    made = stock_lora(nvfp4, style, 0.5)
    for copy in (made.clone(force_deepcopy=True), made.deepclone_multigpu(made.load_device)):
        assert copy.model is not nvfp4.model
        check(copy, nvfp4, [(models / "loras" / style, 0.5)])
        again = stock_lora(copy, style, 0.25)
        assert not again.patches
        check(again, nvfp4, [(models / "loras" / style, 0.75)])


def test_a_clone_for_torch_compile_is_guarded(models, nvfp4, style):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    compiled = TorchCompileModel.execute(stock_lora(nvfp4, style, 0.5), "eager").args[0]
    more = stock_lora(compiled, style, 0.25)
    assert not more.patches and [strength for _, strength in stack(more)] == [0.25, 0.5]


def test_patchers_are_freed_with_their_last_reference(nvfp4, style):
    gc.collect()
    gc.disable()  # what only a collector finds would stay on the GPU until it runs
    try:
        made = stock_lora(nvfp4, style)
        clone = made.clone()
        alive = [weakref.ref(made), weakref.ref(clone)]
        del made, clone
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


def test_moving_the_slider_of_a_stock_node_writes_no_weight_and_fits_nothing(nvfp4, style, monkeypatch):
    import comfy.model_management
    import comfy.model_patcher
    import nodes

    loader, writes = nodes.LoraLoaderModelOnly(), []
    first = stock_lora(nvfp4, style, 0.2, loader)
    reference.outputs(first, layers_with(nvfp4))
    before = {layer: (codes.data_ptr(), codes.clone()) for layer, codes in codes_of(nvfp4).items()}
    for name in ("patch_weight_to_device", "unpatch_model", "load"):
        original = getattr(comfy.model_patcher.ModelPatcher, name)

        def counted(patcher, *args, original=original, name=name, **kwargs):
            writes.append((name, patcher.model is nvfp4.model and bool(patcher.patches)))
            return original(patcher, *args, **kwargs)

        monkeypatch.setattr(comfy.model_patcher.ModelPatcher, name, counted)
    monkeypatch.setattr("tessera.host.stacking.form", lambda *args: pytest.fail("fitted again"))
    moved = stock_lora(nvfp4, style, 0.9, loader)
    assert moved.patches_uuid == nvfp4.patches_uuid and stack(moved)[0][0] is stack(first)[0][0]
    reference.outputs(moved, layers_with(nvfp4))
    assert not [name for name, patched in writes if name == "patch_weight_to_device" or patched]
    for layer, codes in codes_of(nvfp4).items():
        pointer, value = before[layer]
        assert codes.data_ptr() == pointer and torch.equal(codes, value), layer


def codes_of(patcher):
    layers = {name: getattr(module, "weight", None) for name, module in patcher.model.named_modules()}
    return {name: weight._qdata for name, weight in layers.items() if hasattr(weight, "_qdata")}


def test_a_file_read_again_is_known_by_its_content(nvfp4, style):
    """Some packs read the file at every execution."""
    first, second = stock_lora(nvfp4, style, 0.2), stock_lora(nvfp4, style, 0.3)
    assert stack(first)[0][0] is stack(second)[0][0]


def test_strength_zero_touches_nothing(nvfp4, style):
    clone = nvfp4.clone()
    assert clone.add_patches({f"{TRUNK}{W1}.weight": ("diff", (torch.ones(768, 256),))}, 0.0)
    assert not clone.patches and not stack(clone) and clone.patches_uuid == nvfp4.patches_uuid


def test_the_setting_off_leaves_merging_to_the_host(nvfp4, style, monkeypatch):
    from tessera.host import guard

    monkeypatch.setenv("TESSERA_MERGE_GUARD", "0")
    made = stock_lora(nvfp4, style)
    assert len(made.patches) == 4 and not stack(made) and made.patches_uuid != nvfp4.patches_uuid
    assert "rounded without bias" in guard.merged_hint(made)


def test_a_merged_lora_is_rounded_without_bias(models, format, monkeypatch):
    """algorithms.md 14: the host's dither doubles the error of NVFP4, true rounding adds a fifth of it."""
    monkeypatch.setenv("TESSERA_MERGE_GUARD", "0")
    own = load_file(comfy_host.TINY)
    file = save(models, "merged_guard", {f"{TRUNK}{name}": own[f"{name}.weight"] for name in (QKV, W1, W2)}, 0.02)
    errors, gains = {}, {}
    for loader in ("ours, exact", "stock"):
        plain = load(models, format, loader)
        wanted = reference.changed(plain, [(models / "loras" / file, 1.0)])
        before, made = reference.weights(plain), stock_lora(plain, file)
        reference.load(made)
        found = reference.weights(made)
        keys = [f"{TRUNK}{name}.weight" for name in (QKV, W1, W2)]
        errors[loader] = max(relative(found[key], wanted[key]) for key in keys)
        moved = torch.cat([(found[key] - before[key]).flatten() for key in keys])
        delta = torch.cat([(wanted[key] - before[key]).flatten() for key in keys])
        gains[loader] = ((moved * delta).sum() / delta.square().sum()).item()
        reference.load(plain)
        again = reference.weights(plain)
        assert all(torch.equal(again[key], before[key]) for key in keys)
    most, least = MERGED[format]
    assert errors["ours, exact"] < most and errors["stock"] > least, errors
    assert 0.9 < gains["ours, exact"] < 1.1, gains


def test_a_merge_that_changes_nothing_moves_no_value(model, monkeypatch):
    """The host's dither moves 44 % of the bytes of an NVFP4 weight that a LoRA touches with zero effect."""
    monkeypatch.setenv("TESSERA_MERGE_GUARD", "0")
    clone, keys = model.clone(), [f"{TRUNK}{name}.weight" for name in (QKV, W1, W2)]
    before = reference.weights(model)
    clone.add_patches({key: ("diff", (torch.zeros(before[key].shape),)) for key in keys}, 1.0)
    reference.load(clone)
    found = reference.weights(clone)
    for key in keys:
        assert torch.equal(found[key], before[key]), key
    reference.load(model)


def test_what_cannot_run_beside_a_layer_is_merged_and_said(models, nvfp4, caplog):
    """A slice of the inputs, another pack's function, an adapter of another pack's."""
    import comfy.weight_adapter

    class Other(comfy.weight_adapter.LoRAAdapter):
        pass

    up, down, key = torch.randn(768, 2), torch.randn(2, 256), f"{TRUNK}{W1}.weight"
    adapter = comfy.weight_adapter.LoRAAdapter(set(), (up, down, None, None, None, None))
    patches = {
        (key, (1, 0, 64)): ("diff", (torch.ones(768, 64),)),
        (key, None, lambda delta: delta * 2): adapter,
        f"{TRUNK}{W2}.weight": Other(set(), (torch.randn(256, 2), torch.randn(2, 768), None, None, None, None)),
    }
    clone = nvfp4.clone()
    clone.add_patches(patches, 0.5)
    assert [len(clone.patches[k]) for k in (key, f"{TRUNK}{W2}.weight")] == [2, 1] and not stack(clone)
    assert "2 layers get it merged, rounded without bias" in caplog.text


def test_halves_that_change_places_are_taken_in_the_hosts_order(nvfp4):
    import comfy.utils
    import comfy.weight_adapter

    up, down, key = torch.randn(768, 2), torch.randn(2, 256), f"{TRUNK}{W1}.weight"
    adapter = comfy.weight_adapter.LoRAAdapter(set(), (up, down, None, None, None, None))
    clone = nvfp4.clone()
    clone.add_patches({(key, None, comfy.utils.swap_scale_shift): adapter}, 1.0)
    assert not clone.patches
    [x] = layers_with(nvfp4, [W1]).values()
    layer = f"{TRUNK}{W1}"
    added = reference.outputs(clone, {layer: x})[layer] - reference.outputs(nvfp4, {layer: x})[layer]
    assert relative(added, x @ comfy.utils.swap_scale_shift(up @ down).T) < 1e-4


def test_the_correction_lora_is_rescued_whatever_the_setting(tiny, monkeypatch, caplog):
    monkeypatch.setenv("TESSERA_MERGE_GUARD", "0")
    base = node("TesseraDiffusionModelLoader").execute(tiny["model"], speed="exact").args[0]
    made = stock_lora(base, tiny["lora"])
    assert [entry.correction for entry, _ in stack(made)] == [True] and not made.patches
    assert "got this model's correction LoRA, which merging would lose" in caplog.text
    mine = node("TesseraCorrectionLoRA").execute(base, tiny["lora"], 1.0).args[0]
    call = lora_models.call("zimage")
    assert relative(reference.answer(made, call), reference.answer(mine, call)) < 1e-6
    style = {f"{TRUNK}layers.0.feed_forward.w1.weight": ("diff", (torch.ones(768, 256),))}
    other = base.clone()
    other.add_patches(style, 1.0)
    assert other.patches and not stack(other)


def test_a_saved_model_has_the_lora_in_its_weights(models, nvfp4, style):
    from comfy_extras.nodes_model_merging import ModelSave

    made, node_ = stock_lora(nvfp4, style), ModelSave()
    node_.output_dir = str(models / "saved")
    node_.save(made, "with_lora")
    [file] = (models / "saved").glob("with_lora*.safetensors")
    saved = models / "diffusion_models" / "saved_guard.safetensors"
    save_file({key.removeprefix("model.diffusion_model."): value for key, value in load_file(file).items()}, saved)
    again = node("TesseraDiffusionModelLoader").execute(saved.name, speed="exact").args[0]
    wanted = reference.changed(nvfp4, [(models / "loras" / style, 1.0)])
    found = reference.weights(again)
    for name in (QKV, W1):
        assert relative(found[f"{TRUNK}{name}.weight"], wanted[f"{TRUNK}{name}.weight"]) < 0.12
    check(made, nvfp4, [(models / "loras" / style, 1.0)])  # which itself is as it was


def test_scaling_a_weight_gives_its_lora_back_to_be_scaled_too(models, nvfp4, style):
    """What merging nodes do to each weight: strength_model."""
    import comfy.lora

    made, key = stock_lora(nvfp4, style), f"{TRUNK}{W1}.weight"
    made = made.clone()
    made.add_patches({key: ("diff", (torch.ones(768, 256),))}, 0.5, 0.25)
    assert list(made.patches) == [key] and len(made.patches[key]) == 2
    [(rest, _)] = stack(made)
    assert f"{TRUNK}{W1}" not in rest.layers and len(rest.changes) == 5
    check(made, nvfp4, [(models / "loras" / style, 1.0)], layers=(QKV, W2))
    before, wanted = reference.weights(nvfp4)[key], reference.changed(nvfp4, [(models / "loras" / style, 1.0)])[key]
    found = comfy.lora.calculate_weight(made.patches[key], before.clone(), key)
    assert relative(found, 0.25 * wanted + 0.5) < 1e-5


def test_a_lora_that_enlarges_a_layer_stays_in_it_with_all_others(nvfp4):
    """As Flux control LoRAs do; beside the layer nothing would fit the wider input."""
    import comfy.weight_adapter

    def adapter(columns, reshape=None):
        up, down = torch.randn(256, 2), torch.randn(2, columns)
        return comfy.weight_adapter.LoRAAdapter(set(), (up, down, None, None, None, reshape))

    key, other = f"{TRUNK}x_embedder.weight", f"{TRUNK}{W2}.weight"
    clone = nvfp4.clone()
    width = clone.model.get_submodule(f"{TRUNK}x_embedder").in_features
    clone.add_patches({key: adapter(width), other: adapter(768)})
    assert not clone.patches
    clone.add_patches({key: adapter(2 * width, [256, 2 * width]), other: adapter(768)})
    clone.add_patches({key: adapter(2 * width)})
    assert list(clone.patches) == [key] and len(clone.patches[key]) == 3
    assert [entry.layers for entry, _ in stack(clone)] == [(f"{TRUNK}{W2}",)] * 2


def test_a_chain_of_nodes_does_not_reach_the_model_that_is_loaded(nvfp4, style):
    """The host injects a clone of a loaded model at each add_patches, into the weights that both share."""
    inputs = layers_with(nvfp4)
    before = reference.outputs(nvfp4, inputs)
    stock_lora(stock_lora(nvfp4, style), style)
    assert all(torch.equal(nvfp4.model.get_submodule(layer)(x), before[layer]) for layer, x in inputs.items())


def test_a_loaded_models_own_patches_act_at_once(models, nvfp4, style):
    made = nvfp4.clone()
    reference.load(made)
    made.add_patches(loaded_patches(models, made, style), 0.5)
    check(made, nvfp4, [(models / "loras" / style, 0.5)])


def test_a_text_encoders_lora_runs_beside_it_too(models, quantized):  # noqa: F811
    import nodes

    clip = clips.ours(quantized("nvfp4"), "exact")
    name = "qwen3_4b.transformer.model.layers.1.mlp.up_proj"
    weight = torch.ones(clips.LINEARS["mlp.up_proj"])
    file = save(models, "text_guard", {f"text_encoders.{name}": weight}, scale=0.01)
    made = nodes.LoraLoader().load_lora(None, clip, file, 0.0, 0.5)[1]
    assert not made.patcher.patches and [strength for _, strength in stack(made.patcher)] == [0.5]
    x = torch.randn(1, 64, weight.shape[1], generator=torch.Generator().manual_seed(1))
    pair = load_file(models / "loras" / file)
    delta = pair[f"text_encoders.{name}.lora_up.weight"] @ pair[f"text_encoders.{name}.lora_down.weight"]
    found, without = (reference.outputs(c.patcher, {name: x})[name] for c in (made, clip))
    assert relative(found - without, 0.5 * x @ delta.T) < 1e-3
    assert not torch.equal(clips.encode(made), clips.encode(clip))


def test_a_layer_that_the_host_multiplies_past_its_module_is_left_to_merging(models):
    from comfy.ldm.minimax import model as minimax

    from tessera.host import patchable

    fused = {name: patchable.fused_in(cls) for name, cls in vars(minimax).items() if isinstance(cls, type)}
    assert {"fc2"} in [set(found) for found in fused.values()]
    assert patchable.fused_in(torch.nn.Linear) == frozenset()


def test_the_setting_is_what_the_frontend_keeps(models, monkeypatch):
    from pathlib import Path

    import folder_paths

    from tessera.host import settings

    monkeypatch.delenv("TESSERA_MERGE_GUARD", raising=False)
    file = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    assert settings.merge_guard()
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        for text, wanted in ((json.dumps({settings.MERGE_GUARD: False}), False), ("{", True), ("[]", True),
                             (json.dumps({settings.MERGE_GUARD: True, "x": 1}), True), ("{}", True)):  # fmt: skip
            file.write_text(text)
            assert settings.merge_guard() is wanted, text
        file.write_text(json.dumps({settings.MERGE_GUARD: False}))
        monkeypatch.setenv("TESSERA_MERGE_GUARD", "1")
        assert settings.merge_guard()
        monkeypatch.setenv("TESSERA_MERGE_GUARD", "off")
        with pytest.raises(ValueError, match="TESSERA_MERGE_GUARD is 'off'; set it to 1"):
            settings.merge_guard()
    finally:
        file.unlink()
    script = (comfy_host.ROOT / "web" / "tessera.js").read_text()
    assert f'id: "{settings.MERGE_GUARD}"' in script and "defaultValue: true" in script
