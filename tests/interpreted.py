"""Runs a test file where Triton interprets its kernels: on the CPU, in a process of its own."""

import os
import subprocess
import sys
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
