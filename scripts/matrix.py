"""The promises that depend on ComfyUI, comfy-kitchen and Python, tried with each of them: a table of what passed.

    scripts/matrix                       # every part on every row
    scripts/matrix surface formats       # some parts
    scripts/matrix --rows kitchen        # rows whose name contains the word

Rows: the embedded ComfyUI with the comfy-kitchen that it pins; the same with the newest; the ComfyUI at COMFYUI_PATH,
if that is set, with its interpreter (COMFYUI_PYTHON, or an environment of its own) and with the newest comfy-kitchen;
the embedded one under each other Python that is found (3.12, 3.13: PATH, pyenv), in an environment of its own, which
takes minutes and 2 GB when it is first made. Exits 1 if a part failed; rows that cannot be set up are said, and are no
failure.
"""

import argparse
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import newest  # noqa: E402

CACHE = Path(os.environ.get("TESSERA_CACHE") or ROOT / ".cache").resolve()
PARTS = {
    "surface": ["test_host_surface.py"],
    "units": ["test_host_units.py"],
    "kernels": ["test_values.py", "test_linear.py", "test_host_kernels.py"],
    "formats": ["test_formats.py", "test_golden.py"],
    "branch": ["test_host_branch.py"],
    "guard": ["test_host_guard.py"],
    "loader": ["test_host_repair.py"],
    "page": ["browser"],
    "frontend": ["browser"],  # the newest one, in place of the host's
}
PYTHONS = ("3.12", "3.13")
LIMIT = 1200  # seconds for one part


@dataclass
class Row:
    """One combination; `problem` says why it cannot be tried."""

    name: str
    python: str = ""
    host: str = ""
    path: str = ""  # first on the module path: another comfy-kitchen
    problem: str = ""
    results: dict[str, str] = field(default_factory=dict)


def kitchen_of(row: Row) -> str:
    """The version that a row's interpreter imports."""
    code = "from importlib.metadata import version; print(version('comfy-kitchen'))"
    env = os.environ | {"PYTHONPATH": row.path}
    found = subprocess.run([row.python, "-c", code], capture_output=True, text=True, env=env)
    return found.stdout.strip() or "none"


def set_up(**env: str) -> tuple[str, str]:
    """(interpreter, host) of scripts/setup_host.py run with that environment. Raises RuntimeError with its words."""
    python = env.pop("WITH", sys.executable)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("COMFYUI_")}
    command = [python, str(ROOT / "scripts" / "setup_host.py"), "--print-env"]
    found = subprocess.run(command, capture_output=True, text=True, env=clean | env)
    if found.returncode:
        raise RuntimeError((found.stderr.strip().splitlines() or ["setup_host.py failed"])[-1])
    said = dict(line.split("=", 1) for line in found.stdout.splitlines() if "=" in line)
    return tuple(shlex.split(said[name])[0] for name in ("PYTHON", "COMFYUI_PATH"))


def other_pythons() -> dict[str, str]:
    """Version -> interpreter of the Pythons that are here besides this one."""
    found = {}
    for version in PYTHONS:
        pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        for python in [*map(str, pyenv), shutil.which(f"python{version}")]:
            if python and version not in found and _runs(python, version):
                found[version] = python
    return found


def _runs(python: str, version: str) -> bool:
    code = "import sys, venv; print('{}.{}'.format(*sys.version_info))"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return said.stdout.strip() == version


def rows(word: str) -> list[Row]:
    """All rows whose name contains the word, set up."""
    here = "{}.{}".format(*sys.version_info)
    makers = {f"embedded ComfyUI, its comfy-kitchen, Python {here}": dict,
              f"embedded ComfyUI, newest comfy-kitchen, Python {here}": dict}  # fmt: skip
    given = {name: value for name, value in os.environ.items() if name in ("COMFYUI_PATH", "COMFYUI_PYTHON")}
    if "COMFYUI_PATH" in given:
        makers["ComfyUI at COMFYUI_PATH, its comfy-kitchen"] = lambda: given
        makers["ComfyUI at COMFYUI_PATH, newest comfy-kitchen"] = lambda: given
    for version, python in other_pythons().items():
        if version != here:
            place = str(CACHE / f"python-{version}")
            makers[f"embedded ComfyUI, its comfy-kitchen, Python {version}"] = (
                lambda python=python, place=place: {"WITH": python, "TESSERA_CACHE": place})  # fmt: skip
    return [_row(name, make()) for name, make in makers.items() if word in name]


