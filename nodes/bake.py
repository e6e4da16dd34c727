"""Bake LoRAs into a new quantized model, in the graph."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from .. import host
from ..quantization.pipeline import Settings
from .calibrate import CALIBRATION
from .plan import RECIPE
from .quantize import files, saved

FOLDER = "diffusion_models"
NONE = "(none: best effort)"


def _originals() -> list[str]:
    return [NONE, *(name for name in host.filenames(FOLDER) if name.endswith((".safetensors", ".sft")))]


class Bake(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraBake", "Bake LoRAs and Save (Tessera)", "tessera", is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A quantized model with the LoRAs to bake on it, at the strengths they "
                               "have. Its correction LoRA is not baked: the new file gets one of its own."),
                io.String.Input("filename", default="", tooltip="Name of the new file in models/diffusion_models. "
                                "Empty: the model's, with _baked. Nothing is overwritten."),
                io.Combo.Input("original", options=_originals(), default=NONE, optional=True,
                               tooltip="The BF16 file that the model was quantized from. Every layer is quantized anew "
                               "from it, which is best; without it only changed layers are, from what is left of "
                               "them."),
                io.Int.Input("rank", default=32, min=0, max=256, optional=True,
                             tooltip="Rank of the new error-correction LoRA, saved in models/loras. 0 fits none."),
                CALIBRATION.Input("calibration", optional=True, tooltip="What the layers see while you sample, "
                                  "recorded with the original: less error. Without it the weights alone decide."),
                RECIPE.Input("recipe_in", optional=True, tooltip="From Plan (Tessera). Without it every layer keeps "
                             "its format."),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, optional=True, advanced=True,
                             control_after_generate=False, tooltip="Same inputs and seed: same file."),
            ],
            outputs=[
                io.Combo.Output("model_name", tooltip="Connect to unet_name of a loader."),
                io.Combo.Output("lora_name", tooltip="Connect to lora_name of the correction node."),
                io.String.Output("report", tooltip="Format, size and error per layer, as markdown."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            description="Saves a quantized model with its LoRAs inside, and an error-correction LoRA fitted to that. "
            "Verifies what it wrote. Cancelling leaves nothing behind; after a crash the same inputs go on where it "
            "stopped.",
            search_aliases=["merge lora", "save model", "checkpoint save", "lora merge", "fuse", "bake", "quantize"],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, filename="", original=NONE, rank=32, calibration=None, recipe_in=None, seed=0):
        with host.Live(cls.hidden) as live:
            source = None if original == NONE else Path(host.full_path(FOLDER, original))
            known = None if calibration is None else host.calibration_of(calibration)
            bake = host.bake_of(model, source, recipe_in)
            target, lora = files(FOLDER, filename or f"{bake.model.path.stem}_baked", bake.absorbs)
            job = bake.job(target, Settings(rank), known, lora=lora, seed=seed, device=host.compute_device(),
                           resume=True)  # fmt: skip
            host.make_room(job.working_bytes())
            report = live.run(job)
        return saved(job, report, live)
