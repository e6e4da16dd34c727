"""Quantizations as a browser sees them: those that run, and the last few that have ended."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

import folder_paths
from comfy.model_management import InterruptProcessingException
from comfy_execution.utils import get_executing_context

from .. import mosaic
from ..header import escaped, shown
from ..job import Job, Step
from ..publication import write_text
from ..quantization.report import LayerReport, Report
from . import ui

EVENT = "tessera.job"
RUNNING, DONE, FAILED, CANCELLED = "running", "done", "failed", "cancelled"
ENDED = 8  # of them are kept
LARGEST = 20_000  # layers of a job that is shown layer by layer
ANSWER = 8 << 20  # bytes of all jobs together
MESSAGE = 2000  # characters
FOLDER = "tessera"  # of reports, below the host's output folder

_jobs: dict[str, Live] = {}  # in the order they began
_lock = threading.Lock()


class Live:
    """One run of a node that quantizes, from `with` to its end: every page that is open is told of every layer, and a
    page that comes later finds the whole of it in `answer`."""

    def __init__(self, hidden):
        context = get_executing_context()
        self._bar = ui.Progress(hidden.unique_id, text=False)  # the node shows more than that
        self._job: Job | None = None
        self._rows: Sequence[LayerReport] = ()
        self.map: dict | None = None  # once it has ended; while it runs it is made when asked for
        self.state = {
            "job": uuid.uuid4().hex, "count": 0, "node": hidden.unique_id,
            "prompt": context.prompt_id if context else None, "workflow": _workflow(hidden.extra_pnginfo),
            "state": RUNNING, "title": "", "index": 0, "total": 0, "verifying": False, "seconds_left": None,
            "share": 0.0, "nbytes": 0, "target_bytes": 0, "source_bytes": 0,
            "source": "", "measure": mosaic.WEIGHT, "error": None, "corrected": None, "layer": "", "format": "",
            "last": None, "message": "", "report": None, "file": None,
        }  # fmt: skip

    def __enter__(self) -> Live:
        with _lock:
            _jobs[self.state["job"]] = self
        self._tell()
        return self

    def __exit__(self, kind, problem, trace) -> None:
        if problem is not None:
            cancelled = isinstance(problem, InterruptProcessingException)
            self._end(CANCELLED if cancelled else FAILED, "" if cancelled else _message(problem))
        elif self.state["state"] == RUNNING:
            self._end(DONE)
        with _lock:
            for old in [job for job, live in _jobs.items() if live.state["state"] != RUNNING][:-ENDED]:
                del _jobs[old]

    def run(self, job: Job) -> Report:
        """Runs the job, and saves its report in the host's output folder."""
        self._job = job
        specs = job.contents.specs().values()
        self._tell(True, title=shown(job.target.name), source=shown(job.source.name), total=len(job.contents.formats),
                   source_bytes=job.source.nbytes, target_bytes=sum(spec.nbytes for spec in specs))  # fmt: skip
        report = job.run(self._step)
        self._rows = report.layers
        file = _saved(report)
        columns, rows = report.table() if len(report.layers) <= LARGEST else ([], [])
        said = {"lines": [escaped(line) for line in report.lines()], "columns": columns,
                "rows": [[shown(cell) for cell in row] for row in rows]}  # fmt: skip
        self._end(DONE, report=said, file=file, index=len(report.layers), total=len(report.layers), share=1.0,
                  nbytes=report.model_bytes, target_bytes=report.model_bytes, **_means(report.layers))  # fmt: skip
        return report

    def whole(self) -> dict:
        """The state with all layers, those that are finished filled."""
        job = self._job  # another thread may end it meanwhile
        return self.state | {"map": self.map if job is None else _map(job, self._rows)}

    def _step(self, step: Step) -> None:
        self._bar(step)
        known, self._rows = len(self._rows), list(step.done)
        means = _means(self._rows)
        whole = means["measure"] != self.state["measure"] or len(self._rows) > known + 1  # resumed
        self._tell(
            whole, **means, index=step.index, total=step.total, verifying=step.verifying,
            seconds_left=step.seconds_left, share=max(self.state["share"], step.share), last=_last(step.last, **means),
            nbytes=sum(row.nbytes for row in self._rows), format=step.format,
            layer=shown(step.layer.removeprefix("verifying").strip()))  # fmt: skip

    def _end(self, state: str, message: str = "", **said) -> None:
        self.map = None if self._job is None else _map(self._job, self._rows)
        self._job, self._rows = None, ()  # a source may be a whole model in memory
        self._tell(True, state=state, message=message, verifying=False, seconds_left=None, layer="", format="",
                   last=None, **said)  # fmt: skip

    def _tell(self, whole: bool = False, **said) -> None:
        """Tells every open page; with the map where the tiles so far do not tell it."""
        count = self.state["count"] + 1  # what a page hears late is not newer than what it shows
        self.state = self.state | said | {"count": count}  # a new one, as another thread may be reading it
        ui.send(self.state["node"], EVENT, self.whole() if whole else self.state)


