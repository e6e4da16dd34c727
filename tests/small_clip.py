"""A text encoder for tests, a random narrow Qwen3-4B: as files, and as a node pack that loads one and encodes.

Stands in custom_nodes as it is; the tests import it too.
"""

import torch
from safetensors.torch import save_file

LAYERS, WORDS = 3, 1009  # the host takes the embedding after the last layer but one
OPTIONS = {"qwen3_4b_model_config": {  # the host's own option for other sizes
    "num_hidden_layers": LAYERS, "vocab_size": WORDS, "intermediate_size": 256, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}}  # fmt: skip
LINEARS = {
    "self_attn.q_proj": (256, 2560), "self_attn.k_proj": (128, 2560), "self_attn.v_proj": (128, 2560),
    "self_attn.o_proj": (2560, 256), "mlp.gate_proj": (256, 2560), "mlp.up_proj": (256, 2560),
    "mlp.down_proj": (2560, 256),
}  # fmt: skip
NAMES = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in LINEARS]
KEYS = "text_encoders.qwen3_4b.transformer."  # what ComfyUI calls its layers in a LoRA file


def save(path):
    """The encoder in bf16."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    def ones(size):
        return torch.ones(size, dtype=torch.bfloat16)

    tensors = {"model.embed_tokens.weight": random(WORDS, 2560), "model.norm.weight": ones(2560)}
    for i in range(LAYERS):
        tensors |= {f"model.layers.{i}.{name}.weight": random(*shape) for name, shape in LINEARS.items()}
        for name, size in (("self_attn.q_norm", 128), ("self_attn.k_norm", 128), ("input_layernorm", 2560),
                           ("post_attention_layernorm", 2560)):  # fmt: skip
            tensors[f"model.layers.{i}.{name}.weight"] = ones(size)
    save_file(tensors, path)
    return path


def quantize(source, path, label):
    """The encoder with its linear layers in one format."""
    from tessera import formats
    from tessera.checkpoint import Checkpoint
    from tessera.job import Job
    from tessera.quantization import recipe
    from tessera.quantization.pipeline import Settings

    rule = recipe.Rule(formats.parse(label), ("**.{self_attn,mlp}.*_proj",), "test")
    Job(Checkpoint(source), path, recipe.Recipe(label, "", (rule,)), settings=Settings(0, rounding="nearest")).run()
    return path


def stock(path):
    import comfy.sd

    return comfy.sd.load_clip([str(path)], None, comfy.sd.CLIPType.LUMINA2, OPTIONS)


def encode(clip, tokens=tuple(range(3, 40))):
    """The embedding [1, tokens, 2560] of a list of tokens."""
    batch = {"qwen3_4b": [[(token, 1.0) for token in tokens]]}
    return clip.encode_from_tokens(batch, return_pooled=True)[0].float()


def transformer(clip):
    return clip.cond_stage_model.qwen3_4b.transformer


class Load:
    """Load CLIP for a small encoder."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "load", ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}}

    def load(self, name):
        import folder_paths

        return (stock(folder_paths.get_full_path_or_raise("text_encoders", name)),)


class Encode:
    """Says what an encoder makes of some tokens; passes a MODEL on."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "encode", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip": ("CLIP",)}}

    def encode(self, clip):
        return {"ui": {"embedding": encode(clip)[0, -1].tolist()}}


NODE_CLASS_MAPPINGS = {"SmallCLIP": Load, "SmallEncode": Encode}
