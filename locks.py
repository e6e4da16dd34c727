"""Locks on files: they say which hidden files belong to a living process, and vanish with it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

CANNOT_LOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems without locks
_LOCKED_BYTE = 1 << 30  # Windows locks bytes, not files; none that anybody reads


def lock(file: BinaryIO) -> bool | None:
    """True: this process has the file until it is closed; False: another has it; None: nobody can tell."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(_LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(0)
    except OSError as problem:
        return None if problem.errno in CANNOT_LOCK else False
    return True


def same(file: BinaryIO, path: Path) -> bool:
    """Whether an open file still has that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def remove_if_dead(path: Path) -> bool:
    """Removes a hidden file if it is sure that no living process writes it; whether it did."""
    try:
        with open(path, "r+b") as file:
            if fcntl and lock(file) and same(file, path):
                path.unlink()
                return True
        if not fcntl:
            path.unlink()  # Windows itself refuses where somebody has it open
            return True
    except OSError:
        pass
    return False


@contextlib.contextmanager
def one_at_a_time(folders: set[Path]) -> Iterator[None]:
    """Waits until no other process is in this block with one of the folders; no file is made for it.

    Where folders cannot be locked (Windows, some network disks) it does not wait.
    """
    with contextlib.ExitStack() as stack:
        for folder in sorted(folders) if fcntl else ():
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
