"""Every plan inside the real ComfyUI: the kernel that the facts name runs, and gives what its arithmetic promises.

There is no GPU here: facts are made up and CUDA kernels are stood in for by the reference that they are tested against.
"""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from comfy_host import TINY, node, relative, sample
from tessera import formats, transcode
from tessera.checkpoint import Checkpoint
from tessera.job import Job
from tessera.kernels import cpu, dispatch
from tessera.kernels.cpu import CPUFacts
from tessera.kernels.dispatch import DeviceFacts
from tessera.lora import read as read_lora
from tessera.quantization import recipe
from tessera.quantization.activations import rounded

pytestmark = pytest.mark.host
ALL = frozenset({"eager", "triton", "cuda"})
LAYER = "layers.1.feed_forward.w1"
LABELS = ("nvfp4", "mxfp8", "fp8_e4m3", "int8_row", "int8_convrot_64", "int8_convrot_256")


def nvidia(*sm, cuda=(13, 0), **more):
    return DeviceFacts("cuda", sm, cuda, (2, 13), ALL, (3, 6), **more)


DEVICES = {
    "SM 12.0": nvidia(12, 0),
    "SM 9.0": nvidia(9, 0),
    "SM 8.6": nvidia(8, 6),
    "SM 8.6, CUDA 12": nvidia(8, 6, cuda=(12, 6)),
    "SM 8.6, no room": nvidia(8, 6, memory=1),
    "CPU": None,  # what is here
    "CPU without oneDNN": DeviceFacts("cpu", cpu=CPUFacts("DEFAULT", False, False, False, False)),
}


@pytest.fixture
def device(monkeypatch):
    """Makes the loader believe that it loads for such a device."""

    def set(name):
        facts = DEVICES[name]
        if facts is not None:
            monkeypatch.setattr(dispatch, "read_facts", lambda *_: facts)

    return set


@pytest.fixture(scope="module")
def quantized(models):
    """The tiny model with its feed-forward layers in one format -> file name."""

    def make(label):
        name = f"kernels_{label}.safetensors"
        path = models / "diffusion_models" / name
        if not path.exists():
            rule = recipe.Rule(formats.parse(label), ("**.feed_forward.{w1,w2,w3}",), "test")
            lora = models / "loras" / f"kernels_{label}_lora.safetensors"
            Job(Checkpoint(TINY), path, recipe.Recipe(label, "", (rule,)), lora, rank=8).run()
        return name

    return make


def ours(name, **inputs):
    return node("TesseraDiffusionModelLoader").execute(name, **inputs).args[0]


def layer_of(model, name=LAYER):
    return model.model.get_submodule(f"diffusion_model.{name}")


def inputs(*shape, dtype=torch.float32):
    x = torch.randn(*shape, 256, generator=torch.Generator().manual_seed(0))
    x[..., 7] *= 20  # an outlier channel, as real inputs have
    return x.to(dtype)


