"""Multiplying by a quantized weight on a CPU: integer codes where that is exact, else fp32; never what is emulated.

Two traps decide. oneDNN's u8 x s8 product without VNNI adds neighbouring pairs in 16 bits and saturates silently
(20 % error measured); it is exact there for |code| <= 64, because 255 * 64 * 2 < 2^15. And a bf16 GEMM without bf16
instructions takes 7 times as long as fp32. Figures below: AMD EPYC (AVX2), 2 threads, torch 2.13, 3840x3840.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference as ref

ONEDNN, WIDENED = "onednn", "widened"
CODE_MAX = 127  # what an INT8 file holds
SATURATING_CODE_MAX = 64  # what may be multiplied exactly in 16-bit pairs
ZERO_POINT = 128

# Below, packing the weight costs more than integers save. onednn | widened on one thread, 3840x3840: 15 | 13 ms at 16
# rows, 28 | 38 at 77; 3840x10240: 81 | 56 ms at 32, 101 | 109 at 77, 349 | 579 at 512.
ONEDNN_MIN_ROWS = 64
ROWS = 512  # of x rotated, quantized and multiplied at once; 128 saves 1 % in cache, and costs 4 times the barriers
WIDENED_ROWS = 2048
WEIGHT_ROWS = 512  # of a weight widened or decoded at once; all at once costs 24 ms of page faults instead of 1


@dataclass(frozen=True)
class CPUFacts:
    """What decides a path. Tests make their own; `facts` reads this process's CPU."""

    capability: str  # torch's name of the vector instructions it uses: AVX2, AVX512, DEFAULT, ...
    vnni: bool
    bf16: bool  # bf16 multiplication in hardware
    onednn: bool  # torch has oneDNN's int8 GEMM, vectorized
    saturates: bool  # ... and it is wrong beyond SATURATING_CODE_MAX

    @property
    def code_max(self) -> int:
        """The largest code to give a weight that is made for this CPU."""
        return SATURATING_CODE_MAX if self.saturates else CODE_MAX

    def __str__(self) -> str:
        traits = {"VNNI": self.vnni, "bf16": self.bf16, "oneDNN int8": self.onednn, "saturating": self.saturates}
        return ", ".join([f"CPU {self.capability}", *(name for name, present in traits.items() if present)])


@functools.cache
def facts() -> CPUFacts:
    """The facts of this process's CPU, found at first use."""
    capability = torch.backends.cpu.get_cpu_capability()
    onednn = (
        platform.machine().lower() in ("x86_64", "amd64")
        and capability != "DEFAULT"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.onednn, "qlinear_pointwise")
        and hasattr(torch.ops.onednn, "qlinear_prepack")
    )
    return CPUFacts(
        capability,
        vnni=_has("_is_vnni_supported"),
        bf16=_has("_is_avx512_bf16_supported") or _has("_is_amx_tile_supported"),
        onednn=onednn,
        saturates=onednn and int8_saturates(),
    )


def _has(name: str) -> bool:
    return hasattr(torch.cpu, name) and getattr(torch.cpu, name)()  # private, so absent in some torch versions


@functools.cache
def int8_saturates() -> bool:
    """Whether oneDNN's int8 product of the largest codes differs from the integer one here."""
    codes = torch.full((64, 64), 255, dtype=torch.uint8)
    weight = torch.full((64, 64), CODE_MAX, dtype=torch.int8)
    return bool((_qlinear(codes, _prepack(weight), torch.ones(64)) != 64 * (255 - ZERO_POINT) * CODE_MAX).any())


