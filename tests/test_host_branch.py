"""Inside the real ComfyUI: the correction branch behaves where core's bypass loader is known not to (host.md 5)."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_host import PastHooks, Trajectory, node, relative, sample

pytestmark = pytest.mark.host
LAYER = "diffusion_model.layers.0.feed_forward.w1"


@pytest.fixture(params=["TesseraDiffusionModelLoader", "UNETLoader"])
def model(request, tiny):
    """The quantized tiny model, from our loader and from the stock one."""
    return load(request.param, tiny["model"])


def load(loader, name):
    if loader == "UNETLoader":
        import nodes

        return nodes.UNETLoader().load_unet(name, "default")[0]
    return node(loader).execute(name).args[0]


def correct(model, lora, strength):
    return node("TesseraCorrectionLoRA").execute(model, lora, strength).args[0]


def forward(model, seed=0):
    """One layer's output [1, 7, out] on the injected model, as a sampling step would compute it."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])
    model.pre_run()
    x = torch.randn(1, 7, 256, generator=torch.Generator().manual_seed(seed))
    output = model.model.get_submodule(LAYER)(x)
    model.cleanup()
    return output


def hooks(model):
    """Branches on a model's layers: as hooks, or in layers of ours."""
    modules = list(model.model.modules())
    return sum(len(m._forward_hooks) + (getattr(m, "tessera_branch_pair", None) is not None) for m in modules)


@pytest.fixture
def pair(models, tiny):
    """The correction of LAYER: fp32 product [out, in]."""
    stored = load_file(models / "loras" / tiny["lora"])
    return stored[f"{LAYER}.lora_up.weight"].float() @ stored[f"{LAYER}.lora_down.weight"].float()


def effect(model, base, pair):
    """How many times the correction the model's layer carries: least squares of its output's difference."""
    x = torch.randn(1, 7, 256, generator=torch.Generator().manual_seed(0))
    unit, found = x @ pair.T, forward(model) - forward(base)
    factor = ((unit * found).sum() / unit.square().sum()).item()
    assert (found - factor * unit).norm() < 2e-3 * max(unit.norm() * abs(factor), 1e-3)
    return factor


def test_strength_is_linear_and_exact(model, tiny, pair):
    for strength in (0.25, 1.0, 2.0):
        assert effect(correct(model, tiny["lora"], strength), model, pair) == pytest.approx(strength, abs=2e-3)


def test_strength_zero_is_bit_identical_to_no_node(model, tiny):
    assert torch.equal(sample(correct(model, tiny["lora"], 0.0)), sample(model))


def test_no_lora_name_passes_the_model_on(model):
    """What TesseraQuantize gives where it makes no LoRA: mode absorb, rank 0, a plan without ranks."""
    assert correct(model, "", 1.0) is model


def test_nodes_stack(model, tiny, pair):
    twice = correct(correct(model, tiny["lora"], 0.5), tiny["lora"], 1.0)
    assert effect(twice, model, pair) == pytest.approx(1.5, abs=3e-3)


def test_two_clones_keep_their_own_strengths(model, tiny, pair):
    half, more = correct(model, tiny["lora"], 0.5), correct(model, tiny["lora"], 1.5)
    for _ in range(2):  # switching back and forth
        assert effect(half, model, pair) == pytest.approx(0.5, abs=2e-3)
        assert effect(more, model, pair) == pytest.approx(1.5, abs=3e-3)
        assert effect(model, model, pair) == pytest.approx(0.0, abs=1e-6)


def test_a_clone_of_a_running_model_acts_once(model, tiny, pair):
    import comfy.model_management

    fixed = correct(model, tiny["lora"], 1.0)
    comfy.model_management.load_models_gpu([fixed, *fixed.get_nested_additional_models()])
    assert effect(fixed.clone(), model, pair) == pytest.approx(1.0, abs=2e-3)


def test_deep_clones_carry_the_correction(model, tiny, pair):
    fixed = correct(model, tiny["lora"], 1.5)
    for copy in (fixed.clone(force_deepcopy=True), fixed.deepclone_multigpu(fixed.load_device)):
        assert copy.model is not fixed.model
        assert effect(copy, model, pair) == pytest.approx(1.5, abs=3e-3)
    assert effect(model, model, pair) == pytest.approx(0.0, abs=1e-6)


def test_ejecting_leaves_the_base_bit_equal_and_no_hook(model, tiny):
    before = forward(model)
    fixed = correct(correct(model, tiny["lora"], 1.0), tiny["lora"], 0.5)
    forward(fixed)
    assert not torch.equal(forward(fixed), before)
    fixed.eject_model()
    assert hooks(fixed) == 0 and torch.equal(forward(model), before)


def test_unloading_everything_leaves_no_hook(model, tiny):
    import comfy.model_management

    fixed = correct(model, tiny["lora"], 1.0)
    sample(fixed)
    comfy.model_management.unload_all_models()
    assert hooks(fixed) == 0


