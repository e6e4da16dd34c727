"""Small sources with the key names of real models, and what tests ask of the files made from them."""

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

ZIMAGE = json.loads(Path(__file__).with_name("data").joinpath("zimage_keys.json").read_text())


def noise(*shape, seed=0):
    """Seeded bf16 weights, N(0, 0.02)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)


def zimage(dim=256):
    """Z-Image's 453 keys with its 3840 channels scaled to `dim` and its FFN to 3 * dim."""
    scaled = {3840: dim, 11520: 3 * dim, 10240: 3 * dim, 15360: 4 * dim, 2560: 64}
    shapes = {key: [scaled.get(n, n) for n in shape] for key, shape in ZIMAGE.items()}
    everything = noise(sum(math.prod(shape) for shape in shapes.values()))
    parts = everything.split([math.prod(shape) for shape in shapes.values()])
    return {key: part.view(shape).clone() for (key, shape), part in zip(shapes.items(), parts, strict=True)}


def hostable_zimage():
    """`zimage` at width 256 with the head and time widths ComfyUI gives a model of that size: it loads there."""
    tensors = zimage()
    for key in tensors:
        if key.endswith(("q_norm.weight", "k_norm.weight")):
            tensors[key] = tensors[key][:64].clone()
        if key.startswith("t_embedder.mlp."):
            tensors[key] = tensors[key][tuple(slice(256) for _ in tensors[key].shape)].clone()
    return tensors


def block(rows=96, columns=128):
    """One Z-Image-like block: three linears, a norm and a bias."""
    names = ("layers.0.attention.qkv", "layers.0.attention.out", "layers.0.feed_forward.w1")
    weights = {f"{name}.weight": noise(rows, columns, seed=seed) for seed, name in enumerate(names)}
    return weights | {"layers.0.attention_norm1.weight": noise(columns, seed=8), "final.bias": noise(7, seed=9)}


def qwen():
    """A text encoder's keys: an embedding, two linears, a norm."""
    return {
        "model.embed_tokens.weight": noise(96, 64),
        "model.layers.0.self_attn.q_proj.weight": noise(64, 64, seed=1),
        "model.layers.0.mlp.down_proj.weight": noise(64, 128, seed=2),
        "model.norm.weight": noise(64, seed=3),
    }


def save(path, tensors, prefix="", metadata=None):
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, path, metadata=metadata)
    return path


def recipe_file(path, *rules, default="keep"):
    """A user's recipe of (format, pattern) rules."""
    text = "".join(
        f'[[rule]]\n{format} = ["{pattern}"]\nreason = "test"\noptional = true\n' for format, pattern in rules
    )
    path.write_text(f'default = "{default}"\n{text}')
    return path


def fingerprint(folder):
    """sha256 of every file below a folder, hidden ones included."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
