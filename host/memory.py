"""Models that are loaded already, as sources to quantize."""

from __future__ import annotations

from pathlib import Path

import comfy.lora
import comfy.quant_ops
import comfy.utils
import torch

from ..formats import TensorSpec
from .attaching import TRUNK


class ModelSource:
    """A loaded MODEL or CLIP as a quantization source: weights as they are, its LoRA patches merged in fp32.

    Raises ValueError if it is quantized already: the original file is the better source.
    """

    metadata: dict = {}  # noqa: RUF012 never written
    prefix = ""
    path = None

    def __init__(self, patcher, below: str, name: str):
        self.name, self._patcher, self._below = name, patcher, below
        self.tensors = {}
        for full, value in [*patcher.model.named_parameters(), *patcher.model.named_buffers()]:
            if not full.startswith(below):
                continue
            if isinstance(value.data, comfy.quant_ops.QuantizedTensor) or value.dtype.itemsize < 2:
                raise ValueError(f"{name}: {full.removeprefix(below)}: is already quantized ({value.dtype}); "
                                 "quantize from the original file")  # fmt: skip
            self.tensors[full.removeprefix(below)] = TensorSpec(_stored_dtype(value), tuple(value.shape))
        self.nbytes = sum(spec.nbytes for spec in self.tensors.values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: spec.shape for key, spec in self.tensors.items()}

    def quantized(self, name: str) -> bool:
        return False

    def records(self) -> dict[str, dict]:
        return {}

    def weight(self, name: str) -> torch.Tensor:
        return self._patched(f"{name}.weight").float()

    def read(self, key: str) -> torch.Tensor:
        return self._patched(key).to(self.tensors[key].dtype)

    def _patched(self, key: str) -> torch.Tensor:
        """Looked up anew each time: the host may load, merge or unload the model meanwhile."""
        full = self._below + key
        backup = self._patcher.backup.get(full)  # a merged weight's original
        value = backup.weight if backup is not None else comfy.utils.get_attr(self._patcher.model, full)
        patches = self._patcher.patches.get(full)
        if not patches:
            return value.detach().cpu()
        mine = value.detach().to("cpu", torch.float32, copy=True)  # the host adds into what it is given
        return comfy.lora.calculate_weight(patches, mine, full)


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
