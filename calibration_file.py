"""Calibration files: safetensors with one group of tensors per site, read one site at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .formats import TensorSpec
from .quantization.calibration import Calibration, Statistics
from .writer import Writer

METADATA = "tessera_calibration"
VERSION = 1
PARTS = ("mean", "amax", "second")
SPARE = 1 << 16


def write(calibration: Calibration, path: Path, overwrite: bool = False) -> None:
    """Saves a calibration, atomically. Raises ValueError if the file exists or there is nothing to save."""
    if not calibration.sites:
        raise ValueError(f"{path}: nothing was recorded yet; run the sampler before saving")
    said = {
        "version": VERSION, "model": calibration.model, "runs": calibration.runs, "layers": calibration.layers,
        "sites": {name: {"tokens": s.tokens, "skipped": s.skipped} for name, s in calibration.sites.items()},
        "notes": calibration.notes,
    }  # fmt: skip
    text = json.dumps(said)
    specs = {}
    for site in calibration.sites:
        for key, tensor in _tensors(site, calibration.sites[site]).items():
            specs[key] = TensorSpec(tensor.dtype, tuple(tensor.shape))
    with Writer(Path(path), specs, 2 * len(text) + SPARE, overwrite) as writer:
        for site in calibration.sites:
            for key, tensor in _tensors(site, calibration.sites[site]).items():
                writer.write(key, tensor)
        writer.finish({METADATA: text})
        writer.publish()


def read(path: Path) -> Calibration:
    """A saved calibration; its tensors stay on disk until a layer asks for them.

    Raises ValueError if the file is not one, is damaged, or was written by a newer version.
    """
    file = Checkpoint(Path(path))
    try:
        said = json.loads(file.metadata.get(METADATA, "null"))
    except ValueError as problem:
        raise ValueError(f"{file.name}: metadata {METADATA!r} is not JSON ({problem}); record it again") from None
    if not isinstance(said, dict):
        raise ValueError(f"{file.name}: is no calibration file; save one with TesseraSaveCalibration")
    if said.get("version") != VERSION:
        raise ValueError(f"{file.name}: calibration version {said.get('version')!r}, this Tessera reads {VERSION}; "
                         "record it again")  # fmt: skip
    try:
        layers, model, runs, sites, notes = (said[k] for k in ("layers", "model", "runs", "sites", "notes"))
        counts = {name: (int(s["tokens"]), int(s["skipped"])) for name, s in sites.items()}
        homeless = [layer for layer, site in layers.items() if site not in counts]
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise ValueError(f"{file.name}: calibration metadata is incomplete ({problem!r}); record it again") from None
    stored = _Sites(file, counts)
    stored.check()
    if homeless:
        raise ValueError(f"{file.name}: {homeless[0]}: its statistics are missing; record it again")
    return Calibration(stored, layers, str(model), int(runs), [str(note) for note in notes])


class _Sites(Mapping):
    """Statistics by site, read when asked for: all of Z-Image's full moments are 6 GB."""

    def __init__(self, file: Checkpoint, counts: dict[str, tuple[int, int]]):
        self._file, self._counts = file, counts

    def check(self) -> None:
        for site in self._counts:
            specs = {part: self._file.tensors.get(f"{site}.{part}") for part in PARTS}
            missing = [part for part, spec in specs.items() if spec is None or spec.dtype != torch.float32]
            if missing:
                raise ValueError(f"{self._file.name}: {site}: {missing[0]} is missing or not float32; record it again")
            width = specs["mean"].numel
            blocks = -(-width // 128)
            if specs["amax"].numel != width or specs["second"].shape not in (
                (width, width),
                (width,),
                (blocks, 128, 128),
            ):
                raise ValueError(f"{self._file.name}: {site}: second is {specs['second']}, its mean has {width} numbers; "
                                 "record it again")  # fmt: skip

    def __getitem__(self, site: str) -> Statistics:
        tokens, skipped = self._counts[site]
        prefix = f"{site}.noise."
        noise = {k.removeprefix(prefix): self._file.read(k) for k in self._file.tensors if k.startswith(prefix)}
        mean, amax, second = (self._file.read(f"{site}.{part}") for part in PARTS)
        return Statistics(tokens, mean, amax, second, noise, skipped)

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)


def _tensors(site: str, statistics: Statistics) -> dict[str, Tensor]:
    noise = {f"{site}.noise.{name}": value for name, value in statistics.noise.items()}
    parts = {f"{site}.{part}": getattr(statistics, part) for part in PARTS}
    return {key: tensor.float().contiguous().cpu() for key, tensor in (parts | noise).items()}
