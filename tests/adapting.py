"""One adapter of each kind for any layer, as a file's tensors: the cases that the adapters' tests share."""

import torch

from tessera.adapters import BOFT, OFT, Difference, DoRA, GLoRA, LoHa, LoKr, LoRA, Replacement

SHAPES = {"square": (24, 24), "tall": (48, 12), "wide": (12, 40), "odd": (21, 35)}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * sum(shape))).to(dtype)


def halves(number):
    """Two factors of a number, the smaller first and more than 1 if it can be."""
    small = next((n for n in (2, 3, 5, 7) if number % n == 0), 1)
    return small, number // small


def lora(out, columns, rank=3):
    return {".lora_up.weight": random(out, rank), ".lora_down.weight": random(rank, columns, seed=1)}


def loha(out, columns, rank=2):
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    shapes = ((out, rank), (rank, columns)) * 2
    return {f".{name}": random(*shape, seed=i) for i, (name, shape) in enumerate(zip(names, shapes, strict=True))}


def lokr(out, columns, factored=(False, False), rank=2):
    sizes = list(zip(halves(out), halves(columns), strict=True))
    tensors = {}
    for number, (rows, width), split in zip((1, 2), sizes, factored, strict=True):
        if split:
            tensors[f".lokr_w{number}_a"] = random(rows, rank, seed=number)
            tensors[f".lokr_w{number}_b"] = random(rank, width, seed=number + 2)
        else:
            tensors[f".lokr_w{number}"] = random(rows, width, seed=number)
    return tensors


def glora(out, columns, old=False, rank=3):
    """New: a1 [in, r], a2 [r, in], b1 [out, r], b2 [r, in]; old: the factors of each the other way round."""
    a, b = [random(columns, rank), random(rank, columns, seed=1)], [random(out, rank, seed=2), random(rank, columns)]
    names = ("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")
    return {f".{name}.weight": tensor for name, tensor in zip(names, a + b, strict=True)}


def tucker_lora(out, columns, rank=3):
    tensors = {".lora_up.weight": random(out, rank, 1, 1), ".lora_down.weight": random(rank, columns, 1, 1, seed=1)}
    return tensors | {".lora_mid.weight": random(rank, rank, 1, 1, seed=2)}


def tucker_loha(out, columns, rank=2):
    tensors = {".hada_t1": random(rank, rank, 1, 1, seed=4), ".hada_t2": random(rank, rank, 1, 1, seed=5)}
    shapes = {"a": (rank, out), "b": (rank, columns)}
    return tensors | {f".hada_w{n}_{side}": random(*shapes[side], seed=n) for n in (1, 2) for side in "ab"}


def tucker_lokr(out, columns, rank=2):
    (rows1, rows2), (width1, width2) = halves(out), halves(columns)
    return {".lokr_w1": random(rows1, width1), ".lokr_t2": random(rank, rank, 1, 1, seed=3),
            ".lokr_w2_a": random(rank, rows2, seed=1), ".lokr_w2_b": random(rank, width2, seed=2)}  # fmt: skip


def oft(out, columns):
    blocks, size = halves(out)
    return {".oft_blocks": 0.3 * random(blocks, size, size)}


def boft(out, columns, rescale=False):
    """Two stages of blocks of 4, or one of 6 where the outputs do not divide into those."""
    stages, size = (2, 4) if out % 8 == 0 else (1, 6) if out % 6 == 0 else (1, out)
    tensors = {".oft_blocks": 0.3 * random(stages, out // size, size, size)}
    return tensors | ({".rescale": 1 + 0.1 * random(out, 1)} if rescale else {})


def full(out, columns):
    return {".diff": random(out, columns)}


def replacement(out, columns):
    return {".set_weight": random(out, columns)}


KINDS = {
    "LoRA": lora,
    "LoRA of a 1x1 convolution": lambda *shape: {key: t[..., None, None] for key, t in lora(*shape).items()},
    "LoRA with a Tucker core": tucker_lora,
    "LoHa": loha,
    "LoHa of a large rank": lambda *shape: loha(*shape, rank=9),
    "LoHa with Tucker cores": tucker_loha,
    "LoKr": lokr,
    "LoKr, w1 in factors": lambda *shape: lokr(*shape, (True, False)),
    "LoKr, w2 in factors": lambda *shape: lokr(*shape, (False, True)),
    "LoKr, both in factors": lambda *shape: lokr(*shape, (True, True)),
    "LoKr with a Tucker core": tucker_lokr,
    "GLoRA": glora,
    "GLoRA, old layout": lambda *shape: glora(*shape, old=True),
    "OFT": oft,
    "BOFT": boft,
    "BOFT with rescale": lambda *shape: boft(*shape, rescale=True),
    "difference": full,
    "replacement": replacement,
}
CASES = [
    (kind, shape) for kind in KINDS for shape in SHAPES if "BOFT" not in kind or shape != "odd"
]  # even blocks only
LINEAR = [kind for kind in KINDS if "OFT" not in kind]  # in strength, but for the replacement


def adapter_of(tensors, alpha=None, dora_scale=None):
    """The adapter of one layer's tensors, without reading a file."""
    part = {key.lstrip(".").removesuffix(".weight"): tensor for key, tensor in tensors.items()}
    if "lora_up" in part:
        made = LoRA.of(part["lora_up"], part["lora_down"], alpha, part.get("lora_mid"))
    elif "diff" in part:
        made = Difference(part["diff"])
    elif "set_weight" in part:
        made = Replacement(part["set_weight"])
    elif "oft_blocks" in part and part["oft_blocks"].ndim == 3:
        made = OFT(part["oft_blocks"], alpha)
    elif "oft_blocks" in part:
        made = BOFT(part["oft_blocks"], part.get("rescale"), alpha)
    else:
        of, prefix = next(
            (of, prefix) for of, prefix in ((LoHa.of, "hada_"), (LoKr.of, "lokr_"), (GLoRA.of, ""))
            if any(key.startswith(prefix) for key in part)
        )  # fmt: skip
        made = of(**{key.removeprefix(prefix): tensor for key, tensor in part.items()}, alpha=alpha)
    return made if dora_scale is None else DoRA(made, dora_scale)
