"""Where weights come from, and what the bytes of a file are called."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from .formats import TensorSpec


class Source(Protocol):
    """Where weights come from: a Checkpoint, or a model that ComfyUI holds in memory."""

    name: str
    prefix: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorSpec]
    nbytes: int
    path: Path | None

    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def read(self, key: str) -> Tensor: ...
    def weight(self, name: str) -> Tensor: ...
    def quantized(self, name: str) -> bool: ...
    def records(self) -> dict[str, dict]: ...


@dataclass(frozen=True)
class Baked:
    """What a job makes of more than its source's file: what was put into the weights, and the pairs, by key in the
    correction LoRA, of layers that stay as they are."""

    said: Mapping[str, object]  # for the provenance
    carried: Mapping[str, Tensor] = field(default_factory=dict)


class Digest:
    """SHA-256 of the source file, computed beside the work, and whether the file stays as it is; None where the source
    is not a file."""

    def __init__(self, path: Path | None):
        self._path, self._hash, self._problem, self._stopped = path, hashlib.sha256(), None, False
        self._before = None if path is None else path.stat()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Digest:
        if self._path is not None:
            self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._stopped = True  # a cancelled job does not go on reading

    def _run(self) -> None:
        try:
            with open(self._path, "rb") as file:
                while not self._stopped and (chunk := file.read(1 << 20)):
                    self._hash.update(chunk)
        except OSError as problem:
            self._problem = problem

    def hexdigest(self) -> str | None:
        """Waits for the end of the file. Raises RuntimeError if it could not be read to there, or has changed."""
        if self._path is None:
            return None
        self._thread.join()
        if self._problem is not None:
            raise RuntimeError(f"{self._path}: could not be read to the end ({self._problem}); is the disk in order?")
        try:
            now = self._path.stat()
        except OSError:
            raise self._changed() from None
        if any(getattr(now, fact) != getattr(self._before, fact) for fact in ("st_ino", "st_size", "st_mtime_ns")):
            raise self._changed()
        return self._hash.hexdigest()

    def check(self) -> None:
        """Raises RuntimeError if the file is not what it was. Writes that hid themselves by setting its date back are
        found, too: then it is read once more."""
        if self._path is None:
            return
        expected, now = self.hexdigest(), self._path.stat()
        if now.st_ctime_ns != self._before.st_ctime_ns:  # also of new hard links and permissions, which are harmless
            with open(self._path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise self._changed()

    def _changed(self) -> RuntimeError:
        return RuntimeError(f"{self._path}: was changed while it was read, nothing was saved; try again when nothing "
                            "writes to it")  # fmt: skip
