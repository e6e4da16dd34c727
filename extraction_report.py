"""What an extraction found and lost, layer by layer: for the node and the command line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from .quantization.report import size
from .words import first_of


@dataclass(frozen=True)
class ExtractedLayer:
    """One layer's difference. `loss`: the share of it (relative L2) that its rank does not hold, of the output where
    inputs are known, else of the weight. Errors are base's distance from tuned, relative: of the weight, and of the
    output for the calibrated inputs (None without), each before and with the LoRA."""

    name: str
    format: str  # of the base
    shape: tuple[int, int]
    rank: int
    loss: float
    error: float
    corrected_error: float
    output_error: float | None = None
    corrected_output_error: float | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """The layer in a few words."""
        words = [f"{self.name}, {self.format}, rank {self.rank}, loss {self.loss:.4f}",
                 f"weight error {self.error:.4f} -> {self.corrected_error:.4f}"]  # fmt: skip
        if self.output_error is not None:
            words.append(f"output error {self.output_error:.4f} -> {self.corrected_output_error:.4f}")
        return ", ".join([*words, f"{self.seconds:.1f} s", *self.notes])


@dataclass
class ExtractionReport:
    """A finished extraction."""

    lora: str
    base: str
    tuned: str
    correction: bool  # the base is quantized, the other is its original
    tolerance: float | None = None
    layers: list[ExtractedLayer] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)  # norms, biases and parameters with a plain difference
    equal: int = 0  # tensors that do not differ
    left_out: dict[str, str] = field(default_factory=dict)  # name -> why
    nbytes: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def remark(self) -> None:
        """Adds what one should know of the finished file."""
        if self.correction and self.vectors:
            self.warnings.append(
                f"{first_of(self.vectors)}: plain differences, which ComfyUI patches into the model beside the "
                "correction; tessera verify and tessera bake take pairs only: for those extract with a pattern of "
                "layers that leaves them out")  # fmt: skip
        short = [row.name for row in self.layers if self.tolerance is not None and row.loss > self.tolerance]
        if short:
            self.warnings.append(f"{first_of(short)}: more than {self.tolerance:g} is lost at the highest rank allowed")
        for note in dict.fromkeys(note for row in self.layers for note in row.notes):
            self.warnings.append(f"{first_of(row.name for row in self.layers if note in row.notes)}: {note}")

    def summary(self) -> list[str]:
        """The totals as a few lines of plain text."""
        rows = self.layers
        kind = "correction LoRA" if self.correction else "LoRA"
        lines = [f"{self.lora}: {kind}, {size(self.nbytes)}, {self.tuned} minus {self.base}; {self.seconds:.1f} s"]
        if rows:
            ranks = sorted({row.rank for row in rows})
            spread = " to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))
            lines += [f"{len(rows)} layers, rank {spread}; mean loss {_mean(r.loss for r in rows):.4f}",
                      f"mean weight error: {_change(rows, 'error')}"]  # fmt: skip
            known = [row for row in rows if row.output_error is not None]
            if known:
                lines.append(f"mean output error of {len(known)} calibrated layers: {_change(known, 'output_error')}")
        if self.vectors:
            lines.append(f"plain differences: {first_of(self.vectors)}")
        if self.equal:
            lines.append(f"{self.equal} tensors are equal and left out")
        return lines + [f"left out, {why}: {first_of(names)}" for why, names in self._reasons().items()]

    def markdown(self) -> str:
        """Totals, warnings and one table row per layer."""
        lines = [*(f"- {line}" for line in self.summary()), *(f"- note: {w}" for w in self.warnings), ""]
        measured = any(row.output_error is not None for row in self.layers)
        columns = ["layer", "format", "rank", "loss", "weight error", "with LoRA"]
        columns += ["output error", "with LoRA"] if measured else []
        lines += [_row(columns), _row(["-", "-"] + ["-:"] * (len(columns) - 2), "")]
        for row in self.layers:
            errors = [row.loss, row.error, row.corrected_error]
            errors += [row.output_error, row.corrected_output_error] if measured else []
            numbers = ["" if error is None else f"{error:.4f}" for error in errors]
            lines.append(_row([row.name, row.format, str(row.rank), *numbers]))
        return "\n".join(lines)

    def as_dict(self) -> dict:
        return asdict(self)

    def _reasons(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            found.setdefault(why, []).append(name)
        return found


def _change(rows: list[ExtractedLayer], kind: str) -> str:
    means = [_mean(getattr(row, field) for row in rows) for field in (kind, f"corrected_{kind}")]
    return " -> ".join(f"{mean:.4f}" for mean in means)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _row(cells: list[str], space: str = " ") -> str:
    return f"|{space}" + f"{space}|{space}".join(cells) + f"{space}|"
