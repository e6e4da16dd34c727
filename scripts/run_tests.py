"""pytest, which in CI fails for every test that was skipped, unless it is one that needs a GPU or a CPU with VNNI.

Without arguments a process for every core, each with whole files of tests: most of the time goes into small models,
which one thread runs as fast as several.
"""

import os
import sys
import time
from pathlib import Path

import pytest

NEEDS_HARDWARE = {"gpu", "blackwell", "vnni"}


class NoSilentSkips:
    def __init__(self):
        self.forbidden = []

    def pytest_runtest_logreport(self, report):
        if report.skipped and not NEEDS_HARDWARE & report.keywords.keys() and not hasattr(report, "wasxfail"):
            self.forbidden.append(report.nodeid)

    def pytest_collectreport(self, report):
        if report.skipped:  # a whole module
            self.forbidden.append(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if self.forbidden and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for name in self.forbidden:
            terminalreporter.write_line(f"skipped, which CI does not allow: {name}", red=True)


class WhereScreenshotsAre:
    """Says where the browser tests of this run have left their pictures."""

    def __init__(self):
        root = Path(__file__).resolve().parent.parent
        self.folder = Path(os.environ.get("TESSERA_CACHE") or root / ".cache") / "screenshots"
        self.start = time.time()

    def pytest_terminal_summary(self, terminalreporter):
        taken = [path for path in self.folder.glob("*.png") if path.stat().st_mtime >= self.start]
        if taken:
            terminalreporter.write_line(f"{len(taken)} screenshots: {self.folder}")


def everything(cores):
    """Arguments for the whole suite."""
    workers = max(1, min(cores, 4))  # each starts a ComfyUI of its own: 1 GB
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
    told = ["-rs", "--durations=25", "--durations-min=5"]
    shared = ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"]  # tests/conftest.py orders them
    return [*told, *shared] if workers > 1 else told


if __name__ == "__main__":
    plugins = [WhereScreenshotsAre(), *([NoSilentSkips()] if os.environ.get("CI") == "true" else [])]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    arguments = ["-rs", *sys.argv[1:]] if sys.argv[1:] else everything(cores)
    sys.exit(pytest.main(arguments, plugins))
