"""Safetensors checkpoints by their headers, one layer at a time: a tolerant reader that refuses what it must."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import formats
from .formats import Format, TensorSpec, marker
from .markers import infer, merge_markers
from .quantization.lowrank import LowRank

MAX_HEADER = 100_000_000  # safetensors' own limit, bytes
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
QUANTIZATION_METADATA = "_quantization_metadata"
HOST_ONLY = ("convrot_w4a4", "asym_w4a8_int8")
DAMAGED = "file damaged or marker stale, make it again from the original"
EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|shared|token_embedding|word_embeddings|wte)$")
DETECTION = re.compile(r"(^|\.)(cap_embedder\.1|x_embedder|final_layer\.linear)$")  # hosts know a model by their shapes
PROVENANCE, LAYER_ERRORS = "tessera", "tessera_layers"
ABSORB = "absorb"  # the mode whose low-rank branches are part of the model
BRANCH = ("absorb_up", "absorb_down")  # F16 [out, r], [r, in] beside a layer's other entries
BRANCH_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One quantized linear (or embedding) of a checkpoint."""

    key: str  # module path as in the file, prefix included
    format: Format
    shape: tuple[int, int]  # [out, in]; padded where the file does not say the logical shape
    record: dict  # its comfy_quant record, unknown keys kept
    sources: dict[str, str]  # entry suffix -> tensor key in the file
    zero: bool = False  # an all-zero weight with scales of odd shape, 0 or NaN: its entries are made anew

    @property
    def absorbs(self) -> bool:
        """Whether a low-rank branch is part of the layer: its codes alone are not the weight."""
        return BRANCH[0] in self.sources

    @property
    def smoothed(self) -> bool:
        """Whether the input is multiplied by a `pre_quant_scale`, which the codes were divided by."""
        return "pre_quant_scale" in self.sources

    def error(self, path: Path, problem: object) -> ValueError:
        return ValueError(f"{path.name}: {self.key}: {problem}")


