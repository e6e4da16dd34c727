"""Loads the pack by path, as ComfyUI does, under the name `tessera`."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"


def load_pack():
    if "tessera" in sys.modules:
        return sys.modules["tessera"]
    spec = importlib.util.spec_from_file_location(
        "tessera", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["tessera"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


load_pack()
