"""A layer from the format of its file into one that the device multiplies fast: once, at load, its cost measured."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import formats
from .checkpoint import Checkpoint
from .formats import Entries, Format, TensorSpec
from .formats.base import join
from .formats.fp8 import FP8Row
from .formats.int8 import INT8
from .kernels import cpu
from .kernels import reference as ref
from .kernels.dispatch import Plan
from .writer import Writer

ROUNDING = {"nvfp4": 0.095, "mxfp8": 0.0265, "float8_e4m3fn": 0.0265, "float8_e5m2": 0.053}
"""Relative weight error of a format itself, Gaussian weights (algorithms.md): what transcoding adds to, in squares."""

ROWS = 512  # at once: their passes stay in cache, and whole tiles of block scales
VERSION = 1  # of the arithmetic; other numbers never meet an older cache
METADATA = "tessera_transcoded"
STORED = {"weight": "qdata", "weight_scale": "scale"}  # names in a cache: no reader shall take it for a checkpoint


@dataclass(frozen=True)
class Transcoded:
    """A layer in another format: its entries, and what that cost."""

    format: Format
    entries: Entries
    distance: float  # relative, from what the file's codes stand for
    added: float  # to the layer's relative weight error, the file's own rounding being what it usually is


def target_format(plan: Plan, in_features: int) -> Format:
    """The format a plan keeps a layer in."""
    if plan.target == "fp8_row":
        return FP8Row()
    return formats.parse(plan.target).for_shape(1, in_features)


def transcode(format: Format, entries: Entries, shape: tuple[int, int], plan: Plan, device: str = "cpu") -> Transcoded:
    """The layer [out, in] as the plan wants it, on the CPU; the arithmetic runs on `device`, some rows at a time.

    Raises ValueError if the entries do not fit the shape, or hold scales that are no numbers.
    """
    target = target_format(plan, shape[1])
    stored = {suffix: tensor.to(device) for suffix, tensor in format.check(entries, *shape).items()}
    smoothing = entries.get("pre_quant_scale")
    decode = cpu.decode_rows if torch.device(device).type == "cpu" else ref.decode_rows
    pieces, moved, length = [], 0.0, 0.0
    for first in range(0, shape[0], ROWS):
        rows = slice(first, min(first + ROWS, shape[0]))
        weight = decode(*_operand(format, stored), rows, shape[1])
        if smoothing is not None:  # folded back: rotation does for int8 what smoothing did for nvfp4
            weight = weight * smoothing.to(device).float()
        made, distance, norm = _rows(target, weight, plan.code_max)
        pieces.append(made)
        moved, length = moved + distance, length + norm
    if not math.isfinite(moved + length):
        raise ValueError("its scales hold no numbers; make the file again from the original")
    packed = {suffix: tensor.cpu() for suffix, tensor in target.pack(join(pieces)).items()}
    distance, own = math.sqrt(moved / length) if length else 0.0, ROUNDING.get(format.name, 0.0)
    return Transcoded(target, packed, distance, math.hypot(own, distance) - own)


def _operand(format: Format, stored: Entries) -> tuple[str, Tensor, Tensor, Tensor | None]:
    """A layer's entries as `reference.decode_rows` takes them."""
    if format.name == "nvfp4":
        return "nvfp4", stored["weight"], stored["weight_scale_2"], stored["weight_scale"]
    return "mxfp8" if format.name == "mxfp8" else "fp8", stored["weight"], stored["weight_scale"], None


def _rows(target: Format, weight: Tensor, code_max: int) -> tuple[formats.Quantized, float, float]:
    """(some rows in the target format, their squared distance from the weight's, the weight's squared norm).

    Rotation is orthogonal: the distance is the same before and after. INT8 scales are amax / code_max: 64 where the
    device's int8 sums would overflow with larger codes.
    """
    if not isinstance(target, INT8):
        made = target.encode(weight)
        return made, *_squares(target.decode(made).sub_(weight), weight)
    rotated = cpu.rotate(weight, target.convrot_groupsize)
    amax = torch.maximum(rotated.amax(1, keepdim=True), rotated.amin(1, keepdim=True).neg_())
    scale = (amax / code_max).clamp_(min=1e-30)
    codes = torch.div(rotated, scale).round_()
    made = formats.Quantized(codes.to(torch.int8), scale)
    return made, *_squares(codes.mul_(scale).sub_(rotated), rotated)


def _squares(*tensors: Tensor) -> list[float]:
    """Sums of squares. [rows, in] of a few rows: small enough for fp32."""
    return [torch.linalg.vector_norm(tensor).item() ** 2 for tensor in tensors]


def digest(entries: Entries, plan: Plan) -> str:
    """What a transcoded layer depends on: stored bytes, target and version."""
    h = hashlib.blake2b(f"{VERSION} {plan.target} {plan.code_max}".encode(), digest_size=16)
    for suffix in sorted(entries):
        tensor = entries[suffix]
        h.update(f"{suffix} {tensor.dtype} {tuple(tensor.shape)}".encode())
        h.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return h.hexdigest()


class Cache:
    """Transcoded layers of one file on disk: a safetensors file, checked layer by layer against the source's bytes.

    A missing, damaged or outdated file is as good as none: it is made anew, atomically, by `save`.
    """

    def __init__(self, path: Path):
        self.path, self._file, self._known, self._new = Path(path), None, {}, {}
        if self.path.is_file():
            self._open()

    def _open(self) -> None:
        try:
            file = Checkpoint(self.path)
            self._known = dict(json.loads(file.metadata[METADATA]))
        except (ValueError, KeyError, TypeError):  # whatever it is, it is not ours to read; `save` replaces it
            return
        self._file = file

    def read(self, name: str, key: str, target: Format) -> Transcoded | None:
        """A layer as it was saved for that digest; None if it was not."""
        known = self._known.get(name)
        if self._file is None or not isinstance(known, dict) or known.get("digest") != key:
            return None
        found = {suffix: self._file.read(f"{name}.{stored}") for suffix, stored in STORED.items()}
        made = Transcoded(target, found, known["distance"], known["added"])
        self._new[name] = (key, made)
        return made

    def add(self, name: str, key: str, made: Transcoded) -> None:
        self._new[name] = (key, made)

    @property
    def stale(self) -> bool:
        """Whether it holds other layers than those that were read or added."""
        return {name: key for name, (key, _) in self._new.items()} != {
            name: known.get("digest") for name, known in self._known.items() if isinstance(known, dict)
        }

    def save(self) -> None:
        """Writes every layer that was read or added, unless that is what the file holds already."""
        if not self.stale or not self._new:
            return
        tensors = {f"{n}.{STORED[s]}": t for n, (_, made) in self._new.items() for s, t in made.entries.items()}
        said = {name: {"digest": key, "distance": made.distance, "added": made.added}
                for name, (key, made) in self._new.items()}  # fmt: skip
        text = json.dumps(said)
        specs = {key: TensorSpec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with Writer(self.path, specs, len(json.dumps(text)) + 200, overwrite=True) as writer:
            for key, tensor in tensors.items():
                writer.write(key, tensor)
            writer.reread(Checkpoint(writer.finish({METADATA: text})))
            writer.publish()