def choose(m: int, n: int, k: int, facts: CPUFacts, code_max: int = CODE_MAX) -> tuple[str, str]:
    """(path, reason) of x [m, k] times an INT8 weight [n, k] whose codes are at most `code_max`."""
    if not facts.onednn:
        return WIDENED, f"torch has no int8 GEMM for this CPU ({facts.capability})"
    if facts.saturates and code_max > SATURATING_CODE_MAX:
        return WIDENED, f"{facts.capability} without VNNI multiplies codes above {SATURATING_CODE_MAX} wrongly"
    if m < ONEDNN_MIN_ROWS:
        return WIDENED, f"{m} rows do not repay packing the weight"
    return ONEDNN, f"oneDNN int8 on {facts.capability}"


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    group: int,
    bias: Tensor | None = None,
    t: Tensor | None = None,
    up: Tensor | None = None,
    code_max: int = CODE_MAX,
) -> Tensor:
    """x [M, K] times an INT8 weight [N, K] rotated in groups (0: not), + bias + t @ up^T: [M, N] in x's dtype.

    weight_scale [N, 1] or []; t [M, r] and up [N, r] are the low-rank branch. `code_max` is known where the weight was
    made: no call looks for it.
    """
    path, _ = choose(x.shape[0], *weight.shape, facts(), code_max)
    linear = onednn_linear if path == ONEDNN else widened_linear
    return linear(x, weight, weight_scale, group, bias, t, up)


def onednn_linear(x, weight, weight_scale, group, bias=None, t=None, up=None) -> Tensor:
    """`int8_linear` with x quantized per row and integers multiplied. Wrong where `choose` does not name it."""
    m, n = x.shape[0], weight.shape[0]
    out = x.new_empty(m, n)
    packed = _prepack(weight)
    column_scale = weight_scale.float().reshape(-1).expand(n).contiguous()
    for rows in _slices(m, ROWS):
        codes, row_scale = _quantize(x[rows], group)
        acc = _qlinear(codes, packed, column_scale)
        _finish(out[rows], acc, row_scale, bias, None if t is None else t[rows], up)
    return out


def widened_linear(x, weight, weight_scale, group, bias=None, t=None, up=None) -> Tensor:
    """`int8_linear` with the codes widened to fp32, a few rows at a time: neither x nor the weight is rounded."""
    m, n = x.shape[0], weight.shape[0]
    out = x.new_empty(m, n)
    column_scale = weight_scale.float().reshape(1, -1).expand(1, n)
    for rows in _slices(m, WIDENED_ROWS):
        rotated = rotate(x[rows].float(), group)
        branch = None if t is None else t[rows]
        _multiply(out[rows], rotated, lambda part: weight[part].float(), column_scale, bias, branch, up)
    return out


