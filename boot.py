"""Run by its path in a new worker process: loads the pack, wherever it lies, under the name that its parent uses.

ComfyUI and the tests load the pack by path, so a worker could not import it by name. `PACK` is that name; `LIFELINE`
a pipe that closes when the parent is done with the worker, or dead.
"""

import contextlib
import importlib.util
import os
import signal
import sys
import threading
from pathlib import Path


def load(name: str) -> None:
    folder = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def end_with(lifeline) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)


if "PACK" in globals():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says what to do
    if globals()["PACK"] not in sys.modules:
        load(globals()["PACK"])
    threading.Thread(target=end_with, args=(globals()["LIFELINE"],), daemon=True).start()
