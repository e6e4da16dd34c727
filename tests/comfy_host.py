"""The real ComfyUI in this process, with the tiny trained Z-Image: load, sample, and measure velocities."""

import asyncio
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny" / "tiny_zimage_bf16.safetensors"
STEPS = 8
PROMPTS = (
    "big red star center on white plain", "big blue circle top left on cream checker",
    "big yellow triangle bottom on navy plain", "big green square right on black stripes",
    "big purple heart left on mint plain", "big orange ring top on gray dots",
    "big cyan diamond bottom right on brown plain", "big pink moon center on navy stripes",
    "big green cross top right on lilac plain", "big red arrow bottom left on cream dots",
    "small blue square center on white checker", "small yellow heart right on black plain",
    "small red circle top left on gray stripes", "small purple star bottom on mint dots",
    "big orange circle left and small blue square right on white plain",
    "small red heart top left and big cyan ring bottom right on navy plain",
)  # fmt: skip


def start(base):
    """Imports ComfyUI from COMFYUI_PATH as `main.py --cpu --base-directory base` would; once per process."""
    for folder in ("diffusion_models", "text_encoders", "loras"):
        (base / "models" / folder).mkdir(parents=True)
    sys.argv = [sys.argv[0], "--cpu", "--base-directory", str(base)]
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.utils
    import nodes  # noqa: F401 the host's, which imports the rest

    comfy.utils.PROGRESS_BAR_ENABLED = False
    load_pack("tiny_pack", ROOT / "tests" / "tiny" / "node_pack").install_shim()


def load_pack(name, folder):
    if name not in sys.modules:
        where = [str(folder)]
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=where)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def node(name, pack="tessera"):
    """A V3 node class of a pack by node id."""
    from comfy_api.latest._io import HiddenHolder

    extension = asyncio.run(sys.modules[pack].comfy_entrypoint())
    found = {cls.GET_SCHEMA().node_id: cls for cls in asyncio.run(extension.get_node_list())}
    found[name].hidden = HiddenHolder.from_dict({})  # the executor's part; no node id, as no server runs
    return found[name]


def prompt(text):
    return node("TinyPrompt", "tiny_pack").execute(text).args[0]


def sample(model, text=PROMPTS[0], seed=5, steps=STEPS):
    """The final latent [1, 16, 16, 16] of the host's KSampler, euler/simple."""
    import nodes

    empty = {"samples": torch.zeros(1, 16, 16, 16)}
    positive, negative = prompt(text), prompt("")
    return nodes.common_ksampler(model, seed, steps, 1.0, "euler", "simple", positive, negative, empty)[0]["samples"]


CALIBRATION_PROMPTS = tuple(
    f"{size} {colour} {shape} {place} on {background}"
    for size, colour, shape, place, background in (
        ("big", "red", "circle", "left", "white dots"), ("big", "blue", "star", "top", "gray plain"),
        ("small", "green", "heart", "center", "cream stripes"), ("big", "yellow", "ring", "bottom left", "navy dots"),
        ("small", "purple", "square", "right", "white plain"), ("big", "cyan", "moon", "top right", "black checker"),
        ("big", "orange", "triangle", "center", "mint dots"), ("small", "pink", "diamond", "bottom", "brown stripes"),
        ("big", "green", "arrow", "top left", "lilac plain"), ("small", "red", "cross", "left", "gray checker"),
        ("big", "purple", "circle", "bottom right", "cream plain"), ("big", "blue", "heart", "right", "mint stripes"),
        ("small", "orange", "star", "top", "navy checker"), ("big", "pink", "square", "top left", "black dots"),
        ("big", "cyan", "cross", "center", "white stripes"), ("small", "yellow", "circle", "right", "brown plain"),
        ("big", "red", "triangle", "bottom", "lilac checker"), ("small", "blue", "ring", "top", "cream dots"),
        ("big", "green", "moon", "left", "gray stripes"), ("big", "orange", "diamond", "top right", "navy plain"),
        ("small", "cyan", "arrow", "center", "mint plain"), ("big", "purple", "star", "bottom left", "brown dots"),
        ("big", "yellow", "heart", "top", "black plain"), ("small", "pink", "triangle", "left", "white checker"),
    )
)  # fmt: skip


CALIBRATION_PAIRS = tuple(zip(CALIBRATION_PROMPTS, range(1000, 1024), strict=True))


