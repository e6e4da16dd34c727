"""The one adapter to ComfyUI (0.27 and later)."""

from ..schedule import Schedule
from .attaching import (
    Attached,
    NothingFits,
    absorbed_layers,
    attach_file,
    attach_lora,
    coverage,
    lacks_branch,
    lora_beside,
    mismatch,
    quantized_layers,
)
from .baking import bake_of
from .guard import merged_hint
from .inspection import Inspection, inspect
from .jobs import Live
from .loading import load_clip, load_diffusion_model, plan_brief, plan_lines, plans, transcoded_folder
from .maps import inspected_map, loaded_map
from .memory import ModelSource, clip_source, model_source
from .precision import schedule_precision
from .probing import ACTIVATIONS as PROBED_ACTIVATIONS
from .probing import Budget, measure
from .recording import ProbeCall, Recorder, RecordOptions, calibration_of, record
from .routes import register as register_routes
from .surveys import surveyed
from .sweeping import sweep
from .ui import (
    Progress,
    calibration_path,
    calibrations,
    compute_device,
    filenames,
    full_path,
    listed_name,
    make_room,
    new_calibration_path,
    new_recipe_path,
    output_path,
    recipes_folder,
    say,
    tell,
)

__all__ = [
    "PROBED_ACTIVATIONS", "Attached", "Budget", "Inspection", "Live", "ModelSource", "NothingFits", "ProbeCall",
    "Progress", "RecordOptions", "Recorder", "Schedule", "absorbed_layers", "attach_file", "attach_lora", "bake_of",
    "calibration_of", "calibration_path", "calibrations", "clip_source", "compute_device", "coverage", "filenames",
    "full_path", "inspect", "inspected_map", "lacks_branch", "listed_name", "load_clip", "load_diffusion_model",
    "loaded_map", "lora_beside", "make_room", "measure", "merged_hint", "mismatch", "model_source",
    "new_calibration_path", "new_recipe_path", "output_path", "plan_brief", "plan_lines", "plans",
    "quantized_layers", "recipes_folder", "record", "register_routes", "say", "schedule_precision", "surveyed",
    "sweep", "tell", "transcoded_folder",
]  # fmt: skip
