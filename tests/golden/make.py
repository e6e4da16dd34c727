"""Regenerates the golden files: tiny checkpoints written by the real convert_to_quant 1.2.6 and 1.3.4.

Developer tool, not run in CI. `python make.py WORKDIR [--only SUBSTRING]` with torch and comfy-kitchen installed;
WORKDIR receives one venv per converter version (about 1 GB each) and the converters' logs.

Not obvious:
- The mixed path replaces `--device cpu` by "cuda". The comparison is with the string "cpu", so `--device cpu:0`
  passes it and runs the converter's unmodified PyTorch code on the CPU: nothing is patched.
- Two outputs change from run to run: the LoRA files (svd_lowrank starts from unseeded noise) and the two bytes of
  the scaled_fp8 flag in legacy_e4m3 (torch.empty).
- convert_to_quant 1.2.6 and 1.3.4 write only comfy_quant markers. The legacy scaled_fp8 files start from a file
  built here (`legacy`) and are then rewritten by the converter's own clean-up mode.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"
# Imported by convert_to_quant but not among its requirements: kitchen (which imports packaging) by pure mxfp8,
# triton by plain int8 even on the CPU, where none of its kernels run.
UNDECLARED = [
    *("safetensors==0.8.0", "numpy==2.4.6", "tqdm==4.70.1", "scipy==1.17.1"),
    *("comfy-kitchen==0.2.40", "packaging==26.3", "triton==3.9.0"),
]
SEED = 20240607

SHAPES = {
    "source_zimage": {
        "x_pad_token": (1, 64),
        "cap_embedder.0.weight": (32,),
        "cap_embedder.1.weight": (64, 32),
        "cap_embedder.1.bias": (64,),
        "context_refiner.0.attention.qkv.weight": (96, 64),
        "noise_refiner.0.attention.out.weight": (64, 64),
        "layers.0.attention.q_norm.weight": (32,),
        "layers.0.attention.qkv.weight": (192, 64),
        "layers.0.attention.out.weight": (64, 64),
        "layers.0.feed_forward.w1.weight": (160, 192),  # several 128x4 scale tiles in both directions
        "layers.0.feed_forward.w2.weight": (128, 128),  # a zero row, a zero block, tiny blocks
        "layers.1.feed_forward.w3.weight": (100, 72),  # padded by both; in layers.0 the LoRA of 1.2.6 crashes on it
        "layers.1.attention.qkv.weight": (48, 80),  # 5 blocks of 16, 2.5 blocks of 32
        "layers.1.feed_forward.w2.weight": (40, 72),  # all zero
        "layers.1.adaLN_modulation.0.weight": (64, 32),  # multiples of 32: bias correction crashes on padded layers
        "layers.1.adaLN_modulation.0.bias": (64,),
    },
    "source_int8": {
        "layers.0.attention.qkv.weight": (64, 256),
        "layers.0.attention.out.weight": (48, 80),  # divisible by 16, not by 64
        "layers.0.feed_forward.w1.weight": (32, 192),  # divisible by 64, not by 256
        "layers.0.feed_forward.w2.weight": (64, 128),  # a zero row, a zero block, tiny blocks
        "layers.0.feed_forward.w3.weight": (50, 72),  # divisible by neither
        "layers.0.attention.q_norm.weight": (32,),
        "layers.1.feed_forward.w2.weight": (40, 128),  # all zero
        "layers.1.adaLN_modulation.0.weight": (48, 64),
        "layers.1.adaLN_modulation.0.bias": (48,),
    },
    "source_qwen": {
        "model.embed_tokens.weight": (96, 64),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.self_attn.k_proj.weight": (32, 64),
        "model.layers.0.self_attn.q_norm.weight": (16,),
        "model.layers.0.mlp.down_proj.weight": (64, 128),
        "model.layers.0.post_attention_layernorm.weight": (64,),
        "model.norm.weight": (64,),
    },
    "source_wide": {"layers.0.attention.out.weight": (16, 512)},  # for a group size that is no power of 4
    "source_small": {
        "layers.0.attention.out.weight": (64, 128),
        "layers.0.feed_forward.w2.weight": (128, 64),
        "layers.0.attention_norm1.weight": (64,),
    },
}
ALL_ZERO = "layers.1.feed_forward.w2.weight"
SPARSE = "layers.0.feed_forward.w2.weight"

META = "--comfy_quant --save-quant-metadata"
MIXED = (
    f"--nvfp4 --zimage --custom-type mxfp8 --device cpu:0 {META} "
    r"--custom-layers 'layers\.0\.feed_forward\.w1\.weight|context_refiner\.0\.attention\.qkv|layers\.1\.adaLN' "
    r"--exclude-layers 'noise_refiner\.0'"
)
PREFIXED = r"--nvfp4 --zimage --custom-type mxfp8 --device cpu:0 --custom-layers 'layers\.0\.attention\.out' " + META
RTN = "--simple --custom-simple"
LEARNED = "--num-iter 60 --manual_seed 1"
ROW = f"--int8 --scaling_mode row --simple --manual_seed 1 {META}"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Case:
    """One converter run: `source` (+ key `prefix`) -> `name`."""

    name: str
    version: str
    source: str
    flags: str
    rounding: str = "nearest"
    prefix: str = ""
    lora: bool = False
    legacy: torch.dtype | None = None  # build a scaled_fp8 file of this dtype first
    input: str = ""  # another golden file instead of the source
    note: str = ""


CASES = [
    Case(
        "ctq126_mixed",
        "1.2.6",
        "source_zimage",
        f"{MIXED} {RTN} --manual_seed 1 --extract-lora --lora-rank 4",
        lora=True,
    ),
    Case(
        "ctq126_mixed_prefixed",
        "1.2.6",
        "source_small",
        f"{PREFIXED} {LEARNED} --extract-lora --lora-rank 4",
        rounding="learned",
        prefix="model.diffusion_model.",
        lora=True,
        note="LoRA keys carry the prefix twice",
    ),
    Case("ctq134_mixed", "1.3.4", "source_zimage", f"{MIXED} {RTN} --manual_seed 1"),
    Case("ctq134_nvfp4", "1.3.4", "source_zimage", f"--nvfp4 --zimage --simple --manual_seed 1 {META}"),
    Case("ctq134_mxfp8", "1.3.4", "source_zimage", f"--mxfp8 --zimage --simple --manual_seed 1 {META}"),
    Case(
        "ctq134_int8_tensor",
        "1.3.4",
        "source_int8",
        f"--int8 --scaling_mode tensor --block_size 32 --simple --manual_seed 1 {META}",
        note="without --block_size an all-zero weight crashes the converter; with it, its scale is one per 32x32",
    ),
    Case("ctq134_int8_row", "1.3.4", "source_int8", ROW),
    Case("ctq134_int8_convrot16", "1.3.4", "source_int8", f"{ROW} --convrot --convrot-group-size 16"),
    Case("ctq134_int8_convrot64", "1.3.4", "source_int8", f"{ROW} --convrot --convrot-group-size 64"),
    Case("ctq134_int8_convrot256", "1.3.4", "source_int8", f"{ROW} --convrot"),
    Case(
        "ctq134_int8_qwen",
        "1.3.4",
        "source_qwen",
        f"{ROW} --convrot --convrot-group-size 64",
        note="model.embed_tokens is quantized too",
    ),
    Case("ctq134_fp8", "1.3.4", "source_int8", f"--simple --manual_seed 1 {META}"),
    Case(
        "legacy_e4m3",
        "1.3.4",
        "source_small",
        "--cleanup-fp8-scaled --scaled-fp8-marker 2 --input_scale",
        legacy=E4M3,
    ),
    Case("legacy_e5m2", "1.3.4", "source_small", "--legacy_input_add", legacy=E5M2),
    Case("legacy_converted", "1.3.4", "source_small", "--convert-fp8-scaled", legacy=E4M3),
    Case(
        "mislabel_nvfp4",
        "1.3.4",
        "source_small",
        f"--simple --manual_seed 1 --layer-config layers.json {META}",
        note="fp8 tensors marked nvfp4 and mxfp8",
    ),
    Case(
        "refuse_int8_blockwise",
        "1.3.4",
        "source_small",
        f"--int8 --scaling_mode block --block_size 64 --simple --manual_seed 1 {META}",
    ),
    Case("refuse_fp8_rowwise", "1.3.4", "source_small", f"--scaling_mode row --simple --manual_seed 1 {META}"),
    Case(
        "refuse_fp8_blockwise",
        "1.3.4",
        "source_small",
        f"--scaling_mode block --block_size 64 --simple --manual_seed 1 {META}",
    ),
    Case("refuse_convrot_512", "1.3.4", "source_wide", f"{ROW} --convrot --convrot-group-size 512"),
    Case("small_mxfp8", "1.3.4", "source_small", f"--mxfp8 --simple --manual_seed 1 {META}"),
    Case("refuse_hybrid_mxfp8", "1.3.4", "source_small", "--make-hybrid-mxfp8", input="small_mxfp8"),
]
LAYER_CONFIG = {
    "attention": {"format": "nvfp4", "simple": True},
    "feed_forward": {"format": "mxfp8", "simple": True},
}


def make_source(name):
    """Seeded bf16 tensors: weights N(0, 0.02) with a few outlier columns, norms near 1, the edge cases of SHAPES."""
    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    for key, shape in SHAPES[name].items():
        value = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            value = value * 0.1 + (0.0 if key.endswith("bias") else 1.0)
        else:
            value = value * 0.02
            value[:, 3::37] *= 12
        if key == ALL_ZERO:
            value.zero_()
        if key == SPARSE and name != "source_small":
            value[5] = 0
            value[8:24, 32:64] = 0
            value[40:48, :32] *= 1e-6
        tensors[key] = value.to(torch.bfloat16)
    return tensors


def legacy(source, dtype):
    """The scaled_fp8 layout of 2024: `scale_weight`, no markers, one flag tensor."""
    tensors = {"scaled_fp8": torch.zeros(0, dtype=dtype)}
    for key, value in source.items():
        if value.ndim == 2:
            scale = value.float().abs().max() / torch.finfo(dtype).max
            tensors[key] = (value.float() / scale).to(dtype)
            tensors[key.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
        else:
            tensors[key] = value
    return tensors


def converter(workdir, version):
    """Path of the `ctq` command of that version, installed on first use."""
    home = workdir / f"ctq-{version}"
    if not (home / "bin" / "ctq").exists():
        venv.create(home, with_pip=True)
        pip = [home / "bin" / "python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, TORCH], check=True)  # first, or its CUDA packages come along
        subprocess.run([*pip, f"convert_to_quant=={version}", *UNDECLARED], check=True)
    return (home / "bin" / "ctq").absolute()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_markers(path):
    """Layer -> {"tensor": its comfy_quant JSON, "header": its header JSON}, whichever exist."""
    with safe_open(path, "pt") as f:
        header = json.loads((f.metadata() or {}).get("_quantization_metadata", "{}")).get("layers", {})
        suffix = ".comfy_quant"
        keys = [k for k in f.keys() if k.endswith(suffix)]  # noqa: SIM118 - safe_open is no mapping
        markers = {k.removesuffix(suffix): {"tensor": json.loads(bytes(f.get_tensor(k).tolist()))} for k in keys}
    for layer, entry in header.items():
        markers.setdefault(layer, {})["header"] = entry
    return markers


def kitchen_dequantize(fmt, marker, tensors, layer, shape):
    """fp32 weight by comfy-kitchen's eager dequantizer, None where kitchen has no such layout."""
    from comfy_kitchen.tensor import (
        TensorCoreFP8Layout,
        TensorCoreMXFP8Layout,
        TensorCoreNVFP4Layout,
        TensorWiseINT8Layout,
    )

    qdata = tensors[f"{layer}.weight"]
    scale = tensors.get(f"{layer}.weight_scale", tensors.get(f"{layer}.scale_weight"))
    common = {"orig_dtype": torch.float32, "orig_shape": shape}
    if fmt == "nvfp4":
        layout = TensorCoreNVFP4Layout
        params = layout.Params(scale=tensors[f"{layer}.weight_scale_2"], block_scale=scale, **common)
    elif fmt == "mxfp8":
        layout = TensorCoreMXFP8Layout
        scale = scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale
        params = layout.Params(scale=scale, **common)
    elif fmt == "int8_tensorwise":
        layout = TensorWiseINT8Layout
        group = marker.get("convrot_groupsize", 256)
        params = layout.Params(scale=scale, convrot=marker.get("convrot", False), convrot_groupsize=group, **common)
    elif fmt.startswith("float8") and scale.numel() == 1:
        layout = TensorCoreFP8Layout
        params = layout.Params(scale=scale, **common)
    else:
        return None
    return layout.dequantize(qdata, params)[: shape[0], : shape[1]]


