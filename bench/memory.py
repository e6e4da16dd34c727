"""Seconds and memory of a call in this process. Needs nothing but Python: other environments run it, too."""

import json
import time
from pathlib import Path


def measure(function):
    """Calls it, then prints a line of JSON: seconds, and peak_mb above what was resident before (Linux)."""
    before = _megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    started = time.perf_counter()
    function()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_mb": _megabytes("VmHWM") - before}))


def _megabytes(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024 / 1e6
