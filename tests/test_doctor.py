"""The doctor: every format's plan on a device, one verdict, and a table for issue reports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
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


# What to do


def fixes(facts, **more):
    found = doctor.diagnose("x", facts)
    return {fix.what: (fix.command, fix.optional) for fix in found.fixes()}


def test_torch_for_an_older_cuda_is_named_with_the_exact_command():
    ((what, (command, optional)),) = fixes(nvidia(12, 0, cuda=(12, 8), driver=(13, 0))).items()
    assert what == "install torch from the cu130 index" and not optional
    assert command.endswith(
        "-m pip install --upgrade torch torchvision torchaudio --index-url https://download.pytorch.org/whl/cu130"
    )


def test_an_old_driver_comes_before_torch():
    first, second = fixes(nvidia(12, 0, cuda=(12, 8), driver=(12, 8)))
    assert first == "update the NVIDIA driver to 580 or newer: this one runs CUDA 12.8 at most"
    assert second == "install torch from the cu130 index"
    ((_, (command, _)),) = fixes(nvidia(12, 0, torch=(2, 9), driver=(12, 8))).items()
    assert command.endswith("/cu128")  # what that driver runs


def test_kitchen_is_reinstalled_in_the_version_that_the_host_wants():
    ((what, (command, _)),) = fixes(DEVICES["SM 12.0, no CUDA backend"][0]).items()
    version = doctor.versions()["comfy-kitchen"]
    assert what == "reinstall comfy-kitchen" and command.endswith(f"--no-deps comfy-kitchen=={version}")


def test_formats_without_a_kernel_are_never_called_past_help_where_an_install_helps():
    found = doctor.diagnose("x", DEVICES["SM 8.6, CUDA 12, no Triton"][0])
    assert "Nothing to install" not in found.verdict()
    assert [fix.what.split(" (")[0] for fix in found.fixes()] == [
        "install torch from the cu130 index", "install Triton 3.6 or newer"]  # fmt: skip


def test_triton_is_offered_not_demanded():
    found = doctor.diagnose("x", DEVICES["SM 12.0, no Triton"][0])
    ((fix),) = found.fixes()
    assert fix.optional and "triton" in fix.command and "best kernel" in found.verdict()


@pytest.mark.parametrize("name", ["SM 7.5 Turing", "SM 8.9 RTX 40", "SM 12.0 RTX 50", "MPS", "ROCm RDNA2"])
def test_a_machine_that_lacks_nothing_is_told_nothing(name):
    assert fixes(DEVICES[name][0]) == {}


def test_portable_comfyui_gets_its_own_python(monkeypatch):
    monkeypatch.setattr(sys, "executable", str(Path("/x/python_embeded/python.exe")))
    ((_, (command, _)),) = fixes(nvidia(12, 0, cuda=(12, 8))).items()
    assert command.startswith(r".\python_embeded\python.exe -s -m pip install")


# What it says of comfy-kitchen and of the host


def test_backends_that_are_off_say_why():
    import comfy_kitchen

    found = {backend.name: backend for backend in doctor.kitchen_backends(nvidia(8, 6, cuda=(12, 8)))}
    listed = comfy_kitchen.list_backends()
    assert found.keys() == listed.keys() and found["eager"].on and not found["eager"].why
    for name, backend in found.items():
        assert backend.on == (listed[name]["available"] and not listed[name]["disabled"])
        assert backend.on or backend.why
    comfy_kitchen.registry.disable("eager")
    try:
        off = {backend.name: backend.why for backend in doctor.kitchen_backends(cpu())}
        assert off["eager"] == "switched off"
    finally:
        comfy_kitchen.registry.enable("eager")


def hosted(folder):
    host = doctor.ComfyUI("0.30.0", folder, 3, 2_500_000_000, "off (TESSERA_MERGE_GUARD=0)")
    return doctor.diagnose("cuda", nvidia(12, 0, name="NVIDIA GeForce RTX 5090", memory=32 << 30), host)


def test_everything_about_the_host_is_on_the_screen_and_in_the_report():
    found = hosted("/data/ComfyUI/user/tessera/transcoded")
    for text in ("\n".join(found.lines()), found.markdown()):
        for word in ("NVIDIA GeForce RTX 5090 (SM 12.0)", "34.36 GB (32.00 GiB)", "ComfyUI: 0.30.0",
                     "merge guard: off (TESSERA_MERGE_GUARD=0)", "2.50 GB", "in 3 files", "eager on"):  # fmt: skip
            assert word in text, word
    assert dict(found.as_dict()["machine"])["transcoding cache"].endswith("/data/ComfyUI/user/tessera/transcoded")
    assert "/data/ComfyUI" not in found.markdown() and ".../user/tessera/transcoded" in found.markdown()


def test_outside_comfyui_it_says_so():
    assert "ComfyUI: not running in this process" in "\n".join(doctor.diagnose("cpu").lines())


@pytest.mark.parametrize("home", ["/home/alice", "/Users/alice", r"C:\Users\alice"])
def test_nothing_of_the_users_home_is_in_a_report(home, monkeypatch):
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", home))
    found = hosted(f"{home}/ComfyUI/user/tessera/transcoded")
    assert "alice" not in found.markdown() + json.dumps(found.as_dict()) and "~/ComfyUI/user" in str(found.as_dict())
    assert doctor.without_home(f"{home}son and {home}") == f"{home}son and ~"


def test_asking_the_doctor_touches_no_gpu_before_it_is_asked():
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest, torch; "
        "torch.cuda.is_available = torch.cuda.init = torch.cuda.get_device_properties = None; "
        "import tessera.doctor; print(torch.cuda.is_initialized(), 'comfy_kitchen' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert found.stdout.split() == ["False", "False"], found.stderr
