"""Every name of ComfyUI that the pack leans on is there, or the test says which is gone and who leaned on it.

Also for a second host, whose folder is COMFYUI_PATH2 and whose interpreter COMFYUI_PYTHON2, ours by default.
"""

import ast
import functools
import json
import os
import subprocess
import sys

import pytest

import host_surface
from conftest import ROOT

pytestmark = pytest.mark.host

USES = host_surface.uses()
MODULES = sorted({use.module for use in USES})
HOSTS = [name for name in ("COMFYUI_PATH", "COMFYUI_PATH2") if os.environ.get(name)]
GONE = {  # names of each kind of use -> a module that must be named
    "comfy.ops.uncast_bias_weight": "host/planned.py",
    "comfy.patcher_extension.PatcherInjection": "host/wiring.py",
    "folder_paths.get_user_directory": "host/settings.py",
    "comfy.ldm.lumina.model.FeedForward": "host/wiring.py",
    "ModelPatcher.set_injections": "host/recording.py",
    "Linear.convert_weight": "host/smoothed.py",
    "Linear._orig_shape": "host/planned.py",
    "nvfp4.pre_quant_scale": "host/loading.py",
    "weights of LoRAAdapter.reshape": "host/adapters.py",
}


@functools.cache
def answer(host):
    """What host_surface.py says in a process with that host."""
    python = os.environ.get(host.replace("PATH", "PYTHON")) or sys.executable
    command = [python, str(ROOT / "tests" / "host_surface.py"), *GONE]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COMFYUI_PATH": os.environ[host]})
    assert found.stdout, found.stderr[-3000:]
    return json.loads(found.stdout)


def private_names():
    """(module, attribute) of every private name that `host` asks of what is neither itself nor a class of ours."""
    own = host_surface._own_names()
    for path in sorted(ROOT.glob("host/*.py")):
        tree = ast.parse(path.read_text())
        stored = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
                  and isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") == "self"}  # fmt: skip
        found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        private = {name for name in found if name.startswith("_") and not name.endswith("__")}
        torch_s = {"_forward_hooks", "_forward_pre_hooks"}
        yield from ((f"host/{path.name}", name) for name in private - own - stored - torch_s)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("module", MODULES)
def test_what_a_module_leans_on_is_there(module, host):
    assert [line for line in answer(host)["missing"] if line.endswith(f"(used in {module})")] == []


@pytest.mark.parametrize("name", GONE)
def test_a_name_that_disappears_is_told_with_who_leans_on_it(name):
    lines = [line for line in answer(HOSTS[0])["lost"] if line.startswith(f"{name}:")]
    assert any(GONE[name] in line for line in lines), answer(HOSTS[0])["lost"]


def test_a_changed_signature_is_told():
    def cast(tensor, device):
        raise AssertionError

    host_surface._things.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_surface, "_find", lambda name: cast)
        patch.setattr(host_surface, "_takes_self", lambda name: False)
        said = host_surface.missing([host_surface.Use("comfy.x.cast", "host/planned.py", (3, ("dtype",), True))])
    assert len(said) == 1 and "comfy.x.cast: is called with 3 arguments" in said[0] and "host/planned.py" in said[0]


def test_no_private_name_of_the_host_is_left_out():
    known = {use.name.rpartition(".")[2] for use in USES}
    assert [found for found in private_names() if found[1] not in known] == []


def test_every_module_that_imports_the_host_has_its_names_in_the_list():
    imports = [path for path in [*ROOT.glob("host/*.py"), *ROOT.glob("nodes/*.py")]
               if any(line.startswith(("import comfy", "from comfy", "import folder_paths", "from server"))
                      for line in map(str.strip, path.read_text().splitlines()))]  # fmt: skip
    assert {path.relative_to(ROOT).as_posix() for path in imports} <= set(MODULES)
    assert len(USES) > 200
