"""Every number operation of the formats in plain PyTorch: the truth that every faster path is tested against."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0..7; codes 8..15 are the negatives
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E5M2_MAX = 57344.0
E8M0_BIAS = 127
ROTATED_GROUPS = (0, 4, 16, 64, 256)
"""ConvRot groups that our GPU kernels rotate; 0 is none. The reference takes any power of 4."""

# Upper edge of each code's interval. nextafter makes a tie go to the even code: 0.25 -> 0, 0.75 -> code 2, 2.5 -> 4.
_E2M1_EDGES = torch.tensor((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
_E2M1_EDGES[1::2] = torch.nextafter(_E2M1_EDGES[1::2], torch.tensor(0.0))


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def e2m1_encode(x: Tensor) -> Tensor:
    """Code (uint8, sign<<3 | exponent<<1 | mantissa) of the nearest E2M1 number, ties to even, saturating at 6."""
    magnitude = torch.bucketize(x.abs(), _E2M1_EDGES.to(x.device), out_int32=True).to(torch.uint8)
    return magnitude | (torch.signbit(x).to(torch.uint8) << 3)


def e2m1_decode(codes: Tensor) -> Tensor:
    """fp32 value of each E2M1 code (uint8, 0..15)."""
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), device=codes.device)
    return table[codes.int()]


def e2m1_round(magnitude: Tensor) -> Tensor:
    """Nearest E2M1 value of each fp32 magnitude in [0, 6], ties to even; several times faster than encode + decode.

    Spacing is half the number's power of two (0.5 below 1): divide by it, round half to even, multiply back.
    """
    binade = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1.0)
    return torch.round((magnitude + magnitude).div_(binade)).mul_(binade).mul_(0.5)


def e8m0_decode(exponents: Tensor) -> Tensor:
    """2^(b - 127) as fp32; b = 0 decodes to 0, as in the host's MXFP8 reader (format.md 2.2)."""
    return torch.where(exponents == 0, 0.0, torch.exp2(exponents.float() - E8M0_BIAS))


def pack_nibbles(codes: Tensor) -> Tensor:
    """[out, in] 4-bit codes -> [out, in/2] bytes, even column in the high nibble (NVFP4 order)."""
    return (codes[:, 0::2] << 4) | codes[:, 1::2]


def unpack_nibbles(packed: Tensor) -> Tensor:
    """[out, in/2] bytes -> [out, in] 4-bit codes, the inverse of pack_nibbles."""
    return torch.stack((packed >> 4, packed & 0x0F), dim=-1).flatten(-2)


def pad_to(x: Tensor, rows: int, columns: int) -> Tensor:
    """x [r, c] with zeros appended to [rows, columns]."""
    if tuple(x.shape) == (rows, columns):
        return x
    padded = x.new_zeros(rows, columns)
    padded[: x.shape[0], : x.shape[1]] = x
    return padded


