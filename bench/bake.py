"""How long baking a LoRA takes and how much memory it needs, at a real shape. See bench/README.md."""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import record
import torch

record.load_pack()

from safetensors.torch import save_file  # noqa: E402

from tessera import additions  # noqa: E402
from tessera.baking import Bake  # noqa: E402
from tessera.checkpoint import Checkpoint  # noqa: E402
from tessera.job import Job  # noqa: E402
from tessera.quantization import recipe  # noqa: E402

OUT, IN, RANK = 10240, 3840, 32  # Z-Image's gate projection
NAME = "layers.0.feed_forward.w1"


def adapters():
    """Tensors of one file per kind, by what follows the layer's name."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return (torch.randn(shape, generator=generator) * 0.01).half()

    pair = {".lora_up.weight": noise(OUT, RANK), ".lora_down.weight": noise(RANK, IN)}
    return {"LoRA": pair, "DoRA": pair | {".dora_scale": torch.ones(OUT, 1)},
            "LoKr": {".lokr_w1": noise(64, 64), ".lokr_w2": noise(OUT // 64, IN // 64)},
            "difference": {".diff": noise(OUT, IN)}}  # fmt: skip


def timed(function, *arguments):
    started = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--save", action="store_true")
    arguments, rows = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        weight = (torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
        save_file({f"{NAME}.weight": weight}, folder / "original.safetensors")
        original = Checkpoint(folder / "original.safetensors")
        chosen = recipe.loads(f'default = "{arguments.format}"', arguments.format)
        _, alone = timed(Job(original, folder / "model.safetensors", chosen).run)
        model = Checkpoint(folder / "model.safetensors")
        for kind, tensors in adapters().items():
            path = folder / f"{kind}.safetensors"
            save_file({f"diffusion_model.{NAME}{suffix}": tensor for suffix, tensor in tensors.items()}, path)
            bake = Bake(model, [additions.read(path, 0.8, original)], original)
            _, target = timed(bake.source.weight, NAME)
            _, total = timed(bake.job(folder / f"{kind}_baked.safetensors").run)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            rows.append({"shape": f"{OUT}x{IN}", "format": arguments.format, "kind": kind, "target_s": target,
                         "bake_s": total, "quantize_s": alone, "peak_ram_gb": peak / 1e9})  # fmt: skip
    record.table(rows)
    if arguments.save:
        record.save("bake", rows)


if __name__ == "__main__":
    main()
