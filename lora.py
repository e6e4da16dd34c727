"""LoRA files: adapters of every kind, or plain low-rank pairs, in every spelling, by the name of what they change."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .adapters import parts as adapter_parts
from .adapters.base import Change
from .checkpoint import PREFIXES, Checkpoint, read_header
from .formats import TensorSpec
from .quantization.lowrank import LowRank

_PART = re.compile(
    r"[._](?P<part>lora_(?:up|down|A|B)|lora[.](?:up|down))(?:\.default)?(?:\.weight)?$"  # kohya, PEFT, diffusers
)
_UP = ("lora_up", "lora_B", "lora.up")
_OTHERS = {"alpha": "alpha", "diff_b": "bias"}  # parts of a pair that stand under their own name
OTHER_ADAPTERS = ("dora_scale", "lokr_", "hada_", "oft_", "glora", ".diff", ".set_weight", "reshape_weight", "lora_mid")
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
STARTS = {  # of files that are no safetensors: what they are
    b"PK\x03\x04": "a pickle or zip archive", b"\x80": "a pickle", b"GGUF": "a GGUF file", b"<": "a web page",
    b"version ": "a Git LFS pointer, not the file itself",
}  # fmt: skip
SCALES = (".weight_scale", ".weight_scale_2", ".scale_weight", ".comfy_quant", ".quant_state")  # of quantized tensors
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MAX_LORA = 16_000_000_000  # bytes; all of them are read at once
DAMAGED = "the file is damaged, download it again"
NO_PART = "not a part of any adapter that ComfyUI loads"
UNKNOWN = {  # ends of keys that some tools write: why nothing comes of them
    "lora_magnitude_vector": "a magnitude of PEFT's DoRA, which ComfyUI does not load",
    "lora_magnitude_vector.weight": "a magnitude of PEFT's DoRA, which ComfyUI does not load",
    ".on_input": "IA3, which ComfyUI does not load",
    "lora_B.bias": "a factor's own bias, which ComfyUI does not load",
}


@dataclass(frozen=True)
class AdapterFile:
    """What a LoRA file changes, by base name (repeated prefixes stripped)."""

    name: str
    identity: tuple[str, int, int]  # path, time of change in ns, bytes
    changes: dict[str, Change] = field(default_factory=dict)
    raw: dict[str, dict[str, Tensor]] = field(
        default_factory=dict
    )  # by base: the tensors as ComfyUI's loader takes them
    ignored: dict[str, str] = field(default_factory=dict)  # by key: why nothing comes of it


def read_adapters(path: Path, rename: Callable[[dict], dict] | None = None) -> AdapterFile:
    """Everything a LoRA file changes, of every kind and in every spelling that ComfyUI loads, read once.

    `rename` gets all tensors by key and gives them under the keys to go by. What no adapter is made of is in `ignored`.
    Raises ValueError naming file, layer, finding and remedy if the file is damaged, incomplete or no LoRA at all.
    """
    path = Path(path)
    tensors = _tensors(path)
    if rename is not None:
        try:
            tensors = rename(tensors)
        except (KeyError, IndexError) as problem:
            raise ValueError(f"{path.name}: not all is there that its names announce ({problem}); "
                             f"{adapter_parts.INCOMPLETE}") from None  # fmt: skip
    stat = path.stat()
    file = AdapterFile(path.name, (str(path.resolve()), stat.st_mtime_ns, stat.st_size))
    for base, found in _by_base(file, tensors).items():
        try:
            change, unused = adapter_parts.change(found.parts)
        except ValueError as problem:
            remedy = adapter_parts.INCOMPLETE if str(problem).endswith("missing") else DAMAGED
            said = str(problem) if ";" in str(problem) else f"{problem}; {remedy}"
            raise ValueError(f"{path.name}: {base}: {said}") from None
        file.ignored.update({base + found.suffixes[part]: why for part, why in unused.items()})
        if change is not None:
            file.changes[base], file.raw[base] = change, found.raw(base, unused)
    if not file.changes:
        raise _no_lora(file.name, tensors, file.ignored)
    return file


def _by_base(file: AdapterFile, tensors: dict[str, Tensor]) -> dict[str, adapter_parts.Found]:
    bases: dict[str, adapter_parts.Found] = {}
    scaled = next((key for key in tensors if key.endswith(SCALES)), None)
    for key, tensor in tensors.items():
        place = adapter_parts.split(key)
        if place is None:
            file.ignored[key] = next((why for end, why in UNKNOWN.items() if key.endswith(end)), NO_PART)
            continue
        base, part, suffix = place
        found = bases.setdefault(strip_repeated_prefix(base), adapter_parts.Found())
        if part in found.parts:
            raise ValueError(f"{file.name}: {key}: the file has this twice, in two spellings; keep one of them")
        if part not in ("alpha", "reshape_weight"):
            tensor = _plain(file.name, key, tensor, scaled)
        if tensor.is_floating_point() and not adapter_parts.finite(tensor):
            raise ValueError(f"{file.name}: {key}: holds NaN or infinite numbers; {DAMAGED}")
        found.parts[part], found.suffixes[part] = tensor, suffix
    return bases


def _plain(file: str, key: str, tensor: Tensor, scaled: str | None) -> Tensor:
    """Numbers to compute with: fp8 without scales in fp16, which holds every one of them, doubles in fp32."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
        if tensor.dtype in FP8 and scaled is None:
            return tensor.half()
        beside = f" with scales ({scaled})" if scaled else ""
        raise ValueError(f"{file}: {key}: is {TensorSpec(tensor.dtype, tuple(tensor.shape))}{beside}, a quantized "
                         "factor; use the LoRA in 16 bit")  # fmt: skip
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _no_lora(file: str, tensors: dict[str, Tensor], ignored: dict[str, str]) -> ValueError:
    if not tensors:
        return ValueError(f"{file}: holds no tensors; {DAMAGED}")
    known = [(key, why) for key, why in ignored.items() if why != NO_PART]
    first, why = (known or list(ignored.items()))[0]
    weights = sum(key.endswith(".weight") for key in tensors)
    if not known and weights > len(tensors) // 4:
        return ValueError(f"{file}: is a model and not a LoRA ({len(tensors)} tensors, no adapter; first: {first}); "
                          "put it in the folder for models")  # fmt: skip
    return ValueError(f"{file}: none of its {len(tensors)} tensors belongs to a LoRA; first: {first}: {why}")


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in one pass. Never unpickles: raises ValueError for any other file."""
    try:
        _, specs, offsets = read_header(path)
    except ValueError as problem:
        raise _other_file(path) or problem from None
    if sum(spec.nbytes for spec in specs.values()) > MAX_LORA:
        raise ValueError(f"{path.name}: has {path.stat().st_size / 1e9:.0f} GB, a LoRA has up to {MAX_LORA / 1e9:.0f}; "
                         "is it a model? put it in the folder for models")  # fmt: skip
    tensors = {}
    with open(path, "rb", buffering=0) as file:
        for key, spec in specs.items():
            buffer = torch.empty(spec.nbytes, dtype=torch.uint8)
            view, done = memoryview(buffer.numpy()), 0
            file.seek(offsets[key])
            while done < spec.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(f"{path.name}: {key}: file ends inside the tensor; it changed while being read")
                done += count
            tensors[key] = buffer.view(spec.dtype).reshape(spec.shape)
    return tensors


def _other_file(path: Path) -> ValueError | None:
    """Says what a file is that is no safetensors, if that can be seen."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        start = file.read(9)
    header = start[4:] == b"\0\0\0\0{"  # a safetensors': its first bytes are a length and can be anything
    what = None if header else next((what for magic, what in STARTS.items() if start.startswith(magic)), None)
    if (path.suffix.lower() in PICKLES and not header) or (what and "pickle" in what):
        return ValueError(f"{path.name}: is {what or 'a pickle'}: opening one can run any program that is in it, so "
                          "Tessera does not; convert it to safetensors")  # fmt: skip
    return ValueError(f"{path.name}: is {what}; download the LoRA again as safetensors") if what else None


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
    return ValueError(f"{file}: {key}: {found}; a correction LoRA is plain low-rank pairs: for any other LoRA take "
                      "Load LoRA (Tessera) or tessera bake --lora")  # fmt: skip


