"""BF16, FP16 and FP32: weights that stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Plain


@dataclass(frozen=True)
class BF16(Plain):
    name: ClassVar[str] = "bf16"
    dtype: ClassVar[torch.dtype] = torch.bfloat16


@dataclass(frozen=True)
class FP16(Plain):
    name: ClassVar[str] = "fp16"
    dtype: ClassVar[torch.dtype] = torch.float16


@dataclass(frozen=True)
class FP32(Plain):
    name: ClassVar[str] = "fp32"
    dtype: ClassVar[torch.dtype] = torch.float32
