"""Files to models: checked and repaired before the host sees them, each quantized layer planned for its device."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import Counter
from pathlib import Path

import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.quant_ops
import comfy.sd
import comfy.utils
import folder_paths
import torch

from ..checkpoint import BRANCH, DETECTION, EMBEDDINGS, QUANTIZATION_METADATA, Checkpoint, Layer
from ..kernels import dispatch
from ..kernels.dispatch import Plan
from ..kernels.facts import DeviceFacts
from ..shortage import Told
from ..tiles import percent
from ..transcode import Cache
from . import attaching, caching, embedding, guard, settings, wiring
from .operations import Loading, operations

log = logging.getLogger("tessera")

REMEDY = "unload other models (in ComfyUI's menu), close other programs, or load a smaller file"
PLANS = "tessera_plans"  # attachment of a MODEL's patcher: the Loading that planned its layers
DONE = {
    dispatch.NATIVE: "native", dispatch.TRANSCODE: "transcoded", dispatch.WEIGHT_ONLY: "decoded by their kernel",
    dispatch.DECODE: "decoded",
}  # fmt: skip


def _within_memory(load):
    """A loader that says so where main memory does not suffice for its file."""

    @functools.wraps(load)
    def told(path: str, *args, **kwargs):
        file = Path(path)
        with Told(file.name, file.stat().st_size if file.is_file() else 0, REMEDY):
            return load(path, *args, **kwargs)

    return told


@_within_memory
def load_diffusion_model(path: str, model_options: dict | None = None, speed: str = "auto", cache: bool = False,
                         disable_dynamic=False):  # fmt: skip
    """A MODEL as `comfy.sd.load_diffusion_model` gives it, its quantized layers planned by `kernels.dispatch`.

    Layers that the device does not multiply are transcoded, with `cache` once for all runs. Branches that are part of
    the file (absorb mode) run beside their layers. Files without quantized layers go to the host unchanged. Raises
    ValueError for a file that must not be loaded.
    """
    options = dict(model_options or {})
    file = _quantized_file(path)
    if file is None:
        return comfy.sd.load_diffusion_model(path, model_options=options, disable_dynamic=disable_dynamic)
    state_dict, metadata = _read(file, path)
    branches = _branches_in(state_dict)
    device = options.get("load_device", comfy.model_management.get_torch_device())
    compute = _compute_dtype(state_dict, metadata, device)
    loading = _loading(file, device, compute, speed, cache)
    if compute is not None:
        options["custom_operations"] = operations(compute, loading)
    model = comfy.sd.load_diffusion_model_state_dict(
        state_dict, model_options=options, metadata=metadata, disable_dynamic=disable_dynamic
    )
    if model is None:
        raise ValueError(f"{file.name}: ComfyUI does not know this model's architecture; is it a diffusion model?")
    model.cached_patcher_init = (load_diffusion_model, (path, dict(model_options or {}), speed, cache))
    wiring.wire(model)
    guard.install(model)
    _attach_own(file, model, branches)
    _announce(file, model, loading)
    return model


@_within_memory
def load_clip(path: str, clip_type, model_options: dict | None = None, speed: str = "auto", cache: bool = False,
              disable_dynamic=False):  # fmt: skip
    """A CLIP as `comfy.sd.load_clip` gives it, for one file, its quantized layers run by their kernels.

    The host decodes every weight of a text encoder for each prompt; `speed` exact does that too. Embedding tables
    stay packed: rows are decoded as they are looked up.
    """
    options, folders = dict(model_options or {}), folder_paths.get_folder_paths("embeddings")
    file = _quantized_file(path)
    if file is None:
        return comfy.sd.load_clip([path], folders, clip_type, options, disable_dynamic=disable_dynamic)
    state_dict, _ = _read(file, path, embedding.FORMATS)
    branches = _branches_in(state_dict)
    device = options.get("load_device", comfy.model_management.text_encoder_device())
    compute = next(
        (t.dtype for k, t in state_dict.items() if k.endswith("norm.weight") and t.ndim == 1), torch.bfloat16
    )
    loading = _loading(file, device, compute if device.type == "cpu" else torch.bfloat16, speed, cache)
    loading.text_encoder = True
    options["custom_operations"] = embedding.with_packed_rows(operations(compute, loading, text_encoder=True), compute)
    clip = comfy.sd.load_text_encoder_state_dicts(
        [state_dict], folders, clip_type=clip_type, model_options=options, disable_dynamic=disable_dynamic
    )
    clip.patcher.cached_patcher_init = (_load_clip_patcher, (path, clip_type, dict(model_options or {}), speed, cache))
    wiring.wire(clip.patcher)
    guard.install(clip.patcher)
    _attach_own(file, clip.patcher, branches)
    _announce(file, clip.patcher, loading)
    return clip


def _load_clip_patcher(*args, disable_dynamic=False):
    return load_clip(*args, disable_dynamic=disable_dynamic).patcher


def _loading(file: Checkpoint, device: torch.device, compute, speed: str, cache: bool) -> Loading:
    """What the layers of a file share while they are loaded."""
    facts = dispatch.read_facts(device, compute)
    loading = Loading(facts, speed, _has_room(file, facts), str(device))
    if cache:
        loading.cache = Cache(transcoded_folder() / f"{file.path.stem}.{_tag(file, facts)}.safetensors")
    return loading


def _has_room(file: Checkpoint, facts: DeviceFacts) -> bool:
    """Whether the model with one byte per 4-bit weight would still fit the device, a tenth left for activations."""
    if not facts.memory:
        return True
    grown = sum(layer.shape[0] * layer.shape[1] for layer in file.layers.values() if layer.format.codes_per_byte > 1)
    return file.nbytes + grown // 2 <= 0.9 * facts.memory


def _tag(file: Checkpoint, facts: DeviceFacts) -> str:
    """Says in a cache file's name which file and kind of device it is for."""
    where = hashlib.blake2b(str(file.path.resolve()).encode(), digest_size=4).hexdigest()
    return f"{where}-{facts.gpu.removeprefix('SM ').replace('.', '') or facts.device_name}"


