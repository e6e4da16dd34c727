"""The newest comfy-kitchen that the package index has gives the numbers of our definitions too; else the pinned one.

`scripts/matrix` tries more of the pack with it.
"""

import os
import subprocess
import sys
from importlib.metadata import version

import newest
from conftest import ROOT


def test_every_value_is_coded_alike_by_the_newest_comfy_kitchen():
    folder, said = newest.fetch(newest.KITCHEN)
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
    monkeypatch.setattr(newest, "CACHE", tmp_path)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    folder, said = newest.fetch(newest.KITCHEN)
    assert folder is None and "comfy-kitchen" in said
    assert list(tmp_path.iterdir()) == []
