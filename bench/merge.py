"""What merging a LoRA into quantized weights leaves of it, and of the weight. See bench/README.md.

Runs the host's own rounding where COMFYUI_PATH says; else without that column.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import record
import torch

record.load_pack()

from tessera.formats import parse  # noqa: E402
from tessera.quantization import lowrank, scales, stochastic  # noqa: E402

FORMATS = ("nvfp4", "nvfp4 swept", "mxfp8", "int8_convrot")
SIZES = (0.0, 0.005, 0.02, 0.05)  # of a user's LoRA, relative to the weight's norm
RANK = 32


def encode(name, weight):
    """(format, codes): amax scales as ComfyUI's, or ours."""
    format = parse(name.split()[0]).for_shape(*weight.shape)
    return format, scales.encode(format, weight) if name.endswith("swept") else format.encode(weight)


def nearest(format, stored, weight):
    return format.decode(format.encode(weight))


def unbiased(format, stored, weight):
    return format.decode(stochastic.requantize(format, stored, weight, 1))


def beside(format, stored, weight):
    return weight


def dither(format, stored, weight):
    """As the host merges: packed by its own layout, with its stochastic rounding."""
    from comfy.quant_ops import QuantizedTensor

    convrot = getattr(format, "convrot", False)
    options = {"convrot": True, "convrot_groupsize": format.convrot_groupsize, "per_channel": True} if convrot else {}
    made = QuantizedTensor.from_float(weight.clone(), format.layout, scale="recalculate", stochastic_rounding=1,
                                      **options)  # fmt: skip
    return made.dequantize().float()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def user_lora(weight, size, generator):
    lora = torch.randn(len(weight), RANK, generator=generator) @ torch.randn(RANK, weight.shape[1], generator=generator)
    return lora * (size * weight.norm() / lora.norm())


def measure(weight, roundings):
    """Rows: what each rounding keeps of each LoRA, and the error of the whole."""
    rows = []
    for name in FORMATS:
        format, stored = encode(name, weight)
        decoded = format.decode(stored)
        loras = [("correction", lowrank.fit(weight - decoded, RANK).weight())]
        loras += [(f"{100 * size:g} %", user_lora(weight, size, torch.Generator().manual_seed(1))) for size in SIZES]
        for label, lora in loras:
            wanted = weight if label == "correction" else weight + lora
            row = {"format": name, "LoRA": label}
            for how, merge in (roundings | {"branch": beside}).items():
                merged = merge(format, stored, decoded + lora)
                applied, size = merged - decoded, lora.square().sum()
                if size:
                    row[f"{how}: retained"] = ((applied * lora).sum() / size).item()
                    row[f"{how}: noise"] = ((applied - lora).norm() / lora.norm()).item()
                else:
                    row[f"{how}: retained"] = row[f"{how}: noise"] = ""
                row[f"{how}: error"] = relative(merged, wanted)
            rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=768, help="rows and columns of the weight")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    roundings = {"nearest": nearest, "unbiased": unbiased}
    if os.environ.get("COMFYUI_PATH"):
        start()
        roundings = {"nearest": nearest, "dither": dither, "unbiased": unbiased}
    weight = torch.randn(options.size, options.size, generator=torch.Generator().manual_seed(0)) * 0.02
    with torch.inference_mode():
        rows = measure(weight, roundings)
    record.table(rows)
    if options.save:
        record.save("merge", rows)


def start():
    """The host's quantization alone."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.quant_ops

    assert Path(comfy.quant_ops.__file__).is_relative_to(os.environ["COMFYUI_PATH"])


if __name__ == "__main__":
    main()
