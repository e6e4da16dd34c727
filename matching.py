"""Which tensor of a checkpoint a LoRA's base name means, where no host is there to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

PREFIXES = ("model.", "diffusion_model.", "transformer.", "unet.", "base_model.")
UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")  # kohya, OneTrainer, SimpleTuner
RENAMED = (  # of the checkpoint, of diffusers: Z-Image and its relatives, whose blocks ComfyUI fuses
    (".out", ".to_out.0"), (".out", ".to_out"), (".q_norm", ".norm_q"), (".k_norm", ".norm_k"),
)  # fmt: skip
ENDS = (("final_layer.", "all_final_layer.2-1."), ("x_embedder", "all_x_embedder.2-1"))
SLICES = ("to_q", "to_k", "to_v")  # of a fused qkv, in this order


@dataclass(frozen=True)
class Place:
    """What a base name changes: the module of that path, or `rows` (start, length) of its weight; or a tensor that is
    no module's weight, by its key."""

    name: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Names:
    """The places of a checkpoint's tensors, by every spelling known without the host. `shapes` as from a Source."""

    shapes: Mapping[str, tuple[int, ...]]

    def key(self, key: str) -> str:
        """The file's name of a tensor that hosts rename on loading: RMS norms have scales in it and weights there."""
        scale = f"{key.removesuffix('.weight')}.scale"
        return scale if key not in self.shapes and scale in self.shapes else key

    def find(self, base: str) -> Place | None:
        """Full names, with or without prefixes; then kohya's, with underscores for dots."""
        found, rest = self._places.get(base), base
        while found is None and (prefix := next((p for p in PREFIXES if rest.startswith(p)), None)):
            rest = rest.removeprefix(prefix)
            found = self._places.get(rest)
        if found is None and (prefix := next((p for p in UNDERSCORED if base.startswith(p)), None)):
            found = self._underscored.get(base.removeprefix(prefix))
        return found

    @cached_property
    def _places(self) -> dict[str, Place]:
        """The checkpoint's own names come first; others only where they mean nothing yet."""
        names = [key.removesuffix(".weight") for key in self.shapes if key.endswith(".weight")]
        places = {name: Place(name) for name in names}
        places |= {key: Place(key) for key in self.shapes if not key.endswith((".weight", ".bias")) and key}
        for key in self.shapes:
            if key.endswith(".scale"):
                places.setdefault(key.removesuffix(".scale"), Place(key))
        for name in names:
            for other in self._others(name):
                places.setdefault(other, Place(name))
            parent, _, last = name.rpartition(".")
            rows = self.shapes[f"{name}.weight"][0] // 3 if last == "qkv" else 0
            for number, part in enumerate(SLICES if rows else ()):
                places.setdefault(f"{parent}.{part}", Place(name, (number * rows, rows)))
        return places

    def _others(self, name: str) -> list[str]:
        """What diffusers calls a module."""
        renamed = [name.removesuffix(ours) + theirs for ours, theirs in RENAMED if name.endswith(ours)]
        return renamed + [theirs + name.removeprefix(ours) for ours, theirs in ENDS if name.startswith(ours)]

    @cached_property
    def _underscored(self) -> dict[str, Place]:
        """Without the names that two tensors would share."""
        found: dict[str, set[Place]] = {}
        for name, place in self._places.items():
            found.setdefault(name.replace(".", "_"), set()).add(place)
        return {name: places.pop() for name, places in found.items() if len(places) == 1}
