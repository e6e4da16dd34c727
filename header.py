"""The header of a safetensors file: what it says, checked before anything else is believed."""

from __future__ import annotations

import json
import math
import re
import stat
import struct
from pathlib import Path

import torch

from .formats import TensorSpec

MAX_HEADER = 32_000_000  # bytes; a model of 10,000 tensors and their records needs 3 MB
MAX_PARTS = 600_000  # values, lists and objects of a header: what bounds the memory it takes as Python objects
MAX_NUMBER = 1 << 63
MAX_DIMENSIONS = 64  # torch's
MAX_NAME = 1_000  # characters

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip

# No module path and no folder has these; a page that shows them, or a log, might run or hide something.
_STRANGE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"  # control characters, turned text, half characters
    r"|<[a-zA-Z!/?]"  # markup
    r"|(?:^|[/\\])\.\.(?:[/\\]|$)"  # the folder above
)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorSpec], dict[str, int]]:
    """(metadata, specs by key, absolute offset by key) of a safetensors file.

    Raises ValueError if it is not one, is truncated, or its header contradicts itself; in bounded time and memory,
    whatever its header says.
    """

    def refuse(found: str) -> ValueError:
        return ValueError(f"{path.name}: {found}; it is not a complete safetensors file, download or copy it again")

    size, text = _text(path, refuse)
    try:
        header = parse(text.decode())
    except (ValueError, RecursionError) as problem:
        raise refuse(f"header is not JSON ({shown(str(problem))})") from None
    if not isinstance(header, dict) or not text.startswith(b"{"):
        raise refuse("header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refuse("__metadata__ is not a JSON object of texts")
    specs, offsets, end = {}, {}, 0
    for key, entry in sorted(header.items(), key=_position):
        if strange := _strange_name(key):
            raise ValueError(f"{path.name}: {shown(key)}: {strange}; no tool names a tensor so, do not use the file")
        spec, first, last = _tensor(entry)
        if spec is None or last - first != spec.nbytes or first != end:
            raise refuse(f"{key}: header entry {_excerpt(entry)} is not a tensor that follows the one before it")
        specs[key], offsets[key], end = spec, 8 + len(text) + first, last
    if size != 8 + len(text) + end:
        raise refuse(f"file has {size} bytes, its header describes {8 + len(text) + end}")
    return metadata, specs, offsets


def parse(text: str) -> object:
    """JSON in which no object has a key twice, and numbers are numbers. Raises ValueError."""
    tree = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    if "\\ud" in text or "\\uD" in text:  # half a character, which no other parser takes
        try:
            json.dumps(tree, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half a Unicode character") from None
    return tree


def shown(name: str) -> str:
    """A name from a file as a message may show it: on one line, without markup, not too long."""
    name = escaped(name)
    return name if len(name) <= 200 else f"{name[:160]}... ({len(name)} characters)"


def escaped(text: str) -> str:
    """A text without what could break a line, turn it, or be markup."""
    return _STRANGE.sub(lambda match: ascii(match[0])[1:-1].replace("<", "\\x3c"), text)


def _text(path: Path, refuse) -> tuple[int, bytes]:
    """(bytes of the file, its header as it stands there)."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # a pipe would wait for ever, a device might never end
            raise ValueError(f"{path.name}: is {'a folder' if stat.S_ISDIR(info.st_mode) else 'no file'}; "
                             "give a .safetensors file")  # fmt: skip
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= info.st_size - 8:
                raise refuse(f"header length {length} does not fit a file of {info.st_size} bytes")
            if length > MAX_HEADER:
                raise ValueError(f"{path.name}: its header has {length} bytes, Tessera reads up to {MAX_HEADER}; "
                                 "save the file again without its metadata")  # fmt: skip
            text = file.read(length)
    except OSError as problem:
        raise ValueError(f"{path}: cannot be read: {problem.strerror}") from problem
    if len(text) != length:
        raise refuse("header ends early")
    parts = sum(text.count(mark) for mark in (b",", b"[", b"{"))
    if parts > MAX_PARTS:
        raise ValueError(f"{path.name}: its header has {parts} parts, Tessera reads up to {MAX_PARTS}; save the file "
                         "again without its metadata, or in several files")  # fmt: skip
    return info.st_size, text


def _excerpt(entry: object) -> str:
    try:
        return shown(json.dumps(entry)[:120])
    except RecursionError:
        return "nested too deep"


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{shown(twice)} is there twice")
    return found


def _no_number(word: str) -> object:
    raise ValueError(f"{word} is no number")


def _strange_name(key: str) -> str | None:
    if not key:
        return "a tensor without a name"
    if len(key) > MAX_NAME:
        return f"a name of {len(key)} characters"
    return "a name with control characters, markup or a path in it" if _STRANGE.search(key) else None


def _position(item: tuple[str, object]) -> tuple[int, int]:
    _, first, last = _tensor(item[1])
    return first, last


def _tensor(entry: object) -> tuple[TensorSpec | None, int, int]:
    """A header entry as (spec, first byte, last byte); spec None if it is malformed."""
    if not isinstance(entry, dict):
        return None, -1, -1
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        return None, -1, -1
    if len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        return None, -1, -1
    if not all(type(n) is int and 0 <= n < MAX_NUMBER for n in (*shape, *offsets)):
        return None, -1, -1
    if dtype not in DTYPES or math.prod(n or 1 for n in shape) >= MAX_NUMBER:  # an empty one has a shape, too
        return None, *offsets
    return TensorSpec(DTYPES[dtype], tuple(shape)), *offsets
