"""How one linear weight is stored: one file per format, one registry."""

from __future__ import annotations

from .base import FORMATS, Entries, Format, Plain, Quantized, TensorSpec, marker, require_finite
from .fp8 import FP8E4M3, FP8E5M2
from .int8 import INT8
from .mxfp8 import MXFP8
from .nvfp4 import NVFP4
from .plain import BF16, FP16, FP32

__all__ = [
    "BF16",
    "FORMATS",
    "FP8E4M3",
    "FP8E5M2",
    "FP16",
    "FP32",
    "INT8",
    "MXFP8",
    "NVFP4",
    "Entries",
    "Format",
    "Plain",
    "Quantized",
    "TensorSpec",
    "from_record",
    "marker",
    "parse",
    "require_finite",
]  # fmt: skip

_LABELS = {
    **{name: cls() for name, cls in FORMATS.items()},
    "int8": INT8(),
    "int8_row": INT8(per_row=True),
    "int8_convrot": INT8(per_row=True, convrot=True),
    "fp8": FP8E4M3(),
    "fp8_e4m3": FP8E4M3(),
    "fp8_e5m2": FP8E5M2(),
}
SPELLINGS = tuple(sorted(set(_LABELS) - {"int8_tensorwise"}))
"""What a recipe may call a format; `int8_convrot_64` (any power of 4) fixes the group."""


def parse(label: str) -> Format:
    """The format a recipe or report names. Raises ValueError listing the known ones."""
    if label in _LABELS:
        return _LABELS[label]
    stem, _, group = label.rpartition("_")
    if stem == "int8_convrot" and group.isdigit():
        return INT8(per_row=True, convrot=True, convrot_groupsize=int(group)).for_shape(1, int(group) or 1)
    raise ValueError(f"unknown format {label!r}; known are {', '.join(SPELLINGS)} and int8_convrot_<group>")


def from_record(record: dict, entries: dict[str, TensorSpec]) -> Format:
    """The format of a `comfy_quant` record. Raises ValueError if the record names none that Tessera reads."""
    name = record.get("format")
    cls = FORMATS.get(name) if isinstance(name, str) else None
    if cls is None or issubclass(cls, Plain):
        known = ", ".join(n for n, c in FORMATS.items() if not issubclass(c, Plain))
        raise ValueError(
            f"format {name!r} is not loadable by ComfyUI ({known} are); re-quantize, as int8_row for instance"
        )
    return cls.from_record(record, entries)
