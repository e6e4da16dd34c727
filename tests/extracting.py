"""Pairs of checkpoints that differ in a known way, and what a LoRA extracted from them holds."""

import torch
from safetensors.torch import load_file, save_file

from synthetic import block, noise, save
from tessera import formats
from tessera.checkpoint import Checkpoint
from tessera.extraction import Extraction
from tessera.quantization import calibration

LABELS = ["nvfp4", "mxfp8", "int8", "int8_row", "int8_convrot_64", "fp8_e4m3", "fp8_e5m2"]
PREFIXES = ["", "diffusion_model.", "model.diffusion_model."]
LAYERS = ["layers.0.attention.out", "layers.0.attention.qkv", "layers.0.feed_forward.w1"]
QKV, NORM = "layers.0.attention.qkv", "layers.0.attention_norm1"
FP16 = 1e-3  # relative error of a product after rounding both factors


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(rank, rows=96, columns=128, seed=0):
    """A difference of that rank, a fifth of the weights' size."""
    return random(rows, rank, seed=seed) @ random(rank, columns, seed=seed + 1) * (0.004 / rank**0.5)


def tuned_block(ranks=(4, 4, 4)):
    """(base, tuned): a block, and the same with low-rank differences in fp32."""
    base = block()
    added = {
        f"{name}.weight": low_rank(rank, seed=10 * i) for i, (name, rank) in enumerate(zip(LAYERS, ranks, strict=True))
    }
    return base, base | {key: base[key].float() + difference for key, difference in added.items()}


def quantized(path, source, label, names=LAYERS, prefix=""):
    """A checkpoint with those layers of `source` in a format, rounded to nearest."""
    tensors = {prefix + key: tensor for key, tensor in source.items()}
    for name in names:
        weight = tensors.pop(f"{prefix}{name}.weight").float()
        format = formats.parse(label).for_shape(*weight.shape)
        entries = format.pack(format.encode(weight)) | {"comfy_quant": formats.marker(format.record())}
        tensors |= {f"{prefix}{name}.{suffix}": tensor.contiguous() for suffix, tensor in entries.items()}
    save_file(tensors, path)
    return path


def extract(base, tuned, target=None, **options):
    """(report, tensors of the LoRA)."""
    target = target or base.with_name("lora.safetensors")
    report = Extraction(base, tuned, target, **options).run()
    return report, load_file(target)


def product(tensors, name, prefix="diffusion_model."):
    return tensors[f"{prefix}{name}.lora_up.weight"].float() @ tensors[f"{prefix}{name}.lora_down.weight"].float()


def statistics(file, names=LAYERS, columns=128, bent=True):
    """A calibration of inputs of uneven power and with a mean."""
    power = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(0))]
    sites = {}
    for seed, name in enumerate(names):
        sites[name] = calibration.Accumulator(columns)
        sites[name].add((random(512, columns, seed=seed) + torch.linspace(-1, 1, columns)) * power)
    made = {name: site.statistics() for name, site in sites.items()}
    return calibration.Calibration(made, {name: name for name in made}, calibration.fingerprint(file), 1)


def write_pair(tmp_path):
    """(base, tuned) with rank-4 differences in three layers."""
    base, tuned = tuned_block()
    return save(tmp_path / "base.safetensors", base), save(tmp_path / "tuned.safetensors", tuned)


def write_calibrated(tmp_path):
    """(base, original, calibration) of a quantized block with a bias in one layer."""
    source = block() | {f"{QKV}.bias": noise(96, seed=3)}
    original = save(tmp_path / "original.safetensors", source)
    return quantized(tmp_path / "base.safetensors", source, "nvfp4"), original, statistics(Checkpoint(original))