def _row(name: str, env: dict[str, str]) -> Row:
    row = Row(name)
    try:
        row.python, row.host = set_up(**env)
    except RuntimeError as problem:
        row.problem = str(problem)
        return row
    if "newest" in name:
        folder, said = newest.fetch(newest.KITCHEN, row.python)
        row.path, row.problem = ("", f"no newer comfy-kitchen: {said}") if folder is None else (str(folder), "")
    row.name = f"{name} ({kitchen_of(row)})"
    return row


@functools.cache
def browser(python: str) -> str:
    """The Chromium that the page's tests drive; empty where there is none, which they tell."""
    found = subprocess.run([python, str(ROOT / "scripts" / "setup_browser.py")], stdout=subprocess.PIPE, text=True)
    return found.stdout.strip()


def environment(row: Row, part: str) -> dict[str, str]:
    """What a part's tests are told of its row. Raises RuntimeError where that cannot be had."""
    env = os.environ | {"COMFYUI_PATH": row.host, "PYTHONPATH": row.path, "COMFYUI_PATH2": ""}
    env.setdefault("OMP_NUM_THREADS", "1")
    if PARTS[part] == ["browser"]:
        env["TESSERA_BROWSER"] = browser(row.python)
    if part == "frontend":
        folder, said = newest.fetch(newest.FRONTEND, row.python)
        if folder is None:
            raise RuntimeError(f"no newer frontend: {said}")
        print(f"{newest.FRONTEND} {said}", flush=True)
        env["TESSERA_FRONTEND"] = str(folder / "comfyui_frontend_package")
    return env


def run(row: Row, part: str) -> bool:
    """Runs a part's tests on a row, and keeps what pytest counted."""
    tests = [str(ROOT / "tests" / name) for name in PARTS[part]]
    command = [row.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    try:
        env = environment(row, part)
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=LIMIT)
    except RuntimeError as problem:
        row.results[part] = str(problem)
        return False
    except subprocess.TimeoutExpired:
        row.results[part] = f"not done in {LIMIT} s"
        return False
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    counts = dict(reversed(pair.split(" ")) for pair in re.findall(r"\d+ (?:passed|failed|error|skipped)", last))
    well = done.returncode == 0 and "passed" in counts  # all of them skipped is no success
    row.results[part] = counts["passed"] if well else f"FAILED {counts.get('failed', '')}".strip()
    if not well:
        print(f"--- {row.name}: {part}\n" + "\n".join(done.stdout.splitlines()[-40:]), flush=True)
    return well


def table(found: list[Row], parts: list[str]) -> str:
    """Markdown: passed tests by part."""
    lines = ["| | " + " | ".join(parts) + " |", "|-|" + "-:|" * len(parts)]
    for row in found:
        cells = [row.results.get(part, "") for part in parts]
        lines.append(f"| {row.name} | " + (row.problem if row.problem else " | ".join(cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--rows", default="", metavar="WORD", help="only rows whose name contains it")
    given = parser.parse_args()
    unknown = [part for part in given.parts if part not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]}: no such part; there are {', '.join(PARTS)}")
    parts, sound = given.parts or list(PARTS), True
    found = rows(given.rows)
    for row in found:
        for part in [] if row.problem else parts:
            started = time.monotonic()
            sound &= run(row, part)
            print(f"{row.name}: {part}: {row.results[part]} in {time.monotonic() - started:.0f} s", flush=True)
    print(table(found, parts))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
