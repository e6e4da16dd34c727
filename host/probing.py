"""Single-layer perturbation: what each format of each layer does to the model's output, put to recorded calls.

The model is neither copied nor written to: while a call is replayed, forward hooks add to a layer's output what its
weight (and input) would change if they were quantized. Afterwards the model is the same to the bit.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import comfy.model_management
import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import Format
from ..kernels import dispatch
from ..progress import Step
from ..quantization import pipeline
from ..quantization.activations import rounded
from ..quantization.indicators import kind
from ..quantization.measurement import LocalError
from ..quantization.patterns import natural
from ..survey import PROXY, Menu, Survey, survey
from .attaching import TRUNK
from .memory import model_source
from .probe_calls import ProbeCall
from .recording import calibration_of
from .ui import compute_device

ACTIVATIONS = ("auto", "on", "off")
PERTURBATION = "single-layer perturbation of the model's output"


@dataclass(frozen=True)
class Budget:
    """Limits for one probing; 0: none. Where they are too small, layers are measured in their coarsest format only
    (on the tiny model that gives the same plans), then on fewer calls, then several of one kind at once."""

    calls: int = 3  # of those recorded
    forwards: int = 0
    seconds: float = 0.0

    def most(self, seconds_per_forward: float) -> float:
        limits = [float(self.forwards or "inf"), self.seconds / seconds_per_forward if self.seconds else float("inf")]
        return min(limits)


def measure(
    patcher, menu: Menu, recorded=None, budget: Budget = Budget(), activations: str = "auto",
    progress: Callable[[Step], None] = lambda step: None,
) -> Survey:  # fmt: skip
    """Scores of every layer of a MODEL in every format of the menu: by its output on the calls that `recorded` (what a
    CALIBRATION socket carries) holds; without any, by each layer's own error."""
    source = model_source(patcher)
    calibration = calibration_of(recorded) if recorded is not None else None
    calls = getattr(recorded, "probes", [])
    first, second = (_half(progress, 0.0), _half(progress, 0.5)) if calls else (progress, progress)
    found = survey(source, menu, calibration, None, compute_device(), progress=first)
    if calls:
        return probe(patcher, found, calls, budget, activations, second)
    if recorded is not None:
        found.notes.append("the calibration holds no recorded calls of the model, as only TesseraCalibrate's own "
                           "output does, so the model's output was not measured")  # fmt: skip
    return found


def _half(progress: Callable[[Step], None], before: float) -> Callable[[Step], None]:
    """Progress of one half of the work."""
    return lambda step: progress(replace(step, share=before + step.share / 2))


def probe(
    patcher, found: Survey, calls: Sequence[ProbeCall], budget: Budget = Budget(), activations: str = "auto",
    progress: Callable[[Step], None] = lambda step: None,
) -> Survey:  # fmt: skip
    """The survey with measured damages: mean over calls of the squared change of the velocity, relative to it.

    `activations`: whether a layer's input is rounded too, as native kernels do; auto: in the formats that this device
    multiplies natively. Raises ValueError if the calls are those of another model.
    """
    prober = _Prober(patcher, found, _quantized_inputs(patcher, found, activations))
    ordered = sorted(calls, key=lambda call: call.position)
    seconds = prober.replay(_spread(ordered, budget.calls or len(ordered)))
    effort = _effort(found, len(prober.references), budget.most(seconds))
    prober.references = _spread(prober.references, effort.calls)
    damages, silent = prober.run(effort.tasks, progress)
    notes = [note for note in found.notes if note != PROXY] + prober.notes(effort, seconds)
    if silent:
        notes.append(f"{len(silent)} layers did not run in the recorded calls and are kept (first: {min(silent)})")
    return replace(
        found,
        layers={name: layer for name, layer in found.layers.items() if name not in silent},
        kept=found.kept | dict.fromkeys(silent, "did not run in the recorded calls, so nothing is known of it"),
        damages={name: scores for name, scores in damages.items() if name not in silent},
        method=PERTURBATION,
        activations=frozenset(prober.inputs),
        notes=notes,
    )


