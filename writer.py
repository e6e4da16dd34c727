"""Writes safetensors tensor by tensor: streaming, atomic, checked by reading back."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import DTYPES, Checkpoint
from .formats import TensorSpec

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Writer:
    """Writes a safetensors file tensor by tensor into a hidden file beside `path`; `publish` gives it its name.

    The header is laid out first, from the specs, with `reserve` bytes kept for metadata that is known only at the end.
    Leaving the `with` block without `publish` removes the hidden file. An existing `path` is never touched unless
    `overwrite`, and then only replaced whole.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], reserve: int, overwrite: bool = False):
        self.path, self.overwrite = Path(path), overwrite
        self.temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
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
        if shutil.disk_usage(self.path.parent).free < self.nbytes:
            raise ValueError(_disk_full(self.path, self.nbytes))

    def _allocate(self) -> None:
        """Claims the whole size now, so that a full disk is found before the work, not after."""
        try:
            with self._disk_errors():
                self._reserve()
        except (ValueError, OSError):  # nobody is in the `with` block yet
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
