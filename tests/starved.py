"""Tessera in a process that may reserve only so much memory; and how much it really takes for a file of several GB.

python tests/starved.py MB tessera-arguments ...    # the command line with so much more than torch and the pack take
python tests/starved.py --load MB,MB,... FILE       # ComfyUI and the loader; JSON: what became of each try
python tests/starved.py --budget FOLDER [GB]        # quantizes a file of that size; JSON: peak against the budget
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
FEW_ARENAS = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}  # each arena reserves 64 MB that nobody uses
WIDTH = 8192  # of the big file's layers: 268 MB each in fp32
SPARE = 500e6  # of the budget in docs and design: 3 x the largest layer in fp32, and this


def reserved() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def limit(mb: float) -> None:
    """So many MB more than now, and no more."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (reserved() + int(mb * 1e6), hard))


def unlimited() -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def pack():
    sys.path.insert(0, str(TESTS))
    from conftest import load_pack

    return load_pack()


# The command line


def command(mb: float, arguments: list[str]) -> int:
    import torch

    pack()
    from tessera import cli

    torch.linalg.qr(torch.randn(64, 64))  # LAPACK takes its own when it is first used
    limit(mb)
    return cli.main(arguments)


def run(mb: float, *arguments: object) -> subprocess.CompletedProcess:
    """`tessera` with those arguments in a process with so much to spare."""
    program = [sys.executable, str(TESTS / "starved.py"), str(mb), *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, env=os.environ | FEW_ARENAS, timeout=500)


# The loader


def load(sizes: list[float], file: Path) -> list[dict]:
    """Loads the file with so many MB each, and once with all there is; what was raised, and how often it runs then."""
    import shutil
    import tempfile

    pack()
    import comfy_host

    found = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        comfy_host.start(base)
        shutil.copy(file, base / "models" / "diffusion_models" / file.name)
        loader = comfy_host.node("TesseraDiffusionModelLoader")
        import torch

        with torch.inference_mode():
            comfy_host.sample(loader.execute(file.name).args[0], steps=1)  # everything is imported
            for mb in [*sizes, None]:
                if mb is not None:
                    limit(mb)
                found.append(_try(mb, loader, file.name, comfy_host))
    return found


def _try(mb: float | None, loader, name: str, comfy_host) -> dict:
    row = {"mb": mb, "raised": None, "said": "", "typed": False}
    try:
        model = loader.execute(name).args[0]
    except Exception as problem:
        row |= {"raised": type(problem).__name__, "said": str(problem), "typed": isinstance(problem, RuntimeError)}
    unlimited()
    if row["raised"] is None:
        row["latent"] = comfy_host.sample(model, steps=1).double().sum().item()
    return row


# The budget


def big_file(path: Path, gb: float) -> int:
    """A source of about that size, layers of one random block and one small layer each; how many large ones."""
    import torch

    block = (torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    data = block.view(torch.uint8).numpy().tobytes()
    each, header, at = WIDTH * WIDTH * 2, {}, 0
    layers = max(2, round(gb * 1e9 / each))
    for index in range(layers):
        header[f"layers.{index}.feed_forward.w1.weight"] = {
            "dtype": "BF16", "shape": [WIDTH, WIDTH], "data_offsets": [at, at + each]}  # fmt: skip
        at += each
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(at // len(data)):
            file.write(data)
    return layers


def budget(folder: Path, gb: float) -> dict:
    """Peak of resident memory of `tessera quantize`, beyond what torch and the pack take, against the budget."""
    source, target, recipe = folder / "big.safetensors", folder / "small.safetensors", folder / "big.toml"
    layers = big_file(source, gb)
    recipe.write_text('default = "keep"\n[[rule]]\nnvfp4 = ["layers.{0-3}.**"]\nreason = "test"\n'
                      '[[rule]]\nint8 = ["layers.**"]\nreason = "test"\n')  # fmt: skip
    started = time.monotonic()
    program = [sys.executable, str(TESTS / "starved.py"), "--measure", str(source), "-o", str(target), "--recipe",
               str(recipe), "--rank", "0", "--simple"]  # fmt: skip
    done = subprocess.run(program, capture_output=True, text=True, env=os.environ | {"MALLOC_ARENA_MAX": "2"})
    if done.returncode:
        return {"failed": done.stderr[-2000:]}
    said = json.loads(done.stdout.splitlines()[-1])
    allowed = 3 * WIDTH * WIDTH * 4 + SPARE
    return {"gb": round(source.stat().st_size / 1e9, 2), "layers": layers, "seconds": round(time.monotonic() - started),
            "peak_mb": round(said["peak"] / 1e6), "before_mb": round(said["before"] / 1e6),
            "budget_mb": round(allowed / 1e6), "kept": said["peak"] <= allowed,
            "left": sorted(path.name for path in folder.iterdir())}  # fmt: skip


def measure(arguments: list[str]) -> int:
    import torch  # noqa: F401

    pack()
    from tessera import cli

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    code = cli.main(["quantize", *arguments])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"before": before, "peak": peak}))
    return code


def main(arguments: list[str]) -> int:
    if arguments[0] == "--measure":
        return measure(arguments[1:])
    if arguments[0] == "--budget":
        row = budget(Path(arguments[1]), float(arguments[2]) if arguments[2:] else 3.0)
        print(json.dumps(row))
        return 0 if row.get("kept") else 1
    if arguments[0] == "--load":
        print(json.dumps(load([float(size) for size in arguments[1].split(",")], Path(arguments[2]))))
        return 0
    return command(float(arguments[0]), arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
