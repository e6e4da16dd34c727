"""Loads the pack by path, as ComfyUI does, under the name `tessera`."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import comfy_host

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


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The real ComfyUI in this process; its models folder. Everything runs in inference mode, as in its executor."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: run scripts/test, or scripts/setup_host.py")
    base = tmp_path_factory.mktemp("comfyui")
    comfy_host.start(base)
    with torch.inference_mode():
        yield base / "models"


@pytest.fixture(scope="session")
def tiny(models):
    """The tiny Z-Image quantized with the NVFP4 recipe in the host's folders: {bf16, model, lora} -> file name."""
    from tessera.checkpoint import Checkpoint
    from tessera.job import Job
    from tessera.quantization import recipe

    shutil.copy(comfy_host.TINY, models / "diffusion_models" / "tiny.safetensors")
    target = models / "diffusion_models" / "tiny_nvfp4.safetensors"
    lora = models / "loras" / "tiny_nvfp4_lora.safetensors"
    Job(Checkpoint(comfy_host.TINY), target, recipe.builtin("z_image_nvfp4"), lora).run()
    return {"bf16": "tiny.safetensors", "model": target.name, "lora": lora.name}


BROWSER = "tests/browser/"  # files that share one browser, so one process
LONG = (  # files of few tests that take minutes of a core: begun last, they would keep one process busy alone
    "test_demo", "test_host_workflows", "test_host_units", "test_host_soak", "test_host_surface", "test_host_compare",
    "test_host_live", "test_memory_limits", "test_notebook", "test_newest_kitchen", "test_host_mosaic", "test_resume",
    "test_cli", "test_host_quality", "test_compile",
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Whole files to a process, in the order below; those of the browser as if they were one."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return BROWSER if BROWSER in file else file

    return Files(config, log)


def pytest_collection_modifyitems(items):
    """Long files first. Processes take files in this order (`--no-loadscope-reorder` in scripts/run_tests.py)."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: -1 if BROWSER in item.nodeid else places.get(item.path.stem, len(LONG)))
