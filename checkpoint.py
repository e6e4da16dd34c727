"""Safetensors checkpoints, one layer in, one layer out: a tolerant reader and a streaming, atomic writer."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import formats
from .formats import Format, TensorSpec, marker
from .markers import infer, merge_markers

MAX_HEADER = 100_000_000  # safetensors' own limit, bytes
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
QUANTIZATION_METADATA = "_quantization_metadata"
HOST_ONLY = ("convrot_w4a4", "asym_w4a8_int8")
DAMAGED = "file damaged or marker stale, make it again from the original"
PROVENANCE, LAYER_ERRORS = "tessera", "tessera_layers"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Layer:
    """One quantized linear (or embedding) of a checkpoint."""

    key: str  # module path as in the file, prefix included
    format: Format
    shape: tuple[int, int]  # [out, in]; padded where the file does not say the logical shape
    record: dict  # its comfy_quant record, unknown keys kept
    sources: dict[str, str]  # entry suffix -> tensor key in the file
    zero: bool = False  # an all-zero weight with scales of odd shape, 0 or NaN: its entries are made anew

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

    def weight(self, name: str, shape: tuple[int, int] | None = None) -> Tensor:
        """fp32 weight [out, in] of a module path without prefix, decoded if it is quantized.

        `shape` is the logical one where the caller knows it and the file may not: padding is then cut off.
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
        return weight if smoothing is None else weight * smoothing.float()

    def repair(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors (same keys) as every host can load them: canonical entries and one marker per layer."""
        for layer in self.layers.values():
            stored = {suffix: state_dict.pop(key) for suffix, key in layer.sources.items()}
            for suffix, tensor in (stored | self._checked(layer, stored)).items():
                state_dict[f"{layer.key}.{suffix}"] = tensor
            kept = {k: v for k, v in layer.record.items() if k != "params"}
            state_dict[f"{layer.key}.comfy_quant"] = marker(kept | layer.format.record())
        for key, record in self.opaque.items():
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
        return {key: self._layer(key, record) for key, record in records.items() if key not in self.opaque}

    def _layer(self, key: str, record: dict) -> Layer:
        legacy = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
        names = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", *legacy)
        sources = {legacy.get(n, n): f"{key}.{n}" for n in names if f"{key}.{n}" in self.tensors}
        if f"{key}.weight_correction" in self.tensors:
            raise ValueError(f"{self.path.name}: {key}: asymmetric W4A8 weights are dropped by ComfyUI on load; "
                             "re-quantize symmetric")  # fmt: skip
        specs = {suffix: self.tensors[source] for suffix, source in sources.items()}
        try:
            record = infer(record, specs, self.repairs, key)
            format = formats.from_record(record, specs)
            shape = logical_shape(format, record, specs)
            format.for_shape(*shape)
            zero = self._odd_zero(format, sources, shape)
        except ValueError as problem:
            raise ValueError(f"{self.path.name}: {key}: {problem}") from None
        if zero:
            self.repairs.append(f"{key}: all-zero weight with unusable scales")
        return Layer(key, format, shape, record, sources, zero)

    def _odd_zero(self, format: Format, sources: Mapping[str, str], shape: tuple[int, int]) -> bool:
        """Whether a weight is all zero, for which convert_to_quant writes scales that no host reads (format.md 7).

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
    stored = (rows, columns * 2) if format.name == "nvfp4" else (rows, columns)
    shape = record.get("orig_shape")
    if isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape):
        said = (shape[0], shape[1])
        if format.storage(*said)["weight"].shape == (rows, columns):
            return said
    return stored


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


