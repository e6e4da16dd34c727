"""A pytest plugin for the host's own tests: `-p with_pack` loads the pack and its nodes into the host before they run.

With TESSERA_WITHOUT set it only prepares the host, so that both runs begin alike.
"""

import asyncio
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = True  # before anything asks for the device
    if not os.environ.get("TESSERA_WITHOUT"):
        nodes = asyncio.run(nodes_of(load("tessera_beside")))
        print(f"{len(nodes)} nodes of the pack are loaded")


def load(name):
    where = [str(ROOT)]
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=where)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def nodes_of(pack):
    """What ComfyUI does with a pack, to the schemas of its nodes."""
    extension = await pack.comfy_entrypoint()
    await extension.on_load()
    nodes = await extension.get_node_list()
    return [node.GET_SCHEMA() for node in nodes]
