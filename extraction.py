"""Extraction: the difference of two checkpoints as a LoRA, layer by layer, whatever formats they are in."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import checks
from .checkpoint import LAYER_ERRORS, PROVENANCE, Checkpoint
from .comparison import TEXT_ENCODERS, Comparison, Side, module
from .contents import METADATA_SPARE
from .extraction_report import ExtractedLayer, ExtractionReport
from .formats import TensorSpec
from .journal import Journal
from .progress import Step
from .quantization import calibration as calibrations
from .quantization import difference, pipeline
from .quantization.calibration import Calibration, full_precision
from .quantization.difference import Difference, Wish
from .quantization.moment import Moment
from .shortage import Told
from .source import Digest
from .version import VERSION
from .words import first_of
from .writer import Writer, check_target

METADATA_PER_LAYER = 96
REMEDY = "close other programs, or leave this layer out with --layers"


@dataclass
class Extraction:
    """tuned - base as a LoRA file: each layer's best pair for its wish, weighted by its inputs where they are known.

    Raises ValueError, before anything is written, for what it can know up front.
    """

    base: Path
    tuned: Path
    target: Path
    wish: Wish = Wish()  # noqa: RUF009 frozen
    calibration: Calibration | None = None  # of either model; None: all inputs count alike
    layers: str = ""  # patterns as recipes have them, spaces between; empty: all
    device: str = "cpu"
    overwrite: bool = False
    seed: int = 0
    comparison: Comparison = field(init=False)
    warnings: list[str] = field(init=False, default_factory=list)

    def __post_init__(self):
        self.base, self.tuned, self.target = Path(self.base), Path(self.tuned), Path(self.target)
        checks.refuse_names(self.target, None, pipeline.CORRECTION)
        if self.base.resolve() == self.tuned.resolve():
            raise ValueError(f"{self.base}: is base and tuned in one, nothing differs; choose two files")
        if self.target.resolve() in (self.base.resolve(), self.tuned.resolve()):
            raise ValueError(f"{self.target}: is one of the two checkpoints; choose another name for the LoRA")
        check_target(self.target, self.overwrite)
        checks.refuse_devices([self.device])
        self.comparison = Comparison(Side(self.base), Side(self.tuned), self.layers)
        self._refuse_foreign()
        self._warn()

    def working_bytes(self) -> int:
        """What the arithmetic needs at once on `device`, at most: some four fp32 copies of the largest layer."""
        return max(map(_working_bytes, self.comparison.linears.values()), default=0)

    def run(self, progress: Callable[[Step], None] = lambda step: None) -> ExtractionReport:
        """Writes the LoRA, reads it back, then gives it its name; an exception, from `progress` too, leaves nothing.

        Same files and settings on one machine: same bytes. Raises ValueError if nothing differs.
        """
        started, compared = time.monotonic(), self.comparison
        report = ExtractionReport(
            self.target.name, self.base.name, self.tuned.name, compared.correction, self.wish.tolerance,
            left_out=dict(compared.left_out), warnings=list(self.warnings))  # fmt: skip
        with Told(self.tuned.name, self.working_bytes(), REMEDY), ExitStack() as stack, full_precision():
            digests = [stack.enter_context(Digest(path)) for path in (self.base, self.tuned)]
            journal = stack.enter_context(Journal([self.target], self._settings()))
            part = journal.part(self.target)
            writer = stack.enter_context(Writer(self.target, {}, self._reserve(), self.overwrite, self._specs(), part))
            _Run(self, writer, report).all(progress)
            if not (report.layers or report.vectors):
                raise ValueError(f"{compared.base.name} and {compared.tuned.name}: nothing that a LoRA can hold "
                                 f"differs, {report.equal} tensors are equal; no file was written")  # fmt: skip
            count = len(compared.linears)
            progress(Step(count, max(count, 1), "verifying", None, True, share=1.0))
            written = writer.finish(self._metadata(report, *(digest.hexdigest() for digest in digests)))
            writer.reread(Checkpoint(written))
            report.warnings += self._unreached(report.vectors)
            report.nbytes, report.seconds = writer.nbytes, time.monotonic() - started
            report.remark()
            for digest in digests:
                digest.check()
            writer.publish()
        return report

    def key(self, name: str) -> str | None:
        """The LoRA key of a plain difference: `diff_b` of a bias, else `diff`; None where the host reads none."""
        compared, owner = self.comparison, module(name)
        if name.endswith(".bias") and f"{owner}.weight" in compared.base.shapes:
            return f"{compared.lora_base(owner)}.diff_b"
        if name.endswith(".weight"):
            return f"{compared.lora_base(owner)}.diff"
        text = compared.base.text_encoder or name.startswith(TEXT_ENCODERS)
        return None if text else f"{compared.lora_base(name)}.diff"

    def _unreached(self, names: list[str]) -> list[str]:
        """What to tell of bare parameters. The host (0.30 to 0.33) patches modules without submodules only."""
        owners = {name: name.rpartition(".")[0] for name in names if module(name) == name}
        found = [name for name, owner in owners.items() if self.comparison.base.has_submodules(owner)]
        said = "written, but ComfyUI applies no LoRA to parameters beside submodules"
        return [f"{first_of(found)}: {said}"] if found else []

    def _specs(self) -> dict[str, TensorSpec]:
        """Every tensor that the file may get, as large as it may be."""
        specs = {}
        for name, (rows, columns) in self.comparison.linears.items():
            key, rank = self.comparison.lora_base(name), min(self.wish.most, rows, columns)
            specs[f"{key}.lora_up.weight"] = TensorSpec(torch.float16, (rows, rank))
            specs[f"{key}.lora_down.weight"] = TensorSpec(torch.float16, (rank, columns))
        keys = {self.key(name): shape for name, shape in self.comparison.vectors.items()}
        return specs | {key: TensorSpec(torch.float32, shape) for key, shape in keys.items() if key}

    def _reserve(self) -> int:
        """Bytes for the metadata."""
        return METADATA_SPARE + sum(METADATA_PER_LAYER + 3 * len(name) for name in self.comparison.linears)

    def _settings(self) -> dict:
        wish, fixed = self.wish, self.wish.tolerance is None
        return {"version": VERSION, "rank": wish.rank if fixed else None, "tolerance": wish.tolerance,
                "max_rank": None if fixed else wish.max_rank, "layers": self.layers, "seed": self.seed}  # fmt: skip

    def _metadata(self, report: ExtractionReport, base: str, tuned: str) -> dict[str, str]:
        """Where the file comes from, given the sha256 of both; and each layer's weight error without and with it."""
        said = self._settings() | {"base": {"name": self.base.name, "sha256": base},
                                   "tuned": {"name": self.tuned.name, "sha256": tuned}}  # fmt: skip
        used = any(row.output_error is not None for row in report.layers)
        said |= {"calibration": self.calibration.digest() if used else None, "lora": self.target.name}
        if report.correction:  # as those LoRAs have it that are written with a model
            said["model"] = self.base.name
        rows = {row.name: [round(row.error, 6), round(row.corrected_error, 6)] for row in report.layers}
        return {PROVENANCE: json.dumps(said), LAYER_ERRORS: json.dumps(rows, separators=(",", ":"))}

    def _refuse_foreign(self) -> None:
        """Raises ValueError if the statistics are those of neither model."""
        if self.calibration is None:
            return
        sides = self.comparison.tuned, self.comparison.base
        found = {side.name: calibrations.fingerprint(side.file) for side in sides}
        if self.calibration.model not in found.values():
            here = ", ".join(f"{name} is {digest[:12]}" for name, digest in found.items())
            raise ValueError(f"statistics of another model ({self.calibration.model[:12]}; {here}); record them with "
                             "one of the two, or extract without")  # fmt: skip

    def _warn(self) -> None:
        compared = self.comparison
        for side in (compared.base, compared.tuned):
            absorbed = [name for name in compared.linears if side.absorbs(f"{name}.weight")]
            if absorbed:
                self.warnings.append(f"{side.name} is in absorb mode: the low-rank branch of {len(absorbed)} layers is "
                                     "part of their weight here, as Tessera's loader runs them")  # fmt: skip
            if side.outside:
                self.warnings.append(f"{side.name}: {len(side.outside)} tensors belong to neither diffusion model nor "
                                     f"text encoder and are not compared (first: {min(side.outside)})")  # fmt: skip
        if compared.swapped:
            self.warnings.append(f"{self.tuned.name} is quantized, {self.base.name} is not: this LoRA holds the "
                                 "quantization error too; to correct a quantized file make it the base")  # fmt: skip
        if self.calibration is None:
            return
        silent = [name for name in compared.linears if name not in self.calibration.layers]
        if silent:
            self.warnings.append(f"no statistics for {len(silent)} of {len(compared.linears)} layers (first: "
                                 f"{silent[0]}): all their inputs count alike")  # fmt: skip


