"""What the graph sees: one list of all nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .loaders import CLIPLoader, DiffusionModelLoader
from .lora import CorrectionLoRA
from .quantize import Quantize

NODES: list[type[io.ComfyNode]] = [DiffusionModelLoader, CLIPLoader, CorrectionLoRA, Quantize]


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