class Writer:
    """Writes a safetensors file tensor by tensor into a hidden file beside `path`; `publish` gives it its name.

    The header is laid out first, from the specs, with `reserve` bytes kept for metadata that is known only at the end.
    Leaving the `with` block without `publish` removes the hidden file. An existing `path` is never touched unless
    `overwrite`, and then only replaced whole.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], reserve: int, overwrite: bool = False):
        self.path, self.overwrite = Path(path), overwrite
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self.refuse_existing()
        if not self.path.parent.is_dir():
            raise ValueError(f"{self.path.parent}: no such folder; create it or choose another target")
        self._entries, self._missing, end = {}, set(specs), 0
        for key in sorted(specs, key=lambda k: (-specs[k].dtype.itemsize, k)):  # widest first: aligned offsets
            spec = specs[key]
            offsets = [end, end + spec.nbytes]
            self._entries[key] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
            end += spec.nbytes
        self._specs, self._checksums = dict(specs), {}
        self._header = -(-(len(self._json({})) + reserve) // 8) * 8
        self.nbytes = 8 + self._header + end
        self._require_space()
        self._file = open(self.temporary, "xb")  # noqa: SIM115 closed in __exit__; "x" honours the user's umask
        self._allocate()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc) -> None:
        self._file.close()
        with contextlib.suppress(FileNotFoundError):  # published
            self.temporary.unlink()

    def write(self, key: str, tensor: Tensor) -> None:
        """Stores one tensor, each exactly once, in any order. Raises ValueError if it is not as its spec says."""
        spec = self._specs[key]
        if key not in self._missing or tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            found, once = TensorSpec(tensor.dtype, tuple(tensor.shape)), "" if key in self._missing else ", once"
            raise ValueError(f"{self.path.name}: {key}: {found}, expected {spec}{once}")
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        with self._disk_errors():
            self._file.seek(8 + self._header + self._entries[key]["data_offsets"][0])
            self._file.write(memoryview(data))
        self._missing.discard(key)
        self._checksums[key] = zlib.crc32(data)

    def finish(self, metadata: Mapping[str, str]) -> Path:
        """Writes the header, flushes everything to disk and returns the still hidden file, complete and readable."""
        if self._missing:
            raise RuntimeError(
                f"{self.path.name}: {len(self._missing)} tensors were never written: {min(self._missing)}"
            )
        header = self._json(metadata)
        if len(header) > self._header:
            raise RuntimeError(f"{self.path.name}: metadata of {len(header)} bytes exceeds the {self._header} reserved")
        with self._disk_errors():
            self._file.seek(0)
            self._file.write(struct.pack("<Q", self._header) + header.ljust(self._header))
            self._file.flush()
            os.fsync(self._file.fileno())
        return self.temporary

    def reread(self, file: Checkpoint) -> None:
        """Reads the finished file again. Raises RuntimeError naming the first tensor that is not as it was written."""
        for key, checksum in self._checksums.items():
            if zlib.crc32(file.read(key).flatten().view(torch.uint8).numpy()) != checksum:
                raise RuntimeError(
                    f"{self.path.name}: {key}: reads back other than it was written; the disk or another program "
                    "changed it, nothing was saved: try again, on another disk if it recurs"
                )

    def publish(self) -> None:
        """Gives the finished file its name, atomically."""
        self.refuse_existing()
        os.replace(self.temporary, self.path)
        if os.name == "posix":  # make the rename itself durable
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    def refuse_existing(self) -> None:
        """Raises ValueError if there is something at `path` that may not be replaced."""
        if self.path.is_dir():
            raise ValueError(f"{self.path}: is a folder; choose another name")
        if self.path.exists() and not self.overwrite:
            raise ValueError(f"{self.path}: already exists; choose another name, or allow overwriting")

    def _require_space(self) -> None:
        stat = os.statvfs(self.path.parent) if hasattr(os, "statvfs") else None
        if stat is not None and stat.f_bavail * stat.f_frsize < self.nbytes:
            raise ValueError(_disk_full(self.path, self.nbytes))

    def _allocate(self) -> None:
        """Claims the whole size now, so that a full disk is found before the work, not after."""
        try:
            with self._disk_errors():
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._file.fileno(), 0, self.nbytes)
                else:
                    self._file.truncate(self.nbytes)
        except ValueError:
            self.__exit__()
            raise

    @contextlib.contextmanager
    def _disk_errors(self):
        try:
            yield
        except OSError as problem:
            if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ValueError(_disk_full(self.path, self.nbytes)) from problem
            raise

    def _json(self, metadata: Mapping[str, str]) -> bytes:
        return json.dumps({"__metadata__": dict(metadata)} | self._entries, separators=(",", ":")).encode()


def _disk_full(path: Path, nbytes: int) -> str:
    return f"{path}: needs {nbytes / 1e9:.2f} GB on that disk, which has less; free some space or choose another folder"
