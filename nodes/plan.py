"""Which layer takes which format: measured on the model itself, allocated to a size or an error."""

from __future__ import annotations

from comfy_api.latest import io

from .. import edits as by_hand
from .. import host, mosaic, pictures, planning
from ..pictures import mosaic_image
from ..survey import Menu
from .calibrate import CALIBRATION

RECIPE = io.Custom("TESSERA_RECIPE")
WORDS = {
    "nvfp4": "4.5 bits per weight; native on Blackwell GPUs.",
    "int8_convrot": "8 bits, far more exact than mxfp8; native on every GPU.",
    "mxfp8": "8.25 bits; native on Blackwell GPUs.",
    "bf16": "Lets layers stay as they are where that is worth 16 bits.",
}


class Plan(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraPlan", "Plan (Tessera)", "tessera", is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to quantize, in full precision."),
                CALIBRATION.Input("calibration", optional=True, tooltip="From Calibrate (Tessera), after sampling. "
                                  "Without it no model is run and layers are judged by their weights alone."),
                io.Float.Input("target_size_gb", default=0.0, min=0.0, max=4096.0, step=0.01, round=False,
                               tooltip="Largest size in GB (10^9 bytes) of the model and its correction LoRA together. "
                               "0: go by target_error."),
                io.Float.Input("target_error", default=0.0, min=0.0, max=1.0, step=0.001, round=False, optional=True,
                               tooltip="Largest expected relative error of the model's output, 0.02 is 2 %; the "
                               "smallest file that keeps to it. 0: go by target_size_gb."),
                io.String.Input("name", default="planned", optional=True, tooltip="The recipe is saved under this name "
                                "in user/tessera/recipes; a number is added, nothing is overwritten."),
                *(io.Boolean.Input(word, default=True, optional=True, tooltip=text) for word, text in WORDS.items()),
                io.String.Input("ranks", default="0, 16, 32, 64", optional=True, advanced=True,
                                tooltip="Ranks of the correction LoRA that a layer may have; its bytes count."),
                io.Combo.Input("activations", options=list(host.PROBED_ACTIVATIONS), optional=True, advanced=True,
                               tooltip="Whether inputs are rounded too, as native kernels do. auto: in the formats "
                               "that this device multiplies natively."),
                io.Float.Input("minutes", default=10.0, min=0.0, max=1440.0, step=0.5, optional=True, advanced=True,
                               tooltip="Time for running the model, about. Where it is too short, fewer formats and "
                               "calls are run, then layers of one kind together. 0: no limit."),
                io.Int.Input("calls", default=3, min=1, max=64, optional=True, advanced=True,
                             tooltip="Recorded calls of the model that each layer is measured on."),
                io.String.Input("edits", default="", multiline=True, optional=True, advanced=True, tooltip="Layers "
                                "you decide yourself, a line each, whatever that does to size and error: "
                                "layers.3.attention.qkv = mxfp8 r32. Patterns as in recipes, later lines win. The map "
                                "below writes this when you paint on it."),
            ],
            outputs=[
                RECIPE.Output("RECIPE", display_name="recipe", tooltip="Connect to Quantize and Save (Tessera)."),
                io.String.Output("report", tooltip="Format, rank, score and size per layer, as markdown."),
                io.Combo.Output("recipe_name", tooltip="The saved file, for recipe of Quantize and Save (Tessera)."),
                io.Image.Output("IMAGE", display_name="map", tooltip="Every layer as a tile, coloured by its format."),
            ],
            hidden=[io.Hidden.unique_id],
            description="Measures what each format of each layer does to the model's output, on calls recorded while "
            "your own sampler ran, and gives every layer the format and rank that cost least at your size.",
            search_aliases=["bit allocation", "mixed precision", "sensitivity", "probe", "recipe", "size", "quantize"],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, target_size_gb=0.0, calibration=None, target_error=0.0, name="planned", nvfp4=True,
        int8_convrot=True, mxfp8=True, bf16=True, ranks="0, 16, 32, 64", activations="auto", minutes=10.0, calls=3,
        edits="",
    ):  # fmt: skip
        target = planning.Target(int(target_size_gb * 1e9) or None, target_error or None)
        words = [w for w, on in zip(WORDS, (nvfp4, int8_convrot, mxfp8, bf16), strict=True) if on]
        menu = Menu.of(words, planning.parse_ranks(ranks))
        budget = host.Budget(calls, seconds=60 * minutes)
        by_hand.parse(edits)  # a mistake is told before minutes of measuring
        survey = host.surveyed(model, menu, calibration, budget, activations, host.Progress(cls.hidden.unique_id))
        path = host.new_recipe_path(name or "planned")
        plan = planning.plan(survey, path.stem, target, edits)
        plan.save(path)
        host.tell(cls.hidden.unique_id, *plan.summary())
        shown = mosaic.of_plan(plan)
        ui = {"text": [plan.markdown()], "tessera_plan": [plan.as_dict()], "tessera_map": [shown.payload()]}
        picture = pictures.tensor([mosaic_image.draw(shown)])
        return io.NodeOutput(plan.recipe(), plan.markdown(), path.name, picture, ui=ui)
