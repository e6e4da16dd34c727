"""A small calibrated job, and processes that kill themselves in the midst of it: killed.py FOLDER MODE WHERE ..."""

import os
import signal
import sys
from pathlib import Path

import torch

from conftest import load_pack
from synthetic import noise, recipe_file, save

load_pack()

from tessera import journal, publication, writer  # noqa: E402
from tessera.checkpoint import Checkpoint  # noqa: E402
from tessera.job import Job  # noqa: E402
from tessera.quantization import calibration, recipe  # noqa: E402
from tessera.quantization.pipeline import Settings  # noqa: E402

LAYERS = [f"layers.{block}.{part}" for block in range(4) for part in ("attention.qkv", "feed_forward.w1")]
OUT, IN = 96, 64
CALIBRATED = LAYERS[:1]
POWER = torch.logspace(-1, 1, IN)[torch.randperm(IN, generator=torch.Generator().manual_seed(0))]  # of the inputs


def source(folder):
    """Eight layers, half of them with a bias, and tensors that stay; one is calibrated."""
    weights = {f"{name}.weight": noise(OUT, IN, seed=seed) for seed, name in enumerate(LAYERS)}
    weights |= {f"{name}.weight": weights[f"{name}.weight"] / POWER.bfloat16() for name in CALIBRATED}
    weights |= {f"{name}.bias": noise(OUT, seed=50 + seed) for seed, name in enumerate(LAYERS[::2])}
    weights |= {"norm.weight": noise(IN, seed=90), "odd": noise(3, 5, seed=91), "empty": noise(0, 4)}
    recipe_file(folder / "mine.toml", ("nvfp4", "layers.{0-2}.**"), ("int8_row", "layers.3.**"))
    return save(folder / "source.safetensors", weights)


def statistics(file):
    """Inputs with a mean and of uneven power, which smoothing and bias correction are for."""
    sites = {}
    for seed, name in enumerate(CALIBRATED):
        sites[name] = calibration.Accumulator(IN)
        generator = torch.Generator().manual_seed(seed)
        sites[name].add((torch.randn(512, IN, generator=generator) + torch.linspace(-1, 1, IN)) * POWER)
    made = {name: site.statistics() for name, site in sites.items()}
    return calibration.Calibration(made, {name: name for name in made}, calibration.fingerprint(file), 1)


def job(folder, mode="correction", calibrated=True, **options):
    file = Checkpoint(folder / "source.safetensors")
    (folder / "out").mkdir(exist_ok=True)
    settings = Settings(rank=2, mode=mode, smoothing=True)
    return Job(file, folder / "out" / "absorb.safetensors", recipe.find(folder / "mine.toml"), settings=settings,
               calibration=statistics(file) if calibrated else None, **options)  # fmt: skip


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_writing(layer):
    """When half of the layer's codes are written."""
    write, at_key = writer.Writer._write, writer.Writer.write
    key = None

    def noted(self, name, tensor):
        nonlocal key
        key = name
        at_key(self, name, tensor)

    def interrupted(self, entry, data):
        if key == f"{layer}.weight":
            write(self, entry, data[: len(data) // 2])
            self.sync()
            die()
        write(self, entry, data)

    writer.Writer.write, writer.Writer._write = noted, interrupted


def run(folder, mode, where):
    kind, _, number = where.partition(" ")
    if kind == "writing":
        die_writing(LAYERS[int(number)])
    if kind == "publishing":
        journal.Journal.publish = lambda *_: die()
    if kind == "published":  # the first of the two
        rename = publication._rename
        publication._rename = lambda *arguments: (rename(*arguments), die())

    def progress(step):
        if kind == ("verifying" if step.verifying else "layer") and step.index == int(number):
            die()

    job(Path(folder), mode).run(progress)


def main():
    """Each kill in a process of its own; forked before torch has threads, so that it is imported once."""
    journal.INTERVAL = 0
    for arguments in zip(*[iter(sys.argv[1:])] * 3, strict=True):
        if not (process := os.fork()):
            run(*arguments)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != -signal.SIGKILL:
            sys.exit(f"{arguments}: was not killed")


if __name__ == "__main__":
    main()