def expected(layer, x, weight):
    """What the layer's plan promises: inputs rounded as its kernel does, the kept weight, exact sums."""
    kernel = layer.tessera_plan.kernel
    x = x.to(layer.tessera_loading.taken(kernel, x.dtype))
    if kernel == "cpu_int8" and x.numel() // x.shape[-1] < cpu.ONEDNN_MIN_ROWS:
        kernel = "cpu_widened"  # few rows do not repay packing the weight
    if kernel in ("nvfp4", "mxfp8", "int8", "int8_fused", "cpu_int8") or (
        kernel == "host" and layer.tessera_format.name == "int8_tensorwise"
    ):
        x = rounded(layer.tessera_format, x.float())
    if kernel == "fp8_row" or (kernel == "host" and "float8" in layer.tessera_format.name):
        scale = x.float().abs().amax(-1, keepdim=True) / 448 if kernel == "fp8_row" else 1.0
        x = (x.float() / scale).to(torch.float8_e4m3fn).float() * scale
    return x.float() @ weight.T


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("name", DEVICES)
def test_each_plan_multiplies_as_promised_with_a_reference_in_place_of_cuda(device, quantized, name, label):
    device(name)
    model = ours(quantized(label))
    layer = layer_of(model)
    weight = layer.weight.dequantize().float()
    assert tuple(weight.shape) == (768, 256)
    for x in (inputs(2, 77), inputs(1), inputs(0), inputs(3, 5).transpose(0, 1)):
        y = layer(x)
        assert y.shape == (*x.shape[:-1], 768) and y.dtype == x.dtype and torch.isfinite(y).all()
        if x.numel():
            # a GPU's kernels get 16 bits; comfy-kitchen's eager int8 divides by a 16-bit scale
            near = 3e-2 if layer.tessera_plan.kernel == "int8" else 8e-3
            assert relative(y, expected(layer, x, weight)) < near, layer.tessera_plan
    assert set(layer.tessera_runs) == {layer.tessera_plan.kernel} and layer.tessera_runs.total() == 4
    for dtype in (torch.bfloat16, torch.float16):
        x = inputs(2, 40, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype and relative(y, expected(layer, x, weight)) < 3e-2


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("name", DEVICES)
def test_transcoding_moves_weights_by_no_more_than_its_bound(device, quantized, models, name, label):
    device(name)
    model = ours(quantized(label))
    truth = Checkpoint(models / "diffusion_models" / quantized(label)).weight(LAYER)
    layer = layer_of(model)
    moved = relative(layer.weight.dequantize(), truth)
    if layer.tessera_plan.path == "transcode":
        loading = model.get_attachment("tessera_plans")
        distance, added = loading.costs[f"{LAYER}"]
        assert moved == pytest.approx(distance, rel=2e-3, abs=1e-6) and added <= layer.tessera_plan.bound
    else:
        assert moved < 1e-3  # what the host's 16-bit or fp32 decoding leaves


@pytest.mark.parametrize("label", ["nvfp4", "mxfp8", "int8_convrot_64"])
@pytest.mark.parametrize("name", DEVICES)
def test_a_correction_joins_the_product_at_any_strength_with_a_reference_in_place_of_cuda(
    device, quantized, models, name, label
):
    import comfy.model_management

    device(name)
    model = ours(quantized(label))
    lora = f"kernels_{label}_lora.safetensors"
    pair = read_lora(models / "loras" / lora)[f"diffusion_model.{LAYER}"]
    layer, x = layer_of(model), inputs(2, 77)
    plain = layer(x)
    for strength in (1.0, 0.5, 2.0):
        corrected = node("TesseraCorrectionLoRA").execute(model, lora, strength).args[0]
        comfy.model_management.load_models_gpu([corrected, *corrected.get_nested_additional_models()])
        wanted = strength * x @ pair.weight().T
        added = layer(x) - plain
        gain = (added * wanted).sum() / wanted.square().sum()
        assert abs(gain - 1) < 0.05
        # riding in a quantized GEMM rounds the branch, 16-bit outputs round the sum
        assert relative(layer(x), plain + wanted) < 6e-3
        if DEVICES[name] is None:
            assert relative(added, wanted) < 1e-2
        corrected.detach()
    model.detach()
    assert torch.equal(layer(x), plain)


def test_branch_columns_are_padding_to_the_host(device, quantized, models):
    """K-extension: decoding, saving and measuring a layer give what they give without the reserved columns."""
    device("SM 12.0")
    for label in ("nvfp4", "mxfp8"):
        layer, stored = layer_of(ours(quantized(label))), load_file(models / "diffusion_models" / quantized(label))
        assert layer.weight._qdata.shape[1] * (2 if label == "nvfp4" else 1) == 256 + 64
        truth = Checkpoint(models / "diffusion_models" / quantized(label)).weight(LAYER)
        assert relative(layer.weight.dequantize(), truth) < 1e-6
        saved = layer.state_dict()
        for suffix in ("weight", "weight_scale"):
            mine, file = saved[suffix], stored[f"{LAYER}.{suffix}"]
            assert torch.equal(mine.view(torch.uint8), file.view(torch.uint8)), suffix


def test_finding_the_layers_of_a_lora_copies_no_weight_with_a_reference_in_place_of_cuda(
    device, quantized, monkeypatch
):
    """Codes are views in a state dict, scales are copied only for who asks for more than its keys."""
    from tessera.host import attaching
    from tessera.kernels import kextension

    device("SM 12.0")
    model = ours(quantized("nvfp4"))
    assert layer_of(model).reserved(layer_of(model).weight)
    copies, strip = [], kextension.strip
    monkeypatch.setattr(kextension, "strip", lambda *args: copies.append(args[0]) or strip(*args))
    assert attaching.targets(model)[LAYER].layer == f"diffusion_model.{LAYER}" and not copies
    layer = layer_of(model)
    assert layer.state_dict()["weight"].untyped_storage().data_ptr() == layer.weight._qdata.untyped_storage().data_ptr()
    assert copies == ["nvfp4"]


@pytest.mark.parametrize("label", ["nvfp4", "mxfp8", "int8_convrot_64"])
@pytest.mark.parametrize("name", ["SM 12.0", "SM 9.0", "SM 8.6, CUDA 12", "CPU"])
def test_what_is_kept_is_what_is_counted_and_offloaded(device, quantized, name, label):
    """Memory as the host plans it: the transcoded layer, whole or offloaded, with the same output."""
    device(name)
    model = ours(quantized(label))
    layer, x = layer_of(model), inputs(2, 77)
    stored = layer.state_dict()
    held = layer.weight.state_dict()
    kept = transcode.target_format(layer.tessera_plan, 256) if layer.tessera_plan.target else formats.parse(label)
    assert sum(stored[key].nbytes for key in ("weight", "weight_scale")) <= kept.nbytes(768, 256)
    reserved = 1 + 64 / 256 if layer.tessera_plan.kernel in ("nvfp4", "mxfp8", "fp8_row") else 1  # columns for branches
    assert sum(tensor.nbytes for tensor in held.values()) <= reserved * 1.34 * kept.nbytes(768, 256)  # tiles of scales
    assert model.model_size() >= sum(kept.nbytes(768, 256) for _ in range(3))
    whole = layer(x)
    model.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    try:
        assert torch.equal(layer(x), whole) and set(layer.tessera_runs) == {layer.tessera_plan.kernel}
    finally:
        model.unpatch_model(torch.device("cpu"))


@pytest.mark.parametrize("name", ["SM 12.0", "SM 9.0", "SM 8.6, CUDA 12", "CPU"])
def test_samples_stay_near_the_exact_ones_with_a_reference_in_place_of_cuda(device, tiny, name):
    exact = sample(ours(tiny["model"], speed="exact"))
    device(name)
    model = ours(tiny["model"])
    mine = sample(model)
    assert 0 < relative(mine, exact) < (0.12 if name == "SM 12.0" else 0.03)  # W4A4 is what Blackwell computes
    ran = {kernel for m in model.model.modules() for kernel in getattr(m, "tessera_runs", ())}
    assert ran == {plan.kernel for _, plan in _plans(model).values()}


def _plans(model):
    from tessera import host

    return host.plans(model)


def test_a_cache_of_transcoded_layers_gives_the_same_model_and_is_checked(models, tiny, quantized, monkeypatch):
    from tessera import host

    path = models / "diffusion_models" / "cached.safetensors"
    shutil.copy(models / "diffusion_models" / tiny["model"], path)
    first = ours(path.name, cache=True)
    [cached] = list(host.transcoded_folder().glob("cached.*.safetensors"))
    before, made = cached.stat().st_ino, []  # a file that is written anew takes the old one's place
    real = transcode.transcode
    monkeypatch.setattr(transcode, "transcode", lambda *a, **k: made.append(1) or real(*a, **k))
    second = ours(path.name, cache=True)
    assert not made and cached.stat().st_ino == before
    assert torch.equal(sample(first), sample(second))
    assert host.plan_lines(first) == host.plan_lines(second)

    shutil.copy(models / "diffusion_models" / quantized("nvfp4"), path)  # another file under the same name
    third = ours(path.name, cache=True)
    assert len(made) == len(_plans(third)) and cached.stat().st_ino != before
    assert torch.equal(sample(third), sample(ours(quantized("nvfp4"))))

    cached.write_bytes(cached.read_bytes()[:5000])  # damaged: made anew
    assert torch.equal(sample(ours(path.name, cache=True)), sample(third))
    made.clear()
    ours(path.name, cache=True)
    assert not made


def test_a_cache_that_cannot_be_written_costs_nothing_but_the_next_start(models, tiny, monkeypatch, caplog):
    def full(self):
        raise ValueError("needs 1.00 GB on that disk, which has less; free some space")

    monkeypatch.setattr(transcode.Cache, "save", full)
    shutil.copy(models / "diffusion_models" / tiny["model"], models / "diffusion_models" / "uncached.safetensors")
    assert torch.isfinite(sample(ours("uncached.safetensors", cache=True), steps=1)).all()
    assert "transcoded layers are not kept for the next start: needs 1.00 GB" in caplog.text


def test_a_stock_lora_merged_into_a_transcoded_layer_stays_right_without_vnni(models, tiny, device, monkeypatch):
    """A merged weight uses all 127 codes again: the kernel that needs small ones must not get it."""
    monkeypatch.setenv("TESSERA_MERGE_GUARD", "0")
    import comfy.model_management
    import nodes
    from safetensors.torch import save_file

    model = ours(tiny["model"])
    name = "layers.0.feed_forward.w2"  # nvfp4 in the recipe
    layer = layer_of(model, name)
    up, down = torch.randn(layer.out_features, 4) * 0.02, torch.randn(4, layer.in_features) * 0.02
    base = f"diffusion_model.{name}"
    save_file({f"{base}.lora_up.weight": up, f"{base}.lora_down.weight": down}, models / "loras" / "style4.safetensors")
    patched = nodes.LoraLoaderModelOnly().load_lora_model_only(model, "style4.safetensors", 1.0)[0]
    x = torch.randn(64, layer.in_features)
    before = layer(x)
    weight = layer.weight.dequantize().float()
    comfy.model_management.load_models_gpu([patched])
    assert relative(layer(x), x @ (weight + up @ down).T) < 0.05
    comfy.model_management.unload_all_models()
    assert torch.equal(layer(x), before)


@pytest.fixture(scope="module")
def mixed(models):
    """The tiny model with w1 in mxfp8 and w2, w3 in nvfp4, and a correction of rank 8 -> file name."""
    path = models / "diffusion_models" / "kernels_mixed.safetensors"
    rules = (
        recipe.Rule(formats.parse("mxfp8"), ("**.feed_forward.w1",), "test"),
        recipe.Rule(formats.parse("nvfp4"), ("**.feed_forward.{w2,w3}",), "test"),
    )
    lora = models / "loras" / "kernels_mixed_lora.safetensors"
    Job(Checkpoint(TINY), path, recipe.Recipe("mixed", "", rules), lora, rank=8).run()
    return path.name


def loaded(model):
    import comfy.model_management

    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])
    return model


