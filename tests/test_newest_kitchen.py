"""The newest comfy-kitchen that the package index has gives the numbers of our definitions too; else the pinned one.

`scripts/matrix` tries more of the pack with it.
"""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version

from conftest import ROOT

spec = importlib.util.spec_from_file_location("tessera_matrix", ROOT / "scripts" / "matrix.py")
matrix = importlib.util.module_from_spec(spec)
sys.modules["tessera_matrix"] = matrix  # dataclasses look their module up
spec.loader.exec_module(matrix)


def test_every_value_is_coded_alike_by_the_newest_comfy_kitchen():
    folder, said = matrix.newest(matrix.KITCHEN)
    env = os.environ | {"PYTHONPATH": str(folder or "")}
    code = "import comfy_kitchen; print(comfy_kitchen.__file__)"
    used = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout
    print(f"comfy-kitchen {said if folder else version('comfy-kitchen') + ', as there is no newer one: ' + said}")
    assert folder is None or used.startswith(str(folder))
    tests = str(ROOT / "tests" / "test_values.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]


def test_without_an_index_the_reason_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "CACHE", tmp_path)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    folder, said = matrix.newest(matrix.KITCHEN)
    assert folder is None and "comfy-kitchen" in said
    assert not list((tmp_path / "trust").glob("*"))
