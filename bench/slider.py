"""What moving the correction's slider costs in the real ComfyUI, all 168 layers of Z-Image. See bench/README.md."""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import record
import torch

sys.path.insert(0, str(record.ROOT / "tests"))
record.load_pack()

import comfy_host  # noqa: E402
import synthetic  # noqa: E402


def milliseconds(function, *arguments):
    started = time.perf_counter()
    result = function(*arguments)
    return result, 1000 * (time.perf_counter() - started)


def moves(models, repeat):
    from tessera import host
    from tessera.checkpoint import Checkpoint
    from tessera.job import Job
    from tessera.quantization import recipe

    source = synthetic.save(models / "diffusion_models" / "source.safetensors", synthetic.hostable_zimage())
    target, lora = source.with_name("target.safetensors"), models / "loras" / "target_lora.safetensors"
    Job(Checkpoint(source), target, recipe.builtin("z_image_nvfp4"), lora).run()
    model = host.load_diffusion_model(str(target))
    (_, attached), first = milliseconds(host.attach_lora, model, str(lora), 1.0)
    times = {"read and attach": [first], "move": [], "words in the node": [], "hook": [], "unhook": []}
    for step in range(repeat):
        (moved, _), spent = milliseconds(host.attach_lora, model, str(lora), 0.1 + step / repeat)
        times["move"].append(spent)
        times["words in the node"].append(milliseconds(host.coverage, model, attached)[1])
        times["hook"].append(milliseconds(moved.inject_model)[1])
        times["unhook"].append(milliseconds(moved.eject_model)[1])
    return [{"what": what, "layers": len(attached.layers), "ms": median(values)} for what, values in times.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    sys.argv = sys.argv[:1]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        comfy_host.start(Path(folder))
        rows = moves(Path(folder) / "models", arguments.repeat)
    record.table(rows)
    if arguments.save:
        record.save("slider", rows)


if __name__ == "__main__":
    main()
