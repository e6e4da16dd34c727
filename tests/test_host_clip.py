"""Inside the real ComfyUI: quantized Qwen3-4B text encoders, real width and vocabulary, 3 of the 36 layers."""

import gc
import logging

import pytest
import torch
from safetensors.torch import save_file

from absorbing import absorb
from comfy_host import relative
from tessera import formats
from tessera.checkpoint import Checkpoint
from tessera.job import Job
from tessera.quantization import recipe
from tessera.quantization.pipeline import Settings

pytestmark = pytest.mark.host
LAYERS = 3
OPTIONS = {"qwen3_4b_model_config": {"num_hidden_layers": LAYERS}}  # the host's own option for fewer layers
LINEARS = {
    "self_attn.q_proj": (4096, 2560), "self_attn.k_proj": (1024, 2560), "self_attn.v_proj": (1024, 2560),
    "self_attn.o_proj": (2560, 4096), "mlp.gate_proj": (9728, 2560), "mlp.up_proj": (9728, 2560),
    "mlp.down_proj": (2560, 9728),
}  # fmt: skip
EMBEDDING = "model.embed_tokens"
TEXT = "a red star above a lighthouse"


@pytest.fixture(scope="module")
def encoder(models):
    """A bf16 text encoder of random weights in the host's folder."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    ones = torch.ones(2560, dtype=torch.bfloat16)
    tensors = {f"{EMBEDDING}.weight": random(151936, 2560), "model.norm.weight": ones}
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


def quantize(source, name, rules):
    """The encoder quantized by a list of (label, pattern), without low rank."""
    made = tuple(recipe.Rule(formats.parse(label), (pattern,), "test") for label, pattern in rules)
    target = source.with_name(name)
    target.unlink(missing_ok=True)
    Job(Checkpoint(source), target, recipe.Recipe(name, "", made), settings=Settings(0, rounding="nearest")).run()
    return target


def encode(clip):
    result = clip.encode_from_tokens(clip.tokenize(TEXT), return_pooled=True)[0].float()
    gc.collect()
    return result


def ours(path):
    import comfy.sd

    from tessera import host

    return host.load_clip(str(path), comfy.sd.CLIPType.LUMINA2, OPTIONS)


def stock(path):
    import comfy.sd

    return comfy.sd.load_clip([str(path)], None, comfy.sd.CLIPType.LUMINA2, OPTIONS)


def cosine(a, b):
    return torch.cosine_similarity(a.flatten(0, -2), b.flatten(0, -2), dim=-1).min().item()


def test_plain_encoder_encodes_as_with_the_stock_loader(encoder):
    assert torch.equal(encode(ours(encoder)), encode(stock(encoder)))


def test_recipe_keeps_the_embedding_and_encodes_as_with_the_stock_loader(encoder):
    target = encoder.with_name("qwen_int8.safetensors")
    Job(Checkpoint(encoder), target, recipe.builtin("int8_convrot")).run()
    file = Checkpoint(target)
    assert len(file.layers) == 7 * LAYERS and EMBEDDING not in file.layers
    mine = encode(ours(target))
    assert torch.equal(mine, encode(stock(target)))
    assert cosine(mine, encode(stock(encoder))) > 0.999
    target.unlink()


def test_quantized_embedding_encodes_as_with_the_stock_loader(encoder):
    """What convert_to_quant's INT8 ConvRot flags make of a text encoder: the embedding table is rotated int8 too."""
    target = quantize(encoder, "qwen_r3.safetensors", [("int8_convrot_64", "**")])
    assert EMBEDDING in Checkpoint(target).layers
    mine = encode(ours(target))
    assert torch.equal(mine, encode(stock(target)))
    assert cosine(mine, encode(stock(encoder))) > 0.999
    target.unlink()


def test_embedding_in_a_format_the_host_cannot_take_is_decoded(encoder):
    target = quantize(encoder, "qwen_fp4.safetensors", [("nvfp4", EMBEDDING), ("mxfp8", "**.mlp.*")])
    clip = ours(target)
    table = clip.cond_stage_model.qwen3_4b.transformer.model.embed_tokens.weight
    assert table.dtype == torch.bfloat16 and tuple(table.shape) == (151936, 2560)
    assert cosine(encode(clip), encode(stock(encoder))) > 0.9
    target.unlink()


def test_plan_of_every_quantized_layer_is_told(encoder):
    from tessera import host

    target = quantize(encoder, "qwen_plan.safetensors", [("mxfp8", "**.mlp.*")])
    plans = host.plans(ours(target).patcher)
    assert len(plans) == 3 * LAYERS and {label for label, _ in plans.values()} == {"mxfp8"}
    assert {plan for _, plan in plans.values()} == {host.TEXT_ENCODER}
    target.unlink()


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
    transformer = truth.cond_stage_model.qwen3_4b.transformer
    for name in names:
        transformer.get_submodule(name).weight = torch.nn.Parameter(file.weight(name), requires_grad=False)
    expected = encode(truth)
    with caplog.at_level(logging.INFO):
        clip = ours(target)
    assert f"{len(names)} layers with a low-rank branch inside the file" in caplog.text
    for made in (clip, clip.clone(), clip):
        assert relative(encode(made), expected) < 1e-5
    [side] = clip.patcher.get_nested_additional_models()
    loaded = [entry.model.model for entry in comfy.model_management.current_loaded_models]
    assert any(model is side.model for model in loaded)  # counted and moved like any model
    comfy.model_management.unload_all_models()
    assert not any(module._forward_hooks for module in clip.cond_stage_model.modules())
    assert relative(encode(clip), expected) < 1e-5
    assert relative(encode(stock(target)), expected) > 0.01  # without its branches
    target.unlink()
