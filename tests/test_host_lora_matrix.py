"""Inside the real ComfyUI: every kind of LoRA, beside weights of every format, equals its change made in fp32."""

import functools

import pytest
import torch

import lora_files
import lora_models as models_
import lora_reference as reference
import mini_flux
from comfy_host import relative

pytestmark = pytest.mark.host
STRENGTH = 0.7
ROWS = 64  # integer kernels of a CPU take as many
SHARE = {"diff of small rank": 0.021}  # may be reduced, by 2 % at most
ELSE = 0.005
ON_OUTPUT = ("oft", "boft", "dora", "glora")  # may act on the layer's output, with what its input's rounding does


class Case:
    """One model, format and loader: its layers with and without the file that holds every kind."""

    def __init__(self, models, name, format, loader):
        from tessera import host

        self.name, self.base = name, models_.load(loader, models_.file_of(models, name, format))
        self.lora, self.attached = host.attach_file(self.base, str(models_.every_kind(models, name)), STRENGTH)
        self.before = reference.weights(self.base)
        self.after = reference.changed(self.base, [(models_.every_kind(models, name), STRENGTH)], self.before)
        generator = torch.Generator().manual_seed(7)
        self.layers = [key.removesuffix(".weight") for key in self.after
                       if key.endswith(".weight") and self.after[key].ndim == 2
                       and (self._differs(key) or self._differs(f"{key.removesuffix('weight')}bias"))]  # fmt: skip
        self.inputs = inputs = {
            layer: torch.randn(1, ROWS, self.before[f"{layer}.weight"].shape[1], generator=generator)
            for layer in self.layers
        }
        self.without = reference.outputs(self.base, inputs)
        self.found = reference.outputs(self.lora, inputs)
        self.wanted_without = {layer: reference.product(self.before, layer, x) for layer, x in inputs.items()}
        self.wanted = {layer: reference.product(self.after, layer, x) for layer, x in inputs.items()}

    def _differs(self, key):
        return key in self.after and not torch.equal(self.after[key], self.before[key])

    def check(self, layer, kind, columns=slice(None)):
        """The layer, or some of its outputs, is as close to its truth as it was, and what came to it is right."""
        layer = f"diffusion_model.{layer}"
        found, without, wanted, wanted_without = (
            outputs[layer][..., columns] for outputs in (self.found, self.without, self.wanted, self.wanted_without)
        )
        added, delta = found - without, wanted - wanted_without
        rounding = relative(without, wanted_without)  # of the input, by the format's kernel; 0 where that decodes
        share = SHARE.get(kind, ELSE)
        size = (delta.norm() / wanted.norm()).item()
        assert size > 0.01, f"{layer}: the file changes nothing"
        assert relative(found, wanted) < 1.3 * rounding + share * size + 1e-5, layer
        carried = 1.5 * rounding if kind.startswith(ON_OUTPUT) else 0
        carried = 1.5 * rounding / size if kind == "set" else carried  # the layer's own rounding goes with its product
        assert relative(added, delta) < share + carried, layer
        least = 1 - max(0.001, carried**2)
        assert torch.cosine_similarity(added.flatten(), delta.flatten(), dim=0) > least, layer


@pytest.fixture(
    scope="module",
    params=[
        *(
            (name, format, loader)
            for name in models_.MODELS
            for format in models_.FORMATS
            for loader in models_.LOADERS
        ),
        *(("zimage", "nvfp4, smoothed", loader) for loader in models_.LOADERS),
    ],
    ids=lambda case: "-".join(case),
)
def case(request, models):
    return Case(models, *request.param)


@pytest.mark.parametrize("kind", [*lora_files.KINDS, *lora_files.WITH_BIAS])
def test_layer_equals_decoded_weight_and_delta(case, kind):
    for layer in models_.layers_by_kind(case.name).get(kind, []):
        case.check(layer, kind)


def test_slices_of_a_fused_layer_change_their_rows_only(case):
    sliced = {}
    for kind, layer, start, rows in models_.SLICES[case.name].values():
        case.check(layer, kind, slice(start, start + rows))
        sliced.setdefault(layer, torch.ones(case.found[f"diffusion_model.{layer}"].shape[-1], dtype=torch.bool))
        sliced[layer][start : start + rows] = False
    for layer, other in sliced.items():
        layer = f"diffusion_model.{layer}"
        torch.testing.assert_close(case.found[layer][..., other], case.without[layer][..., other], rtol=0, atol=0)


