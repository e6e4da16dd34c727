"""Parts: the tensors that a LoRA file holds of one layer, in every spelling ComfyUI 0.30-0.33 loads, as one Change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import Adapter, Change
from .kinds import Difference, DoRA, GLoRA, LoHa, LoKr, LoRA, Replacement
from .rotations import BOFT, OFT

_FACTOR = re.compile(  # kohya, PEFT; diffusers, transformers
    r"[._](?:lora_(?P<one>up|down|mid|A|B)(?:\.default)?|lora(?:_linear_layer)?\.(?P<other>up|down))(?:\.weight)?$"
)
FACTORS = {"up": "lora_up", "B": "lora_up", "down": "lora_down", "A": "lora_down", "mid": "lora_mid"}
HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
GLORA = ("a1", "a2", "b1", "b2")
PARTS = {
    **{f".{name}": name for name in ("alpha", "dora_scale", *HADA, "hada_t1", "hada_t2", *LOKR, "oft_blocks", "rescale",
                                     "diff", "diff_b", "set_weight", "reshape_weight", "w_norm", "b_norm")},
    **{f".{name}.weight": name for name in GLORA},
}  # fmt: skip
KINDS = {  # what needs which parts, in ComfyUI's order: the last one that a layer has is what it loads
    "LoRA": ("lora_up", "lora_down"), "LoHa": HADA, "LoKr": (), "GLoRA": GLORA, "OFT": ("oft_blocks",),
    "norm difference": ("w_norm",), "difference": ("diff",), "replacement": ("set_weight",),
}  # fmt: skip
_SCALED = ("alpha", "dora_scale")
MAY_HAVE = {
    "LoRA": ("lora_mid", "reshape_weight", *_SCALED), "LoHa": ("hada_t1", "hada_t2", *_SCALED),
    "LoKr": (*LOKR, *_SCALED), "GLoRA": _SCALED, "OFT": _SCALED, "BOFT": ("rescale", *_SCALED),
}  # fmt: skip
ALONE = {  # what a layer may have without being damaged, though nothing comes of it: why
    "alpha": "alpha without an adapter", "rescale": "ComfyUI applies no rescale to OFT",
    "reshape_weight": "only a LoRA can reshape its weight", "b_norm": "b_norm without w_norm",
}  # fmt: skip
HOST_PAIRS = (  # up and down, as ComfyUI looks for them
    (".lora_up.weight", ".lora_down.weight"), ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"), (".lora.up.weight", ".lora.down.weight"), (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
)  # fmt: skip
INCOMPLETE = "the file is incomplete, download it again"


def split(key: str) -> tuple[str, str, str] | None:
    """(base, part, suffix that ComfyUI knows the part by) of a file's key; None if it is no adapter's."""
    match = _FACTOR.search(key)
    if match:
        return key[: match.start()], FACTORS[match["one"] or match["other"]], key[match.start() :]
    for suffix, part in PARTS.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), part, suffix
    return None


@dataclass
class Found:
    """One layer's tensors by part, and the suffixes they were stored under."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    suffixes: dict[str, str] = field(default_factory=dict)

    def raw(self, base: str, unused: Iterable[str]) -> dict[str, Tensor]:
        """The tensors under names that ComfyUI loads for this base: their own, unless it would not know them."""
        suffixes = self.suffixes | ({} if self._host_knows_pair() else self._canonical())
        return {base + suffixes[part]: tensor for part, tensor in self.parts.items() if part not in unused}

    def _canonical(self) -> dict[str, str]:
        return {part: f".{part}.weight" for part in ("lora_up", "lora_down", "lora_mid") if part in self.parts}

    def _host_knows_pair(self) -> bool:
        found = tuple(self.suffixes.get(part) for part in ("lora_up", "lora_down"))
        return found in HOST_PAIRS and ("lora_mid" not in self.parts or found == HOST_PAIRS[0])