def feed_forward(model, x):
    """(its output, (calls of each quantizing operation, rows of the largest gate that was stored))."""
    from tessera.kernels import ops

    block, calls = model.model.get_submodule("diffusion_model.layers.1.feed_forward"), []

    def spy(name):
        real = getattr(ops, name)
        return lambda *a: calls.append(name) or real(*a)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rotate_quantize_int8", "quantize_blocks", "dual_quantize"):
            patch.setattr(ops, name, spy(name))
        return block(x), calls


@pytest.mark.parametrize(("name", "calls", "corrected_calls"), [
    # the gate of w2 is known before its largest value is, so nvfp4 without a static scale stores it
    ("SM 12.0", ["dual_quantize", "quantize_blocks"], ["dual_quantize", "quantize_blocks"]),
    ("SM 8.6, CUDA 12", ["rotate_quantize_int8"] * 2, ["rotate_quantize_int8"] * 2),
])  # fmt: skip
def test_w1_and_w3_quantize_their_input_once_with_a_reference_in_place_of_cuda(
    device, mixed, name, calls, corrected_calls
):
    device(name)
    model = loaded(ours(mixed))
    x = inputs(2, 77)
    y, seen = feed_forward(model, x)
    assert seen == calls
    block = model.model.get_submodule("diffusion_model.layers.1.feed_forward")
    layers = {name: getattr(block, name) for name in ("w1", "w2", "w3")}
    weights = {name: layer.weight.dequantize().float() for name, layer in layers.items()}
    middle = [expected(layers[n], x, weights[n]) for n in ("w1", "w3")]
    alone = expected(layers["w2"], torch.nn.functional.silu(middle[0]) * middle[1], weights["w2"])
    assert relative(y, alone) < 0.02  # nvfp4 of a product that differs in its last bits

    corrected = loaded(node("TesseraCorrectionLoRA").execute(model, "kernels_mixed_lora.safetensors", 1.0).args[0])
    feed_forward(corrected, x)  # siblings learn each other's balance
    z, seen = feed_forward(corrected, x)
    assert seen == corrected_calls
    pairs = read_lora(block_lora(mixed))
    exact = [weights[n] + pairs[f"diffusion_model.layers.1.feed_forward.{n}"].weight() for n in ("w1", "w2", "w3")]
    truth = torch.nn.functional.silu(x @ exact[0].T) * (x @ exact[2].T) @ exact[1].T
    assert relative(z, truth) < relative(y, truth)
    corrected.detach()
    model.detach()
    assert torch.equal(loaded(model).model.get_submodule("diffusion_model.layers.1.feed_forward")(x), y)


