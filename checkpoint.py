"""Safetensors checkpoints by their headers, one layer at a time: a tolerant reader that refuses what it must."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from . import foreign, formats
from .formats import Format, TensorSpec, marker
from .header import DTYPES, escaped, read_header
from .layer import BRANCH, DAMAGED, ROTATED_BY_ONE, Layer, check_extras, check_record, layer_sources, logical_shape
from .markers import infer, merge_markers
from .quantization.lowrank import LowRank

__all__ = [
    "ABSORB", "BRANCH", "DETECTION", "DTYPES", "EMBEDDINGS", "LAYER_ERRORS", "PREFIXES", "PROVENANCE",
    "QUANTIZATION_METADATA", "Checkpoint", "Layer", "logical_shape", "read_header",
]  # fmt: skip

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
QUANTIZATION_METADATA = "_quantization_metadata"
HOST_ONLY = ("convrot_w4a4", "asym_w4a8_int8")
EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|shared|token_embedding|word_embeddings|wte)$")
DETECTION = re.compile(r"(^|\.)(cap_embedder\.1|x_embedder|final_layer\.linear)$")  # hosts know a model by their shapes
CHUNK = 1 << 20  # bytes
MAX_LOOKED_AT = 1 << 28  # bytes of weights that are looked through for nothing but zeros
PROVENANCE, LAYER_ERRORS = "tessera", "tessera_layers"
ABSORB = "absorb"  # the mode whose low-rank branches are part of the model


@dataclass
class Checkpoint:
    """A safetensors file by its header; tensors are read from disk one at a time, never mapped or kept.

    `layers` holds every quantized layer by module path without the file's prefix; `opaque` the records, by key, of
    layers in formats that only a host reads; `repairs` says what the file had wrong. Raises ValueError naming file,
    layer, finding and remedy if the file is damaged or cannot be read safely.
    """

    path: Path
    metadata: dict[str, str] = field(init=False)
    tensors: dict[str, TensorSpec] = field(init=False)
    prefix: str = field(init=False)
    layers: dict[str, Layer] = field(init=False)
    opaque: dict[str, dict] = field(init=False, default_factory=dict)
    repairs: list[str] = field(init=False, default_factory=list)

    def __post_init__(self):
        self.path, self._looked_at = Path(self.path), 0
        self.metadata, self.tensors, self._offsets = read_header(self.path)
        self.prefix = next((p for p in PREFIXES if any(k.startswith(p) for k in self.tensors)), "")
        self.layers = {}
        for key, layer in self._find_layers().items():
            if self.layers.setdefault(key.removeprefix(self.prefix), layer) is not layer:
                raise layer.error(self.path, f"is there with and without {self.prefix}; remove one of the two")
        self._refuse_lost_branches()

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size

    @property
    def name(self) -> str:
        return self.path.name

    def quantized(self, name: str) -> bool:
        return name in self.layers

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shape of every weight and plain tensor below the prefix, by key without prefix; scales left out."""
        packed = {key for layer in self.layers.values() for key in layer.sources.values()}
        packed |= {f"{layer.key}.comfy_quant" for layer in self.layers.values()}
        plain = {k: spec.shape for k, spec in self.tensors.items() if k not in packed and k.startswith(self.prefix)}
        shapes = {key.removeprefix(self.prefix): shape for key, shape in plain.items()}
        return shapes | {f"{name}.weight": layer.shape for name, layer in self.layers.items()}

    def read(self, key: str) -> Tensor:
        """One tensor as stored. Raises KeyError for an unknown key, ValueError if the file has become shorter."""
        spec = self.tensors[key]
        return self._bytes(key, 0, spec.nbytes).view(spec.dtype).reshape(spec.shape)

    def _bytes(self, key: str, first: int, count: int) -> Tensor:
        """Some bytes of a tensor as stored."""
        buffer = torch.empty(count, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._offsets[key] + first)
            view, done = memoryview(buffer.numpy()), 0
            while done < count:
                got = file.readinto(view[done:])
                if not got:
                    raise ValueError(
                        f"{self.path.name}: {key}: file ends inside the tensor; it changed while being read"
                    )
                done += got
        return buffer

    def entries(self, layer: Layer) -> dict[str, Tensor]:
        """The stored tensors of a quantized layer by suffix, with this format's dtypes and shapes."""
        stored = {suffix: self.read(key) for suffix, key in layer.sources.items()}
        return stored | self._checked(layer, stored)

    def weight(self, name: str, shape: tuple[int, int] | None = None, absorbed: bool = True) -> Tensor:
        """fp32 weight [out, in] of a module path without prefix, decoded if it is quantized.

        `shape` is the logical one where the caller knows it and the file may not: padding is then cut off. Without
        `absorbed` the layer's own branch is left out: what the codes alone are worth.
        """
        layer = self.layers.get(name)
        if layer is None:
            return self._plain_weight(f"{self.prefix}{name}")
        if layer.foreign is not None and not layer.foreign.exact:
            entries = {suffix: self.read(key) for suffix, key in layer.sources.items()}
            weight = layer.foreign.decode(entries)  # what the file says, not what it is transcoded to
            if shape not in (None, layer.shape):
                raise layer.error(self.path, f"weight is {layer.shape}, not {shape}; it is the layer of another model")
        else:
            entries = self.entries(layer)
            try:
                quantized = layer.format.unpack(entries, *(shape or layer.shape))
            except ValueError as problem:
                raise layer.error(self.path, f"{problem}; it is the layer of another model") from None
            weight = layer.format.decode(quantized)
        smoothing = entries.get("pre_quant_scale")  # the input is multiplied by it, so the weight was divided
        if smoothing is not None and smoothing.numel() != weight.shape[1]:
            raise layer.error(self.path, f"pre_quant_scale has {smoothing.numel()} numbers, the weight "
                              f"{weight.shape[1]} columns; {DAMAGED}")  # fmt: skip
        weight = weight if smoothing is None else weight * smoothing.float()
        return LowRank(*(entries[part] for part in BRANCH)).add_to(weight) if absorbed and layer.absorbs else weight

    def branch(self, name: str) -> LowRank | None:
        """The low-rank branch that is part of a layer (absorb mode); None if it has none."""
        layer = self.layers.get(name)
        return LowRank(*(self.read(layer.sources[part]) for part in BRANCH)) if layer and layer.absorbs else None

    def records(self) -> dict[str, dict]:
        """The `comfy_quant` record of every quantized layer by its key in the file, `params` flattened.

        Of foreign layers the file's own, as this goes with its tensors as they are.
        """
        foreign = {x.key: x.foreign.said for x in self.layers.values() if x.foreign is not None and x.foreign.said}
        return self.repaired_records(lambda layer: layer.foreign is None) | foreign

    def repaired_records(self, wanted: Callable[[Layer], bool] = lambda layer: True) -> dict[str, dict]:
        """The records that go with the tensors as `repair` makes them."""
        layers = {layer.key: layer.canonical_record() for layer in self.layers.values() if wanted(layer)}
        return self.opaque | layers

    def repair(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors (same keys) as every host can load them: canonical entries and one marker per layer.

        Branches are taken out: no host knows them.
        """
        for layer in self.layers.values():
            stored = {suffix: state_dict.pop(key) for suffix, key in layer.sources.items()}
            for suffix, tensor in (stored | self._checked(layer, stored)).items():
                if suffix not in (*BRANCH, *layer.dropped):
                    state_dict[f"{layer.key}.{suffix}"] = tensor
        for key, record in self.repaired_records().items():
            state_dict[f"{key}.comfy_quant"] = marker(record)
        state_dict.pop(f"{self.prefix}scaled_fp8", None)
        return state_dict

    def _checked(self, layer: Layer, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            if layer.zero:
                return layer.format.pack(layer.format.encode(torch.zeros(layer.shape)))
            if layer.foreign is not None:
                return layer.foreign.entries(layer.format, stored)
            return layer.format.check(stored, *layer.shape)
        except ValueError as problem:
            raise layer.error(self.path, f"{problem}; {DAMAGED}") from None

    def _plain_weight(self, key: str) -> Tensor:
        """The unquantized weight of a module. Raises ValueError if its numbers are codes that only a host reads."""
        spec, record = self.tensors[f"{key}.weight"], self.opaque.get(key, {})
        if record or not spec.dtype.is_floating_point:
            found = f"format {record.get('format')!r}" if record else f"weight is {spec} without scales"
            raise ValueError(f"{self.path.name}: {key}: {found}, Tessera cannot decode it; use the original file")
        return self.read(f"{key}.weight").float()

    def _find_layers(self) -> dict[str, Layer]:
        records, unmarked = merge_markers(self)
        self.opaque = {k: r for k, r in records.items() if r.get("format") in HOST_ONLY or "num_experts" in r}
        dropped = next((k for k in self.tensors if k.endswith(".weight_correction")), None)
        if dropped is not None:
            raise ValueError(f"{self.path.name}: {dropped}: asymmetric W4A8 weights are dropped by ComfyUI on load; "
                             "re-quantize symmetric")  # fmt: skip
        layers = {
            key: self._layer(key, record, key not in unmarked)
            for key, record in records.items()
            if key not in self.opaque
        }
        layers = self._with_order(layers, unmarked)
        self.repairs += foreign.lines(layers)
        ours = {source for layer in layers.values() for source in layer.sources.values()}
        stray = next((key for key in self.tensors if key.rpartition(".")[2] in BRANCH and key not in ours), None)
        if stray is not None:
            raise ValueError(f"{self.path.name}: {stray}: a branch of a layer that is not quantized here; {DAMAGED}")
        return layers

    def _layer(self, key: str, record: dict, marked: bool) -> Layer:
        try:
            sources = layer_sources(key, self.tensors)
            specs = {suffix: self.tensors[source] for suffix, source in sources.items()}
            record = infer(record, specs, self.repairs, key)
            check_record(record)
            found = foreign.recognise(record, specs, marked)
            format = formats.from_record(record, specs) if found is None else found[1]
            shape = logical_shape(format, record, specs)
            format.for_shape(*shape)
            zero = self._odd_zero(format, sources, shape) if found is None else self._no_scale(format, sources)
            check_extras(format, record, specs, shape)
        except ValueError as problem:
            raise ValueError(f"{self.path.name}: {key}: {escaped(str(problem))[:1000]}") from None
        if zero and isinstance(format, formats.INT8):
            format = replace(format, per_row=format.per_row and shape[0] > 1)  # a scale of one row is one scale
        if zero:
            self.repairs.append(f"{key}: all-zero weight with unusable scales")
        if isinstance(format, formats.INT8) and format.convrot and not format.per_row:
            self.repairs.append(f"{key}: {ROTATED_BY_ONE}")
        return Layer(key, format, shape, record, sources, zero, found and found[0])

    def _with_order(self, layers: dict[str, Layer], unmarked: set[str]) -> dict[str, Layer]:
        """The layers, those of a block format marked as foreign whose scales turn out to lie row by row."""
        for name in foreign.TILED:
            native = [x for x in layers.values() if x.format.name == name and not (x.zero or x.foreign)]
            mine = [layer for layer in native if foreign.either(name, layer.shape)]
            scales = [layer.sources["weight_scale"] for layer in mine]
            fit = [key for key in scales if foreign.enough(self.tensors[key])]
            sample = [self._first_rows(key) for key in fit[:: max(1, len(fit) // 3)][:4]]
            if not sample or not foreign.by_row(sample, name):
                continue
            for layer in mine:
                try:
                    what = foreign.untiled(name, layer.record, layer.key not in unmarked)
                except ValueError as problem:
                    raise layer.error(self.path, problem) from None
                layers[layer.key] = replace(layer, foreign=what)
        return layers

    def _first_rows(self, key: str) -> Tensor:
        """The first block scales of a layer, whole tiles of them, as stored."""
        rows, columns = self.tensors[key].shape
        rows = min(rows, foreign.SAMPLE)
        return self._bytes(key, 0, rows * columns).reshape(rows, columns)

    def _refuse_lost_branches(self) -> None:
        """Raises ValueError if the file says that it is in absorb mode, but a layer has lost its branch."""
        if self._said(PROVENANCE).get("mode") != ABSORB:
            return
        errors = self._said(LAYER_ERRORS)  # a second number counts the layer's branch
        listed = [name for name, row in errors.items() if isinstance(row, list) and len(row) > 1 and row[1] is not None]
        for name in listed if errors else self.layers:
            if name not in self.layers or not self.layers[name].absorbs:
                raise ValueError(f"{self.path.name}: {name}: absorb_up and absorb_down are missing, but the file is "
                                 "marked absorb: without its branch the layer is wrong; another tool has rewritten "
                                 "the file, make it again from the original")  # fmt: skip

    def _said(self, key: str) -> dict:
        """A JSON object of the metadata; empty if there is none."""
        try:
            said = json.loads(self.metadata.get(key, "{}"))
        except (ValueError, RecursionError):
            return {}  # other tools' files may use the key for something else
        return said if isinstance(said, dict) else {}

    def _odd_zero(self, format: Format, sources: Mapping[str, str], shape: tuple[int, int]) -> bool:
        """Whether a weight is all zero, for which convert_to_quant writes scales that no host reads (format.md 6).

        Format.check on shapes and dtypes alone: raises ValueError for any other misfit, before anything is loaded.
        """
        specs = {suffix: self.tensors[key] for suffix, key in sources.items()}
        stand_ins = {s: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for s, spec in specs.items()}
        try:
            format.check(stand_ins, *shape)
        except ValueError as problem:
            stored = specs["weight"].dtype == format.storage(*shape)["weight"].dtype
            if stored and "weight_scale" in specs and self._is_zero(sources["weight"]):
                return True
            raise ValueError(f"{problem}; {DAMAGED}") from None
        return self._no_scale(format, sources)

    def _no_scale(self, format: Format, sources: Mapping[str, str]) -> bool:
        return isinstance(format, formats.NVFP4) and not self.read(sources["weight_scale_2"]).any()

    def _is_zero(self, key: str) -> bool:
        """Whether a tensor is all zero; not of one too large to look through in an instant."""
        nbytes = self.tensors[key].nbytes
        self._looked_at += nbytes
        if self._looked_at > MAX_LOOKED_AT:
            return False
        starts = range(0, nbytes, CHUNK)
        return not any(self._bytes(key, first, min(CHUNK, nbytes - first)).any() for first in starts)
