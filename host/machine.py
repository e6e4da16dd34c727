"""What the doctor learns only from the running host."""

from __future__ import annotations

import os
from pathlib import Path

import comfy.cli_args
import comfy.model_management
import comfyui_version

from .. import doctor
from . import loading, settings


def diagnose() -> doctor.Diagnosis:
    """Of the device on which the host computes."""
    folder = loading.transcoded_folder()
    sizes = _sizes(folder)
    host = doctor.ComfyUI(comfyui_version.__version__, str(folder), len(sizes), sum(sizes), _merge_guard(),
                          bool(comfy.cli_args.args.cpu))  # fmt: skip
    return doctor.diagnose(str(comfy.model_management.get_torch_device()), comfyui=host)


def _sizes(folder: Path) -> list[int]:
    """Bytes of the files in a folder, which need not exist and may change meanwhile."""
    try:
        with os.scandir(folder) as entries:
            return [entry.stat().st_size for entry in entries if entry.is_file()]
    except OSError:
        return []


def _merge_guard() -> str:
    try:
        on = "on" if settings.merge_guard() else "off"
    except ValueError as problem:
        return str(problem)
    told = os.environ.get(settings.MERGE_GUARD_VARIABLE)
    return f"{on} ({settings.MERGE_GUARD_VARIABLE}={told})" if told else f"{on} (setting)"
