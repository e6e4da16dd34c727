"""The header of a safetensors file: what it says, checked before anything else is believed."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch

from .formats import TensorSpec

MAX_HEADER = 100_000_000  # safetensors' own limit, bytes

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip


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