def calibrate(model, pairs=CALIBRATION_PAIRS, **options):
    """The Calibration of a model that sampled these (prompt, seed) pairs through the real node and KSampler."""
    from tessera import host

    return host.calibration_of(record(model, pairs, **options))


def record(model, pairs=CALIBRATION_PAIRS, **options):
    """The CALIBRATION output of TesseraCalibrate after sampling: statistics, and probe calls in `.probes`."""
    recording, recorder = node("TesseraCalibrate").execute(model, **options).args
    for text, seed in pairs:
        sample(recording, text, seed)
    return recorder


class Trajectory:
    """What a reference model sees and answers while sampling, to put the same questions to another model."""

    def __init__(self, model, text=PROMPTS[0], seed=5):
        self.text, self.seed, self.calls = text, seed, []
        self.latent = sample(self._wrapped(model, self._record), text, seed)

    def velocities(self, model):
        """Relative error of the model's velocity at every recorded step, inputs as recorded (teacher-forced)."""
        self.errors, self.step = [], 0
        sample(self._wrapped(model, self._compare), self.text, self.seed)
        return self.errors

    def _wrapped(self, model, wrapper):
        clone = model.clone()
        clone.set_model_unet_function_wrapper(wrapper)
        return clone

    def _record(self, apply, call):
        x, sigma, conditioning = call["input"], call["timestep"], call["c"]
        denoised = apply(x, sigma, **conditioning)
        self.calls.append((x.clone(), sigma.clone(), denoised.clone()))
        return denoised

    def _compare(self, apply, call):
        x, sigma, truth = self.calls[self.step]
        self.step += 1
        wanted, found = (x - truth) / sigma, (x - apply(x, sigma, **call["c"])) / sigma
        self.errors.append(((found - wanted).norm() / wanted.norm()).item())
        return truth


def picture(latent):
    """The picture [h, w, 3] of a final latent, values in 0..1."""
    return node("TinyDecode", "tiny_pack").execute({"samples": latent}, 1).args[0][0]


def measure(reference, models, pairs):
    """Per model name one row per (prompt, seed): velocity error (teacher-forced), latent error, PSNR in dB."""
    from tessera.quantization.metrics import psnr

    rows = {name: [] for name in models}
    for text, seed in pairs:
        truth = Trajectory(reference, text, seed)
        for name, model in models.items():
            errors, latent = truth.velocities(model), sample(model, text, seed)
            ratio = psnr(picture(latent), picture(truth.latent))
            rows[name].append((sum(errors) / len(errors), relative(latent, truth.latent), ratio))
    return rows


def variants(names):
    """(bf16 model, {name: model}): quantized, corrected at 0.5 and 1, and the LoRA merged by core's own loader.

    All with the file's own numbers; "1, auto" as this device runs it fastest, transcoded where it must.
    """
    import nodes

    load = node("TesseraDiffusionModelLoader").execute
    quantized = load(names["model"], speed="exact").args[0]

    def correct(model, strength):
        return node("TesseraCorrectionLoRA").execute(model, names["lora"], strength).args[0]

    stock = nodes.UNETLoader().load_unet(names["model"], "default")[0]  # of ours the merge guard would take it over
    merged = nodes.LoraLoaderModelOnly().load_lora_model_only(stock, names["lora"], 1.0)[0]
    models = {"0": quantized, "0.5": correct(quantized, 0.5), "1": correct(quantized, 1.0), "merged": merged}
    return load(names["bf16"]).args[0], models | {"1, auto": correct(load(names["model"]).args[0], 1.0)}


class PastHooks(torch.nn.Module):
    """Runs a layer without its hooks while it stands in its place, as the host's fused linear does."""

    def __init__(self, model, path):
        super().__init__()
        parent, _, self.name = path.rpartition(".")
        self.__dict__["parent"] = model.model.get_submodule(parent)
        self.__dict__["layer"] = getattr(self.parent, self.name)

    def __enter__(self):
        setattr(self.parent, self.name, self)

    def __exit__(self, *_):
        setattr(self.parent, self.name, self.layer)

    def forward(self, x):
        layer = self.layer
        with pytest.MonkeyPatch.context() as patch:
            if hasattr(layer, "tessera_branch_pair"):  # a layer of ours carries it in its product
                patch.setattr(layer, "tessera_branch_pair", None)
            return type(layer).forward(layer, x)

    def register_forward_hook(self, hook):
        return self.layer.register_forward_hook(hook)

    def __getattr__(self, name):
        return getattr(self.__dict__["layer"], name)


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()
