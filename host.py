"""The one adapter to ComfyUI (0.27 and later): load, attach, read models in memory, folders, progress, interrupt."""

from __future__ import annotations

import copy
import json
import logging
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.quant_ops
import comfy.sd
import comfy.utils
import folder_paths
import torch

from . import branch, lora
from .checkpoint import QUANTIZATION_METADATA, Checkpoint
from .formats import FORMATS, Format, Plain, TensorSpec, from_record
from .job import Step
from .kernels import dispatch
from .kernels.dispatch import Plan

log = logging.getLogger("tessera")

BRANCHES = "_tessera_branches"  # on a model: {LoRA file: Attached}
PLANS = "tessera_plans"  # attachment of a MODEL's patcher: {layer: (format label, Plan)}
EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|shared|token_embedding|word_embeddings|wte)$")
DETECTION = re.compile(
    r"(^|\.)(cap_embedder\.1|x_embedder|final_layer\.linear)$"
)  # shapes the host reads to know a model
TEXT_ENCODER = Plan(dispatch.DECODE, "ComfyUI runs text encoders in full precision")
TRUNK = "diffusion_model."


# ---- loading


def load_diffusion_model(path: str, model_options: dict | None = None, speed: str = "auto", disable_dynamic=False):
    """A MODEL as `comfy.sd.load_diffusion_model` gives it, its quantized layers planned by `kernels.dispatch`.

    Files without quantized layers go to the host unchanged. Raises ValueError for a file that must not be loaded.
    """
    options = dict(model_options or {})
    file = _quantized_file(path)
    if file is None:
        return comfy.sd.load_diffusion_model(path, model_options=options, disable_dynamic=disable_dynamic)
    state_dict, metadata = _read(file, path)
    device = options.get("load_device", comfy.model_management.get_torch_device())
    compute = _compute_dtype(state_dict, metadata, device)
    plans: dict[str, tuple[str, Plan]] = {}
    if compute is not None:
        options["custom_operations"] = operations(compute, dispatch.read_facts(device), speed, plans)
    model = comfy.sd.load_diffusion_model_state_dict(
        state_dict, model_options=options, metadata=metadata, disable_dynamic=disable_dynamic
    )
    if model is None:
        raise ValueError(f"{file.name}: ComfyUI does not know this model's architecture; is it a diffusion model?")
    model.cached_patcher_init = (load_diffusion_model, (path, dict(model_options or {}), speed))
    _announce(file, model, plans)
    return model


def load_clip(path: str, clip_type, model_options: dict | None = None, disable_dynamic=False):
    """A CLIP as `comfy.sd.load_clip` gives it, for one file; quantized embeddings the host cannot take are decoded."""
    options, folders = dict(model_options or {}), folder_paths.get_folder_paths("embeddings")
    file = _quantized_file(path)
    if file is None:
        return comfy.sd.load_clip([path], folders, clip_type, options, disable_dynamic=disable_dynamic)
    state_dict, _ = _read(file, path)
    device = options.get("load_device", comfy.model_management.text_encoder_device())
    plans: dict[str, tuple[str, Plan]] = {}
    compute = next(
        (t.dtype for k, t in state_dict.items() if k.endswith("norm.weight") and t.ndim == 1), torch.bfloat16
    )
    options["custom_operations"] = operations(compute, dispatch.read_facts(device), "exact", plans, text_encoder=True)
    clip = comfy.sd.load_text_encoder_state_dicts(
        [state_dict], folders, clip_type=clip_type, model_options=options, disable_dynamic=disable_dynamic
    )
    clip.patcher.cached_patcher_init = (_load_clip_patcher, (path, clip_type, dict(model_options or {})))
    _announce(file, clip.patcher, plans)
    return clip


def _load_clip_patcher(*args, disable_dynamic=False):
    return load_clip(*args, disable_dynamic=disable_dynamic).patcher


