"""Layers are quantized by several processes or a Ray cluster: the same bytes as by one, whoever dies on the way."""

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

import killed
from conftest import TESTS
from synthetic import fingerprint, noise, recipe_file, save
from tessera import formats, workers
from tessera.checkpoint import Checkpoint
from tessera.job import Job
from tessera.quantization import recipe
from tessera.quantization.pipeline import Settings
from tessera.workers import Result, Task


@pytest.fixture
def folder(tmp_path):
    killed.source(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The files that one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    killed.source(folder)
    killed.job(folder).run()
    return fingerprint(folder / "out")


def children():
    return [process.pid for process in multiprocessing.active_children()]


# ---- processes


def test_two_processes_make_the_same_bytes_and_are_gone_afterwards(folder, alone):
    pids = set()
    report = killed.job(folder, workers=2).run(lambda step: pids.update(children()))
    assert fingerprint(folder / "out") == alone
    assert len(pids) == 2 and not children()
    assert [row.name for row in report.layers] == killed.LAYERS


def test_a_process_per_device_and_a_bad_weight_names_its_layer(folder):
    file = Checkpoint(folder / "source.safetensors")
    weights = {key: file.read(key) for key in file.tensors}
    weights[f"{killed.LAYERS[2]}.weight"][5, 7] = float("nan")
    save(folder / "source.safetensors", weights)
    with pytest.raises(
        ValueError, match=rf"^source\.safetensors: {killed.LAYERS[2]}: 1 values are not finite, .*nan; "
    ):
        killed.job(folder, calibrated=False, device="cpu, cpu").run()
    assert fingerprint(folder / "out") == {} and not children()


def test_a_worker_that_dies_ends_the_job_and_leaves_nothing(folder):
    def progress(step):
        if step.index == 2 and not step.verifying:
            for pid in children():
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"layers\..*: its worker process has ended, .*; take fewer --workers"):
        killed.job(folder, workers=2).run(progress)
    assert fingerprint(folder / "out") == {} and not children()


def test_workers_do_not_outlive_a_killed_parent(folder, alone):
    process = multiprocessing.get_context("spawn").Process(target=exec, args=(ORPHANS, {"folder": str(folder)}))
    process.start()
    report = folder / "workers"
    wait_for(report.exists)
    pids = [int(pid) for pid in report.read_text().split()]
    process.kill()
    process.join()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert len(pids) == 2
    killed.job(folder, workers=1, resume=True).run()
    assert fingerprint(folder / "out") == alone


ORPHANS = f"""
import multiprocessing, sys, time, pathlib
sys.path.insert(0, {str(TESTS)!r})
import killed
def progress(step):
    if step.index == 3:
        folder_ = pathlib.Path(folder)
        (folder_ / "pids").write_text(" ".join(str(p.pid) for p in multiprocessing.active_children()))
        (folder_ / "pids").rename(folder_ / "workers")
        time.sleep(600)
killed.job(pathlib.Path(folder), workers=2).run(progress)
"""


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited a minute in vain")


# ---- tasks and their order


def task(name="a.b", **changes):
    format = formats.NVFP4()
    weight = noise(32, 64)
    return Task(name, "file", format, Settings(rank=4), 3, "cpu", **{"weight": weight} | changes)


@pytest.mark.parametrize("label", ["nvfp4", "mxfp8", "int8_row", "fp8", "bf16"])
def test_a_task_and_its_result_survive_the_way(label):
    asked = workers.replace(task(), format=formats.parse(label), bias=torch.ones(32))
    expected = workers.run(asked).layer
    found = workers.unpacked(workers.answer(workers.packed(asked))).layer
    assert found.entries.keys() == expected.entries.keys() and found.error == expected.error
    for suffix, tensor in expected.entries.items():
        assert found.entries[suffix].dtype == tensor.dtype
        assert torch.equal(*(t.flatten().view(torch.uint8) for t in (found.entries[suffix], tensor)))


def test_the_answer_of_another_version_is_refused(monkeypatch):
    message = workers.packed(task())
    monkeypatch.setattr(workers, "VERSION", "99")
    with pytest.raises(RuntimeError, match=r"a worker has Tessera .*, this is 99; install the same"):
        workers.unpacked(message)


def test_results_come_in_order_and_no_more_than_the_window_are_out():
    out, most = [], 0

    def submit(asked):
        nonlocal most
        future = Future()
        out.append(future)
        most = max(most, sum(not f.done() for f in out))
        if len(out) >= 3:  # the last comes back first
            for late in reversed(out):
                late.done() or late.set_result(workers.packed(Result(None, (1, out.index(late)), 0.0)))
        return future

    def receive(name, future):
        return future.result()

    found = [result.shape[1] for result in workers.in_order(submit, receive, (task() for _ in range(9)), 3)]
    assert found == list(range(9)) and most == 3


@pytest.mark.parametrize(("options", "words"), [
    ({"workers": 0}, "workers 0: must be 1 or more"),
    ({"workers": 2, "ray": "auto"}, "ray auto: the cluster decides how many workers there are; leave out --workers"),
    ({"device": "cpu,warp"}, "device 'warp': .*; use cpu"),
])  # fmt: skip
def test_contradictions_are_refused_up_front(folder, options, words):
    with pytest.raises(ValueError, match=words):
        killed.job(folder, calibrated=False, **options)


# ---- Ray


@pytest.fixture(scope="module")
def cluster():
    """Two nodes, each with one worker."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def test_a_ray_cluster_makes_the_same_bytes_though_a_worker_is_killed(folder, alone, cluster):
    with ThreadPoolExecutor(1) as pool:
        victim = pool.submit(kill_first_at_work, cluster)
        report = killed.job(folder, ray=cluster.address).run()
        assert victim.result()
    assert fingerprint(folder / "out") == alone
    assert [row.name for row in report.layers] == killed.LAYERS
    assert not ray.is_initialized()


def kill_first_at_work(cluster):
    """Kills the first process of this cluster that is seen to run a task of ours."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()}
    for _ in range(6000):
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
                if int(fields["PPid"]) in raylets and (folder / "cmdline").read_text().startswith("ray::answer"):
                    os.kill(int(fields["Pid"]), signal.SIGKILL)
                    return int(fields["Pid"])
        time.sleep(0.01)
    return None


def test_what_a_task_raises_on_the_cluster_is_said_as_here(tmp_path, cluster):
    save(tmp_path / "source.safetensors", {"a.w.weight": noise(64, 64) * float("nan")})
    chosen = recipe.find(recipe_file(tmp_path / "mine.toml", ("nvfp4", "**")))
    work = Job(Checkpoint(tmp_path / "source.safetensors"), tmp_path / "new.safetensors", chosen, ray=cluster.address)
    before = fingerprint(tmp_path)
    with pytest.raises(ValueError, match=r"^source\.safetensors: a\.w: 4096 values are not finite"):
        work.run()
    assert fingerprint(tmp_path) == before


def test_without_a_cluster_there_it_says_so(folder):
    with pytest.raises(RuntimeError, match=r"--ray 127\.0\.0\.1:1: .*; is a cluster running there\?"):
        killed.job(folder, calibrated=False, ray="127.0.0.1:1").run()
    assert fingerprint(folder / "out") == {}


def test_without_ray_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'--ray auto needs Ray: pip install "tessera\[ray\]"'):
        killed.job(folder, calibrated=False, ray="auto")
