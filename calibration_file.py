"""Calibration files: safetensors with one group of tensors per site, read one site at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .formats import TensorSpec
from .quantization.calibration import MOMENTS, Calibration, Statistics
from .quantization.report import size
from .writer import Writer

METADATA = "tessera_calibration"
VERSION = 1
PARTS = {"mean": torch.float32, "amax": torch.float32, "second": torch.float32, "sample": torch.bfloat16}
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


def inspect(path: Path) -> dict:
    """What a calibration file says of itself, from its header alone: JSON-ready, `text` in lines of words."""
    calibration = read(path)
    sites: _Sites = calibration.sites
    rows = [sites.describe(site) for site in sites]
    kinds = {kind: sum(row["moment"] == kind for row in rows) for kind in MOMENTS}
    tokens = [row["tokens"] for row in rows]
    text = [
        f"{Path(path).name}: {size(Path(path).stat().st_size)}, {calibration.runs} model calls, "
        f"{len(calibration.layers)} layers, {len(rows)} inputs of {min(tokens)} to {max(tokens)} tokens",
        "second moments: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count),
        f"recorded on the model {calibration.model[:16]}",
        *calibration.notes,
    ]
    return {"file": Path(path).name, "bytes": Path(path).stat().st_size, "model": calibration.model,
            "runs": calibration.runs, "layers": calibration.layers, "sites": rows, "notes": calibration.notes,
            "text": text}  # fmt: skip


class _Sites(Mapping):
    """Statistics by site, read when asked for: all of Z-Image's full moments are 6 GB."""

    def __init__(self, file: Checkpoint, counts: dict[str, tuple[int, int]]):
        self._file, self._counts = file, counts

    def check(self) -> None:
        for site in self._counts:
            specs = {part: self._file.tensors.get(f"{site}.{part}") for part in PARTS}
            wrong = [part for part, spec in specs.items() if spec is None or spec.dtype != PARTS[part]]
            if wrong:
                raise ValueError(f"{self._file.name}: {site}: {wrong[0]} is {specs[wrong[0]]}, expected "
                                 f"{PARTS[wrong[0]]}; record it again")  # fmt: skip
            width = specs["mean"].numel
            blocks = -(-width // 128)
            shapes = ((width, width), (width,), (blocks, 128, 128))
            sample = specs["sample"].shape
            if specs["amax"].numel != width or specs["second"].shape not in shapes or sample[1:] != (width,):
                raise ValueError(f"{self._file.name}: {site}: second is {specs['second']}, sample {list(sample)}, its "
                                 f"mean has {width} numbers; record it again")  # fmt: skip

    def describe(self, site: str) -> dict:
        tokens, skipped = self._counts[site]
        in_features = self._file.tensors[f"{site}.mean"].numel
        kind = {1: "diagonal", 2: "full", 3: "block"}[len(self._file.tensors[f"{site}.second"].shape)]
        return {"site": site, "in_features": in_features, "moment": kind, "tokens": tokens, "skipped": skipped}

    def __getitem__(self, site: str) -> Statistics:
        tokens, skipped = self._counts[site]
        prefix = f"{site}.noise."
        noise = {k.removeprefix(prefix): self._file.read(k) for k in self._file.tensors if k.startswith(prefix)}
        mean, amax, second, sample = (self._file.read(f"{site}.{part}") for part in PARTS)
        return Statistics(tokens, mean, amax, second, noise, sample, skipped)

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)


def _tensors(site: str, statistics: Statistics) -> dict[str, Tensor]:
    noise = {f"{site}.noise.{name}": value for name, value in statistics.noise.items()}
    parts = {f"{site}.{part}": getattr(statistics, part) for part in PARTS}
    return {key: tensor.contiguous().cpu() for key, tensor in (parts | noise).items()}
