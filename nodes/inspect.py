"""What a model is made of and how it runs: formats and errors per layer, plans, and the kernels that were counted."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from .. import host, mosaic, pictures
from ..checkpoint import Checkpoint
from ..mosaic import Mosaic
from ..pictures import mosaic_image
from .quantize import CONNECTED, FOLDERS, checkpoint_path, checkpoints

log = logging.getLogger("tessera")
COLOURS = ("format", "error", "size", "kernel")


class Inspect(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraInspect", "Inspect (Tessera)", "tessera", is_output_node=True,
            inputs=[
                io.Model.Input("model", optional=True, tooltip="A model from Load Diffusion Model (Tessera)."),
                io.AnyType.Input("after", optional=True, tooltip="What the sampler makes: the report then counts the "
                                 "kernels that ran for it."),
                io.Clip.Input("clip", optional=True, tooltip="A text encoder from Load CLIP (Tessera), instead of a "
                              "model."),
                io.Combo.Input("file", options=[CONNECTED, *checkpoints(FOLDERS)], default=CONNECTED, optional=True,
                               tooltip="A file to look into without loading it, where neither model nor clip is "
                               "connected."),
                io.Combo.Input("color", options=list(COLOURS), default="format", optional=True,
                               tooltip="What the picture shows by colour: each layer's format, what quantizing it "
                               "cost, its size, or the kernel that ran."),
            ],
            outputs=[
                io.String.Output("report", display_name="report",
                                 tooltip="Every quantized layer as a table, in markdown."),
                io.Image.Output("IMAGE", display_name="map", tooltip="Every layer as a tile, by blocks and kinds of "
                                "layers. Connect to Save Image."),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,
            description="Shows each layer's format, size and error as a map, how it runs on this device and why, which "
            "kernels really ran, and what turning layers into another format has cost.",
            search_aliases=["doctor", "kernel", "speed", "nvfp4", "emulated", "layers", "report", "layer map"],
        )  # fmt: skip

    @classmethod
    def execute(cls, model=None, after=None, clip=None, file=CONNECTED, color="format"):
        if model is not None and clip is not None:
            raise ValueError("model and clip are both connected; disconnect one, or use a second Inspect (Tessera)")
        if model is None and clip is None:
            made = _shown(*_file(file), color)
            host.say(cls.hidden.unique_id, "read from the file's header; nothing was loaded")
            return made
        patcher = clip.patcher if model is None else model
        found = host.inspect(patcher)
        host.say(cls.hidden.unique_id, found.brief())
        return _shown(found.text(), found.markdown(), [found.as_dict()], host.inspected_map(patcher), color)


def _file(choice: str) -> tuple[str, str, list[dict], Mosaic]:
    """(a few lines, a table, nothing that ran, the map) of a file by its header."""
    if choice == CONNECTED:
        raise ValueError("nothing is connected to model or clip; connect one, or choose a file")
    file = Checkpoint(checkpoint_path(choice)[0])
    found = mosaic.of_file(file)
    text = "\n".join([found.text(), *(f"repaired on reading: {repair}" for repair in file.repairs)])
    return text, f"{text}\n\n{found.table()}", [], found


def _shown(text: str, report: str, rows: list[dict], found: Mosaic, color: str) -> io.NodeOutput:
    for line in text.splitlines():
        log.info("Tessera: %s", line)
    picture = pictures.tensor([mosaic_image.draw(found, color)])
    return io.NodeOutput(report, picture, ui={"text": [text], "tessera_rows": rows, "tessera_map": [found.payload()]})
