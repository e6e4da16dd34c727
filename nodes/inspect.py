"""How a loaded model runs: plans, and the kernels that were counted."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from .. import host

log = logging.getLogger("tessera")


class Inspect(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraInspect", "Inspect (Tessera)", "tessera", is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A model from Load Diffusion Model (Tessera)."),
                io.AnyType.Input("after", optional=True, tooltip="What the sampler makes: the report then counts the "
                                 "kernels that ran for it."),
            ],
            outputs=[io.String.Output("report", display_name="report",
                                      tooltip="Every quantized layer as a table, in markdown.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,
            description="Says how each quantized layer runs on this device and why, which kernels really ran, and what "
            "turning layers into another format has cost.",
            search_aliases=["doctor", "kernel", "speed", "nvfp4", "emulated", "layers", "report"],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, after=None):
        found = host.inspect(model)
        text = found.text()
        for line in text.splitlines():
            log.info("Tessera: %s", line)
        host.say(cls.hidden.unique_id, text)
        return io.NodeOutput(found.markdown(), ui={"text": [text], "tessera_rows": [found.as_dict()]})
