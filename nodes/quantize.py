"""Quantize and save, in the graph."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from .. import host
from ..checkpoint import Checkpoint
from ..job import Job
from ..quantization import pipeline, recipe
from ..quantization.pipeline import Settings
from ..quantization.report import Report
from ..source import Source
from .calibrate import CALIBRATION
from .plan import RECIPE

FOLDERS = ("diffusion_models", "text_encoders")
CONNECTED = "(the connected model or clip)"


def checkpoints(folders: tuple[str, ...]) -> list[str]:
    """Files that can be read layer by layer, as folder/name."""
    names = [f"{folder}/{name}" for folder in folders for name in host.filenames(folder)]
    return [name for name in names if name.endswith((".safetensors", ".sft"))]


def checkpoint_path(choice: str) -> tuple[Path, str]:
    """(the file of such a choice, its folder)."""
    folder, _, name = choice.partition("/")
    return Path(host.full_path(folder, name)), folder


def _recipes() -> list[str]:
    """Built-in recipes, then the user's own .toml files."""
    return [*recipe.names(), *sorted(path.name for path in host.recipes_folder().glob("*.toml"))]


class Quantize(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraQuantize", "Quantize and Save (Tessera)", "tessera", is_output_node=True,
            inputs=[
                io.Combo.Input("source", options=[*checkpoints(FOLDERS), CONNECTED],
                               tooltip="The BF16 file to quantize. A connected model or clip is taken instead."),
                io.Combo.Input("recipe", options=_recipes(), default=recipe.GENERIC,
                               tooltip="Which layer takes which format. Your own: user/tessera/recipes/*.toml."),
                io.String.Input("filename", default="", tooltip="Name of the new file, below diffusion_models or "
                                "text_encoders in models. Empty: source and recipe. Nothing is overwritten."),
                io.Int.Input("rank", default=32, min=0, max=256, optional=True,
                             tooltip="Rank of the error-correction LoRA, saved in models/loras. 0 writes none."),
                io.Model.Input("model", optional=True, tooltip="Quantize this model instead, its LoRAs merged in."),
                io.Clip.Input("clip", optional=True, tooltip="Quantize this text encoder instead."),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, optional=True, advanced=True,
                             control_after_generate=False, tooltip="Same source, recipe and seed: same file."),
                CALIBRATION.Input("calibration", optional=True, tooltip="What the layers see while you sample: half "
                                  "the error, or less. Without it the weights alone decide."),
                RECIPE.Input("recipe_in", optional=True, tooltip="From Plan (Tessera); taken instead of recipe."),
                io.Combo.Input("mode", options=list(pipeline.MODES), default=pipeline.CORRECTION, optional=True,
                               tooltip="correction: good without its LoRA, best with it. absorb: best with 4-bit "
                               "kernels; the low rank is part of the file, which only Tessera's loader runs."),
                io.Boolean.Input("smoothing", default=False, optional=True, advanced=True,
                                 tooltip="With a calibration: less error of 4-bit kernels, by scaling input channels. "
                                 "Mode absorb always tries it. Not for files that are to run in ComfyUI's own loader "
                                 "with LoRAs merged in: those come out wrong there."),
            ],
            outputs=[
                io.Combo.Output("model_name", tooltip="Connect to unet_name or clip_name of a loader."),
                io.Combo.Output("lora_name", tooltip="Connect to lora_name of the correction node."),
                io.String.Output("report", tooltip="Format, size and error per layer, as markdown."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            description="Quantizes a checkpoint layer by layer with a recipe, fits an error-correction LoRA to every "
            "quantized layer. Verifies what it wrote. Cancelling leaves nothing behind; after a crash the same inputs "
            "go on where it stopped.",
            search_aliases=["quantise", "convert", "save", "nvfp4", "mxfp8", "int8", "convrot"],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, source, recipe, filename="", rank=32, model=None, clip=None, seed=0, calibration=None, recipe_in=None,
        mode=pipeline.CORRECTION, smoothing=False,
    ):  # fmt: skip
        with host.Live(cls.hidden) as live:
            weights, folder = _weights(source, model, clip)
            settings, chosen = Settings(rank, mode, smoothing=smoothing or None), recipe_in or _recipe(recipe)
            known = None if calibration is None else host.calibration_of(calibration)
            stem = filename or f"{Path(weights.name).stem}_{chosen.name}"
            target, lora = files(folder, stem, mode == pipeline.ABSORB)
            job = Job(weights, target, chosen, lora, seed=seed, settings=settings, calibration=known,
                      device=host.compute_device(), resume=True)  # fmt: skip
            host.make_room(job.working_bytes())
            report = live.run(job)
        return saved(job, report, live)


def _weights(source: str, model, clip) -> tuple[Source, str]:
    """The source, and the kind of folder where the new file belongs."""
    if model is not None:
        return host.model_source(model), "diffusion_models"
    if clip is not None:
        return host.clip_source(clip), "text_encoders"
    if source == CONNECTED:
        raise ValueError("nothing is connected to model or clip; connect one, or choose a file as the source")
    path, folder = checkpoint_path(source)
    return Checkpoint(path), folder


def _recipe(name: str) -> recipe.Recipe:
    return recipe.find(host.recipes_folder() / name if name.endswith(".toml") else name)


def files(folder: str, stem: str, absorbs: bool) -> tuple[Path, Path]:
    """Where model and LoRA go. The name of an absorb model says that it is one."""
    if absorbs and pipeline.ABSORB not in Path(stem).name.lower():
        stem = f"{stem.removesuffix('.safetensors')}_{pipeline.ABSORB}"
    target = host.output_path(folder, stem)
    return target, host.output_path("loras", f"{target.stem}_lora")


def saved(job: Job, report: Report, live: host.Live) -> io.NodeOutput:
    """The names of a job's files as loaders list them, and its report."""
    names = [host.listed_name(path) if path else "" for path in (job.target, job.lora)]
    shown = {"text": [report.markdown()], "tessera_report": [report.as_dict()], "tessera_job": [live.state],
             "tessera_map": [live.map] if live.map else []}  # fmt: skip
    return io.NodeOutput(*names, report.markdown(), ui=shown)
