"""Draws example_workflows/*.jpg: a real layer map and real pictures, sampled by the small model in a real ComfyUI.

    COMFYUI_PATH=... python scripts/thumbnails.py [NAME ...]

Maps: Z-Image's own layers by the recipe. Pictures: the model of tests/tiny and, eight times as strong, what they differ
from BF16; PSNR is of that picture. So are all cards but that of the LoRA stack.
"""

import json
import math
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from comfy_host import TINY, load_pack  # noqa: E402
from host_server import HostServer  # noqa: E402

load_pack("tessera", ROOT)
from tessera import pictures, sweep  # noqa: E402
from tessera.pictures import mosaic_colours, mosaic_layout  # noqa: E402
from tessera.quantization import recipe as recipes  # noqa: E402
from tessera.quantization.layer_map import KEEP, label  # noqa: E402

SIDE, MARGIN, PICTURE, GAIN = 640, 28, 184, 8
INK, FAINT, RULE, GREEN, EMPTY = "#1F2328", "#6E7781", "#D1D9E0", "#1A7F37", "#E6E9ED"
PROMPT = "big orange circle left and small blue square right on white plain"
ZIMAGE = json.loads((ROOT / "tests" / "data" / "zimage_keys.json").read_text())


@dataclass
class Card:
    """What one thumbnail shows, from top to bottom."""

    title: str
    subtitle: str
    formats: dict  # layer: label, in the file's order
    pictures: list = field(default_factory=list)  # (label, what it says, picture); the last is the best
    slider: float | None = None
    done: float = 1.0  # share of the layers that have their colour

    def draw(self):
        sheet = Image.new("RGB", (SIDE, SIDE), "white")
        pen = ImageDraw.Draw(sheet)
        pen.text((MARGIN, 24), self.title, INK, font(30))
        pen.text((MARGIN, 66), self.subtitle, FAINT, font(18))
        bottom = self._map(pen, 108)
        self._legend(pen, bottom + 12)
        self._pictures(sheet, pen, 356)
        if self.slider is not None:
            _slider(pen, 606, self.slider)
        return sheet

    def _map(self, pen, y, width=SIDE - 2 * MARGIN):
        """Blocks from left to right, kinds of layers from top to bottom; where it ends."""
        names = list(self.formats)
        panels = mosaic_layout.arrange(names)[0][:1]
        step = min(56, (width - 24 * (len(panels[0].bands) - 1)) / sum(len(band.columns) for band in panels[0].bands))
        high, shown = 200 / len(panels[0].rows), self.done * len(names)
        for panel in panels:
            x = MARGIN
            for band in panel.bands:
                for column in band.columns:
                    for row, index in enumerate(column.cells):
                        if index is not None:
                            color, shown = _color(self.formats[names[index]]) if shown > 0 else EMPTY, shown - 1
                            box = (x, y + row * high, x + step - 2, y + (row + 1) * high - 3)
                            pen.rectangle([round(v) for v in box], color)
                    x += step
                x += 24
        return y + 200

    def _legend(self, pen, y):
        x, count = MARGIN, {}
        for word in self.formats.values():
            count[word] = count.get(word, 0) + 1
        for word, layers in sorted(count.items(), key=lambda item: -item[1]):
            pen.rectangle((x, y + 4, x + 13, y + 17), _color(word))
            text = f"{layers} {word.removesuffix('_256')}"
            pen.text((x + 19, y), text, INK, font(17))
            x += 19 + pen.textlength(text, font(17)) + 22

    def _pictures(self, sheet, pen, y):
        for place, (name, said, picture) in enumerate(self.pictures):
            x = MARGIN + place * (PICTURE + 16)
            pen.text((x, y), name, INK, font(18))
            pen.text((x + PICTURE, y), said, GREEN if place == len(self.pictures) - 1 else FAINT, font(18), "ra")
            sheet.paste(Image.fromarray(picture).resize((PICTURE, PICTURE), Image.NEAREST), (x, y + 28))
            pen.rectangle((x - 1, y + 27, x + PICTURE, y + 28 + PICTURE), outline=RULE)


