"""The host is no worse off with the pack: its own tests end alike, importing touches nothing, a failure stays ours."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from conftest import ROOT
from host_server import HostError, HostServer

pytestmark = pytest.mark.host

HOST_TESTS = ("comfy_quant", "comfy_test/model_detection_test.py", "comfy_test/folder_path_test.py")
TESTS = str(ROOT / "tests")
SITE = '''
import sys

class Broken:
    """Raises where the pack's node modules are imported."""
    def find_spec(self, name, path=None, target=None):
        if name.endswith(".nodes.quantize"):
            raise RuntimeError("not today: " + name.rpartition(".")[2])

sys.meta_path.insert(0, Broken())
'''
OTHER_PACK = """
class Answer:
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "execute", (), True
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}
    def execute(self):
        return {"ui": {"said": ["42"]}}

NODE_CLASS_MAPPINGS = {"TestAnswer": Answer}
"""


@pytest.fixture(scope="module")
def comfyui():
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: run scripts/setup_host.py")
    return os.environ["COMFYUI_PATH"]


# The host's own tests


def start(comfyui, report, **env):
    """The host's tests in a process of their own, with our plugin."""
    tests = [f"{comfyui}/tests-unit/{name}" for name in HOST_TESTS]
    options = ["-q", "-p", "with_pack", "-p", "no:cacheprovider", "-o", "addopts=", "--import-mode=importlib"]
    options += ["-c", f"{comfyui}/pytest.ini", "--rootdir", comfyui, f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")])} | env
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=report.parent, env=env, text=True, **pipes)


def outcomes(report):
    """Test -> passed, skipped, failure or error."""
    cases = {f"{c.get('classname')}.{c.get('name')}": c for c in ElementTree.parse(report).iter("testcase")}
    return {name: next((part.tag for part in case), "passed") for name, case in cases.items()}


def test_the_hosts_own_tests_end_alike_with_the_pack_loaded(comfyui, tmp_path):
    reports = tmp_path / "with.xml", tmp_path / "without.xml"
    running = [start(comfyui, reports[0]), start(comfyui, reports[1], TESSERA_WITHOUT="1")]
    said = [process.communicate(timeout=300)[0] for process in running]
    loaded = [" nodes of the pack are loaded" in text for text in said]
    assert loaded == [True, False], said[0][-3000:]
    beside, alone = map(outcomes, reports)
    assert beside == alone
    assert len(alone) >= 30 and "passed" in alone.values()
    assert {name for name, outcome in beside.items() if outcome in ("failure", "error")} == set(), said[0][-3000:]


# Importing


def test_importing_touches_no_gpu_no_network_and_writes_nothing(comfyui, tmp_path):
    program = [sys.executable, str(ROOT / "tests" / "watched_import.py")]
    env = os.environ | {"COMFYUI_PATH": comfyui}
    done = subprocess.run(program, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["found"] == [f"open {os.devnull}"]  # the probe's own: it was watching
    assert said["nodes"] >= 14 and said["cuda"] is False
    assert list(tmp_path.iterdir()) == []


# A failure of ours


class Tolerant(HostServer):
    """Goes on where a pack could not be imported, as ComfyUI does."""

    def _await_ready(self, deadline):
        try:
            super()._await_ready(deadline)
        except HostError as problem:
            if "could not import" not in str(problem):
                raise


def test_a_failure_inside_the_pack_leaves_comfyui_and_other_packs_running(comfyui, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    (tmp_path / "other.py").write_text(OTHER_PACK)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    with Tolerant({"other": tmp_path / "other.py"}, cpu=True, env={"PYTHONPATH": path}) as host:
        assert "not today: quantize" in host.log and "(IMPORT FAILED)" in host.log
        assert host.log.count("(IMPORT FAILED)") == 1
        known = host.object_info()
        assert "KSampler" in known and "TestAnswer" in known
        assert not [name for name in known if name.startswith("Tessera")]
        entry = host.run({"1": {"class_type": "TestAnswer", "inputs": {}}})
        assert entry["outputs"]["1"]["said"] == ["42"]