def swizzle(scales: Tensor) -> Tensor:
    """Block scales [r, c] -> cuBLAS 128x4 tile order, zero-padded to multiples of (128, 4) (format.md 2.3)."""
    rows, columns = round_up(scales.shape[0], 128), round_up(scales.shape[1], 4)
    tiles = pad_to(scales, rows, columns).view(rows // 128, 4, 32, columns // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def unswizzle(stored: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of swizzle, cropped to [rows, columns]."""
    r, c = stored.shape
    tiles = stored.reshape(r // 128, c // 4, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(r, c)[:rows, :columns].contiguous()


@functools.lru_cache(maxsize=8)
def _hadamard(group: int, device: torch.device) -> Tensor:
    factor = torch.ones(4, 4)
    factor[torch.arange(4), 3 - torch.arange(4)] = -1
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < group:
        matrix = torch.kron(matrix, factor)
    return (matrix / group**0.5).to(device)


def is_power_of_4(group: int) -> bool:
    return group >= 4 and group & (group - 1) == 0 and group.bit_length() % 2 == 1


def rotate(x: Tensor, group: int) -> Tensor:
    """x [..., K] times the regular Hadamard matrix in each group of columns; its own inverse (format.md 2.2)."""
    if not is_power_of_4(group):
        raise ValueError(f"convrot group {group} is not a power of 4; use 4, 16, 64, 256 or 1024")
    if x.shape[-1] % group:
        raise ValueError(f"in_features {x.shape[-1]} is not a multiple of the ConvRot group {group}")
    grouped = x.float().unflatten(-1, (-1, group))
    # .T although H is symmetric: the same BLAS call as comfy-kitchen, so that the sums round alike
    return (grouped @ _hadamard(group, x.device).T).flatten(-2)


def quantize_rows(x: Tensor, group: int = 0) -> tuple[Tensor, Tensor]:
    """x [M, K], rotated first where `group` is not 0, as int8 codes [M, K] and fp32 scales amax/127 [M, 1].

    A zero row gets scale 1e-30 and codes 0; ties round to even.
    """
    rotated = rotate(x, group) if group else x.float()
    if not rotated.numel():
        return rotated.to(torch.int8), rotated.new_full((x.shape[0], 1), 1e-30)
    scale = (rotated.abs().amax(1, keepdim=True) / 127.0).clamp(min=1e-30)
    return torch.round(rotated / scale).clamp_(-127, 127).to(torch.int8), scale


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in fp32, no rounding between; fp16 inputs saturate at its largest number, as in the host."""
    product = torch.nn.functional.silu(gate.float()) * up.float()
    if gate.dtype == torch.float16:
        return torch.nan_to_num(product, nan=0.0, posinf=65504.0, neginf=-65504.0).clamp_(-65504.0, 65504.0)
    return product


def branch_middle(x: Tensor, down: Tensor, strength: Tensor) -> Tensor:
    """t [M, r] = strength ([r] or []) * (x [M, K] down [r, K]^T), summed in fp32, rounded once to x's dtype."""
    return ((x.float() @ down.float().T) * strength).to(x.dtype)


def int8_product(q: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """fp32 [M, N] of int8 codes [M, K] and [N, K]: exact integer sums, then both scales ([M, 1], and [N, 1] or [])."""
    sums = (q.double() @ weight.double().T).float()  # below 2^53: exact, and float32 holds what int32 would round to
    return sums * x_scale * (weight_scale.reshape(1, -1) if weight_scale.ndim else weight_scale)


def power_of_2_scale(amax: Tensor, largest: float) -> Tensor:
    """The smallest power of two s (fp32) with amax / s <= largest, 1 where amax is 0: dividing by it changes no bit."""
    exponent = torch.ceil(torch.log2((amax.float() / largest).clamp(min=2.0**-126)))
    scale = torch.exp2(exponent)
    scale = torch.where(amax / scale > largest, scale * 2, scale)  # log2 may round down across an integer
    return torch.where(amax == 0, 1.0, scale)


def decode_rows(kind: str, qdata: Tensor, scale: Tensor, block_scale: Tensor | None, rows: slice, columns: int,
                group: int = 0) -> Tensor:  # fmt: skip
    """fp32 weight [rows, columns] of a packed one, as comfy-kitchen lays it out (format.md 2).

    kind nvfp4, mxfp8 (`scale` holds the swizzled exponents), int8 (rotated back if `group`), fp8, fp8_row.
    """
    codes, rows = qdata[rows], slice(*rows.indices(qdata.shape[0])[:2])
    if kind == "nvfp4":
        blocks = unswizzle_rows(block_scale.view(torch.uint8), rows, -(-columns // 16)).view(torch.float8_e4m3fn)
        values = e2m1_decode(unpack_nibbles(codes))[:, : blocks.shape[1] * 16].unflatten(1, (-1, 16))
        return (values * (scale.float() * blocks.float()).unsqueeze(-1)).flatten(1)[:, :columns]
    if kind == "mxfp8":
        exponents = unswizzle_rows(scale.view(torch.uint8), rows, -(-columns // 32))
        values = codes.float()[:, : exponents.shape[1] * 32].unflatten(1, (-1, 32))
        return (values * e8m0_decode(exponents).unsqueeze(-1)).flatten(1)[:, :columns]
    values = codes.float() * (scale[rows] if scale.ndim and scale.numel() > 1 else scale.reshape(()))
    return rotate(values, group) if group else values


def unswizzle_rows(stored: Tensor, rows: slice, columns: int) -> Tensor:
    """`unswizzle` of some rows only: [rows, columns]."""
    first, last, _ = rows.indices(stored.shape[0])
    start, stop = first // 128 * 128, round_up(last, 128)
    return unswizzle(stored[start:stop], stop - start, columns)[first - start : last - start]


BLOCKS = {"nvfp4": 16, "mxfp8": 32, "fp8_row": 0, "fp8": 0}
"""Columns per block scale of the kinds of operand that a block-scaled or fp8 GEMM takes; 0: it has none."""


def nvfp4_codes(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 codes (uint8) of x [M, K] and E4M3 block scales [M, K/16] under the tensor scale []; K a multiple of 16.

    Beyond 2688 * scale values saturate; a block whose scale rounds to 0 gets codes 0, as does all under a scale of 0.
    """
    blocks = x.float().unflatten(-1, (x.shape[1] // 16, 16))
    divisor = torch.where(scale == 0, torch.inf, scale)
    block_scale = (blocks.abs().amax(-1) / E2M1_MAX / divisor).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    step = (scale * block_scale.float()).unsqueeze(-1)
    scaled = torch.where(step == 0, 0.0, blocks / torch.where(step == 0, 1.0, step))
    return e2m1_encode(scaled.flatten(-2)), block_scale


def mxfp8_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes of x [M, K] and the smallest E8M0 exponents (uint8 [M, K/32]) that saturate none; K%32 = 0."""
    blocks = x.float().unflatten(-1, (x.shape[1] // 32, 32))
    amax = blocks.abs().amax(-1)
    exponent = torch.ceil(torch.log2((amax / E4M3_MAX).clamp(min=2.0**-127))).int() + E8M0_BIAS
    exponent = torch.where(amax == 0, 0, exponent.clamp(0, 254)).to(torch.uint8)
    step = e8m0_decode(exponent).unsqueeze(-1)
    scaled = torch.where(step == 0, 0.0, blocks / torch.where(step == 0, 1.0, step))
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).flatten(-2).to(torch.float8_e4m3fn), exponent


def fp8_codes(x: Tensor, scale: Tensor) -> Tensor:
    """E4M3 codes of x [M, K] under scales [M, 1] or []: saturating, and 0 where the scale is 0."""
    scaled = torch.where(scale == 0, 0.0, x.float() / torch.where(scale == 0, 1.0, scale))
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def packed_decode(kind: str, qdata: Tensor, scale: Tensor, tensor_scale: Tensor | None = None) -> Tensor:
    """fp32 [rows, columns] of an operand as a GEMM takes it, padding included.

    nvfp4: bytes, swizzled E4M3 block scales and the tensor scale []; mxfp8: codes and swizzled E8M0 exponents;
    fp8, fp8_row: codes and scales [] or [rows, 1].
    """
    rows = slice(0, qdata.shape[0])
    if kind == "nvfp4":
        return decode_rows(kind, qdata, tensor_scale, scale, rows, 2 * qdata.shape[1])
    return decode_rows(kind, qdata, scale, None, rows, qdata.shape[1])


def packed_product(kind: str, x: tuple[Tensor, ...], weight: tuple[Tensor, ...]) -> Tensor:
    """fp32 [M, N] (padded) of two operands, each as packed_decode's arguments: decoded, then one fp32 product."""
    return packed_decode(kind, *x) @ packed_decode(kind, *weight).T


def hadamard(group: int, device: torch.device) -> Tensor:
    """The matrix [group, group] that `rotate` multiplies by: symmetric, orthogonal; shared, so read only."""
    return _hadamard(group, device)


def decode_gathered(kind: str, qdata: Tensor, scale: Tensor, block_scale: Tensor | None, rows: Tensor,
                    columns: int) -> Tensor:  # fmt: skip
    """fp32 [n, columns] of the rows (int64 [n], in that order) of a packed nvfp4 or mxfp8 table; no other is read."""
    tiled = (block_scale if kind == "nvfp4" else scale).view(torch.uint8)
    tiles = tiled.view(tiled.shape[0] // 128, tiled.shape[1] // 4, 32, 4, 4)
    picked = swizzle(tiles[rows // 128, :, rows % 32, rows % 128 // 32].flatten(1))
    scales = (scale, picked.view(torch.float8_e4m3fn)) if kind == "nvfp4" else (picked, None)
    codes = qdata.view(torch.uint8)[rows].view(qdata.dtype)
    return decode_rows(kind, codes, *scales, slice(0, rows.shape[0]), columns)