def _spread(ordered: list, count: int) -> list:
    """`count` of a list, evenly spaced."""
    count = min(len(ordered), count)
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


def _quantized_inputs(patcher, survey: Survey, wish: str) -> set[str]:
    """Labels whose layers' inputs are rounded while probing."""
    if wish not in ACTIVATIONS:
        raise ValueError(f"activations {wish!r}: must be one of {', '.join(ACTIVATIONS)}")
    found = {word: e.format for layer in survey.layers.values() for word, e in layer.errors.items() if e.format.layout}
    if wish != "auto":
        return set(found) if wish == "on" else set()
    facts = dispatch.read_facts(patcher.load_device)
    plans = {word: dispatch.plan(format, facts) for word, format in found.items()}
    return {word for word, plan in plans.items() if plan.path == dispatch.NATIVE and plan.input_error}


@dataclass(frozen=True)
class _Effort:
    """What is measured: (layers perturbed together, their format) put to so many calls."""

    tasks: list[tuple[list[str], str]]
    calls: int
    width: int  # layers at most together
    coarsest: bool  # in one format only


def _effort(found: Survey, calls: int, most: float) -> _Effort:
    """The best that takes no more than `most` forwards; the least there is, if even that takes more."""
    longest = max(Counter(map(kind, found.layers)).values())
    levels = [(False, calls, 1), *((True, count, 1) for count in range(calls, 0, -1))]
    levels += [(True, 1, width) for width in range(2, longest + 1)]
    for coarsest, count, width in levels:
        tasks = _tasks(found, coarsest, width)
        if len(tasks) * count <= most:
            break
    return _Effort(tasks, count, width, coarsest)