def test_halves_that_a_file_keeps_the_other_way_round(case):
    """diffusers' norm_out.linear is ComfyUI's final_layer.adaLN_modulation.1 with scale and shift swapped."""
    if case.name in models_.TURNED:
        case.check("final_layer.adaLN_modulation.1", "lora")


def test_nothing_of_the_file_is_left_out(case):
    """Every layer that ComfyUI would patch is among those checked; the summary names the one parameter that it would
    not, a pad token beside modules."""
    checked = {layer for found in models_.layers_by_kind(case.name).values() for layer in found}
    checked |= {layer for _, layer, _, _ in models_.SLICES[case.name].values()}
    checked |= {"final_layer.adaLN_modulation.1"} if case.name in models_.TURNED else set()
    assert {f"diffusion_model.{layer}" for layer in checked} == set(case.layers)
    beside = ["diffusion_model.x_pad_token"] if case.name == "zimage" else []
    ignored = [key for key, _ in case.attached.ignored]
    assert not case.attached.unmatched and ignored == beside, case.attached.text


def test_whole_model_answers_like_one_with_the_changed_weights(case, models):
    """Norms and tokens, which the host patches, included."""
    call = models_.call(case.name)
    plain = models_.load("stock", models_.file_of(models, case.name, "bf16"))
    with reference.Swapped(plain, case.before):
        wanted_without = reference.answer(plain, call)
    with reference.Swapped(plain, case.after):
        wanted = reference.answer(plain, call)
    rounding = relative(reference.answer(case.base, call), wanted_without)
    assert relative(wanted, wanted_without) > 0.1
    assert relative(reference.answer(case.lora, call), wanted) < 1.5 * rounding + 0.005


SPELLINGS = {
    "zimage": [
        (base, pair, "layers.0.feed_forward.w1", 0, 768)
        for base, pair in (
            ("lora_unet_layers_0_feed_forward_w1", "kohya"), ("lycoris_layers_0_feed_forward_w1", "kohya"),
            ("transformer.layers.0.feed_forward.w1", "peft"), ("layers.0.feed_forward.w1", "diffusers 2"),
            *(("diffusion_model.layers.0.feed_forward.w1", pair) for pair in lora_files.PAIRS),
        )
    ] + [
        ("lora_unet_layers_0_attention_qkv", "kohya", "layers.0.attention.qkv", 0, 768),
        ("lycoris_layers_0_attention_to_v", "kohya", "layers.0.attention.qkv", 512, 256),
        ("transformer.layers.0.attention.to_out.0", "peft", "layers.0.attention.out", 0, 256),
    ],
    "flux": [
        ("lora_unet_double_blocks_0_img_attn_qkv", "kohya", "double_blocks.0.img_attn.qkv", 0, 768),
        ("transformer.transformer_blocks.0.attn.to_k", "peft", "double_blocks.0.img_attn.qkv", 256, 256),
        ("transformer.transformer_blocks.0.attn.add_v_proj", "peft adapter", "double_blocks.0.txt_attn.qkv", 512, 256),
        ("lora_transformer_transformer_blocks_0_attn_to_q", "kohya", "double_blocks.0.img_attn.qkv", 0, 256),
        ("lora_transformer_single_transformer_blocks_0_proj_out", "kohya", "single_blocks.0.linear2", 0, 256),
        ("lycoris_transformer_blocks_0_ff_net_0_proj", "kohya", "double_blocks.0.img_mlp.0", 0, 1024),
        ("transformer_blocks.0.ff_context.net.2", "bare", "double_blocks.0.txt_mlp.2", 0, 256),
        ("transformer.single_transformer_blocks.0.proj_mlp", "peft", "single_blocks.0.linear1", 768, 1024),
        ("diffusion_model.single_blocks.0.linear1_qkv", "peft", "single_blocks.0.linear1", 0, 768),
        ("diffusion_model.single_blocks.0.modulation.lin", "diffusers", "single_blocks.0.modulation.lin", 0, 768),
    ],
}  # fmt: skip
"""Name in the file and spelling of the pair -> module path, first row and rows that it changes."""


@pytest.fixture(scope="module")
def in_nvfp4(models):
    """(model, its weights) of a name from a loader, loaded once."""

    @functools.cache
    def load(name, loader):
        model = models_.load(loader, models_.file_of(models, name, "nvfp4"))
        return model, reference.weights(model)

    return load


@pytest.mark.parametrize("loader", ["ours", "stock"])
@pytest.mark.parametrize(("name", "spelled"), [(name, s) for name, found in SPELLINGS.items() for s in found],
                         ids=lambda value: value if isinstance(value, str) else "/".join(value[:2]))  # fmt: skip
