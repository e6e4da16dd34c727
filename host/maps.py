"""Layer maps of loaded models: quantized layers as planned and as counted, and those that stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from .. import mosaic
from ..checkpoint import PREFIXES
from ..formats import TensorSpec
from ..header import read_header
from ..mosaic import Errors, Mosaic, Tile
from ..tiles import INSPECTED, LOADED, gigabytes
from . import stacking
from .attaching import TRUNK, file_of, quantized_layers
from .inspection import Row, bytes_of, inspect
from .recording import linear_layers


@dataclass(frozen=True)
class _File:
    """What the file that a model came from says of its layers, by the names that they have in the model."""

    name: str = "MODEL"
    nbytes: int = 0
    errors: Errors = Errors()  # noqa: RUF009 frozen
    specs: Mapping[str, TensorSpec] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path | None) -> _File:
        """Nothing but its name if it is no safetensors file, or is not there any more."""
        if path is None or path.suffix not in (".safetensors", ".sft"):
            return cls() if path is None else cls(path.name)
        try:
            metadata, tensors, _ = read_header(path)
            nbytes = path.stat().st_size
        except (ValueError, OSError):  # the model is loaded, whatever has become of its file
            return cls(path.name)
        prefix = next((p for p in PREFIXES if any(key.startswith(p) for key in tensors)), "")
        specs = {key.removeprefix(prefix): spec for key, spec in tensors.items()}
        return cls(path.name, nbytes, mosaic.errors_of(metadata), specs)


def loaded_map(patcher) -> Mosaic:
    """Of a MODEL, or the patcher of a CLIP, as a loader has made it: nothing has run yet."""
    return _map(patcher, LOADED)


def inspected_map(patcher) -> Mosaic:
    """Of a MODEL, or the patcher of a CLIP, after a run: the kernels that ran, and branches with their strength."""
    return _map(patcher, INSPECTED)


def _map(patcher, kind: str) -> Mosaic:
    file, corrections = _File.of(file_of(patcher)), _corrections(patcher)
    rows = {row.layer: row for row in inspect(patcher).rows}
    foreign = frozenset() if rows else quantized_layers(patcher)
    tiles = []
    for path, name, module in _layers(patcher):
        weight = getattr(module, "weight", None)  # hosts that load late have none yet
        if name in rows:
            tiles.append(_quantized(rows[name], file.errors, corrections.get(path), kind == INSPECTED))
        elif weight is None or weight.ndim != 2:
            continue
        elif path in foreign:
            tiles.append(_foreign(name, module, file.errors))
        else:
            spec = file.specs.get(f"{name}.weight", TensorSpec(weight.dtype, tuple(weight.shape)))
            tiles.append(Tile(name, mosaic.dtype_label(spec.dtype), tuple(weight.shape), spec.nbytes))
    facts = [("file", gigabytes(file.nbytes))] if file.nbytes else []
    beside = [entry for entry, _, _ in stacking.entries(patcher) if not (entry.absorbed or entry.correction)]
    facts += [("LoRAs beside it", str(len(beside)))] if beside else []
    return mosaic.of_inspection(file.name, tiles, facts, kind, file.errors.measure)


def _layers(patcher) -> Iterator[tuple[str, str, nn.Module]]:
    """(path, name as in the file, module) of every linear layer, in the model's order."""
    text = stacking.is_text_encoder(patcher)
    for path, module in linear_layers(patcher.model):
        yield path, path.partition(".transformer.")[2] or path if text else path.removeprefix(TRUNK), module


def _corrections(patcher) -> dict[str, tuple[int, float]]:
    """Layer path -> (rank, strength) of what corrects its quantization: a correction LoRA, or the file's own branch."""
    found = {}
    for entry, strength, _ in stacking.entries(patcher):
        for placed in entry.changes if entry.absorbed or entry.correction else ():
            if placed.change.adapter is not None:
                found[placed.layer] = placed.change.adapter.tensors()[0].shape[-1], strength
    return found


def _quantized(row: Row, errors: Errors, correction: tuple[int, float] | None, ran: bool) -> Tile:
    error, corrected = errors.of(row.layer)
    rank, strength = correction or (0, None)
    tile = Tile(
        row.layer, row.format, row.shape, row.nbytes, error, corrected if strength == 1 else None, kernel=row.kernel,
        ran=row.runs if ran else None, path=row.path, reason=row.reason, rank=rank, strength=strength, added=row.added,
    )  # fmt: skip
    return tile if row.kept == row.format else replace(tile, kept=row.kept)


def _foreign(name: str, module: nn.Module, errors: Errors) -> Tile:
    """A quantized layer that another loader has made."""
    shape = module.out_features, module.in_features
    return Tile(name, str(module.quant_format), shape, bytes_of(module.weight), errors.of(name)[0],
                reason="from another loader")  # fmt: skip