def _pair(file: str, base: str, found: dict[str, torch.Tensor]) -> LowRank:
    if found.keys() == {"bias"}:
        raise _no_pair(file, f"{base}.diff_b", "a bias difference without a low-rank pair")
    missing = [part for part in ("up", "down") if part not in found]
    if missing:
        raise ValueError(f"{file}: {base}: lora_{missing[0]} is missing; the file is incomplete, download it again")
    up, down = found["up"], found["down"]
    if up.ndim != 2 or down.ndim != 2 or not up.shape[1] == down.shape[0] > 0:
        raise ValueError(f"{file}: {base}: up {list(up.shape)} and down {list(down.shape)} are no [out, r] and "
                         "[r, in]; for a LoRA of convolutions take Load LoRA (Tessera)")  # fmt: skip
    if "alpha" in found and found["alpha"].numel() != 1:
        raise ValueError(f"{file}: {base}: alpha is {list(found['alpha'].shape)}, not one number; repair the file")
    bias = found.get("bias")
    if bias is not None and (bias.ndim != 1 or len(bias) != len(up) or not bias.is_floating_point()):
        raise ValueError(f"{file}: {base}: diff_b is {TensorSpec(bias.dtype, tuple(bias.shape))}, the layer has "
                         f"{len(up)} outputs; the file is damaged, download it again")  # fmt: skip
    scale = found["alpha"].item() / down.shape[0] if "alpha" in found else 1.0
    return LowRank(up if scale == 1.0 else (up.float() * scale).to(up.dtype), down, bias)