def operations(compute: torch.dtype, facts, speed: str, plans: dict, text_encoder: bool = False):
    """The host's mixed-precision ops with a `Linear` that runs our plan; `plans` collects (format label, Plan)."""
    disabled = {
        name for name, cls in FORMATS.items()
        if not issubclass(cls, Plain) and dispatch.plan(cls(), facts, speed).path == dispatch.DECODE
    }  # fmt: skip
    base = comfy.ops.mixed_precision_ops({}, compute, full_precision_mm=text_encoder, disabled=disabled)

    class Linear(base.Linear):
        tessera_plan: Plan | None = None

        def _load_from_state_dict(self, state_dict, prefix, *args):
            marked = state_dict.get(f"{prefix}comfy_quant")
            super()._load_from_state_dict(state_dict, prefix, *args)
            format = _format(marked)
            if format is not None:
                self.tessera_plan = TEXT_ENCODER if text_encoder else dispatch.plan(format, facts, speed)
                self._full_precision_mm = self.tessera_plan.path == dispatch.DECODE
                plans[prefix.rstrip(".")] = (format.label, self.tessera_plan)

        def _forward(self, input, weight, bias):
            decode = self.tessera_plan is not None and self.tessera_plan.path == dispatch.DECODE
            if decode and isinstance(weight, comfy.quant_ops.QuantizedTensor):
                weight = weight.dequantize()  # the host leaves int8 to its kernel even where a decode is asked for
            return super()._forward(input, weight, bias)

    class Operations(base):
        pass

    Operations.Linear = Linear
    return Operations


def plans(patcher) -> dict[str, tuple[str, Plan]]:
    """Format label and Plan of every quantized layer of a MODEL from our loader; empty for any other."""
    return dict(patcher.get_attachment(PLANS) or {})


def _format(marked: torch.Tensor | None) -> Format | None:
    if marked is None:
        return None
    record = json.loads(marked.numpy().tobytes())
    known = record.get("format") in FORMATS and "num_experts" not in record
    return from_record(record, {"weight_scale": TensorSpec(torch.float32, (1, 1))}) if known else None


def _quantized_file(path: str) -> Checkpoint | None:
    """The file if it has quantized layers; None for plain files and for other containers."""
    if not path.lower().endswith((".safetensors", ".sft")):
        return None
    file = Checkpoint(Path(path))
    for key, record in file.opaque.items():
        if record.get("format") not in comfy.quant_ops.QUANT_ALGOS:
            raise ValueError(
                f"{file.name}: {key}: format {record.get('format')!r} is not known to this ComfyUI; update it"
            )
    smoothed = [n for n, layer in file.layers.items() if "pre_quant_scale" in layer.sources]
    if smoothed and "pre_quant_scale" not in comfy.quant_ops.QUANT_ALGOS["nvfp4"]["parameters"]:
        raise ValueError(f"{file.name}: {smoothed[0]}: pre_quant_scale needs ComfyUI 0.30 or later; update it")
    return file if file.layers or file.opaque else None


