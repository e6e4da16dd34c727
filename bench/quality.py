"""Tiny Z-Image in the real ComfyUI: what each recipe loses and what its correction gives back. See bench/README.md."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import mean

import record
import torch

sys.path.insert(0, str(record.ROOT / "tests"))
record.load_pack()

import comfy_host  # noqa: E402

RECIPES = ("z_image_nvfp4", "z_image_mxfp8", "int8_convrot")


def quantize(models, recipe_name):
    from tessera.checkpoint import Checkpoint
    from tessera.job import Job
    from tessera.quantization import recipe

    names = {
        "bf16": "tiny.safetensors",
        "model": f"{recipe_name}.safetensors",
        "lora": f"{recipe_name}_lora.safetensors",
    }
    chosen = recipe.builtin(recipe_name)
    return names, Job(
        Checkpoint(comfy_host.TINY),
        models / "diffusion_models" / names["model"],
        chosen,
        models / "loras" / names["lora"],
    ).run()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    pairs = [(text, 100 + i) for i, text in enumerate(comfy_host.PROMPTS[: arguments.pairs])]
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        sys.argv = sys.argv[:1]
        comfy_host.start(Path(folder))
        models = Path(folder) / "models"
        shutil.copy(comfy_host.TINY, models / "diffusion_models" / "tiny.safetensors")
        for recipe_name in RECIPES:
            names, report = quantize(models, recipe_name)
            reference, variants = comfy_host.variants(names)
            for strength, results in comfy_host.measure(reference, variants, pairs).items():
                velocity, latent, psnr = (mean(values) for values in zip(*results, strict=True))
                rows.append({"recipe": recipe_name, "MB": report.model_bytes / 1e6, "strength": strength,
                             "velocity %": 100 * velocity, "latent %": 100 * latent, "PSNR dB": psnr})  # fmt: skip
    record.table(rows)
    if arguments.save:
        record.save("quality", rows)


if __name__ == "__main__":
    main()
