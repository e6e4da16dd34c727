"""A random mini Flux, made on the fly: the real model's key names at width 256, which ComfyUI detects by itself."""

import torch
from safetensors.torch import save_file

DIM, HEAD, TEXT, POOLED, CHANNELS = 256, 128, 64, 32, 16  # ComfyUI takes heads of 128 and reads the rest from shapes
TOKENS = 12  # of a prompt


def shapes(double=2, single=2):
    """Key -> shape of a Flux with that many blocks, as black-forest-labs publish it."""
    found = {}

    def linear(name, out_features, in_features):
        found[f"{name}.weight"], found[f"{name}.bias"] = [out_features, in_features], [out_features]

    linear("img_in", DIM, 4 * CHANNELS)
    linear("txt_in", DIM, TEXT)
    for name, width in (("time_in", 256), ("vector_in", POOLED), ("guidance_in", 256)):
        linear(f"{name}.in_layer", DIM, width)
        linear(f"{name}.out_layer", DIM, DIM)
    for block in (f"double_blocks.{i}" for i in range(double)):
        for stream in ("img", "txt"):
            linear(f"{block}.{stream}_mod.lin", 6 * DIM, DIM)
            linear(f"{block}.{stream}_attn.qkv", 3 * DIM, DIM)
            linear(f"{block}.{stream}_attn.proj", DIM, DIM)
            linear(f"{block}.{stream}_mlp.0", 4 * DIM, DIM)
            linear(f"{block}.{stream}_mlp.2", DIM, 4 * DIM)
            found |= {f"{block}.{stream}_attn.norm.{norm}_norm.scale": [HEAD] for norm in ("query", "key")}
    for block in (f"single_blocks.{i}" for i in range(single)):
        linear(f"{block}.linear1", 7 * DIM, DIM)
        linear(f"{block}.linear2", DIM, 5 * DIM)
        linear(f"{block}.modulation.lin", 3 * DIM, DIM)
        found |= {f"{block}.norm.{norm}_norm.scale": [HEAD] for norm in ("query", "key")}
    linear("final_layer.linear", 4 * CHANNELS, DIM)
    linear("final_layer.adaLN_modulation.1", 2 * DIM, DIM)
    return found


def tensors(seed=0, **blocks):
    """Seeded bf16 weights that keep activations of order 1: N(0, 1/in) matrices, small biases, norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for key, shape in shapes(**blocks).items():
        value = torch.randn(shape, generator=generator)
        value = 1 + 0.1 * value if key.endswith("scale") else value * (shape[-1] ** -0.5 if len(shape) == 2 else 0.02)
        made[key] = value.to(torch.bfloat16)
    return made


def save(path, seed=0, **blocks):
    save_file(tensors(seed, **blocks), path)
    return path


def call(seed=0):
    """Arguments of apply_model: a noisy 64x64 picture's latent, a prompt, its pooled vector, guidance."""
    generator = torch.Generator().manual_seed(seed)
    latent, text, pooled = (torch.randn(s, generator=generator) for s in ((1, CHANNELS, 8, 8), (1, TOKENS, TEXT),
                                                                         (1, POOLED)))  # fmt: skip
    return {"x": latent, "t": torch.tensor([0.7]), "c_crossattn": text, "y": pooled, "guidance": torch.tensor([3.5])}
