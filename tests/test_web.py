"""The parts of web/ that need no page keep the promises of tests/web/*.test.mjs, under Node.js."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import TESTS

FILES = sorted((TESTS / "web").glob("*.test.mjs"))


@pytest.fixture(scope="module")
def node():
    """The Node.js that Playwright's wheel brings, else the system's."""
    playwright = pytest.importorskip("playwright", reason="Playwright is not installed: scripts/setup_host.py")
    own = Path(playwright.__file__).parent / "driver" / ("node.exe" if os.name == "nt" else "node")
    return own if own.is_file() else shutil.which("node") or pytest.fail(f"no Node.js: neither {own} nor on PATH")


def test_there_are_promises():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name.removesuffix(".test.mjs"))
def test_the_parts_without_a_page_keep_their_promises(node, path):
    command = [node, "--test", "--test-reporter=tap", path]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=TESTS.parent)
    passed = re.search(r"^# pass (\d+)$", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and passed and int(passed[1]) > 0, done.stdout + done.stderr
