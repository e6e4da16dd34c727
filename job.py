"""Quantize and save: a checkpoint, layer by layer, through a recipe into a new file and its correction LoRA."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .checkpoint import DETECTION, EMBEDDINGS, LAYER_ERRORS, PROVENANCE, QUANTIZATION_METADATA, Checkpoint
from .formats import Format, Plain, TensorSpec, marker
from .quantization import pipeline
from .quantization.lowrank import LowRank
from .quantization.recipe import LayerMap, Recipe
from .quantization.report import LayerReport, Report
from .source import Digest, Source
from .version import VERSION
from .writer import Writer

LORA_PREFIX = "diffusion_model."
METADATA_SPARE = 1 << 16  # bytes kept in the header for what is known only at the end
METADATA_PER_LAYER = 400
VERIFY_TOLERANCE = 1e-4  # of a relative error: what is on disk must have the error that was reported


@dataclass(frozen=True)
class Step:
    """Where a running job is. `seconds_left` is an estimate from the weights done so far; None before the first."""

    index: int
    total: int
    layer: str
    seconds_left: float | None
    verifying: bool = False  # the second pass, over what was written

    def __str__(self) -> str:
        minutes, seconds = divmod(int(self.seconds_left or 0), 60)
        left = "" if self.seconds_left is None else f", {minutes}:{seconds:02d} left"
        return f"{self.index}/{self.total} {self.layer}{left}"


@dataclass
class Job:
    """One quantization. Raises ValueError, before anything is written, for whatever it can know up front."""

    source: Source
    target: Path
    recipe: Recipe
    lora: Path | None = None  # None: <target stem>_lora.safetensors beside the target; ignored at rank 0
    rank: int = 32
    seed: int = 0
    sweep: bool = True  # False: plain round-to-nearest, as other tools do it
    device: str = "cpu"
    overwrite: bool = False
    layer_map: LayerMap = field(init=False)
    warnings: list[str] = field(init=False, default_factory=list)

    def __post_init__(self):
        self.target = Path(self.target)
        for path in (self.target, self.lora):
            if path is not None and Path(path).suffix != ".safetensors":
                raise ValueError(f"{path}: name it .safetensors, nothing else can be written")
        if self.rank < 0:
            raise ValueError(f"rank {self.rank}: must be 0 (no correction LoRA) or more")
        if self.rank and is_text_encoder(self.source.shapes()):
            self.rank = 0
            self.warnings.append("text encoder: no correction LoRA is written, nothing can attach one to a CLIP yet")
        self.lora = Path(self.lora or lora_path(self.target)) if self.rank else None
        self._refuse_same_file()
        self._refuse_device()
        self.layer_map = self.recipe.resolve(self.source.shapes())
        if self.layer_map.problems:
            first, more = self.layer_map.problems[0], len(self.layer_map.problems) - 1
            raise ValueError(f"{self.source.name}: {first}" + (f"; and {more} more layers like it" if more else ""))
        self.warnings += self.layer_map.warnings
        self._refuse_kept_legacy()
        if not self.formats():
            raise ValueError(f"{self.source.name}: recipe {self.recipe.name} quantizes none of its layers; "
                             "choose a recipe for this model")  # fmt: skip
        if all(isinstance(format, Plain) for format in self.formats().values()):
            self.rank, self.lora = 0, None  # nothing to correct
        self._warn_of_layers_hosts_cannot_take()
        again = [name for name in self.formats() if self.source.quantized(name)]
        if again:
            self.warnings.append(f"{len(again)} layers are already quantized in the source (first: {again[0]}); "
                                 "errors are measured against it, not against the original")  # fmt: skip

    def working_bytes(self) -> int:
        """What the arithmetic needs at once on `device`, at most: some six fp32 copies of the largest layer."""
        shapes = self.source.shapes()
        return 6 * 4 * max(shapes[f"{name}.weight"][0] * shapes[f"{name}.weight"][1] for name in self.formats())

    def formats(self) -> dict[str, Format]:
        """The format of each layer that changes, by module path, in the model's own order."""
        names = sorted((n for n, choice in self.layer_map.items() if choice.format is not None), key=natural)
        return {name: self.layer_map[name].format for name in names}

    def run(self, progress: Callable[[Step], None] = lambda step: None) -> Report:
        """Writes and verifies model and LoRA, then gives both their names; an exception, from `progress` too, leaves
        nothing behind. Same source, recipe and seed on one machine: same bytes; where the same job's files are there
        already, they are the result and nothing is written."""
        started = time.monotonic()
        done = None if self.overwrite else self.done()
        if done is not None:
            return done
        with ExitStack() as stack:
            model = stack.enter_context(Writer(self.target, self._specs(), self._reserve(), self.overwrite))
            lora = None
            if self.lora:
                lora = stack.enter_context(Writer(self.lora, self._lora_specs(), METADATA_SPARE, self.overwrite))
            digest = stack.enter_context(Digest(self.source.path))
            report = self._report()
            for step in self._steps(progress):
                report.layers.append(self._layer(step.layer, model, lora))
            report.kept = self._copy_rest(model)
            progress(Step(0, len(report.layers), "verifying", None, True))
            self._finish(report, model, lora, digest.hexdigest(), progress)
            report.model_bytes, report.lora_bytes = model.nbytes, lora.nbytes if lora else 0
            report.seconds = time.monotonic() - started
            model.refuse_existing()  # it may have come meanwhile
            if lora:
                lora.publish()  # first: a model without its LoRA is the worse half
            model.publish()
        return report

    def done(self) -> Report | None:
        """The report of this very job if its files are there: same source bytes, recipe, seed, rank and version."""
        files = [path for path in (self.target, self.lora) if path is not None]
        if self.source.path is None or not all(path.is_file() for path in files):
            return None
        try:
            written = [Checkpoint(path) for path in files]
            said = [json.loads(file.metadata.get(PROVENANCE, "null")) for file in written]
            sha256 = said[0]["source"]["sha256"]
        except (ValueError, KeyError, TypeError):  # not a file of ours; the writer says that the name is taken
            return None
        ours = self._provenance(sha256)
        if said != [ours, ours | {"model": self.target.name}][: len(said)]:
            return None
        with Digest(self.source.path) as digest:
            if digest.hexdigest() != sha256:
                return None
        report, errors = self._report(), json.loads(written[0].metadata[LAYER_ERRORS])
        report.warnings.append("the same job's files were there already, nothing was written")
        for name, format in self.formats().items():
            shape = self.source.shapes()[f"{name}.weight"]
            error, corrected = (*errors[name], None)[:2]
            reason = self.layer_map[name].reason
            report.layers.append(
                LayerReport(name, format.label, shape, format.nbytes(*shape), error, corrected, 0.0, reason)
            )
        report.kept, report.model_bytes = len(self._kept()), written[0].nbytes
        report.lora_bytes = written[1].nbytes if self.lora else 0
        return report

    def _steps(self, progress: Callable[[Step], None]) -> Iterator[Step]:
        formats, shapes = self.formats(), self.source.shapes()
        weights = {name: shapes[f"{name}.weight"][0] * shapes[f"{name}.weight"][1] for name in formats}
        started, done, total = time.monotonic(), 0, sum(weights.values())
        for index, name in enumerate(formats):
            left = (time.monotonic() - started) * (total - done) / done if done else None
            step = Step(index, len(formats), name, left)
            progress(step)
            yield step
            done += weights[name]

    def _layer(self, name: str, model: Writer, lora: Writer | None) -> LayerReport:
        started, choice = time.monotonic(), self.layer_map[name]
        format, rank = choice.format, self.rank if lora else 0
        try:
            weight = self.source.weight(name).to(self.device)
            layer = pipeline.quantize(format, weight, rank, pipeline.layer_seed(self.seed, name), self.sweep)
        except ValueError as problem:
            raise ValueError(f"{self.source.name}: {name}: {problem}") from None
        except torch.cuda.OutOfMemoryError:
            raise RuntimeError(f"{self.source.name}: {name}: does not fit into the free memory of {self.device}; "
                               "free some there, or take --device cpu") from None  # fmt: skip
        shape = (weight.shape[0], weight.shape[1])
        for suffix, tensor in layer.entries.items():
            model.write(f"{self.source.prefix}{name}.{suffix}", tensor)
        if not isinstance(format, Plain):
            model.write(f"{self.source.prefix}{name}.comfy_quant", marker(record(format, shape)))
        if layer.branch is not None:
            lora.write(f"{LORA_PREFIX}{name}.lora_up.weight", layer.branch.up)
            lora.write(f"{LORA_PREFIX}{name}.lora_down.weight", layer.branch.down)
        seconds = time.monotonic() - started
        return LayerReport(name, format.label, shape, format.nbytes(*shape), layer.error, layer.corrected_error,
                           seconds, choice.reason)  # fmt: skip

    def _copy_rest(self, model: Writer) -> int:
        keys = self._kept()
        for key in keys:
            model.write(key, self.source.read(key))
        return len(keys)

    def _finish(self, report, model: Writer, lora: Writer | None, sha256: str | None, progress) -> None:
        """Closes both files, reads every layer back from disk and compares it with the source once more."""
        provenance = self._provenance(sha256)
        written = Checkpoint(model.finish(self._metadata(report, provenance)))
        branches = None
        if lora:
            branches = Checkpoint(lora.finish({PROVENANCE: json.dumps(provenance | {"model": self.target.name})}))
        for index, row in enumerate(report.layers):
            progress(Step(index, len(report.layers), f"verifying {row.name}", None, True))
            self._verify(row, written, branches)
        model.reread(written)  # an error of 1e-4 hides a flipped bit of a large layer, and kept tensors have none
        if lora:
            lora.reread(branches)

    def _verify(self, row: LayerReport, written: Checkpoint, branches: Checkpoint | None) -> None:
        branch = read_branch(branches, row.name) if branches and row.corrected_error is not None else None
        stored, weight = written.weight(row.name).to(self.device), self.source.weight(row.name).to(self.device)
        found = pipeline.layer_errors(stored, branch.to(self.device) if branch else None, weight)
        for error, expected in zip(found, (row.error, row.corrected_error), strict=False):
            if not abs(error - expected) <= VERIFY_TOLERANCE * max(expected, 1e-3):
                raise RuntimeError(
                    f"{self.target.name}: {row.name}: reads back with weight error {error:.6f}, written with "
                    f"{expected:.6f}; the disk or another program changed it, nothing was saved"
                )

    def _kept(self) -> list[str]:
        """Keys copied as they are."""
        changed = {f"{self.source.prefix}{name}.weight" for name in self.formats()}
        stale = {f"{self.source.prefix}{name}.{suffix}" for name in self.formats() for suffix in QUANT_SUFFIXES}
        return [key for key in self.source.tensors if key not in changed | stale and not key.endswith("scaled_fp8")]

    def _specs(self) -> dict[str, TensorSpec]:
        shapes, specs = self.source.shapes(), {key: self.source.tensors[key] for key in self._kept()}
        for name, format in self.formats().items():
            shape = shapes[f"{name}.weight"]
            storage = format.storage(*shape)
            if not isinstance(format, Plain):
                text = marker(record(format, shape))
                storage["comfy_quant"] = TensorSpec(text.dtype, tuple(text.shape))
            specs |= {f"{self.source.prefix}{name}.{suffix}": spec for suffix, spec in storage.items()}
        return specs

    def _lora_specs(self) -> dict[str, TensorSpec]:
        shapes, specs = self.source.shapes(), {}
        for name, format in self.formats().items():
            if isinstance(format, Plain):
                continue
            rows, columns = shapes[f"{name}.weight"]
            rank = min(self.rank, rows, columns)
            specs[f"{LORA_PREFIX}{name}.lora_up.weight"] = TensorSpec(torch.float16, (rows, rank))
            specs[f"{LORA_PREFIX}{name}.lora_down.weight"] = TensorSpec(torch.float16, (rank, columns))
        return specs

    def _reserve(self) -> int:
        kept = len(json.dumps(dict(self.source.metadata)))  # as JSON: other scripts take 6 bytes a letter
        return METADATA_SPARE + kept + sum(METADATA_PER_LAYER + 2 * len(name) for name in self.formats())

    def _metadata(self, report: Report, provenance: dict) -> dict[str, str]:
        formats = {n: f for n, f in self.formats().items() if not isinstance(f, Plain)}
        shapes = self.source.shapes()
        records = self._kept_records()
        records |= {f"{self.source.prefix}{n}": record(f, shapes[f"{n}.weight"]) for n, f in formats.items()}
        errors = {r.name: [round(e, 6) for e in (r.error, r.corrected_error) if e is not None] for r in report.layers}
        return dict(self.source.metadata) | {
            QUANTIZATION_METADATA: json.dumps({"format_version": "1.0", "layers": records}),
            PROVENANCE: json.dumps(provenance),
            LAYER_ERRORS: json.dumps(errors, separators=(",", ":")),
        }

    def _kept_records(self) -> dict[str, dict]:
        """Records of quantized layers that stay as they are."""
        changed = {f"{self.source.prefix}{name}" for name in self.formats()}
        return {key: record for key, record in self.source.records().items() if key not in changed}

    def _provenance(self, sha256: str | None) -> dict:
        recipe = {"name": self.recipe.name, "sha256": self.recipe.digest}
        source = {"name": self.source.name, "sha256": sha256}
        return {"version": VERSION, "recipe": recipe, "source": source, "seed": self.seed, "rank": self.rank,
                "scales": "sweep" if self.sweep else "amax", "lora": self.lora.name if self.lora else None}  # fmt: skip

    def _report(self) -> Report:
        return Report(
            model=self.target.name, lora=self.lora.name if self.lora else None, source=self.source.name,
            recipe=self.recipe.name, rank=self.rank, seed=self.seed, source_bytes=self.source.nbytes,
            warnings=self.warnings,
        )  # fmt: skip

    def _refuse_same_file(self) -> None:
        mine = [p.resolve() for p in (self.target, self.lora, self.source.path) if p is not None]
        if len(set(mine)) != len(mine):
            raise ValueError(f"{self.target}: source, target and LoRA must be different files; choose another name")

    def _refuse_kept_legacy(self) -> None:
        legacy = [key.removesuffix(".scale_weight") for key in self._kept() if key.endswith(".scale_weight")]
        if legacy:
            raise ValueError(f"{self.source.name}: {legacy[0]}: is in the legacy scaled_fp8 layout, which no output "
                             "keeps; give it a format in your recipe, bf16 for instance")  # fmt: skip

    def _warn_of_layers_hosts_cannot_take(self) -> None:
        for name, format in self.formats().items():
            packed = format.codes_per_byte > 1 and DETECTION.search(name)
            blocked = format.name in ("nvfp4", "mxfp8") and EMBEDDINGS.search(name)
            if packed or blocked:
                why = "ComfyUI knows models by this shape" if packed else "ComfyUI looks embeddings up by row"
                self.warnings.append(f"{name}: {format.label}, but {why}: Tessera's loader decodes it, the stock "
                                     "loader may fail on the file; keep this layer")  # fmt: skip

    def _refuse_device(self) -> None:
        try:
            torch.zeros(1, device=self.device).item()
        except (RuntimeError, AssertionError) as problem:  # torch asserts that it was built for CUDA
            first = str(problem).partition("\n")[0]
            raise ValueError(f"device {self.device!r}: {first}; use cpu, or a device that torch has") from None


QUANT_SUFFIXES = ("comfy_quant", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale",
                  "scale_weight", "scale_input")  # fmt: skip


def record(format: Format, shape: tuple[int, int]) -> dict:
    """The layer's `comfy_quant` record; `orig_shape` where the storage is padded and cannot tell."""
    stored = format.storage(*shape)["weight"].numel * format.codes_per_byte
    return format.record() | ({"orig_shape": list(shape)} if stored != shape[0] * shape[1] else {})


def read_branch(file: Checkpoint, name: str) -> LowRank:
    """The correction of one layer in a LoRA file of ours."""
    up, down = (file.read(f"{LORA_PREFIX}{name}.lora_{part}.weight") for part in ("up", "down"))
    return LowRank(up, down)


def lora_path(target: Path) -> Path:
    """Where a model's correction LoRA belongs unless said otherwise: `<model>_lora.safetensors` beside it."""
    return target.with_name(f"{target.stem}_lora.safetensors")


def is_text_encoder(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the keys are those of a language model, not of a diffusion model."""
    return "model.embed_tokens.weight" in shapes or "shared.weight" in shapes


def natural(name: str) -> list:
    """Sort key that puts layers.2 before layers.10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