def test_core_bypass_beside_it_in_either_order(model, tiny, pair, models):
    import comfy.sd
    import comfy.utils

    weights = comfy.utils.load_torch_file(str(models / "loras" / tiny["lora"]))

    def bypass(model):
        return comfy.sd.load_bypass_lora_for_models(model, None, dict(weights), 1.0, 0.0)[0]

    for both in (correct(bypass(model), tiny["lora"], 0.5), bypass(correct(model, tiny["lora"], 0.5))):
        assert effect(both, model, pair) == pytest.approx(1.5, abs=0.015)


def test_every_byte_of_the_branches_is_accounted(model, tiny, models):
    import comfy.model_management

    fixed = correct(model, tiny["lora"], 1.0)
    [side] = fixed.get_nested_additional_models()
    stored = sum(t.nbytes for t in load_file(models / "loras" / tiny["lora"]).values())
    assert side.model_size() == stored
    comfy.model_management.load_models_gpu([fixed, side])
    assert side.loaded_size() == stored and side.load_device == fixed.load_device


def test_diffusers_names_change_only_their_rows(model, tiny, models):
    """to_k is the middle third of Z-Image's fused qkv; core's bypass loader drops such keys."""
    generator = torch.Generator().manual_seed(1)
    up, down = torch.randn(256, 4, generator=generator), torch.randn(4, 256, generator=generator)
    base = "transformer.layers.0.attention.to_k"
    save_file({f"{base}.lora_B.weight": up, f"{base}.lora_A.weight": down}, models / "loras" / "to_k.safetensors")
    sliced = correct(model, "to_k.safetensors", 0.01)
    qkv = "diffusion_model.layers.0.attention.qkv"
    x = torch.randn(1, 5, 256, generator=generator)
    before = model.model.get_submodule(qkv)(x)
    forward(sliced)
    sliced.inject_model()
    delta = sliced.model.get_submodule(qkv)(x) - before
    sliced.eject_model()
    assert delta[..., :256].abs().max() == 0 and delta[..., 512:].abs().max() == 0
    assert relative(delta[..., 256:512], 0.01 * x @ (up @ down).T) < 1e-3


def test_a_bias_difference_acts_as_with_cores_loader(models, tiny):
    """On a layer that is not quantized, where core's merging is exact."""
    import nodes

    generator = torch.Generator().manual_seed(2)
    name = "diffusion_model.t_embedder.mlp.0"
    model = load("UNETLoader", tiny["bf16"])
    layer = model.model.get_submodule(name)
    pair = {"lora_up.weight": torch.randn(layer.out_features, 4, generator=generator) * 0.02,
            "lora_down.weight": torch.randn(4, layer.in_features, generator=generator) * 0.02}  # fmt: skip
    bias = torch.randn(layer.out_features, generator=generator)
    for file, extra in (("pair.safetensors", {}), ("biased.safetensors", {"diff_b": bias})):
        save_file({f"{name}.{k}": v for k, v in (pair | extra).items()}, models / "loras" / file)
    x = torch.randn(3, layer.in_features, generator=generator)
    for strength in (0.5, 1.0):
        for attach in (correct, nodes.LoraLoaderModelOnly().load_lora_model_only):
            found = []
            for file in ("pair.safetensors", "biased.safetensors"):
                made = attach(model, file, strength)
                made = made if attach is correct else made[0]
                forward(made)  # loads and patches
                made.inject_model()
                found.append(made.model.get_submodule(name)(x))
                made.eject_model()
            torch.testing.assert_close(found[1] - found[0], (strength * bias).expand(3, -1), rtol=0, atol=0.01)
    [side] = correct(model, "biased.safetensors", 1.0).get_nested_additional_models()
    assert side.model_size() == sum(t.nbytes for t in [*pair.values(), bias])


def test_strength_written_to_an_injected_model_acts_at_once(model, tiny, pair):
    """What a strength schedule does: no reload, no new hook."""
    fixed = correct(model, tiny["lora"], 1.0)
    forward(fixed)
    from tessera.host import stacking

    fixed.get_attachment(stacking.STACK).strengths.set([0.25])
    assert effect(fixed, model, pair) == pytest.approx(0.25, abs=2e-3)


def test_moving_the_slider_reads_no_file_and_writes_no_weight(model, tiny, monkeypatch):
    forward(correct(model, tiny["lora"], 1.0))
    before = {k: (v.data_ptr(), v.clone().reshape(-1)) for k, v in model.model.state_dict().items()}
    monkeypatch.setattr("tessera.checkpoint.Checkpoint.read", lambda *a: pytest.fail("read from disk"))
    moved = correct(model, tiny["lora"], 0.3)
    forward(moved)
    for key, value in moved.model.state_dict().items():
        where, what = before[key]
        assert key.endswith("comfy_quant") or value.data_ptr() == where, key
        assert torch.equal(value.reshape(-1).view(torch.uint8), what.view(torch.uint8)), key