@dataclass
class Checkpoint:
    """A safetensors file by its header; tensors are read from disk one at a time, never mapped or kept.

    `layers` holds every quantized layer by module path without the file's prefix; `opaque` the records, by key, of
    layers in formats that only a host reads; `repairs` says what the file had wrong. Raises ValueError naming file,
    layer, finding and remedy if the file is damaged or cannot be read safely.
    """

    path: Path
    metadata: dict[str, str] = field(init=False)
    tensors: dict[str, TensorSpec] = field(init=False)
    prefix: str = field(init=False)
    layers: dict[str, Layer] = field(init=False)
    opaque: dict[str, dict] = field(init=False, default_factory=dict)
    repairs: list[str] = field(init=False, default_factory=list)

    def __post_init__(self):
        self.path = Path(self.path)
        self.metadata, self.tensors, self._offsets = read_header(self.path)
        self.prefix = next((p for p in PREFIXES if any(k.startswith(p) for k in self.tensors)), "")
        self.layers = {key.removeprefix(self.prefix): layer for key, layer in self._find_layers().items()}
        self._refuse_lost_branches()

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size

    @property
    def name(self) -> str:
        return self.path.name

    def quantized(self, name: str) -> bool:
        return name in self.layers

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shape of every weight and plain tensor below the prefix, by key without prefix; scales left out."""
        packed = {key for layer in self.layers.values() for key in layer.sources.values()}
        packed |= {f"{layer.key}.comfy_quant" for layer in self.layers.values()}
        plain = {k: spec.shape for k, spec in self.tensors.items() if k not in packed and k.startswith(self.prefix)}
        shapes = {key.removeprefix(self.prefix): shape for key, shape in plain.items()}
        return shapes | {f"{name}.weight": layer.shape for name, layer in self.layers.items()}

    def read(self, key: str) -> Tensor:
        """One tensor as stored. Raises KeyError for an unknown key, ValueError if the file has become shorter."""
        spec, offset = self.tensors[key], self._offsets[key]
        buffer = torch.empty(spec.nbytes, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            view, done = memoryview(buffer.numpy()), 0
            while done < spec.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(
                        f"{self.path.name}: {key}: file ends inside the tensor; it changed while being read"
                    )
                done += count
        return buffer.view(spec.dtype).reshape(spec.shape)

    def entries(self, layer: Layer) -> dict[str, Tensor]:
        """The stored tensors of a quantized layer by suffix, with this format's dtypes and shapes."""
        stored = {suffix: self.read(key) for suffix, key in layer.sources.items()}
        return stored | self._checked(layer, stored)

    def weight(self, name: str, shape: tuple[int, int] | None = None, absorbed: bool = True) -> Tensor:
        """fp32 weight [out, in] of a module path without prefix, decoded if it is quantized.

        `shape` is the logical one where the caller knows it and the file may not: padding is then cut off. Without
        `absorbed` the layer's own branch is left out: what the codes alone are worth.
        """
        layer = self.layers.get(name)
        if layer is None:
            return self._plain_weight(f"{self.prefix}{name}")
        entries = self.entries(layer)
        try:
            quantized = layer.format.unpack(entries, *(shape or layer.shape))
        except ValueError as problem:
            raise layer.error(self.path, f"{problem}; it is the layer of another model") from None
        weight = layer.format.decode(quantized)
        smoothing = entries.get("pre_quant_scale")  # the input is multiplied by it, so the weight was divided
        weight = weight if smoothing is None else weight * smoothing.float()
        return LowRank(*(entries[part] for part in BRANCH)).add_to(weight) if absorbed and layer.absorbs else weight

    def branch(self, name: str) -> LowRank | None:
        """The low-rank branch that is part of a layer (absorb mode); None if it has none."""
        layer = self.layers.get(name)
        return LowRank(*(self.read(layer.sources[part]) for part in BRANCH)) if layer and layer.absorbs else None

    def records(self) -> dict[str, dict]:
        """The `comfy_quant` record of every quantized layer by its key in the file, `params` flattened."""
        layers = {layer.key: layer.record | layer.format.record() for layer in self.layers.values()}
        return self.opaque | {k: {n: v for n, v in record.items() if n != "params"} for k, record in layers.items()}

    def repair(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors (same keys) as every host can load them: canonical entries and one marker per layer.

        Branches are taken out: no host knows them.
        """
        for layer in self.layers.values():
            stored = {suffix: state_dict.pop(key) for suffix, key in layer.sources.items()}
            for suffix, tensor in (stored | self._checked(layer, stored)).items():
                if suffix not in BRANCH:
                    state_dict[f"{layer.key}.{suffix}"] = tensor
        for key, record in self.records().items():
            state_dict[f"{key}.comfy_quant"] = marker(record)
        state_dict.pop(f"{self.prefix}scaled_fp8", None)
        return state_dict

    def _checked(self, layer: Layer, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            if layer.zero:
                return layer.format.pack(layer.format.encode(torch.zeros(layer.shape)))
            return layer.format.check(stored, *layer.shape)
        except ValueError as problem:
            raise layer.error(self.path, f"{problem}; {DAMAGED}") from None

    def _plain_weight(self, key: str) -> Tensor:
        """The unquantized weight of a module. Raises ValueError if its numbers are codes that only a host reads."""
        spec, record = self.tensors[f"{key}.weight"], self.opaque.get(key, {})
        if record or not spec.dtype.is_floating_point:
            found = f"format {record.get('format')!r}" if record else f"weight is {spec} without scales"
            raise ValueError(f"{self.path.name}: {key}: {found}, Tessera cannot decode it; use the original file")
        return self.read(f"{key}.weight").float()

    def _find_layers(self) -> dict[str, Layer]:
        records = merge_markers(self)
        self.opaque = {k: r for k, r in records.items() if r.get("format") in HOST_ONLY or "num_experts" in r}
        dropped = next((k for k in self.tensors if k.endswith(".weight_correction")), None)
        if dropped is not None:
            raise ValueError(f"{self.path.name}: {dropped}: asymmetric W4A8 weights are dropped by ComfyUI on load; "
                             "re-quantize symmetric")  # fmt: skip
        layers = {key: self._layer(key, record) for key, record in records.items() if key not in self.opaque}
        ours = {source for layer in layers.values() for source in layer.sources.values()}
        stray = next((key for key in self.tensors if key.rpartition(".")[2] in BRANCH and key not in ours), None)
        if stray is not None:
            raise ValueError(f"{self.path.name}: {stray}: a branch of a layer that is not quantized here; {DAMAGED}")
        return layers

    def _layer(self, key: str, record: dict) -> Layer:
        legacy = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
        names = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", *BRANCH, *legacy)
        sources = {legacy.get(n, n): f"{key}.{n}" for n in names if f"{key}.{n}" in self.tensors}
        specs = {suffix: self.tensors[source] for suffix, source in sources.items()}
        try:
            record = infer(record, specs, self.repairs, key)
            format = formats.from_record(record, specs)
            shape = logical_shape(format, record, specs)
            format.for_shape(*shape)
            zero = self._odd_zero(format, sources, shape)
            _check_branch(specs, shape)
        except ValueError as problem:
            raise ValueError(f"{self.path.name}: {key}: {problem}") from None
        if zero:
            self.repairs.append(f"{key}: all-zero weight with unusable scales")
        if isinstance(format, formats.INT8) and format.convrot and not format.per_row:
            self.repairs.append(f"{key}: rotated, but with one scale for all rows: legal, less exact than row scales")
        return Layer(key, format, shape, record, sources, zero)

    def _refuse_lost_branches(self) -> None:
        """Raises ValueError if the file says that it is in absorb mode, but a layer has lost its branch."""
        if self._said(PROVENANCE).get("mode") != ABSORB:
            return
        errors = self._said(LAYER_ERRORS)  # a second number counts the layer's branch
        listed = [name for name, row in errors.items() if isinstance(row, list) and len(row) > 1 and row[1] is not None]
        for name in listed if errors else self.layers:
            if name not in self.layers or not self.layers[name].absorbs:
                raise ValueError(f"{self.path.name}: {name}: absorb_up and absorb_down are missing, but the file is "
                                 "marked absorb: without its branch the layer is wrong; another tool has rewritten "
                                 "the file, make it again from the original")  # fmt: skip

    def _said(self, key: str) -> dict:
        """A JSON object of the metadata; empty if there is none."""
        try:
            said = json.loads(self.metadata.get(key, "{}"))
        except (ValueError, RecursionError):
            return {}  # other tools' files may use the key for something else
        return said if isinstance(said, dict) else {}

    def _odd_zero(self, format: Format, sources: Mapping[str, str], shape: tuple[int, int]) -> bool:
        """Whether a weight is all zero, for which convert_to_quant writes scales that no host reads (format.md 6).

        Format.check on shapes and dtypes alone: raises ValueError for any other misfit, before anything is loaded.
        """
        specs = {suffix: self.tensors[key] for suffix, key in sources.items()}
        stand_ins = {s: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for s, spec in specs.items()}
        try:
            format.check(stand_ins, *shape)
        except ValueError as problem:
            stored = specs["weight"].dtype == format.storage(*shape)["weight"].dtype
            if stored and "weight_scale" in specs and not self.read(sources["weight"]).view(torch.uint8).any():
                return True
            raise ValueError(f"{problem}; {DAMAGED}") from None
        return isinstance(format, formats.NVFP4) and not self.read(sources["weight_scale_2"]).any()


def logical_shape(format: Format, record: dict, specs: Mapping[str, TensorSpec]) -> tuple[int, int]:
    """[out, in] of a stored weight: `orig_shape` if the record has a plausible one, else from the storage."""
    if "weight" not in specs or len(specs["weight"].shape) != 2:
        found = f"is {list(specs['weight'].shape)}" if "weight" in specs else "is missing"
        raise ValueError(f"weight {found}, {format.label} needs two dimensions; {DAMAGED}")
    rows, columns = specs["weight"].shape
    stored = (rows, columns * format.codes_per_byte)
    shape = record.get("orig_shape")
    if isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape):
        said = (shape[0], shape[1])
        if format.storage(*said)["weight"].shape == (rows, columns):
            return said
    return stored


def _check_branch(specs: Mapping[str, TensorSpec], shape: tuple[int, int]) -> None:
    """Raises ValueError if a layer has half a branch, or one that does not fit its [out, in]."""
    found = {part: specs[part] for part in BRANCH if part in specs}
    if not found:
        return
    missing = [part for part in BRANCH if part not in found]
    if missing:
        raise ValueError(f"{missing[0]} is missing, half a branch is none; {DAMAGED}")
    up, down = found.values()
    rank = up.shape[-1] if up.shape else 0
    if rank == 0 or up.shape != (shape[0], rank) or down.shape != (rank, shape[1]):
        raise ValueError(f"absorb_up is {up} and absorb_down is {down}, a layer of {list(shape)} needs "
                         f"[{shape[0]}, r] and [r, {shape[1]}]; {DAMAGED}")  # fmt: skip
    if up.dtype not in BRANCH_DTYPES or down.dtype not in BRANCH_DTYPES:
        raise ValueError(f"absorb_up is {up} and absorb_down is {down}, they must be float16, bfloat16 or float32; "
                         f"{DAMAGED}")  # fmt: skip


def read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorSpec], dict[str, int]]:
    """(metadata, specs by key, absolute offset by key) of a safetensors file.

    Raises ValueError if it is not one, is truncated, or its header contradicts itself.
    """

    def refuse(found: str) -> ValueError:
        return ValueError(f"{path.name}: {found}; it is not a complete safetensors file, download or copy it again")

    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise refuse(f"header length {length} does not fit a file of {size} bytes")
            text = file.read(length)
    except OSError as problem:
        raise ValueError(f"{path}: cannot be read: {problem.strerror}") from problem
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise refuse(f"header is not JSON ({problem})") from None
    if not isinstance(header, dict):
        raise refuse("header is not a JSON object")
    metadata = header.pop("__metadata__", {}) or {}
    if not isinstance(metadata, dict):
        raise refuse("__metadata__ is not a JSON object")
    specs, offsets, end = {}, {}, 0
    for key, entry in sorted(header.items(), key=_position):
        spec, first, last = _tensor(entry)
        if spec is None or last - first != spec.nbytes or first != end:
            raise refuse(f"{key}: header entry {str(entry)[:120]} is not a tensor that follows the one before it")
        specs[key], offsets[key], end = spec, 8 + length + first, last
    if size != 8 + length + end:
        raise refuse(f"file has {size} bytes, its header describes {8 + length + end}")
    return {str(k): str(v) for k, v in metadata.items()}, specs, offsets


def _position(item: tuple[str, object]) -> tuple[int, int]:
    _, first, last = _tensor(item[1])
    return first, last


def _tensor(entry: object) -> tuple[TensorSpec | None, int, int]:
    """A header entry as (spec, first byte, last byte); spec None if it is malformed."""
    if not isinstance(entry, dict):
        return None, -1, -1
    dtype, shape, offsets = DTYPES.get(str(entry.get("dtype"))), entry.get("shape"), entry.get("data_offsets")
    numbers = [*(shape or []), *(offsets or [])] if isinstance(shape, list) and isinstance(offsets, list) else None
    well_formed = numbers is not None and all(type(n) is int and n >= 0 for n in numbers) and len(offsets) == 2
    if not well_formed:
        return None, -1, -1
    return (TensorSpec(dtype, tuple(shape)) if dtype is not None else None), *offsets
