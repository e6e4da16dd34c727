"""A job killed with SIGKILL goes on where it was: the files are those of a run that nobody disturbed, to the byte."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch
from safetensors import safe_open

import killed
from conftest import TESTS
from synthetic import fingerprint
from tessera import journal
from tessera.checkpoint import Checkpoint

KILLS = {  # (mode, where): layers that a resumed run need not do again
    ("correction", "layer 0"): 0,
    ("correction", "layer 5"): 5,
    ("correction", "writing 3"): 3,
    ("correction", "verifying 0"): 8,
    ("absorb", "verifying 4"): 8,
    ("correction", "publishing"): 8,
    ("correction", "published"): 8,
    ("absorb", "writing 6"): 6,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Per kill the folder of a job whose process was killed there."""
    made = {kill: tmp_path_factory.mktemp("_".join(kill).replace(" ", "_")) for kill in KILLS}
    for folder in made.values():
        killed.source(folder)
    arguments = [word for (mode, where), folder in made.items() for word in (str(folder), mode, where)]
    found = subprocess.run([sys.executable, str(TESTS / "killed.py"), *arguments], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    return made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Per mode the files of its job, and its report."""

    def run(mode):
        folder = tmp_path_factory.mktemp(f"undisturbed_{mode}")
        killed.source(folder)
        report = killed.job(folder, mode).run()
        return fingerprint(folder / "out"), report, folder / "out"

    return {mode: run(mode) for mode in ("correction", "absorb")}


@pytest.mark.parametrize("kill", KILLS, ids=" ".join)
def test_a_killed_job_resumes_to_the_same_bytes(folders, undisturbed, kill):
    folder, (files, expected, _) = folders[kill], undisturbed[kill[0]]
    assert any(name.endswith(".journal") for name in fingerprint(folder / "out"))
    layers = []
    report = killed.job(folder, kill[0], resume=True).run(lambda step: step.verifying or layers.append(step.layer))
    assert fingerprint(folder / "out") == files
    assert layers == killed.LAYERS[KILLS[kill] :]
    numbers = [(row.name, row.nbytes, row.error, row.corrected_error, row.output_error) for row in report.layers]
    wanted = [(row.name, row.nbytes, row.error, row.corrected_error, row.output_error) for row in expected.layers]
    assert [row[:2] for row in numbers] == [row[:2] for row in wanted]
    assert all(a == pytest.approx(b, abs=1e-6) for a, b in zip(numbers, wanted, strict=True) if None not in a + b)


def test_what_statistics_add_is_read_by_safetensors_and_aligned(undisturbed):
    folder = undisturbed["correction"][2]
    for path in folder.glob("*.safetensors"):
        file = Checkpoint(path)
        with safe_open(path, "pt") as opened:
            for key, spec in file.tensors.items():
                assert file._offsets[key] % spec.dtype.itemsize == 0
                found, expected = (t.flatten().view(torch.uint8) for t in (opened.get_tensor(key), file.read(key)))
                assert torch.equal(found, expected), key
    model = Checkpoint(folder / "absorb.safetensors")
    for suffix in ("input_scale", "pre_quant_scale"):
        assert any(key.endswith(suffix) for key in model.tensors)
    assert json.loads(model.metadata["tessera_outputs"]).keys() == set(killed.CALIBRATED)


# ---- an interrupted job and what it left


@pytest.fixture
def interrupted(tmp_path):
    """A folder whose job stopped after five layers; its lock is gone, its files are there."""
    killed.source(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "INTERVAL", 0)
        patch.setattr(journal.Journal, "__exit__", lambda self, *_: self._file.close())
        patch.setattr("tessera.writer.Writer.__exit__", lambda self, *_: self._file.close())
        with pytest.raises(Stop):
            killed.job(tmp_path).run(stop_at(5))
    return tmp_path


class Stop(Exception):
    pass


def stop_at(index):
    def progress(step):
        if step.index == index:
            raise Stop

    return progress


def left(folder, suffix):
    return sorted((folder / "out").glob(f".*.{suffix}"))


def resumed(folder, **options):
    """(names of the layers that a resumed job did, the files it made)."""
    layers = []
    killed.job(folder, resume=True, **options).run(lambda step: step.verifying or layers.append(step.layer))
    return layers, fingerprint(folder / "out")


def test_the_report_of_a_resumed_job_says_so(interrupted):
    report = killed.job(interrupted, resume=True).run()
    assert "resumed: 5 of 8 layers were done by a run of this job that was interrupted" in report.warnings


@pytest.mark.parametrize("torn", [b'{"row": {"name": "layers.2', b"\x00" * 40, b'{"half": 1}'])
def test_a_torn_last_line_is_ignored(interrupted, undisturbed, torn):
    [path] = left(interrupted, "journal")
    with open(path, "ab") as file:
        file.write(torn)
    assert resumed(interrupted) == (killed.LAYERS[5:], undisturbed["correction"][0])


@pytest.mark.parametrize(("file", "layer"), [("absorb.safetensors", 3), ("absorb_lora.safetensors", 1)])
def test_a_layer_that_is_not_on_disk_as_journaled_is_done_again(interrupted, undisturbed, file, layer):
    header = 8 + int.from_bytes((undisturbed["correction"][2] / file).read_bytes()[:8], "little")
    [lines], [part] = left(interrupted, "journal"), (interrupted / "out").glob(f".{file}.*.part")
    written = json.loads(lines.read_text().splitlines()[1 + layer])["lora" if "lora" in file else "model"]
    first = min(entry["data_offsets"][0] for entry in written.values() if "data_offsets" in entry)
    with open(part, "r+b") as opened:
        opened.seek(header + first)
        byte = opened.read(1)[0]
        opened.seek(header + first)
        opened.write(bytes([byte ^ 1]))
    assert resumed(interrupted) == (killed.LAYERS[layer:], undisturbed["correction"][0])


def test_lost_hidden_files_are_made_again(interrupted, undisturbed):
    for part in left(interrupted, "part"):
        part.unlink()
    assert resumed(interrupted) == (killed.LAYERS, undisturbed["correction"][0])


@pytest.mark.parametrize("change", [{"seed": 1}, {"calibrated": False}, {"mode": "absorb"}])
def test_another_job_does_not_go_on_with_it_and_clears_it_away(interrupted, change):
    layers, files = resumed(interrupted, **change)
    assert layers == killed.LAYERS and not any(name.startswith(".") for name in files)


def test_a_source_that_was_changed_starts_anew(interrupted):
    os.utime(interrupted / "source.safetensors")
    assert resumed(interrupted)[0] == killed.LAYERS


def test_without_resume_what_was_left_is_removed(interrupted, undisturbed):
    layers = []
    report = killed.job(interrupted).run(lambda step: step.verifying or layers.append(step.layer))
    assert layers == killed.LAYERS and not any("resumed" in warning for warning in report.warnings)
    assert fingerprint(interrupted / "out") == undisturbed["correction"][0]


def test_a_cancelled_resumed_job_leaves_nothing(interrupted):
    with pytest.raises(Stop):
        killed.job(interrupted, resume=True).run(stop_at(6))
    assert fingerprint(interrupted / "out") == {}


def test_a_model_in_memory_always_starts_anew(interrupted):
    """It has no date: nobody knows what happened to it since."""
    work = killed.job(interrupted)
    work.source = types.SimpleNamespace(name="MODEL", path=None)
    assert work._identity() != work._identity()


def test_a_job_that_runs_elsewhere_is_not_touched(tmp_path):
    killed.source(tmp_path)

    def progress(step):
        if step.index != 2:
            return
        before = fingerprint(tmp_path)
        for resume in (False, True):
            with pytest.raises(
                ValueError, match=r"absorb\.safetensors: another process is making this very file; wait"
            ):
                killed.job(tmp_path, resume=resume).run()
        with pytest.raises(Stop):
            killed.job(tmp_path, seed=1).run(stop_at(1))  # another job with the same target
        assert fingerprint(tmp_path) == before

    killed.job(tmp_path).run(progress)
    assert sorted(fingerprint(tmp_path / "out")) == ["absorb.safetensors", "absorb_lora.safetensors"]


def test_hidden_files_without_a_journal_are_cleared_away(tmp_path):
    killed.source(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".absorb.safetensors.0a1b2c3d.part").write_bytes(b"left by version 0.1")
    (tmp_path / "out" / ".other.safetensors.0a1b2c3d.part").write_bytes(b"somebody else's")
    killed.job(tmp_path).run()
    assert [name for name in fingerprint(tmp_path / "out") if name.startswith(".")] == [
        ".other.safetensors.0a1b2c3d.part"
    ]
