"""LoRA files of every kind and spelling that ComfyUI reads, for given weights."""

import torch
from safetensors.torch import save_file

RANK, SIZE = 4, 0.1  # SIZE: of the change, relative to the weight's norm
PAIRS = {  # spelling of a pair: what follows the layer's name
    "kohya": (".lora_up.weight", ".lora_down.weight"),
    "diffusers": ("_lora.up.weight", "_lora.down.weight"),
    "peft": (".lora_B.weight", ".lora_A.weight"),
    "peft adapter": (".lora_B.default.weight", ".lora_A.default.weight"),
    "diffusers 2": (".lora.up.weight", ".lora.down.weight"),
    "transformers": (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    "bare": (".lora_B", ".lora_A"),
}


class Maker:
    """Random factors for one weight [out, in]; seeded."""

    def __init__(self, weight, seed):
        self.weight, self.generator = weight.float(), torch.Generator().manual_seed(seed)
        self.out, self.columns = weight.shape

    def noise(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def factor(self, delta):
        """What to multiply a change by, so that it has the wanted size."""
        return SIZE * self.weight.norm() / delta.norm()

    def pair(self, rank=RANK, scale=1.0):
        """up [out, r], down [r, in] whose product times `scale` is the change."""
        up, down = self.noise(self.out, rank), self.noise(rank, self.columns)
        root = (self.factor(up @ down) / scale).sqrt()
        return up * root, down * root


def lora(m, spelling="kohya", alpha=3.0):
    """alpha / rank is no power of two: folding it in shows."""
    up, down = m.pair(scale=1.0 if alpha is None else alpha / RANK)
    names = PAIRS[spelling]
    return {names[0]: up, names[1]: down} | ({} if alpha is None else {".alpha": torch.tensor(alpha)})


def locon(m):
    """As trained beside convolutions: four-dimensional factors."""
    made = lora(m)
    return {k: v[..., None, None] if v.ndim == 2 else v for k, v in made.items()}


def locon_mid(m):
    """With a core tensor between the factors (Tucker)."""
    up, down = m.pair()
    mid = torch.eye(RANK) + 0.3 * m.noise(RANK, RANK)
    return {".lora_up.weight": up[..., None, None], ".lora_down.weight": down[..., None, None],
            ".lora_mid.weight": mid[..., None, None]}  # fmt: skip


def dora(m, inner=lora, axis=0):
    """With a magnitude for each output (axis 0), or for each input as older trainers stored it (axis 1)."""
    norms = m.weight.norm(dim=1 - axis, keepdim=True)
    return inner(m) | {".dora_scale": norms * (1 + SIZE * m.noise(*norms.shape))}


def loha(m, rank=RANK):
    a, b, c, d = m.noise(m.out, rank), m.noise(rank, m.columns), m.noise(m.out, rank), m.noise(rank, m.columns)
    root = (m.factor((a @ b) * (c @ d)) / (3 / rank)) ** 0.25
    found = dict(zip(("w1_a", "w1_b", "w2_a", "w2_b"), (a, b, c, d), strict=True))
    return {f".hada_{name}": value * root for name, value in found.items()} | {".alpha": torch.tensor(3.0)}


def lokr(m, rows=8, columns=8):
    """Both factors whole: alpha is stored and means nothing."""
    w1, w2 = m.noise(rows, columns), m.noise(m.out // rows, m.columns // columns)
    root = m.factor(torch.kron(w1, w2)).sqrt()
    return {".lokr_w1": w1 * root, ".lokr_w2": w2 * root, ".alpha": torch.tensor(1e9)}


def lokr_factored(m, first=False):
    """The second factor, or both, as a product of its own; alpha / rank counts."""
    w1 = m.noise(8, 8)
    a, b = m.noise(m.out // 8, RANK), m.noise(RANK, m.columns // 8)
    made = {".lokr_w1": w1}
    if first:
        made = {".lokr_w1_a": m.noise(8, RANK), ".lokr_w1_b": m.noise(RANK, 8)}
        w1 = made[".lokr_w1_a"] @ made[".lokr_w1_b"]
    root = (m.factor(torch.kron(w1, a @ b)) / (3 / RANK)).sqrt()
    return made | {".lokr_w2_a": a * root, ".lokr_w2_b": b * root, ".alpha": torch.tensor(3.0)}


def glora(m):
    """W a1 a2 + b1 b2."""
    a1, a2 = m.noise(m.columns, RANK), m.noise(RANK, m.columns)
    b1, b2 = m.pair()
    root = m.factor(m.weight @ a1 @ a2).sqrt()
    found = {".a1": a1 * root, ".a2": a2 * root, ".b1": b1, ".b2": b2}
    return {f"{name}.weight": value for name, value in found.items()}


def oft(m, alpha=None, block=8):
    blocks = 0.02 * m.noise(m.out // block, block, block)
    return {".oft_blocks": blocks} | ({} if alpha is None else {".alpha": torch.tensor(alpha)})


def boft(m, stages=3, block=8):
    """Three butterfly stages and a factor for each output; ComfyUI reads none without alpha."""
    return {".oft_blocks": 0.03 * m.noise(stages, m.out // block, block, block), ".alpha": torch.tensor(2.0),
            ".rescale": 1 + 0.05 * m.noise(m.out, 1)}  # fmt: skip


def diff(m):
    delta = m.noise(m.out, m.columns)
    return {".diff": delta * m.factor(delta)}


def narrow_diff(m):
    """A difference that a few directions carry, as a finetune's: spectrum 1/k^2."""
    rank = 24
    up, down = m.noise(m.out, rank), m.noise(rank, m.columns)
    delta = (up * torch.arange(1, rank + 1) ** -2.0) @ down
    return {".diff": delta * m.factor(delta)}


def bias_diff(m):
    return {".diff_b": 0.3 * m.noise(m.out)}


def replacement(m):
    return {".set_weight": m.weight + diff(m)[".diff"]}


KINDS = {  # name: factors by what follows the layer's name
    "lora": lora,
    "lora without alpha": lambda m: lora(m, "peft", alpha=None),
    "locon": locon,
    "locon with mid": locon_mid,
    "dora": dora,
    "dora on inputs": lambda m: dora(m, axis=1),
    "loha": loha,
    "loha of rank 32": lambda m: loha(m, 32),
    "dora loha": lambda m: dora(m, loha),
    "lokr": lokr,
    "lokr of small rank": lambda m: lokr(m, m.out // 4, m.columns // 4),
    "lokr factored": lokr_factored,
    "lokr factored twice": lambda m: lokr_factored(m, first=True),
    "dora lokr": lambda m: dora(m, lokr),
    "glora": glora,
    "oft": oft,
    "oft with constraint": lambda m: oft(m, alpha=0.5),
    "boft": boft,
    "dora oft": lambda m: dora(m, lambda m: oft(m, alpha=0.5)),
    "diff": diff,
    "diff of small rank": narrow_diff,
    "set": replacement,
}  # fmt: skip
WITH_BIAS = {
    "diff_b": bias_diff,
    "lora and diff_b": lambda m: lora(m, "peft", alpha=None) | bias_diff(m),
    "diff and diff_b": lambda m: diff(m) | bias_diff(m),
}


def make(kind, weight, seed=0):
    """The tensors of one adapter for a weight [out, in], by what follows the layer's name."""
    return (KINDS | WITH_BIAS)[kind](Maker(weight, seed))


def save(path, layers, dtype=torch.float16, seed=0, others=None):
    """A file of {layer's name in the file: (kind or function of a Maker, weight [out, in])}, factors in `dtype`.

    `others` are tensors by their whole names."""
    tensors = {key: _stored(value, dtype) for key, value in (others or {}).items()}
    for number, (base, (kind, weight)) in enumerate(layers.items()):
        made = make(kind, weight, seed + number) if isinstance(kind, str) else kind(Maker(weight, seed + number))
        tensors |= {f"{base}{suffix}": _stored(value, dtype) for suffix, value in made.items()}
    save_file(tensors, path)
    return path


def _stored(value, dtype):
    return (value if value.ndim == 0 else value.to(dtype)).contiguous()