def transcoded_folder() -> Path:
    """Where transcoded layers are kept for the next start; need not exist, and may be removed at any time."""
    return Path(folder_paths.get_user_directory()) / "tessera" / "transcoded"


def plans(patcher) -> dict[str, tuple[str, Plan]]:
    """Format label and Plan of every quantized layer of a MODEL from our loader; empty for any other."""
    loading: Loading | None = patcher.get_attachment(PLANS)
    return {} if loading is None else dict(loading.plans)


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
    smoothed = [n for n, layer in file.layers.items() if layer.smoothed]
    if smoothed and "pre_quant_scale" not in comfy.quant_ops.QUANT_ALGOS["nvfp4"]["parameters"]:
        raise ValueError(f"{file.name}: {smoothed[0]}: pre_quant_scale needs ComfyUI 0.30 or later; update it")
    for name in smoothed:
        format = file.layers[name].format.name
        if "pre_quant_scale" not in comfy.quant_ops.QUANT_ALGOS[format]["parameters"]:
            raise ValueError(f"{file.name}: {name}: ComfyUI ignores the pre_quant_scale of {format} layers, the "
                             "model would be wrong; re-quantize the layer without smoothing, or as nvfp4")  # fmt: skip
        scale = file.read(file.layers[name].sources["pre_quant_scale"]).float()
        if not (scale.isfinite() & (scale != 0)).all():
            raise ValueError(f"{file.name}: {name}: pre_quant_scale has a zero or no number, so the weight it was "
                             "divided from is lost; make the file again from the original")  # fmt: skip
    return file if file.layers or file.opaque else None


