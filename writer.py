"""Writes safetensors tensor by tensor: streaming, atomic, checked by reading back."""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import DTYPES, Checkpoint
from .formats import TensorSpec
from .locks import lock
from .publication import (
    check_target,
    clear,
    create_hidden,
    discard,
    disk_errors,
    disk_full,
    folder_errors,
    forget,
    hidden,
    publish,
)

__all__ = ["Writer", "check_target", "entry", "hidden", "layout", "publish"]

ALIGNMENT = 8  # bytes; of the widest dtype
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Writer:
    """Writes a safetensors file tensor by tensor into a hidden file beside `path`; `publish` gives it its name.

    Tensors in `specs` must all come, each has its place from the start; those in `optional` may come, no larger than
    said, and follow one another in the order in which they do. What is no multiple of 8 bytes (markers, scalars) waits
    in memory and goes last, widest first: so every tensor is aligned and no byte is left between two. The header has
    `reserve` bytes for metadata that is known only at the end. Same tensors, same bytes.

    Leaving the `with` block without `publish` removes the hidden file. An existing `path` is never touched unless
    `overwrite`, and then only replaced whole. A journal names its hidden file, `temporary`, and with `resume` one that
    is there is gone on with; others have a name of their own, and what dead processes left of those is removed.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], reserve: int, overwrite: bool = False,
                 optional: Mapping[str, TensorSpec] | None = None, temporary: Path | None = None,
                 resume: bool = False):  # fmt: skip
        self.path, self.overwrite = Path(path), overwrite
        check_target(self.path, overwrite)
        self._specs, self._missing = dict(specs) | dict(optional or {}), set(specs)
        self._entries, self._held, self._checksums = {}, {}, {}
        self._end, self._metadata, self._read_back = 0, {}, False
        for key in sorted(specs, key=lambda k: (-specs[k].dtype.itemsize, k)):
            if specs[key].nbytes % ALIGNMENT == 0:
                self._place(key, specs[key])
        self._header, self.nbytes = layout(self._specs, reserve)  # at most, until it is finished
        if temporary is None:
            clear(self.path.parent)
        self._require_space(temporary)
        self.temporary, self._file = self._open(temporary, resume) if temporary else create_hidden(self.path)
        self._allocate()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc) -> None:
        discard(self.temporary, self._file)

    def write(self, key: str, tensor: Tensor) -> None:
        """Stores one tensor, each at most once. Raises ValueError if it is not as its spec says."""
        spec, found = self._specs[key], TensorSpec(tensor.dtype, tuple(tensor.shape))
        smaller = key not in self._missing and found.dtype == spec.dtype and found.nbytes <= spec.nbytes
        if key in self._checksums or not (found == spec or smaller):
            once = ", once" if key in self._checksums else ""
            raise ValueError(f"{self.path.name}: {key}: {found}, expected {spec}{once}")
        data = memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        if found.nbytes % ALIGNMENT:
            self._held[key] = found, bytes(data)
        else:
            self._write(self._entries.get(key) or self._place(key, found), data)
        self._missing.discard(key)
        self._checksums[key] = zlib.crc32(data)

    def has(self, key: str) -> bool:
        return key in self._checksums

    def written(self, keys: Iterable[str]) -> dict[str, dict]:
        """What a journal must know of tensors that were written, for `adopt`: place and checksum, or the tensor."""
        return {key: {"crc32": self._checksums[key], **self._where(key)} for key in keys}

    def intact(self, written: Mapping[str, dict]) -> bool:
        """Whether tensors of an earlier run are on disk as it wrote them, and would come next."""
        end = self._end
        for key, was in written.items():
            spec, data = _spec(was), self._data(was)
            if key not in self._specs or len(data) != spec.nbytes or zlib.crc32(data) != was["crc32"]:
                return False
            if spec.nbytes % ALIGNMENT:
                continue
            if (self._entries.get(key) or entry(spec, end))["data_offsets"] != was["data_offsets"]:
                return False
            end += 0 if key in self._entries else spec.nbytes
        return True

    def adopt(self, written: Mapping[str, dict]) -> None:
        """Takes intact tensors of an earlier run as written."""
        for key, was in written.items():
            spec = _spec(was)
            if spec.nbytes % ALIGNMENT:
                self._held[key] = spec, self._data(was)
            elif key not in self._entries:
                self._place(key, spec)
            self._missing.discard(key)
            self._checksums[key] = was["crc32"]

    def sync(self) -> None:
        """Everything written so far is on disk."""
        with disk_errors(self.path, self.nbytes):
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(self, metadata: Mapping[str, str]) -> Path:
        """Writes the header, flushes everything to disk and returns the still hidden file, complete and readable."""
        if self._missing:
            raise RuntimeError(
                f"{self.path.name}: {len(self._missing)} tensors were never written: {min(self._missing)}"
            )
        for key in sorted(self._held, key=lambda k: (-self._held[k][0].dtype.itemsize, k)):
            spec, data = self._held[key]
            self._write(self._place(key, spec), data)
        header = _json(metadata, self._entries)
        if len(header) > self._header:
            raise RuntimeError(f"{self.path.name}: metadata of {len(header)} bytes exceeds the {self._header} reserved")
        self.nbytes, self._metadata = 8 + self._header + self._end, dict(metadata)
        with disk_errors(self.path, self.nbytes):
            self._file.seek(0)
            self._file.write(struct.pack("<Q", self._header) + header.ljust(self._header))
            self._file.truncate(self.nbytes)
        self.sync()
        forget(self._file)
        return self.temporary

    def reread(self, file: Checkpoint) -> None:
        """Reads the finished file again, from disk. Raises RuntimeError naming the first tensor that is not as it was
        written."""
        if file.metadata != self._metadata or file.tensors.keys() != self._checksums.keys():
            raise RuntimeError(f"{self.path.name}: the header reads back other than it was written, nothing was saved; "
                               "try again, on another disk if it recurs")  # fmt: skip
        for key, checksum in self._checksums.items():
            if zlib.crc32(file.read(key).flatten().view(torch.uint8).numpy()) != checksum:
                raise RuntimeError(
                    f"{self.path.name}: {key}: reads back other than it was written; the disk or another program "
                    "changed it, nothing was saved: try again, on another disk if it recurs"
                )
        self._read_back = True

    def publish(self) -> None:
        """Gives the finished file its name, atomically, once it was read again."""
        if not self._read_back:
            self.reread(Checkpoint(self.temporary))
        publish(self.temporary, self.path, self.overwrite)

    def _place(self, key: str, spec: TensorSpec) -> dict:
        """The next place is this tensor's."""
        self._entries[key] = entry(spec, self._end)
        self._end += spec.nbytes
        return self._entries[key]

    def _write(self, place: Mapping, data: bytes | memoryview) -> None:
        with disk_errors(self.path, self.nbytes):
            self._file.seek(8 + self._header + place["data_offsets"][0])
            self._file.write(data)

    def _data(self, was: dict) -> bytes:
        if "data" in was:
            return base64.b64decode(was["data"])
        first, last = was["data_offsets"]
        self._file.seek(8 + self._header + first)
        return self._file.read(last - first)

    def _where(self, key: str) -> dict:
        if key not in self._held:
            return self._entries[key]
        spec, data = self._held[key]
        return {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data": base64.b64encode(data).decode()}

    def _require_space(self, temporary: Path | None) -> None:
        there = temporary.stat().st_blocks * 512 if temporary and temporary.exists() and os.name == "posix" else 0
        if shutil.disk_usage(self.path.parent).free + there < self.nbytes:
            raise ValueError(disk_full(self.path, self.nbytes))

    def _open(self, temporary: Path, resume: bool):
        """A journal's hidden file."""
        with folder_errors(self.path.parent):
            file = open(temporary, "r+b" if resume and temporary.exists() else "x+b")  # noqa: SIM115
        if os.name == "posix":
            lock(file)  # the journal's own lock decides; this one says that the file is alive where that is not seen
        return temporary, file

    def _allocate(self) -> None:
        """Claims the whole size now, so that a full disk is found before the work, not after."""
        try:
            with disk_errors(self.path, self.nbytes):
                self._reserve()
        except (ValueError, RuntimeError, KeyboardInterrupt):  # nobody is in the `with` block yet
            self.__exit__()
            raise

    def _reserve(self) -> None:
        self._file.truncate(self.nbytes)
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self._file.fileno(), 0, self.nbytes)
        except OSError as problem:
            if problem.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # file systems that cannot, ZFS for one
                raise


def layout(specs: Mapping[str, TensorSpec], reserve: int) -> tuple[int, int]:
    """(bytes of the header, bytes of the file) with all those tensors and `reserve` bytes for metadata."""
    most = sum(spec.nbytes for spec in specs.values())
    longest = {key: entry(spec, most) for key, spec in specs.items()}
    header = -(-(len(_json({}, longest)) + reserve) // ALIGNMENT) * ALIGNMENT
    return header, 8 + header + most


def entry(spec: TensorSpec, first: int) -> dict:
    """A tensor in the header, `first` its offset in the data."""
    return {
        "dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [first, first + spec.nbytes]
    }  # fmt: skip


def _spec(entry: dict) -> TensorSpec:
    return TensorSpec(DTYPES[entry["dtype"]], tuple(entry["shape"]))


def _json(metadata: Mapping[str, str], entries: Mapping[str, dict]) -> bytes:
    return json.dumps({"__metadata__": dict(metadata)} | dict(entries), separators=(",", ":")).encode()
