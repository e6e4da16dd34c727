"""What a quantization did, layer by layer: for the node, the command line and the file's own metadata."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field


@dataclass
class LayerReport:
    """One quantized layer. Errors are relative Frobenius norms of the weight, without and with the correction."""

    name: str
    format: str
    shape: tuple[int, int]
    nbytes: int
    error: float
    corrected_error: float | None = None
    seconds: float = 0.0
    reason: str = ""


@dataclass
class Report:
    """A finished job."""

    model: str
    lora: str | None
    source: str
    recipe: str
    rank: int
    seed: int
    layers: list[LayerReport] = field(default_factory=list)
    kept: int = 0
    source_bytes: int = 0
    model_bytes: int = 0
    lora_bytes: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        return dict(Counter(layer.format for layer in self.layers).most_common())

    def as_dict(self) -> dict:
        return asdict(self) | {"counts": self.counts()}

    def markdown(self) -> str:
        """Totals, warnings and one table row per layer."""
        lines = [*(f"- {line}" for line in self.summary()), *(f"- note: {w}" for w in self.warnings), ""]
        lines += ["| layer | format | MB | weight error | with correction | s |", "|-|-|-:|-:|-:|-:|"]
        for layer in self.layers:
            corrected = "" if layer.corrected_error is None else f"{layer.corrected_error:.4f}"
            lines.append(
                f"| {layer.name} | {layer.format} | {layer.nbytes / 1e6:.2f} "
                f"| {layer.error:.4f} | {corrected} | {layer.seconds:.1f} |"
            )
        return "\n".join(lines)

    def summary(self) -> list[str]:
        """The totals as a few lines of plain text."""
        counts = ", ".join(f"{n} {label}" for label, n in self.counts().items()) or "none"
        ratio = self.model_bytes / self.source_bytes if self.source_bytes else 0.0
        lines = [
            f"{self.model}: {size(self.model_bytes)}, {ratio:.0%} of {size(self.source_bytes)} ({self.source})",
            f"layers: {counts}; {self.kept} tensors kept; recipe {self.recipe}; {self.seconds:.1f} s",
        ]
        if self.layers:
            lines.append(f"mean weight error: {self.mean('error'):.4f}" + self._corrected())
        if self.lora:
            lines.append(f"correction LoRA {self.lora}: rank {self.rank}, {size(self.lora_bytes)}")
        return lines

    def mean(self, field: str) -> float:
        values = [v for v in (getattr(layer, field) for layer in self.layers) if v is not None]
        return sum(values) / len(values) if values else 0.0

    def _corrected(self) -> str:
        return f", with correction {self.mean('corrected_error'):.4f}" if self.lora else ""


def size(nbytes: int) -> str:
    """Bytes as people compare them: decimal and binary, because cards mix the two."""
    return f"{nbytes / 1e9:.2f} GB ({nbytes / 2**30:.2f} GiB)" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