def test_a_released_model_is_freed(tiny):
    import comfy.model_management

    fixed = correct(load("TesseraDiffusionModelLoader", tiny["model"]), tiny["lora"], 1.0)
    sample(fixed)
    alive = weakref.ref(fixed.model)
    comfy.model_management.unload_all_models()
    del fixed
    gc.collect()
    comfy.model_management.cleanup_models()
    gc.collect()
    assert alive() is None


def test_a_lora_for_another_model_is_refused(model, models):
    up, down = torch.zeros(8, 2), torch.zeros(2, 8)
    base = "lora_unet_down_blocks_0"
    save_file({f"{base}.lora_up.weight": up, f"{base}.lora_down.weight": down}, models / "loras" / "sd.safetensors")
    with pytest.raises(ValueError, match=r"sd\.safetensors: 0 of 1 LoRA layers match this model; first unmatched key"):
        correct(model, "sd.safetensors", 1.0)
    save_file(
        {f"{LAYER}.lora_up.weight": up, f"{LAYER}.lora_down.weight": down}, models / "loras" / "small.safetensors"
    )
    with pytest.raises(ValueError, match=r"small\.safetensors: .*w1: the LoRA is \[8, 8\], the layer \[768, 256\]"):
        correct(model, "small.safetensors", 1.0)


def test_layers_that_run_past_their_correction_are_reported(model, tiny, caplog):
    """Hosts with fused linears (`linear_input_act`) bypass forward hooks; the node must not stay silent about it."""
    fixed = correct(model, tiny["lora"], 1.0)
    with PastHooks(fixed, LAYER):
        sample(fixed)
        fixed.eject_model()
    assert f"layers ran past their branch, or not at all (first: {LAYER}): they are not corrected" in caplog.text


def test_the_correction_of_the_file_is_found_beside_it(tiny):
    from tessera.nodes.lora import BESIDE

    model = load("UNETLoader", tiny["model"])
    assert torch.equal(sample(correct(model, BESIDE, 1.0)), sample(correct(model, tiny["lora"], 1.0)))


def test_correction_helps_and_merging_harms(tiny):
    """One prompt; test_quality.py has the paired statistics."""
    import nodes

    truth = Trajectory(load("UNETLoader", tiny["bf16"]))
    quantized = node("TesseraDiffusionModelLoader").execute(tiny["model"], speed="exact").args[0]  # as 4 bits stay
    stock = load("UNETLoader", tiny["model"])  # of ours the merge guard would take the LoRA over
    merged = nodes.LoraLoaderModelOnly().load_lora_model_only(stock, tiny["lora"], 1.0)[0]
    mean = {name: sum(e) / len(e) for name, e in {
        "corrected": truth.velocities(correct(quantized, tiny["lora"], 1.0)),
        "quantized": truth.velocities(quantized),
        "merged": truth.velocities(merged),
    }.items()}  # fmt: skip
    assert mean["corrected"] < mean["quantized"] < mean["merged"]


def test_another_lora_on_a_running_model_does_not_reach_it(model, tiny, pair, models):
    """The host's clone of a loaded patcher says that it is injected, and is by any patch that the host adds to it."""
    import comfy.model_management

    norm = "diffusion_model.layers.0.attention_norm1"
    save_file({f"{norm}.diff": torch.zeros(256)} | load_file(models / "loras" / tiny["lora"]),
              models / "loras" / "with_norm.safetensors")  # fmt: skip
    half = correct(model, tiny["lora"], 0.5)
    comfy.model_management.load_models_gpu([half, *half.get_nested_additional_models()])
    half.pre_run()
    x = torch.randn(1, 7, 256, generator=torch.Generator().manual_seed(0))
    before = half.model.get_submodule(LAYER)(x)
    more = correct(half, "with_norm.safetensors", 1.0)
    assert more.patches and torch.equal(half.model.get_submodule(LAYER)(x), before)
    half.cleanup()
    assert effect(more, model, pair) == pytest.approx(1.5, abs=3e-3)
    assert effect(half, model, pair) == pytest.approx(0.5, abs=2e-3)


def test_a_parameter_that_the_host_does_not_patch_is_not_called_patched(model, models):
    """Z-Image's pad tokens stand beside modules; the host takes their patches and passes them by."""
    import comfy.model_management

    from tessera import host

    token, norm = "diffusion_model.x_pad_token", "diffusion_model.layers.0.attention_norm1"
    save_file({f"{token}.diff": torch.ones(1, 256), f"{norm}.diff": torch.ones(256)},
              models / "loras" / "token.safetensors")  # fmt: skip
    before = {key: model.model.state_dict()[key].float() for key in (token, f"{norm}.weight")}
    patched, attached = host.attach_file(model, str(models / "loras" / "token.safetensors"), 1.0)
    assert attached.patched == (f"{norm}.weight",) and attached.ignored[0][0] == token
    assert "1 ignored: ComfyUI does not patch parameters that stand beside modules" in attached.text
    comfy.model_management.load_models_gpu([patched])
    after = patched.model.state_dict()
    assert torch.equal(after[token].float(), before[token])
    assert relative(after[f"{norm}.weight"], before[f"{norm}.weight"] + 1) < 0.01
    patched.detach()
