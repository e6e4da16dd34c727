"""How long quantizing takes and how much memory it needs, at real shapes. See bench/README.md."""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record
import torch

record.load_pack()


from tessera.formats import NVFP4, TensorSpec, parse  # noqa: E402
from tessera.quantization import lowrank, pipeline, scales  # noqa: E402
from tessera.writer import Writer  # noqa: E402

SHAPES = ((3840, 3840), (10240, 3840), (11520, 3840), (3840, 10240))
BLOCK = {"attention.qkv": (11520, 3840), "attention.out": (3840, 3840), "feed_forward.w1": (10240, 3840),
         "feed_forward.w3": (10240, 3840), "feed_forward.w2": (3840, 10240)}  # fmt: skip


def timed(function, *arguments):
    started = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - started


def layer(arguments):
    rows = []
    for shape in SHAPES:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
        for label in ("nvfp4", "mxfp8", "int8_convrot"):
            format = parse(label).for_shape(*shape)
            _, total = timed(pipeline.quantize, format, weight, pipeline.Settings(rank=32), 0)
            quantized, encode = timed(pipeline.encode, format, weight)
            decoded, decode = timed(format.decode, quantized)
            _, fit = timed(lowrank.fit, weight - decoded, 32)
            sweep = timed(scales.sweep, weight)[1] if isinstance(format, NVFP4) else 0.0
            rows.append({"shape": f"{shape[0]}x{shape[1]}", "format": format.label, "total_s": total, "sweep_s": sweep,
                         "encode_s": encode, "decode_s": decode, "low_rank_s": fit})  # fmt: skip
    return rows


def write_source(path, gigabytes):
    """A BF16 file of Z-Image's block linears, as many blocks as fill the size."""
    per_block = sum(2 * rows * columns for rows, columns in BLOCK.values())
    specs = {
        f"layers.{i}.{name}.weight": TensorSpec(torch.bfloat16, shape)
        for i in range(max(1, round(gigabytes * 1e9 / per_block)))
        for name, shape in BLOCK.items()
    }
    generator = torch.Generator().manual_seed(0)
    with Writer(path, specs, reserve=64) as writer:
        for key, spec in specs.items():
            writer.write(key, (torch.randn(spec.shape, generator=generator) * 0.02).bfloat16())
        writer.finish({})
        writer.publish()


def file(arguments):
    code = "import record, sys; record.load_pack(); from tessera.cli import main; sys.exit(main(sys.argv[1:]))"
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source, target = Path(folder) / "source.safetensors", Path(folder) / "target.safetensors"
        write_source(source, arguments.gigabytes)
        command = [sys.executable, "-c", code, "quantize", str(source), "-o", str(target), "--recipe", arguments.recipe]
        started = time.perf_counter()
        subprocess.run(command, check=True, cwd=Path(__file__).parent, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        return [{"recipe": arguments.recipe, "source_gb": source.stat().st_size / 1e9,
                 "target_gb": target.stat().st_size / 1e9, "seconds": seconds, "peak_ram_gb": peak / 1e9}]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("layer", "file"))
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--recipe", default="z_image_nvfp4")
    parser.add_argument("--folder", help="where the synthetic files go")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    rows = {"layer": layer, "file": file}[arguments.what](arguments)
    record.table(rows)
    if arguments.save:
        record.save(f"quantize {arguments.what}", rows)


if __name__ == "__main__":
    main()
