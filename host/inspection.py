"""How the quantized layers of a loaded model run: as planned, and as counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import comfy.quant_ops

from ..kernels.dispatch import Plan
from ..words import first_of
from . import guard, stacking
from .attaching import quantized_layers
from .carrying import Carrying
from .loading import PLANS, plan_lines, plans
from .planned import EXACT, Planned

NOTHING = "nothing has run yet: connect what the sampler makes to `after`"


@dataclass(frozen=True)
class Row:
    """One quantized layer."""

    layer: str
    format: str  # of the file
    kept: str  # the format it is kept in
    path: str
    kernel: str
    reason: str
    shape: tuple[int, int]
    nbytes: int
    runs: dict[str, int]  # forward calls by the kernel that ran
    distance: float | None  # relative, that transcoding moved the weight
    added: float | None  # to the layer's weight error, by transcoding
    ranks: list[int]  # of attached branches
    adapters: tuple[str, ...] = ()  # kinds of LoRA beside it
    strengths: tuple[float, ...] = ()  # of those


@dataclass(frozen=True)
class Inspection:
    """The quantized layers of a model; without rows it is from another loader, or not quantized."""

    summary: list[str]
    rows: list[Row]
    hint: str = ""  # of the summary, what calls for the user

    def kernels(self) -> dict[str, tuple[int, int]]:
        """Kernel that ran -> (layers, calls)."""
        layers, calls = Counter(), Counter()
        for row in self.rows:
            for kernel, count in row.runs.items():
                layers[kernel] += 1
                calls[kernel] += count
        return {kernel: (layers[kernel], calls[kernel]) for kernel, _ in calls.most_common()}

    def text(self) -> str:
        lines = list(self.summary)
        lines += [
            f"ran {kernel}: {calls} calls in {layers} layers" for kernel, (layers, calls) in self.kernels().items()
        ]
        silent, other = self._silent(), self._other()
        if silent and len(silent) < len(self.rows):
            lines.append(f"did not run: {len(silent)} layers ({first_of(silent)})")
        elif silent:
            lines.append(NOTHING)
        if other:
            ran = ", ".join(other[0].runs)
            lines.append(f"not as planned: {len(other)} layers ({other[0].layer}: {ran}), as a LoRA of ComfyUI's own "
                         "nodes, or too little memory, makes it")  # fmt: skip
        branched = [row for row in self.rows if row.ranks]
        if branched:
            ranks = sorted({rank for row in branched for rank in row.ranks})
            lines.append(f"{len(branched)} layers with low-rank branches, rank {', '.join(map(str, ranks))}")
        return "\n".join(lines) or "no quantized layers"

    def brief(self) -> str:
        """What the node says below its layer map, at most two lines: the kernels that ran, and what is not right."""
        if not self.rows:
            return self.hint.partition(" (")[0] or "no quantized layers"
        ran = ", ".join(f"{kernel} in {layers} layers" for kernel, (layers, _) in self.kernels().items())
        silent, other = self._silent(), self._other()
        warnings = [f"did not run: {len(silent)} layers ({first_of(silent, 1)})"] if silent and ran else []
        warnings += [f"not as planned: {len(other)} layers ({other[0].layer})"] if other else []
        warnings += [self.hint.partition(" (")[0]] if self.hint else []
        return "\n".join([f"ran {ran}" if ran else NOTHING, *filter(None, ["; ".join(warnings)])])

    def _silent(self) -> list[str]:
        return [row.layer for row in self.rows if not row.runs]

    def _other(self) -> list[Row]:
        """Rows that a kernel ran which was not planned for them."""
        return [row for row in self.rows if any(kernel not in (row.kernel, EXACT) for kernel in row.runs)]

    def markdown(self) -> str:
        """All layers as a table."""
        rows = [f"| {r.layer} | {r.format} | {r.kept} | {r.path} | {_runs(r)} | {_percent(r.distance)} | "
                f"{_percent(r.added)} | {', '.join(map(str, r.ranks))} | {r.nbytes / 1e6:.2f} |"
                for r in self.rows]  # fmt: skip
        head = ["| layer | file | kept as | path | ran | moved | added error | branches | MB |", "|---" * 9 + "|"]
        return "\n".join([self.text(), "", *head, *rows])

    def as_dict(self) -> dict:
        return {"summary": self.text(), "layers": [asdict(row) for row in self.rows]}


def inspect(patcher) -> Inspection:
    """A MODEL or the patcher of a CLIP."""
    found, loading = plans(patcher), patcher.get_attachment(PLANS)
    if not found:
        others = len(quantized_layers(patcher))
        foreign = f"{others} quantized layers from another loader: ComfyUI runs them, Tessera has not planned them"
        merged = guard.merged_hint(patcher)
        hints = [*([foreign] if others else []), *([merged] if merged else [])]
        return Inspection(hints, [], hints[-1] if hints else "")
    layers = _by_name(patcher, found)
    rows = [_row(name, label, plan, layers[name], loading.costs.get(name, (None, None)))
            for name, (label, plan) in found.items() if name in layers]  # fmt: skip
    stack = [f"beside the weights: {entry.name}, strength {strength:g}{'' if schedule is None else f', {schedule}'}"
             for entry, strength, schedule in stacking.entries(patcher) if not entry.absorbed]  # fmt: skip
    merged = guard.merged_hint(patcher)
    return Inspection([*plan_lines(patcher), *stack, *([merged] if merged else [])], rows, merged or "")


def _by_name(patcher, names: Mapping[str, object]) -> dict[str, Planned]:
    """The modules by the names they were loaded under: the ends of their paths."""
    found: dict[str, Planned] = {}
    for path, module in patcher.model.named_modules():
        if isinstance(module, Planned):
            parts = path.split(".")
            name = next((end for i in range(len(parts)) if (end := ".".join(parts[i:])) in names), None)
            if name is not None:
                found.setdefault(name, module)
    return found


def _row(name: str, label: str, plan: Plan, layer: Carrying, cost) -> Row:
    return Row(name, label, layer.tessera_format.label, plan.path, plan.kernel, plan.reason, tuple(layer._orig_shape),
               bytes_of(layer.weight), dict(layer.tessera_runs), *cost, *_branch(layer))  # fmt: skip


def bytes_of(weight) -> int:
    """What a weight takes, its scales counted."""
    quantized = isinstance(weight, comfy.quant_ops.QuantizedTensor)
    return sum(t.nbytes for t in weight.state_dict().values()) if quantized else weight.nbytes


def _branch(layer: Carrying) -> tuple[list[int], tuple[str, ...], tuple[float, ...]]:
    """(ranks, kinds, strengths) of what rides beside a layer."""
    if layer.tessera_branch_pair is None:
        return [], (), ()
    item, strengths = layer.tessera_branch_pair
    return [rank for _, rank in item.runs], item.kinds, tuple(strengths.values[entry] for entry in item.entries)


def _runs(row: Row) -> str:
    return ", ".join(f"{kernel} {count}" for kernel, count in row.runs.items())


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
