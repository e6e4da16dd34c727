"""What the graph sees: one list of all nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .. import host
from .bake import Bake
from .calibrate import Calibrate, CalibrateCLIP, LoadCalibration, SaveCalibration
from .compare import Compare
from .extract import ExtractLoRA
from .inspect import Inspect
from .loaders import CLIPLoader, DiffusionModelLoader
from .lora import CorrectionLoRA
from .plan import Plan
from .precision import PrecisionSchedule
from .quantize import Quantize
from .sweep import StrengthSweep, SweepGrid
from .user_lora import LoRA, LoRAStack

NODES: list[type[io.ComfyNode]] = [
    DiffusionModelLoader, CLIPLoader, CorrectionLoRA, LoRA, LoRAStack, Quantize,
    Calibrate, CalibrateCLIP, SaveCalibration, LoadCalibration, Plan, ExtractLoRA, Bake, Inspect,
    Compare, StrengthSweep, SweepGrid, PrecisionSchedule,
]  # fmt: skip


class Extension(ComfyExtension):
    async def on_load(self) -> None:
        host.register_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
