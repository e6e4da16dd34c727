"""What each `tessera` command does: its arguments to {json, text, ok}."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

from . import additions, baking, calibration_file, job, lora, mosaic, planning, repairing, saved_inputs
from . import doctor as doctors
from . import edits as by_hand
from .checkpoint import ABSORB, LAYER_ERRORS, PROVENANCE, Checkpoint
from .extraction import Extraction
from .pictures import mosaic_image
from .quantization import pipeline, recipe
from .quantization.difference import Wish
from .quantization.pipeline import Settings
from .quantization.recorder import RecordOptions
from .quantization.report import size
from .survey import RANKS, Menu, Survey, survey
from .writer import check_target


def quantize(arguments) -> dict:
    source = Checkpoint(Path(arguments.source))
    chosen = _recipe(arguments, source)
    rounding = pipeline.NEAREST if arguments.simple else arguments.rounding
    settings = Settings(arguments.rank, arguments.mode, rounding, arguments.smoothing)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    work = job.Job(
        source, Path(arguments.output), chosen, Path(arguments.lora) if arguments.lora else None, seed=arguments.seed,
        settings=settings, device=arguments.device, overwrite=arguments.overwrite, resume=arguments.resume,
        calibration=calibration_file.read(Path(arguments.calibration)) if arguments.calibration else None,
        workers=arguments.workers, ray=arguments.ray,
    )  # fmt: skip
    for note in (*source.repairs, *chosen.notes, *work.warnings):
        print(f"note: {note}", file=sys.stderr)
    report = work.run(_layer_lines if arguments.verbose else _progress(arguments))
    return {"json": report.as_dict(), "text": report.markdown()}


def probe(arguments) -> dict:
    """Scores of every layer in every format; with a target the plan that they give, and with -o its recipe."""
    if arguments.target_size is None and arguments.target_error is None:
        if wish := arguments.output or arguments.edits or arguments.map:
            raise ValueError(f"{wish}: a plan needs a target; give --target-size or --target-error")
        found = _survey(arguments, Checkpoint(Path(arguments.source)))
        return {"json": found.as_dict(), "text": found.markdown()}
    target, edits = _target(arguments), _edits(arguments.edits)
    if arguments.output:
        planning.check_recipe_path(Path(arguments.output))
    if arguments.map:
        mosaic_image.check_path(Path(arguments.map))
    found = _survey(arguments, Checkpoint(Path(arguments.source)))
    plan = planning.plan(found, _planned_name(arguments.output or arguments.source), target, edits)
    if arguments.output:
        plan.save(Path(arguments.output))
    if arguments.map:
        _draw(mosaic.of_plan(plan), arguments)
    return {"json": plan.as_dict(), "text": plan.markdown()}


def calibrate(arguments) -> dict:
    """Statistics from saved inputs; `saved_inputs` says how to save them."""
    source, target = Checkpoint(Path(arguments.source)), Path(arguments.output)
    options = RecordOptions(arguments.moment, arguments.tokens, arguments.memory_gb, 0, arguments.seed)
    calibration = saved_inputs.calibrate(source, Path(arguments.inputs), options, _progress(arguments))
    calibration_file.write(calibration, target, arguments.overwrite)
    found = calibration_file.inspect(target)
    return {"json": found, "text": "\n".join(found["text"])}


def extract_lora(arguments) -> dict:
    """The difference of two checkpoints as a LoRA."""
    work = Extraction(
        Path(arguments.base), Path(arguments.tuned), Path(arguments.output),
        Wish(arguments.rank, arguments.tolerance, arguments.max_rank),
        calibration_file.read(Path(arguments.calibration)) if arguments.calibration else None, arguments.layers,
        arguments.device, arguments.overwrite,
    )  # fmt: skip
    report = work.run(_progress(arguments))
    return {"json": report.as_dict(), "text": report.markdown()}


def bake(arguments) -> dict:
    """LoRAs into a new quantized file."""
    model = Checkpoint(Path(arguments.model))
    original = Checkpoint(Path(arguments.original)) if arguments.original else None
    beside = baking.correction_beside(model) if arguments.correction is None else Path(arguments.correction)
    loras = [additions.read(*additions.parse(text), original or model, arguments.skip_unmatched)
             for text in arguments.lora]  # fmt: skip
    work = baking.Bake(
        model, loras, original, recipe.find(arguments.recipe) if arguments.recipe else None,
        None if arguments.correction == baking.NONE else beside,
    ).job(
        Path(arguments.output), Settings(arguments.rank),
        calibration_file.read(Path(arguments.calibration)) if arguments.calibration else None, seed=arguments.seed,
        device=arguments.device, overwrite=arguments.overwrite, resume=arguments.resume,
    )  # fmt: skip
    for note in work.warnings:
        print(f"note: {note}", file=sys.stderr)
    report = work.run(_progress(arguments))
    return {"json": report.as_dict() | {"baked": dict(work.baked.said)}, "text": report.markdown()}


def inspect(arguments) -> dict:
    file = Checkpoint(Path(arguments.file))
    if calibration_file.METADATA in file.metadata:
        if arguments.map:
            raise ValueError(f"{file.name}: a calibration has no layer map; leave out --map")
        said = calibration_file.inspect(file.path)
        return {"json": said, "text": "\n".join(said["text"])}
    if arguments.map:
        mosaic_image.check_path(Path(arguments.map))
    made = repairing.repair(file.path, Path(arguments.repair)) if arguments.repair else None
    counts: dict[str, int] = {}
    rows = []
    errors = _json(file, LAYER_ERRORS) or {}
    for name in sorted(file.layers, key=job.natural):
        layer = file.layers[name]
        counts[layer.format.label] = counts.get(layer.format.label, 0) + 1
        nbytes = layer.format.nbytes(*layer.shape)
        rank = file.tensors[layer.sources["absorb_down"]].shape[0] if layer.absorbs else None
        rows.append({"layer": name, "format": layer.format.label, "shape": layer.shape, "bytes": nbytes,
                     "error": errors.get(name), "rank": rank, "smoothed": layer.smoothed})  # fmt: skip
    parameters = sum(math.prod(shape) for shape in file.shapes().values())
    found = {"file": file.name, "bytes": file.nbytes, "bits_per_weight": round(8 * file.nbytes / max(parameters, 1), 2),
             "prefix": file.prefix, "counts": counts, "tensors": len(file.tensors), "repairs": file.repairs,
             "opaque": {k: r.get("format") for k, r in file.opaque.items()},
             "provenance": _json(file, PROVENANCE), "layers": rows}  # fmt: skip
    ranks = sorted({r["rank"] for r in rows if r["rank"]})
    found["mode"] = ABSORB if ranks else None
    text = [
        f"{file.name}: {size(file.nbytes)}, {found['bits_per_weight']} bits per weight, {len(file.tensors)} tensors"
    ]
    text += [f"quantized: {', '.join(f'{n} {label}' for label, n in counts.items()) or 'no layer'}"]
    if ranks:
        text += [f"absorb: {sum(r['rank'] is not None for r in rows)} layers have a branch inside the file, rank "
                 f"{', '.join(map(str, ranks))}; only Tessera's loader runs them right"]  # fmt: skip
    smoothed = sum(r["smoothed"] for r in rows)
    if smoothed:
        text += [f"smoothed: {smoothed} layers have a pre_quant_scale; ComfyUI's own LoRA loaders merge right into "
                 "them if Tessera's loader has loaded the model, and wrongly if another has"]  # fmt: skip
    text += [f"repaired on reading: {r}" for r in file.repairs]
    if made is not None:
        found["repaired"] = {"file": str(made.path), "repairs": made.repairs, "losses": made.losses}
        text += [f"wrote {made.path}: {len(made.repairs)} repairs" if made.repairs else f"wrote {made.path}: a copy"]
        text += [f"{name}: encoding it anew changed the weight by {loss:.2%}" for name, loss in made.losses.items()]
    if arguments.map:
        found["map"] = _draw(mosaic.of_file(file), arguments)
        text += [f"wrote {found['map']}: the layer map"]
    text += [f"{r['layer']}  {r['format']}{_mark(r)}  {list(r['shape'])}  {r['bytes'] / 1e6:.2f} MB" for r in rows]
    return {"json": found, "text": "\n".join(text)}


def _draw(found: mosaic.Mosaic, arguments) -> str:
    """Path of the picture."""
    picture = mosaic_image.draw(found, arguments.color, arguments.theme)
    return str(mosaic_image.save(picture, Path(arguments.map)))


def doctor(arguments) -> dict:
    """What this device does with each format, and what to install for a faster path."""
    found = doctors.diagnose(arguments.device)
    return {"json": found.as_dict(), "text": found.markdown() if arguments.markdown else "\n".join(found.lines())}


def verify(arguments) -> dict:
    """Every quantized layer against its source; fails if one is missing, misread or above --max-error."""
    file, source = Checkpoint(Path(arguments.file)), Checkpoint(Path(arguments.against))
    branches = lora.read(Path(arguments.lora)) if arguments.lora else {}
    shapes, rows, problems = source.shapes(), [], []
    if branches and not any(f"{job.LORA_PREFIX}{name}" in branches for name in file.layers):
        raise ValueError(f"{arguments.lora}: 0 of {len(branches)} LoRA layers match {file.name}, first "
                         f"{min(branches)}; it was made for another model")  # fmt: skip
    for name in sorted(file.layers, key=job.natural):
        if f"{name}.weight" not in shapes:
            problems.append(f"{name}: not in {source.name}")
            continue
        weight, branch = source.weight(name), branches.get(f"{job.LORA_PREFIX}{name}")
        if branch is not None and branch.shape != tuple(weight.shape):
            raise ValueError(f"{arguments.lora}: {name}: the LoRA is {list(branch.shape)}, the layer "
                             f"{list(weight.shape)}; it was made for another model")  # fmt: skip
        errors = pipeline.layer_errors(file.weight(name, tuple(weight.shape)), branch, weight)
        layer = file.layers[name]
        rows.append({"layer": name, "format": layer.format.label, "errors": errors, "smoothed": layer.smoothed})
        if not errors[-1] <= arguments.max_error:
            problems.append(f"{name}: weight error {errors[-1]:.4f} is above {arguments.max_error}")
    missing = {k for k in shapes if k not in file.shapes()}
    problems += [f"{key}: missing in {file.name}" for key in sorted(missing)]
    text = [f"{r['layer']}  {r['format']}{_mark(r)}  " + "  ".join(f"{e:.4f}" for e in r["errors"]) for r in rows]
    text += problems or [f"{len(rows)} layers verified"]
    return {"json": {"layers": rows, "problems": problems}, "text": "\n".join(text), "ok": not problems}


def _mark(row: dict) -> str:
    return " smoothed" if row["smoothed"] else ""


def _json(file: Checkpoint, key: str):
    try:
        return json.loads(file.metadata.get(key, "null"))
    except ValueError as problem:
        raise ValueError(f"{file.name}: metadata {key!r} is not JSON ({problem}); make the file again") from None


def _recipe(arguments, source: Checkpoint) -> recipe.Recipe:
    target = next((w for w in ("target_size", "target_error") if vars(arguments)[w] is not None), None)
    wishes = [w for w in ("recipe", "convert_to_quant", target) if w and vars(arguments)[w]]
    if len(wishes) > 1:
        raise ValueError(f"{' and '.join('--' + w.replace('_', '-') for w in wishes)} both choose formats; keep one")
    if arguments.convert_to_quant:
        return recipe.from_convert_to_quant(arguments.convert_to_quant)
    if target:
        return _planned(arguments, source)
    if arguments.edits:
        raise ValueError("--edits changes a plan; give --target-size or --target-error, or write a recipe")
    if not arguments.recipe:
        raise ValueError(f"--recipe is missing; built in are {', '.join(recipe.names())}, or give a .toml file; "
                         "--target-size makes one")  # fmt: skip
    return recipe.find(arguments.recipe)


def _planned(arguments, source: Checkpoint) -> recipe.Recipe:
    """The recipe for a size or an error, told on stderr. Ranks are the plan's."""
    if arguments.mode != pipeline.CORRECTION:
        raise ValueError(f"--mode {arguments.mode}: plans are made for correction LoRAs; probe the source, then give "
                         "the recipe")  # fmt: skip
    target = _target(arguments)
    check_target(Path(arguments.output), arguments.overwrite)  # before minutes of measuring
    edits = _edits(arguments.edits)
    plan = planning.plan(_survey(arguments, source), _planned_name(arguments.output), target, edits)
    for line in (*plan.summary(), *plan.survey.notes):
        print(f"plan: {line}", file=sys.stderr)
    return plan.recipe()


