"""Makes this folder's files: what this version of Tessera writes, tiny. Run it once per version of a file format, into
a folder of its own; files that are there never change.

    python tests/golden/own/make.py FOLDER
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))
from conftest import load_pack

load_pack()

from tessera import calibration_file, lora, transcode  # noqa: E402
from tessera.checkpoint import Checkpoint  # noqa: E402
from tessera.formats.fp8 import FP8Row  # noqa: E402
from tessera.job import Job  # noqa: E402
from tessera.quantization import calibration, recipe  # noqa: E402
from tessera.quantization.pipeline import Settings  # noqa: E402

LABELS = ("nvfp4", "mxfp8", "fp8_e4m3", "fp8_e5m2", "int8", "int8_row", "int8_convrot_16", "bf16")


def numbers(tensor):
    """(sum, length) in double precision: of decoded weights, which another CPU may sum in another order."""
    tensor = tensor.double()
    return [tensor.sum().item(), tensor.norm().item()]


def source(folder):
    weights = {}
    for seed, label in enumerate(LABELS):
        random = torch.randn(40, 48, generator=torch.Generator().manual_seed(seed))
        weights[f"layers.{seed}.{label}.weight"] = (random * 0.02).bfloat16()
    weights["norm.weight"] = torch.ones(48, dtype=torch.bfloat16)
    save_file(weights, folder / "source.safetensors")
    text = "".join(f'[[rule]]\n{label} = ["layers.*.{label}"]\nreason = "golden"\n' for label in LABELS)
    (folder / "own.toml").write_text(f'default = "keep"\n{text}')
    return Checkpoint(folder / "source.safetensors")


def statistics(file):
    site = calibration.Accumulator(48)
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(9))
    site.add(x * torch.linspace(0.1, 3, 48) + 0.5)
    name = "layers.0.nvfp4"
    return calibration.Calibration({name: site.statistics()}, {name: name}, calibration.fingerprint(file), 1)


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        file = source(Path(temporary))
        chosen, found = recipe.find(Path(temporary) / "own.toml"), statistics(file)
        calibration_file.write(found, folder / "calibration.safetensors")
        Job(file, folder / "model.safetensors", chosen, rank=2, calibration=found).run()
        absorb = Settings(rank=2, mode="absorb")
        Job(file, folder / "absorb.safetensors", chosen, settings=absorb, calibration=found).run()
    kept = transcode.Cache(folder / "transcoded.safetensors")
    weight = torch.linspace(-1, 1, 8 * 16).reshape(8, 16)
    kept.add("layer", "digest", transcode.Transcoded(FP8Row(), FP8Row().pack(FP8Row().encode(weight)), 0.02, 0.01))
    kept.save()
    (folder / "golden.json").write_text(json.dumps(described(folder), indent=1) + "\n")


def described(folder):
    """What every file of the folder is read as."""
    said = {"sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                       for path in sorted(folder.glob("*.safetensors"))}}  # fmt: skip
    for name in ("model", "absorb"):
        file = Checkpoint(folder / f"{name}.safetensors")
        said[name] = {layer: numbers(file.weight(layer)) for layer in sorted(file.layers)}
    pairs = lora.read(folder / "model_lora.safetensors")
    said["lora"] = {layer: numbers(pair.weight()) for layer, pair in sorted(pairs.items())}
    found = calibration_file.read(folder / "calibration.safetensors")
    said["calibration"] = {site: numbers(found.sites[site].second) for site in sorted(found.sites)}
    kept = transcode.Cache(folder / "transcoded.safetensors").read("layer", "digest", FP8Row())
    said["transcoded"] = {suffix: numbers(tensor.float()) for suffix, tensor in sorted(kept.entries.items())}
    return said


if __name__ == "__main__":
    main(Path(sys.argv[1]))