def rel_l2(weight, source):
    """Relative L2 error with 6 digits; an all-zero source gives 0 if reproduced."""
    error, norm = (weight - source).norm().item(), source.norm().item()
    return float(f"{error / norm if norm else error:.6g}")


def measure(case, path, lora_path, source):
    """Per quantized layer: its markers, and what kitchen's dequantized weight differs from the source."""
    tensors = load_file(path)
    lora = load_file(lora_path) if lora_path else {}
    found = read_markers(path)
    if case.legacy and not found:
        found = {key.removesuffix(".scale_weight"): {} for key in tensors if key.endswith(".scale_weight")}
    layers = {}
    for layer, markers in sorted(found.items()):
        marker = markers.get("tensor", {"format": "float8"})
        weight = source[layer.removeprefix(case.prefix) + ".weight"].float()
        row = {"markers": markers}
        try:
            result = kitchen_dequantize(marker["format"], marker, tensors, layer, tuple(weight.shape))
        except (RuntimeError, ValueError, KeyError, AssertionError) as err:
            row["kitchen_error"] = f"{type(err).__name__}: {str(err).splitlines()[0]}"
            result = None
        if result is not None and not result.isfinite().all():
            row["kitchen_error"] = "dequantizes to NaN"
        elif result is not None:
            row["rel_l2"] = rel_l2(result, weight)
            up = lora.get(f"diffusion_model.{layer}.lora_up.weight")
            if up is not None:
                row["rel_l2_with_lora"] = rel_l2(
                    result + up @ lora[f"diffusion_model.{layer}.lora_down.weight"], weight
                )
        layers[layer] = row
    return layers