def test_every_spelling_reaches_its_rows(models, in_nvfp4, name, spelled, loader):
    from tessera import host

    base, pair, layer, start, rows = spelled
    layer = f"diffusion_model.{layer}"
    model, weights = in_nvfp4(name, loader)
    path = lora_files.save(
        models / "loras" / "spelled.safetensors",
        {base: (lambda m: lora_files.lora(m, pair), weights[f"{layer}.weight"][start : start + rows])},
    )
    x = torch.randn(1, ROWS, weights[f"{layer}.weight"].shape[1], generator=torch.Generator().manual_seed(3))
    lora, _ = host.attach_file(model, str(path), STRENGTH)
    added = reference.outputs(lora, {layer: x})[layer] - reference.outputs(model, {layer: x})[layer]
    [(key, delta)] = reference.changes(model, path, STRENGTH, weights).items()
    assert key == f"{layer}.weight" and delta.norm() > 0.05 * weights[key].norm() * (rows / delta.shape[0]) ** 0.5
    assert relative(added, torch.nn.functional.linear(x, delta)) < 2e-3
    changed = added.flatten(0, 1).norm(dim=0) > 0
    assert changed[start : start + rows].all() and changed.sum() == rows


def test_a_control_lora_as_black_forest_labs_publish_it(models):
    """Norms set, biases changed, img_in widened: what is no Linear, or another shape, the host patches."""
    from tessera import host

    own = mini_flux.tensors(single=3)
    path = lora_files.save(
        models / "loras" / "control.safetensors",
        {"img_in": (lambda m: lora_files.lora(m, "peft", None), torch.randn(256, 128)),
         "double_blocks.0.img_attn.proj": (lambda m: lora_files.lora(m, "peft", None),
                                           own["double_blocks.0.img_attn.proj.weight"])},
        others={"single_blocks.0.norm.key_norm.scale": torch.linspace(0.5, 1.5, 128),
                "double_blocks.0.img_attn.proj.lora_B.bias": torch.randn(256)},
    )  # fmt: skip
    model = models_.load("ours", models_.file_of(models, "flux", "nvfp4"))
    control, _ = host.attach_file(model, str(path), 1.0)
    before = reference.weights(model)
    wide = {**before, "diffusion_model.img_in.weight": torch.nn.functional.pad(before["diffusion_model.img_in.weight"],
                                                                               (0, 64))}  # fmt: skip
    after = reference.changed(model, [(path, 1.0)], wide)
    inputs = {"diffusion_model.img_in": torch.randn(1, ROWS, 128),
              "diffusion_model.double_blocks.0.img_attn.proj": torch.randn(1, ROWS, 256),
              "diffusion_model.single_blocks.0.norm.key_norm": torch.randn(1, ROWS, 128)}  # fmt: skip
    found = reference.outputs(control, inputs)
    for layer in list(inputs)[:2]:
        assert relative(found[layer], reference.product(after, layer, inputs[layer])) < 0.02
    norm = list(inputs)[2]
    x = inputs[norm]
    wanted = torch.nn.functional.rms_norm(x, (128,), torch.linspace(0.5, 1.5, 128).half().float(), 1e-6)
    assert relative(found[norm], wanted) < 2e-3
    narrow = {"diffusion_model.img_in": torch.randn(1, ROWS, 64)}  # the model itself is as it was
    layer = "diffusion_model.img_in"
    assert relative(reference.outputs(model, narrow)[layer], reference.product(before, layer, narrow[layer])) < 1e-5


@pytest.mark.parametrize("loader", ["ours", "stock"])
def test_merged_by_core_deviates_five_times_as_much_on_nvfp4(models, loader):
    """For every layer of the file; the figures by kind are bench/lora_merge_table.py's."""
    import nodes

    case = Case(models, "zimage", "nvfp4", loader)
    path = models_.every_kind(models, "zimage")
    stock = models_.load("stock", models_.file_of(models, "zimage", "nvfp4"))
    after = reference.changed(stock, [(path, STRENGTH)])  # before the model is merged
    merged = nodes.LoraLoaderModelOnly().load_lora_model_only(stock, path.name, STRENGTH)[0]
    outputs = reference.outputs(merged, case.inputs)
    quantized = [layer for layer in case.layers if layer.removeprefix("diffusion_model.") in models_.BLOCKS["zimage"]]
    assert len(quantized) == 35
    for layer in quantized:
        wanted = reference.product(after, layer, case.inputs[layer])
        assert relative(outputs[layer], wanted) > 5 * relative(case.found[layer], case.wanted[layer]), layer
