"""Two pictures, or two latents: how alike they are, and where they differ."""

from __future__ import annotations

import logging

from comfy_api.latest import io, ui

from .. import host, likeness

log = logging.getLogger("tessera")


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraCompare", "Compare (Tessera)", "tessera", is_output_node=True,
            inputs=[
                io.MultiType.Input("a", types=[io.Image, io.Latent],
                                   tooltip="The reference: an image, or a latent, from the original model."),
                io.MultiType.Input("b", types=[io.Image, io.Latent],
                                   tooltip="What is measured against it, of the same size: prompt and seed should be "
                                   "the same. Batches are compared pair by pair."),
                io.String.Input("label_a", default="original", optional=True, tooltip="What a is called."),
                io.String.Input("label_b", default="quantized", optional=True, tooltip="What b is called."),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="The numbers as a table, in markdown."),
                io.Image.Output("heat_map", display_name="heat map", tooltip="Where they differ, on a colour scale."),
                io.Image.Output("side_by_side", display_name="side by side", tooltip="a, b and their difference."),
                io.Float.Output("psnr", display_name="PSNR", tooltip="dB, more is nearer; infinite if they are equal."),
                io.Float.Output("ssim", display_name="SSIM", tooltip="1 is equal; not a number for pictures below 11 "
                                "pixels."),
                io.Float.Output("relative_l2", display_name="relative L2", tooltip="Length of b - a over "
                                "that of a; 0 is equal."),
                io.Float.Output("cosine", display_name="cosine", tooltip="1 is the same direction."),
            ],
            hidden=[io.Hidden.unique_id],
            description="Measures how far one picture or latent is from another (PSNR, SSIM, relative L2, cosine) and "
            "maps where they differ.",
            search_aliases=["psnr", "ssim", "difference", "diff", "heat map", "metric", "quality", "image compare",
                            "before after"],
        )  # fmt: skip

    @classmethod
    def execute(cls, a, b, label_a="", label_b=""):
        labels = label_a.strip() or "a", label_b.strip() or "b"
        if isinstance(a, dict) != isinstance(b, dict):
            kinds = ["a latent" if isinstance(x, dict) else "an image" for x in (a, b)]
            raise ValueError(f"a is {kinds[0]}, b is {kinds[1]}: give two images or two latents")
        if isinstance(a, dict):
            found = likeness.of_latents(a["samples"], b["samples"], labels)
        else:
            found = likeness.of_pictures(a, b, labels)
        log.info("Tessera: %s against %s: %s", labels[1], labels[0], found.line())
        host.say(cls.hidden.unique_id, found.line())
        beside, text = found.side_by_side(), found.markdown()
        whole = found.all
        return io.NodeOutput(text, found.heat_maps(), beside, whole.psnr, whole.ssim, whole.relative_l2, whole.cosine,
                             ui={"text": [text], **ui.PreviewImage(beside, cls=cls).as_dict()})  # fmt: skip
