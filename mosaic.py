"""Layer maps of plans, jobs, loaded models and files: what `tiles.Mosaic` shows of each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .checkpoint import LAYER_ERRORS, Checkpoint
from .contents import LAYER_OUTPUTS
from .quantization.layer_map import KEEP, label
from .tiles import FILE, INSPECTED, JOB, OUTPUT, PLAN, SHARE, WEIGHT, Mosaic, Tile, gigabytes, percent

if TYPE_CHECKING:
    from .job import Job
    from .planning import Plan
    from .quantization.report import LayerReport, Report

__all__ = ["Errors", "Mosaic", "Tile", "errors_of", "of_file", "of_inspection", "of_job", "of_plan", "of_report"]


def of_plan(plan: Plan) -> Mosaic:
    """What a plan makes of every layer. A tile's error is the layer's share: of all, the squares add up."""
    survey, shapes, tiles = plan.survey, plan.survey.source.shapes(), []
    for name in _in_file_order(survey.source, plan.layers):
        layer, before = plan.layers[name], plan.before.get(name, plan.layers[name])
        scores, word = survey.damages.get(name, {}), label(layer.format)
        shape = shapes[f"{name}.weight"]
        tiles.append(Tile(
            name, word, tuple(shape), layer.nbytes or _stored(survey.source, name), _root(scores.get(word)),
            _root(layer.damage) if layer.rank else None, _root(max(scores.values(), default=None)),
            reason=layer.reason if name in survey.kept else "", rank=layer.rank or 0, edited=name in plan.before,
            planned=label(before.format), planned_rank=before.rank or 0))  # fmt: skip
    facts = [("size", gigabytes(plan.nbytes)), ("bits per weight", _bits(plan.nbytes, shapes.values())),
             ("expected error", percent(plan.error)), ("asked for", plan.wish)]  # fmt: skip
    facts += [("edited", f"{len(plan.before)} layers")] if plan.before else []
    return Mosaic(plan.name, PLAN, facts, tiles, plan.options, plan.nbytes, plan.edits, SHARE)


def of_job(job: Job, done: Iterable[LayerReport] = (), report: Report | None = None) -> Mosaic:
    """A job's layers, those that are done with what they cost; the finished job's report, if there is one."""
    rows = {row.name: row for row in (report.layers if report else done)}
    formats, tiles = job.formats(), []
    measure = _measure(rows.values())
    for name in _in_file_order(job.source, job.layer_map):
        choice = job.layer_map[name]
        if name in rows:
            tiles.append(_of_row(rows[name], measure))
        elif name in formats:
            shape = job.contents.shape(name)
            tiles.append(Tile(name, formats[name].label, shape, formats[name].nbytes(*shape), reason=choice.reason,
                              rank=job.contents.rank(name), done=False))  # fmt: skip
        else:
            shape = tuple(job.source.shapes()[f"{name}.weight"])
            tiles.append(Tile(name, KEEP, shape, _stored(job.source, name), reason=choice.reason))
    if report is not None:
        return Mosaic(report.model, JOB, _report_facts(report, measure), tiles, measure=measure)
    facts = [("layers", f"{len(rows)} of {len(formats)} done"), ("recipe", job.recipe.name),
             *_errors(tiles, measure)]  # fmt: skip
    return Mosaic(job.target.name, JOB, facts, tiles, measure=measure)


def of_report(report: Report) -> Mosaic:
    """A finished job by its report alone, which lists only the layers that were quantized."""
    measure = _measure(report.layers)
    tiles = [_of_row(row, measure) for row in report.layers]
    return Mosaic(report.model, JOB, _report_facts(report, measure), tiles, measure=measure)


def of_inspection(title: str, tiles: Sequence[Tile], facts: Sequence[tuple[str, str]] = (), kind: str = INSPECTED,
                  measure: str = WEIGHT) -> Mosaic:  # fmt: skip
    """A model that is loaded, its tiles made by who knows the host."""
    quantized = [tile for tile in tiles if tile.quantized]
    nbytes = sum(tile.nbytes for tile in tiles)
    sizes = [("layers in memory", gigabytes(nbytes)), ("bits per weight", _bits(nbytes, (t.shape for t in tiles)))]
    found = [*(sizes if tiles else []), *_errors(quantized, measure), *facts]
    return Mosaic(title, kind, found, tiles, measure=measure)


def of_file(file: Checkpoint) -> Mosaic:
    """A file by its header alone; what its layers cost where whoever made it has said so, as Tessera does."""
    known, shapes, tiles = errors_of(file.metadata), file.shapes(), []
    for name in _in_file_order(file, _matrices(shapes)):
        shape, layer = tuple(shapes[f"{name}.weight"]), file.layers.get(name)
        if layer is None:
            tiles.append(Tile(name, _dtype(file, name), shape, _stored(file, name)))
            continue
        nbytes = sum(file.tensors[key].nbytes for key in layer.sources.values())
        rank = file.tensors[layer.sources["absorb_down"]].shape[0] if layer.absorbs else 0
        reason = "; ".join(_remarks(layer))
        tiles.append(Tile(name, layer.format.label, shape, nbytes, *known.of(name), reason=reason, rank=rank))
    facts = [("size", gigabytes(file.nbytes)), ("bits per weight", _bits(file.nbytes, shapes.values())),
             *_errors(tiles, known.measure)]  # fmt: skip
    return Mosaic(file.name, FILE, facts, tiles, measure=known.measure)


@dataclass(frozen=True)
class Errors:
    """What a file's metadata says that its layers cost: layer -> (error, error with its branch)."""

    rows: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    measure: str = WEIGHT

    def of(self, name: str) -> tuple[float | None, float | None]:
        return self.rows.get(name, (None, None))


