"""Inside the real ComfyUI: an extracted LoRA repairs a quantized file, and gives a fine-tune from its base."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_host import ROOT, TINY, Trajectory, calibrate, node, relative, sample
from synthetic import fingerprint

pytestmark = pytest.mark.host
QUANTIZED, ORIGINAL = "diffusion_models/tiny_nvfp4.safetensors", "diffusion_models/tiny.safetensors"
NOT_LOADED = ("lora key not loaded", "NOT LOADED")
WORDS, WIDTH, LAYERS = 64, 2560, 3  # the host knows Qwen3-4B by its width
PARTS = {
    "self_attn.q_proj": (256, WIDTH), "self_attn.k_proj": (128, WIDTH), "self_attn.v_proj": (128, WIDTH),
    "self_attn.o_proj": (WIDTH, 256), "mlp.gate_proj": (320, WIDTH), "mlp.up_proj": (320, WIDTH),
    "mlp.down_proj": (WIDTH, 320), "self_attn.q_norm": (128,), "self_attn.k_norm": (128,),
    "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
}  # fmt: skip
OPTIONS = {"qwen3_4b_model_config": {  # the host's own option for other sizes
    "num_hidden_layers": LAYERS, "vocab_size": WORDS, "intermediate_size": 320,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}}  # fmt: skip


def extract(base, tuned, name, **options):
    """(lora_name, report) of the node."""
    return node("TesseraExtractLoRA").execute(base, tuned, name, **options).args


def load(name):
    return node("TesseraDiffusionModelLoader").execute(name, speed="exact").args[0]


def stock(model, lora_name):
    import nodes

    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, lora_name, 1.0)[0]


def error(reference, model):
    errors = Trajectory(reference).velocities(model)
    return sum(errors) / len(errors)


def test_the_node_explains_itself(models):
    schema = node("TesseraExtractLoRA").GET_SCHEMA()
    assert all(entry.tooltip for entry in (*schema.inputs, *schema.outputs))
    page = (ROOT / "web" / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n") and schema.description and schema.search_aliases
    assert all(f"| `{entry.id}` |" in page for entry in schema.inputs)


@pytest.fixture(scope="module")
def correction(tiny):
    return extract(QUANTIZED, ORIGINAL, "repair/mine")


def test_a_correction_lowers_the_velocity_error_as_the_one_written_with_the_model(models, tiny, correction):
    name, report = correction
    assert name == "repair/mine.safetensors" and "correction LoRA" in report and "28 layers, rank 32" in report
    mine, written = (load_file(models / "loras" / file) for file in (name, tiny["lora"]))
    assert mine.keys() == written.keys() and all(torch.equal(mine[key], written[key]) for key in mine)
    reference, quantized = load(tiny["bf16"]), load(tiny["model"])
    corrected = node("TesseraCorrectionLoRA").execute(quantized, name, 1.0).args[0]
    assert error(reference, corrected) < 0.85 * error(reference, quantized)


def test_a_calibration_lowers_it_further(tiny, correction):
    reference, quantized = load(tiny["bf16"]), load(tiny["model"])
    recorder = calibrate(
        reference, [("big red star center on white plain", 7), ("small blue ring top on gray dots", 8)]
    )
    name, report = extract(QUANTIZED, ORIGINAL, "repair/weighted", calibration=recorder)
    attach = node("TesseraCorrectionLoRA").execute
    plain, weighted = (attach(quantized, lora, 1.0).args[0] for lora in (correction[0], name))
    assert "mean output error of 28 calibrated layers" in report
    assert error(reference, weighted) < 0.8 * error(reference, plain)


def test_the_stock_loaders_read_every_key(tiny, correction, caplog):
    """They merge, which loses most of a correction; but they find a layer for each key."""
    import nodes

    model = nodes.UNETLoader().load_unet(tiny["model"], "default")[0]
    with caplog.at_level(logging.WARNING):
        merged = stock(model, correction[0])
    assert not [r for r in caplog.records if any(words in r.getMessage() for words in NOT_LOADED)]
    assert len(merged.patches) == 28


def test_an_unnamed_correction_is_found_beside_its_checkpoint(models, tiny):
    (models / "loras" / tiny["lora"]).rename(models / "loras" / "away.safetensors")
    try:
        name, _ = extract(QUANTIZED, ORIGINAL, "")
        assert name == "tiny_nvfp4_lora.safetensors"
        found = node("TesseraCorrectionLoRA").execute(load(tiny["model"])).args[0]
        assert not torch.equal(sample(found), sample(load(tiny["model"])))
    finally:
        (models / "loras" / "away.safetensors").rename(models / "loras" / tiny["lora"])


def test_a_fine_tune_comes_back_through_the_stock_loader_with_its_norms(models, tiny, caplog):
    tensors, generator = load_file(TINY), torch.Generator().manual_seed(0)
    for key, weight in tensors.items():
        if weight.ndim == 2 and "layers.0." in key:
            factors = [torch.randn(size, generator=generator) for size in ((weight.shape[0], 4), (4, weight.shape[1]))]
            difference = factors[0] @ factors[1]
            tensors[key] = weight.float() + 0.3 * weight.float().norm() / difference.norm() * difference
        elif weight.ndim == 1 and "norm" in key:
            tensors[key] = weight.float() * 1.1
    path = models / "diffusion_models" / "tuned.safetensors"
    save_file(tensors, path)
    name, report = extract(ORIGINAL, "diffusion_models/tuned.safetensors", "", tolerance=0.01)
    assert name == "tuned_minus_tiny.safetensors" and "rank 4" in report
    assert any(key.endswith("norm1.diff") for key in load_file(models / "loras" / name))
    base, tuned = load(tiny["bf16"]), load(path.name)
    with caplog.at_level(logging.WARNING):
        merged = stock(base, name)
    assert not [r for r in caplog.records if any(words in r.getMessage() for words in NOT_LOADED)]
    assert relative(sample(merged), sample(tuned)) < 2e-3 < 0.1 < relative(sample(base), sample(tuned))


def test_interrupting_leaves_no_file_and_a_second_run_never_overwrites(models, tiny, correction, monkeypatch):
    import comfy.model_management

    from tessera import host

    call, before = host.Progress.__call__, fingerprint(models)

    def interrupt(self, step):
        if step.index == 5:
            comfy.model_management.interrupt_current_processing(True)
        call(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(host.Progress, "__call__", interrupt)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            extract(QUANTIZED, ORIGINAL, "stopped")
    with pytest.raises(ValueError, match=r"mine\.safetensors: already exists; choose another name"):
        extract(QUANTIZED, ORIGINAL, "repair/mine")
    with pytest.raises(ValueError, match="leaves the folder"):
        extract(QUANTIZED, ORIGINAL, "../../outside")
    assert fingerprint(models) == before


def encoder(seed):
    """A small text encoder that the host takes for Qwen3-4B."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed_tokens": (WORDS, WIDTH), "norm": (WIDTH,)}
    shapes |= {f"layers.{i}.{part}": shape for i in range(LAYERS) for part, shape in PARTS.items()}
    return {f"model.{name}.weight": torch.randn(shape, generator=generator).bfloat16() * 0.02
            for name, shape in shapes.items()}  # fmt: skip


def test_the_host_has_a_layer_for_every_key_of_a_text_encoders_lora(models):
    import comfy.lora
    import comfy.sd

    folder = models / "text_encoders"
    for seed, name in enumerate(("te", "te_tuned")):
        save_file(encoder(seed), folder / f"{name}.safetensors")
    name, _ = extract("text_encoders/te.safetensors", "text_encoders/te_tuned.safetensors", "", rank=8)
    assert name == "te_tuned_minus_te.safetensors"
    clip = comfy.sd.load_clip([str(folder / "te.safetensors")], None, comfy.sd.CLIPType.LUMINA2, OPTIONS)
    known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    tensors = load_file(models / "loras" / name)
    assert {key.split(".lora_")[0].removesuffix(".diff") for key in tensors} <= known.keys()
    patches = comfy.lora.load_lora(tensors, known)
    assert len(patches) == len(encoder(0)) and set(clip.patcher.add_patches(patches)) == patches.keys()
