"""Tessera's settings as ComfyUI's settings dialog keeps them, and as a server without one is told them."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import folder_paths

MERGE_GUARD, MERGE_GUARD_VARIABLE = "Tessera.MergeGuard", "TESSERA_MERGE_GUARD"
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
    file = Path(folder_paths.get_user_directory()) / USER / "comfy.settings.json"
    try:
        stat = file.stat()
    except OSError:  # nobody has changed a setting yet
        return True
    return _read(file, stat.st_mtime_ns, stat.st_size).get(MERGE_GUARD) is not False


@functools.lru_cache(maxsize=1)
def _read(file: Path, *_version: int) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # being written just now; ComfyUI says itself when it is damaged
        return {}
    return found if isinstance(found, dict) else {}