def _survey(arguments, source: Checkpoint) -> Survey:
    calibration = calibration_file.read(Path(arguments.calibration)) if arguments.calibration else None
    ranks = RANKS if arguments.ranks is None else planning.parse_ranks(arguments.ranks)
    menu = Menu.of(arguments.formats.replace(",", " ").split(), ranks)
    rows, device = arguments.rows or None, arguments.device.split(",")[0]
    return survey(source, menu, calibration, rows, device, progress=_progress(arguments))


def _target(arguments) -> planning.Target:
    nbytes = None if arguments.target_size is None else planning.parse_size(arguments.target_size)
    return planning.Target(nbytes, arguments.target_error)


def _edits(text: str) -> str:
    """Edits by hand, in a file or as they are; `;` parts them. Raises ValueError for what is neither."""
    path = Path(text)
    edits = path.read_text(encoding="utf-8-sig") if text and "=" not in text else text.replace(";", "\n")
    by_hand.parse(edits)
    return edits


def _planned_name(path: str) -> str:
    stem = Path(path).stem
    return stem if path.endswith(".toml") else f"{stem}_planned"


def _progress(arguments):
    live = sys.stderr.isatty() and not arguments.json
    return (lambda step: print(f"\r\033[K{step}", end="", file=sys.stderr, flush=True)) if live else (lambda step: None)


def _layer_lines(step: job.Step) -> None:
    """A line per finished layer, for logs."""
    if step.last is not None:
        print(f"{step.share:4.0%} {step.last.line()}", file=sys.stderr, flush=True)