def block_lora(mixed):
    import folder_paths

    return folder_paths.get_full_path("loras", mixed.replace(".safetensors", "_lora.safetensors"))


def test_wiring_is_taken_back_and_spares_hooked_layers(device, mixed):
    device("SM 8.6, CUDA 12")
    model = loaded(ours(mixed))
    block = model.model.get_submodule("diffusion_model.layers.1.feed_forward")
    assert "_forward_silu_gating" in vars(block) and block.w1.tessera_siblings is block.w3.tessera_siblings is not None
    seen, x = [], inputs(2, 5)
    y = block(x)
    handle = block.w2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert relative(block(x), y) < 1e-3 and isinstance(seen[0], torch.Tensor)
    handle.remove()
    clone = model.clone()
    loaded(clone)
    assert torch.equal(block(x), y)
    clone.detach()
    model.detach()
    assert "_forward_silu_gating" not in vars(block) and block.w1.tessera_siblings is None
    assert relative(block(x), y) < 1e-3


def test_inspect_counts_the_kernels_that_ran_and_says_what_transcoding_cost(models, tiny):
    from tessera import host

    model = ours(tiny["model"])
    before = node("TesseraInspect").execute(model)
    assert "nothing has run yet" in before.ui["text"][0]
    sample(model, steps=3)
    found = node("TesseraInspect").execute(model, after="latent")
    [text], [data] = found.ui["text"], found.ui["tessera_rows"]
    kernels = {row["kernel"] for row in data["layers"]}
    for kernel in kernels:
        layers = sum(row["kernel"] == kernel for row in data["layers"])
        assert f"ran {kernel}: " in text and f"calls in {layers} layers" in text
    assert "transcoded 28 layers: weights moved by at most" in text and "not as planned" not in text
    brief = host.inspect(model).brief()
    assert brief.startswith("ran ") and "\n" not in brief and all(kernel in brief for kernel in kernels)
    assert re.fullmatch(r"28 layers transcoded, at most \d[.\d]* % moved", host.plan_brief(model))
    assert len(data["layers"]) == 28 and all(row["runs"] == {row["kernel"]: 3} for row in data["layers"])
    assert all(row["kept"] == "int8_convrot_256" and 0 < row["distance"] < 0.05 for row in data["layers"])
    table = [line for line in found.args[0].splitlines() if line.startswith("| ")]
    assert len(table) == 28 + 1 and any("layers.1.feed_forward.w1" in line for line in table)


