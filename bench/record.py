"""Where bench numbers go: one JSON per day and device, with the versions that made them."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def load_pack():
    """The pack as the package `tessera`, by path, as ComfyUI loads it."""
    where = [str(ROOT)]
    spec = importlib.util.spec_from_file_location("tessera", ROOT / "__init__.py", submodule_search_locations=where)
    sys.modules["tessera"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def device_name():
    return torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "cpu"


def environment():
    versions = {n: importlib.metadata.version(n) for n in ("torch", "comfy-kitchen", "safetensors", "numpy")}
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return versions | {"python": platform.python_version(), "device": device_name(), "cpu": cpu,
                       "threads": torch.get_num_threads(), "cores": os.cpu_count()}  # fmt: skip


def save(name, rows):
    """Puts rows under `name` in today's file, keeping what other benches wrote there."""
    path = ROOT / "bench" / "results" / f"{date.today()}-{device_name()}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored[name] = {"environment": environment(), "rows": rows}
    path.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"saved to {path.relative_to(ROOT)}")


def table(rows):
    keys = list(rows[0])
    print("| " + " | ".join(keys) + " |\n|" + "-|" * len(keys))
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


def _cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
