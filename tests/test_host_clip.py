"""Inside the real ComfyUI: quantized Qwen3-4B text encoders of real width; fewer layers, heads and words."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from absorbing import absorb
from comfy_host import relative
from tessera import formats
from tessera.checkpoint import Checkpoint
from tessera.job import Job
from tessera.kernels import cpu, dispatch
from tessera.kernels.dispatch import DeviceFacts
from tessera.quantization import recipe
from tessera.quantization.pipeline import Settings

pytestmark = pytest.mark.host
LAYERS, WORDS = 3, 4005  # not a multiple of any tile
OPTIONS = {"qwen3_4b_model_config": {  # the host's own option for other sizes
    "num_hidden_layers": LAYERS, "vocab_size": WORDS, "intermediate_size": 1280, "num_attention_heads": 8,
    "num_key_value_heads": 2,
}}  # fmt: skip
LINEARS = {
    "self_attn.q_proj": (1024, 2560), "self_attn.k_proj": (256, 2560), "self_attn.v_proj": (256, 2560),
    "self_attn.o_proj": (2560, 1024), "mlp.gate_proj": (1280, 2560), "mlp.up_proj": (1280, 2560),
    "mlp.down_proj": (2560, 1280),
}  # fmt: skip
EMBEDDING = "model.embed_tokens"
TEXT = "a red star above a lighthouse"
LONG = " ".join([TEXT] * 12)
TABLES = ("nvfp4", "mxfp8")  # that the host cannot look up
COSINES = {  # least cosine of a token's embedding with that of bf16, and how much less auto may have than exact
    "nvfp4": (0.92, 0.006), "mxfp8": (0.992, 0.006), "int8_convrot": (0.999, 0.001), "fp8_e4m3": (0.992, 0.006),
}  # fmt: skip
GPUS = {  # facts of devices that are not here
    "SM 12.0": DeviceFacts("cuda", (12, 0), (13, 0), (2, 13), frozenset({"eager", "triton", "cuda"}), (3, 6)),
    "SM 9.0": DeviceFacts("cuda", (9, 0), (13, 0), (2, 13), frozenset({"eager", "triton", "cuda"}), (3, 6)),
    "SM 8.6, CUDA 12": DeviceFacts("cuda", (8, 6), (12, 6), (2, 13), frozenset({"eager", "triton"}), (3, 6)),
}


@pytest.fixture(scope="module")
def encoder(models):
    """A bf16 text encoder of random weights in the host's folder."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    ones = torch.ones(2560, dtype=torch.bfloat16)
    tensors = {f"{EMBEDDING}.weight": random(WORDS, 2560), "model.norm.weight": ones}
    for i in range(LAYERS):
        tensors |= {f"model.layers.{i}.{name}.weight": random(*shape) for name, shape in LINEARS.items()}
        for name, size in (("self_attn.q_norm", 128), ("self_attn.k_norm", 128)):
            tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(size, dtype=torch.bfloat16)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = ones.clone()
    path = models / "text_encoders" / "qwen.safetensors"
    save_file(tensors, path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def quantized(encoder):
    """The encoder with its linear layers in one format -> path."""
    made = {}

    def make(label):
        if label not in made:
            made[label] = quantize(encoder, f"qwen_{label}.safetensors", [(label, "**.{self_attn,mlp}.*_proj")])
        return made[label]

    yield make
    for path in made.values():
        path.unlink()


@pytest.fixture(scope="module")
def loaded(quantized):
    """Loads a format's file by our loader once per speed."""
    made = {}

    def load(label, speed="auto"):
        if (label, speed) not in made:
            made[label, speed] = ours(quantized(label), speed)
        return made[label, speed]

    return load


@pytest.fixture(scope="module")
def original(encoder):
    """The bf16 encoder by the stock loader."""
    return stock(encoder)


def quantize(source, name, rules):
    """The encoder quantized by a list of (label, pattern), without low rank."""
    made = tuple(recipe.Rule(formats.parse(label), (pattern,), "test") for label, pattern in rules)
    target = source.with_name(name)
    target.unlink(missing_ok=True)
    Job(Checkpoint(source), target, recipe.Recipe(name, "", made), settings=Settings(0, rounding="nearest")).run()
    return target


def encode(clip, text=TEXT):
    """The prompt's embedding [1, tokens, 2560]; `text` may be a list of tokens."""
    tokens = clip.tokenize(text)["qwen3_4b"] if isinstance(text, str) else [[(token, 1.0) for token in text]]
    tokens = [[(token % WORDS, *rest) for token, *rest in batch] for batch in tokens]
    return clip.encode_from_tokens({"qwen3_4b": tokens}, return_pooled=True)[0].float()


def ours(path, speed="auto"):
    import comfy.sd

    from tessera import host

    return host.load_clip(str(path), comfy.sd.CLIPType.LUMINA2, OPTIONS, speed)


def stock(path):
    import comfy.sd

    return comfy.sd.load_clip([str(path)], None, comfy.sd.CLIPType.LUMINA2, OPTIONS)


def transformer(clip):
    return clip.cond_stage_model.qwen3_4b.transformer


def cosine(a, b):
    return torch.cosine_similarity(a.flatten(0, -2), b.flatten(0, -2), dim=-1).min().item()


def planned(clip):
    """The encoder's layers that have a plan, by name."""
    found = {name: m for name, m in transformer(clip).named_modules() if getattr(m, "tessera_plan", None) is not None}
    assert len(found) == 7 * LAYERS
    return found


def test_plain_encoder_encodes_as_with_the_stock_loader(encoder):
    assert torch.equal(encode(ours(encoder)), encode(stock(encoder)))


@pytest.mark.parametrize("label", COSINES)
def test_exact_encodes_as_with_the_stock_loader_bit_for_bit(quantized, loaded, label):
    exact, theirs = loaded(label, "exact"), stock(quantized(label))
    for text in (TEXT, [7], ""):
        assert torch.equal(encode(exact, text), encode(theirs, text))
    assert {kernel for layer in planned(exact).values() for kernel in layer.tessera_runs} == {"host, decoded"}


@pytest.mark.parametrize("label", COSINES)
def test_auto_runs_the_kernel_of_each_plan_and_stays_near_the_decoded_weights(original, loaded, label):
    """For prompts of 1 token to more than a CPU packs weights for."""
    auto, exact, (floor, lost) = loaded(label), loaded(label, "exact"), COSINES[label]
    kernels = {layer.tessera_plan.kernel for layer in planned(auto).values()}
    assert kernels <= ({"cpu_int8", "cpu_widened"} if cpu.facts().onednn else {"cpu_widened", "cpu_decoded"})
    for layer in planned(auto).values():
        layer.tessera_runs.clear()
    lengths = []
    for text in ([7], [7, 8, 9], "", TEXT, LONG):
        truth = encode(original, text)
        mine, decoded = cosine(encode(auto, text), truth), cosine(encode(exact, text), truth)
        assert decoded > floor and mine > decoded - lost, (text, mine, decoded)
        lengths.append(truth.shape[1])
    assert lengths[:2] == [1, 3] and lengths[3] < cpu.ONEDNN_MIN_ROWS <= lengths[4]
    for name, layer in planned(auto).items():
        assert layer.tessera_runs == {layer.tessera_plan.kernel: len(lengths)}, name


@pytest.mark.parametrize("label, gpu", [
    ("nvfp4", "SM 12.0"), ("mxfp8", "SM 9.0"), ("nvfp4", "SM 8.6, CUDA 12"), ("int8_convrot", "SM 8.6, CUDA 12"),
    ("fp8_e4m3", "SM 9.0"),
])  # fmt: skip
def test_gpu_kernels_get_bf16_and_the_host_its_fp32_with_a_reference_in_place_of_cuda(
    quantized, monkeypatch, label, gpu
):
    """The host's activations of a text encoder are fp32, which no GPU kernel is made for."""
    monkeypatch.setattr(dispatch, "read_facts", lambda *_: GPUS[gpu])
    clip = ours(quantized(label))
    layers = planned(clip)
    assert {layer.tessera_plan.path for layer in layers.values()} <= {"native", "transcode"}
    layer, x = layers["model.layers.1.mlp.up_proj"], torch.randn(2, 5, 2560)
    y = layer(x)
    assert y.dtype == torch.float32 and y.shape == (2, 5, 1280)
    assert torch.equal(y, layer(x.bfloat16()).float())
    assert relative(y, x @ layer.weight.dequantize().float().T) < 0.15
    for module in layers.values():
        module.tessera_runs.clear()
    encode(clip, [7, 8, 9])
    for name, module in layers.items():
        assert module.tessera_runs == {module.tessera_plan.kernel: 1}, name


def test_a_cpu_kernel_gets_the_hosts_fp32(loaded):
    layer, x = planned(loaded("int8_convrot"))["model.layers.1.mlp.up_proj"], torch.randn(5, 2560)
    assert layer(x).dtype == torch.float32
    assert not torch.equal(layer(x), layer(x.bfloat16().float()))


def test_recipe_keeps_the_embedding_and_encodes_as_with_the_stock_loader(encoder):
    target = encoder.with_name("qwen_int8.safetensors")
    Job(Checkpoint(encoder), target, recipe.builtin("int8_convrot")).run()
    file = Checkpoint(target)
    assert len(file.layers) == 7 * LAYERS and EMBEDDING not in file.layers
    mine = encode(ours(target, "exact"))
    assert torch.equal(mine, encode(stock(target)))
    assert cosine(mine, encode(stock(encoder))) > 0.999
    target.unlink()


def test_quantized_embedding_encodes_as_with_the_stock_loader(encoder):
    """What convert_to_quant's INT8 ConvRot flags make of a text encoder: the embedding table is rotated int8 too."""
    target = quantize(encoder, "qwen_r3.safetensors", [("int8_convrot_64", "**")])
    assert EMBEDDING in Checkpoint(target).layers
    mine = encode(ours(target, "exact"))
    assert torch.equal(mine, encode(stock(target)))
    assert cosine(mine, encode(stock(encoder))) > 0.999
    assert cosine(encode(ours(target)), encode(stock(encoder))) > 0.999
    target.unlink()


def test_fp8_embedding_encodes_as_with_the_stock_loader(encoder):
    target = quantize(encoder, "qwen_fp8_table.safetensors", [("fp8_e4m3", EMBEDDING)])
    clip = ours(target)
    assert transformer(clip).model.embed_tokens.weight.dtype == torch.bfloat16  # what its rows decode to
    assert torch.equal(encode(clip), encode(stock(target)))
    target.unlink()


@pytest.mark.parametrize("label", TABLES)
def test_packed_embedding_stays_packed_and_only_its_looked_up_rows_are_decoded(encoder, monkeypatch, label):
    import comfy.model_management
    from comfy.quant_ops import QuantizedTensor

    target = quantize(encoder, "qwen_table.safetensors", [(label, EMBEDDING)])
    clip, truth = ours(target), Checkpoint(target).weight(EMBEDDING)
    table = transformer(clip).model.embed_tokens
    assert isinstance(table.weight, QuantizedTensor) and tuple(table.weight.shape) == (WORDS, 2560)
    assert comfy.model_management.module_size(table) < {"nvfp4": 0.29, "mxfp8": 0.53}[label] * WORDS * 2560 * 2
    clip_of_truth = stock(encoder)
    transformer(clip_of_truth).model.embed_tokens.weight = torch.nn.Parameter(truth, requires_grad=False)
    monkeypatch.setattr(QuantizedTensor, "dequantize", lambda self: pytest.fail("decoded whole"))
    for text in (TEXT, "", [WORDS - 1]):
        assert relative(encode(clip, text), encode(clip_of_truth, text)) < 1e-6
    target.unlink()


@pytest.mark.parametrize("label", TABLES)
def test_packed_embedding_looks_up_what_its_format_decodes(encoder, label):
    target = quantize(encoder, "qwen_rows.safetensors", [(label, EMBEDDING)])
    table, truth = transformer(ours(target)).model.embed_tokens, Checkpoint(target).weight(EMBEDDING)
    tokens = torch.tensor([[0, 1, 127, 128], [WORDS - 1, 3999, 31, 1]])
    rows = table(tokens, out_dtype=torch.float32)
    assert rows.shape == (2, 4, 2560) and torch.equal(rows, truth[tokens])
    assert torch.equal(table(tokens), truth[tokens].bfloat16())
    assert table(tokens[:0]).shape == (0, 4, 2560)
    target.unlink()


@pytest.mark.parametrize("label", TABLES)
def test_packed_embedding_is_saved_as_it_was_read(encoder, label):
    target = quantize(encoder, "qwen_saved.safetensors", [(label, EMBEDDING)])
    stored, saved = load_file(target), transformer(ours(target)).state_dict()
    keys = [key for key in stored if key.startswith(f"{EMBEDDING}.") and not key.endswith("comfy_quant")]
    assert len(keys) == (3 if label == "nvfp4" else 2)
    for key in keys:
        assert torch.equal(saved[key].flatten().view(torch.uint8), stored[key].flatten().view(torch.uint8)), key
    assert saved[f"{EMBEDDING}.comfy_quant"].numpy().tobytes().decode() == f'{{"format": "{label}"}}'
    target.unlink()


@pytest.mark.parametrize("label", TABLES)
def test_a_lora_on_a_packed_embedding_is_merged_and_taken_out(encoder, label):
    import comfy.model_management

    target = quantize(encoder, "qwen_patched.safetensors", [(label, EMBEDDING)])
    clip, truth = ours(target), Checkpoint(target).weight(EMBEDDING)
    before, table = encode(clip), transformer(clip).model.embed_tokens
    delta, tokens = torch.full((WORDS, 2560), 0.5), torch.tensor([[0, WORDS - 1]])
    patched = clip.clone()
    assert patched.patcher.add_patches({f"qwen3_4b.transformer.{EMBEDDING}.weight": ("diff", (delta,))}, 1.0)
    comfy.model_management.load_models_gpu([patched.patcher])
    assert relative(table(tokens, out_dtype=torch.float32), truth[tokens] + 0.5) < 0.01
    comfy.model_management.unload_all_models()
    assert torch.equal(encode(clip), before)
    target.unlink()


def test_plan_of_every_quantized_layer_is_told(quantized, loaded, caplog):
    from tessera import host

    with caplog.at_level(logging.INFO):
        clip = ours(quantized("mxfp8"))
    plans = host.plans(clip.patcher)
    assert len(plans) == 7 * LAYERS and {label for label, _ in plans.values()} == {"mxfp8"}
    facts = dispatch.read_facts(torch.device("cpu"), torch.bfloat16)
    for name, (_, plan) in plans.items():
        shape = LINEARS[name.split(".", 3)[3]]
        assert plan == dispatch.plan(formats.parse("mxfp8"), facts, "auto", shape)
    assert f"{7 * LAYERS} mxfp8: " in caplog.text and "mxfp8: transcode to" in "\n".join(host.plan_lines(clip.patcher))
    exact = host.plans(loaded("mxfp8", "exact").patcher)
    assert {plan.reason for _, plan in exact.values()} == {"speed is set to exact"}


def test_a_loaded_clip_is_the_same_source_as_its_file(encoder):
    from tessera import host

    source, file = host.clip_source(stock(encoder)), Checkpoint(encoder)
    assert source.shapes() == file.shapes()
    for name in ("model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj"):
        assert torch.equal(source.weight(name), file.weight(name))
    for key in ("model.norm.weight", f"{EMBEDDING}.weight"):
        assert source.tensors[key] == file.tensors[key] and torch.equal(source.read(key), file.read(key))


def test_an_absorb_encoder_encodes_as_its_decoded_weights_and_so_do_its_clones(encoder, caplog):
    import comfy.model_management

    names = [f"model.layers.{i}.self_attn.{part}" for i in range(LAYERS) for part in ("k_proj", "v_proj")]
    target = absorb(encoder, encoder.with_name("qwen_absorb.safetensors"), dict.fromkeys(names, "mxfp8"), rank=8)
    file, truth = Checkpoint(target), stock(encoder)
    for name in names:
        transformer(truth).get_submodule(name).weight = torch.nn.Parameter(file.weight(name), requires_grad=False)
    expected = encode(truth)
    with caplog.at_level(logging.INFO):
        clip = ours(target, "exact")
    assert f"{len(names)} layers with a low-rank branch inside the file" in caplog.text
    for made in (clip, clip.clone(), clip):
        assert relative(encode(made), expected) < 1e-5
    [side] = clip.patcher.get_nested_additional_models()
    loaded = [entry.model.model for entry in comfy.model_management.current_loaded_models]
    assert any(model is side.model for model in loaded)  # counted and moved like any model
    comfy.model_management.unload_all_models()
    assert not any(module._forward_hooks for module in clip.cond_stage_model.modules())
    assert relative(encode(clip), expected) < 1e-5
    without = relative(encode(stock(target)), expected)  # its branches
    assert without > 0.01
    assert relative(encode(ours(target)), expected) < 0.06  # by the plans' kernels
    target.unlink()
