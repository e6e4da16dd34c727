"""Each kind of LoRA beside the weight and merged by ComfyUI: the table of docs/loras.md. See bench/README.md."""

import argparse
import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import record
import torch

sys.path.insert(0, str(record.ROOT / "tests"))
record.load_pack()

import comfy_host  # noqa: E402
import lora_files  # noqa: E402
import lora_models  # noqa: E402
import lora_reference as reference  # noqa: E402

STRENGTH, ROWS = 1.0, 256
FORMATS = ("nvfp4", "mxfp8", "int8_convrot")


@dataclass
class Errors:
    """Relative L2 of a layer's output to the fp32 truth; `cosine` of what merging changed to what was wanted."""

    size: float  # of the change itself
    ours: float
    merged: float
    cosine: float


def errors(models, name, format):
    """{kind: [Errors of a layer]} of all block layers that are in this format."""
    import nodes

    from tessera import host

    path, file = lora_models.every_kind(models, name), lora_models.file_of(models, name, format)
    model = lora_models.load("stock", file)  # nvfp4 and mxfp8 are decoded there: what is left is the LoRA's own error
    base = reference.weights(model)
    wanted, kinds = reference.changed(model, [(path, STRENGTH)], base), kinds_of(model, name)
    generator = torch.Generator().manual_seed(1)
    inputs = {layer: torch.randn(1, ROWS, base[f"{layer}.weight"].shape[1], generator=generator) for layer in kinds}
    alone = reference.outputs(model, inputs)
    ours = reference.outputs(host.attach_file(model, str(path), STRENGTH)[0], inputs)
    merged = nodes.LoraLoaderModelOnly().load_lora_model_only(model, path.name, STRENGTH)[0]
    merged, found = reference.outputs(merged, inputs), {}
    for layer, kind in kinds.items():
        truth = reference.product(wanted, layer, inputs[layer])
        effect = truth - reference.product(base, layer, inputs[layer])
        cosine = torch.cosine_similarity((merged[layer] - alone[layer]).flatten(), effect.flatten(), dim=0).item()
        off = [comfy_host.relative(output[layer], truth) for output in (ours, merged)]
        found.setdefault(kind, []).append(Errors((effect.norm() / truth.norm()).item(), *off, cosine))
    return found


def kinds_of(model, name):
    """{layer: kind} of the block layers in the model's most frequent format; bias differences are no merging."""
    modules = {layer: model.model.get_submodule(f"diffusion_model.{layer}") for layer in lora_models.BLOCKS[name]}
    [(layout, _)] = Counter(module.layout_type for module in modules.values()).most_common(1)
    return {
        f"diffusion_model.{layer}": kind
        for kind, layers in lora_models.layers_by_kind(name).items() if kind in lora_files.KINDS
        for layer in layers if layer in modules and modules[layer].layout_type == layout
    }  # fmt: skip


def table(models):
    rows = {}
    for format in FORMATS:
        for name in lora_models.MODELS:
            for kind, found in errors(models, name, format).items():
                rows.setdefault(kind, {}).setdefault(format, []).extend(found)
    return [_row(kind, rows[kind]) for kind in lora_files.KINDS]


def _row(kind, formats):
    row = {"kind": kind, "change %": _percent(formats["nvfp4"], "size")}
    for format in FORMATS:
        row[f"{format}: beside %"] = _percent(formats[format], "ours")
        row[f"{format}: merged %"] = _percent(formats[format], "merged")
        if format == "nvfp4":
            row["nvfp4: merged cos"] = round(mean(e.cosine for e in formats[format]), 2)
    return row


def _percent(found, field):
    return round(100 * mean(getattr(e, field) for e in found), 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    sys.argv = sys.argv[:1]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        comfy_host.start(Path(folder))
        rows = table(Path(folder) / "models")
    record.table(rows)
    if arguments.json:
        print(json.dumps(rows))
    if arguments.save:
        record.save("lora_merge_table", rows)


if __name__ == "__main__":
    main()
