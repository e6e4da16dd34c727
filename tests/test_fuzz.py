"""Mutants of sound files are refused with a ValueError or read as what their bytes say; `scripts/trust` tries many."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fuzzing

HERE = Path(__file__).parent
REGRESSIONS = HERE / "data" / "fuzz"  # files that were once read wrongly, or ended in something else than ValueError
CASES, SECONDS = 1500, 12


def test_mutants_are_refused_or_read_as_their_bytes_say(tmp_path):
    """In a process of its own, for its alarm clock."""
    command = [sys.executable, HERE / "fuzzing.py", tmp_path, "0", "0", str(CASES), str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["findings"] == []
    total = {key: sum(row.get(key, 0) for row in found["counts"].values()) for key in ("refused", "accepted")}
    assert total["refused"] > 20 and total["accepted"] > 10  # as many as the time allowed


@pytest.mark.parametrize("reader", fuzzing.CHECKS)
def test_what_the_mutants_are_made_of_is_sound(tmp_path, reader):
    path = tmp_path / ("f.toml" if reader == "recipe" else "f.safetensors")
    for data in fuzzing.seeds()[reader]:
        path.write_bytes(data)
        fuzzing.CHECKS[reader](path, data, True)


def test_the_oracle_sees_a_wrong_load(tmp_path):
    """Another weight than the bytes': the layer's scale doubled behind the reader's back."""
    data = fuzzing.seeds()["checkpoint"][4]
    path = tmp_path / "f.safetensors"
    header, body = fuzzing.mutating.parts(data)
    first, last = header["layers.2.w.weight_scale"]["data_offsets"]
    other = bytearray(data)
    other[len(data) - len(body) + last - 1] ^= 1  # in the exponent
    path.write_bytes(data)
    with pytest.raises(fuzzing.Wrong):
        fuzzing.check_checkpoint(path, bytes(other), False)
    assert last - first == 4


@pytest.mark.parametrize("path", sorted(REGRESSIONS.glob("*.*")), ids=lambda path: path.stem)
def test_what_went_wrong_once_does_not_again(tmp_path, path):
    reader = "recipe" if path.suffix == ".toml" else path.stem.partition("_")[0]
    data = path.read_bytes()
    copy = tmp_path / f"f{path.suffix}"
    copy.write_bytes(data)
    assert fuzzing.judge(reader, copy, data, True)[0] in ("refused", "accepted")
