"""Tiny Z-Image in the real ComfyUI, every block linear in NVFP4: ours beside convert_to_quant's own file, same bytes.

convert_to_quant stores its LoRA in fp32: at equal bytes ours has twice the rank; equal ranks are shown too.
The trained BF16 model samples in the host; a hook makes each quantized layer compute what its replacement would, with
exact inputs (weights only) or with inputs rounded to NVFP4 as a device with FP4 units does (W4A4), which no CPU runs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean, stdev

import record
import torch

sys.path.insert(0, str(record.ROOT / "tests"))
record.load_pack()

import converter  # noqa: E402
from minilm import Replacement  # noqa: E402

import comfy_host  # noqa: E402
from tessera.checkpoint import Checkpoint  # noqa: E402
from tessera.formats import NVFP4  # noqa: E402
from tessera.quantization import pipeline, recipe  # noqa: E402
from tessera.quantization.metrics import psnr  # noqa: E402
from tessera.quantization.pipeline import Settings  # noqa: E402
from tiny import pictures  # noqa: E402

RANK, SEED = 32, 0
CALIBRATION = 96  # prompts x 8 steps x 96 tokens: as many tokens as 18 steps of a 1024x1024 picture
BASELINE, OURS, SMOOTHED, ABSORB = "convert_to_quant r32", "ours r64", "ours r64, smoothed", "ours r64, absorb"
EXACT = "exact weights"
METHODS = {  # its LoRA is in fp32, ours in fp16: rank 64 is its rank 32 in bytes
    "round to nearest": (Settings(rounding="nearest"), 0.0),
    EXACT: (None, 0.0),
    "ours r32, no calibration": (Settings(rank=RANK), 1.0),
    "ours r32, strength 0": (Settings(rank=RANK), 0.0),
    "ours r32": (Settings(rank=RANK), 1.0),
    "ours r32, smoothed": (Settings(rank=RANK, smoothing=True), 1.0),
    "ours r32, absorb": (Settings(rank=RANK, mode="absorb"), 1.0),
    OURS: (Settings(rank=2 * RANK), 1.0),
    SMOOTHED: (Settings(rank=2 * RANK, smoothing=True), 1.0),
    ABSORB: (Settings(rank=2 * RANK, mode="absorb"), 1.0),
}
UNCALIBRATED = ("round to nearest", "ours r32, no calibration")


def layers(source):
    """Module paths of what the recipe `nvfp4` packs."""
    choices = recipe.builtin("nvfp4").resolve(source.shapes())
    return [name for name, choice in choices.items() if isinstance(choice.format, NVFP4)]


def ours(source, names, calibration, settings, strength):
    replaced = {}
    for name in names:
        weight = source.weight(name)
        if settings is None:
            replaced[name] = Replacement(weight, NVFP4())
            continue
        statistics = calibration.of(name) if calibration else None
        layer = pipeline.quantize(NVFP4(), weight, settings, pipeline.layer_seed(SEED, name), statistics)
        replaced[name] = Replacement.of(NVFP4(), layer, weight.shape, strength)
    return replaced


def theirs(source, names, python, folder):
    path = Path(folder) / "linears.safetensors"
    converter.write_source(path, {name: source.weight(name) for name in names})
    made = converter.nvfp4(python, path, Path(folder) / "converted.safetensors", RANK)
    if set(made.weights) != set(names) or set(made.branches) != set(names):
        raise RuntimeError(f"convert_to_quant made {len(made.weights)} weights and {len(made.branches)} branches of "
                           f"{len(names)} layers")  # fmt: skip
    shapes = [source.shapes()[f"{name}.weight"] for name in names]
    nbytes, lora = sum(NVFP4().nbytes(*shape) for shape in shapes), sum(4 * RANK * sum(shape) for shape in shapes)
    print(f"{len(names)} layers: convert_to_quant {made.nbytes} bytes and {made.lora_nbytes} of LoRA, "
          f"ours {nbytes} and {lora} at rank {2 * RANK}", file=sys.stderr)  # fmt: skip
    return {name: Replacement(made.weights[name], NVFP4(), made.branches[name]) for name in names}


@contextmanager
def replaced(model, replacements, act):
    """The model with these layers computing what their replacements would."""
    modules = dict(model.model.diffusion_model.named_modules())
    with ExitStack() as stack:
        for name, replacement in replacements.items():
            forward = replacement.linear(modules[name].bias, act)
            handle = modules[name].register_forward_hook(
                lambda _, inputs, output, forward=forward: forward(inputs[0].float()).to(output.dtype)
            )
            stack.callback(handle.remove)
        yield model


def calibration_pairs(count):
    """Prompts of the tiny model's own grammar and seeds, none of them measured later."""
    rng, pairs = random.Random(7), []
    while len(pairs) < count:
        text = pictures.caption(*pictures.scene(rng))
        if text not in comfy_host.PROMPTS:
            pairs.append((text, 5000 + len(pairs)))
    return pairs


