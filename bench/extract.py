"""What extracting one layer of real size costs: NVFP4 against its BF16 original. Seconds, peak RAM."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import memory
import record
import torch
from safetensors.torch import save_file

SHAPES = ((10240, 3840), (3840, 3840))
KINDS = {"rank 32": {"rank": 32}, "rank 128": {"rank": 128}, "tolerance 0.5": {"tolerance": 0.5},
         "rank 32, calibrated": {"rank": 32}}  # fmt: skip


def prepare(folder: Path, shape: tuple[int, int]) -> None:
    """base.safetensors in NVFP4, tuned.safetensors in BF16 and statistics of its inputs."""
    import quantize_speed

    from tessera import calibration_file, formats
    from tessera.checkpoint import Checkpoint
    from tessera.quantization.calibration import FULL_UP_TO, Calibration, fingerprint

    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    format = formats.parse("nvfp4").for_shape(*shape)
    entries = format.pack(format.encode(weight.float())) | {"comfy_quant": formats.marker(format.record())}
    save_file({f"a.{suffix}": tensor.contiguous() for suffix, tensor in entries.items()}, folder / "base.safetensors")
    save_file({"a.weight": weight}, folder / "tuned.safetensors")
    statistics = quantize_speed.statistics(shape[1], "full" if shape[1] <= FULL_UP_TO else "block")
    model = fingerprint(Checkpoint(folder / "tuned.safetensors"))
    calibration_file.write(Calibration({"a": statistics}, {"a": "a"}, model, 1), folder / "inputs.safetensors")


def run(folder: Path, kind: str) -> None:
    """One extraction in this process: files to file, as a user sees it."""
    from tessera import calibration_file
    from tessera.extraction import Extraction
    from tessera.quantization.difference import Wish

    known = calibration_file.read(folder / "inputs.safetensors") if "calibrated" in kind else None
    files = (folder / "base.safetensors", folder / "tuned.safetensors", folder / "lora.safetensors")
    memory.measure(lambda: Extraction(*files, Wish(**KINDS[kind]), known, overwrite=True).run())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "KIND"), help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help="add the numbers to bench/results")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    record.load_pack()
    if arguments.one:
        return run(Path(arguments.one[0]), arguments.one[1])
    rows = []
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), shape)
            for kind in KINDS:
                command = [sys.executable, __file__, "--one", folder, kind]
                found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                weight = 4e-6 * shape[0] * shape[1]
                rows.append({"layer": f"{shape[0]} x {shape[1]}", "kind": kind, **found,
                             "of_fp32_weight": found["peak_mb"] / weight})  # fmt: skip
    record.table(rows)
    if arguments.save:
        record.save("extract", rows)
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
