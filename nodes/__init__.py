"""What the graph sees: one list of all nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .bake import Bake
from .calibrate import Calibrate, CalibrateCLIP, LoadCalibration, SaveCalibration
from .extract import ExtractLoRA
from .inspect import Inspect
from .loaders import CLIPLoader, DiffusionModelLoader
from .lora import CorrectionLoRA
from .plan import Plan
from .quantize import Quantize
from .user_lora import LoRA, LoRAStack

NODES: list[type[io.ComfyNode]] = [
    DiffusionModelLoader, CLIPLoader, CorrectionLoRA, LoRA, LoRAStack, Quantize,
    Calibrate, CalibrateCLIP, SaveCalibration, LoadCalibration, Plan, ExtractLoRA, Bake, Inspect,
]  # fmt: skip


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
