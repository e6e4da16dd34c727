"""What the bytes of a safetensors file say, read without Tessera: by safetensors' own parser and plain formulas."""

import itertools
import json

import safetensors
import torch

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
STORED = {"mxfp8": torch.float8_e4m3fn, "hybrid_mxfp8": torch.float8_e4m3fn, "float8_e4m3fn": torch.float8_e4m3fn,
          "float8_e5m2": torch.float8_e5m2, "int8_tensorwise": torch.int8}  # fmt: skip
PARTS = ("weight", "weight_scale", "weight_scale_2", "scale_weight", "pre_quant_scale")


def tensors(data: bytes) -> dict[str, torch.Tensor]:
    """Every tensor of a file. Raises safetensors.SafetensorError if that parser refuses it."""
    found = {}
    for key, entry in safetensors.deserialize(data):
        raw = torch.frombuffer(bytearray(entry["data"]) or bytearray(1), dtype=torch.uint8)[: len(entry["data"])]
        found[key] = raw.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__") or {}


def weight(
    found: dict[str, torch.Tensor], key: str, record: dict, shape: tuple[int, int], by_row: bool
) -> torch.Tensor:
    """fp32 [out, in] of a layer: by the dtypes of its tensors, and for rotation by its record. `by_row`: block scales
    that lie row by row, with low nibbles first."""
    part = {suffix: found[f"{key}.{suffix}"] for suffix in PARTS if f"{key}.{suffix}" in found}
    codes, scale = part["weight"], part.get("weight_scale", part.get("scale_weight"))
    rows, columns = shape
    if codes.dtype == torch.uint8 and "weight_scale_2" not in part:  # bytes: only the record says of what
        codes = codes.view(STORED[record["format"]])
    if scale.ndim == 1 and (codes.dtype == torch.uint8 or scale.dtype.itemsize == 1):
        scale = scale.reshape(-(-rows // 128) * 128, -1)  # tiles, flat
    if "weight_scale_2" in part:
        packed = codes.contiguous().view(torch.uint8).long()
        high, low = E2M1[packed >> 4], E2M1[packed & 15]
        values = torch.stack((low, high) if by_row else (high, low), -1).flatten(1)[:rows, :columns]
        raw = scale.contiguous().view(torch.float8_e4m3fn).float()
        blocks = raw if by_row else untile(raw)
        step = part["weight_scale_2"].float().reshape(()) * blocks
        values = values * step[:rows].repeat_interleave(16, 1)[:, :columns]
    elif codes.dtype == torch.float8_e4m3fn and scale.ndim == 2 and scale.dtype.itemsize == 1:
        raw = scale.contiguous().view(torch.uint8)
        exponent = (raw if by_row else untile(raw)).float()
        step = torch.where(exponent == 0, 0.0, torch.exp2(exponent - 127))
        step = torch.where(exponent == 255, float("nan"), step)
        values = codes[:rows, :columns].float() * step[:rows].repeat_interleave(32, 1)[:, :columns]
    else:
        scale = scale.float()
        scale = scale.reshape(-1, 1) if scale.ndim == 1 else scale
        if scale.numel() > 1:
            scale = scale.repeat_interleave(rows // scale.shape[0], 0).repeat_interleave(columns // scale.shape[1], 1)
        values = codes.float() * (scale if scale.numel() > 1 else scale.reshape(()))
        nested = record.get("params")
        said = (nested if isinstance(nested, dict) else {}) | record
        if codes.dtype == torch.int8 and said.get("convrot"):
            values = rotate(values, said.get("convrot_groupsize", 256))
    if "pre_quant_scale" in part:
        values = values * part["pre_quant_scale"].float()
    return values


def untile(stored: torch.Tensor) -> torch.Tensor:
    """format.md 2.3, by its formula."""
    r, c = torch.meshgrid(torch.arange(stored.shape[0]), torch.arange(stored.shape[1]), indexing="ij")
    offset = ((r // 128) * (stored.shape[1] // 4) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    return stored.flatten()[offset]


def rotate(values: torch.Tensor, group: int) -> torch.Tensor:
    """format.md 2.2, by its definition."""
    digits = range(next(n for n in itertools.count() if 4**n == group))
    i, j = torch.meshgrid(torch.arange(group), torch.arange(group), indexing="ij")
    signs = torch.ones(group, group)
    for digit in digits:
        signs = torch.where((i // 4**digit) % 4 + (j // 4**digit) % 4 == 3, -signs, signs)
    return (values.reshape(values.shape[0], -1, group) @ (signs / group**0.5)).reshape(values.shape)
