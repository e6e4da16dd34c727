"""A quantized Qwen3-4B-shaped text encoder in the real ComfyUI: our loader's auto and exact, and the stock one.

Each in a process of its own. See bench/README.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record
import torch

HIDDEN, FFN, HEADS, KV_HEADS, HEAD, WORDS = 2560, 9728, 32, 8, 128, 4096
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN), "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN),
}  # fmt: skip
OUTLIERS, OUTLIER = 8, 12.0  # channels of each norm, and how much larger they are
FORMATS = ("nvfp4", "mxfp8", "int8_convrot")
WAYS = ("auto", "exact", "stock")
PROMPT = "a red star above a lighthouse, oil on canvas, " * 6
SHORT = [7]


def write_source(path, layers):
    """bf16 weights: input channels of unequal size, norms with outlier channels, small writes to the residual."""
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draw)

    def norm():
        weight = (normal(HIDDEN) * 0.3).exp()
        weight[torch.randperm(HIDDEN, generator=draw)[:OUTLIERS]] *= OUTLIER
        return weight.bfloat16()

    tensors = {"model.embed_tokens.weight": (normal(WORDS, HIDDEN) * 0.03).bfloat16(), "model.norm.weight": norm()}
    for i in range(layers):
        base = f"model.layers.{i}"
        for name, (out, width) in LINEARS.items():
            size = 0.006 if name.endswith(("o_proj", "down_proj")) else 0.02
            tensors[f"{base}.{name}.weight"] = (normal(out, width) * (normal(width) * 0.3).exp() * size).bfloat16()
        for name in ("q_norm", "k_norm"):
            tensors[f"{base}.self_attn.{name}.weight"] = torch.ones(HEAD, dtype=torch.bfloat16)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{base}.{name}.weight"] = norm()
    save_file(tensors, path)


def child(way, path, layers, repeat, target):
    """Loads the file once and encodes; embeddings go to `target`, seconds and peak bytes to stdout."""
    device = [] if torch.cuda.is_available() else ["--cpu"]
    sys.argv = [sys.argv[0], *device]
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd

    record.load_pack()
    from tessera import host

    options = {"qwen3_4b_model_config": {"num_hidden_layers": layers, "vocab_size": WORDS}}
    kind = comfy.sd.CLIPType.LUMINA2
    resting = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    with torch.inference_mode():
        started = time.perf_counter()
        if way == "stock":
            clip = comfy.sd.load_clip([path], None, kind, options)
        else:
            clip = host.load_clip(path, kind, options, way)
        load = time.perf_counter() - started
        encode(clip, SHORT)  # moves the model to its device
        times = {"short": [], "prompt": []}
        for _ in range(repeat):
            for name, tokens in (("short", SHORT), ("prompt", words(clip))):
                started = time.perf_counter()
                found = encode(clip, tokens)
                times[name].append(time.perf_counter() - started)
    torch.save(found.float().cpu(), target)
    runs = {kernel for m in clip.cond_stage_model.modules() for kernel in getattr(m, "tessera_runs", ())}
    seconds = {"load s": load, "1 token s": min(times["short"]), "prompt s": min(times["prompt"])}
    peak = (memory("VmHWM") - resting) / 1e9
    print(json.dumps(seconds | {"peak GB": peak, "kernels": " ".join(sorted(runs)) or "-"}))


def words(clip):
    return [token % WORDS for token, *_ in clip.tokenize(PROMPT)["qwen3_4b"][0]]


def encode(clip, tokens):
    return clip.encode_from_tokens({"qwen3_4b": [[(token, 1.0) for token in tokens]]}, return_pooled=True)[0]


def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def quantize(source, folder, label):
    """All linear layers in one format, rounded to nearest, without a low-rank branch."""
    from tessera import formats
    from tessera.checkpoint import Checkpoint
    from tessera.job import Job
    from tessera.quantization import recipe
    from tessera.quantization.pipeline import Settings

    target = folder / f"{label}.safetensors"
    rule = recipe.Rule(formats.parse(label), ("**.{self_attn,mlp}.*_proj",), "bench")
    Job(Checkpoint(source), target, recipe.Recipe(label, "", (rule,)), settings=Settings(0, rounding="nearest")).run()
    return target


def run(way, path, arguments, folder):
    """(what the child measured, the prompt's embedding [1, tokens, 2560])."""
    saved = folder / "embedding.pt"
    command = [sys.executable, __file__, "--child", way, str(path), str(saved), "--layers", str(arguments.layers),
               "--repeat", str(arguments.repeat)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{way}: {path.name}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1]), torch.load(saved)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--layers", type=int, default=4, help="2 or more of Qwen3-4B's 36; the last is computed, not used"
    )
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        way, path, target = arguments.child
        return child(way, path, arguments.layers, arguments.repeat, target)
    record.load_pack()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "source.safetensors"
        write_source(source, arguments.layers)
        measured, truth = run("stock", source, arguments, folder)
        rows.append({"format": "bf16", "way": "stock"} | measured | {"cos mean": 1.0, "cos worst": 1.0})
        for label in arguments.formats.split(","):
            path = quantize(source, folder, label)
            for way in WAYS:
                measured, found = run(way, path, arguments, folder)
                cosine = torch.cosine_similarity(found[0].double(), truth[0].double(), dim=-1)
                rows.append({"format": label, "way": way} | measured
                            | {"cos mean": cosine.mean().item(), "cos worst": cosine.min().item()})  # fmt: skip
            path.unlink()
    record.table([{k: f"{v:.5f}" if k.startswith("cos") else v for k, v in row.items()} for row in rows])
    if arguments.save:
        record.save("text_encoder", rows)
    if arguments.json:
        print(json.dumps({"layers": arguments.layers, "tokens": truth.shape[1], "rows": rows}))


if __name__ == "__main__":
    main()