def font(size):
    return ImageFont.load_default(size)


def _color(word):
    return mosaic_colours.FORMATS[mosaic_colours.family(word)][0]


def _slider(pen, y, value, left=MARGIN, right=SIDE - MARGIN):
    pen.text((left, y - 12), "strength", INK, font(18))
    pen.text((right, y - 12), f"{value:.2f}", INK, font(18), "ra")
    start, end = left + 92, right - 56
    pen.rounded_rectangle((start, y - 3, end, y + 3), 3, RULE)
    at = start + value / 2 * (end - start)
    pen.rounded_rectangle((start, y - 3, at, y + 3), 3, GREEN)
    pen.ellipse((at - 9, y - 9, at + 9, y + 9), GREEN)


# Real numbers and pictures


def planned_by(recipe):
    """Layer -> format of Z-Image under a recipe."""
    return {name: label(choice.format) for name, choice in recipes.builtin(recipe).resolve(ZIMAGE).items()}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


class Studio:
    """Makes and samples files in a running host."""

    def __init__(self, host):
        self.host = host
        for folder in ("diffusion_models", "loras", "text_encoders"):
            host.models(folder)
        shutil.copy(TINY, host.models("diffusion_models") / "bf16.safetensors")
        self.original = self.sample("bf16")

    def quantize(self, name, recipe):
        source = "diffusion_models/bf16.safetensors"
        self.host.run({"made": node("TesseraQuantize", source=source, recipe=recipe, filename=name, rank=32)})

    def sample(self, name, strength=0.0, lora=None):
        """The picture of a file at a strength of its correction, with another LoRA on top."""
        graph = {"model": node("TesseraDiffusionModelLoader", unet_name=f"{name}.safetensors", weight_dtype="default")}
        last = "model"
        if strength:
            graph["correct"] = node("TesseraCorrectionLoRA", model=[last, 0], strength=strength,
                                    lora_name="(beside the checkpoint)")  # fmt: skip
            last = "correct"
        if lora:
            graph["lora"] = node("TesseraLoRA", model=[last, 0], lora_name=lora, strength_model=1.0)
            last = "lora"
        graph |= {
            "text": node("TinyPrompt", text=PROMPT),
            "empty": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
            "sample": node("KSampler", model=[last, 0], positive=["text", 0], negative=["text", 0], seed=5, steps=8,
                           latent_image=["empty", 0], cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0),
            "picture": node("TinyDecode", samples=["sample", 0], upscale=1),
            "save": node("SaveImage", images=["picture", 0], filename_prefix=f"{name}_{strength}"),
        }  # fmt: skip
        (path,) = self.host.files(self.host.run(graph))
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))

    def lost(self, picture, reference=None):
        """(PSNR in words, the difference, amplified) against the BF16 picture."""
        difference = picture.astype(float) - (self.original if reference is None else reference)
        psnr = 10 * math.log10(255**2 / max(np.mean(difference**2), 1e-9))
        return f"{psnr:.1f} dB", np.clip(np.abs(difference) * GAIN, 0, 255).astype(np.uint8)


SETUPS = {"nvfp4": ("NVFP4", "z_image_nvfp4", "4.94 GB"), "mxfp8": ("MXFP8", "z_image_mxfp8", "6.76 GB"),
          "int8_convrot": ("INT8 ConvRot", "int8_convrot", "6.30 GB")}  # fmt: skip


def setup(studio, name):
    title, recipe, size = SETUPS[name]
    studio.quantize(name, recipe)
    best = studio.sample(name, 1.0)
    plain, corrected = studio.lost(studio.sample(name)), studio.lost(best)
    pictures = [("picture", "", best), ("lost at 0", *plain), ("lost at 1", *corrected)]
    return Card(f"Z-Image in {title}", f"{size} instead of 12.31 GB; what is lost (x 8)", planned_by(recipe),
                pictures, 1.0)  # fmt: skip


