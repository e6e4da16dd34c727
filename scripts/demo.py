"""BF16 against quantized, at three strengths of the correction and calibrated, in a real ComfyUI: picture and table.

    scripts/demo                             the tiny model of the tests; no GPU, nothing else to download
    scripts/demo --model z_image_turbo_bf16.safetensors [--recipe z_image_mxfp8] [--prompt "..."]

ComfyUI makes two quantized files, each with its correction LoRA: one from the weights alone, and one, `_calibrated`,
with what the layers see while it samples prompts that are not shown. These files and the calibration stay in the output
folder and are used again if source, recipe, calibration and Tessera's version are the same. No model is overwritten;
your files are read where they are.

Environment: COMFYUI_PATH and COMFYUI_PYTHON name your own ComfyUI and its interpreter, which a GPU needs; without them
a ComfyUI from the package index is set up once, see scripts/setup_host.py.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from comfy_host import CALIBRATION_PROMPTS, TINY, load_pack  # noqa: E402
from host_server import HostError, HostServer  # noqa: E402

load_pack("tessera", ROOT)
from tessera import calibration_file  # noqa: E402
from tessera.checkpoint import LAYER_ERRORS, Checkpoint  # noqa: E402
from tessera.job import Job  # noqa: E402
from tessera.quantization import recipe as recipes  # noqa: E402
from tessera.quantization.calibration import fingerprint  # noqa: E402
from tessera.quantization.report import size  # noqa: E402
from tessera.version import VERSION  # noqa: E402

TINY_PROMPTS = (
    "big red star center on white plain",
    "big blue circle top left on cream checker",
    "small yellow heart right on black plain",
    "big cyan diamond bottom right on brown plain",
    "big orange circle left and small blue square right on white plain",
    "big pink moon center on navy stripes",
    "big green cross top right on lilac plain",
    "small purple star bottom on mint dots",
)
REAL_PROMPTS = (
    "A mosaic of small glazed tiles on a courtyard wall: a red fox asleep under an orange tree, chipped grout",
    "Portrait of an old watchmaker at his bench, brass parts everywhere, window light, 85 mm photograph",
    "A street sign that reads TESSERA LANE above a wet cobbled street at dusk, reflections",
    "A glass teapot with blooming jasmine tea on slate, steam, macro photograph",
)
REAL_CALIBRATION_PROMPTS = (
    "A fishing harbour at sunrise, nets drying on the quay, gulls, oil painting",
    "Portrait of a young violinist in a red coat under falling snow, shallow depth of field",
    "A bookshop window at night with a neon sign that reads OPEN LATE, rain on the glass",
    "A bowl of cherries and a folded linen napkin on a wooden table, soft morning light, overhead shot",
)
CALIBRATION_SEED = 1000  # of the first calibration prompt; the next ones count on
ROWS = 3  # prompts in the picture; the table is about all of them
GAIN = 8  # of the difference shown below each picture


@dataclass
class Settings:
    """What is compared. `ends` builds the nodes around the model: text in front, picture behind."""

    model: Path
    recipe: str
    prompts: list[str]
    output: Path
    seed: int
    rank: int
    ends: object
    batch: int = 1  # pictures per prompt, each from its own noise

    @property
    def recipe_name(self):
        return Path(self.recipe).name

    @property
    def label(self):
        return Path(self.recipe).stem.removeprefix("z_image_").upper().replace("_", " ")


@dataclass
class Recording:
    """A calibration: its file, and the graph that makes it."""

    path: Path
    nodes: dict

    @property
    def exists(self):
        return self.path.is_file()


@dataclass
class Quantized:
    """A file under test and its correction LoRA, and whether ComfyUI still has to make them, with which calibration."""

    path: Path
    lora: Path
    exists: bool
    recording: Recording | None = None

    def sizes(self, strength):
        """Of what a strength needs."""
        files = [self.path, self.lora] if strength else [self.path]
        return " + ".join(size(path.stat().st_size) for path in files)


PLAIN, CALIBRATED = "", "_calibrated"  # how the names of the two quantized files end


@dataclass
class Column:
    title: str
    nodes: object  # (settings, quantized, strength) -> workflow nodes that end in "model"
    file: str | None = None  # PLAIN or CALIBRATED; None: the original
    strength: float = 0.0  # of the correction

    @property
    def quantized(self):
        return self.file is not None


# Workflows, in API format


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def reference(settings, quantized, strength):
    return {"model": original(settings)}


def original(settings):
    return node("UNETLoader", unet_name=settings.model.name, weight_dtype="default")


def corrected(settings, quantized, strength):
    load = node("TesseraDiffusionModelLoader", unet_name=quantized.path.name, weight_dtype="default")
    correct = node("TesseraCorrectionLoRA", model=["load", 0], lora_name=quantized.lora.name, strength=strength)
    return {"load": load, "model": correct}


def merged(settings, quantized, strength):
    """The same two files with core's nodes, which add the LoRA to the weights and round them again."""
    load = node("UNETLoader", unet_name=quantized.path.name, weight_dtype="default")
    lora = node("LoraLoaderModelOnly", model=["load", 0], lora_name=quantized.lora.name, strength_model=strength)
    return {"load": load, "model": lora}


