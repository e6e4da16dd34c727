"""Jobs whose process is killed, or whose machine loses power, at random points: powercut.py FOLDER COUNT SEED

Prints one line of JSON: how many points, how they were found, and what was wrong with any of them.

A point is a line of the modules that write, four in ten of them while files get their names. The process gets SIGKILL
before that line: whatever was not handed to the system by then is gone. At every other point the power goes as well: of
what was not synced by then, each page of 4 KiB is on disk or is what it was at the last fsync, by the toss of a coin,
and a new file whose folder was not synced may be gone. Then the same job starts again. What a file system does with the
order of renames is not modelled.
"""

import collections
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from conftest import load_pack
from synthetic import noise, recipe_file, save

load_pack()

from tessera import job, journal, locks, output, publication, writer  # noqa: E402
from tessera.checkpoint import Checkpoint  # noqa: E402
from tessera.quantization import recipe  # noqa: E402

TRACED = {module.__file__ for module in (job, journal, locks, output, publication, writer)}
MODEL, LORA = "model.safetensors", "model_lora.safetensors"
PAGE = 4096


def source(folder):
    weights = {f"layers.{n}.feed_forward.w1.weight": noise(48, 64, seed=n) for n in range(4)}
    weights |= {"layers.1.feed_forward.w1.bias": noise(48, seed=7), "norm.weight": noise(64, seed=8), "odd": noise(3)}
    recipe_file(folder / "mine.toml", ("nvfp4", "layers.{0-1}.**"), ("int8_row", "layers.{2-3}.**"))
    (folder / "out").mkdir()
    return save(folder / "source.safetensors", weights)


def run(folder, seed=0, **options):
    chosen = recipe.find(folder / "mine.toml")
    job.Job(Checkpoint(folder / "source.safetensors"), folder / "out" / MODEL, chosen, rank=2, seed=seed,
            **options).run()  # fmt: skip


def child(work):
    """Runs in a process of its own; its wait status."""
    if not (process := os.fork()):
        try:
            work()
        except BaseException as problem:
            print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def at_line(number, then):
    """`then` runs before the line of that number. [lines so far, those before the first file got its name]."""
    lines = [0, 0]

    def local(frame, event, _):
        if event == "line":
            lines[0] += 1
            if frame.f_code.co_name == "publish_together" and not lines[1]:
                lines[1] = lines[0]
            if lines[0] == number:
                sys.settrace(None)
                then()
        return local

    sys.settrace(lambda frame, event, _: local if frame.f_code.co_filename in TRACED else None)
    return lines


def note_syncs(shadow):
    """Copies of every file as it was when it was last synced, by inode; folders leave the list of their files."""
    fsync = os.fsync

    def noted(descriptor):
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            (shadow / "names").write_text("\n".join(entry.name for entry in path.iterdir()))
        else:
            shutil.copyfile(f"/proc/self/fd/{descriptor}", shadow / str(os.fstat(descriptor).st_ino))

    os.fsync = noted


def lose_power(folder, shadow, coin):
    """What was not synced is there, or is not."""
    names = shadow / "names"
    synced = set(names.read_text().splitlines()) if names.exists() else set()
    for path in sorted((folder / "out").iterdir()):
        copy = shadow / str(path.stat().st_ino)
        before, data = copy.read_bytes() if copy.exists() else b"", bytearray(path.read_bytes())
        if path.name not in synced and path.name.startswith(".") and coin.random() < 0.5:
            path.unlink()
            continue
        for first in range(0, len(data), PAGE):
            if coin.random() < 0.5:
                page = before[first : first + PAGE]
                data[first : first + PAGE] = page.ljust(len(data[first : first + PAGE]), b"\0")
        if data != path.read_bytes():
            facts = path.stat()
            path.write_bytes(data)  # the same inode; a page that is lost was not written, so neither was the date
            os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def files(folder):
    """(the model's sha256, its LoRA's), None for one that is not there."""
    paths = [folder / "out" / name for name in (MODEL, LORA)]
    return tuple(hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None for path in paths)