def _working_bytes(shape: tuple[int, int]) -> int:
    return 4 * 4 * math.prod(shape)


@dataclass
class _Run:
    """One pass over all tensors, into the writer and the report."""

    job: Extraction
    writer: Writer
    report: ExtractionReport

    def all(self, progress: Callable[[Step], None]) -> None:
        """Linear layers with their biases in the model's order, then the rest."""
        compared, report = self.job.comparison, self.report
        vectors, linears = dict(compared.vectors), compared.linears
        total, done, started = sum(map(math.prod, linears.values())), 0, time.monotonic()
        for index, (name, shape) in enumerate(linears.items()):
            left = (time.monotonic() - started) * (total - done) / done if done else None
            label, last = compared.base.label(f"{name}.weight"), report.layers[-1] if report.layers else None
            progress(Step(index, len(linears), name, left, False, label, done / total, last))
            with Told(f"{self.job.tuned.name}: {name}", _working_bytes(shape), REMEDY):
                self.linear(name, shape, vectors.pop(f"{name}.bias", None))
            done += math.prod(shape)
        for name, shape in vectors.items():
            if (plain := self.plain(name, shape)) is not None:
                self.add_plain(name, plain)
        for name, shape in compared.others.items():
            if self.plain(name, shape) is not None:
                report.left_out[name] = f"differs, but {list(shape)} is neither a linear layer nor a vector"

    def linear(self, name: str, shape: tuple[int, int], bias: tuple[int, ...] | None) -> None:
        """One layer's pair and its bias difference."""
        started, notes, key = time.monotonic(), [], f"{name}.weight"
        shift = None if bias is None else self.plain(f"{name}.bias", bias)
        base, truth = self.read(key, shape)
        if truth is None:
            if shift is not None:
                self.add_plain(f"{name}.bias", shift)
            return
        moment, mean = self.metric(name, shape, bias is not None, notes)
        seed = pipeline.layer_seed(self.job.seed, name)
        try:
            found = difference.fit(truth, base, self.job.wish, seed, moment)
        except ValueError as problem:
            raise ValueError(f"{self.job.tuned.name}: {name}: {problem}") from None
        shift = self.shift(name, shift, found, mean)
        lora = self.job.comparison.lora_base(name)
        self.writer.write(f"{lora}.lora_up.weight", found.branch.up)
        self.writer.write(f"{lora}.lora_down.weight", found.branch.down)
        if shift is not None and shift.any():
            self.writer.write(f"{lora}.diff_b", shift)
        self.report.layers.append(ExtractedLayer(
            name, self.job.comparison.base.label(key), shape, found.branch.rank, found.loss, *found.weight,
            *(found.output or ()), seconds=time.monotonic() - started, notes=tuple(notes)))  # fmt: skip

    def shift(self, name: str, shift: Tensor | None, found: Difference, mean: Tensor | None) -> Tensor | None:
        """A layer's bias difference [out], given that of the two files.

        Where the mean input is known it makes up for what the pair leaves of it. Else a quantizer may have had the
        bias make up for E x of some mean input x: then the pair gives back its part of that, and no more.
        """
        if mean is not None:
            return (0 if shift is None else shift) + found.left @ mean
        base, tuned = self.job.comparison.base, self.job.comparison.tuned
        quantized = base.quantized(f"{name}.weight") and not tuned.quantized(f"{name}.weight")
        if shift is None or not quantized or base.quantized(f"{name}.bias"):
            return shift
        return found.directions @ (found.directions.T @ shift)

    def metric(self, name: str, shape, biased: bool, notes: list[str]) -> tuple[Moment | None, Tensor | None]:
        """The moment of a layer's inputs, and their mean where a bias can make up for it, as quantizing takes them."""
        statistics = self.job.calibration.of(name) if self.job.calibration is not None else None
        if statistics is None:
            return None, None
        if statistics.in_features != shape[1]:
            raise ValueError(f"{self.job.tuned.name}: {name}: in_features {shape[1]}, its statistics have "
                             f"{statistics.in_features}; they belong to another model")  # fmt: skip
        statistics = statistics.to(self.job.device)
        moment = pipeline.moment_of(statistics, biased, notes)
        return moment, statistics.mean if biased and moment is not None else None

    def plain(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """tuned - base in fp32; None if they are the same."""
        base, tuned = self.read(name, shape)
        return None if tuned is None else tuned - base

    def add_plain(self, name: str, found: Tensor) -> None:
        key = self.job.key(name)
        if key is None:
            self.report.left_out[name] = "differs, but no LoRA key reaches a text encoder's bare parameter"
        else:
            self.writer.write(key, found)
            self.report.vectors.append(name)

    def read(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """A tensor of base and tuned in fp32 on the device; counted and nothing if they are the same."""
        compared = self.job.comparison
        base, tuned = compared.base.read(name, shape), compared.tuned.read(name, shape)
        if compared.same(name, base, tuned):
            self.report.equal += 1
            return None, None
        return base.to(self.job.device), tuned.to(self.job.device)