def _read(file: Checkpoint, path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(state dict, metadata) as every host loads them: repaired, each marker a tensor, nothing it cannot take."""
    state_dict, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    state_dict = file.repair(state_dict)
    for name, layer in file.layers.items():
        if not _host_takes(name, layer.format):
            for suffix in (*layer.sources, "comfy_quant"):
                state_dict.pop(f"{layer.key}.{suffix}", None)
            weight = file.weight(name).to(torch.bfloat16)
            state_dict[f"{layer.key}.weight"] = weight
            file.repairs.append(f"{name}: {layer.format.label} decoded to bf16, {weight.nbytes / 1e6:.0f} MB")
    return state_dict, {k: v for k, v in (metadata or {}).items() if k != QUANTIZATION_METADATA}


def _host_takes(name: str, format: Format) -> bool:
    if DETECTION.search(name):
        return False
    if not EMBEDDINGS.search(name):
        return True
    int8 = hasattr(comfy.quant_ops.get_layout_class("TensorWiseINT8Layout"), "dequantize_embedding")
    return format.name.startswith("float8") or (format.name == "int8_tensorwise" and int8 and _version() >= (0, 30))


def _version() -> tuple[int, int]:
    import comfyui_version

    return tuple(int(n) for n in comfyui_version.__version__.split(".")[:2])


def _compute_dtype(state_dict: dict, metadata: dict, device: torch.device) -> torch.dtype | None:
    """The dtype the host would compute in (`pick_operations` gets it from the detected model); None if unknown."""
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state_dict)
    prefix = prefix if any(k.startswith(prefix) for k in state_dict) else ""
    config = comfy.model_detection.model_config_from_unet(state_dict, prefix, metadata=metadata)
    if config is None:
        return None
    return comfy.model_management.unet_manual_cast(None, device, config.supported_inference_dtypes)


def _announce(file: Checkpoint, patcher, plans: dict) -> None:
    patcher.set_attachments(PLANS, plans)
    for line in (*dispatch.summary(plans.values()), *(f"repaired: {r}" for r in file.repairs)):
        log.info("Tessera: %s: %s", file.name, line)


# ---- attaching low-rank branches


@dataclass(frozen=True)
class Attached:
    """A LoRA's branches for one model, shared by every strength: the host sees them as a model of its own."""

    identity: tuple
    patcher: comfy.model_patcher.ModelPatcher
    layers: tuple[str, ...]
    unmatched: tuple[str, ...]


def attach_lora(patcher, path: str, strength: float) -> tuple[comfy.model_patcher.ModelPatcher, Attached]:
    """(clone with the LoRA's branches beside its layers, what was attached). No weight of the model changes.

    Raises ValueError if no key of the file fits the model, or a pair does not fit its layer.
    """
    attached = _branches(patcher, Path(path))
    clone, key = patcher.clone(), f"tessera.{uuid.uuid4().hex}"
    if strength != 0:  # at 0 the clone is the model itself, bit for bit
        side = branch.SideBranch(key, strength)
        clone.set_additional_models(key, [attached.patcher.clone()])
        clone.set_injections(key, [comfy.patcher_extension.PatcherInjection(side.inject, side.eject)])
    return clone, attached


def _branches(patcher, path: Path) -> Attached:
    """Read from disk once per model and file, so that moving a slider reads nothing; freed with the model."""
    stat = path.stat()
    identity = (stat.st_mtime_ns, stat.st_size, patcher.load_device)
    kept: dict[Path, Attached] = patcher.model.__dict__.setdefault(BRANCHES, {})
    cached = kept.get(path)
    if cached is None or cached.identity != identity:
        pairs, unmatched = branch.match(path.name, lora.read(path), _targets(patcher), patcher.model)
        module = branch.Branches(pairs, comfy.ops.manual_cast.Linear)
        side = comfy.model_patcher.ModelPatcher(module, patcher.load_device, patcher.offload_device)
        side.cached_patcher_init = (_copy_branches, (module, patcher.load_device, patcher.offload_device))
        cached = Attached(identity, side, tuple(module.layers), tuple(unmatched))
        kept[path] = cached
    return cached


def _copy_branches(module, load_device, offload_device, disable_dynamic=False):
    """A fresh patcher of copied branches, for deep clones on other devices."""
    return comfy.model_patcher.ModelPatcher(copy.deepcopy(module), load_device, offload_device)


def _targets(patcher) -> dict[str, tuple[str, tuple[int, int] | None]]:
    """LoRA base name -> (module path, rows (start, length) or None), in every spelling the host knows."""
    targets = {}
    for name, key in comfy.lora.model_lora_keys_unet(patcher.model, {}).items():
        rows = None
        if isinstance(key, tuple):
            key, (dim, start, length) = key[0], key[1]
            if dim != 0:
                continue
            rows = (start, length)
        if key.endswith(".weight"):
            targets[name] = (key.removesuffix(".weight"), rows)
            targets.setdefault(name.removeprefix(TRUNK), targets[name])  # bare keys
    return targets


def coverage(patcher, attached: Attached) -> str:
    """How many of the model's quantized layers a LoRA covers, in words."""
    quantized = quantized_layers(patcher)
    covered = len(quantized & set(attached.layers))
    text = f"corrects {len(attached.layers)} layers, {covered} of {len(quantized)} quantized ones"
    if attached.unmatched:
        text += f"; {len(attached.unmatched)} keys fit no layer ({names_of(attached.unmatched)})"
    return text


def quantized_layers(patcher) -> set[str]:
    """Module paths of the layers whose weight is quantized, from any loader."""
    return {name for name, module in patcher.model.named_modules() if getattr(module, "layout_type", None) is not None}


def lora_beside(patcher) -> str | None:
    """The `<checkpoint>_lora.safetensors` of a MODEL: in the checkpoint's folder, or among the loras."""
    made = getattr(patcher, "cached_patcher_init", None)
    path = Path(made[1][0]) if made and isinstance(made[1][0], str) else None
    if path is None:
        return None
    name = f"{path.stem}_lora.safetensors"
    beside = path.with_name(name)
    return str(beside) if beside.is_file() else folder_paths.get_full_path("loras", name)


# ---- models in memory as a source


class ModelSource:
    """A loaded MODEL or CLIP as a quantization source: weights as they are, its LoRA patches merged in fp32.

    Raises ValueError if it is quantized already: the original file is the better source.
    """

    metadata: dict = {}  # noqa: RUF012 never written
    prefix = ""
    path = None

    def __init__(self, patcher, below: str, name: str):
        self.name, self._patcher, self._below = name, patcher, below
        self._parameters = {
            key.removeprefix(below): value
            for key, value in [*patcher.model.named_parameters(), *patcher.model.named_buffers()]
            if key.startswith(below)
        }
        for key, value in self._parameters.items():
            if isinstance(value.data, comfy.quant_ops.QuantizedTensor) or value.dtype.itemsize < 2:
                raise ValueError(
                    f"{name}: {key}: is already quantized ({value.dtype}); quantize from the original file"
                )
        self.tensors = {k: TensorSpec(_stored_dtype(v), tuple(v.shape)) for k, v in self._parameters.items()}
        self.nbytes = sum(spec.nbytes for spec in self.tensors.values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: spec.shape for key, spec in self.tensors.items()}

    def quantized(self, name: str) -> bool:
        return False

    def weight(self, name: str) -> torch.Tensor:
        return self._patched(f"{name}.weight").float()

    def read(self, key: str) -> torch.Tensor:
        return self._patched(key).to(self.tensors[key].dtype)

    def _patched(self, key: str) -> torch.Tensor:
        full = self._below + key
        backup = self._patcher.backup.get(full)  # a merged weight's original
        value = (backup.weight if backup is not None else self._parameters[key]).detach().cpu()
        patches = self._patcher.patches.get(full)
        return comfy.lora.calculate_weight(patches, value.float(), full) if patches else value


def _stored_dtype(value: torch.Tensor) -> torch.dtype:
    """bf16 for what the host has only widened to fp32, as it does on CPU; else the dtype itself."""
    widened = value.dtype == torch.float32 and torch.equal(value.bfloat16().float(), value)
    return torch.bfloat16 if widened else value.dtype


def model_source(patcher) -> ModelSource:
    made = getattr(patcher, "cached_patcher_init", None)
    name = Path(made[1][0]).name if made and isinstance(made[1][0], str) else "MODEL"
    return ModelSource(patcher, TRUNK, name)


def clip_source(clip) -> ModelSource:
    """A CLIP with one text encoder. Raises ValueError if it holds several."""
    encoders = sorted(
        {k.split(".transformer.")[0] for k, _ in clip.patcher.model.named_parameters() if ".transformer." in k}
    )
    if len(encoders) != 1:
        raise ValueError(
            f"CLIP holds {len(encoders)} text encoders ({', '.join(encoders)}); quantize their files instead"
        )
    return ModelSource(clip.patcher, f"{encoders[0]}.transformer.", encoders[0])


# ---- folders, progress


def compute_device() -> str:
    """Where the host computes: the GPU if it has one."""
    return str(comfy.model_management.get_torch_device())


def full_path(folder: str, name: str) -> str:
    return folder_paths.get_full_path_or_raise(folder, name)


def filenames(folder: str) -> list[str]:
    return folder_paths.get_filename_list(folder)


def recipes_folder() -> Path:
    """Where a user's own recipe files are looked for; need not exist."""
    return Path(folder_paths.get_user_directory()) / "tessera" / "recipes"


def output_path(folder: str, name: str) -> Path:
    """A file to write below the first folder registered for that kind. Raises ValueError if the name leaves it."""
    root = Path(folder_paths.get_folder_paths(folder)[0]).resolve()
    name = name if name.endswith(".safetensors") else f"{name}.safetensors"
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{name}: leaves the folder {root}; give a name below it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class Progress:
    """Bar and text in the node for a running job; raises the host's interrupt exception when the user cancels."""

    def __init__(self, node_id: str | None):
        self.node_id, self._bar = node_id, None

    def __call__(self, step: Step) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._bar is None or self._bar.total != step.total:
            self._bar = comfy.utils.ProgressBar(max(step.total, 1), node_id=self.node_id)
        self._bar.update_absolute(step.index)
        say(self.node_id, str(step))


def say(node_id: str | None, text: str) -> None:
    """Shows a line in the node, in both renderers; nothing where no server runs (tests, scripts)."""
    if node_id is not None:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, node_id)


def plan_text(patcher) -> str:
    """How a loaded model's quantized layers run here, in words."""
    return "\n".join(dispatch.summary(plans(patcher).values())) or "no quantized layers"


def names_of(items: Iterable[str], limit: int = 3) -> str:
    """The first few of a list in words."""
    items = list(items)
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")
