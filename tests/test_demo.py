"""scripts/demo: what it refuses, what it reuses, what it sends to ComfyUI, and one whole run."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from comfy_host import TINY
from host_server import HostError, HostServer

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "demo.py"
QUANTIZED = Path(__file__).resolve().parent / "golden" / "ctq134_nvfp4.safetensors"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("tessera_demo", SCRIPT)
    sys.modules["tessera_demo"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(tmp_path):
    """A user's models folder with stand-ins for the three files of Z-Image."""
    paths = {
        "--model": tmp_path / "my models" / "diffusion_models" / "mine.safetensors",
        "--text-encoder": tmp_path / "my models" / "text_encoders" / "qwen_3_4b.safetensors",
        "--vae": tmp_path / "my models" / "vae" / "ae.safetensors",
    }
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"layers.0.feed_forward.w1.weight": torch.zeros(64, 64).bfloat16()}, path)
    return paths


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such.safetensors"], r"no/such\.safetensors: no such file"),
        (["--model", str(QUANTIZED)], r"ctq134_nvfp4\.safetensors: is quantized already"),
        (["--model", str(TINY)], r"--text-encoder FILE is needed: no qwen_3_4b\.safetensors in "),
        (["--model", str(SCRIPT)], r"demo\.py: "),
        (["--vae", "ae.safetensors"], "belong to --model FILE"),
        (["--recipe", "z_image_nvfp5"], r"z_image_nvfp5.*z_image_nvfp4"),
        (["--rank", "0"], "--rank must be 1 or more"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(demo, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        demo.parse(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_text_encoder_and_vae_are_found_beside_the_model(demo, files, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    settings = demo.parse(["--model", str(files["--model"])])
    assert (settings.ends.text_encoder, settings.ends.vae) == (files["--text-encoder"], files["--vae"])
    files["--vae"].unlink()
    with pytest.raises(SystemExit):
        demo.parse(["--model", str(files["--model"])])


def test_file_is_used_again_only_for_the_same_source_recipe_and_rank(demo, tmp_path):
    from tessera.checkpoint import Checkpoint
    from tessera.job import Job
    from tessera.quantization import recipe

    model = shutil.copy(TINY, tmp_path / "mine.safetensors")
    settings = demo.parse(["--output", str(tmp_path)])
    settings.model = model
    first = demo.find_quantized(settings)
    assert not first.exists and first.path.name == "mine_z_image_nvfp4.safetensors"
    first.lora.parent.mkdir(parents=True)
    first.path.parent.mkdir(parents=True)
    Job(Checkpoint(model), first.path, recipe.builtin("z_image_nvfp4"), first.lora).run()
    assert demo.find_quantized(settings).exists
    settings.rank = 16
    again = demo.find_quantized(settings)
    assert not again.exists and again.path.name == "mine_z_image_nvfp4_2.safetensors"


def test_calibration_is_used_again_only_for_the_same_model_and_prompts_not_shown(demo, tmp_path):
    from tessera.checkpoint import Checkpoint
    from tessera.job import Job
    from tessera.quantization import recipe

    settings = demo.parse(["--output", str(tmp_path)])
    recording = demo.find_recording(settings)
    assert not recording.exists and recording.path == demo.find_recording(settings).path
    assert not set(demo.calibration_prompts(settings)) & set(settings.prompts)
    first = demo.find_quantized(settings, recording)
    assert not first.exists and first.path.name == "tiny_zimage_bf16_z_image_nvfp4_calibrated.safetensors"
    first.lora.parent.mkdir(parents=True)
    first.path.parent.mkdir(parents=True)
    Job(Checkpoint(TINY), first.path, recipe.builtin("z_image_nvfp4"), first.lora).run()
    assert not demo.find_quantized(settings, recording).exists  # of that name, but nothing was calibrated
    settings.prompts = [demo.CALIBRATION_PROMPTS[0]]
    assert demo.CALIBRATION_PROMPTS[0] not in demo.calibration_prompts(settings)
    assert demo.find_recording(settings).path != recording.path
    settings = demo.parse(["--output", str(tmp_path)])
    settings.model = other_model(tmp_path / "other" / TINY.name)
    assert demo.find_recording(settings).path != recording.path


def other_model(path):
    """The tiny model with other weights, under the same name."""
    tensors = {key: tensor * 2 for key, tensor in load_file(TINY).items()}
    path.parent.mkdir()
    save_file(tensors, path)
    return path


def test_figures_are_what_their_names_say(demo):
    white, gray = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8), (254, 254, 254))
    assert demo.psnr(white, gray) == pytest.approx(48.13, abs=0.01)  # 20 log10(255)
    assert demo.psnr(white, white) == float("inf")
    assert demo.relative(torch.ones(4).numpy() * 1.1, torch.ones(4).numpy()) == pytest.approx(0.1, rel=1e-5)


def test_failing_node_is_explained_without_a_traceback(demo):
    details = {"node_type": "TinyPrompt", "exception_message": "unknown words tree"}
    problem = HostError("node 3: ValueError: unknown words tree\n  File ...", "execution_error", details=details)
    assert demo.explain(problem) == "TinyPrompt: unknown words tree"
    assert demo.explain(ValueError("mine.safetensors: ends early")) == "mine.safetensors: ends early"


@pytest.mark.host
def test_real_workflows_are_valid_in_comfyui(demo, files, tmp_path):
    """Everything about `--model` that needs no Z-Image: folders, names, nodes and their inputs."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: run scripts/test, or scripts/setup_host.py")
    arguments = [str(part) for pair in files.items() for part in pair]
    settings = demo.parse([*arguments, "--output", str(tmp_path / "out")])
    recording = demo.find_recording(settings)
    files = {demo.PLAIN: demo.find_quantized(settings), demo.CALIBRATED: demo.find_quantized(settings, recording)}
    with HostServer(args=demo.host_arguments(settings), cpu=True) as host:
        choices = host.object_info("TesseraQuantize")["input"]["required"]["source"][1]["options"]
        assert "diffusion_models/mine.safetensors" in choices
        made = [recording.path, *(path for file in files.values() for path in (file.path, file.lora))]
        graphs = [recording.nodes, *(demo.quantizing(settings, file) for file in files.values())]
        graphs += [demo.workflow(settings, files.get(c.file), c, settings.prompts) for c in demo.COLUMNS]
        for path in made:  # a graph needs by name what those before it have made by then
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(settings.model, path)
        for graph in graphs:
            host.queue(graph)
            host.post("/queue", {"clear": True})
        host.interrupt()


@pytest.mark.host
def test_demo_writes_picture_and_table_and_uses_its_files_again(tmp_path):
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: run scripts/test, or scripts/setup_host.py")
    command = [sys.executable, SCRIPT, "--output", tmp_path, "--prompt", "big red star center on white plain"]
    again = "used again: same "
    for expected in (("quantized in ", "recorded in ", "quantized in "), (again, again, again)):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        made = [line for line in done.stdout.splitlines() if re.match(r"tiny_zimage_bf16_\w+\.safetensors: ", line)]
        assert len(made) == 3 and all(how in line for how, line in zip(expected, made, strict=True)), done.stdout
        assert re.search(r"\d+ s in all", done.stdout)
    with Image.open(tmp_path / "comparison.png") as picture:
        assert min(picture.size) > 600
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")][2:]
    assert [row.split("|")[1].strip() for row in rows] == [
        "BF16", "NVFP4, strength 0", "NVFP4, strength 0.5", "NVFP4, strength 1", "NVFP4, calibrated, strength 1",
        "NVFP4, stock LoRA loader, 1",
    ]  # fmt: skip
    errors = [float(row.split("|")[4].strip(" %")) for row in rows[1:]]
    assert max(errors) == errors[4] > errors[0]  # merged is worse than no correction
    assert min(errors) == errors[3]  # calibrated is best
