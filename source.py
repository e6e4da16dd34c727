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
    """SHA-256 of the source file, computed beside the work; None where the source is not a file."""

    def __init__(self, path: Path | None):
        self._path, self._hash, self._problem, self._stopped = path, hashlib.sha256(), None, False
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
        """Waits for the end of the file. Raises RuntimeError if it could not be read to there."""
        if self._path is None:
            return None
        self._thread.join()
        if self._problem is not None:
            raise RuntimeError(f"{self._path}: could not be read to the end ({self._problem}); is the disk in order?")
        return self._hash.hexdigest()
