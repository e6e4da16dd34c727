"""The folder of transcoded layers within its limit: files that were used longest ago go first."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def trim(used: Path, limit: int | None) -> list[str]:
    """Marks a cache file as used now, then deletes others beside it until all take at most `limit` bytes.

    Returns the names of those deleted. The file in use stays, whatever its size; None is no limit.
    """
    if used.is_file():
        os.utime(used)
    sizes = {path: path.stat() for path in used.parent.glob("*.safetensors") if path.is_file()}
    removed, total = [], sum(stat.st_size for stat in sizes.values())
    for path in sorted(sizes.keys() - {used}, key=lambda path: sizes[path].st_mtime_ns):
        if limit is None or total <= limit:
            break
        with contextlib.suppress(OSError):  # open in another process on Windows, or gone already
            path.unlink()
            removed.append(path.name)
            total -= sizes[path].st_size
    return removed
