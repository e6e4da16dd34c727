"""Tessera's settings as ComfyUI's settings dialog keeps them, and as a server without one is told them."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import folder_paths

MERGE_GUARD, MERGE_GUARD_VARIABLE = "Tessera.MergeGuard", "TESSERA_MERGE_GUARD"
CACHE_LIMIT, CACHE_LIMIT_GB = "Tessera.CacheLimit", 100
USER = "default"  # with --multi-user too: a patch does not say whose workflow it is from


def merge_guard() -> bool:
    """Whether LoRAs of ComfyUI's own nodes run beside quantized weights: TESSERA_MERGE_GUARD=0 or 1, else the setting.

    Raises ValueError if the variable is anything else.
    """
    told = os.environ.get(MERGE_GUARD_VARIABLE, "")
    if told:
        if told not in ("0", "1"):
            raise ValueError(f"{MERGE_GUARD_VARIABLE} is {told!r}; set it to 1 (on) or 0 (off), or remove it")
        return told == "1"
    return _setting(MERGE_GUARD) is not False


def cache_limit() -> int | None:
    """Bytes that transcoded layers may take on disk, from the setting in GB (10^9 bytes); None: no limit."""
    gigabytes = _setting(CACHE_LIMIT)
    if isinstance(gigabytes, bool) or not isinstance(gigabytes, int | float) or not 0 <= gigabytes < 1e9:
        gigabytes = CACHE_LIMIT_GB  # never set, or not by the settings dialog
    return int(gigabytes * 1e9) or None


def _setting(name: str):
    """What the user has set; None where nothing was, which is the default that web/tessera.js names."""
    file = Path(folder_paths.get_user_directory()) / USER / "comfy.settings.json"
    try:
        stat = file.stat()
    except OSError:  # nobody has changed a setting yet
        return None
    return _read(file, stat.st_mtime_ns, stat.st_size).get(name)


@functools.lru_cache(maxsize=1)
def _read(file: Path, *_version: int) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # being written just now; ComfyUI says itself when it is damaged
        return {}
    return found if isinstance(found, dict) else {}