COLUMNS = (
    Column("BF16", reference),
    Column("strength 0", corrected, PLAIN, 0.0),
    Column("strength 0.5", corrected, PLAIN, 0.5),
    Column("strength 1", corrected, PLAIN, 1.0),
    Column("calibrated, strength 1", corrected, CALIBRATED, 1.0),
    Column("stock LoRA loader, 1", merged, PLAIN, 1.0),
)


class TinyEnds:
    """The test model's words and pixels."""

    packs = {"tiny": ROOT / "tests" / "tiny" / "node_pack"}  # noqa: RUF012 never written
    folders = {}  # noqa: RUF012
    calibration, moment = CALIBRATION_PROMPTS[:8], "auto"

    def shared(self, batch):
        return {"empty": node("EmptySD3LatentImage", width=128, height=128, batch_size=batch)}

    def nodes(self, i, text, seed):
        return {
            f"text{i}": node("TinyPrompt", text=text),
            f"sample{i}": ksampler("euler", 8, ["model", 0], [f"text{i}", 0], [f"text{i}", 0], seed),
            f"decode{i}": node("TinyDecode", samples=[f"sample{i}", 0]),
        }


@dataclass
class RealEnds:
    """Z-Image Turbo as in ComfyUI's own template."""

    text_encoder: Path
    vae: Path
    steps: int
    side: int
    packs = {}  # noqa: RUF012 never written
    calibration, moment = REAL_CALIBRATION_PROMPTS, "block"  # full moments of Z-Image take 6 GB

    @property
    def folders(self):
        return {"text_encoders": self.text_encoder.parent, "vae": self.vae.parent}

    def shared(self, batch):
        return {
            "clip": node("CLIPLoader", clip_name=self.text_encoder.name, type="lumina2", device="default"),
            "vae": node("VAELoader", vae_name=self.vae.name),
            "empty": node("EmptySD3LatentImage", width=self.side, height=self.side, batch_size=batch),
            "shift": node("ModelSamplingAuraFlow", model=["model", 0], shift=3.0),
        }

    def nodes(self, i, text, seed):
        return {
            f"text{i}": node("CLIPTextEncode", clip=["clip", 0], text=text),
            f"zero{i}": node("ConditioningZeroOut", conditioning=[f"text{i}", 0]),
            f"sample{i}": ksampler("res_multistep", self.steps, ["shift", 0], [f"text{i}", 0], [f"zero{i}", 0], seed),
            f"decode{i}": node("VAEDecode", samples=[f"sample{i}", 0], vae=["vae", 0]),
        }