def _tasks(found: Survey, coarsest: bool, width: int) -> list[tuple[list[str], str]]:
    """Layers of one kind in neighbouring blocks, up to `width` together, in each of their formats."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name in sorted(found.layers, key=natural):
        errors = found.layers[name].errors
        for word in [_coarsest(errors)] if coarsest and errors else errors:
            kinds.setdefault((kind(name), word), []).append(name)
    return [(names[i : i + width], word) for (_, word), names in kinds.items() for i in range(0, len(names), width)]


def _coarsest(errors: Mapping[str, LocalError]) -> str:
    return max(errors, key=lambda word: errors[word].energy)


@dataclass
class _Perturbation:
    """What a hook adds to one layer's output, and the energy of what it added."""

    delta: Tensor  # [out, in] quantized weight - weight
    weight: Tensor | None = None  # [out, in], where the input is rounded too
    format: Format | None = None
    energy: float = 0.0
    fired: bool = False

    def add(self, module, inputs, output: Tensor) -> Tensor:
        x = inputs[0]
        seen = x if self.weight is None else self._rounded(x)
        change = F.linear(seen, self._like(self.delta, x))
        if self.weight is not None:
            change += F.linear(seen - x, self._like(self.weight, x))
        self.energy += change.float().square().sum().item()
        self.fired = True
        return output + change.to(output.dtype)

    def _rounded(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        return rounded(self.format, rows).view(x.shape).to(x.dtype)

    def _like(self, weight: Tensor, x: Tensor) -> Tensor:
        return weight.to(x.device, x.dtype)


@dataclass(frozen=True)
class _Reference:
    """What the untouched model answers to a call, and the squared length of that velocity, times sigma^2."""

    call: ProbeCall
    answer: Tensor
    power: float


@dataclass
class _Prober:
    patcher: object
    survey: Survey
    inputs: set[str]  # labels whose inputs are rounded
    references: list[_Reference] = field(default_factory=list)

    def replay(self, calls: Sequence[ProbeCall]) -> float:
        """Puts the calls to the model as it is; seconds of the fastest."""
        times = []
        for call in calls:
            started = time.monotonic()
            answer = call.replay(self.patcher).clone()
            power = (call.x.to(answer.device).float() - answer.float()).square().sum().item()
            if not 0 < power < float("inf"):
                raise ValueError("the model's velocity at a recorded call is 0 or not finite; is it the one recorded?")
            self.references.append(_Reference(call, answer, power))
            times.append(time.monotonic() - started)
        return min(times)

    def run(self, tasks: list[tuple[list[str], str]], progress) -> tuple[dict[str, dict[str, float]], set[str]]:
        """(damages in every format, layers that no call reached)."""
        measured, ran = {name: {} for name in self.survey.layers}, set()
        started = time.monotonic()
        for done, (group, word) in enumerate(tasks):
            left = (time.monotonic() - started) * (len(tasks) - done) / done if done else None
            name = group[0] + (f" and {len(group) - 1} more" if group[1:] else "")
            step = done * len(self.survey.layers) // len(tasks)  # the bar counts layers, as in the survey before
            progress(Step(step, len(self.survey.layers), f"probing {name}", left, True, word, done / len(tasks)))
            with torch.inference_mode():
                changes = self._perturbations(group, word)
                whole = self._damage(changes)
            total = sum(change.energy for change in changes.values())
            for layer, change in changes.items():
                measured[layer][word] = whole * change.energy / total if total else 0.0
            ran |= {layer for layer, change in changes.items() if change.fired}
        if not ran:
            raise ValueError("none of the model's layers ran in the recorded calls; is it the one that was recorded?")
        damages = {name: self._all_formats(name, scores) for name, scores in measured.items()}
        return damages, {name for name, scores in measured.items() if scores and name not in ran}

    def _all_formats(self, name: str, measured: dict[str, float]) -> dict[str, float]:
        """Formats that were not measured follow the coarsest one by the energy of the layer's own error."""
        errors = self.survey.layers[name].errors
        if len(measured) == len(errors):
            return measured
        energies = {w: e.energy + (e.noise if w in self.inputs else 0.0) for w, e in errors.items()}
        word = _coarsest(errors)
        ratio = measured[word] / energies[word] if energies[word] else 0.0
        return {w: measured.get(w, ratio * energy) for w, energy in energies.items()}

    def _perturbations(self, group: list[str], word: str) -> dict[str, _Perturbation]:
        """Of each layer of the group."""
        found, device = {}, self.patcher.load_device
        for name in group:
            format, module = self.survey.layers[name].errors[word].format, self._module(name)
            weight = self.survey.source.weight(name).to(device)
            stored = format.decode(pipeline.encode(format, weight))
            if module.weight is not None and module.weight.is_floating_point():
                stored = stored.to(module.weight.dtype)  # as the host holds what it decodes
            delta = stored.float() - weight
            found[name] = _Perturbation(delta, weight, format) if word in self.inputs else _Perturbation(delta)
        return found

    def _damage(self, changes: Mapping[str, _Perturbation]) -> float:
        """Mean over calls of the squared change of the velocity, relative to it."""
        found = []
        with self._hooked(changes):
            for reference in self.references:
                comfy.model_management.throw_exception_if_processing_interrupted()
                change = reference.call.replay(self.patcher).float() - reference.answer.float()
                found.append(change.square().sum().item() / reference.power)
        return sum(found) / len(found)

    @contextmanager
    def _hooked(self, changes: Mapping[str, _Perturbation]) -> Iterator[None]:
        handles = []
        try:
            for name, change in changes.items():
                handles.append(self._module(name).register_forward_hook(change.add))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _module(self, name: str):
        return self.patcher.model.get_submodule(TRUNK + name)

    def notes(self, effort: _Effort, seconds: float) -> list[str]:
        steps = ", ".join(f"{reference.call.position:.2f}" for reference in self.references)
        forwards = effort.calls * len(effort.tasks)
        found = [f"{forwards} forwards of {seconds:.2f} s on {effort.calls} recorded calls (at {steps} of a run)"]
        found.append("every layer was perturbed by itself" if effort.width == 1 else
                     f"grouped to bound the time: up to {effort.width} layers of one kind in neighbouring blocks were "
                     "perturbed together, their damage split by the energy of each layer's own change")  # fmt: skip
        if effort.coarsest:
            found.append("to bound the time each layer ran in its coarsest format only; its other formats follow by "
                         "the energy of its own error")  # fmt: skip
        words = ", ".join(sorted(self.inputs)) or "no format"
        found.append(f"inputs rounded too, as native kernels do, in: {words}")
        return found
