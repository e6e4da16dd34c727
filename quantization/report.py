"""What a quantization did, layer by layer: for the node, the command line and the file's own metadata."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field

MANY = 8  # different remarks about layers that a report lists; the rest is in its rows


@dataclass
class LayerReport:
    """One quantized layer. Errors are relative: Frobenius norms of the weight, and of the output for the calibrated
    inputs (None where there were none), each without and with its low-rank branch."""

    name: str
    format: str
    shape: tuple[int, int]
    nbytes: int  # of its entries in the model; bias and marker not counted
    error: float
    corrected_error: float | None = None
    seconds: float = 0.0
    reason: str = ""
    output_error: float | None = None
    corrected_output_error: float | None = None
    rank: int = 0
    calibrated: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, row: dict) -> LayerReport:
        """The inverse of `asdict`, also of what came through JSON."""
        return cls(**row | {"shape": tuple(row["shape"]), "notes": tuple(row["notes"])})

    def line(self) -> str:
        """The layer in a few words."""
        words = [self.name, self.format, f"weight error {_pair(self.error, self.corrected_error)}"]
        if self.output_error is not None:
            words.append(f"output error {_pair(self.output_error, self.corrected_output_error)}")
        return ", ".join([*words, f"{self.seconds:.1f} s", *self.notes])


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
    mode: str = "correction"
    calibrated: int = 0  # layers
    basis: str = "data-free: no calibration was given"  # what the numbers rest on
    file: str | None = None  # where this report lies as JSON

    def counts(self) -> dict[str, int]:
        return dict(Counter(layer.format for layer in self.layers).most_common())

    def as_dict(self) -> dict:
        return asdict(self) | {"counts": self.counts()}

    def remarks(self) -> list[str]:
        """What the pipeline had to say about layers: each remark once, with how many it is about."""
        about: dict[str, list[str]] = {}
        for layer in self.layers:
            for note in layer.notes:
                about.setdefault(note, []).append(layer.name)
        ordered = sorted(about.items(), key=lambda item: -len(item[1]))
        lines = [f"{_layers(names)}: {note}" for note, names in ordered[:MANY]]
        return lines + ([f"{len(ordered) - MANY} more remarks, see the layers"] if len(ordered) > MANY else [])

    def markdown(self) -> str:
        """Totals, warnings and one table row per layer."""
        columns, rows = self.table()
        lines = [f"- {line}" for line in self.lines()]
        lines += ["", _row(columns), _row(["-", "-"] + ["-:"] * (len(columns) - 2), "")]
        return "\n".join([*lines, *map(_row, rows)])

    def lines(self) -> list[str]:
        """Totals and warnings."""
        return [*self.summary(), *(f"note: {warning}" for warning in self.warnings)]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(names of the columns, a row of texts per layer)."""
        columns = ["layer", "format", "MB", "weight error", self._branch()]
        measured = any(layer.output_error is not None for layer in self.layers)
        columns += ["output error", self._branch()] if measured else []
        rows = []
        for layer in self.layers:
            outputs = [layer.output_error, layer.corrected_output_error] if measured else []
            errors = [_number(error) for error in (layer.error, layer.corrected_error, *outputs)]
            rows.append([layer.name, layer.format, f"{layer.nbytes / 1e6:.2f}", *errors, f"{layer.seconds:.1f}"])
        return [*columns, "s"], rows

    def summary(self) -> list[str]:
        """The totals as a few lines of plain text."""
        counts = ", ".join(f"{n} {label}" for label, n in self.counts().items()) or "none"
        ratio = self.model_bytes / self.source_bytes if self.source_bytes else 0.0
        lines = [
            f"{self.model}: {size(self.model_bytes)}, {ratio:.0%} of {size(self.source_bytes)} ({self.source})",
            f"layers: {counts}; {self.kept} tensors kept; recipe {self.recipe}; {self.seconds:.1f} s",
            self.basis,
        ]
        if self.layers:
            lines.append(f"mean weight error: {self._means('error', 'corrected_error')}")
        if any(layer.output_error is not None for layer in self.layers):
            lines.append(f"mean output error: {self._means('output_error', 'corrected_output_error')}")
        if self.lora:
            lines.append(f"correction LoRA {self.lora}: rank {self._ranks()}, {size(self.lora_bytes)}")
        elif self.mode == "absorb":
            lines.append(f"absorb: the branches, rank {self._ranks()}, are in the file; only Tessera's loader runs it")
        return [*lines, f"this report as JSON: {self.file}"] if self.file else lines

    def mean(self, field: str) -> float:
        values = [v for v in (getattr(layer, field) for layer in self.layers) if v is not None]
        return sum(values) / len(values) if values else 0.0

    def _means(self, field: str, corrected: str) -> str:
        """The mean without the branches, then that of the layers as they run with them."""
        plain = f"{self.mean(field):.4f}"
        if self.mean(corrected) == 0.0:  # no layer has a branch
            return plain
        pairs = [(getattr(layer, corrected), getattr(layer, field)) for layer in self.layers]
        known = [own if better is None else better for better, own in pairs if own is not None]
        return f"{plain}, {self._branch()} {sum(known) / len(known):.4f}"

    def _ranks(self) -> str:
        ranks = sorted({layer.rank for layer in self.layers if layer.rank})
        return " to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))) if ranks else str(self.rank)

    def _branch(self) -> str:
        return "with branch" if self.mode == "absorb" else "with correction"


def _layers(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} layers (first: {names[0]})"


def _pair(error: float, corrected: float | None) -> str:
    return f"{error:.4f}" + ("" if corrected is None else f" ({corrected:.4f} with its branch)")


def _number(error: float | None) -> str:
    return "" if error is None else f"{error:.4f}"


def _row(cells: list[str], space: str = " ") -> str:
    return f"|{space}" + f"{space}|{space}".join(cells) + f"{space}|"


def size(nbytes: int) -> str:
    """Bytes as people compare them: decimal and binary, because cards mix the two."""
    return f"{nbytes / 1e9:.2f} GB ({nbytes / 2**30:.2f} GiB)" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
