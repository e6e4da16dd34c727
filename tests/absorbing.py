"""Absorb files as plain code makes them: the low rank is taken out of each weight first, the rest is quantized."""

import json

import torch
from safetensors.torch import load_file, save_file

from tessera import formats
from tessera.checkpoint import LAYER_ERRORS, PROVENANCE
from tessera.quantization import lowrank
from tessera.quantization.metrics import relative_error


def absorb(source, target, labels, rank=32, smoothed=(), prefix=""):
    """Writes `target`: the layers of `labels` (name -> format) of a plain file in absorb mode.

    Layers in `smoothed` get a `pre_quant_scale` besides: powers of two, so that no dtype rounds them.
    """
    tensors, records, errors = load_file(source), {}, {}
    for name, label in labels.items():
        key = f"{prefix}{name}"
        weight = tensors.pop(f"{key}.weight").float()
        branch = lowrank.fit(weight, rank).half()
        rest, scale = weight - branch.weight(), torch.ones(weight.shape[1])
        if name in smoothed:
            scale = torch.exp2(torch.arange(weight.shape[1]) % 4 - 2.0)
            tensors[f"{key}.pre_quant_scale"] = scale
        format = formats.parse(label).for_shape(*weight.shape)
        codes = format.encode(rest / scale)
        tensors |= {f"{key}.{suffix}": tensor.contiguous() for suffix, tensor in format.pack(codes).items()}
        tensors |= {f"{key}.absorb_up": branch.up, f"{key}.absorb_down": branch.down}
        tensors[f"{key}.comfy_quant"] = formats.marker(format.record())
        stored = format.decode(codes) * scale
        errors[name] = [relative_error(stored, weight), relative_error(branch.add_to(stored), weight)]
        records[key] = format.record()
    save_file(tensors, target, metadata={
        "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": records}),
        PROVENANCE: json.dumps({"mode": "absorb", "rank": rank}),
        LAYER_ERRORS: json.dumps(errors),
        "tessera_warning": "the low-rank branches inside this file are read by Tessera's loader only",
    })  # fmt: skip
    return target