def measure(model, methods, acts, pairs):
    """{(method, act): one (velocity error, latent error, PSNR in dB) per pair}."""
    rows = {(name, act): [] for name in methods for act in acts}
    for number, (text, seed) in enumerate(pairs, 1):
        truth = comfy_host.Trajectory(model, text, seed)
        picture = comfy_host.picture(truth.latent)
        for name, act in rows:
            with replaced(model, methods[name], act):
                velocity = mean(truth.velocities(model))
                latent = comfy_host.sample(model, text, seed)
            ratio = psnr(comfy_host.picture(latent), picture)
            rows[name, act].append((velocity, comfy_host.relative(latent, truth.latent), ratio))
        print(f"pair {number} of {len(pairs)}", file=sys.stderr, flush=True)
    return rows


def paired(values, others):
    """(geometric mean of values/others, t of the mean log-ratio)."""
    logs = [math.log(a / b) for a, b in zip(values, others, strict=True)]
    spread = stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean(logs)), mean(logs) / spread if spread else 0.0


def table(results):
    rows = []
    for (name, act), values in results.items():
        if name == EXACT and act is None:
            continue  # the model itself
        velocity, latent, ratio = zip(*values, strict=True)
        against, t = (1.0, 0.0) if name == BASELINE else paired(velocity, [v for v, _, _ in results[BASELINE, act]])
        rows.append({"method": name, "inputs": "NVFP4" if act else "exact", "velocity %": 100 * mean(velocity),
                     "against convert_to_quant": against, "t": t, "latent %": 100 * mean(latent),
                     "PSNR dB": mean(ratio), "worst PSNR dB": min(ratio)})  # fmt: skip
    return rows


def summary(rows, worse):
    """The keys that the targets are stated in."""
    by = {(row["method"], row["inputs"]): row for row in rows}

    def pair(column, method, inputs, scale=1.0):
        return {"ours": by[method, inputs][column] * scale, "baseline": by[BASELINE, inputs][column] * scale}

    return {
        "velocity_weights_only": pair("velocity %", OURS, "exact", 0.01) | _ratio(by[OURS, "exact"]),
        "velocity_w4a4": pair("velocity %", SMOOTHED, "NVFP4", 0.01) | _ratio(by[SMOOTHED, "NVFP4"]),
        "velocity_w4a4_not_smoothed": pair("velocity %", OURS, "NVFP4", 0.01) | _ratio(by[OURS, "NVFP4"]),
        "velocity_w4a4_exact_weights": pair("velocity %", EXACT, "NVFP4", 0.01),
        "velocity_w4a4_absorb": pair("velocity %", ABSORB, "NVFP4", 0.01) | _ratio(by[ABSORB, "NVFP4"]),
        "latent_error": pair("latent %", OURS, "exact", 0.01),
        "velocity_weights_only_rank_32": pair("velocity %", "ours r32", "exact", 0.01)
        | _ratio(by["ours r32", "exact"]),
        "velocity_w4a4_absorb_rank_32": pair("velocity %", "ours r32, absorb", "NVFP4", 0.01),
        "psnr_db": pair("PSNR dB", OURS, "exact") | {"pairs_worse": worse},
        "worst_psnr_db": pair("worst PSNR dB", OURS, "exact"),
    }


def _ratio(row):
    return {"ratio": row["against convert_to_quant"], "t": row["t"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=16, help="unseen prompts and seeds (16)")
    parser.add_argument("--calibration", type=int, default=CALIBRATION, help=f"prompts of it ({CALIBRATION})")
    parser.add_argument("--moment", default="auto", choices=("auto", "full", "block"), help="kept of each input (auto)")
    parser.add_argument("--convert-to-quant", metavar="PYTHON", help="a Python that has it; else one is made in .cache")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    python = converter.environment(arguments.convert_to_quant)
    pairs = [(text, 100 + i) for i, text in enumerate(comfy_host.PROMPTS[: arguments.pairs])]
    source = Checkpoint(comfy_host.TINY)
    names = layers(source)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        methods = {BASELINE: theirs(source, names, python, folder)}
        sys.argv = sys.argv[:1]
        comfy_host.start(Path(folder))
        models = Path(folder) / "models" / "diffusion_models"
        (models / "tiny.safetensors").symlink_to(comfy_host.TINY)
        model = comfy_host.node("TesseraDiffusionModelLoader").execute("tiny.safetensors").args[0]
        calibration = comfy_host.calibrate(model, calibration_pairs(arguments.calibration), moment=arguments.moment)
        for method, (settings, strength) in METHODS.items():
            known = None if method in UNCALIBRATED else calibration
            methods[method] = ours(source, names, known, settings, strength)
        results = measure(model, methods, (None, "own"), pairs)
    rows = table(results)
    record.table(rows)
    worse = sum(a[2] < b[2] for a, b in zip(results[OURS, None], results[BASELINE, None], strict=True))
    if arguments.save:
        record.save("quality tiny", rows)
    if arguments.json:
        print(json.dumps(summary(rows, worse)))


if __name__ == "__main__":
    main()
