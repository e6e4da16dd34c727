"""Workflow after workflow from two clients: nothing grows, no picture changes, and jobs wait for each other.

The short form of tests/soak.py, of which scripts/trust runs 500.
"""

import os
import threading

import pytest

import soak
import synthetic
from tessera.checkpoint import Checkpoint
from tessera.job import Job
from tessera.quantization import recipe


@pytest.mark.host
def test_workflows_of_two_clients_leave_nothing_and_change_no_picture():
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: run scripts/setup_host.py")
    figures, wrong = soak.soak(22, probes=3, bound=0.1)  # memory is measured in the long form
    assert wrong == [], figures
    assert figures["executions"] >= 22 and figures["quantizations"] >= 2 and figures["probes"] >= 3


@pytest.mark.parametrize("seed", [0, 7], ids=["the same job", "another job"])
def test_of_two_jobs_for_one_target_at_once_one_is_refused_and_the_other_makes_its_files(tmp_path, seed):
    source = synthetic.save(tmp_path / "model.safetensors", synthetic.block())
    plan = recipe.read(synthetic.recipe_file(tmp_path / "plan.toml", ("nvfp4", "layers.**")))
    folders = {name: tmp_path / name for name in ("first", "second", "both")}
    for folder in folders.values():
        folder.mkdir()
    started, go_on, reports, refused = threading.Event(), threading.Event(), {}, {}

    def run(name, seed, folder, progress=lambda step: None):
        try:
            job = Job(Checkpoint(source), folders[folder] / "made.safetensors", plan, rank=4, seed=seed)
            reports[name] = job.run(progress)
        except (ValueError, RuntimeError, OSError) as problem:
            refused[name] = str(problem)

    def wait(step):
        started.set()
        assert go_on.wait(60)

    run("first alone", 0, "first")
    run("second alone", seed, "second")
    thread = threading.Thread(target=run, args=("first", 0, "both", wait))
    thread.start()
    try:
        assert started.wait(60)
        run("second", seed, "both")
    finally:
        go_on.set()
        thread.join(60)
    (loser,) = refused
    assert "made" in refused[loser] and ".safetensors" in refused[loser]
    winner = {"first": "second", "second": "first"}[loser]
    assert synthetic.fingerprint(folders["both"]) == synthetic.fingerprint(folders[winner])
