"""LoRA files: low-rank pairs in every spelling, by the name of what they change."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from .checkpoint import PREFIXES, Checkpoint
from .formats import TensorSpec
from .quantization.lowrank import LowRank

_PART = re.compile(
    r"[._](?P<part>lora_(?:up|down|A|B)|lora[.](?:up|down))(?:\.default)?(?:\.weight)?$"  # kohya, PEFT, diffusers
)
_UP = ("lora_up", "lora_B", "lora.up")
_OTHERS = {"alpha": "alpha", "diff_b": "bias"}  # parts of a pair that stand under their own name
OTHER_ADAPTERS = ("dora_scale", "lokr_", "hada_", "oft_", "glora", ".diff", ".set_weight", "reshape_weight", "lora_mid")


def read(path: Path) -> dict[str, LowRank]:
    """Every pair of a LoRA file by its base name, repeated prefixes stripped and alpha/rank folded into `up`.

    A pair's bias difference (`diff_b` [out]) is kept beside it, as it is. Raises ValueError if the file holds anything
    but low-rank pairs, or half a pair.
    """
    file = Checkpoint(Path(path))
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key in file.tensors:
        match = _PART.search(key)
        base, part = (key[: match.start()], match["part"]) if match else key.rpartition(".")[::2]
        if match is None and part not in _OTHERS:
            kind = next((kind for kind in OTHER_ADAPTERS if kind in key), None)
            raise _no_pair(file.name, key, f"a {kind.strip('._')} adapter" if kind else "not a LoRA tensor")
        kind = _OTHERS.get(part) or ("up" if part in _UP else "down")
        found = parts.setdefault(strip_repeated_prefix(base), {})
        if kind in found:
            raise ValueError(f"{file.name}: {key}: the file has this factor twice, in two spellings; keep one of them")
        found[kind] = file.read(key)
    return {base: _pair(file.name, base, found) for base, found in parts.items()}


def strip_repeated_prefix(base: str) -> str:
    """diffusion_model.model.diffusion_model.x -> diffusion_model.x: convert_to_quant doubles it (format.md 4)."""
    for outer in PREFIXES:
        for inner in PREFIXES:
            if base.startswith(outer + inner):
                return strip_repeated_prefix("diffusion_model." + base.removeprefix(outer + inner))
    return base


def _no_pair(file: str, key: str, found: str) -> ValueError:
    return ValueError(f"{file}: {key}: {found}; only plain low-rank LoRAs can ride beside a weight, use ComfyUI's "
                      "LoraLoaderModelOnly for this file")  # fmt: skip


def _pair(file: str, base: str, found: dict[str, torch.Tensor]) -> LowRank:
    if found.keys() == {"bias"}:
        raise _no_pair(file, f"{base}.diff_b", "a bias difference without a low-rank pair")
    missing = [part for part in ("up", "down") if part not in found]
    if missing:
        raise ValueError(f"{file}: {base}: lora_{missing[0]} is missing; the file is incomplete, download it again")
    up, down = found["up"], found["down"]
    if up.ndim != 2 or down.ndim != 2 or not up.shape[1] == down.shape[0] > 0:
        raise ValueError(f"{file}: {base}: up {list(up.shape)} and down {list(down.shape)} are no [out, r] and "
                         "[r, in]; use ComfyUI's LoraLoaderModelOnly for this file")  # fmt: skip
    if "alpha" in found and found["alpha"].numel() != 1:
        raise ValueError(f"{file}: {base}: alpha is {list(found['alpha'].shape)}, not one number; repair the file")
    bias = found.get("bias")
    if bias is not None and (bias.ndim != 1 or len(bias) != len(up) or not bias.is_floating_point()):
        raise ValueError(f"{file}: {base}: diff_b is {TensorSpec(bias.dtype, tuple(bias.shape))}, the layer has "
                         f"{len(up)} outputs; the file is damaged, download it again")  # fmt: skip
    scale = found["alpha"].item() / down.shape[0] if "alpha" in found else 1.0
    return LowRank(up if scale == 1.0 else (up.float() * scale).to(up.dtype), down, bias)
