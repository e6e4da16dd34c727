"""convert_to_quant as released: run in its own environment on a file of weights, its files read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import record
import torch
from torch import Tensor

if "tessera" not in sys.modules:
    record.load_pack()

from tessera import formats, lora
from tessera.checkpoint import Checkpoint
from tessera.formats import TensorSpec
from tessera.quantization.lowrank import LowRank
from tessera.writer import Writer

MEMORY = Path(__file__).with_name("memory.py")
VERSION = "1.2.6"  # since 1.2.8 --extract-lora writes no file on this path; RTN codes of 1.3.4 are the same
FLAGS = ("--nvfp4", "--comfy_quant", "--save-quant-metadata", "--manual_seed", "1",
         "--custom-type", "mxfp8", "--custom-layers", "^$",  # the mixed path, the only one that writes a LoRA; no layer
         "--device", "cpu:0")  # "cpu" would be replaced by "cuda" there  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """Its model and LoRA file."""

    weights: dict[str, Tensor]  # decoded [out, in]
    branches: dict[str, LowRank]
    nbytes: int  # of codes and scales
    lora_nbytes: int


def environment(python: str | None) -> Path:
    """The Python that has convert_to_quant: the given one, else one in .cache, made on first use."""
    if python:
        return Path(python).absolute()
    sys.path.insert(0, str(record.ROOT / "tests" / "golden"))
    import make

    home = record.ROOT / ".cache"
    if not (home / f"ctq-{VERSION}").exists():
        print(f"installing convert_to_quant {VERSION} into {home / f'ctq-{VERSION}'} (about 1 GB)", file=sys.stderr)
    return make.converter(home, VERSION).with_name("python")


def write_source(path: Path, weights: Mapping[str, Tensor]) -> None:
    """A file of `<module path>.weight` in bf16, in the precision that models are published in."""
    tensors = {f"{name}.weight": weight.bfloat16() for name, weight in weights.items()}
    with Writer(path, {k: TensorSpec(t.dtype, tuple(t.shape)) for k, t in tensors.items()}, reserve=64) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)
        writer.finish({})
        writer.publish()


def nvfp4(python: Path, source: Path, target: Path, rank: int, learned: bool = False) -> Converted:
    """Every layer of `source` in NVFP4 with a rank-r LoRA: round to nearest (`--simple`), or learned rounding with its
    default settings. Raises RuntimeError with the end of its log if it wrote no file (it exits 0 then too)."""
    files, _ = _run(python, "main()", source, target, rank, learned)
    return read(*files)


def cost(python: Path, source: Path, target: Path, rank: int, learned: bool, cap: float) -> tuple[float, float]:
    """(seconds, peak MB above what it held before) of the same, without the start of Python and its imports.

    Raises subprocess.TimeoutExpired after `cap` seconds. As many threads as this process has."""
    code = f"import runpy; memory = runpy.run_path({str(MEMORY)!r}); memory['measure'](main)"
    _, said = _run(python, code, source, target, rank, learned, cap)
    found = json.loads(said.splitlines()[-1])
    return found["seconds"], found["peak_mb"]


def _run(python: Path, code: str, source: Path, target: Path, rank: int, learned: bool, cap: float | None = None):
    """(model and LoRA file, what it printed) of `code`, which finds its `main`."""
    files = target, target.with_name(f"{target.stem}_lora.safetensors")
    flags = [*FLAGS, "--extract-lora", "--lora-rank", str(rank), "--lora-target", ".*",
             *([] if learned else ["--simple"])]  # fmt: skip
    run = subprocess.run(
        [python, "-c", f"from convert_to_quant.convert_to_quant import main; {code}",
         "-i", str(source), "-o", str(target), *flags],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True, text=True, check=False, cwd=target.parent, timeout=cap,
    )  # fmt: skip
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise RuntimeError(f"convert_to_quant wrote no {' and '.join(missing)}: {(run.stdout + run.stderr)[-1500:]}")
    return files, run.stdout


def read(model: Path, adapter: Path) -> Converted:
    file = Checkpoint(model)
    wrong = [name for name, layer in file.layers.items() if not isinstance(layer.format, formats.NVFP4)]
    if wrong:
        raise RuntimeError(f"{model.name}: {wrong[0]}: {file.layers[wrong[0]].format.label}, not nvfp4")
    branches = {base.removeprefix("diffusion_model."): branch for base, branch in lora.read(adapter).items()}
    nbytes = sum(layer.format.nbytes(*layer.shape) for layer in file.layers.values())
    weights = {name: file.weight(name) for name in file.layers}
    return Converted(weights, branches, nbytes, sum(branch.nbytes for branch in branches.values()))