def test_inspect_names_layers_that_did_not_run_as_planned(models, tiny):
    from tessera import host

    corrected = loaded(node("TesseraCorrectionLoRA").execute(ours(tiny["model"]), tiny["lora"], 1.0).args[0])
    layer = layer_of(corrected)
    layer(inputs(2))
    layer.comfy_force_cast_weights = True
    layer(inputs(2))
    text = node("TesseraInspect").execute(corrected).ui["text"][0]
    assert f"not as planned: 1 layers ({LAYER}: {layer.tessera_plan.kernel}, host, decoded)" in text
    assert "did not run: 27 layers" in text and "28 layers with low-rank branches" in text
    ran, wrong = host.inspect(corrected).brief().splitlines()
    assert ran.startswith("ran ") and "did not run: 27 layers (" in wrong
    assert f"not as planned: 1 layers ({LAYER})" in wrong
    corrected.detach()


def test_inspect_leaves_models_of_other_loaders_alone_with_a_hint(tiny):
    import nodes

    from tessera import host

    stock = nodes.UNETLoader().load_unet(tiny["model"], "default")[0]
    assert "28 quantized layers from another loader" in node("TesseraInspect").execute(stock).ui["text"][0]
    assert host.inspect(stock).brief().startswith("28 quantized layers from another loader")
    assert node("TesseraInspect").execute(ours(tiny["bf16"])).ui["text"] == ["no quantized layers"]


def test_the_hosts_fused_linear_calls_transcoded_layers_with_their_branch(models, tiny):
    """`linear_input_act` multiplies int8 layers past their forward: what was made int8 by us must not be among them."""
    import comfy.ops

    corrected = loaded(node("TesseraCorrectionLoRA").execute(ours(tiny["model"]), tiny["lora"], 1.0).args[0])
    layer, x = layer_of(corrected), inputs(2, 40)
    assert layer.tessera_plan.target.startswith("int8") and layer.tessera_branch_pair
    wanted = layer(torch.nn.functional.gelu(x, approximate="tanh"))
    assert torch.equal(comfy.ops.linear_input_act(layer, x, "gelu_tanh"), wanted)
    corrected.detach()
