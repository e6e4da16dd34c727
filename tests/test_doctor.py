"""The doctor: every format's plan on a device, one verdict, and a table for issue reports."""

import json

import pytest

from tessera import cli, doctor
from tessera.kernels.dispatch import DeviceFacts
from test_dispatch import DEVICES, cpu, nvidia


def test_every_format_has_a_line_and_the_verdict_names_what_to_install():
    found = doctor.diagnose("cuda", nvidia(12, 0, cuda=(12, 8), name="NVIDIA GeForce RTX 5090", driver=(13, 0)))
    text = "\n".join(found.lines())
    assert all(label in text for label in doctor.LABELS)
    assert "NVIDIA GeForce RTX 5090: cuda SM 12.0, torch 2.13, CUDA 12.8" in text and "driver: CUDA 13.0" in text
    assert "native path disabled" in text
    assert found.verdict() == "To run every format at its best: install torch from the cu130 index."


@pytest.mark.parametrize(("name", "words"), [
    ("SM 12.0 RTX 50", "Every format runs by its best kernel"),
    ("SM 8.6 RTX 30", "Every format runs by its best kernel"),
    ("MPS", "Decoded for every call on this device: nvfp4, mxfp8"), ("SM 12.0, torch 2.9", "update torch"),
    ("SM 12.0, no CUDA backend", "reinstall comfy-kitchen"),
])  # fmt: skip
def test_verdict_follows_from_the_plans(name, words):
    assert words in doctor.diagnose("x", DEVICES[name][0]).verdict()


@pytest.mark.parametrize("name", DEVICES)
def test_markdown_is_a_table_of_all_formats_with_versions(name):
    text = doctor.diagnose("x", DEVICES[name][0]).markdown()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == len(doctor.LABELS) + 1 and all(line.count("|") == 7 for line in rows)
    assert "comfy-kitchen" in text and "torch 2." in text


def test_command_prints_text_json_or_markdown(capsys):
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    assert "nvfp4" in capsys.readouterr().out
    assert cli.main(["doctor", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["facts"]["type"] == "cpu" and set(found["plans"]) == set(doctor.LABELS)
    assert found["versions"]["torch"].startswith("2.")
    assert cli.main(["doctor", "--device", "cpu", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("**Tessera")


@pytest.mark.parametrize(("name", "words"), [("gpu9", "torch knows no such device"), ("cuda", "sees no GPU")])
def test_a_device_that_is_not_there_is_refused(name, words, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["doctor", "--device", name]) == 1
    assert words in capsys.readouterr().err


def test_facts_without_a_gpu_are_the_cpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert doctor.diagnose().facts.type in ("cpu", "mps", "xpu")
    assert isinstance(doctor.diagnose("cpu").facts, DeviceFacts) and cpu().cpu is not None
