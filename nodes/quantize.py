"""Quantize and save, in the graph."""

from __future__ import annotations

from comfy_api.latest import io

from .. import host
from ..checkpoint import Checkpoint
from ..job import Job
from ..quantization import recipe

FOLDERS = ("diffusion_models", "text_encoders")
CONNECTED = "(the connected model or clip)"


def _sources() -> list[str]:
    names = [f"{folder}/{name}" for folder in FOLDERS for name in host.filenames(folder)]
    return [name for name in names if name.endswith((".safetensors", ".sft"))] + [CONNECTED]


def _recipes() -> list[str]:
    """Built-in recipes, then the user's own .toml files."""
    return [*recipe.names(), *sorted(path.name for path in host.recipes_folder().glob("*.toml"))]


class Quantize(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraQuantize", "Quantize and Save (Tessera)", "tessera", is_output_node=True,
            inputs=[
                io.Combo.Input("source", options=_sources(),
                               tooltip="The BF16 file to quantize. A connected model or clip is taken instead."),
                io.Combo.Input("recipe", options=_recipes(),
                               tooltip="Which layer takes which format. Your own: user/tessera/recipes/*.toml."),
                io.String.Input("filename", default="", tooltip="Name of the new file, below diffusion_models or "
                                "text_encoders in models. Empty: source and recipe. Nothing is overwritten."),
                io.Int.Input("rank", default=32, min=0, max=256, optional=True,
                             tooltip="Rank of the error-correction LoRA, saved in models/loras. 0 writes none."),
                io.Model.Input("model", optional=True, tooltip="Quantize this model instead, its LoRAs merged in."),
                io.Clip.Input("clip", optional=True, tooltip="Quantize this text encoder instead."),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, optional=True, advanced=True,
                             control_after_generate=False, tooltip="Same source, recipe and seed: same file."),
            ],
            outputs=[
                io.Combo.Output("model_name", tooltip="Connect to unet_name or clip_name of a loader."),
                io.Combo.Output("lora_name", tooltip="Connect to lora_name of the correction node."),
                io.String.Output("report", tooltip="Format, size and error per layer, as markdown."),
            ],
            hidden=[io.Hidden.unique_id],
            description="Quantizes a checkpoint layer by layer with a recipe, fits an error-correction LoRA to every "
            "quantized layer. Verifies what it wrote. Cancelling leaves nothing behind.",
            search_aliases=["quantise", "convert", "save", "nvfp4", "mxfp8", "int8", "convrot"],
        )  # fmt: skip

    @classmethod
    def execute(cls, source, recipe, filename="", rank=32, model=None, clip=None, seed=0):
        progress = host.Progress(cls.hidden.unique_id)
        job = _job(source, recipe, filename, rank, model, clip, seed)
        host.make_room(job.working_bytes())
        report = job.run(progress)
        host.say(cls.hidden.unique_id, "\n".join(report.summary()))
        names = [host.listed_name(path) if path else "" for path in (job.target, job.lora)]
        return io.NodeOutput(
            *names, report.markdown(), ui={"text": [report.markdown()], "tessera_report": [report.as_dict()]}
        )


def _job(source, recipe_name, filename, rank, model, clip, seed) -> Job:
    folder, _, name = source.partition("/")
    if model is not None:
        weights, folder = host.model_source(model), "diffusion_models"
    elif clip is not None:
        weights, folder = host.clip_source(clip), "text_encoders"
    elif source == CONNECTED:
        raise ValueError("nothing is connected to model or clip; connect one, or choose a file as the source")
    else:
        weights = Checkpoint(host.full_path(folder, name))
    chosen = recipe.find(host.recipes_folder() / recipe_name if recipe_name.endswith(".toml") else recipe_name)
    stem = filename or f"{weights.name.removesuffix('.safetensors')}_{chosen.name}"
    target = host.output_path(folder, stem)
    lora = host.output_path("loras", f"{target.stem}_lora") if rank else None
    return Job(weights, target, chosen, lora, rank, seed, device=host.compute_device())
