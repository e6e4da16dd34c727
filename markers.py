"""What a checkpoint says of its quantized layers: in tensors, in the header, in legacy keys, or in shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from . import foreign
from .formats import FORMATS, Plain, TensorSpec
from .header import parse, shown

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

MARKER = ".comfy_quant"
MAX_RECORD = 64_000  # bytes; a record has some ten short keys
ASYMMETRIC = "asym_w4a8_int8"  # the only format with a weight_s_rel
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def merge_markers(file: Checkpoint) -> tuple[dict[str, dict], set[str]]:
    """Record per layer key of the file, and the keys that have none but look quantized.

    Header and tensors are merged; the header wins unless only the tensor fits.
    """
    tensors = {key.removesuffix(MARKER): _record(file, key) for key in file.tensors if key.endswith(MARKER)}
    header = _header_records(file)
    merged = dict(tensors)
    for key, record in header.items():
        other = tensors.get(key)
        if other is not None and not _fits(file, key, record) and _fits(file, key, other):
            said = shown(repr(record.get("format")))
            file.repairs.append(f"{key}: header says {said}, tensors are {other.get('format')!r}")
            record = other
        merged[key] = (other or {}) | record
    for key, record in merged.items():
        if "format" not in record and f"{key}.weight_s_rel" in file.tensors:
            merged[key] = record | {"format": ASYMMETRIC}
            file.repairs.append(f"{key}: format missing, tensors are {ASYMMETRIC}")
    if header.keys() - tensors.keys():
        file.repairs.append(f"{len(header.keys() - tensors.keys())} layers are marked in the header only")
    unmarked = _unmarked(file, merged)
    return merged | unmarked, set(unmarked)


def infer(record: dict, specs: Mapping[str, TensorSpec], repairs: list[str], key: str) -> dict:
    """The record with a `format` that its tensors support. Raises ValueError if it names none and none fits."""
    said, found = record.get("format"), _candidates(specs)
    weight = specs.get("weight")
    scalar_fp8 = weight is not None and weight.dtype in FP8 and found == [_fp8(weight.dtype)]
    if said in ("nvfp4", "mxfp8", "float8_e4m3fn", "float8_e5m2") and scalar_fp8 and said != found[0]:
        # convert_to_quant --layer-config puts fp8 tensors under a block format's label; hosts call every fp8 e4m3
        repairs.append(f"{key}: marked {said}, tensors are {found[0]}")
        return record | {"format": found[0]}
    if said in ("nvfp4", "mxfp8") and weight is not None and weight.dtype in FP8 and "weight_scale" in specs and (
            said == "nvfp4" or found not in (["mxfp8"], [])):  # fmt: skip
        raise ValueError(f"marked {said}, but its tensors are {found[0] if found else weight}: convert_to_quant's "
                         "--layer-config does that; re-quantize without it")  # fmt: skip
    if said == "hybrid_mxfp8":  # mxfp8 and a scale of the whole tensor beside it, which nothing needs
        repairs.append(f"{key}: marked hybrid_mxfp8, its spare weight_scalar is left out: it is mxfp8")
        return record | {"format": "mxfp8"}
    if said is not None:
        return record
    if not found:
        raise ValueError("format is missing and the tensors fit none; re-quantize the layer from the original")
    if len(found) > 1:
        raise ValueError(f"format is missing and ambiguous ({', '.join(found)}); add it to comfy_quant")
    repairs.append(f"{key}: format missing, tensors are {found[0]}")
    return record | {"format": found[0]}


def _candidates(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Formats whose storage the entries could be, from dtypes and shapes alone."""
    weight, scale = specs.get("weight"), specs.get("weight_scale")
    if weight is None or scale is None or len(weight.shape) != 2:
        return []
    if "weight_scale_2" in specs:
        return ["nvfp4"] if weight.dtype in (torch.uint8, torch.int8) else []
    if weight.dtype in FP8 and scale.numel == 1:
        return [_fp8(weight.dtype)]
    if weight.dtype == torch.int8 and (scale.numel == 1 or scale.shape == (weight.shape[0], 1)):
        return ["int8_tensorwise"]
    if weight.dtype == torch.float8_e4m3fn and scale.dtype.itemsize == 1:
        tiled = FORMATS["mxfp8"]().storage(*weight.shape)["weight_scale"].shape
        rows = weight.shape[0], -(-weight.shape[1] // 32)
        return ["mxfp8"] if scale.shape in (tiled, rows) else []
    if weight.dtype == torch.int8 and scale.shape == weight.shape[:1]:
        other = [name for name in ("convrot_w4a4",) if weight.shape[1] % 32 == 0]  # two codes a byte: K is twice that
        return ["int8_tensorwise", *other]
    if scale.dtype not in foreign.FLOATS or 0 in weight.shape:
        return []
    return [name for name, dtype in foreign.SCALED.items()
            if dtype == weight.dtype and foreign.scaled_shape(name, weight.shape, scale.shape)]  # fmt: skip


def _fp8(dtype: torch.dtype) -> str:
    return "float8_e5m2" if dtype == torch.float8_e5m2 else "float8_e4m3fn"


def _fits(file: Checkpoint, key: str, record: dict) -> bool:
    """Whether the weight's dtype is the one the record's format stores."""
    cls, weight = FORMATS.get(str(record.get("format"))), file.tensors.get(f"{key}.weight")
    if cls is None or weight is None or issubclass(cls, Plain) or len(weight.shape) != 2:
        return False
    return cls().storage(*weight.shape)["weight"].dtype == weight.dtype


def _record(file: Checkpoint, key: str) -> dict:
    spec = file.tensors[key]
    try:
        if spec.nbytes > MAX_RECORD:
            raise ValueError(f"{spec.nbytes} bytes")
        record = parse(file.read(key).flatten().view(torch.uint8).numpy().tobytes().decode())
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as problem:
        raise ValueError(
            f"{file.path.name}: {key}: is not a quantization record ({shown(str(problem))}); re-quantize"
        ) from None
    return record


def _header_records(file: Checkpoint) -> dict[str, dict]:
    text = file.metadata.get("_quantization_metadata")
    if text is None:
        return {}
    try:
        layers = parse(text)["layers"]
        records = {name: dict(record) for name, record in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{file.path.name}: _quantization_metadata is not {{'layers': {{name: record}}}}; re-quantize the file"
        ) from None
    return {_with_prefix(file, name): record for name, record in records.items()}


def _with_prefix(file: Checkpoint, name: str) -> str:
    """The file's own key for a layer that the header may name with or without a prefix."""
    bare = name.removeprefix("model.diffusion_model.").removeprefix("diffusion_model.")
    for key in (name, f"{file.prefix}{name}", bare, f"{file.prefix}{bare}"):
        if f"{key}.weight" in file.tensors:
            return key
    raise ValueError(
        f"{file.path.name}: {shown(name)}: marked as quantized in the header, but the file has no such weight; "
        "another tool took it out, make the file again from the original"
    )


def _unmarked(file: Checkpoint, known: Mapping[str, dict]) -> dict[str, dict]:
    """Records of layers with quantized tensors but no marker: legacy scaled_fp8 files and lost markers."""
    flag = file.tensors.get(f"{file.prefix}scaled_fp8")
    extra = {"full_precision_matrix_mult": True} if flag is not None and flag.numel == 2 else {}
    found = {}
    for key, spec in file.tensors.items():
        base, _, suffix = key.rpartition(".")
        if suffix == "weight_s_rel" and base not in known and f"{base}.weight" in file.tensors:
            found[base] = {"format": ASYMMETRIC}
        if suffix not in ("weight_scale", "scale_weight") or base in known or f"{base}.weight" not in file.tensors:
            continue
        weight = file.tensors[f"{base}.weight"]
        if weight.dtype.is_floating_point and weight.dtype not in FP8:
            continue  # a module that happens to be called so
        candidates = _candidates({"weight": weight, "weight_scale": spec} | _second_scale(file, base))
        if len(candidates) > 1:
            raise ValueError(f"{file.path.name}: {base}: format is missing and ambiguous ({', '.join(candidates)}); "
                             "add it to comfy_quant")  # fmt: skip
        if not candidates:
            raise ValueError(f"{file.path.name}: {base}: {weight} with {suffix} {spec} has no quantization record "
                             "and fits no format; re-quantize it from the original")  # fmt: skip
        found[base] = {"format": candidates[0]} | extra
    if found:
        kind = "legacy scaled_fp8 file" if flag is not None else "no quantization records"
        file.repairs.append(f"{kind}: {len(found)} layers recognised from their tensors")
    return found


def _second_scale(file: Checkpoint, base: str) -> dict[str, TensorSpec]:
    spec = file.tensors.get(f"{base}.weight_scale_2")
    return {} if spec is None else {"weight_scale_2": spec}
