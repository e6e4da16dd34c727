"""The two ends a tiny Z-Image workflow needs: words to conditioning, latent to picture."""

import importlib.util
from pathlib import Path

import torch.nn.functional as F
from comfy_api.latest import ComfyExtension, io

SCALE, SHIFT = 0.3611, 0.1159  # the host's Flux latent format
_spec = importlib.util.spec_from_file_location(
    "tessera_tiny_codec", Path(__file__).resolve().parent.parent / "codec.py"
)
codec = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(codec)


class TinyPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TinyPrompt",
            display_name="Tiny Prompt",
            category="testing/tiny",
            description="Conditioning for the tiny Z-Image. Words: " + ", ".join(codec.VOCABULARY),
            inputs=[io.String.Input("text", multiline=True, default="big red star center on white plain")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, text) -> io.NodeOutput:
        # without a mask the host counts num_tokens from the features
        return io.NodeOutput([[codec.embed(text), {"pooled_output": None}]])


class TinyDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TinyDecode",
            display_name="Tiny Decode",
            category="testing/tiny",
            description="Picture of a tiny Z-Image latent: 4 pixels per latent cell, enlarged by whole pixels.",
            inputs=[
                io.Latent.Input("samples"),
                io.Int.Input("upscale", default=4, min=1, max=16, optional=True),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples, upscale=4) -> io.NodeOutput:
        latents = (samples["samples"].float() - SHIFT) * SCALE
        pictures = F.interpolate(codec.decode(latents), scale_factor=upscale, mode="nearest")
        return io.NodeOutput(pictures.movedim(1, -1).contiguous())


class TinyExtension(ComfyExtension):
    async def get_node_list(self):
        return [TinyPrompt, TinyDecode]
