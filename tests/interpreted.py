"""A process of its own where Triton interprets kernels on the CPU: TRITON_INTERPRET counts when one is decorated."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def run(file):
    """Every test of the file, with the interpreter on; fails with pytest's own report."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", file]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"with TRITON_INTERPRET=1:\n{result.stdout[-6000:]}{result.stderr[-2000:]}"


def poisoned(*shape, dtype, device):
    """torch.empty full of NaN, or of bytes 0x7F, which no kernel may leave there."""
    x = torch.empty(*shape, dtype=dtype, device=device)
    if dtype.is_floating_point and dtype.itemsize > 1:
        return x.fill_(torch.nan)
    x.view(torch.uint8).fill_(0x7F)
    return x


def start():
    """Makes this process one that interprets; before Triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    import conftest  # noqa: F401 loads the pack


def executor():
    """One such process: `executor().submit(f, *arguments).result()` for a function f of a module in tests/."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=start)
