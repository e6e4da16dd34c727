"""Collects the inputs of a model's layers, call by call, into statistics per input site within a memory limit."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .calibration import FULL_UP_TO, MOMENTS, Accumulator, Calibration, Outline, Statistics
from .pipeline import layer_seed

AUTO = "auto"
NARROWER = {AUTO: "block", "full": "block", "block": "diagonal"}
GB = 1e9
GLIMPSE = 64  # numbers compared where two layers seem to read one tensor


@dataclass(frozen=True)
class RecordOptions:
    """How to record. `moment` auto: full up to 4096 inputs, blocks of 128 above."""

    moment: str = AUTO
    tokens: int = 1024  # at most, of every call of a layer, chosen at random; 0: all
    memory: float = 0.0  # GB the sums may take; 0: half of the RAM that is free at the start
    probes: int = 6  # calls of the diffusion model kept for bit allocation
    seed: int = 0

    def __post_init__(self):
        if self.moment not in (AUTO, *MOMENTS):
            raise ValueError(f"moment {self.moment!r}: must be one of {', '.join((AUTO, *MOMENTS))}")


DEFAULTS = RecordOptions()


@dataclass
class Forward:
    """One model's running forward: which tensors were recorded, by identity. A tensor is held weakly: nothing stays
    in memory for this, and an id that is used again is not taken for the old tensor."""

    number: int = 0
    running: bool = False
    seen: dict[int, tuple[weakref.ref, set[str]]] = field(default_factory=dict)

    def sites_of(self, x: Tensor) -> set[str]:
        tensor, sites = self.seen.get(id(x), (None, ()))
        return set(sites) if tensor is not None and tensor() is x else set()

    def remember(self, x: Tensor, site: str) -> None:
        self.seen[id(x)] = (weakref.ref(x), self.sites_of(x) | {site})


@dataclass
class _Site:
    accumulator: Accumulator
    born: int  # forward of its first call
    glimpse: Tensor  # some numbers of that call's input
    calls: int = 0


class Recorder:
    """Statistics of layer inputs over all recorded runs; holds no model.

    `widths` are the in_features of every layer by module path. Layers that read the very same tensor share a site,
    named after the first of them; one that ceases to is recorded on its own from there on. Of each call up to `tokens`
    tokens are taken, chosen by (seed, site, number of the call). A call's tokens count by the inverse of their mean
    square, so that every step of a sampler weighs the same at every site, however large its activations are there. (On
    the tiny Z-Image equal weights and 1/E[v^2] of the model's output give the same velocity error within 1 %, but
    neither bounds what one step can do.)
    The sums live in RAM, below `limit` bytes: before they would exceed it, full moments become blocks of 128, then
    diagonals, without a loss of what those hold, and a note says so.
    """

    def __init__(self, model: str, widths: Mapping[str, int], options: RecordOptions, limit: int):
        self.model, self.options, self.limit = model, options, limit
        self.runs = 0
        self.probes: list = []  # calls of the whole model, kept by whoever records them
        self._widths = dict(widths)
        self._sites: dict[str, _Site] = {}
        self._layers: dict[str, str] = {}  # module path -> site
        self._moment = options.moment
        self._notes: list[str] = []
        self._lock = threading.RLock()  # several GPUs run at once
        least = sum(Accumulator.cost(width, "diagonal") for width in widths.values())
        if least > self.limit:
            raise ValueError(f"calibration of {len(widths)} layers needs {least / GB:.2f} GB at least, the limit is "
                             f"{self.limit / GB:.2f} GB; raise it, or free some memory")  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Held now: sums and probe calls."""
        return self._sums() + sum(probe.nbytes for probe in self.probes)

    def most(self) -> int:
        """Bytes the sums may come to: as if no two layers shared an input, but never above the limit."""
        return min(self.limit, sum(Accumulator.cost(w, self._kind(w)) for w in self._widths.values()))

    def calibration(self) -> Calibration:
        """What was recorded up to now; statistics are computed when asked for, so that nothing is held twice."""
        with self._lock:
            live = {name: site.accumulator for name, site in self._sites.items() if site.accumulator.tokens}
            layers = {layer: site for layer, site in self._layers.items() if site in live}
            return Calibration(_Live(live), layers, self.model, self.runs, self.notes())

    def note(self, text: str) -> None:
        """Something to be told with the statistics, once."""
        if text not in self._notes:
            self._notes.append(text)

    def notes(self) -> list[str]:
        notes, found = list(self._notes), {name: site.accumulator for name, site in self._sites.items()}
        skipped = {name: a.skipped for name, a in found.items() if a.skipped}
        if skipped:
            worst = max(skipped, key=skipped.get)
            notes.append(f"{sum(skipped.values())} tokens with NaN or infinity were left out, most at {worst}")
        dead = [name for name, a in found.items() if not a.tokens]
        if dead:
            notes.append(f"{len(dead)} inputs had no finite token and are not calibrated (first: {dead[0]})")
        few = [name for name, a in found.items() if 0 < a.tokens < a.in_features]
        silent = [name for name in self._widths if name not in self._layers]
        if silent and found:
            notes.append(f"{len(silent)} of {len(self._widths)} layers did not run (first: {silent[0]})")
        if few:
            notes.append(f"{len(few)} of {len(found)} inputs saw fewer tokens than channels (first: {few[0]}); more "
                         "prompts or steps help")  # fmt: skip
        return notes

    def summary(self) -> str:
        """What is, or will be, recorded, in words."""
        tokens = [site.accumulator.tokens for site in self._sites.values()]
        if not tokens:
            return f"{len(self._widths)} layers, at most {self.most() / GB:.2f} of {self.limit / GB:.2f} GB"
        return (f"{self.runs} model calls, {len(self._layers)} layers, {len(tokens)} inputs of {min(tokens)} to "
                f"{max(tokens)} tokens, {self.nbytes / GB:.2f} GB")  # fmt: skip

    def begin(self, forward: Forward) -> None:
        """A forward starts: only tensors of the same one can be shared."""
        with self._lock:
            self.runs += 1
            forward.seen.clear()
            forward.number, forward.running = self.runs, True

    @torch.inference_mode()
    def add(self, layer: str, x: Tensor, forward: Forward) -> None:
        """One call of a layer with input x [..., in]."""
        with self._lock:
            known = forward.sites_of(x)
            site = self._layers.get(layer)
            if site is None:
                site = self._layers[layer] = self._shared(x, known, forward.number) or layer
            elif site != layer and site not in known:
                self.note(f"{layer}: ceased to read the input of {site} at call {forward.number}; recorded on its own "
                          "since")  # fmt: skip
                site = self._layers[layer] = layer
            if site not in known:
                forward.remember(x, site)
                self._record(site, x, forward.number)

    def _shared(self, x: Tensor, known: set[str], number: int) -> str | None:
        """The site that reads this tensor too and came up in this same forward. A tensor that was changed in place
        between two layers is not the same."""
        for name in sorted(known):
            site = self._sites[name]
            if site.born == number and torch.equal(_glimpse(x), site.glimpse):
                return name
        return None

    def _record(self, name: str, x: Tensor, number: int) -> None:
        site = self._sites.get(name)
        if site is None:
            site = self._sites[name] = _Site(self._accumulator(x.shape[-1]), number, _glimpse(x))
        rows = self._sample(name, site.calls, x.reshape(-1, x.shape[-1])).float()
        site.calls += 1
        site.accumulator.add(rows, _weight(rows))

    def _sample(self, name: str, call: int, rows: Tensor) -> Tensor:
        if not 0 < self.options.tokens < len(rows):
            return rows
        generator = torch.Generator().manual_seed(layer_seed(self.options.seed, f"{name}:{call}"))
        chosen = torch.randperm(len(rows), generator=generator)[: self.options.tokens]
        return rows[chosen.to(rows.device)]

    def _accumulator(self, in_features: int) -> Accumulator:
        while self._sums() + Accumulator.cost(in_features, self._kind(in_features)) > self.limit:
            narrower = NARROWER.get(self._moment)
            if narrower is None:  # diagonals fit, as was checked, but for layers that split
                break
            self._moment = narrower
            self.note(f"second moments are {narrower}: wider ones would exceed {self.limit / GB:.2f} GB")
            for site in self._sites.values():
                site.accumulator.narrow(narrower)
        return Accumulator(in_features, self._kind(in_features))

    def _kind(self, in_features: int) -> str:
        if self._moment != AUTO:
            return self._moment
        return "full" if in_features <= FULL_UP_TO else "block"

    def _sums(self) -> int:
        return sum(site.accumulator.nbytes for site in self._sites.values())


class _Live(Mapping):
    """Statistics by site, computed when asked for."""

    def __init__(self, accumulators: dict[str, Accumulator]):
        self._accumulators = accumulators

    def __getitem__(self, site: str) -> Statistics:
        return self._accumulators[site].statistics()

    def outline(self, site: str) -> Outline:
        return self._accumulators[site].outline()

    def __iter__(self) -> Iterator[str]:
        return iter(self._accumulators)

    def __len__(self) -> int:
        return len(self._accumulators)


def _weight(rows: Tensor) -> float:
    """1 / the mean square of a call's finite tokens."""
    power = rows.square().mean(1)
    power = power[torch.isfinite(power)]
    mean = power.mean().item() if power.numel() else 0.0
    return 1 / mean if mean > 0 else 1.0


def _glimpse(x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    return flat[:: max(1, flat.numel() // GLIMPSE)][:GLIMPSE].to("cpu", torch.float32, copy=True)