def change(parts: Mapping[str, Tensor]) -> tuple[Change | None, dict[str, str]]:
    """(what a layer's parts do to it, why the others do nothing by part); None if nothing is left of them.

    Raises ValueError, with what to do, for parts that are no adapter or half of one.
    """
    kinds = [kind for kind in KINDS if _has(kind, parts)]
    kind = kinds[-1] if kinds else None
    if kind == "OFT" and parts["oft_blocks"].ndim == 4:
        kind = "BOFT"
    used = {*KINDS.get(kind, KINDS["OFT"] if kind else ()), *MAY_HAVE.get(kind, ()), "diff_b"}
    if kind == "norm difference" and "diff_b" not in parts:
        used.add("b_norm")
    unused = {part: _why_unused(part, kind) for part in parts if part not in used}
    if kind is None and "dora_scale" in parts:
        raise ValueError(f"dora_scale stands without an adapter; {INCOMPLETE}")
    adapter = None if kind is None else _adapter(kind, parts)
    bias = parts.get("diff_b", parts.get("b_norm") if kind == "norm difference" else None)
    if bias is not None and bias.ndim != 1:
        raise ValueError(f"the bias difference is {list(bias.shape)}, it must be [out]; the file is damaged")
    if adapter is None and bias is None:
        return None, unused
    reshape = _reshape(parts["reshape_weight"]) if kind == "LoRA" and "reshape_weight" in parts else None
    return Change(adapter, bias, reshape), unused


def _has(kind: str, parts: Mapping[str, Tensor]) -> bool:
    """Whether a layer has this kind; raises ValueError if it has only a part of it."""
    wanted = KINDS[kind]
    if kind == "LoKr":
        return any(part in parts for part in LOKR)
    core = {"LoRA": ("lora_mid",), "LoHa": ("hada_t1", "hada_t2")}.get(kind, ())
    if not any(part in parts for part in (*wanted, *core)):
        return False
    missing = [part for part in wanted if part not in parts]
    if missing:
        raise ValueError(f"{missing[0]} is missing; {INCOMPLETE}")
    return True


def _adapter(kind: str, parts: Mapping[str, Tensor]) -> Adapter:
    alpha = _alpha(parts["alpha"]) if "alpha" in parts else None
    made = _made(kind, parts, alpha)
    if "dora_scale" in parts and "dora_scale" in MAY_HAVE.get(kind, ()):
        return DoRA(made, parts["dora_scale"])
    return made


def _made(kind: str, parts: Mapping[str, Tensor], alpha: float | None) -> Adapter:
    if kind == "LoRA":
        return LoRA.of(parts["lora_up"], parts["lora_down"], alpha, parts.get("lora_mid"))
    if kind == "LoHa":
        return LoHa.of(*(parts[part] for part in HADA), alpha, parts.get("hada_t1"), parts.get("hada_t2"))
    if kind == "LoKr":
        twice = next(
            (w for w in ("lokr_w1", "lokr_w2") if w in parts and (f"{w}_a" in parts or f"{w}_b" in parts)), None
        )
        if twice:
            raise ValueError(f"{twice} is there whole and in factors; keep one of them")
        return LoKr.of(**{part.removeprefix("lokr_"): parts[part] for part in LOKR if part in parts}, alpha=alpha)
    if kind == "GLoRA":
        return GLoRA.of(*(parts[part] for part in GLORA), alpha)
    if kind == "OFT":
        return OFT(parts["oft_blocks"], alpha)
    if kind == "BOFT":
        return BOFT(parts["oft_blocks"], parts.get("rescale"), alpha)
    if kind == "replacement":
        return Replacement(parts["set_weight"])
    return Difference(parts[KINDS[kind][0]])


def _why_unused(part: str, kind: str | None) -> str:
    if kind is None or (part, kind) == ("rescale", "OFT") or (part == "b_norm" and kind != "norm difference"):
        return ALONE.get(part, f"{part} without an adapter")
    return f"ComfyUI loads the layer's {kind} and not its {part}"


def _alpha(tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"alpha is {list(tensor.shape)}, not one number; repair the file")
    return float(tensor.item())


def _reshape(tensor: Tensor) -> tuple[int, ...]:
    sizes = tensor.tolist() if tensor.ndim == 1 and not tensor.is_floating_point() else []
    if len(sizes) < 2 or any(size < 1 for size in sizes):
        raise ValueError(f"reshape_weight {tensor.tolist()} is no shape; the file is damaged")
    return tuple(sizes)


def finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite, in one pass without a copy."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))
