"""The one adapter to ComfyUI (0.27 and later)."""

from .attaching import Attached, attach_lora, coverage, lora_beside, quantized_layers
from .loading import TEXT_ENCODER, load_clip, load_diffusion_model, operations, plan_text, plans
from .memory import ModelSource, clip_source, model_source
from .ui import Progress, compute_device, filenames, full_path, listed_name, make_room, output_path, recipes_folder, say

__all__ = [
    "TEXT_ENCODER", "Attached", "ModelSource", "Progress", "attach_lora", "clip_source", "compute_device", "coverage",
    "filenames", "full_path", "listed_name", "load_clip", "load_diffusion_model", "lora_beside", "make_room",
    "model_source", "operations", "output_path", "plan_text", "plans", "quantized_layers", "recipes_folder", "say",
]  # fmt: skip
