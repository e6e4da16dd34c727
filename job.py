"""Quantize and save: a checkpoint, layer by layer, through a recipe into a new file and its correction LoRA."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import InitVar, asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from . import checks, workers
from .checkpoint import PROVENANCE, Checkpoint
from .contents import LORA_PREFIX, METADATA_PER_LAYER, METADATA_SPARE, Contents
from .formats import Format, Plain
from .journal import Journal, settle
from .output import Output
from .progress import Estimate, Step
from .quantization import calibration as calibrations
from .quantization import pipeline
from .quantization.calibration import Calibration
from .quantization.patterns import natural
from .quantization.pipeline import Settings
from .quantization.recipe import LayerMap, Recipe
from .quantization.report import LayerReport, Report
from .shortage import Told
from .source import Baked, Digest, Source
from .version import VERSION
from .workers import Here, Result, Task
from .writer import check_target

__all__ = ["LORA_PREFIX", "METADATA_PER_LAYER", "METADATA_SPARE", "Job", "Step", "is_text_encoder", "lora_path",
           "natural"]  # fmt: skip

NAMES_LEFT = "an interrupted run of this job was complete but for the files' names"


@dataclass
class Job:
    """One quantization. Raises ValueError, before anything is written, for whatever it can know up front."""

    source: Source
    target: Path
    recipe: Recipe
    lora: Path | None = None  # None: <target stem>_lora.safetensors beside the target; ignored if none is made
    rank: InitVar[int | None] = None  # short for settings of that rank
    seed: int = 0
    settings: Settings = Settings()  # noqa: RUF009 frozen
    calibration: Calibration | None = None  # None: data-free
    device: str = "cpu"  # several, comma-separated: a process for each
    overwrite: bool = False
    resume: bool = False  # go on where a killed run of this very job stopped
    workers: int = 1  # processes
    ray: str | None = None  # address of a Ray cluster that does the work
    baked: Baked | None = None  # what the source's weights are besides its file
    layer_map: LayerMap = field(init=False)
    warnings: list[str] = field(init=False, default_factory=list)

    def __post_init__(self, rank):
        self.target, self.lora = Path(self.target), self.lora and Path(self.lora)
        if rank is not None:
            self.settings = replace(self.settings, rank=rank)
        checks.refuse_names(self.target, self.lora, self.settings.mode)
        self._crew = workers.choose(self.device, self.workers, self.ray)
        checks.refuse_devices([] if self.ray is not None else self._crew.devices)
        self.layer_map = self.recipe.resolve(self.source.shapes())
        checks.refuse_problems(self.source, self.layer_map.problems)
        if not self.formats():
            raise ValueError(f"{self.source.name}: recipe {self.recipe.name} quantizes none of its layers; "
                             "choose a recipe for this model")  # fmt: skip
        self.warnings += self.layer_map.warnings
        self._settle_lora()
        checks.refuse_same_file(self.target, self.lora, self.source.path)
        checks.refuse_kept_legacy(self.source, self.contents.kept())
        self.warnings += checks.of_layers(self.source, self.formats())
        if self.baked is None:  # else whoever put something into the weights says what they were
            self.warnings += checks.of_source(self.source, self.formats())
        if self.calibration is not None:
            if self.baked is None:
                checks.refuse_foreign(self.source, self._fingerprint, self.calibration)
            self.warnings += checks.of_statistics(self.formats(), self.calibration)

    def working_bytes(self) -> int:
        """What the arithmetic needs at once on `device`, at most: some six fp32 copies of the largest layer."""
        return max(workers.working_bytes(*self.contents.shape(name)) for name in self.formats())

    def formats(self) -> dict[str, Format]:
        """The format of each layer that changes, by module path, in the model's own order."""
        names = sorted((n for n, choice in self.layer_map.items() if choice.format is not None), key=natural)
        return {name: self.layer_map[name].format for name in names}

    @cached_property
    def contents(self) -> Contents:
        """What will be written."""
        reasons = {name: choice.reason for name, choice in self.layer_map.items()}
        return Contents(self.source, self.target, self.lora, self.formats(), self._ranks(), reasons, self.settings.mode,
                    frozenset(self._calibrated()), self._carried)  # fmt: skip

    def run(self, progress: Callable[[Step], None] = lambda step: None) -> Report:
        """Writes and verifies model and LoRA, then gives both their names; an exception, from `progress` too, leaves
        nothing behind. Same source, recipe, statistics, settings and seed on one machine: same bytes, whoever did the
        work and however often it was interrupted; where the same job's files are there already, they are the result
        and nothing is written. After a kill the same job with `resume` goes on with the layers that are done."""
        with Told(self.source.name, self.working_bytes(), workers.REMEDY):
            return self._run(progress)

    def _run(self, progress: Callable[[Step], None]) -> Report:
        started, journal = time.monotonic(), Journal(self._files(), self._identity(), self.resume)
        finished = journal.token in settle(self.target) and self.resume
        done = self._found(NAMES_LEFT) if finished else None if self.overwrite else self.done()
        if done is not None:
            return done
        check_target(self.target, self.overwrite)
        with Digest(self.source.path) as digest, journal:
            if journal.ready():
                journal.publish(self.overwrite)
                return self._found(NAMES_LEFT)
            with Output(self.contents, journal, self.overwrite, self.resume, self._crew.verifying) as output:
                report = self._make(output, digest, progress)
                report.seconds = time.monotonic() - started
                digest.check()
                output.publish()
        return report

    def _make(self, output: Output, digest: Digest, progress: Callable[[Step], None]) -> Report:
        """Everything but the files' names."""
        report = self._report()
        report.layers = output.adopt()
        self._say_resumed(report)
        estimate = Estimate.of(self.contents, report.layers)
        with closing(self._results(report.layers, estimate, progress)) as results:
            for name, result in results:
                report.layers.append(output.write(name, result))
                estimate.done(name, result.seconds)
        report.kept = output.copy_rest()
        count, last = len(report.layers), report.layers[-1]
        progress(Step(0, count, "verifying", estimate.seconds_left(), True, "", estimate.share(), last,
                      report.layers))  # fmt: skip
        output.finish(report.layers, self._provenance(digest.hexdigest()))
        for index, row in enumerate(report.layers):
            name = f"verifying {row.name}"
            progress(Step(index, count, name, estimate.seconds_left(), True, "", estimate.share(), done=report.layers))
            estimate.done(name, output.verify(row))
        output.reread()
        report.model_bytes, report.lora_bytes = output.model.nbytes, output.lora.nbytes if output.lora else 0
        report.warnings += output.remarks() + report.remarks()
        return report

    def done(self) -> Report | None:
        """The report of this very job if its files are there: same source bytes, recipe, settings, statistics, seed
        and version."""
        if self.source.path is None or not all(path.is_file() for path in self._files()):
            return None
        try:
            written = [Checkpoint(path) for path in self._files()]
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
        return self._found("the same job's files were there already, nothing was written")

    def _results(
        self, done: list[LayerReport], estimate: Estimate, progress: Callable[[Step], None]
    ) -> Iterator[tuple[str, Result]]:
        """Every layer that is not done, quantized, in the model's order."""
        names = list(self.contents.formats)
        with self._crew as crew:
            estimate.width = crew.width
            results = crew.map(self._task(name) for name in names[len(done) :])
            for index, name in enumerate(names[len(done) :], len(done)):
                label = self.contents.formats[name].label
                progress(Step(index, len(names), name, estimate.seconds_left(), False, label, estimate.share(),
                              done[-1] if done else None, done))  # fmt: skip
                yield name, next(results)

    def _task(self, name: str) -> Task:
        rank, bias, path = self.contents.rank(name), self.contents.bias(name), self._readable
        settings = replace(self.settings, rank=rank, mode=self.settings.mode if rank else pipeline.CORRECTION)
        return Task(
            name, self.source.name, self.contents.formats[name], settings, pipeline.layer_seed(self.seed, name),
            self.device, path if path is not None and self._crew.reads else self._weight(name),
            self.calibration.of(name) if name in self.contents.calibrated else None,
            None if bias is None else self.source.read(bias), torch.get_num_threads())  # fmt: skip

    def _weight(self, name: str) -> torch.Tensor:
        """A layer's weight; on its way elsewhere, in the source file's own precision."""
        needs = workers.working_bytes(*self.contents.shape(name))
        try:
            with Told(f"{self.source.name}: {name}", needs, workers.REMEDY):
                weight = self.source.weight(name)
        except ValueError as problem:
            raise ValueError(f"{self.source.name}: {name}: {problem}") from None
        dtype = self.source.tensors[self.contents.key(name, "weight")].dtype
        stays = isinstance(self._crew, Here) or self._readable is None or self.source.quantized(name)
        return weight if stays or dtype not in (torch.bfloat16, torch.float16) else weight.to(dtype)

    @property
    def _readable(self) -> Path | None:
        """The file that has the source's weights, for other processes to read."""
        return None if self.baked else self.source.path

    @property
    def _carried(self) -> Mapping[str, torch.Tensor]:
        return self.baked.carried if self.baked else {}

    def _ranks(self) -> dict[str, int]:
        """Of each layer's branch: its rule's, else the job's."""
        found = {name: self.layer_map[name].rank for name in self.formats()}
        correction = self.settings.mode == pipeline.CORRECTION
        if correction and is_text_encoder(self.source.shapes()):
            return dict.fromkeys(found, 0)
        return {name: self.settings.rank if rank is None else rank for name, rank in found.items()}

    def _calibrated(self) -> list[str]:
        """Layers whose statistics are used; a layer that stays exact needs none."""
        if self.calibration is None or self.settings.rounding != pipeline.BEST:
            return []
        return [n for n, f in self.formats().items() if n in self.calibration.layers and not isinstance(f, Plain)]

    def _found(self, why: str) -> Report:
        """The report of files that are there, finished."""
        report, written = self._report(), [Checkpoint(path) for path in self._files()]
        report.warnings.append(why)
        report.layers = self.contents.rows(written[0])
        report.kept, report.model_bytes = len(self.contents.kept()), written[0].nbytes
        report.lora_bytes = written[1].nbytes if self.lora else 0
        return report

    def _say_resumed(self, report: Report) -> None:
        if report.layers:
            report.warnings.append(f"resumed: {len(report.layers)} of {len(self.contents.formats)} layers were done by "
                                   "a run of this job that was interrupted")  # fmt: skip

    def _provenance(self, sha256: str | None) -> dict:
        recipe = {"name": self.recipe.name, "sha256": self.recipe.digest}
        source = {"name": self.source.name, "sha256": sha256}
        return {"version": VERSION, "recipe": recipe, "source": source, "seed": self.seed, **asdict(self.settings),
                "rank": self._rank(), "calibration": self._calibration_digest,
                "lora": self.lora.name if self.lora else None,
                **({"baked": dict(self.baked.said)} if self.baked else {})}  # fmt: skip

    def _rank(self) -> int:
        """The job's; 0 if no layer gets a branch."""
        return self.settings.rank if any(map(self.contents.rank, self.contents.formats)) else 0

    def _identity(self) -> dict:
        """What must be the same for a run to go on where another stopped. A model in memory may have changed since:
        its job always starts anew."""
        path = self.source.path
        if path is None:
            bound = {"token": secrets.token_hex(8)}
        else:
            facts = path.stat()
            bound = {"bytes": facts.st_size, "modified": facts.st_mtime_ns, "fingerprint": self._fingerprint}
        kind = torch.device(self._crew.devices[0]).type
        return self._provenance(None) | {"bound": bound, "device": kind, "threads": torch.get_num_threads(),
                                         "torch": torch.__version__}  # fmt: skip

    @cached_property
    def _fingerprint(self) -> str:
        return calibrations.fingerprint(self.source)

    @cached_property
    def _calibration_digest(self) -> str | None:
        return self.calibration.digest() if self.contents.calibrated else None

    def _report(self) -> Report:
        calibrated = len(self.contents.calibrated)
        return Report(
            model=self.target.name, lora=self.lora.name if self.lora else None, source=self.source.name,
            recipe=self.recipe.name, rank=self._rank(), seed=self.seed, source_bytes=self.source.nbytes,
            warnings=list(self.warnings), mode=self.settings.mode, calibrated=calibrated,
            basis=checks.in_words(self.contents.formats, calibrated, self.calibration, self.settings.rounding),
        )  # fmt: skip

    def _files(self) -> list[Path]:
        return [path for path in (self.target, self.lora) if path is not None]

    def _settle_lora(self) -> None:
        """Whether there is a correction LoRA, and where."""
        if is_text_encoder(self.source.shapes()) and self.settings.mode == pipeline.CORRECTION and self.settings.rank:
            self.warnings.append("text encoder: no correction LoRA is written, nothing can attach one to a CLIP yet")
        fitted = self.settings.mode == pipeline.CORRECTION and any(
            rank and not isinstance(self.formats()[name], Plain) for name, rank in self._ranks().items()
        )
        self.lora = Path(self.lora or lora_path(self.target)) if fitted or self._carried else None


def lora_path(target: Path) -> Path:
    """Where a model's correction LoRA belongs unless said otherwise: `<model>_lora.safetensors` beside it."""
    return target.with_name(f"{target.stem}_lora.safetensors")


def is_text_encoder(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the keys are those of a language model, not of a diffusion model."""
    return "model.embed_tokens.weight" in shapes or "shared.weight" in shapes
