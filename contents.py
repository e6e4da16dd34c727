"""What the files of a job hold: every tensor's name, dtype and shape, before any number is computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import ABSORB, BRANCH, LAYER_ERRORS, Checkpoint
from .formats import Format, Plain, TensorSpec, marker
from .quantization.report import LayerReport
from .source import Source
from .workers import Result

LORA_PREFIX = "diffusion_model."
LAYER_OUTPUTS, WARNING = "tessera_outputs", "tessera_warning"  # metadata keys
METADATA_SPARE = 1 << 16  # bytes kept in the header for what is known only at the end
METADATA_PER_LAYER = 480
QUANT_SUFFIXES = ("comfy_quant", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale",
                  "scale_weight", "scale_input", "weight_scalar", *BRANCH)  # fmt: skip
ADDED = ("input_scale", "pre_quant_scale", *BRANCH)  # entries that a layer may have besides its format's
BIAS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Contents:
    """The files of one job. `formats`, in the order of the work, `ranks` and `reasons` are by layer."""

    source: Source
    target: Path
    lora: Path | None
    formats: Mapping[str, Format]
    ranks: Mapping[str, int]
    reasons: Mapping[str, str]
    mode: str
    calibrated: frozenset[str] = frozenset()  # layers with statistics
    carried: Mapping[str, Tensor] = field(default_factory=dict)  # goes into the LoRA as it is

    def shape(self, name: str) -> tuple[int, int]:
        rows, columns = self.source.shapes()[f"{name}.weight"]
        return rows, columns

    def key(self, name: str, suffix: str) -> str:
        return f"{self.source.prefix}{name}.{suffix}"

    def rank(self, name: str) -> int:
        """Of the layer's branch; 0: it gets none."""
        return 0 if isinstance(self.formats[name], Plain) else min(self.ranks[name], *self.shape(name))

    def bias(self, name: str) -> str | None:
        """The key of a bias that may be corrected."""
        spec = self.source.tensors.get(self.key(name, "bias"))
        fits = spec is not None and spec.shape == self.shape(name)[:1] and spec.dtype in BIAS_DTYPES
        return self.key(name, "bias") if fits else None

    def kept(self) -> list[str]:
        """Keys copied as they are, but for biases that are corrected."""
        changed = {self.key(name, suffix) for name in self.formats for suffix in ("weight", *QUANT_SUFFIXES)}
        return [key for key in self.source.tensors if key not in changed and not key.endswith("scaled_fp8")]

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor that the model is sure to get."""
        specs = {key: self.source.tensors[key] for key in self.kept()}
        for name, format in self.formats.items():
            storage = dict(format.storage(*self.shape(name)))
            if not isinstance(format, Plain):
                text = marker(record(format, self.shape(name)))
                storage["comfy_quant"] = TensorSpec(text.dtype, tuple(text.shape))
            if self.mode == ABSORB and self.rank(name):
                storage |= dict(zip(BRANCH, self.factors(name), strict=True))
            specs |= {self.key(name, suffix): spec for suffix, spec in storage.items()}
        return specs

    def optional(self) -> dict[str, TensorSpec]:
        """Tensors that statistics may add to the model."""
        measured = [name for name in self.formats if name in self.calibrated]
        scales = {self.key(name, "input_scale"): TensorSpec(torch.float32, ()) for name in measured}
        smoothing = {
            self.key(name, "pre_quant_scale"): TensorSpec(torch.float32, self.shape(name)[1:]) for name in measured
        }
        return scales | smoothing

    def lora_specs(self) -> dict[str, TensorSpec]:
        """Tensors that the LoRA may get."""
        specs = {key: TensorSpec(tensor.dtype, tuple(tensor.shape)) for key, tensor in self.carried.items()}
        for name in self.formats:
            if self.rank(name):
                up, down = self.factors(name)
                specs |= {lora_key(name, "lora_up.weight"): up, lora_key(name, "lora_down.weight"): down}
            if self.rank(name) and self.bias(name):
                specs[lora_key(name, "diff_b")] = TensorSpec(torch.float32, self.shape(name)[:1])
        return specs

    def factors(self, name: str) -> tuple[TensorSpec, TensorSpec]:
        (rows, columns), rank = self.shape(name), self.rank(name)
        return TensorSpec(torch.float16, (rows, rank)), TensorSpec(torch.float16, (rank, columns))

    def row(self, name: str, result: Result) -> LayerReport:
        """What the report says of a layer."""
        layer = result.layer
        branch = [layer.branch.up, layer.branch.down] if layer.branch and self.mode == ABSORB else []
        stored = [tensor for suffix, tensor in layer.entries.items() if suffix != "bias"]
        return LayerReport(
            name, self.formats[name].label, result.shape, sum(tensor.nbytes for tensor in stored + branch),
            layer.error, layer.corrected_error, result.seconds, self.reasons[name], layer.output_error,
            layer.corrected_output_error, self.rank(name), name in self.calibrated, layer.notes)  # fmt: skip

    def rows(self, written: Checkpoint) -> list[LayerReport]:
        """The same from the finished file. Nobody knows any more how long it took."""
        errors, outputs = (json.loads(written.metadata.get(key, "{}")) for key in (LAYER_ERRORS, LAYER_OUTPUTS))
        rows = []
        for name, format in self.formats.items():
            keys = {self.key(name, suffix) for suffix in (*format.storage(*self.shape(name)), *ADDED)}
            nbytes = sum(spec.nbytes for key, spec in written.tensors.items() if key in keys)
            error, corrected, *_ = *errors[name], None
            output, corrected_output, *_ = *outputs.get(name, ()), None, None
            rows.append(LayerReport(
                name, format.label, self.shape(name), nbytes, error, corrected, 0.0, self.reasons[name], output,
                corrected_output, self.rank(name), name in self.calibrated))  # fmt: skip
        return rows

    def reserve(self) -> int:
        """Bytes for the metadata."""
        kept = len(json.dumps(dict(self.source.metadata)))  # as JSON: other scripts take 6 bytes a letter
        return METADATA_SPARE + kept + sum(METADATA_PER_LAYER + 3 * len(name) for name in self.formats)


def lora_key(name: str, suffix: str) -> str:
    return f"{LORA_PREFIX}{name}.{suffix}"


def record(format: Format, shape: tuple[int, int]) -> dict:
    """The layer's `comfy_quant` record; `orig_shape` where the storage is padded and cannot tell."""
    stored = format.storage(*shape)["weight"].numel * format.codes_per_byte
    return format.record() | ({"orig_shape": list(shape)} if stored != shape[0] * shape[1] else {})