def errors_of(metadata: Mapping[str, str]) -> Errors:
    """Output errors if every layer has one, else weight errors; what other tools wrote under our keys is nothing."""
    weights, outputs = (_pairs(metadata.get(key, "")) for key in (LAYER_ERRORS, LAYER_OUTPUTS))
    if weights and weights.keys() <= outputs.keys():
        return Errors(outputs, OUTPUT)
    return Errors(weights)


def _pairs(text: str) -> dict[str, tuple[float | None, float | None]]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    rows = said.items() if isinstance(said, dict) else ()
    pairs = {name: tuple(map(_number, [*row, None, None][:2])) for name, row in rows if isinstance(row, list)}
    return {name: pair for name, pair in pairs.items() if pair[0] is not None}


def _number(value: object) -> float | None:
    """A relative error as a file may say it."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e6
    return float(value) if known else None


def _of_row(row: LayerReport, measure: str) -> Tile:
    pair = (row.error, row.corrected_error) if measure == WEIGHT else (row.output_error, row.corrected_output_error)
    return Tile(row.name, row.format, tuple(row.shape), row.nbytes, *pair, reason=row.reason, rank=row.rank)


def _measure(rows: Iterable[LayerReport]) -> str:
    known = [row.output_error is not None for row in rows]
    return OUTPUT if known and all(known) else WEIGHT


def _report_facts(report: Report, measure: str) -> list[tuple[str, str]]:
    facts = [("size", gigabytes(report.model_bytes))]
    if report.source_bytes:
        facts.append(("of the source", f"{report.model_bytes / report.source_bytes:.0%}"))
    facts += _errors([_of_row(row, measure) for row in report.layers], measure)
    return [*facts, ("correction LoRA", gigabytes(report.lora_bytes))] if report.lora else facts


def _errors(tiles: Iterable[Tile], measure: str) -> list[tuple[str, str]]:
    """The mean error, without and with branches."""
    known = [tile for tile in tiles if tile.error is not None]
    if not known:
        return []
    facts = [(measure, percent(sum(tile.error for tile in known) / len(known)))]
    if any(tile.corrected is not None for tile in known):
        best = [tile.error if tile.corrected is None else tile.corrected for tile in known]
        facts.append(("with correction", percent(sum(best) / len(best))))
    return facts


def _matrices(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    return [key.removesuffix(".weight") for key, s in shapes.items() if key.endswith(".weight") and len(s) == 2]


def _in_file_order(source, names: Iterable[str]) -> list[str]:
    places = {key.rpartition(".")[0].removeprefix(source.prefix): i for i, key in enumerate(source.tensors)}
    return sorted(names, key=lambda name: places.get(name, len(places)))


def _stored(source, name: str) -> int:
    """Bytes of a weight as its source stores it."""
    spec = source.tensors.get(f"{source.prefix}{name}.weight")
    return 0 if spec is None else spec.nbytes


def _dtype(file: Checkpoint, name: str) -> str:
    """A weight that is not quantized: its dtype, or the format that only a host reads."""
    record = file.opaque.get(f"{file.prefix}{name}")
    if record is not None:
        return str(record.get("format"))[:40]
    spec = file.tensors[f"{file.prefix}{name}.weight"]
    return dtype_label(spec.dtype)


def dtype_label(dtype) -> str:
    word = str(dtype).removeprefix("torch.")
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(word, word)


def _remarks(layer) -> list[str]:
    remarks = ["smoothed: its input is scaled by channels"] if layer.smoothed else []
    remarks += ["its branch is part of the file"] if layer.absorbs else []
    return remarks + (["made by another tool, read as this format"] if layer.foreign is not None else [])


def _bits(nbytes: int, shapes: Iterable[Sequence[int]]) -> str:
    return f"{8 * nbytes / max(1, sum(map(math.prod, shapes))):.2f}"


def _root(damage: float | None) -> float | None:
    return None if damage is None else damage**0.5
