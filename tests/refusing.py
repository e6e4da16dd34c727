"""Measures what refusing each bad file takes, in this process: refusing.py FOLDER prints JSON by name."""

import json
import resource
import sys
import time
from pathlib import Path

from conftest import load_pack

load_pack()

import bad_files  # noqa: E402
from tessera import calibration_file  # noqa: E402
from tessera.checkpoint import Checkpoint  # noqa: E402
from tessera.quantization import recipe  # noqa: E402

READERS = {"checkpoint": Checkpoint, "calibration": calibration_file.read, "recipe": recipe.read}


def path_of(folder: Path, bad: bad_files.Bad) -> Path:
    """The bad file, written into the folder."""
    return bad.write(folder / ("recipe.toml" if bad.reader == "recipe" else "bad.safetensors"))


def _peak_mb() -> float:
    """Largest resident memory since `_forget_peak`."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) / 1000


def measure(folder: Path) -> dict[str, dict]:
    """By name: what the reader raised, the memory (MB) and the seconds it took."""
    rows = {}
    for number, (name, bad) in enumerate(bad_files.BAD.items()):
        (folder / str(number)).mkdir()
        path = path_of(folder / str(number), bad)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
        before, start, refused = _peak_mb(), time.perf_counter(), "accepted"
        try:
            READERS[bad.reader](path)
        except Exception as problem:  # whatever it is: the test compares its name
            refused = type(problem).__name__
        seconds = time.perf_counter() - start
        rows[name] = {"refused": refused, "mb": round(_peak_mb() - before, 1), "seconds": round(seconds, 3)}
    return rows


if __name__ == "__main__":
    reserved = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (reserved + 10**9,) * 2)
    print(json.dumps(measure(Path(sys.argv[1]))))
