"""A correction tried at several strengths in one run: a list of models, and the pictures of what came of each."""

from __future__ import annotations

import logging

from comfy_api.latest import io, ui

from .. import host, sweep
from .lora import BESIDE, correction_path

log = logging.getLogger("tessera")


class StrengthSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraStrengthSweep", "Strength Sweep (Tessera)", "tessera",
            inputs=[
                io.Model.Input("model", tooltip="A quantized model, from any loader."),
                io.String.Input("strengths", default="0, 0.5, 1, 1.5",
                                tooltip="Numbers with commas between, or a range: 0..2 step 0.25."),
                io.Combo.Input("lora_name", options=[BESIDE, *host.filenames("loras")], default=BESIDE,
                               tooltip="By default <checkpoint>_lora.safetensors, from the checkpoint's own folder or "
                               "from models/loras. Any other LoRA can be swept, too."),
            ],
            outputs=[
                io.Model.Output(is_output_list=True, tooltip="A model for each strength: what follows runs once for "
                                "each."),
                io.Float.Output("strength", display_name="strength", is_output_list=True,
                                tooltip="The strengths, in the same order: for Sweep Grid (Tessera)."),
            ],
            hidden=[io.Hidden.unique_id],
            description="The model with its correction at several strengths. One run makes a picture of each; all "
            "share one set of weights, nothing is loaded again.",
            search_aliases=["sweep", "strength", "xy plot", "grid", "compare strengths", "lora", "slider"],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, strengths=""):
        try:
            sweep.parse(strengths or "")
        except ValueError as problem:
            return str(problem)
        return True

    @classmethod
    def execute(cls, model, strengths, lora_name=BESIDE):
        if not lora_name:
            raise ValueError("no correction LoRA was made (mode absorb, or rank 0), so there is no strength to sweep; "
                             "choose another LoRA in lora_name")  # fmt: skip
        wanted = sweep.parse(strengths)
        models, attached = host.sweep(model, correction_path(model, lora_name), wanted)
        said = f"{len(wanted)} strengths; {host.coverage(model, attached)}"
        host.tell(cls.hidden.unique_id, said)
        return io.NodeOutput(models, wanted)


class SweepGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraSweepGrid", "Sweep Grid (Tessera)", "tessera", is_input_list=True, is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures of all strengths, as VAE Decode makes them."),
                io.Float.Input("strengths", force_input=True,
                               tooltip="The strengths, from Strength Sweep (Tessera)."),
                io.Image.Input("reference_image", optional=True,
                               tooltip="What the original model makes from the same prompt and seed."),
                io.Latent.Input("latents", optional=True,
                                tooltip="What the sampler makes at all strengths: errors are then those of latents, "
                                "finer than those of pictures."),
                io.Latent.Input("reference_latent", optional=True,
                                tooltip="What the sampler makes with the original model."),
                io.Int.Input("cell", default=512, min=64, max=2048, step=32, optional=True, advanced=True,
                             tooltip="The longer side of a picture in the grid, in pixels; larger ones are made "
                             "smaller."),
                io.Int.Input("columns", default=0, min=0, max=64, optional=True, advanced=True,
                             tooltip="Pictures beside each other; 0: as fits."),
            ],
            outputs=[
                io.Image.Output("grid", display_name="grid", tooltip="All pictures under their strength, the best one "
                                "framed."),
                io.Image.Output("curve", display_name="curve", tooltip="Error and PSNR against the reference over the "
                                "strength."),
                io.String.Output("report", display_name="report", tooltip="The numbers as a table, in markdown."),
            ],
            description="Shows what each strength of a sweep makes, and how near it is to the reference.",
            search_aliases=["sweep", "grid", "xy plot", "contact sheet", "curve", "psnr", "strength"],
        )  # fmt: skip

    @classmethod
    def execute(cls, images, strengths, reference_image=None, latents=None, reference_latent=None, cell=(512,),
                columns=(0,)):  # fmt: skip
        swept = sweep.Sweep(
            list(strengths), list(images), _only("reference_image", reference_image),
            None if latents is None else [latent["samples"] for latent in latents],
            _only("reference_latent", reference_latent, "samples"),
        )  # fmt: skip
        result = sweep.Result.of(swept)
        grid, curve = result.grid(cell[0], columns[0]), result.curve()
        log.info("Tessera: sweep: %s", result.line())
        shown = [picture for made in (grid, curve) for picture in ui.PreviewImage(made, cls=cls).as_dict()["images"]]
        return io.NodeOutput(grid, curve, result.markdown(), ui={"text": [result.markdown()], "images": shown})


def _only(name: str, given: list | None, part: str | None = None):
    """The one entry of a list. Raises ValueError if it has more."""
    if given is None:
        return None
    if len(given) != 1:
        raise ValueError(f"{name} has {len(given)} entries: give one, from the original model, not from the sweep")
    return given[0] if part is None else given[0][part]