def answer() -> str:
    """All jobs as JSON, the newest first; layers and reports of old ones are left out where it grows too long."""
    with _lock:
        lives = list(_jobs.values())
    texts, length = [], 0
    for live in reversed(lives):
        text = json.dumps(live.whole())
        if length + len(text) > ANSWER:
            text = json.dumps(live.state | {"map": None, "report": None})
        texts.append(text)
        length += len(text)
    return f'{{"jobs": [{", ".join(texts)}]}}'


def _workflow(saved: object) -> str:
    """The id of the workflow that was queued, by which a page knows whether it shows that one; empty without."""
    graph = saved.get("workflow") if isinstance(saved, dict) else None
    return shown(str(graph.get("id") or "")) if isinstance(graph, dict) else ""


def _map(job: Job, rows: Sequence[LayerReport]) -> dict | None:
    if len(job.layer_map) > LARGEST:
        return None
    return mosaic.of_job(job, rows).payload() | {"facts": []}  # the node says more, and says it of this moment


def _means(rows: Sequence[LayerReport]) -> dict:
    """The mean error of the layers so far, without and with their branches: of outputs where all have one."""
    outputs = bool(rows) and all(row.output_error is not None for row in rows)
    pairs = [(row.output_error, row.corrected_output_error) if outputs else (row.error, row.corrected_error)
             for row in rows]  # fmt: skip
    best = [own if better is None else better for own, better in pairs]
    corrected = _mean(best) if any(better is not None for _, better in pairs) else None
    measure = mosaic.OUTPUT if outputs else mosaic.WEIGHT
    return {"measure": measure, "error": _mean([own for own, _ in pairs]), "corrected": corrected}


def _mean(values: list[float]) -> float | None:
    mean = sum(values) / len(values) if values else math.nan
    return mean if math.isfinite(mean) else None  # JSON has no word for others


def _last(row: LayerReport | None, measure: str, **_) -> dict | None:
    """A finished layer as its tile shows it."""
    if row is None:
        return None
    outputs = measure == mosaic.OUTPUT
    return {
        "name": shown(row.name), "format": row.format, "shape": list(row.shape), "nbytes": row.nbytes,
        "rank": row.rank, "error": _mean([row.output_error if outputs else row.error]),
        "corrected": _mean([v for v in [row.corrected_output_error if outputs else row.corrected_error]
                            if v is not None]),
        "seconds": round(row.seconds, 1),
    }  # fmt: skip


def _message(problem: BaseException) -> str:
    text = str(problem).strip() or type(problem).__name__
    kind = "" if isinstance(problem, ValueError | RuntimeError) else f"{type(problem).__name__}: "
    text = kind + "\n".join(map(escaped, text.splitlines()))
    return text if len(text) <= MESSAGE else f"{text[:MESSAGE]}... (all of it is in ComfyUI's log)"


def _saved(report: Report) -> dict | None:
    """Writes the report as a numbered JSON file that was not there; where the browser finds it.

    The model is saved by now: a report that cannot be is a remark, no failure.
    """
    folder, stem = Path(folder_paths.get_output_directory()) / FOLDER, Path(report.model).stem
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(_last_number(folder, stem) + 1):
            path = folder / f"{stem}_report_{number:05}.json"
            report.file = f"output/{FOLDER}/{path.name}"
            try:
                write_text(path, json.dumps(report.as_dict(), indent=1) + "\n")
            except ValueError:
                if not os.path.lexists(path):
                    raise
            else:
                return {"filename": path.name, "subfolder": FOLDER, "type": "output"}
    except (OSError, ValueError, RuntimeError) as problem:
        report.file = None
        report.warnings.append(f"the report could not be saved as JSON: {problem}")
        return None


def _last_number(folder: Path, stem: str) -> int:
    numbered = re.compile(re.escape(stem) + r"_report_(\d{1,9})\.json", re.IGNORECASE)
    found = [match for match in map(numbered.fullmatch, os.listdir(folder)) if match]
    return max((int(match[1]) for match in found), default=0)
