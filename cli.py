"""`tessera ...`: the same engine as the nodes, without ComfyUI."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from . import job, lora
from .checkpoint import LAYER_ERRORS, PROVENANCE, Checkpoint
from .quantization import pipeline, recipe
from .quantization.report import size
from .version import VERSION


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 0 on success, 1 on any failure with one message on stderr, 2 on wrong usage, 130 on Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        result = arguments.run(arguments)
    except (ValueError, RuntimeError, OSError) as problem:
        print(f"tessera: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tessera: stopped, nothing was saved", file=sys.stderr)
        return 130
    print(json.dumps(result["json"], indent=1) if arguments.json else result["text"])
    return 0 if result.get("ok", True) else 1


def quantize(arguments) -> dict:
    chosen = _recipe(arguments)
    source = Checkpoint(Path(arguments.source))
    work = job.Job(
        source, Path(arguments.output), chosen, Path(arguments.lora) if arguments.lora else None, arguments.rank,
        arguments.seed, not arguments.simple, arguments.device, arguments.overwrite,
    )  # fmt: skip
    for note in (*source.repairs, *chosen.notes, *work.warnings):
        print(f"note: {note}", file=sys.stderr)
    report = work.run(_progress(arguments))
    return {"json": report.as_dict(), "text": report.markdown()}


def inspect(arguments) -> dict:
    file = Checkpoint(Path(arguments.file))
    counts: dict[str, int] = {}
    rows = []
    errors = _json(file, LAYER_ERRORS) or {}
    for name in sorted(file.layers, key=job.natural):
        layer = file.layers[name]
        counts[layer.format.label] = counts.get(layer.format.label, 0) + 1
        nbytes = layer.format.nbytes(*layer.shape)
        rows.append({"layer": name, "format": layer.format.label, "shape": layer.shape, "bytes": nbytes,
                     "error": errors.get(name)})  # fmt: skip
    parameters = sum(math.prod(shape) for shape in file.shapes().values())
    found = {"file": file.name, "bytes": file.nbytes, "bits_per_weight": round(8 * file.nbytes / max(parameters, 1), 2),
             "prefix": file.prefix, "counts": counts, "tensors": len(file.tensors), "repairs": file.repairs,
             "opaque": {k: r.get("format") for k, r in file.opaque.items()},
             "provenance": _json(file, PROVENANCE), "layers": rows}  # fmt: skip
    text = [
        f"{file.name}: {size(file.nbytes)}, {found['bits_per_weight']} bits per weight, {len(file.tensors)} tensors"
    ]
    text += [f"quantized: {', '.join(f'{n} {label}' for label, n in counts.items()) or 'no layer'}"]
    text += [f"repaired on reading: {r}" for r in file.repairs]
    text += [f"{r['layer']}  {r['format']}  {list(r['shape'])}  {r['bytes'] / 1e6:.2f} MB" for r in rows]
    return {"json": found, "text": "\n".join(text)}


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
        rows.append({"layer": name, "format": file.layers[name].format.label, "errors": errors})
        if not errors[-1] <= arguments.max_error:
            problems.append(f"{name}: weight error {errors[-1]:.4f} is above {arguments.max_error}")
    missing = {k for k in shapes if k not in file.shapes()}
    problems += [f"{key}: missing in {file.name}" for key in sorted(missing)]
    text = [f"{r['layer']}  {r['format']}  " + "  ".join(f"{e:.4f}" for e in r["errors"]) for r in rows]
    text += problems or [f"{len(rows)} layers verified"]
    return {"json": {"layers": rows, "problems": problems}, "text": "\n".join(text), "ok": not problems}


def _json(file: Checkpoint, key: str):
    try:
        return json.loads(file.metadata.get(key, "null"))
    except ValueError as problem:
        raise ValueError(f"{file.name}: metadata {key!r} is not JSON ({problem}); make the file again") from None


def _recipe(arguments) -> recipe.Recipe:
    if arguments.convert_to_quant:
        return recipe.from_convert_to_quant(arguments.convert_to_quant)
    if not arguments.recipe:
        raise ValueError(f"--recipe is missing; built in are {', '.join(recipe.names())}, or give a .toml file")
    return recipe.find(arguments.recipe)


def _progress(arguments):
    live = sys.stderr.isatty() and not arguments.json
    return (lambda step: print(f"\r\033[K{step}", end="", file=sys.stderr, flush=True)) if live else (lambda step: None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tessera", description=__doc__.strip("`. "))
    parser.add_argument("--version", action="version", version=f"tessera {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = _command(commands, quantize, "quantize a checkpoint and fit its correction LoRA")
    command.add_argument("source", help="BF16 safetensors file")
    command.add_argument("-o", "--output", required=True, help="the quantized file to write")
    command.add_argument("--recipe", help=f"one of {', '.join(recipe.names())}, or a .toml file")
    command.add_argument("--convert-to-quant", metavar="FLAGS", help="take the formats of a convert_to_quant command")
    command.add_argument("--rank", type=int, default=32, help="rank of the correction LoRA; 0 writes none (32)")
    command.add_argument("--lora", help="where the correction LoRA goes (<output>_lora.safetensors)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="cpu", help="where the arithmetic runs: cpu, cuda, ... (cpu)")
    command.add_argument("--simple", action="store_true", help="round to nearest without the block-scale sweep")
    command.add_argument("--overwrite", action="store_true", help="replace existing output files")

    command = _command(commands, inspect, "what a file holds, layer by layer")
    command.add_argument("file")

    command = _command(commands, verify, "compare every quantized layer with its source")
    command.add_argument("file")
    command.add_argument("--against", required=True, metavar="SRC", help="the file it was made from")
    command.add_argument("--lora", help="its correction LoRA")
    command.add_argument("--max-error", type=float, default=0.2, help="largest relative weight error allowed (0.2)")
    return parser


def _command(commands, run, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(run.__name__, help=text, description=text)
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=run)
    return command


if __name__ == "__main__":
    sys.exit(main())