def ksampler(sampler, steps, model, positive, negative, seed):
    return node("KSampler", model=model, positive=positive, negative=negative, latent_image=["empty", 0], seed=seed,
                steps=steps, cfg=1.0, sampler_name=sampler, scheduler="simple", denoise=1.0)  # fmt: skip


def workflow(settings, quantized, column, prompts):
    """Everything from files to saved latents and pictures, for some of the prompts."""
    nodes = column.nodes(settings, quantized, column.strength) | settings.ends.shared(settings.batch)
    for i, text in enumerate(prompts):
        nodes |= settings.ends.nodes(i, text, settings.seed + i)
        nodes[f"latent{i}"] = node("SaveLatent", samples=[f"sample{i}", 0], filename_prefix="latents/demo")
        nodes[f"save{i}"] = node("SaveImage", images=[f"decode{i}", 0], filename_prefix="demo")
    return nodes


def calibration_prompts(settings):
    return [text for text in settings.ends.calibration if text not in settings.prompts]


def calibrating(settings):
    """Samples prompts that are not shown with a model that records what its layers see; "recorded" waits for all."""
    recorder = node("TesseraCalibrate", model=["original", 0], moment=settings.ends.moment, probes=0)
    nodes = {"original": original(settings), "model": recorder} | settings.ends.shared(batch=1)
    last = ["empty", 0]
    for i, text in enumerate(calibration_prompts(settings)):
        nodes |= settings.ends.nodes(i, text, CALIBRATION_SEED + i)
        nodes[f"recorded{i}"] = node("LatentBatch", samples1=last, samples2=[f"sample{i}", 0])
        last = [f"recorded{i}", 0]
    return nodes | {"recorded": node("TesseraSaveCalibration", calibration=["model", 1], after=last)}


def quantizing(settings, quantized):
    source = f"diffusion_models/{settings.model.name}"
    quantize = node("TesseraQuantize", source=source, recipe=settings.recipe_name, filename=quantized.path.stem,
                    rank=settings.rank)  # fmt: skip
    if quantized.recording is None:
        return {"quantize": quantize}
    quantize["inputs"]["calibration"] = ["calibration", 0]
    load = node("TesseraLoadCalibration", calibration_name=quantized.recording.path.name)
    return {"calibration": load, "quantize": quantize}


# Files


def find_recording(settings):
    """The calibration; its name tells version, fingerprint of the model and graph, so that a file of it is the same."""
    nodes = calibrating(settings)
    same = json.dumps([VERSION, fingerprint(Checkpoint(settings.model)), nodes], sort_keys=True)
    stem = f"{settings.model.stem}_{hashlib.sha256(same.encode()).hexdigest()[:12]}"
    nodes["recorded"]["inputs"]["filename"] = stem
    return Recording(user_folder(settings) / "calibrations" / f"{stem}_00001.safetensors", nodes)


def user_folder(settings):
    return settings.output / "user" / "tessera"


def find_quantized(settings, recording=None):
    """The file made earlier from this source with this recipe, calibration and version; else a name that is free."""
    models, loras = (settings.output / "models" / folder for folder in ("diffusion_models", "loras"))
    source, chosen = Checkpoint(settings.model), recipes.find(settings.recipe)
    recorded = recording is not None and recording.exists
    known = calibration_file.read(recording.path) if recorded else None
    ending = CALIBRATED if recording else PLAIN
    for number in count(1):
        stem = f"{settings.model.stem}_{Path(settings.recipe).stem}{ending}" + (f"_{number}" if number > 1 else "")
        found = Quantized(models / f"{stem}.safetensors", loras / f"{stem}_lora.safetensors", True, recording)
        job = Job(source, found.path, chosen, found.lora, settings.rank, calibration=known)
        if (recorded or recording is None) and job.done():
            return found
        if not found.path.exists() and not found.lora.exists():
            found.exists = False
            return found


