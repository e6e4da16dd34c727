"""One Z-Image block of real width in the real ComfyUI: ours, stock operations, BF16 weights. See bench/README.md."""

import argparse
import json
import os
import sys
import time
from statistics import median

import record
import torch

DIM, HEADS, HEAD_DIM = 3840, 30, 128
LINEARS = {"attention.qkv": (11520, DIM), "attention.out": (DIM, DIM), "feed_forward.w1": (10240, DIM),
           "feed_forward.w3": (10240, DIM), "feed_forward.w2": (DIM, 10240)}  # fmt: skip
RECIPES = {
    "nvfp4": dict.fromkeys(LINEARS, "nvfp4"),
    "z_image_nvfp4": dict.fromkeys(LINEARS, "nvfp4") | {"feed_forward.w1": "mxfp8"},
    "mxfp8": dict.fromkeys(LINEARS, "mxfp8"),
    "int8_convrot": dict.fromkeys(LINEARS, "int8_convrot"),
    "int8_convrot_64": dict.fromkeys(LINEARS, "int8_convrot_64"),
}


def start():
    """ComfyUI in this process, on the GPU if there is one."""
    sys.argv = [sys.argv[0]] + ([] if torch.cuda.is_available() else ["--cpu"])
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.ops

    record.load_pack()


def weights():
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in LINEARS.items()}
    norms = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
    rest = {f"{name}.weight": torch.ones(DIM) for name in norms}
    rest |= {f"attention.{n}_norm.weight": torch.ones(HEAD_DIM) for n in "qk"}
    rest |= {"adaLN_modulation.0.weight": torch.randn(4 * DIM, 256, generator=generator) * 0.02,
             "adaLN_modulation.0.bias": torch.zeros(4 * DIM)}  # fmt: skip
    return found, rest


def state_dict(linears, rest, recipe, dtype):
    """The block's entries as a file holds them; recipe None: not quantized."""
    from tessera import formats

    found = {key: value.to(dtype) for key, value in rest.items()}
    for name, weight in linears.items():
        if recipe is None:
            found[f"{name}.weight"] = weight.to(dtype)
            continue
        format = formats.parse(recipe[name]).for_shape(*weight.shape)
        entries = format.pack(format.encode(weight)) | {"comfy_quant": formats.marker(format.record())}
        found |= {f"{name}.{suffix}": tensor for suffix, tensor in entries.items()}
    return found


def block(operations, entries, device, dtype):
    from comfy.ldm.lumina.model import JointTransformerBlock

    settings = {"operations": operations, "device": device, "dtype": dtype}
    made = JointTransformerBlock(0, DIM, HEADS, HEADS, 256, 8 / 3, 1e-5, True, z_image_modulation=True,
                                 operation_settings=settings)  # fmt: skip
    made.load_state_dict(entries, strict=False)
    return made.to(device).eval()


class Patcher:
    """What wiring asks of a patcher: the model."""

    def __init__(self, model):
        self.model = model


def contestants(arguments, device, dtype):
    """{name: block}: ours, ours with a branch on each layer, the stock operations on the same file, BF16."""
    import comfy.ops

    from tessera.adapters import Change, LoRA, form
    from tessera.branch import Branches, Part, Strengths
    from tessera.host import operations as ours
    from tessera.host.wiring import Wiring, sharing
    from tessera.kernels.facts import read_facts
    from tessera.quantization.lowrank import LowRank

    linears, rest = weights()
    recipe, facts = RECIPES[arguments.recipe], read_facts(device, dtype)
    entries = state_dict(linears, rest, recipe, dtype)
    native = {name for name in ("nvfp4", "mxfp8") if (facts.sm or (0, 0)) >= (10, 0)}
    stock = comfy.ops.mixed_precision_ops({}, dtype, disabled={"nvfp4", "mxfp8"} - native)
    loading = ours.Loading(facts, device=str(device))
    found = {
        "ours": block(ours.operations(dtype, loading), dict(entries), device, dtype),
        "ours_branch": block(
            ours.operations(dtype, ours.Loading(facts, device=str(device))), dict(entries), device, dtype
        ),
        "stock": block(stock, dict(entries), device, dtype),
        "bf16": block(comfy.ops.manual_cast, state_dict(linears, rest, None, torch.bfloat16), device, torch.bfloat16),
    }
    for name in ("ours", "ours_branch"):
        Wiring().inject(Patcher(found[name]))
    parts = {}
    for name, (n, k) in LINEARS.items():
        pair = LowRank(torch.randn(n, arguments.rank) * 0.01, torch.randn(arguments.rank, k) * 0.01)
        pair = LowRank(pair.up.to(device, dtype), pair.down.to(device, dtype))
        parts[name] = [Part(0, form(Change(LoRA(pair)), (n, k), None), exact=False)]
    branches = Branches(parts, LINEARS, comfy.ops.manual_cast.Linear, sharing(found["ours_branch"])).build()
    for name, item in zip(branches.layers, branches.items, strict=True):
        found["ours_branch"].get_submodule(name).attach_branch(item, Strengths([1.0]))
    return found, loading


def once(call, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--m", type=int, default=512, help="tokens (4608 is a picture of 1024 x 1024 with its prompt)")
    parser.add_argument("--recipe", default="z_image_nvfp4", choices=RECIPES)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--dtype", default=None, choices=["bf16", "fp16", "fp32"], help="of activations (the host's own)"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    start()
    device = torch.device(arguments.device)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype = dtypes[arguments.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    with torch.inference_mode():
        found, loading = contestants(arguments, device, dtype)
        x = torch.randn(1, arguments.m, DIM).to(device, dtype)
        freqs = torch.eye(2).repeat(1, arguments.m, 1, HEAD_DIM // 2, 1, 1).to(device)
        adaln = torch.randn(1, 256).to(device, dtype)
        calls = {name: (lambda b=b: b(x, None, freqs, adaln)) for name, b in found.items()}
        outputs = {name: call() for name, call in calls.items()}
        times = {name: [] for name in calls}
        for _ in range(arguments.repeat):
            for name, call in calls.items():
                times[name].append(once(call, device))
    ms = {name: median(values) for name, values in times.items()}
    truth = outputs["stock"].float()
    row = {"recipe": arguments.recipe, "m": arguments.m, "dtype": str(dtype).removeprefix("torch."),
           "ours_ms": ms["ours"], "host_ms": ms["stock"], "bf16_ms": ms["bf16"], "branch_ms": ms["ours_branch"],
           "host_over_ours": ms["stock"] / ms["ours"], "bf16_over_ours": ms["bf16"] / ms["ours"],
           "branch_overhead": ms["ours_branch"] / ms["ours"] - 1,
           "distance_to_host": ((outputs["ours"].float() - truth).norm() / truth.norm()).item()}  # fmt: skip
    record.table([row])
    for name, (label, plan) in loading.plans.items():
        print(f"{name}: {label}: {plan}")
    if arguments.save:
        record.save(f"block_{arguments.recipe}_{arguments.m}", [row])
    if arguments.json:
        print(json.dumps([row]))


if __name__ == "__main__":
    main()
