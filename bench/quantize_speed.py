"""What quantizing a layer costs, ours beside convert_to_quant's own code: seconds and peak RAM. See bench/README.md."""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import converter
import memory
import quantize
import record
import torch

from tessera import calibration_file
from tessera.checkpoint import Checkpoint
from tessera.formats import parse
from tessera.quantization import pipeline
from tessera.quantization.calibration import FULL_UP_TO, SAMPLE, Calibration, Statistics, fingerprint
from tessera.quantization.moment import BLOCK
from tessera.quantization.pipeline import Settings

BLOCKS = 34  # of Z-Image, with its refiners: 170 linears, 6.0 G weights
RANK = 32
TOKENS = 100_000
FACTORS = 64  # of the synthetic inputs
LEARNED, SIMPLE = "convert_to_quant, learned", "convert_to_quant, --simple"
FULL, AUTO = "calibrated, full moment", "as calibrated by default"

# name, format, settings, moment
CASES = {
    "data-free": ("nvfp4", Settings(RANK), None),
    FULL: ("nvfp4", Settings(RANK), "full"),
    "calibrated, blocks of 128": ("nvfp4", Settings(RANK), "block"),
    "absorb, full moment": ("nvfp4", Settings(RANK, mode="absorb"), "full"),
    "absorb, blocks of 128": ("nvfp4", Settings(RANK, mode="absorb"), "block"),
    "mxfp8, calibrated": ("mxfp8", Settings(RANK), "full"),
    "int8_convrot, calibrated": ("int8_convrot", Settings(RANK), "full"),
}  # fmt: skip


def statistics(in_features: int, moment: str) -> Statistics:
    """Of correlated inputs F z + d n, computed from F and d instead of from tokens: their content costs no time."""
    generator = torch.Generator().manual_seed(in_features)
    factors = torch.randn(in_features, FACTORS, generator=generator) / FACTORS**0.5
    diagonal = torch.rand(in_features, generator=generator) + 0.1
    if moment == "full":
        second = factors @ factors.T
        second.diagonal().add_(diagonal)
    else:
        padded = torch.nn.functional.pad(factors, (0, 0, 0, -in_features % BLOCK)).view(-1, BLOCK, FACTORS)
        own = torch.nn.functional.pad(diagonal, (0, -in_features % BLOCK)).view(-1, BLOCK)
        second = padded @ padded.mT + torch.diag_embed(own)
    z, n = (torch.randn(SAMPLE, width, generator=generator) for width in (FACTORS, in_features))
    sample = (z @ factors.T + n * diagonal.sqrt()).bfloat16()
    amax = 1.5 * sample.float().abs().amax(0)
    return Statistics(TOKENS, torch.zeros(in_features), amax, second, {}, sample)


