"""Our loader against the stock UNETLoader on one file, transcoding included, each in a fresh process."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import record
import torch

LAYERS = 6


def write_source(path):
    """Z-Image at its real width, 6 of the 30 main blocks, random bf16 weights."""
    from tessera.formats import TensorSpec
    from tessera.writer import Writer

    shapes = json.loads((record.ROOT / "tests" / "data" / "zimage_keys.json").read_text())
    blocks = {str(i) for i in range(LAYERS)}
    kept = {k: s for k, s in shapes.items() if not k.startswith("layers.") or k.split(".")[1] in blocks}
    specs = {key: TensorSpec(torch.bfloat16, tuple(shape)) for key, shape in kept.items()}
    with Writer(path, specs, reserve=64) as writer:
        for key, spec in specs.items():
            writer.write(key, (torch.randn(spec.shape) * 0.02).bfloat16())
        writer.finish({})
        writer.publish()


def child(loader, path):
    """Loads the file once in this process and prints seconds and resident bytes added."""
    sys.argv = [sys.argv[0], "--cpu", "--base-directory", str(Path(path).parent)]  # where its cache goes
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd

    record.load_pack()
    from tessera import host

    load = {
        "stock": comfy.sd.load_diffusion_model,
        "exact": lambda path: host.load_diffusion_model(path, speed="exact"),
        "auto": host.load_diffusion_model,
        "auto, cached": lambda path: host.load_diffusion_model(path, cache=True),
    }[loader]
    before, started = resident(), time.perf_counter()
    with torch.inference_mode():
        model = load(path)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "ram_gb": (resident() - before) / 1e9, "model_gb": model.model_size() / 1e9}))


def resident():
    """Resident bytes that are this process's own: mapped file pages, which either loader may hold, are left out."""
    return sum(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
               if line.startswith(("RssAnon", "RssShmem"))) * 1024  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="z_image_nvfp4")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--child", nargs=2)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        return child(*arguments.child)
    record.load_pack()
    from tessera.checkpoint import Checkpoint
    from tessera.job import Job
    from tessera.quantization import recipe
    from tessera.quantization.pipeline import Settings

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.safetensors", Path(folder) / "target.safetensors"
        write_source(source)
        settings = Settings(rank=0, rounding="nearest")
        Job(Checkpoint(source), target, recipe.find(arguments.recipe), settings=settings).run()
        runs = {"stock": [], "exact": [], "auto": [], "auto, cached": []}
        subprocess.run([sys.executable, __file__, "--child", "auto, cached", str(target)], check=True)  # fills it
        for _ in range(arguments.repeat):  # alternating, so that all meet the same page cache
            for loader, results in runs.items():
                command = [sys.executable, __file__, "--child", loader, str(target)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results.append(json.loads(output.splitlines()[-1]))
    rows = [{"loader": name, "file": arguments.recipe} | {k: median(r[k] for r in results) for k in results[0]}
            for name, results in runs.items()]  # fmt: skip
    for row in rows:
        row["x seconds"], row["x ram"] = row["seconds"] / rows[0]["seconds"], row["ram_gb"] / rows[0]["ram_gb"]
    record.table(rows)
    if arguments.save:
        record.save("load", rows)


if __name__ == "__main__":
    main()