def run(case, workdir):
    """Runs one converter command in WORKDIR, copies its files here, returns the golden.json record."""
    source = load_file(HERE / f"{case.source}.safetensors")
    given = f"{case.input or case.source}.safetensors"
    if case.input:
        (workdir / given).write_bytes((HERE / given).read_bytes())
    elif case.legacy:
        given = f"{case.name}_input.safetensors"
        save_file(legacy(source, case.legacy), workdir / given)
    else:
        given = f"prefixed_{given}" if case.prefix else given
        save_file({case.prefix + key: value for key, value in source.items()}, workdir / given)
    names = [f"{case.name}.safetensors"] + ([f"{case.name}_lora.safetensors"] if case.lora else [])
    for name in names:
        (workdir / name).unlink(missing_ok=True)  # the converter exits 0 even when it writes nothing
    command = ["-i", given, "-o", names[0], *shlex.split(case.flags)]
    log = workdir / f"{case.name}.log"
    with log.open("w") as out:
        subprocess.run(
            [converter(workdir, case.version), *command],
            cwd=workdir,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            stdout=out,
            stderr=subprocess.STDOUT,
            check=True,
        )
    for name in names:
        if not (workdir / name).exists():
            raise RuntimeError(f"{case.name}: the converter wrote no {name}, see {log}")
        (HERE / name).write_bytes((workdir / name).read_bytes())
    record = {
        "tool": f"convert_to_quant {case.version}",
        "torch": TORCH.removeprefix("torch=="),
        "command": "ctq " + shlex.join(command),
        "source": case.source,
        "prefix": case.prefix,
        "rounding": case.rounding,
    }
    if case.note:
        record["note"] = case.note
    record["sha256"] = {name: sha256(HERE / name) for name in names}
    record["layers"] = measure(case, HERE / names[0], HERE / names[1] if case.lora else None, source)
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, help="folder for the converters' environments and logs")
    parser.add_argument("--only", default="", help="regenerate the files whose name contains this")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    (args.workdir / "layers.json").write_text(json.dumps(LAYER_CONFIG))

    index = HERE / "golden.json"
    old = json.loads(index.read_text())["files"] if index.exists() else {}
    for name in SHAPES:
        (HERE / f"{name}.safetensors").write_bytes(save(make_source(name)))
    files = {}
    for case in CASES:
        if args.only in case.name:
            print(case.name, file=sys.stderr)
            files[case.name] = run(case, args.workdir)
        elif case.name in old:
            files[case.name] = old[case.name]
    sources = {name: sha256(HERE / f"{name}.safetensors") for name in SHAPES}
    golden = {"kitchen": "0.2.40", "layer_config": LAYER_CONFIG, "sources": sources, "files": files}
    index.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
