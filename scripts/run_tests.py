"""pytest, which in CI fails for every test that was skipped, unless it is one that needs a GPU or a CPU with VNNI."""

import os
import sys

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


if __name__ == "__main__":
    plugins = [NoSilentSkips()] if os.environ.get("CI") == "true" else []
    sys.exit(pytest.main(sys.argv[1:], plugins))
