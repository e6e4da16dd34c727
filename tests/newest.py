"""The newest version of a package that the package index has, in a folder of its own; needs no packages itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CACHE = Path(os.environ.get("TESSERA_CACHE") or Path(__file__).resolve().parent.parent / ".cache").resolve() / "trust"
KITCHEN, FRONTEND, TORCHAO = "comfy-kitchen", "comfyui-frontend-package", "torchao"
DAY = 86400  # seconds


def fetch(package: str, python: str = sys.executable) -> tuple[Path | None, str]:
    """(folder with a package's newest version, that version), fetched once a day; (None, why) if no index answers."""
    folder = CACHE / package
    done = folder / "done"
    if not done.exists() or time.time() - done.stat().st_mtime > DAY:
        fresh = folder.with_name(f"{package}-{os.getpid()}")
        command = [python, "-m", "pip", "install", "-q", "--no-deps", "--target", str(fresh), package]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode and not done.exists():
            shutil.rmtree(fresh, ignore_errors=True)
            return None, (found.stderr.strip().splitlines() or ["pip failed"])[-1]
        if not found.returncode:
            (fresh / "done").touch()
            shutil.rmtree(folder, ignore_errors=True)
            fresh.rename(folder)
    found = [path.name for path in folder.glob(f"{package.replace('-', '_')}-*.dist-info")]
    return folder, found[0].removesuffix(".dist-info").split("-")[-1] if found else "unknown"