def quantize_and_save(studio):
    studio.quantize("saved", "z_image_nvfp4")
    made = studio.sample("saved", 1.0)
    sizes = [(studio.host.models("diffusion_models") / f"{name}.safetensors").stat().st_size / 1e6
             for name in ("bf16", "saved")]  # fmt: skip
    pictures = [("BF16", f"{sizes[0]:.2f} MB", studio.original), ("NVFP4", f"{sizes[1]:.2f} MB", made),
                ("lost", *studio.lost(made))]  # fmt: skip
    return Card("Quantize and Save", "layer by layer; a file, its correction, a report", planned_by("z_image_nvfp4"),
                pictures, done=0.62)  # fmt: skip


def calibrate_plan_quantize_compare(studio):
    """A plan of the small model, to the size that its own NVFP4 recipe has, from one calibrated picture."""
    source = node("UNETLoader", unet_name="bf16.safetensors", weight_dtype="default")
    graph = {
        "model": source,
        "record": node("TesseraCalibrate", model=["model", 0]),
        "text": node("TinyPrompt", text=PROMPT),
        "empty": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "sample": node("KSampler", model=["record", 0], positive=["text", 0], negative=["text", 0], seed=1, steps=8,
                       latent_image=["empty", 0], cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0),
        "known": node("TesseraSaveCalibration", calibration=["record", 1], after=["sample", 0], filename="tiny"),
        "plan": node("TesseraPlan", model=["model", 0], calibration=["known", 0], target_size_gb=0.0085, calls=1),
        "made": node("TesseraQuantize", source="diffusion_models/bf16.safetensors", recipe="nvfp4", filename="planned",
                     calibration=["known", 0], recipe_in=["plan", 0]),
    }  # fmt: skip
    report = studio.host.run(graph, 600)["outputs"]["made"]["tessera_report"][0]
    formats = {row["name"]: row["format"] for row in report["layers"]}
    best = studio.sample("planned", 1.0)
    pictures = [("BF16", "15.08 MB", studio.original), ("planned", "8.5 MB", best), ("lost", *studio.lost(best))]
    every = {name.removesuffix(".weight"): KEEP for name, shape in _tiny_shapes().items() if _is_block(name, shape)}
    return Card("Calibrate, plan, quantize, compare", "the format of each layer, measured on your own prompts",
                every | formats, pictures)  # fmt: skip


def _tiny_shapes():
    from tessera.checkpoint import Checkpoint

    return Checkpoint(TINY).shapes()


def _is_block(name, shape):
    return name.endswith(".weight") and len(shape) == 2 and name.split(".")[1].isdigit() and "layer" in name + "refiner"


def bake(studio):
    """A LoRA of chance, of a tenth of a layer's weight, beside the file and inside it."""
    studio.quantize("base", "z_image_nvfp4")
    torch.manual_seed(0)
    shape = _tiny_shapes()["layers.0.feed_forward.w2.weight"]
    layer = "diffusion_model.layers.{}.feed_forward.w2"
    pairs = {}
    for block in range(3):
        pairs[f"{layer.format(block)}.lora_up.weight"] = 0.06 * torch.randn(shape[0], 8)
        pairs[f"{layer.format(block)}.lora_down.weight"] = 0.06 * torch.randn(8, shape[1])
    save_file(pairs, studio.host.models("loras") / "style.safetensors")
    wanted = studio.sample("bf16", lora="style.safetensors")
    beside = studio.sample("base", 1.0, "style.safetensors")
    graph = {"model": node("TesseraDiffusionModelLoader", unet_name="base.safetensors", weight_dtype="default"),
             "lora": node("TesseraLoRA", model=["model", 0], lora_name="style.safetensors", strength_model=1.0),
             "bake": node("TesseraBake", model=["lora", 0], filename="baked", original="bf16.safetensors")}  # fmt: skip
    studio.host.run(graph)
    baked = studio.sample("baked", 1.0)
    lost = studio.lost(baked, wanted)
    pictures = [
        ("LoRA beside", studio.lost(beside, wanted)[0], beside),
        ("LoRA baked", lost[0], baked),
        ("lost", *lost),
    ]
    return Card("Bake", "LoRAs inside a new quantized file, with a correction of its own", planned_by("z_image_nvfp4"),
                pictures)  # fmt: skip


