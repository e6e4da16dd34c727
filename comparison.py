"""Two checkpoints of one architecture side by side, tensor by tensor, whatever their prefixes and formats."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import EMBEDDINGS, Checkpoint
from .contents import LORA_PREFIX
from .quantization import patterns
from .quantization.metrics import CHUNK

TEXT_ENCODERS = "text_encoders."  # of a checkpoint that holds everything; ComfyUI's LoRA keys begin alike
CLIPS = {768: "clip_l", 1024: "clip_h", 1280: "clip_g"}  # by width: these the host wants by name
WIDE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
HOST_NAMES = {"model.language_model.": "model.", "model.visual.": "visual."}  # as the host renames text encoders
_ADAPTER = re.compile(r"[._]lora[._]|lora_(up|down|mid|[AB])\b|hada_|lokr_|\.(oft|boft)_|dora_scale|\.diff(_b)?$")


class Side:
    """One of two checkpoints by names that both can have: without prefix, as the host calls its modules.

    Raises ValueError if the file is a LoRA or cannot be read.
    """

    def __init__(self, path: Path):
        self.file = Checkpoint(Path(path))
        matrices = [key for key, spec in self.file.tensors.items() if len(spec.shape) >= 2]
        if matrices and all(_ADAPTER.search(key) for key in matrices):
            raise ValueError(f"{self.name}: is a LoRA, not a checkpoint; give the model's own file")
        self._layers = {layer.key: name for name, layer in self.file.layers.items()}  # key in the file -> Checkpoint's
        packed = {key for layer in self.file.layers.values() for key in layer.sources.values()}
        self._keys: dict[str, str] = {}  # name -> key in the file
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.opaque: set[str] = set()  # modules that only a host can decode
        self.outside: list[str] = []  # keys of neither diffusion model nor text encoder
        for key, spec in self.file.tensors.items():
            if key not in packed and not key.endswith((".comfy_quant", "scaled_fp8")):
                self._add(key, spec.shape)
        for key, name in self._layers.items():
            self._add(f"{key}.weight", self.file.layers[name].shape)
        self.text_encoder = not self.file.prefix and any(
            EMBEDDINGS.search(key.removesuffix(".weight")) for key in self.shapes
        )

    @property
    def name(self) -> str:
        return self.file.name

    def _add(self, key: str, shape: tuple[int, ...]) -> None:
        if not key.startswith(self.file.prefix) and not key.startswith(TEXT_ENCODERS):
            self.outside.append(key)
            return
        name = key.removeprefix(self.file.prefix)
        for found, meant in HOST_NAMES.items():
            name = meant + name.removeprefix(found) if name.startswith(found) else name
        if key.rpartition(".")[0] in self.file.opaque:
            self.opaque.add(name.rpartition(".")[0])
        else:
            self._keys[name], self.shapes[name] = key, tuple(shape)

    def quantized(self, name: str) -> bool:
        """Whether a tensor holds codes with scales, or numbers of 8 bits: an approximation by itself."""
        return self._layer(name) is not None or self.dtype(name).itemsize < 2

    def dtype(self, name: str) -> torch.dtype:
        return self.file.tensors[self._keys[name]].dtype

    def label(self, name: str) -> str:
        """How a tensor is stored, in a word."""
        layer = self._layer(name)
        return layer.format.label if layer else str(self.dtype(name)).removeprefix("torch.")

    def absorbs(self, name: str) -> bool:
        layer = self._layer(name)
        return layer is not None and layer.absorbs

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a quantized weight of that logical shape would be stored padded as this one is."""
        layer = self._layer(name)
        if layer is None or len(shape) != 2 or "orig_shape" in layer.record:
            return False
        try:
            stored = layer.format.storage(*shape)["weight"]
        except ValueError:
            return False
        return self.file.tensors[layer.sources["weight"]].shape == stored.shape

    def has_submodules(self, owner: str) -> bool:
        """Whether a module, the model itself if the path is empty, has others below it."""
        below = f"{owner}." if owner else ""
        return any(name.startswith(below) and "." in name.removeprefix(below) for name in self.shapes)

    def numbers(self, name: str) -> bool:
        """Whether a tensor is of real numbers; codes without scales and indices are not."""
        return self._layer(name) is not None or self.dtype(name).is_floating_point

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of that logical shape in fp32, decoded; a branch that is part of the layer is in it.

        Raises ValueError if it holds NaN or infinity.
        """
        layer = self._layer(name)
        if layer is None:
            tensor = self.file.read(self._keys[name]).float()
        else:
            tensor = self.file.weight(self._layers[layer.key], shape)
        if not all(torch.isfinite(part).all() for part in tensor.flatten().split(CHUNK)):
            raise ValueError(f"{self.name}: {name}: holds NaN or infinity; download the file again, or give a pattern "
                             "of layers that leaves this one out")  # fmt: skip
        return tensor

    def _layer(self, name: str):
        key = self._keys[name].removesuffix(".weight") if name.endswith(".weight") else None
        return self.file.layers[self._layers[key]] if key in self._layers else None


@dataclass
class Comparison:
    """What two checkpoints have in common, by name: `linears` are module paths, all others keys without prefix.

    Raises ValueError if they have nothing in common, or shapes that tell of two architectures.
    """

    base: Side
    tuned: Side
    pattern: str = ""  # of layers, as in a recipe; several with spaces between; empty: all
    linears: dict[str, tuple[int, int]] = field(init=False, default_factory=dict)
    vectors: dict[str, tuple[int, ...]] = field(init=False, default_factory=dict)
    others: dict[str, tuple[int, ...]] = field(init=False, default_factory=dict)  # convolutions and the like
    left_out: dict[str, str] = field(init=False, default_factory=dict)  # name -> why

    def __post_init__(self):
        wanted = [patterns.compile(pattern) for pattern in self.pattern.split()]
        chosen = [side.shapes.keys() for side in (self.base, self.tuned)]
        if wanted:
            chosen = [{name for name in names if any(w.search(f"{module(name)}.weight") for w in wanted)}
                      for names in chosen]  # fmt: skip
            if not any(chosen):
                raise ValueError(f"layers {self.pattern!r}: match none of {self.base.name}, first {self._first()}; "
                                 "write module paths, * within a name and ** for any number of names")  # fmt: skip
        names = sorted(chosen[0] & chosen[1], key=patterns.natural)
        if not any(name.endswith(".weight") for name in names):
            raise ValueError(f"{self.base.name} and {self.tuned.name}: have no layer in common, first {self._first()}; "
                             "take two checkpoints of one architecture, both in ComfyUI's names")  # fmt: skip
        self._refuse_shapes(names)
        for name in names:
            self._sort(name)
        for side, more, other in ((self.base, chosen[0] - chosen[1], self.tuned),
                                  (self.tuned, chosen[1] - chosen[0], self.base)):  # fmt: skip
            for name in sorted(more, key=patterns.natural):
                if module(name) not in other.opaque:
                    self.left_out[name] = f"only in {side.name}"
            for name in sorted(side.opaque):
                self.left_out[name] = f"{side.name} has it in a format that only a host decodes"

    @property
    def correction(self) -> bool:
        """Whether the base is a quantized file and the other its original, or like it."""
        return self._coarser(self.base, self.tuned)

    @property
    def swapped(self) -> bool:
        """Whether it is the other way round, so that the difference brings an error in."""
        return self._coarser(self.tuned, self.base) and not self.correction

    def lora_base(self, name: str) -> str:
        """What a LoRA file calls a module, or a parameter that is no module's weight."""
        if name.startswith(TEXT_ENCODERS):
            return name
        if not self.base.text_encoder:
            return LORA_PREFIX + name
        embedding = self.base.shapes.get("text_model.embeddings.token_embedding.weight")
        encoder = None if embedding is None else CLIPS.get(embedding[-1])
        return f"{TEXT_ENCODERS}{encoder + '.' if encoder else ''}transformer.{name}"

    def same(self, name: str, base: Tensor, tuned: Tensor) -> bool:
        """Whether two tensors are equal, or one is the other rounded to the dtype it is stored in."""
        if torch.equal(base, tuned):
            return True
        if self.base.quantized(name) or self.tuned.quantized(name):
            return False
        kinds = self.base.dtype(name), self.tuned.dtype(name)
        if kinds[0] == kinds[1]:
            return False
        return torch.equal(base, tuned.to(kinds[0]).float()) or torch.equal(tuned, base.to(kinds[1]).float())

    def _coarser(self, side: Side, other: Side) -> bool:
        keys = [f"{name}.weight" for name in self.linears]
        return any(side.quantized(key) and not other.quantized(key) for key in keys)

    def _sort(self, name: str) -> None:
        shape = self._shape(name)
        if not (self.base.numbers(name) and self.tuned.numbers(name)):
            kinds = {self.base.label(name), self.tuned.label(name)}
            self.left_out[name] = f"{' and '.join(sorted(kinds))}: not real numbers"
        elif name.endswith(".weight") and len(shape) == 2:
            self.linears[module(name)] = shape
        elif math.prod(shape) == max(shape, default=1):
            self.vectors[name] = shape
        else:
            self.others[name] = shape

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """The logical shape that both can have."""
        base, tuned = self.base.shapes[name], self.tuned.shapes[name]
        if base == tuned or self.tuned.holds(name, base):
            return base
        return tuned if self.base.holds(name, tuned) else None

    def _refuse_shapes(self, names: list[str]) -> None:
        wrong = [name for name in names if self._shape(name) is None]
        if wrong:
            said = [f"{n} {list(self.base.shapes[n])} and {list(self.tuned.shapes[n])}" for n in wrong[:3]]
            more = f" and {len(wrong) - 3} more" if wrong[3:] else ""
            raise ValueError(f"{self.base.name} and {self.tuned.name}: shapes differ: {', '.join(said)}{more}; these "
                             "are two architectures: take two files of one, or give a pattern of layers that they "
                             "share")  # fmt: skip

    def _first(self) -> str:
        weights = [[n for n in side.shapes if n.endswith(".weight")] for side in (self.base, self.tuned)]
        return " and ".join(min(names, default="no weight at all", key=patterns.natural) for names in weights)


def module(name: str) -> str:
    """The module path of a weight or bias; another parameter is its own."""
    stem, _, suffix = name.rpartition(".")
    return stem if suffix in ("weight", "bias") else name
