"""A file with everything repaired that its reader repairs, written once for readers that do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import QUANTIZATION_METADATA, Checkpoint, Layer
from .formats import TensorSpec, marker
from .layer import ROTATED_BY_ONE
from .lora import strip_repeated_prefix
from .source import Digest
from .version import VERSION
from .writer import Writer, check_target

REPAIRED = "tessera_repaired"  # metadata key
SPARE = 1 << 16  # bytes of the header for it


@dataclass(frozen=True)
class Repaired:
    """What was written."""

    path: Path
    repairs: list[str]
    losses: dict[str, float]  # relative L2 of the layers that had to be encoded anew, from what the file said


def repair(source: Path, target: Path) -> Repaired:
    """Writes the file's repaired twin: same tensors, bytes and metadata but for what `repairs` and its metadata say.

    Atomic, read back before it gets its name. Raises ValueError if the target exists, or the file is refused.
    """
    source, target = Path(source), Path(target)
    file = Checkpoint(source)
    check_target(target, overwrite=False)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: name it .safetensors, nothing else can be written")
    before = source.stat()
    names = _names(file)
    repairs = [*file.repairs, *_renamed(names)]
    records = _records(file)
    said = file.metadata | ({QUANTIZATION_METADATA: _said(records)} if records else {})
    losses: dict[str, float] = {}
    with Digest(source) as digest, Writer(target, _specs(file, names, records), _reserve(said, repairs)) as writer:
        for key, tensor in _tensors(file, names, records, losses):
            writer.write(key, tensor)
        if (source.stat().st_mtime_ns, source.stat().st_size) != (before.st_mtime_ns, before.st_size):
            raise ValueError(f"{source.name}: changed while it was read, nothing was saved; try again")
        how = {"version": VERSION, "source": {"name": source.name, "sha256": digest.hexdigest()}, "repairs": repairs}
        again = Checkpoint(writer.finish(said | {REPAIRED: json.dumps(how)}))
        writer.reread(again)
        _require_clean(target, file, again)
        writer.publish()
    return Repaired(target, repairs, losses)


def _names(file: Checkpoint) -> dict[str, str]:
    """New key of every tensor that is kept as it is. Raises ValueError if two would have the same."""
    ours = {key for layer in file.layers.values() for key in layer.sources.values()}
    ours |= {f"{key}.comfy_quant" for key in _records(file)} | {f"{file.prefix}scaled_fp8"}
    names = {key: strip_repeated_prefix(key) for key in file.tensors if key not in ours}
    if len(set(names.values())) != len(names):
        raise ValueError(f"{file.name}: has tensors with and without a repeated prefix; remove one of the two")
    return names


def _renamed(names: dict[str, str]) -> list[str]:
    changed = [key for key, name in names.items() if key != name]
    return [f"{len(changed)} names had their prefix twice (first: {changed[0]})"] if changed else []


def _records(file: Checkpoint) -> dict[str, dict]:
    """The record of every quantized layer, with its shape where padding hides it."""
    records = file.repaired_records()
    for layer in file.layers.values():
        stored = layer.format.storage(*layer.shape)["weight"].numel * layer.format.codes_per_byte
        if stored != layer.shape[0] * layer.shape[1]:
            records[layer.key]["orig_shape"] = list(layer.shape)
    return records


def _said(records: dict[str, dict]) -> str:
    return json.dumps({"format_version": "1.0", "layers": records})


def _reserve(said: dict[str, str], repairs: list[str]) -> int:
    return SPARE + len(json.dumps(said)) + 2 * len(json.dumps(repairs))


def _kept(layer: Layer) -> list[str]:
    """Entries that stay as they are beside those of the format."""
    storage = layer.format.storage(*layer.shape)
    return [suffix for suffix in layer.sources if suffix not in storage and suffix not in layer.dropped]


def _specs(file: Checkpoint, names: dict[str, str], records: dict[str, dict]) -> dict[str, TensorSpec]:
    specs = {name: file.tensors[key] for key, name in names.items()}
    for layer in file.layers.values():
        specs |= {f"{layer.key}.{suffix}": spec for suffix, spec in layer.format.storage(*layer.shape).items()}
        specs |= {f"{layer.key}.{suffix}": file.tensors[layer.sources[suffix]] for suffix in _kept(layer)}
    markers = {f"{key}.comfy_quant": marker(record) for key, record in records.items()}
    return specs | {key: TensorSpec(text.dtype, tuple(text.shape)) for key, text in markers.items()}


def _tensors(file: Checkpoint, names: dict[str, str], records: dict[str, dict],
             losses: dict[str, float]) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    for key, name in names.items():
        yield name, file.read(key)
    for name, layer in file.layers.items():
        entries = file.entries(layer)
        for suffix in (*layer.format.storage(*layer.shape), *_kept(layer)):
            yield f"{layer.key}.{suffix}", entries[suffix]
        if layer.foreign is not None and not layer.foreign.exact:
            made = layer.format.decode(layer.format.unpack(entries, *layer.shape))
            was = layer.foreign.decode({suffix: file.read(key) for suffix, key in layer.sources.items()})
            losses[name] = ((made - was).norm() / was.norm().clamp(min=torch.finfo().tiny)).item()
    for key, record in records.items():
        yield f"{key}.comfy_quant", marker(record)


def _require_clean(target: Path, file: Checkpoint, again: Checkpoint) -> None:
    """Raises RuntimeError if the new file is not what it was to be; that would be a mistake of ours."""
    left = [line for line in again.repairs if not line.endswith(ROTATED_BY_ONE)]
    same = {name: layer.format for name, layer in file.layers.items()} == {n: x.format for n, x in again.layers.items()}
    branches = all(file.layers[name].absorbs == layer.absorbs for name, layer in again.layers.items() if same)
    if left or not same or not branches:
        raise RuntimeError(f"{target.name}: the repaired file needs repair itself ({left[:1]}), nothing was saved; "
                           "please report this with the original's `tessera inspect`")  # fmt: skip
