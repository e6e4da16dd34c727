"""Hostile files, kills, long runs and too little memory, counted: anything but what was promised is a finding.

    scripts/trust                   all of it, in at most 15 minutes on two cores that do nothing else
    scripts/trust --only soak       one part: bad_files, mutants, writes, soak, memory, surface
    scripts/trust --cases 5000      less
    scripts/trust --seed 7          other mutants; case n of a seed is always the same
    scripts/trust --points 20       fewer kill points of the writers; 200 otherwise
    scripts/trust --runs 60         fewer workflows through a real ComfyUI; 500 otherwise

Exits 1 on any finding. Files that are one are left in .cache/trust.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
LEFT = Path(os.environ.get("TESSERA_CACHE") or ROOT / ".cache") / "trust"
COLUMNS = ("refused", "accepted", "crash", "hang", "wrong")
TITLES = {"crash": "crashes", "hang": "hangs", "wrong": "wrong loads"}
ALONE = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}


def start(script: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, str(TESTS / script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ALONE)


def result(process: subprocess.Popen) -> dict:
    """What a script printed as JSON; a script that died is a crash of its own."""
    said = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"trust: {process.args[1]} ended with {process.returncode}: a reader took its process with it")
    return json.loads(said)


def bad_files() -> tuple[str, bool]:
    with tempfile.TemporaryDirectory() as folder:
        rows = result(start("refusing.py", folder))
    wrong = [name for name, row in rows.items() if row["refused"] != "ValueError"]
    slowest, largest = (max(row[key] for row in rows.values()) for key in ("seconds", "mb"))
    text = f"{len(rows)} bad files: {len(rows) - len(wrong)} refused, the slowest in {slowest:.2f} s, "
    return "\n".join([f"{text}with at most {largest:.0f} MB", *(f"not refused: {name}" for name in wrong)]), not wrong


def mutants(seed: int, cases: int, processes: int) -> tuple[str, bool]:
    LEFT.mkdir(parents=True, exist_ok=True)
    started, share = time.monotonic(), -(-cases // processes)
    running = [start("fuzzing.py", LEFT, seed, first, min(share, cases - first)) for first in range(0, cases, share)]
    done = [result(process) for process in running]
    counts = {reader: {c: sum(d["counts"][reader].get(c, 0) for d in done) for c in COLUMNS}
              for reader in done[0]["counts"]}  # fmt: skip
    counts["all"] = {c: sum(row[c] for row in counts.values()) for c in COLUMNS}
    lines = ["".join(f"{title:>12}" for title in ("mutants of", "cases", *(TITLES.get(c, c) for c in COLUMNS)))]
    for reader, row in counts.items():
        lines.append(f"{reader:>12}" + "".join(f"{n:>12,}" for n in (sum(row.values()), *row.values())))
    findings = [finding for d in done for finding in d["findings"]]
    slowest = max(d["slowest"] for d in done)
    lines.append(f"{time.monotonic() - started:.0f} s on {processes} processes, the slowest case {slowest:.2f} s")
    return "\n".join([*lines, *findings[:20]]), not findings


def writes(points: int, seed: int) -> tuple[str, bool]:
    """What tests/trust_writes.py prints, a line for each promise."""
    process = start("trust_writes.py", points, seed)
    return process.communicate()[0].strip(), process.returncode == 0


def long_runs(runs: int, seed: int) -> tuple[str, bool]:
    """What tests/soak.py counted in a ComfyUI that ran so many workflows."""
    process = start("soak.py", runs, "--seed", seed, "--quiet")
    said = process.communicate()[0].strip().splitlines()
    if not said:
        return "long runs: the soak died", False
    answer = json.loads(said[-1])
    figures, wrong = answer["figures"], answer["wrong"]
    held = ", ".join(f"{name} {before}" + (f" to {after}" if after != before else "")
                     for name, (before, after) in figures["held"].items())  # fmt: skip
    mb = figures["rss_mb"]
    lines = [f"{figures['executions']} workflows from two clients in {figures['seconds']} s, {figures['interrupted']} "
             f"stopped, {figures['quantizations']} quantizations",
             f"resident memory {mb[len(mb) // 2]} MB at half, {mb[-1]} MB at the end ({figures['growth']:+.1%}); "
             f"ComfyUI's history, emptied before each probe, took {figures['history_kb']} kB a workflow as JSON",
             f"held after {figures['warm']} and after all: {held}"]  # fmt: skip
    return "\n".join([*lines, *(f"wrong: {line}" for line in wrong)]), not wrong


def memory() -> tuple[str, bool]:
    """The most that `tessera quantize` takes for a file of several GB."""
    LEFT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=LEFT) as folder:
        process = start("starved.py", "--budget", folder, 2.2)
        row = json.loads(process.communicate()[0].strip().splitlines()[-1])
    if "failed" in row:
        return f"memory: {row['failed']}", False
    return (f"{row['gb']} GB quantized in {row['seconds']} s with at most {row['peak_mb']} MB "
            f"({row['before_mb']} of them Python and torch), budget {row['budget_mb']} MB"), row["kept"]  # fmt: skip


def surface() -> tuple[str, bool]:
    """Which names of ComfyUI that the pack leans on are missing."""
    process = start("host_surface.py")
    answer = json.loads(process.communicate()[0])
    text = f"{len(answer['uses'])} names of ComfyUI that the pack leans on, {len(answer['missing'])} missing"
    return "\n".join([text, *answer["missing"]]), not answer["missing"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parts = {
        "bad_files": bad_files, "mutants": lambda: mutants(given.seed, given.cases, given.processes),
        "writes": lambda: writes(given.points, given.seed), "soak": lambda: long_runs(given.runs, given.seed),
        "memory": memory, "surface": surface,
    }  # fmt: skip
    parser.add_argument("--only", choices=parts, action="append", help="may be repeated")
    given, sound = parser.parse_args(), True
    for name in given.only or parts:
        started = time.monotonic()
        text, well = parts[name]()
        print(f"{text}\n{name}: {'sound' if well else 'NOT SOUND'}, {time.monotonic() - started:.0f} s", flush=True)
        sound &= well
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
