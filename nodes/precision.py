"""Full precision where sampling needs it most."""

from __future__ import annotations

from comfy_api.latest import io

from .. import host


class PrecisionSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraPrecisionSchedule", "Precision Schedule (Tessera)", "tessera",
            inputs=[
                io.Model.Input("model", tooltip="A model from Load Diffusion Model (Tessera), speed auto."),
                io.Int.Input("first_steps", default=1, min=0, max=10000,
                             tooltip="So many steps at the beginning multiply in full precision: they decide what the "
                             "picture shows."),
                io.Int.Input("last_steps", default=1, min=0, max=10000,
                             tooltip="So many steps at the end likewise: they decide its details."),
            ],
            outputs=[io.Model.Output(tooltip="The same weights; the input stays as it was.")],
            hidden=[io.Hidden.unique_id],
            description="Runs the first and the last sampling steps in full precision and the steps between on the "
            "fast kernels: less rounding of inputs where it shows, most of the speed. Nothing is loaded again.",
            search_aliases=["precision", "exact", "mixed precision", "steps", "schedule", "full precision", "quality"],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, first_steps=1, last_steps=1):
        made, said = host.schedule_precision(model, first_steps, last_steps)
        host.tell(cls.hidden.unique_id, said)
        return io.NodeOutput(made)