def weights(shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


def one(case: str, shape) -> None:
    """What a process of its own does: prepares a layer, then measures `pipeline.quantize` on it."""
    label, settings, moment = CASES[case]
    weight, known = weights(shape), statistics(shape[1], moment) if moment else None
    pipeline.quantize(parse(label).for_shape(64, 512), weights((64, 512)), settings, 0,
                      statistics(512, moment) if moment else None)  # fmt: skip
    memory.measure(lambda: pipeline.quantize(parse(label).for_shape(*shape), weight, settings, 0, known))


def ours(case: str, shape) -> tuple[float, float]:
    """(seconds, peak MB above weight and statistics), measured in a process of its own."""
    command = [sys.executable, __file__, "--one", case, "--shapes", _name(shape)]
    run = subprocess.run(command, env=_threads(), check=True, capture_output=True, text=True)
    found = json.loads(run.stdout.splitlines()[-1])
    return found["seconds"], found["peak_mb"]


def theirs(python: Path, shape, learned: bool, cap: float) -> tuple[float, float]:
    """The same of convert_to_quant for a file that holds this layer; what it reads and writes is part of it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.safetensors"
        converter.write_source(source, {"layers.0.attention.out": weights(shape)})
        return converter.cost(python, source, Path(folder) / "target.safetensors", RANK, learned, cap)


def layers(arguments) -> list[dict]:
    """A row for every shape and way. Ratio: seconds over those of the learned rounding of that layer."""
    python = None if arguments.no_baseline else converter.environment(arguments.convert_to_quant)
    shapes, rows, per_weight = arguments.shapes, [], None
    for shape in shapes:
        found, count = {}, shape[0] * shape[1]
        if python:
            cost = _said(SIMPLE, shape, theirs, python, shape, False, arguments.cap)
            found[SIMPLE] = (*cost, "measured" if cost[0] else "stopped")
            if shape in (arguments.learned or shapes[:1]):
                cost = _said(LEARNED, shape, theirs, python, shape, True, arguments.cap)
                per_weight, found[LEARNED] = (cost[0] or 0) / count, (*cost, "measured" if cost[0] else "stopped")
            elif per_weight:
                found[LEARNED] = per_weight * count, None, "computed"  # by the number of weights
        for case in CASES:
            found[case] = (*_said(case, shape, ours, case, shape), "measured")
        learned = found.get(LEARNED, (None,))[0]
        rows += [{"shape": _name(shape), "way": way, "s": s, "peak_mb": mb,
                  "of_learned": s / learned if s and learned else None, "how": note}
                 for way, (s, mb, note) in found.items()]  # fmt: skip
    return rows


def whole(rows: list[dict]) -> list[dict]:
    """Z-Image's 170 linears one after the other, computed from the rows of its shapes."""
    by = {(row["shape"], row["way"]): row["s"] for row in rows}
    shapes = [_name(shape) for shape in quantize.BLOCK.values()]
    if not all((shape, FULL) in by for shape in shapes):
        return []

    def moment(shape):
        return FULL if int(shape.split("x")[1]) <= FULL_UP_TO else "calibrated, blocks of 128"

    ways = [*CASES, *(way for way in (LEARNED, SIMPLE) if all(by.get((shape, way)) for shape in shapes))]
    total = {way: BLOCKS * sum(by[shape, way] for shape in shapes) for way in ways}
    total[AUTO] = BLOCKS * sum(by[shape, moment(shape)] for shape in shapes)
    return [{"Z-Image, 170 linears (computed)": way, "s": s, "minutes": s / 60} for way, s in total.items()]


def file(arguments) -> list[dict]:
    """`tessera quantize --calibration` of a synthetic file of Z-Image's blocks, in a process of its own."""
    code = "import record, sys; record.load_pack(); from tessera.cli import main; sys.exit(main(sys.argv[1:]))"
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source, known, target = (Path(folder) / f"{name}.safetensors" for name in ("source", "calibration", "target"))
        quantize.write_source(source, arguments.file)
        write_calibration(source, known)
        command = [sys.executable, "-c", code, "quantize", source, "-o", target, "--recipe", "z_image_nvfp4",
                   "--calibration", known, "--workers", str(arguments.workers)]  # fmt: skip
        started = time.perf_counter()
        child = subprocess.Popen(command, cwd=Path(__file__).parent, env=_threads(), stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"tessera quantize failed: {status}")
        seconds = time.perf_counter() - started
        return [{"source_gb": source.stat().st_size / 1e9, "calibration_gb": known.stat().st_size / 1e9,
                 "target_gb": target.stat().st_size / 1e9, "workers": arguments.workers, "s": seconds,
                 "peak_ram_mb": used.ru_maxrss * 1024 / 1e6}]  # fmt: skip


def write_calibration(source: Path, path: Path) -> None:
    """Synthetic statistics for every layer: full up to 4096 inputs, else blocks; w1 and w3 share a site."""
    model = Checkpoint(source)
    known = {width: functools.cache(functools.partial(statistics, width, "full" if width <= FULL_UP_TO else "block"))
             for width in {shape[1] for shape in quantize.BLOCK.values()}}  # fmt: skip
    names = [key.removesuffix(".weight") for key in model.shapes()]
    homes = {name: name.replace(".w3", ".w1") for name in names}
    sites = {homes[name]: known[model.shapes()[f"{name}.weight"][1]]() for name in names}
    calibration_file.write(Calibration(sites, homes, fingerprint(model), 1), path)


def summary(rows: list[dict], shapes) -> dict:
    """Of the first shape, with a full moment, beside learned rounding; and everything else that was measured."""
    by = {(row["shape"], row["way"]): row for row in rows}
    mine, other = by[_name(shapes[0]), FULL], by.get((_name(shapes[0]), LEARNED), {"s": None, "peak_mb": None})
    return {
        "seconds_per_layer": {"ours": mine["s"], "baseline": other["s"]},
        "peak_rss_mb": {"ours": mine["peak_mb"], "baseline": other["peak_mb"]},
        "largest_peak_mb": {case: max(row["peak_mb"] for row in rows if row["way"] == case) for case in CASES},
        "shape": _name(shapes[0]), "threads": torch.get_num_threads(), "layers": rows,
    }  # fmt: skip


def _said(way, shape, function, *arguments):
    started = time.perf_counter()
    try:
        cost = function(*arguments)
    except subprocess.TimeoutExpired as late:
        print(f"{_name(shape)} {way}: stopped after {late.timeout:.0f} s; give a larger --cap", file=sys.stderr)
        return None, None
    print(f"{_name(shape)} {way}: {cost[0]:.2f} s, {cost[1]:.0f} MB ({time.perf_counter() - started:.0f} s in all)",
          file=sys.stderr)  # fmt: skip
    return cost


def _threads() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def _name(shape) -> str:
    return "x".join(map(str, shape))


def _shapes(text: str) -> list[tuple[int, int]]:
    return [tuple(int(n) for n in shape.split("x")) for shape in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    default = ",".join(dict.fromkeys(_name(shape) for shape in quantize.SHAPES))
    parser.add_argument("--shapes", type=_shapes, default=_shapes(default), help=f"out x in, with commas ({default})")
    parser.add_argument("--learned", type=_shapes, help="shapes to run learned rounding on (the first: it takes long)")
    parser.add_argument("--cap", type=float, default=3600, help="seconds after which a baseline is stopped (3600)")
    parser.add_argument(
        "--convert-to-quant", metavar="PYTHON", help="a Python that has it (else one is made in .cache)"
    )
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--threads", type=int, help="of both (torch's default)")
    parser.add_argument("--file", type=float, metavar="GB", help="quantize a synthetic BF16 file of that size instead")
    parser.add_argument("--workers", type=int, default=1, help="of --file")
    parser.add_argument("--folder", help="where the synthetic files go")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="ends with one JSON line")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.one:
        one(arguments.one, arguments.shapes[0])
        return
    if arguments.file:
        rows = file(arguments)
        record.table(rows)
        found, name = {"file": rows}, "quantize_speed file"
    else:
        rows = layers(arguments)
        record.table(rows)
        estimate = whole(rows)
        if estimate:
            record.table(estimate)
        found, name = summary(rows, arguments.shapes) | {"z_image": estimate}, "quantize_speed"
        rows = [*rows, *estimate]
    if arguments.save:
        record.save(name, rows)
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
