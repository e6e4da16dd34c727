"""Journal: what an unfinished job has done, so that the same job can go on after a crash."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from .locks import fcntl, lock, remove_if_dead, same
from .publication import disk_errors, folder_errors, hidden, old, publish_together, sync_folder
from .writer import Writer

INTERVAL = 1.0  # seconds of work that a crash may cost, at most, besides the layer in hand
GLANCE = 2.0  # seconds that another job may hold a journal just to read it
VERIFIED = "verified"  # key of the last record: every file is on disk, complete, and was read again


class Journal:
    """JSON lines in `.<target name>.<token>.journal` beside the target; the token is made from the job's identity.

    The first line is that identity, with the files to make; each further one is a record, written only when what it
    tells of is on disk. While the job runs the file is locked: one job, one process. With `resume` the records of an
    earlier run of the very same job are in `records`; without, whatever it left is removed, as is what other runs with
    this target left. Leaving the `with` block removes the journal: only a killed process leaves one behind.
    """

    def __init__(self, files: Sequence[Path], identity: dict, resume: bool = False):
        self.target, self.files = Path(files[0]), [Path(file) for file in files]
        self.token = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
        self.path = journal_path(self.target, self.token)
        self.records: list[dict] = []
        self._first = {"files": [str(file.resolve()) for file in self.files], "identity": identity}
        self._writers: Sequence[Writer] = ()
        self._resume, self._waiting, self._synced = resume, [], time.monotonic()

    def __enter__(self) -> Journal:
        settle(self.target)
        self._file, mine = _locked(self.path)
        patience = time.monotonic() + GLANCE
        while mine is False and time.monotonic() < patience:  # another job may only be looking whether it is alive
            self._file.close()
            time.sleep(0.05)
            self._file, mine = _locked(self.path)
        if mine is False:
            self._file.close()
            raise ValueError(f"{self.target}: another process is making this very file; wait for it, or choose "
                             "another name")  # fmt: skip
        remove_leftovers(self.target, self.token)
        lines = _lines(self._file)
        if self._resume and lines and lines[0][0] == json.loads(json.dumps(self._first)):
            self.records = [record for record, _ in lines[1:]]
            self._ends = [end for _, end in lines]
        else:
            for file in self.files:
                self.part(file).unlink(missing_ok=True)
            try:
                with disk_errors(self.target, 0):
                    self._file.truncate(0)
                    self._file.seek(0)
                    self._file.write(_line(self._first))
                    self._flush()
                    sync_folder(self.path.parent)
            except (ValueError, RuntimeError):  # nobody is in the `with` block yet
                self.__exit__()
                raise
            self._ends = [self._file.tell()]
        return self

    def __exit__(self, *exc) -> None:
        for file in self.files:
            _put_back(self.part(file), file)
            _remove(self.part(file))
        if fcntl:
            _remove(self.path)  # first: nobody may lock what is about to go
        with contextlib.suppress(OSError):  # a full disk is said once more here
            self._file.close()
        _remove(self.path)

    def part(self, file: Path) -> Path:
        """The hidden file in which the job makes `file`."""
        return hidden(file, self.token)

    def keep(self, count: int) -> None:
        """Forgets all records but the first `count`: what they tell of is not so. Later ones are written after them."""
        del self.records[count:], self._ends[count + 1 :]
        with disk_errors(self.target, 0):
            self._file.truncate(self._ends[-1])
            self._file.seek(self._ends[-1])

    def follow(self, writers: Iterable[Writer]) -> None:
        """The files that must be on disk before a record is."""
        self._writers = tuple(writers)

    def add(self, record: dict) -> None:
        """Remembers a record; written, with those before it, once a second of work has gathered."""
        self._waiting.append(record)
        if time.monotonic() - self._synced >= INTERVAL:
            self.sync()

    def sync(self) -> None:
        """What was done so far survives a crash from now on: first the data, then the lines that vouch for it."""
        if self._waiting:
            for writer in self._writers:
                writer.sync()
            with disk_errors(self.target, 0):
                self._file.write(b"".join(map(_line, self._waiting)))
                self._flush()
            self._waiting = []
        self._synced = time.monotonic()

    def verified(self, overwrite: bool) -> None:
        """Remembers that every file is complete, and which ones they are. From now on they may get their names."""
        made = [_facts(self.part(file)) for file in self.files]
        self.add({VERIFIED: True, "overwrite": overwrite, "made": made})
        self.sync()

    def ready(self) -> bool:
        """Whether all that is left to do is to give the files their names."""
        return bool(self.records) and None not in _states(self.files, self.token, self.records[-1])

    def publish(self, overwrite: bool) -> None:
        """Gives the files their names: all or none, the model last."""
        settle(self.target, self.token)  # what another run left that was killed meanwhile
        publish_together([(self.part(file), file) for file in reversed(self.files)], overwrite)

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def journal_path(target: Path, token: str) -> Path:
    return target.with_name(f".{target.name}.{token}.journal")


def settle(target: Path, mine: str | None = None) -> list[str]:
    """Gives the files that killed runs had begun to publish here their names, those that lack them still; else a new
    model could stay beside an old LoRA. The tokens of those runs; `mine` is not one."""
    finished = []
    for journal in _journals(target):
        if _token(journal) == mine:
            continue
        file, ours = _locked(journal)
        with file:
            lines = _lines(file) if ours else []
            files, token = _files(lines), _token(journal)
            states = _states(files, token, lines[-1][0]) if files else [None]
            if None in states or NAMED not in states:
                continue
            with contextlib.suppress(ValueError):  # another file came meanwhile, which that run may not replace
                publish_together([(hidden(f, token), f) for f in reversed(files)], lines[-1][0]["overwrite"])
                finished.append(token)
            for part in (hidden(made, token) for made in files):
                _remove(part, old(part))
            if fcntl:
                _remove(journal)
        _remove(journal)
    return finished


def remove_leftovers(target: Path, mine: str) -> None:
    """Removes journals and hidden files that killed runs with this target left, but not token `mine`, nor what a
    living process has locked, or may have: some network disks have no locks."""
    for journal in _journals(target):
        if (token := _token(journal)) == mine:
            continue
        file, ours = _locked(journal)
        with file:
            if not ours:
                continue
            for made in {target, *_files(_lines(file))}:
                _put_back(hidden(made, token), made)
                _remove(hidden(made, token))
            if fcntl:
                _remove(journal)
        _remove(journal)
    for part in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        if (token := _token(part)) != mine and not journal_path(target, token).exists():
            remove_if_dead(part)


HIDDEN, NAMED = "hidden", "named"


def _states(files: Sequence[Path], token: str, record: dict) -> list[str | None]:
    """Where each verified file is, None for one that is nowhere or not as it was."""
    made = record.get("made") if record.get(VERIFIED) else None
    if not isinstance(made, list) or len(made) != len(files):
        return [None]
    return [HIDDEN if _facts(hidden(file, token)) == facts and _facts(file) != facts else
            NAMED if _facts(file) == facts else None for file, facts in zip(files, made, strict=True)]  # fmt: skip


def _facts(path: Path) -> list[int] | None:
    """Which file that is: a rename leaves them as they are."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def _files(lines: list[tuple[dict, int]]) -> list[Path]:
    """Those that a journal says its run makes."""
    said = lines[0][0].get("files") if lines else None
    return [Path(file) for file in said] if isinstance(said, list) and all(isinstance(f, str) for f in said) else []


def _journals(target: Path) -> list[Path]:
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.*.journal"))


def _token(path: Path) -> str:
    return path.name.split(".")[-2]


def _put_back(part: Path, path: Path) -> None:
    """A file that was to be replaced, and was not."""
    with contextlib.suppress(OSError):
        if old(part).exists() and not path.exists():
            os.replace(old(part), path)
    _remove(old(part))


def _remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def _locked(path: Path) -> tuple[BinaryIO, bool | None]:
    """(the file, open for reading and writing; whether it is locked until it is closed, None: locks do not exist)."""
    while True:
        with folder_errors(path.parent):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        file = os.fdopen(descriptor, "r+b")
        mine = lock(file)
        if mine is False or not fcntl or same(file, path):
            return file, mine
        file.close()  # its last owner removed it between opening and locking


def _line(record: dict) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _lines(file) -> list[tuple[dict, int]]:
    """Every record and where its line ends, up to the first line that is torn."""
    found, end = [], 0
    file.seek(0)
    for line in file:
        end += len(line)
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict):
            break
        found.append((record, end))
    return found
