"""Calibration files: safetensors with one group of tensors per site, read one site at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .formats import TensorSpec
from .header import parse, shown
from .quantization.calibration import MOMENTS, Calibration, Outline, Statistics, moment_shape
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
    outlines = {site: _outline(calibration.sites, site) for site in calibration.sites}
    said = {
        "version": VERSION, "model": calibration.model, "runs": calibration.runs, "layers": calibration.layers,
        "sites": {site: {"tokens": o.tokens, "skipped": o.skipped} for site, o in outlines.items()},
        "notes": calibration.notes,
    }  # fmt: skip
    text = json.dumps(said)
    specs = {key: spec for site, outline in outlines.items() for key, spec in _specs(site, outline).items()}
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
        said = parse(file.metadata.get(METADATA, "null"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(
            f"{file.name}: metadata {METADATA!r} is not JSON ({shown(str(problem))}); record it again"
        ) from None
    if not isinstance(said, dict):
        raise ValueError(f"{file.name}: is no calibration file; save one with TesseraSaveCalibration")
    if said.get("version") != VERSION:
        raise ValueError(f"{file.name}: calibration version {said.get('version')!r}, this Tessera reads {VERSION}; "
                         "record it again")  # fmt: skip
    try:
        layers, model, runs, sites, notes = (said[k] for k in ("layers", "model", "runs", "sites", "notes"))
        counts = {name: (_count(s["tokens"]), _count(s["skipped"])) for name, s in sites.items()}
        homeless = [layer for layer, site in layers.items() if site not in counts]
        calibration = str(model), _count(runs), [str(note) for note in _list(notes)]
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        found = shown(repr(problem))
        raise ValueError(f"{file.name}: calibration metadata is incomplete ({found}); record it again") from None
    stored = _Sites(file, counts)
    stored.check()
    if homeless:
        raise ValueError(f"{file.name}: {shown(homeless[0])}: its statistics are missing; record it again")
    if not counts:
        raise ValueError(f"{file.name}: holds no statistics; record it again")
    return Calibration(stored, layers, *calibration)


def _count(said: object) -> int:
    if type(said) is not int or not 0 <= said < 1 << 63:
        raise ValueError(f"{str(said)[:40]} is no count")
    return said


def _list(said: object) -> list:
    if not isinstance(said, list):
        raise TypeError("notes are no list")
    return said


def inspect(path: Path) -> dict:
    """What a calibration file says of itself, from its header alone: JSON-ready, `text` in lines of words."""
    calibration = read(path)
    sites: _Sites = calibration.sites
    outlines = {site: sites.outline(site) for site in sites}
    kinds = {site: {1: "diagonal", 2: "full", 3: "block"}[len(o.second)] for site, o in outlines.items()}
    rows = [{"site": site, "in_features": o.in_features, "moment": kinds[site], "tokens": o.tokens,
             "skipped": o.skipped} for site, o in outlines.items()]  # fmt: skip
    tokens = [o.tokens for o in outlines.values()]
    text = [
        f"{Path(path).name}: {size(Path(path).stat().st_size)}, {calibration.runs} model calls, "
        f"{len(calibration.layers)} layers, {len(rows)} inputs of {min(tokens)} to {max(tokens)} tokens",
        "second moments: " + ", ".join(f"{n} {kind}" for kind, n in Counter(kinds.values()).items()),
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
            missing = [part for part in PARTS if f"{site}.{part}" not in self._file.tensors]
            if missing:
                raise ValueError(f"{self._file.name}: {shown(site)}: {missing[0]} is missing; record it again")
            if not all(self._file.tensors[f"{site}.{part}"].shape for part in PARTS):
                raise ValueError(f"{self._file.name}: {site}: has one number for all its inputs; record it again")
            outline = self.outline(site)
            shapes = {moment_shape(outline.in_features, moment) for moment in MOMENTS}
            for key, spec in _specs(site, outline).items():
                found = self._file.tensors[key]
                if found != spec or (key == f"{site}.second" and found.shape not in shapes):
                    raise ValueError(f"{self._file.name}: {key}: is {found}, which does not fit a mean of "
                                     f"{outline.in_features} numbers; record it again")  # fmt: skip

    def outline(self, site: str) -> Outline:
        second, sample = (self._file.tensors[f"{site}.{part}"].shape for part in ("second", "sample"))
        prefix = f"{site}.noise."
        noise = tuple(key.removeprefix(prefix) for key in self._file.tensors if key.startswith(prefix))
        return Outline(*self._counts[site], self._file.tensors[f"{site}.mean"].numel, second, sample[0], noise)

    def __getitem__(self, site: str) -> Statistics:
        """Raises ValueError if what was damaged since is not a number any more."""
        outline = self.outline(site)
        parts = {key: self._file.read(key) for key in _specs(site, outline)}
        for key, tensor in parts.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{self._file.name}: {key}: holds NaN or infinity, the file is damaged; record again")
        noise = {name: parts[f"{site}.noise.{name}"] for name in outline.noise}
        mean, amax, second, sample = (parts[f"{site}.{part}"] for part in PARTS)
        return Statistics(outline.tokens, mean, amax, second, noise, sample, outline.skipped)

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)


def _outline(sites: Mapping[str, Statistics], site: str) -> Outline:
    """Without computing or reading the statistics, where the sites can tell."""
    return sites.outline(site) if hasattr(sites, "outline") else sites[site].outline()


def _specs(site: str, outline: Outline) -> dict[str, TensorSpec]:
    width = (outline.in_features,)
    shapes = {"mean": width, "amax": width, "second": outline.second, "sample": (outline.sample, *width)}
    noise = {f"{site}.noise.{name}": TensorSpec(torch.float32, width) for name in outline.noise}
    return {f"{site}.{part}": TensorSpec(dtype, shapes[part]) for part, dtype in PARTS.items()} | noise


def _tensors(site: str, statistics: Statistics) -> dict[str, Tensor]:
    noise = {f"{site}.noise.{name}": value for name, value in statistics.noise.items()}
    parts = {f"{site}.{part}": getattr(statistics, part) for part in PARTS}
    return {key: tensor.contiguous().cpu() for key, tensor in (parts | noise).items()}
