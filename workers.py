"""Who quantizes the layers: this process, several processes, or a Ray cluster. Same tasks, same results, same order."""

from __future__ import annotations

import io
import multiprocessing
import os
import runpy
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .formats import Format
from .quantization import pipeline
from .quantization.calibration import Statistics
from .quantization.pipeline import QuantizedLayer, Settings
from .shortage import Told
from .version import VERSION

ROOT = Path(__file__).resolve().parent
AHEAD = 2  # tasks per worker that are out at a time: one in work, one to go on with
REMEDY = "close other programs, take fewer --workers, or keep this layer in the recipe"


@dataclass(frozen=True)
class Task:
    """One layer to quantize, with all that it takes, so that it can be done anywhere."""

    name: str
    file: str  # the source's name, for messages
    format: Format
    settings: Settings
    seed: int  # of this layer
    device: str
    weight: Tensor | Path  # [out, in] in the source's own dtype; or the source, to be read from where the work is done
    statistics: Statistics | None = None
    bias: Tensor | None = None
    threads: int = 1  # of torch: another number may change a sum's last bit


@dataclass(frozen=True)
class Result:
    """A quantized layer in main memory."""

    layer: QuantizedLayer
    shape: tuple[int, int]
    seconds: float


class Workers(Protocol):
    """Whoever does tasks, in a `with` block. `map` gives their results in the tasks' order, with a bounded number of
    them out at a time."""

    devices: list[str]
    verifying: str  # device for what this process does itself
    width: int  # tasks in work at a time
    reads: bool  # the source by its path: a task need not carry the weight

    def __enter__(self) -> Workers: ...
    def __exit__(self, *exc) -> None: ...
    def map(self, tasks: Iterable[Task]) -> Iterator[Result]: ...


class Here:
    """This process, one layer after the other."""

    width, reads = 1, False

    def __init__(self, device: str):
        self.devices, self.verifying = [device], device

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *exc) -> None:
        pass

    def map(self, tasks: Iterable[Task]) -> Iterator[Result]:
        for task in tasks:
            done = run(task)
            del task  # and its weight, before the next one is read
            yield done


class Processes:
    """A process per entry of `devices`, each with a layer of its own in work."""

    reads = True

    def __init__(self, devices: list[str]):
        self.width, self.devices, self.verifying = len(devices), devices, devices[0]

    def __enter__(self) -> Processes:
        with ExitStack() as stack:
            context = multiprocessing.get_context("spawn")
            self._pools = [self._pool(stack, context) for _ in self.devices]
            self._close = stack.pop_all()
        self._out: list[list[Future]] = [[] for _ in self.devices]
        return self

    def _pool(self, stack: ExitStack, context) -> ProcessPoolExecutor:
        end, lifeline = context.Pipe(duplex=False)
        boot = (str(ROOT / "boot.py"), {"PACK": __package__, "LIFELINE": end})
        pool = ProcessPoolExecutor(1, context, runpy.run_path, boot)
        stack.callback(pool.shutdown, cancel_futures=True)
        stack.callback(lifeline.close)  # first: whoever is at work stops
        with _patient_threads():
            pool.submit(os.getpid)  # starts it
        stack.callback(end.close)
        return pool

    def __exit__(self, *exc) -> None:
        self._close.close()

    def map(self, tasks: Iterable[Task]) -> Iterator[Result]:
        return in_order(self._submit, self._receive, tasks, AHEAD * self.width)

    def _submit(self, task: Task) -> Future:
        self._out = [[future for future in futures if not future.done()] for futures in self._out]
        worker = min(range(self.width), key=lambda n: len(self._out[n]))
        future = self._pools[worker].submit(answer, packed(replace(task, device=self.devices[worker])))
        self._out[worker].append(future)
        return future

    def _receive(self, name: str, future: Future) -> bytes:
        try:
            return future.result()
        except BrokenProcessPool:
            raise RuntimeError(f"{name}: its worker process has ended, for lack of memory perhaps; take fewer "
                               "--workers") from None  # fmt: skip


