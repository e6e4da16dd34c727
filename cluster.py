"""A Ray cluster as a job's workers."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from .workers import AHEAD, ROOT, Result, Task, answer, in_order, packed

PATIENCE = 10  # seconds for a cluster to answer
RETRIES = 3  # of a task whose worker was lost
CODE = ("architectures", "formats", "kernels", "quantization", "recipes")  # folders of the pack that a task needs
NO_RAY = 'needs Ray: pip install "tessera[ray]"'


class Ray:
    """An existing Ray cluster. Sends the code and, with each task, the weight and statistics: no disk is shared."""

    reads = False

    def __init__(self, address: str, device: str):
        if importlib.util.find_spec("ray") is None:
            raise RuntimeError(f"--ray {address} {NO_RAY}")
        self._address, self.verifying = address, "cpu"
        self.devices = [torch.device(device).type]  # a task sees the GPU it was given, no other

    def __enter__(self) -> Ray:
        import ray

        with ExitStack() as stack:
            pack = Path(stack.enter_context(tempfile.TemporaryDirectory())) / __package__
            shutil.copytree(ROOT, pack, ignore=_no_code)
            gpu = self.devices == ["cuda"]
            try:
                self._knock()
                ray.init(self._address, runtime_env={"py_modules": [str(pack)]}, log_to_driver=False,
                         logging_level=logging.ERROR)  # fmt: skip
            except (OSError, ValueError, RuntimeError) as problem:
                first = str(problem).partition("\n")[0]
                raise RuntimeError(f"--ray {self._address}: {first}; is a cluster running there? `ray start --head` "
                                   "starts one") from None  # fmt: skip
            stack.callback(ray.shutdown)
            resources = ray.cluster_resources()
            self.width = max(1, int(resources.get("GPU" if gpu else "CPU", 0)))
            self._answer = ray.remote(num_cpus=1, num_gpus=int(gpu), max_retries=RETRIES)(answer)
            self._close = stack.pop_all()
        return self

    def _knock(self) -> None:
        """Raises OSError if nobody listens at a host:port, for which Ray itself would wait eight minutes."""
        host, _, port = self._address.removeprefix("ray://").rpartition(":")
        if host and port.isdecimal():
            socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()

    def __exit__(self, *exc) -> None:
        self._close.close()

    def map(self, tasks: Iterable[Task]) -> Iterator[Result]:
        return in_order(self._submit, self._receive, tasks, AHEAD * self.width)

    def _submit(self, task: Task) -> Future:
        return self._answer.remote(packed(replace(task, device=self.devices[0]))).future()

    def _receive(self, name: str, future: Future) -> bytes:
        from ray.exceptions import RayError, RayTaskError

        try:
            return future.result()
        except RayError as problem:
            if isinstance(problem, RayTaskError) and isinstance(problem.cause, ValueError | RuntimeError):
                raise problem.cause from None  # what the task itself raised
            first = str(problem).partition("\n")[0]
            raise RuntimeError(f"{name}: no worker of the Ray cluster could do it ({first}); is there "
                               "enough memory?") from None  # fmt: skip


def _no_code(folder: str, names: list[str]) -> set[str]:
    """What of the pack a worker needs not."""
    inside = Path(folder) != ROOT
    return {name for name in names if not (name.endswith((".py", ".toml")) or (not inside and name in CODE))}