def weight_error(column, quantized):
    """Mean relative weight error of the quantized layers; None if the file does not tell it for this column."""
    if column.nodes is not corrected or column.strength not in (0, 1):
        return None
    layers = json.loads(Checkpoint(quantized.path).metadata[LAYER_ERRORS]).values()
    return float(np.mean([errors[int(column.strength)] for errors in layers if len(errors) > column.strength]))


def folders_file(settings, path):
    """ComfyUI's extra_model_paths.yaml: new files go below the output folder, yours are found where they are."""
    mine = {name: settings.output / "models" / name for name in ("diffusion_models", "loras")}
    for folder in mine.values():
        folder.mkdir(parents=True, exist_ok=True)
    yours = {"diffusion_models": settings.model.parent} | settings.ends.folders
    lines = ["tessera_demo:", "  is_default: true", *folder_lines(mine), "your_files:", *folder_lines(yours)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def folder_lines(folders):
    return [f"  {name}: {json.dumps(str(folder), ensure_ascii=False)}" for name, folder in folders.items()]


# Running


@dataclass
class Result:
    """One column: latents and pictures in the order of the prompts, seconds per picture."""

    latents: list
    pictures: list
    seconds: float


def make(host, settings, quantized):
    """Records and quantizes in ComfyUI what is not there yet, and says so."""
    if quantized.recording is not None:
        record(host, settings, quantized.recording)
    made = "used again: same source, recipe and version"
    if not quantized.exists:
        outputs = run(host, quantizing(settings, quantized))["outputs"]
        made = f"quantized in {outputs['quantize']['tessera_report'][0]['seconds']:.1f} s"
    say(f"{quantized.path.name}: {size(quantized.path.stat().st_size)}, {made}")


def record(host, settings, recording):
    made, start = "used again: same prompts and version, same fingerprint of the model", time.monotonic()
    if not recording.exists:
        run(host, recording.nodes)
        made = f"recorded in {time.monotonic() - start:.1f} s on {len(calibration_prompts(settings))} prompts"
    say(f"{recording.path.name}: {size(recording.path.stat().st_size)}, {made}")


def measure(host, settings, quantized, column):
    """The first prompt loads the model and is not timed, if there are others."""
    prompts, start = settings.prompts, time.monotonic()
    entry = run(host, workflow(settings, quantized, column, prompts[:1]))
    timed = 1
    if len(prompts) > 1:
        timed, start = len(prompts) - 1, time.monotonic()
        entry = run(host, workflow(settings, quantized, column, prompts))
    seconds = (time.monotonic() - start) / (timed * settings.batch)
    saved = [entry["outputs"][f"{kind}{i}"] for i in range(len(prompts)) for kind in ("latent", "save")]
    latents = [load_file(path)["latent_tensor"] for path in host.files({"outputs": dict(enumerate(saved))}, "latents")]
    pictures = [Image.open(path).convert("RGB") for path in host.files({"outputs": dict(enumerate(saved))})]
    return Result([one for batch in latents for one in batch], pictures, seconds)


def run(host, nodes):
    """Queue and wait; every ten seconds a line about where it is."""
    since, prompt = len(host.events), host.queue(nodes)
    while True:
        try:
            return host.wait(prompt, timeout=10)
        except TimeoutError:
            say(f"    {where(host.events[since:])}")


def where(events):
    for event in reversed(events):
        data = event["data"]
        if event["type"] == "progress_text":
            return data["text"].splitlines()[0]
        if event["type"] == "progress":
            return f"{data['node']}: {data['value']:.0f} of {data['max']:.0f}"
    return "waiting"


def plan_lines(log, name):
    """What our loader said on how it multiplies this file's layers."""
    start = f"Tessera: {name}: "
    return list(dict.fromkeys(line.split(start)[1] for line in log.splitlines() if start in line))


def say(text):
    print(text, flush=True)


# Figures


def relative(found, wanted):
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def psnr(found, wanted):
    """dB between two 8-bit pictures."""
    difference = np.asarray(found, float) - np.asarray(wanted, float)
    mse = float(np.mean(difference**2))
    return 10 * math.log10(255**2 / mse) if mse else math.inf


@dataclass
class Score:
    latent: list  # relative L2 to BF16, one per picture
    psnr: list

    def __str__(self):
        return f"latent error {np.mean(self.latent):.1%}, PSNR {np.mean(self.psnr):.1f} dB"


def score(result, truth):
    return Score(
        [relative(found, wanted) for found, wanted in zip(result.latents, truth.latents, strict=True)],
        [psnr(found, wanted) for found, wanted in zip(result.pictures, truth.pictures, strict=True)],
    )


def table(settings, files, results, scores, plans):
    """Markdown, one row per column of the picture."""
    prompts, pictures = len(settings.prompts), len(results[0].pictures)
    seconds = "s per picture" if prompts > 1 else "s per picture, loading included"
    lines = [
        f"`{settings.model.name}`, recipe `{settings.recipe_name}`, correction of rank {settings.rank}. "
        f"Prompts: {prompts}; pictures: {pictures}, each against BF16 from the same noise. "
        f"Calibrated on {len(calibration_prompts(settings))} other prompts.",
        "",
        f"| | files | weight error | latent error | PSNR | {seconds} |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for column, result, scored in zip(COLUMNS, results, scores, strict=True):
        figures, name = ["", "", ""], column.title
        if column.quantized:
            weight = weight_error(column, files[column.file])
            figures = ["" if weight is None else f"{weight:.2%}",
                       f"{np.mean(scored.latent):.2%}", f"{np.mean(scored.psnr):.2f} dB"]  # fmt: skip
            name = f"{settings.label}, {column.title}"
        cells = [name, sizes(settings, files, column), *figures, f"{result.seconds:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    about = "Weight error is relative; calibration lets it grow where that makes the layers' outputs err less."
    ran = [f"How {name} ran here: {'; '.join(plan)}." for name, plan in plans.items()]
    return "\n".join([*lines, *(f"\n{line}" for line in (about, *ran))])


def sizes(settings, files, column):
    """Of the files that a column uses."""
    return files[column.file].sizes(column.strength) if column.quantized else size(settings.model.stat().st_size)


# The picture

INK, FAINT, EDGE, PAPER, BEST = (24, 24, 27), (113, 113, 122), (212, 212, 216), (255, 255, 255), (4, 120, 87)
CELL, GAP, LEFT, HEAD, TITLE, FOOT = 256, 16, 232, 116, 92, 34
ROW = CELL + FOOT + CELL + GAP


def comparison(settings, files, results, scores):
    """A grid, rows = prompts, columns = COLUMNS; below each picture its PSNR and its difference to BF16."""
    shown = range(min(ROWS, len(settings.prompts)))
    page = Image.new("RGB", (LEFT + len(COLUMNS) * (CELL + GAP) + GAP, TITLE + HEAD + len(shown) * ROW + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    write(draw, (GAP, 18), settings.model.name, 28)
    about = f"recipe {settings.recipe_name}; error-correction LoRA of rank {settings.rank}; calibrated on "
    about += f"{len(calibration_prompts(settings))} other prompts; every picture of a row starts from the same noise"
    write(draw, (GAP, 56), f"{about}; figures on top are means of {len(results[0].pictures)}", 18, FAINT)
    best = max(np.mean(scored.psnr) for scored in scores[1:])
    for x, (column, scored) in enumerate(zip(COLUMNS, scores, strict=True)):
        at = (LEFT + x * (CELL + GAP), TITLE + 6)
        heading(draw, at, settings, files, column, scored, np.mean(scored.psnr) == best)
    for y in shown:
        row(page, draw, TITLE + HEAD + y * ROW, settings, y, results, scores)
    return page


def row(page, draw, top, settings, y, results, scores):
    """One prompt: its text and its pictures."""
    for line, text in enumerate(wrapped(draw, settings.prompts[y], 20, LEFT - 2 * GAP)[:9]):
        write(draw, (GAP, top + 27 * line), text, 20)
    write(draw, (GAP, top + CELL + FOOT), f"difference, times {GAIN}", 18, FAINT)
    index = y * settings.batch
    best = max(scored.psnr[index] for scored in scores[1:])
    for x, (result, scored) in enumerate(zip(results, scores, strict=True)):
        left, below = LEFT + x * (CELL + GAP), top + CELL + FOOT
        place(page, draw, (left, top), result.pictures[index])
        if x:
            colour = BEST if scored.psnr[index] == best else FAINT
            write(draw, (left, top + CELL + 5), f"{scored.psnr[index]:.1f} dB", 18, colour)
            place(page, draw, (left, below), difference(result.pictures[index], results[0].pictures[index]))


def difference(found, wanted):
    apart = np.abs(np.asarray(found, int) - np.asarray(wanted, int)) * GAIN
    return Image.fromarray(apart.clip(0, 255).astype(np.uint8))


def place(page, draw, at, picture):
    """CELL by CELL; small pictures keep their pixels, large ones are averaged."""
    method = Image.Resampling.NEAREST if picture.width <= CELL else Image.Resampling.LANCZOS
    page.paste(picture.resize((CELL, CELL), method), at)
    draw.rectangle((at[0] - 1, at[1] - 1, at[0] + CELL, at[1] + CELL), outline=EDGE)


def heading(draw, at, settings, files, column, scored, good):
    left, top = at
    write(draw, at, settings.label if column.quantized else column.title, 22)
    write(draw, (left, top + 28), column.title if column.quantized else "the original", 20)
    write(draw, (left, top + 56), sizes(settings, files, column), 18, FAINT)
    if column.quantized:
        write(draw, (left, top + 80), f"{np.mean(scored.psnr):.1f} dB, error {np.mean(scored.latent):.1%}", 18,
              BEST if good else FAINT)  # fmt: skip


def write(draw, at, text, points, colour=INK):
    draw.text(at, text, fill=colour, font=ImageFont.load_default(points))


def wrapped(draw, text, points, width):
    font, lines = ImageFont.load_default(points), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


# The whole


def parse(arguments=None):
    """Settings from the command line. SystemExit with one clear line if they cannot work."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", type=Path, help="your BF16 Z-Image checkpoint; default: the tests' tiny model")
    parser.add_argument("--recipe", default="z_image_nvfp4", help="built-in name or .toml file (z_image_nvfp4)")
    parser.add_argument("--rank", type=int, default=32, help="rank of the correction LoRA (32)")
    parser.add_argument("--text-encoder", type=Path, help="for --model: qwen_3_4b.safetensors")
    parser.add_argument("--vae", type=Path, help="for --model: ae.safetensors")
    parser.add_argument("--prompt", action="append", help="repeat for more")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8, help="for --model (8)")
    parser.add_argument("--side", type=int, default=1024, help="for --model: width and height in pixels (1024)")
    parser.add_argument("--output", type=Path, default=ROOT / "demo_output", help="where everything goes (demo_output)")
    given = parser.parse_args(arguments)
    if given.rank < 1:
        parser.error("--rank must be 1 or more: the demo is about the correction LoRA")
    if given.model is None and (given.text_encoder or given.vae):
        parser.error("--text-encoder and --vae belong to --model FILE; the tiny model needs none")
    try:
        recipes.find(given.recipe)
        model = checked(given.model) if given.model else TINY
        ends = real_ends(given, model) if given.model else TinyEnds()
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    prompts = given.prompt or list(REAL_PROMPTS if given.model else TINY_PROMPTS)
    return Settings(model, given.recipe, prompts, given.output.resolve(), given.seed, given.rank, ends,
                    batch=1 if given.model else 2)  # fmt: skip


def checked(model):
    model = model.expanduser().resolve()
    if not model.is_file():
        raise ValueError(f"{model}: no such file")
    file = Checkpoint(model)
    if file.layers or file.opaque:
        raise ValueError(f"{model.name}: is quantized already; the demo needs the BF16 original")
    return model


def real_ends(given, model):
    encoder = needed(given.text_encoder, "--text-encoder", "qwen_3_4b.safetensors", "text_encoders", model)
    vae = needed(given.vae, "--vae", "ae.safetensors", "vae", model)
    return RealEnds(encoder, vae, given.steps, given.side)


def needed(given, option, name, folder, model):
    """A file Z-Image needs besides the model: as given, or in the models folders of ComfyUI and of the model."""
    places = [Path(os.environ["COMFYUI_PATH"]) / "models" / folder / name] if os.environ.get("COMFYUI_PATH") else []
    places += [model.parent.parent / folder / name, model.parent / name]
    found = [path for path in ([given.expanduser()] if given else places) if path.is_file()]
    if not found:
        looked = given or ", ".join(str(path.parent) for path in places)
        raise ValueError(f"{option} FILE is needed: no {given.name if given else name} in {looked}")
    return found[0].resolve()


def compare(settings):
    """Runs everything; the paths of picture and table."""
    settings.output.mkdir(parents=True, exist_ok=True)
    say(f"{settings.model.name}: {size(settings.model.stat().st_size)}, recipe {settings.recipe_name}")
    recording = find_recording(settings)
    files = {PLAIN: find_quantized(settings), CALIBRATED: find_quantized(settings, recording)}
    with HostServer(settings.ends.packs, args=host_arguments(settings)) as host:
        say(f"ComfyUI started in {host.seconds_to_start:.0f} s")
        for quantized in files.values():
            make(host, settings, quantized)
        results = []
        for column in COLUMNS:
            results.append(measure(host, settings, files.get(column.file), column))
            announce(column, results)
        names = [quantized.path.name for quantized in files.values()]
        plans = {name: plan_lines(host.log, name) for name in names}
    scores = [score(result, results[0]) for result in results]
    picture, figures = settings.output / "comparison.png", settings.output / "table.md"
    comparison(settings, files, results, scores).save(picture)
    figures.write_text(table(settings, files, results, scores, plans) + "\n", encoding="utf-8")
    return files, picture, figures


def host_arguments(settings):
    """For ComfyUI: where models are, and the user folder, in the output folder, with calibrations and own recipes."""
    folders, user = folders_file(settings, settings.output / "extra_model_paths.yaml"), user_folder(settings)
    (user / "recipes").mkdir(parents=True, exist_ok=True)
    if settings.recipe.endswith(".toml"):
        shutil.copy(settings.recipe, user / "recipes")
    return ["--extra-model-paths-config", str(folders), "--user-directory", str(user.parent)]


def announce(column, results):
    text = f"{results[-1].seconds:.2f} s per picture"
    if column.quantized:
        text = f"{score(results[-1], results[0])}; {text}"
    say(f"  {column.title}: {text}")


def explain(problem):
    """What went wrong; a failing node's own words without the host's traceback."""
    details = getattr(problem, "details", {})
    return f"{details['node_type']}: {details['exception_message']}" if "exception_message" in details else str(problem)


def main():
    start, settings = time.monotonic(), parse()
    try:
        files, picture, figures = compare(settings)
    except (HostError, ValueError, OSError) as problem:
        print(f"demo: {explain(problem)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130
    say(f"\n{figures.read_text(encoding='utf-8')}")
    made = [pair for file in files.values() for pair in (("model", file.path), ("LoRA", file.lora))]
    calibration = ("calibration", files[CALIBRATED].recording.path)
    for what, path in (("picture", picture), ("table", figures), *made, calibration):
        say(f"{what:12}{path}")
    say(f"{time.monotonic() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