def _read(file: Checkpoint, path: str, tables=()) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(state dict, metadata) as every host loads them: repaired, each marker a tensor, nothing it cannot take.

    Branches stay in, for our `Linear` to take out: whatever the host renames a layer to, its branch goes along.
    """
    state_dict, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    branches = {key: tensor for key, tensor in state_dict.items() if key.rpartition(".")[2] in BRANCH}
    state_dict = file.repair(state_dict) | branches
    for name, layer in file.layers.items():
        if not _host_takes(layer, tables):
            for suffix in (*layer.sources, "comfy_quant"):
                state_dict.pop(f"{layer.key}.{suffix}", None)
            weight = file.weight(name).to(torch.bfloat16)
            state_dict[f"{layer.key}.weight"] = weight
            file.repairs.append(f"{name}: {layer.format.label} decoded to bf16, {weight.nbytes / 1e6:.0f} MB")
    return state_dict, {k: v for k, v in (metadata or {}).items() if k != QUANTIZATION_METADATA}


def _host_takes(layer: Layer, tables=()) -> bool:
    """Whether the host loads the layer as it is stored; `tables`: formats of embeddings that ours looks up."""
    name, format = layer.key, layer.format
    if DETECTION.search(name):
        return format.codes_per_byte == 1  # a packed weight has another shape
    if not EMBEDDINGS.search(name):
        return True
    if layer.absorbs or layer.smoothed:
        return False  # rows are looked up, nothing can run beside that
    if format.name in tables:
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


def _branches_in(state_dict: dict) -> int:
    return sum(key.endswith(f".{BRANCH[0]}") for key in state_dict)


def _attach_own(file: Checkpoint, patcher, expected: int) -> None:
    """Attaches the branches that our `Linear` took. Raises ValueError if not all of them came to a layer."""
    taken = {name: vars(m).pop("tessera_branch") for name, m in patcher.model.named_modules()
             if "tessera_branch" in vars(m)}  # fmt: skip
    if len(taken) < expected:
        raise ValueError(f"{file.name}: only {len(taken)} of {expected} branches belong to a linear layer of this "
                         "model; without them it would be wrong, use the original")  # fmt: skip
    if taken:
        attaching.attach_own(patcher, file.name, taken)


def _announce(file: Checkpoint, patcher, loading: Loading) -> None:
    if loading.cache is not None:
        _keep(loading.cache)
        loading.cache = None  # and with it the tensors it holds
    patcher.set_attachments(PLANS, loading)
    for line in (*plan_lines(patcher), *(f"repaired: {r}" for r in file.repairs)):
        log.info("Tessera: %s: %s", file.name, line)


def _keep(cache: Cache) -> None:
    """Saves transcoded layers for the next start; the model is loaded either way."""
    try:
        cache.save()
        removed = caching.trim(cache.path, settings.cache_limit())
    except (ValueError, OSError) as problem:  # no space, no permission
        log.warning("Tessera: transcoded layers are not kept for the next start: %s", problem)
        return
    if removed:
        log.info("Tessera: %s removed from %s, which is to hold at most %.3g GB (Settings, Tessera)",
                 ", ".join(removed), cache.path.parent, settings.cache_limit() / 1e9)  # fmt: skip


def plan_lines(patcher) -> list[str]:
    """How a loaded model's quantized layers run here: a line for each distinct plan, then what transcoding cost."""
    loading: Loading | None = patcher.get_attachment(PLANS)
    lines = dispatch.summary(plans(patcher).values())
    if loading is not None and loading.costs:
        distance, layer = max((cost[0], name) for name, cost in loading.costs.items())
        added = max(cost[1] for cost in loading.costs.values())
        lines.append(f"transcoded {len(loading.costs)} layers: weights moved by at most {distance:.2%} ({layer}), "
                     f"which adds at most {added:.2%} to a layer's weight error")  # fmt: skip
    return [*lines, *attaching.absorbed_text(patcher)]


def plan_brief(patcher) -> str:
    """What a loader's node says below its layer map, at most two lines; the map has the rest."""
    loading: Loading | None = patcher.get_attachment(PLANS)
    if loading is None or not loading.plans:
        return "no quantized layers"
    planned = [plan for _, plan in loading.plans.values()]
    counts = Counter(DONE[plan.path] for plan in planned)
    line = ", ".join(f"{n} layers {done}" for done, n in counts.most_common())
    if loading.costs:
        line += f", at most {percent(max(distance for distance, _ in loading.costs.values()))} moved"
    fixes = dict.fromkeys(f"for the native path {plan.fix}" for plan in planned if plan.fix)
    return "\n".join([line, *[*fixes, *attaching.absorbed_text(patcher)][:1]])
