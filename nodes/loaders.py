"""Loaders: core's UNETLoader and CLIPLoader with the same inputs, in the same order, with the same choices."""

from __future__ import annotations

import comfy.sd
import nodes as core
import torch
from comfy_api.latest import io

from .. import host
from ..kernels.dispatch import SPEEDS

WEIGHT_DTYPES = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}
SPEED = io.Combo.Input(
    "speed", options=list(SPEEDS), default="auto", optional=True, advanced=True,
    tooltip="auto: each layer by the fastest kernel of this device; formats that it does not multiply are turned into "
    "one that it does, once, while loading. exact: decode every weight and multiply in full precision, slower.",
)  # fmt: skip
CACHE = io.Boolean.Input(
    "cache", default=False, optional=True, advanced=True,
    tooltip="Keep layers that were turned into another format on disk, in user/tessera/transcoded, so that the next "
    "start only reads them. Takes about a byte per weight; the folder may be emptied at any time.",
)  # fmt: skip


def _core_choices(node: str, field: str) -> list[str]:
    """The choices of a core loader's input, whatever this ComfyUI version offers."""
    inputs = core.NODE_CLASS_MAPPINGS[node].INPUT_TYPES()
    return list((inputs["required"] | inputs.get("optional", {}))[field][0])


class DiffusionModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraDiffusionModelLoader", "Load Diffusion Model (Tessera)", "tessera",
            inputs=[
                io.Combo.Input("unet_name", options=host.filenames("diffusion_models"),
                               tooltip="A safetensors file in models/diffusion_models, quantized or not."),
                io.Combo.Input("weight_dtype", options=_core_choices("UNETLoader", "weight_dtype"), advanced=True,
                               tooltip="For files that are not quantized; leave it at default for those that are."),
                SPEED, CACHE,
            ],
            outputs=[io.Model.Output(tooltip="The model, each quantized layer planned for this device.")],
            hidden=[io.Hidden.unique_id],
            description="Loads a diffusion model like Load Diffusion Model, plans each quantized layer for this device "
            "and repairs files that other tools marked wrongly.",
            search_aliases=["unet loader", "nvfp4", "mxfp8", "int8", "convrot", "quantized"],
        )  # fmt: skip

    @classmethod
    def execute(cls, unet_name, weight_dtype="default", speed="auto", cache=False):
        path = host.full_path("diffusion_models", unet_name)
        model = host.load_diffusion_model(path, WEIGHT_DTYPES[weight_dtype], speed, cache)
        host.say(cls.hidden.unique_id, host.plan_brief(model))
        return io.NodeOutput(model, ui={"tessera_map": [host.loaded_map(model).payload()]})


class CLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraCLIPLoader", "Load CLIP (Tessera)", "tessera",
            inputs=[
                io.Combo.Input("clip_name", options=host.filenames("text_encoders"),
                               tooltip="A file in models/text_encoders, quantized or not."),
                io.Combo.Input("type", options=_core_choices("CLIPLoader", "type"),
                               tooltip="What the text encoder is for, as in Load CLIP."),
                io.Combo.Input("device", options=_core_choices("CLIPLoader", "device"), optional=True, advanced=True,
                               tooltip="cpu keeps the text encoder off the GPU."),
                SPEED, CACHE,
            ],
            outputs=[io.Clip.Output(tooltip="The text encoder, each quantized layer planned for this device.")],
            hidden=[io.Hidden.unique_id],
            description="Loads a text encoder like Load CLIP, quantized layers by this device's kernels instead of "
            "decoding them for each prompt; embedding tables stay quantized.",
            search_aliases=["clip loader", "text encoder", "qwen", "quantized"],
        )  # fmt: skip

    @classmethod
    def execute(cls, clip_name, type="stable_diffusion", device="default", speed="auto", cache=False):
        clip_type = getattr(comfy.sd.CLIPType, type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
        cpu = torch.device("cpu")
        options = {"load_device": cpu, "offload_device": cpu} if device == "cpu" else {}
        clip = host.load_clip(host.full_path("text_encoders", clip_name), clip_type, options, speed, cache)
        host.say(cls.hidden.unique_id, host.plan_brief(clip.patcher))
        return io.NodeOutput(clip, ui={"tessera_map": [host.loaded_map(clip.patcher).payload()]})