class Cut:
    """One point: what is found after it, and what the next start makes of it."""

    def __init__(self, templates, folder, number, lines, coin):
        self.overwrite, self.power = bool(number % 2), number % 4 > 1
        count, naming = lines[self.overwrite]
        self.line = coin.randint(naming if coin.random() < 0.4 else 1, count)
        self.resume = coin.random() < 0.5
        self.folder, self.shadow, self.coin = folder / f"{number}", folder / f"{number}.synced", coin
        shutil.copytree(templates["old" if self.overwrite else "none"], self.folder)
        self.shadow.mkdir()
        for path in (self.folder / "out").iterdir():  # was there, and on disk, long before
            shutil.copyfile(path, self.shadow / str(path.stat().st_ino))
        self.before, self.new = files(self.folder), files(templates["new"])
        self.found, self.problems = "", []

    def expect(self, fact, words):
        if not fact:
            self.problems.append(f"line {self.line}{' power' * self.power}{' over old' * self.overwrite}: {words}")

    def make(self):
        def killed():
            note_syncs(self.shadow)
            at_line(self.line, lambda: os.kill(os.getpid(), signal.SIGKILL))
            run(self.folder, overwrite=self.overwrite)

        self.expect(child(killed) == -signal.SIGKILL, "was not killed")
        if self.power:
            lose_power(self.folder, self.shadow, self.coin)
        self.look()
        self.expect(child(lambda: journal.settle(self.folder / "out" / MODEL)) == 0, "cannot be settled")
        self.expect(files(self.folder) in (self.before, self.new), "settled, but the pair is of two jobs")
        options = {"overwrite": self.overwrite, "resume": self.resume}
        self.expect(child(lambda: run(self.folder, **options)) == 0, "cannot start again")
        self.expect(files(self.folder) == self.new, "other bytes than undisturbed")
        self.expect(sorted(os.listdir(self.folder / "out")) == [MODEL, LORA], "something is left")
        shutil.rmtree(self.folder)
        shutil.rmtree(self.shadow)
        return self

    def look(self):
        """Old or new, each file whole; where a LoRA is ahead of its model that must show."""
        found = files(self.folder)
        whole = [state in (before, new) for state, before, new in zip(found, self.before, self.new, strict=True)]
        self.expect(all(whole), "a file is neither the old one nor the new one")
        self.found = {self.before: "old", self.new: "new"}.get(found, "between")
        if self.found == "between":
            self.expect(found == (self.before[0], self.new[1]), "a new model is beside an old LoRA")
            if self.overwrite:
                pair = [self.folder / "out" / name for name in (MODEL, LORA)]
                self.expect(output.pair_problem(*pair), "a LoRA of another job is not noticed")


def templates(folder):
    """Folders with a source and no files, an old pair, the new pair; and how many lines a job has."""
    made = {name: folder / name for name in ("none", "old", "new")}
    made["none"].mkdir()
    source(made["none"])
    for name in ("old", "new"):
        shutil.copytree(made["none"], made[name])
    assert child(lambda: run(made["old"], seed=1)) == child(lambda: run(made["new"])) == 0
    lines = {}
    for overwrite in (False, True):
        tried = folder / "tried"
        shutil.copytree(made["old" if overwrite else "none"], tried)
        reader, end = os.pipe()

        def counted(tried=tried, end=end, overwrite=overwrite):
            seen = at_line(0, None)
            run(tried, overwrite=overwrite)
            os.write(end, json.dumps(seen).encode())

        assert child(counted) == 0
        lines[overwrite] = json.loads(os.read(reader, 100))
        assert files(tried) == files(made["new"])
        shutil.rmtree(tried)
    return made, lines


def main():
    folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    journal.INTERVAL, started, coin = 0, time.monotonic(), random.Random(seed)
    made, lines = templates(folder)
    cuts = [Cut(made, folder, number, lines, coin).make() for number in range(count)]
    said = {
        "points": count,
        "of_lines": [total for total, _ in lines.values()],
        "found": collections.Counter(cut.found for cut in cuts),
        "resumed": sum(cut.resume for cut in cuts),
        "power": sum(cut.power for cut in cuts),
        "problems": [problem for cut in cuts for problem in cut.problems],
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
