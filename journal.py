"""Journal: what an unfinished job has done, so that the same job can go on after a crash."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from .writer import Writer, hidden

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

INTERVAL = 1.0  # seconds of work that a crash may cost, at most, besides the layer in hand
CANNOT_LOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems without locks
_LOCKED_BYTE = 1 << 30  # Windows locks bytes, not files; none that anybody reads


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
        self._file = _locked(self.path)
        if self._file is None:
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
            self._file.truncate(0)
            self._file.seek(0)
            self._file.write(_line(self._first))
            self._flush()
            self._ends = [self._file.tell()]
        return self

    def __exit__(self, *exc) -> None:
        if fcntl:
            self.path.unlink(missing_ok=True)  # first: nobody may lock what is about to go
            self._file.close()
        else:
            self._file.close()
            with contextlib.suppress(OSError):
                self.path.unlink()

    def part(self, file: Path) -> Path:
        """The hidden file in which the job makes `file`."""
        return hidden(file, self.token)

    def keep(self, count: int) -> None:
        """Forgets all records but the first `count`: what they tell of is not so. Later ones are written after them."""
        del self.records[count:], self._ends[count + 1 :]
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
            self._file.write(b"".join(map(_line, self._waiting)))
            self._flush()
            self._waiting = []
        self._synced = time.monotonic()

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def journal_path(target: Path, token: str) -> Path:
    return target.with_name(f".{target.name}.{token}.journal")


def remove_leftovers(target: Path, mine: str) -> None:
    """Removes journals and hidden files that killed runs with this target left, but not token `mine`, nor what a
    living process has locked."""
    for journal in target.parent.glob(f".{glob.escape(target.name)}.*.journal"):
        token = journal.name.split(".")[-2]
        file = None if token == mine else _locked(journal)
        if file is None:
            continue
        with file:
            first = (_lines(file) or [({}, 0)])[0][0]
            for made in [target, *map(Path, first.get("files", []))]:
                hidden(made, token).unlink(missing_ok=True)
            if fcntl:
                journal.unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
    for part in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        token = part.name.split(".")[-2]
        if token != mine and not journal_path(target, token).exists():
            part.unlink(missing_ok=True)


def _locked(path: Path):
    """The file, open for reading and writing and locked until it is closed; None if another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        file = os.fdopen(descriptor, "r+b")
        if not _lock(file):
            file.close()
            return None
        try:
            if not fcntl or os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        file.close()  # its last owner removed it between opening and locking


def _lock(file) -> bool:
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(_LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(0)
    except OSError as problem:
        return problem.errno in CANNOT_LOCK
    return True


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
