"""Every bad file is refused: with its message, at once, in little memory, and without harm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bad_files
from refusing import READERS, path_of
from tessera import repairing

MOST_MB, MOST_SECONDS = 200, 20  # alone, none takes a second; another program may be busy


@pytest.mark.parametrize("name", bad_files.BAD)
def test_a_bad_file_is_refused_with_file_place_and_remedy(tmp_path, name):
    bad = bad_files.BAD[name]
    path = path_of(tmp_path, bad)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=bad.words) as refusal:
        READERS[bad.reader](path)
    said = str(refusal.value)
    assert path.name in said and (";" in said or "cannot be read" in said or bad.reader == "recipe")
    assert (
        len(said) < 2000 and all(letter.isprintable() for letter in said.replace("\n", " ")) and "<script" not in said
    )
    assert sorted(tmp_path.iterdir()) == before


def test_there_are_over_two_hundred():
    assert len(bad_files.BAD) >= 200


def test_none_takes_much_time_or_memory(tmp_path):
    """In a process of its own, which may not even reserve 1 GB more than it has when it begins."""
    command = [sys.executable, Path(__file__).with_name("refusing.py"), tmp_path]
    returns_memory = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # or the next file gets what is left of the last
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=returns_memory)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert rows.keys() == bad_files.BAD.keys()
    assert {name: row for name, row in rows.items() if row["refused"] != "ValueError"} == {}
    assert {name: row for name, row in rows.items() if row["mb"] > MOST_MB or row["seconds"] > MOST_SECONDS} == {}


def test_a_bad_file_is_not_repaired_into_anything(tmp_path):
    for number, bad in enumerate(bad_files.BAD.values()):
        if bad.reader == "checkpoint" and number % 5 == 0:
            folder = tmp_path / str(number)
            folder.mkdir()
            with pytest.raises(ValueError, match=bad.words):
                repairing.repair(path_of(folder, bad), folder / "out.safetensors")
            assert not (folder / "out.safetensors").exists()
