"""Main memory that ran out, said in words: who needed how much at once, what was free, and what helps."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from .quantization.report import size

_ASKED = re.compile(r"tried to allocate (\d+) bytes")
_SIGNS = ("not enough memory", "can't allocate memory", "Cannot allocate memory", "bad_alloc", "bad allocation",
          "os error 12", "can't start new thread", "unable to mmap")  # fmt: skip


class OutOfMemory(RuntimeError):
    """A step did not get the main memory that it needs."""


class Told:
    """In a `with` block: whatever fails there for lack of main memory ends as OutOfMemory.

    `subject` is what needed it, `needs` how many bytes at once (0: unknown), `remedy` what the user can do.
    """

    def __init__(self, subject: str, needs: int, remedy: str):
        self.subject, self.needs, self.remedy = subject, needs, remedy

    def __enter__(self) -> Told:
        self._free = free()
        return self

    def __exit__(self, kind, problem, trace) -> None:
        wanted = None if problem is None or isinstance(problem, OutOfMemory) else asked(problem)
        if wanted is not None:
            raise OutOfMemory(f"{self.subject}: {self._said(wanted)}; {self.remedy}") from None

    def _said(self, wanted: int) -> str:
        there = "" if self._free is None else f", {size(self._free)} were free"
        if self.needs and (self._free is None or self.needs > self._free):
            return f"needs {size(self.needs)} of main memory at once{there}"
        last = f" when {size(wanted)} more were needed" if wanted else ""
        about = f" (about {size(self.needs)} at once{there})" if self.needs else there
        return f"main memory ran out{last}{about}"


def asked(problem: BaseException) -> int | None:
    """Bytes that an allocation did not get, 0 where it does not say; None for what is no lack of main memory."""
    text = str(problem)
    lacks = isinstance(problem, MemoryError) or getattr(problem, "errno", None) == errno.ENOMEM
    lacks |= isinstance(problem, RuntimeError | OSError) and any(sign in text for sign in _SIGNS)
    lacks |= type(problem).__name__ == "SafetensorError" and any(sign in text for sign in _SIGNS)
    found = _ASKED.search(text)
    return (int(found[1]) if found else 0) if lacks else None


def in_words(problem: BaseException) -> str:
    """The message of any problem, a lack of main memory in plain words."""
    wanted = None if isinstance(problem, OutOfMemory) else asked(problem)
    if wanted is None:
        return str(problem)
    more = f" when {size(wanted)} more were needed" if wanted else ""
    return f"main memory ran out{more}; close other programs, or do it on a machine with more"


def free() -> int | None:
    """Bytes that this process could still take: the least of what system, cgroup and its own limits leave (Linux)."""
    found = [left for left in (_of_system(), _of_cgroup(), _of_limits()) if left is not None]
    return max(0, min(found)) if found else None


def _of_system() -> int | None:
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"))
    return int(found[1]) * 1024 if found else None


def _of_cgroup() -> int | None:
    place = re.search(r"^0::(/.*)$", _text("/proc/self/cgroup"), re.MULTILINE)
    folder = "/sys/fs/cgroup" + (place[1] if place else "")
    most, now = _text(f"{folder}/memory.max").strip(), _text(f"{folder}/memory.current").strip()
    return int(most) - int(now) if most.isdigit() and now.isdigit() else None


def _of_limits() -> int | None:
    """Of the address space, as `ulimit -v` bounds it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most, taken = resource.getrlimit(resource.RLIMIT_AS)[0], _text("/proc/self/statm").split()
    return most - int(taken[0]) * resource.getpagesize() if most != resource.RLIM_INFINITY and taken else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
