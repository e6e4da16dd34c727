"""Hidden files and how they get their names: whole, for good, several of them together or none."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from .locks import lock, one_at_a_time, remove_if_dead, same

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL)
CANNOT_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF)  # folders of some network disks
LONE = "lone-"  # starts the token of a hidden file that no journal tells of: once its process is dead it is of no use


def hidden(path: Path, token: str) -> Path:
    """The file beside `path` in which it is made: on the same disk, so that a rename is all that is left to do."""
    return path.with_name(f".{path.name}.{token}.part")


def create_hidden(path: Path) -> tuple[Path, BinaryIO]:
    """A new hidden file for `path`, locked until it is closed."""
    while True:
        temporary = hidden(path, LONE + secrets.token_hex(4))
        with folder_errors(path.parent):
            file = open(temporary, "x+b")  # noqa: SIM115
        if os.name != "posix" or (lock(file) is not False and same(file, temporary)):
            return temporary, file
        file.close()  # another process took it for a dead one's, between those two lines


def clear(folder: Path) -> None:
    """Removes the hidden files without a journal that dead processes left in a folder."""
    for left in folder.glob(f".*.{LONE}*.part"):
        remove_if_dead(left)


def check_target(path: Path, overwrite: bool) -> None:
    """Raises ValueError if no file can come there: no folder, or something at `path` that may not be replaced."""
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such folder; create it or choose another target")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; choose another name")
    if os.path.lexists(path) and not overwrite:
        raise taken(path)


def taken(path: Path) -> ValueError:
    return ValueError(f"{path}: already exists; choose another name, or allow overwriting")


def publish(temporary: Path, path: Path, overwrite: bool) -> None:
    """Gives a finished file its name, atomically and for good; never over a file that came meanwhile, unless
    `overwrite`."""
    check_target(path, overwrite)
    _rename(temporary, path, overwrite)
    sync_folder(path.parent)


def publish_together(files: Sequence[tuple[Path, Path]], overwrite: bool) -> None:
    """Gives finished files (hidden, named) their names, in this order, or none of them; those that have theirs already
    count as done.

    A process killed in the midst leaves some named: its journal says so, and `journal.settle` names the others.
    """
    with one_at_a_time({path.parent.resolve() for _, path in files}):
        left = [pair for pair in files if not _named(*pair)]
        for _, path in left:
            check_target(path, overwrite)
        for folder in dict.fromkeys(path.parent for _, path in left):
            sync_folder(folder)  # the hidden names: whoever finishes this after a power cut needs them
        try:
            for part, path in left:
                last = part is left[-1][0]
                if not last:
                    _keep_old(part, path)
                _rename(part, path, overwrite)
                if not last:
                    sync_folder(path.parent)
        except BaseException:
            if not all(_named(*pair) for pair in left):
                for part, path in reversed(left):
                    _take_back(part, path)
            raise
        for part, path in left:
            old(part).unlink(missing_ok=True)
            sync_folder(path.parent)


def old(part: Path) -> Path:
    """Where the file that a hidden one replaces waits until all the others have their names, too."""
    return part.with_suffix(".old")


def sync_folder(folder: Path) -> None:
    """Names given in the folder so far survive a power cut."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in CANNOT_SYNC:
            raise RuntimeError(f"{folder}: {problem.strerror}; is the disk in order?") from problem
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, overwrite: bool = False) -> None:
    """Writes a small file: atomically, for good, and read back before it gets its name."""
    check_target(path, overwrite)
    clear(path.parent)
    data = text.encode()
    temporary, file = create_hidden(path)
    try:
        with disk_errors(path, len(data)):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            forget(file)
        if temporary.read_bytes() != data:
            raise RuntimeError(f"{path}: reads back other than it was written, nothing was saved; try another disk")
        publish(temporary, path, overwrite)
    finally:
        discard(temporary, file)


def discard(temporary: Path, file: BinaryIO) -> None:
    """Closes and removes a hidden file, if it still is one; never hides the error for which that is done."""
    with contextlib.suppress(OSError):
        file.close()  # a full disk is said once more here
    with contextlib.suppress(OSError):
        temporary.unlink()


def forget(file: BinaryIO) -> None:
    """Drops what the system remembers of a synced file, where it can: the next reading comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def disk_errors(path: Path, nbytes: int) -> Iterator[None]:
    """Says what a disk refuses: ValueError if it is full or a quota reached, RuntimeError if it fails."""
    try:
        yield
    except OSError as problem:
        if problem.errno in DISK_FULL:
            raise ValueError(disk_full(path, nbytes)) from problem
        raise RuntimeError(f"{path}: cannot be written ({problem.strerror}), nothing was saved; is the disk in order, "
                           "and still there?") from problem  # fmt: skip


@contextlib.contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
    """The same for making a file in a folder."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as problem:
        if problem.errno in DISK_FULL:
            raise ValueError(f"{folder}: no file can be made there ({problem.strerror}); free some space or choose "
                             "another folder") from problem  # fmt: skip
        raise ValueError(f"{folder}: cannot be written to ({problem.strerror}); choose another folder") from problem


def disk_full(path: Path, nbytes: int) -> str:
    needs = f"needs {nbytes / 1e9:.2f} GB on that disk, which has less" if nbytes else "the disk is full"
    return f"{path}: {needs}; free some space or choose another folder"


def _rename(temporary: Path, path: Path, overwrite: bool) -> None:
    try:
        if overwrite:
            os.replace(temporary, path)
        elif os.name != "posix":
            os.rename(temporary, path)  # refuses there if the name is taken
        else:
            _link(temporary, path)
    except FileExistsError:
        raise taken(path) from None
    except OSError as problem:
        raise RuntimeError(f"{path}: the finished file could not get its name ({problem.strerror}), nothing was saved; "
                           "close what has that file open, or choose another name") from problem  # fmt: skip


def _link(temporary: Path, path: Path) -> None:
    """Renames, but never over another file."""
    try:
        os.link(temporary, path)
    except OSError as problem:
        if problem.errno not in NO_LINKS:
            raise
        check_target(path, False)  # a disk without hard links: next to nothing can come between these two lines
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def _named(part: Path, path: Path) -> bool:
    """Whether a file has its name already; a hidden one that is the same file goes."""
    if not part.exists():
        return True
    if path.exists() and os.path.samefile(part, path):
        part.unlink()
        return True
    return False


def _keep_old(part: Path, path: Path) -> None:
    """A second name for the file that is about to be replaced, so that it can come back."""
    if not os.path.lexists(path):
        return
    old(part).unlink(missing_ok=True)
    try:
        os.link(path, old(part), follow_symlinks=False)
    except OSError:  # no hard links there
        with contextlib.suppress(OSError):
            os.replace(path, old(part))


def _take_back(part: Path, path: Path) -> None:
    """What was at `path` is there again; the new file, if it had that name, is hidden again."""
    with contextlib.suppress(OSError):
        if not part.exists():
            os.replace(path, part)
        if old(part).exists():
            os.replace(old(part), path)
