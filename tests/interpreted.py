"""A process in which Triton's interpreter runs the kernels on the CPU; the tests themselves stay free of it.

TRITON_INTERPRET decides when a kernel is decorated, so one process cannot both interpret and compile.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor


def start():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    import conftest  # noqa: F401 loads the pack
    import torch

    torch.set_num_threads(1)


def executor():
    """Runs module-level functions of a module in tests/ under the interpreter: `executor().submit(f, *args).result()`."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=start)