def decoded_linear(
    x: Tensor,
    decode_rows: Callable[[slice], Tensor],
    n: int,
    bias: Tensor | None = None,
    t: Tensor | None = None,
    up: Tensor | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """x [M, K] times the weight [n, K] that `decode_rows` gives in fp32 by rows, + bias + t @ up^T: [M, n] as x.

    Each weight row is decoded once. `compute` is the dtype multiplied in, by default what this CPU has in hardware.
    """
    out = x.new_empty(x.shape[0], n)
    compute = compute or compute_dtype(x.dtype, facts())
    _multiply(out, x.to(compute), lambda rows: decode_rows(rows).to(compute), None, bias, t, up)
    return out


def decode_rows(kind: str, qdata: Tensor, scale: Tensor, block_scale: Tensor | None, rows: slice, columns: int,
                group: int = 0) -> Tensor:  # fmt: skip
    """`reference.decode_rows`, bit for bit, every byte looked up: fp8 -> fp32 and nibbles alike 4 times as fast."""
    if kind == "int8":
        return ref.decode_rows(kind, qdata, scale, block_scale, rows, columns, group)
    values = _look_up(qdata[rows])
    if kind == "nvfp4":
        stored = ref.unswizzle_rows(block_scale.view(torch.uint8), rows, -(-columns // 16))
        step = scale.float() * stored.view(torch.float8_e4m3fn).float()
    elif kind == "mxfp8":
        step = ref.e8m0_decode(ref.unswizzle_rows(scale.view(torch.uint8), rows, -(-columns // 32)))
    else:
        return values.mul_(scale[rows] if scale.ndim and scale.numel() > 1 else scale.reshape(()))
    block = 16 if kind == "nvfp4" else 32
    values = values[:, : step.shape[1] * block].unflatten(1, (-1, block)).mul_(step.unsqueeze(-1))
    return values.flatten(1)[:, :columns]


def _look_up(codes: Tensor) -> Tensor:
    """fp32 values of fp8 codes, or of both nibbles of bytes: [rows, c] -> [rows, c] or [rows, 2 c]."""
    table = _table(codes.dtype)
    found = table.index_select(0, codes.contiguous().view(torch.uint8).flatten().int())
    return found.view(torch.float32).view(codes.shape[0], codes.shape[1] * table.itemsize // 4)


@functools.cache
def _table(dtype: torch.dtype) -> Tensor:
    every = torch.arange(256).to(torch.uint8)
    if dtype != torch.uint8:
        return every.view(dtype).float()
    pairs = ref.e2m1_decode(ref.unpack_nibbles(every.view(-1, 1)))
    return pairs.view(torch.float64).flatten()  # two fp32 carried as one number


def branch_middle(x: Tensor, down: Tensor, strength: Tensor) -> Tensor:
    """t [M, r] = strength ([r] or []) * (x [M, K] down [r, K]^T) in fp32: 5 ms per 1024 rows, emulated bf16 24."""
    down = (down.float() * strength.float().reshape(-1, 1)).T
    t = torch.empty(x.shape[0], down.shape[1])
    for rows in _slices(x.shape[0], ROWS):
        torch.mm(x[rows].float(), down, out=t[rows])
    return t


def compute_dtype(dtype: torch.dtype, facts: CPUFacts) -> torch.dtype:
    """The dtype to multiply decoded weights in: fp32, except bf16 inputs where bf16 is not emulated."""
    return torch.bfloat16 if dtype == torch.bfloat16 and facts.bf16 else torch.float32


def rotate(x: Tensor, group: int) -> Tensor:
    """`reference.rotate` of fp32 x [M, K], large groups in two steps (256: 14 -> 6.5 ms per 1024 rows); group 0 is x.

    H_256 = H_16 (x) H_16: one factor mixes a group's 16 columns, the other its rows.
    """
    if group <= 64:
        return ref.rotate(x, group) if group else x
    inner = ref.rotate(x, 16).view(x.shape[0], -1, group // 16, 16)
    return torch.matmul(ref.hadamard(group // 16, x.device), inner).view(x.shape)


def _quantize(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes (uint8, zero point 128) of the rotated rows of x [M, K], and their scales [M, 1]."""
    rotated = rotate(x.float(), group)
    amax = torch.maximum(rotated.amax(1, keepdim=True), rotated.amin(1, keepdim=True).neg_())
    scale = (amax / CODE_MAX).clamp_(min=1e-30)
    signed = torch.div(rotated, scale).round_().to(torch.int8)  # fp32 -> int8 is 4 times as fast as -> uint8
    return signed.view(torch.uint8).bitwise_xor_(ZERO_POINT), scale  # the same as adding 128


def _multiply(out, x, weight_rows, column_scale, bias, t, up) -> None:
    """out [M, N] = x @ weight^T * column_scale + bias + t @ up^T, for a weight given by rows in x's dtype."""
    for part in _slices(out.shape[1], WEIGHT_ROWS):
        acc = (x @ weight_rows(part).T).float()
        scale = None if column_scale is None else column_scale[:, part]
        _finish(out[:, part], acc, scale, None if bias is None else bias[part], t, None if up is None else up[part])


def _finish(out: Tensor, acc: Tensor, scale, bias, t, up) -> None:
    """out = acc * scale + t @ up^T + bias in fp32, rounded once; acc [M, N] is overwritten."""
    if scale is not None:
        acc.mul_(scale)
    if t is not None:
        acc.addmm_(t.float(), up.float().T)
    if bias is not None:
        acc.add_(bias)
    out.copy_(acc)


def _prepack(weight: Tensor) -> Tensor:
    """oneDNN's own layout of an int8 weight [N, K]; not of its transpose, which is misread unless square."""
    return torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)


def _qlinear(codes: Tensor, packed: Tensor, column_scale: Tensor) -> Tensor:
    """(codes - 128) @ weight^T * column_scale in fp32, for codes uint8 [M, K] and a prepacked weight."""
    zero_points = torch.zeros(column_scale.shape[0], dtype=torch.int64)
    args = (packed, column_scale, zero_points, None, 1.0, 0, torch.float32, "none", [], "")
    return torch.ops.onednn.qlinear_pointwise(codes, 1.0, ZERO_POINT, *args)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]
