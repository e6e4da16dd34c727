"""Extract a LoRA from two checkpoints, in the graph."""

from __future__ import annotations

import logging
from pathlib import Path

from comfy_api.latest import io

from .. import host
from ..comparison import Comparison, Side
from ..extraction import Extraction
from ..job import lora_path
from ..quantization.difference import MAX_RANK, RANK, Wish
from .calibrate import CALIBRATION
from .quantize import checkpoint_path, checkpoints

FOLDERS = ("diffusion_models", "text_encoders", "checkpoints")
log = logging.getLogger("tessera")


class ExtractLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraExtractLoRA", "Extract LoRA (Tessera)", "tessera", is_output_node=True,
            inputs=[
                io.Combo.Input("base", options=checkpoints(FOLDERS),
                               tooltip="What the LoRA will be loaded on: the model before tuning, or a quantized file "
                               "that is to be corrected."),
                io.Combo.Input("tuned", options=checkpoints(FOLDERS),
                               tooltip="What comes out with the LoRA: the tuned model, or the quantized file's BF16 "
                               "original. Any format."),
                io.String.Input("filename", default="", tooltip="Name of the LoRA, below models/loras. Empty: "
                                "<base>_lora for a quantized base, which the correction node finds by itself, else "
                                "<tuned>_minus_<base>. Nothing is overwritten."),
                io.Int.Input("rank", default=RANK, min=1, max=1024, optional=True,
                             tooltip="Of every layer: more holds more and is larger. Not used with a tolerance."),
                io.Float.Input("tolerance", default=0.0, min=0.0, max=0.99, step=0.01, round=False, optional=True,
                               tooltip="Above 0: each layer takes the smallest rank that loses no more than this share "
                               "of its difference. 0.05 suits fine-tunes; quantization errors never come near it."),
                io.Int.Input("max_rank", default=MAX_RANK, min=1, max=1024, optional=True, advanced=True,
                             tooltip="The highest rank that a tolerance may give to a layer."),
                CALIBRATION.Input("calibration", optional=True, tooltip="What the layers of either model see: the "
                                  "output error is made least, not that of the weights."),
                io.String.Input("layers", default="", optional=True, advanced=True,
                                tooltip="Only these, as in a recipe: layers.*.attention.** for instance; several with "
                                "spaces between. Empty: all."),
            ],
            outputs=[
                io.Combo.Output("lora_name", tooltip="Connect to lora_name of a LoRA node."),
                io.String.Output("report", tooltip="Rank, loss and errors of each layer, as markdown."),
            ],
            hidden=[io.Hidden.unique_id],
            description="Saves the difference of two checkpoints as a LoRA, layer by layer: what a fine-tune has "
            "learned, or the correction of somebody's quantized file from its original. Verifies what it wrote; "
            "cancelling leaves nothing behind.",
            search_aliases=["lora", "difference", "subtract", "svd", "correction", "repair", "fine-tune", "quantized"],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, base, tuned, filename="", rank=RANK, tolerance=0.0, max_rank=MAX_RANK, calibration=None, layers=""
    ):  # fmt: skip
        first, second = (checkpoint_path(name)[0] for name in (base, tuned))
        wish = Wish(rank, tolerance or None, max_rank)
        known = None if calibration is None else host.calibration_of(calibration)
        target = host.output_path("loras", filename or _name(first, second))
        work = Extraction(first, second, target, wish, known, layers, host.compute_device())
        host.make_room(work.working_bytes())
        report = work.run(host.Progress(cls.hidden.unique_id))
        for line in (*report.summary(), *report.warnings):
            log.info("Tessera: %s", line)
        host.say(cls.hidden.unique_id, "\n".join(report.summary()))
        return io.NodeOutput(host.listed_name(target), report.markdown(), ui={"text": [report.markdown()]})


def _name(base: Path, tuned: Path) -> str:
    """What a LoRA is called unless said otherwise."""
    correction = Comparison(Side(base), Side(tuned)).correction
    return lora_path(base).stem if correction else f"{tuned.stem}_minus_{base.stem}"