def choose(device: str, processes: int, ray: str | None) -> Workers:
    """The workers for one device, or several with commas between. Raises ValueError for a contradiction."""
    devices = [name.strip() for name in device.split(",")]
    if processes < 1:
        raise ValueError(f"workers {processes}: must be 1 or more")
    if ray is not None:
        from .cluster import Ray

        if processes > 1 or len(devices) > 1:
            raise ValueError(f"ray {ray}: the cluster decides how many workers there are; leave out --workers, and "
                             "give one --device")  # fmt: skip
        return Ray(ray, device)
    count = max(processes, len(devices))
    return Here(device) if count == 1 else Processes([devices[n % len(devices)] for n in range(count)])


def run(task: Task) -> Result:
    """Quantizes a layer. Raises ValueError or RuntimeError naming file and layer."""
    started = time.monotonic()
    try:
        with Told(f"{task.file}: {task.name}", 0, REMEDY) as told:
            weight = _source(task.weight).weight(task.name) if isinstance(task.weight, Path) else task.weight
            told.needs = working_bytes(*weight.shape)
            weight = weight.float().to(task.device)
            bias = None if task.bias is None else task.bias.float().to(task.device)
            layer = pipeline.quantize(task.format, weight, task.settings, task.seed, task.statistics, bias)
    except ValueError as problem:
        raise ValueError(f"{task.file}: {task.name}: {problem}") from None
    except torch.cuda.OutOfMemoryError:
        raise RuntimeError(f"{task.file}: {task.name}: does not fit into the free memory of {task.device}; "
                           "free some there, or take --device cpu") from None  # fmt: skip
    entries = {suffix: tensor.cpu() for suffix, tensor in layer.entries.items()}
    branch = None if layer.branch is None else layer.branch.to("cpu")
    shape = (weight.shape[0], weight.shape[1])
    return Result(replace(layer, entries=entries, branch=branch), shape, time.monotonic() - started)


def working_bytes(rows: int, columns: int) -> int:
    """What the arithmetic of a layer needs at once, at most: some six fp32 copies."""
    return 6 * 4 * rows * columns


def answer(question: bytes) -> bytes:
    """`run` for a task and a result on their way between processes."""
    task = unpacked(question)
    torch.set_num_threads(task.threads)
    return packed(run(task))


def packed(message: Task | Result) -> bytes:
    """As bytes that `unpacked` reads back: torch's own format, since pickle knows no fp8 tensors."""
    buffer = io.BytesIO()
    torch.save((VERSION, message), buffer)
    return buffer.getvalue()


def unpacked(data: bytes) -> Task | Result:
    """Raises RuntimeError if another version of Tessera wrote it."""
    version, message = torch.load(io.BytesIO(data), weights_only=False)
    if version != VERSION:
        raise RuntimeError(f"a worker has Tessera {version}, this is {VERSION}; install the same on all machines")
    return message


def in_order(
    submit: Callable[[Task], Future], receive: Callable[[str, Future], bytes], tasks: Iterable[Task], window: int
) -> Iterator[Result]:
    """The results of tasks, of which no more than `window` are out at a time."""
    out: deque[tuple[str, Future]] = deque()
    for task in tasks:
        out.append((task.name, submit(task)))
        if len(out) == window:
            yield unpacked(receive(*out.popleft()))
    while out:
        yield unpacked(receive(*out.popleft()))


@lru_cache(1)
def _source(path: Path) -> Checkpoint:
    return Checkpoint(path)


@contextmanager
def _patient_threads() -> Iterator[None]:
    """Processes started meanwhile let their idle threads sleep instead of spin: there may be more than cores."""
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ["OMP_WAIT_POLICY"] = before or "PASSIVE"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_WAIT_POLICY"]
