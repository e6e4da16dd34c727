"""What a job can know up front: reasons to refuse it, and what its user should be told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from .checkpoint import ABSORB, DETECTION, EMBEDDINGS
from .formats import Format, Plain
from .quantization import pipeline
from .quantization.calibration import Calibration
from .source import Source


def refuse_names(target: Path, lora: Path | None, mode: str) -> None:
    """Raises ValueError for a name that is no safetensors file, or that hides the absorb mode."""
    for path in (target, lora):
        if path is not None and path.suffix != ".safetensors":
            raise ValueError(f"{path}: name it .safetensors, nothing else can be written")
    if mode == ABSORB and ABSORB not in target.stem.lower():
        better = target.with_stem(f"{target.stem}_absorb").name
        raise ValueError(f"{target.name}: name it with the word absorb, {better} for instance: other loaders read "
                         "such a file as an ordinary one and make noise, and its name is the warning")  # fmt: skip


def refuse_same_file(*paths: Path | None) -> None:
    mine = [path.resolve() for path in paths if path is not None]
    if len(set(mine)) != len(mine):
        raise ValueError(f"{paths[0]}: source, target and LoRA must be different files; choose another name")


def refuse_devices(devices: Iterable[str]) -> None:
    """Raises ValueError naming the first device that torch does not have."""
    for device in devices:
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as problem:  # torch asserts that it was built for CUDA
            first = str(problem).partition("\n")[0]
            raise ValueError(f"device {device!r}: {first}; use cpu, or a device that torch has") from None


def refuse_problems(source: Source, problems: list[str]) -> None:
    """Raises ValueError for layers that cannot take their format."""
    if problems:
        more = f"; and {len(problems) - 1} more layers like it" if problems[1:] else ""
        raise ValueError(f"{source.name}: {problems[0]}{more}")


def refuse_kept_legacy(source: Source, kept: Iterable[str]) -> None:
    legacy = [key.removesuffix(".scale_weight") for key in kept if key.endswith(".scale_weight")]
    if legacy:
        raise ValueError(f"{source.name}: {legacy[0]}: is in the legacy scaled_fp8 layout, which no output keeps; "
                         "give it a format in your recipe, bf16 for instance")  # fmt: skip


def refuse_foreign(source: Source, fingerprint: str, calibration: Calibration) -> None:
    """Raises ValueError if the statistics are those of another model."""
    if calibration.model != fingerprint:
        raise ValueError(f"{source.name}: statistics of another model ({calibration.model[:12]}, this one is "
                         f"{fingerprint[:12]}); record them with this model, or quantize without")  # fmt: skip


def of_layers(source: Source, formats: Mapping[str, Format]) -> list[str]:
    """Layers that not every loader can take."""
    warnings = []
    for name, format in formats.items():
        packed = format.codes_per_byte > 1 and DETECTION.search(name)
        blocked = format.name in ("nvfp4", "mxfp8") and EMBEDDINGS.search(name)
        if packed or blocked:
            why = "ComfyUI knows models by this shape" if packed else "ComfyUI looks embeddings up by row"
            does = "decodes it" if packed else "takes it"
            warnings.append(f"{name}: {format.label}, but {why}: Tessera's loader {does}, the stock loader may "
                            "fail on the file; keep this layer")  # fmt: skip
    return warnings


def of_source(source: Source, formats: Mapping[str, Format]) -> list[str]:
    """Layers that are not the original's."""
    again = [name for name in formats if source.quantized(name)]
    if not again:
        return []
    return [f"{len(again)} layers are already quantized in the source (first: {again[0]}); errors are measured against "
            "it, not against the original"]  # fmt: skip


def of_statistics(formats: Mapping[str, Format], calibration: Calibration) -> list[str]:
    """Layers that a calibration says nothing of."""
    packed = [name for name, format in formats.items() if not isinstance(format, Plain)]
    missing = [name for name in packed if name not in calibration.layers]
    if not missing:
        return []
    more = ", ..." if missing[3:] else ""
    return [f"no statistics for {len(missing)} of {len(packed)} layers ({', '.join(missing[:3])}{more}): they are "
            "quantized data-free"]  # fmt: skip


def in_words(formats: Mapping[str, Format], calibrated: int, calibration: Calibration | None, rounding: str) -> str:
    """What the numbers rest on."""
    if calibration is None:
        return "data-free: no calibration was given"
    if rounding != pipeline.BEST:
        return f"data-free: rounding {rounding} takes no statistics, the calibration was not used"
    packed = sum(not isinstance(format, Plain) for format in formats.values())
    return f"calibrated: {calibrated} of {packed} layers, by {calibration.runs} model calls"
