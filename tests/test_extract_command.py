"""The extracted file says where it comes from and is there whole or not at all; the command line says what is wrong."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from conftest import TESTS
from extracting import QKV, extract, statistics, write_calibrated, write_pair
from synthetic import block, fingerprint, noise, qwen, recipe_file, save
from tessera import calibration_file, cli
from tessera.checkpoint import LAYER_ERRORS, PROVENANCE, Checkpoint
from tessera.extraction import Extraction
from tessera.quantization.difference import Wish
from tessera.version import VERSION
from tessera.writer import Writer


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path)


@pytest.fixture
def calibrated(tmp_path):
    return write_calibrated(tmp_path)


def test_it_says_where_it_comes_from(calibrated):
    base, original, known = calibrated
    report, _ = extract(base, original, wish=Wish(rank=4), calibration=known)
    file = Checkpoint(base.with_name("lora.safetensors"))
    sources = [{"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
               for path in (base, original)]  # fmt: skip
    assert json.loads(file.metadata[PROVENANCE]) == {
        "version": VERSION, "rank": 4, "tolerance": None, "max_rank": None, "layers": "", "seed": 0,
        "base": sources[0], "tuned": sources[1], "calibration": known.digest(), "lora": "lora.safetensors",
        "model": "base.safetensors",
    }  # fmt: skip
    errors = json.loads(file.metadata[LAYER_ERRORS])
    assert errors == {r.name: [round(r.error, 6), round(r.corrected_error, 6)] for r in report.layers}
    assert report.nbytes == file.nbytes


def test_same_files_same_bytes(pair, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        extract(*pair, tmp_path / name / "lora.safetensors")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")


@pytest.mark.parametrize("when", ["layers.0.attention.out", "layers.0.feed_forward.w1", "verifying"])
@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError])
def test_cancelling_leaves_nothing(pair, tmp_path, when, problem):
    def stop(step):
        if step.layer == when:
            raise problem

    before = fingerprint(tmp_path)
    with pytest.raises(problem):
        Extraction(*pair, tmp_path / "lora.safetensors").run(stop)
    assert fingerprint(tmp_path) == before


KILL = f"""
import os, signal, sys
sys.path.insert(0, {str(TESTS)!r})
from conftest import load_pack
load_pack()
from tessera.extraction import Extraction
die = lambda step: os.kill(os.getpid(), signal.SIGKILL) if step.layer == sys.argv[4] else None
Extraction(*sys.argv[1:4]).run(die)
"""


def test_a_killed_run_leaves_no_file_and_the_next_removes_what_it_hid(pair, tmp_path):
    target = tmp_path / "lora.safetensors"
    command = [sys.executable, "-c", KILL, *map(str, pair), str(target), "layers.0.feed_forward.w1"]
    found = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert found.returncode == -signal.SIGKILL and not target.exists()
    assert any(path.name.endswith(".part") for path in tmp_path.iterdir())
    extract(*pair)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "base.safetensors",
        "lora.safetensors",
        "tuned.safetensors",
    ]


def test_a_byte_that_changed_on_disk_is_found(pair, tmp_path, monkeypatch):
    finish = Writer.finish

    def damaged(self, metadata):
        path = finish(self, metadata)
        with open(path, "r+b") as file:
            file.seek(-5, os.SEEK_END)
            byte = file.read(1)
            file.seek(-5, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        return path

    monkeypatch.setattr(Writer, "finish", damaged)
    before = fingerprint(tmp_path)
    with pytest.raises(RuntimeError, match="reads back other than it was written"):
        extract(*pair)
    assert fingerprint(tmp_path) == before


def other_shapes(folder):
    tuned = block()
    tuned[f"{QKV}.weight"] = noise(64, 128)
    save(folder / "bad.safetensors", tuned)


def not_finite(folder):
    tuned = block()
    tuned[f"{QKV}.weight"][3, 5] = float("nan")
    save(folder / "bad.safetensors", tuned)


def a_lora(folder):
    save(folder / "bad.safetensors", {"diffusion_model.a.lora_up.weight": noise(8, 4), "a.alpha": torch.tensor(4.0),
                                      "diffusion_model.a.lora_down.weight": noise(4, 8)})  # fmt: skip


def foreign(folder):
    save(folder / "other.safetensors", {key: tensor + 1 for key, tensor in block().items()})
    calibration_file.write(statistics(Checkpoint(folder / "other.safetensors")), folder / "c.safetensors")


def huge(folder):
    save(folder / "bad.safetensors", block() | {f"{QKV}.weight": torch.full((96, 128), 1e30)})


BAD = "--base base.safetensors --tuned bad.safetensors -o new.safetensors"
GOOD = "--base base.safetensors --tuned tuned.safetensors -o new.safetensors"
REFUSED = {  # what is wrong: (what makes it so, the options, what the line says)
    "shapes": (other_shapes, BAD, r"base\.safetensors and bad\.safetensors: shapes differ: layers\.0\.attention\.qkv\."
               r"weight \[96, 128\] and \[64, 128\]; these are two architectures: take"),
    "nothing in common": (lambda folder: save(folder / "bad.safetensors", qwen()), BAD,
                          r"base.* have no layer in common, first layers\.0\.attention\.out\.weight and model\.embed"),
    "equal": (lambda folder: save(folder / "bad.safetensors", block()), BAD,
              r"base.* and bad.*: nothing that a LoRA can hold differs, 5 tensors are equal; no file"),
    "LoRA": (a_lora, BAD, r"bad\.safetensors: is a LoRA, not a checkpoint; give the model"),
    "LoRA as base": (a_lora, "--base bad.safetensors --tuned base.safetensors -o new.safetensors",
                     r"bad\.safetensors: is a LoRA"),
    "NaN": (not_finite, BAD, r"bad\.safetensors: layers\.0\.attention\.qkv\.weight: holds NaN or infinity; download"),
    "too large": (huge, BAD, r"bad\.safetensors: layers\.0\.attention\.qkv: differs by more than fp16 can hold"),
    "missing": (None, BAD, r"bad\.safetensors: cannot be read: No such file"),
    "same file": (None, "--base base.safetensors --tuned ./base.safetensors -o new.safetensors",
                  r"base\.safetensors: is base and tuned in one, nothing differs; choose two"),
    "output = base": (None, "--base base.safetensors --tuned tuned.safetensors -o base.safetensors --overwrite",
                      r"base\.safetensors: is one of the two checkpoints; choose another name"),
    "output exists": (lambda folder: (folder / "new.safetensors").write_bytes(b"x"), GOOD,
                      r"new\.safetensors: already exists; choose another name"),
    "no folder": (None, GOOD.replace("new", "no/new"), r"no: no such folder; create it"),
    "wrong ending": (None, GOOD.replace("new.safetensors", "new.pt"), r"new\.pt: name it \.safetensors"),
    "rank": (None, f"{GOOD} --rank 0", r"rank 0: must be 1 or more"),
    "highest rank": (None, f"{GOOD} --tolerance 0.1 --max-rank 0", r"max_rank 0: must be 1 or more"),
    "tolerance": (None, f"{GOOD} --tolerance 1.5", r"tolerance 1\.5: must be between 0 and 1, .*; 0\.05 for instance"),
    "pattern": (None, f"{GOOD} --layers blocks.**", r"layers 'blocks\.\*\*': match none of base\.safetensors, first "
                r"layers\.0\.attention\.out\.weight and .*; write module paths"),
    "broken pattern": (None, f"{GOOD} --layers {{a", r"pattern '\{a' has a bad brace"),
    "statistics": (foreign, f"{GOOD} --calibration c.safetensors",
                   r"statistics of another model \(\w{12}; tuned\.safetensors is \w{12}, base\.safetensors is"),
    "device": (None, f"{GOOD} --device warp", r"device 'warp': .*; use cpu"),
}  # fmt: skip


@pytest.fixture
def folder(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line_and_leave_nothing(folder, capsys, case):
    prepare, options, words = REFUSED[case]
    if prepare:
        prepare(folder)
    before = fingerprint(folder)
    assert cli.main(["extract-lora", *options.split()]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and fingerprint(folder) == before
    assert re.match(rf"tessera: .*{words}", err), err


def test_the_command_prints_a_table_or_json(folder, capsys):
    assert cli.main(["extract-lora", *GOOD.split(), "--rank", "4"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "3 layers, rank 4; mean loss" in out and f"| {QKV} | bfloat16 | 4 |" in out
    assert cli.main(["extract-lora", *GOOD.split(), "--tolerance", "0.01", "--overwrite", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["rank"] for row in report["layers"]] == [4, 4, 4] and report["lora"] == "new.safetensors"
    assert all(row["loss"] <= 0.01 for row in report["layers"]) and report["tolerance"] == 0.01


def test_the_command_takes_a_calibration_file(folder, capsys):
    calibration_file.write(statistics(Checkpoint(folder / "base.safetensors")), folder / "c.safetensors")
    assert cli.main(["extract-lora", *GOOD.split(), "--calibration", "c.safetensors", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert all(row["output_error"] > row["corrected_output_error"] for row in report["layers"])


def test_rank_and_tolerance_together_are_wrong_usage(folder):
    with pytest.raises(SystemExit) as left:
        cli.main(["extract-lora", *GOOD.split(), "--rank", "4", "--tolerance", "0.1"])
    assert left.value.code == 2


def test_a_recipes_quantization_is_repaired_from_the_command_line(folder, capsys):
    """The whole way: quantize without a LoRA, extract one, and `verify` finds the smaller error."""
    recipe_file(folder / "mine.toml", ("nvfp4", "**.{qkv,out}"), ("mxfp8", "**.w1"))
    quantize = "quantize base.safetensors -o q.safetensors --recipe mine.toml --rank 0"
    extract = "extract-lora --base q.safetensors --tuned base.safetensors -o q_lora.safetensors"
    verify = "verify q.safetensors --against base.safetensors --lora q_lora.safetensors --json"
    assert cli.main(quantize.split()) == cli.main(extract.split()) == 0
    capsys.readouterr()
    assert cli.main(verify.split()) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert len(rows) == 3 and all(after < 0.8 * before for before, after in (row["errors"] for row in rows))