def extract(studio):
    """The correction of a file that came without one, from its original."""
    studio.quantize("foreign", "int8_convrot")
    (studio.host.models("loras") / "foreign_lora.safetensors").unlink()
    graph = {"found": node("TesseraExtractLoRA", base="diffusion_models/foreign.safetensors", rank=32,
                           tuned="diffusion_models/bf16.safetensors", filename="")}  # fmt: skip
    before = studio.sample("foreign")
    studio.host.run(graph)
    after = studio.sample("foreign", 1.0)
    pictures = [("picture", "", after), ("lost without", *studio.lost(before)), ("with", *studio.lost(after))]
    return Card("Extract", "a correction for a quantized file that came without one", planned_by("int8_convrot"),
                pictures, 1.0)  # fmt: skip


class SweepCard:
    """What each strength loses, and the curve that TesseraSweepGrid draws of it."""

    def __init__(self, lost, curve):
        self.lost, self.curve = lost, curve  # (strength, amplified difference, error)

    def draw(self):
        sheet = Image.new("RGB", (SIDE, SIDE), "white")
        pen = ImageDraw.Draw(sheet)
        pen.text((MARGIN, 24), "Strength sweep", INK, font(30))
        pen.text((MARGIN, 66), "one run, every strength; which is nearest to the original?", FAINT, font(18))
        side, best = 138, min(range(len(self.lost)), key=lambda i: self.lost[i][2])
        for place, (strength, picture, _) in enumerate(self.lost):
            x, colour = MARGIN + place * (side + 10), GREEN if place == best else INK
            pen.text((x, 102), f"lost at {strength:g}", colour, font(17))
            sheet.paste(Image.fromarray(picture).resize((side, side), Image.NEAREST), (x, 126))
            pen.rectangle((x - 1, 125, x + side, 126 + side), None, colour if place == best else RULE, 2)
        sheet.paste(self.curve.resize((SIDE, 360), Image.LANCZOS), (0, SIDE - 362))
        return sheet


def strength_sweep(studio):
    """The NVFP4 file at strengths from 0 to 1.75, by the error of the picture."""
    studio.quantize("swept", "z_image_nvfp4")
    strengths = [n / 4 for n in range(8)]
    found = {s: studio.sample("swept", s) for s in strengths}
    images = [torch.from_numpy(picture).float()[None] / 255 for picture in found.values()]
    result = sweep.Result.of(sweep.Sweep(strengths, images, torch.from_numpy(studio.original).float()[None] / 255))
    errors = {s: one.relative_l2 for s, one in zip(strengths, result.images, strict=True)}
    some = sorted({0.0, 1.0, 1.5, strengths[result.best]} | {0.5})[:5]
    shown = [(s, studio.lost(found[s])[1], errors[s]) for s in some if s != 0.5 or len(some) < 5]
    return SweepCard(shown, pictures.image(result.curve()[0]))


CARDS = {f"tessera_z_image_{name}": lambda studio, name=name: setup(studio, name) for name in SETUPS} | {
    f"tessera_{draw.__name__}": draw
    for draw in (quantize_and_save, calibrate_plan_quantize_compare, bake, extract, strength_sweep)
}


def main(names):
    with HostServer({"tiny": ROOT / "tests" / "tiny" / "node_pack"}, cpu=True, timeout=400) as host:
        studio = Studio(host)
        for name in names or CARDS:
            path = ROOT / "example_workflows" / f"{name}.jpg"
            CARDS[name](studio).draw().save(path, quality=88, optimize=True)
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
