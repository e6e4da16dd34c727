"""One layer through smoothing, scales, rounding and low rank."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..formats import NVFP4, Entries, Format, Plain, Quantized, require_finite
from ..kernels import reference as ref
from . import activations, gptq, lowrank, scales, smoothing
from .calibration import Statistics
from .lowrank import LowRank
from .metrics import norm, relative_error
from .moment import BLOCK, Moment

CORRECTION, ABSORB = MODES = ("correction", "absorb")
BEST, SWEEP, NEAREST = ROUNDINGS = ("best", "sweep", "nearest")

MAX_SHRINKAGE = 0.5
ABSORBED_NOISE = 0.08**2  # relative squared error of a 4-bit weight, which counts beside that of its input
LARGEST = 1e9  # weight: beyond, a branch's fp16 factors and squares of squares in fp32 overflow
INPUT_HEADROOM = 2.0  # over the largest calibrated input; block scales of E4M3 lose nothing to it
TRIAL_ROWS = 512  # of a weight, to choose its smoothing on


@dataclass(frozen=True)
class Settings:
    """How layers are quantized. `mode` correction: good at strength 0, best at 1. absorb: the branch is part of it."""

    rank: int = 32
    mode: str = CORRECTION
    rounding: str = BEST  # error feedback where there are statistics, else swept scales; "nearest": amax scales
    smoothing: bool | None = None  # where measured better; None: in absorb mode only (docs/algorithms.md says why)
    bias: bool = True
    input_scale: bool = True

    def __post_init__(self):
        for name, known in (("mode", MODES), ("rounding", ROUNDINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}: must be one of {', '.join(known)}")
        if self.rank < 0:
            raise ValueError(f"rank {self.rank}: must be 0 (no correction) or more")
        if self.smoothing is None:
            object.__setattr__(self, "smoothing", self.mode == ABSORB)
        if self.mode == ABSORB and not self.rank:
            raise ValueError("mode absorb at rank 0: nothing could be absorbed; give a rank, 32 for instance")


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's checkpoint entries, its branch, and its relative errors without and with it.

    `error`: of the weight, Frobenius. `output_error`: of the output for the calibrated inputs; None without statistics.
    """

    entries: Entries
    branch: LowRank | None
    error: float
    corrected_error: float | None
    output_error: float | None = None
    corrected_output_error: float | None = None
    notes: tuple[str, ...] = ()


def quantize(
    format: Format,
    weight: Tensor,
    settings: Settings,
    seed: int,
    statistics: Statistics | None = None,
    bias: Tensor | None = None,
) -> QuantizedLayer:
    """A weight [out, in] (fp32) in a format settled for its shape, and the low-rank branch for what that loses.

    With `statistics` of its input the output error is minimised, without them the weight error. Entries hold, besides
    the format's own, `pre_quant_scale` [in], `input_scale` [] and a new `bias` [out] where these were chosen, in fp32.
    Same arguments, same bytes. Raises ValueError if the weight is not finite, the format cannot hold its range, or the
    statistics are those of a layer of another width.
    """
    require_finite(weight)
    _require_range(format, weight)
    notes: list[str] = []
    if statistics is not None and statistics.in_features != weight.shape[1]:
        raise ValueError(f"in_features {weight.shape[1]}, its statistics have {statistics.in_features}; "
                         "they belong to another model")  # fmt: skip
    if isinstance(format, Plain):
        quantized = format.encode(weight)
        return QuantizedLayer(format.pack(quantized), None, relative_error(format.decode(quantized), weight), None)
    if settings.rounding != BEST:
        statistics = None
    moment = None
    if statistics is not None:
        statistics = statistics.to(weight.device)
        moment = moment_of(statistics, bias is not None and settings.bias, notes)
    layer = _Layer(format, settings, seed, None if moment is None else statistics, moment, notes)
    smooth = layer.choose_smoothing(weight)
    quantized, branch = layer.encode(weight, smooth)
    made = layer.finish(weight, bias, smooth, quantized, branch)
    if not all(math.isfinite(error) for error in (made.error, made.corrected_error) if error is not None):
        raise ValueError(f"its error cannot be computed ({made.error}, {made.corrected_error} with its branch); "
                         "keep this layer, or choose another format for it")  # fmt: skip
    return made


def _require_range(format: Format, weight: Tensor) -> None:
    """Raises ValueError if a weight is beyond its format, or beyond what a layer can be computed with."""
    largest = weight.abs().max().item() if weight.numel() else 0.0
    if isinstance(format, Plain):
        fits, limit = weight.new_tensor(largest).to(format.dtype).isfinite(), torch.finfo(format.dtype).max
    else:
        fits, limit = largest <= LARGEST, LARGEST
    if not fits:
        raise ValueError(f"its largest weight is {largest:.4g}, {format.label} takes {limit:.4g}; keep this layer, "
                         "or repair the source")  # fmt: skip


def _rest(weight: Tensor, branch: LowRank, columns: bool) -> Tensor:
    """What is left of a weight without its branch. Rows, and with `columns` columns, that are zero stay so: there a
    branch is nothing but rounding noise, too small for any block scale beside the others."""
    rest = branch.add_to(weight.clone(), -1)
    for axis in (1, 0) if columns else (1,):
        empty = ~(weight != 0).any(axis, keepdim=True)
        if empty.any():
            rest.masked_fill_(empty, 0.0)
    return rest


@dataclass(frozen=True)
class _Layer:
    """What all steps of one layer share. `statistics` and `moment` (of the input, as rounding and fitting use it) are
    both there or both None. `smooth` below is s [in], or None for 1."""

    format: Format
    settings: Settings
    seed: int
    statistics: Statistics | None
    moment: Moment | None
    notes: list[str]

    def choose_smoothing(self, weight: Tensor) -> Tensor | None:
        """The smoothing that lowers the error of the running layer by MIN_GAIN or more; else None.

        Tried on some rows, with what is known of pairs of columns within blocks of 128: the choice hangs on the input.
        """
        if not (self.settings.smoothing and isinstance(self.format, NVFP4) and self.moment is not None):
            return None
        if not self.statistics.amax.max() > 0:
            return None
        rows = weight[:: -(-weight.shape[0] // TRIAL_ROWS)]
        rank = self.settings.rank * len(rows) // len(weight)
        trial = replace(self, moment=self.moment.blocks_only(), notes=[])
        rms = self.statistics.moment().diagonal().sqrt()
        trials = [None, *(smoothing.factors(weight, rms, exponent) for exponent in smoothing.EXPONENTS)]
        errors = [trial.running_error(rows, smooth, rank) for smooth in trials]
        best = min(range(len(trials)), key=errors.__getitem__)
        return trials[best] if errors[best] < (1 - smoothing.MIN_GAIN) * errors[0] else None

    def running_error(self, weight: Tensor, smooth: Tensor | None, rank: int) -> float:
        """Squared error of the layer's output on the sample of tokens, inputs rounded and corrected at that rank."""
        quantized, branch = self.encode(weight, smooth)
        stored = self.format.decode(quantized)
        if branch is None:
            error = weight - (stored if smooth is None else stored / smooth)
            branch = lowrank.fit(error, rank, self.seed, self.moment)
        rest = branch.add_to(weight.clone(), -1)
        return activations.output_error(self.format, rest, stored, self.statistics.sample.float(), smooth)

    def encode(self, weight: Tensor, smooth: Tensor | None) -> tuple[Quantized, LowRank | None]:
        """Codes of W s, and in absorb mode the branch that was taken out of W before."""
        target = weight if smooth is None else weight * smooth
        metric = self.moment if self.moment is None or smooth is None else self.moment.scaled(1 / smooth)
        if self.settings.mode == ABSORB:
            branch = self.absorbed(target, metric, smooth).half()
            quantized = self.round(_rest(target, branch, metric is None), metric)
            # it sees the input as it comes
            return quantized, branch if smooth is None else LowRank(branch.up, branch.down.float() / smooth)
        quantized = self.round(target, metric)
        if metric is None and self.settings.rounding == BEST and self.settings.rank:
            quantized = self.round(self.less_branch(target, quantized), metric)
        return quantized, None

    def absorbed(self, target: Tensor, metric: Moment | None, smooth: Tensor | None) -> LowRank:
        """The part of W s that is best computed exactly: where the input is rounded most coarsely, weighed by its
        noise."""
        rank, seed = self.settings.rank, self.seed
        if metric is None:
            return lowrank.fit(target, rank, seed)
        x = self.statistics.sample.float()
        x = x if smooth is None else x / smooth
        noise = (activations.rounded(self.format, x) - x).square().mean(0)
        return lowrank.fit(target, rank, seed, Moment(noise + ABSORBED_NOISE * metric.diagonal(), len(noise)))

    def less_branch(self, weight: Tensor, quantized: Quantized) -> Tensor:
        """What is to be rounded given the branch of a first rounding (LoftQ, arXiv 2310.08659, one alternation).

        Data-free only, where it takes a seventh of the corrected model's error for a thirtieth more at strength 0
        (MiniLM, 1 - cos of the embedding). With statistics it takes a hundredth.
        """
        error = self.format.decode(quantized).sub_(weight).neg_()
        branch = lowrank.fit(error, self.settings.rank, self.seed)
        del error  # as large as the weight
        return _rest(weight, branch, True)

    def round(self, weight: Tensor, metric: Moment | None) -> Quantized:
        if metric is not None and isinstance(self.format, gptq.FORMATS):
            try:
                return gptq.quantize(self.format, weight, metric, self.notes)
            except gptq.Singular as problem:
                self.notes.append(f"{problem}; rounded with swept scales, without error feedback")
        return encode(self.format, weight, self.settings.rounding != NEAREST)

    def finish(
        self, weight: Tensor, bias: Tensor | None, smooth: Tensor | None, quantized: Quantized, branch: LowRank | None
    ) -> QuantizedLayer:
        """Low rank, bias and scales for codes that stand, and how far they are from the weight."""
        stored = self.format.decode(quantized)
        error = (stored if smooth is None else stored.div_(smooth)).neg_().add_(weight)  # in the place of `stored`
        length, power = norm(weight), self.moment.energy(weight) if self.moment is not None else 0.0
        plain, corrected = _errors(error, self.moment, length, power), (None, None)
        if branch is not None:  # absorbed: always there, so the bias makes up for what is left with it
            branch = branch.half()
            corrected = _errors(branch.add_to(error, -1), self.moment, length, power)
        mean = self.statistics.mean if self.statistics is not None and bias is not None and self.settings.bias else None
        entries = self.format.pack(quantized) | self.extras(smooth)
        if mean is not None:
            entries["bias"] = bias.float() + error @ mean
        if branch is None and self.settings.rank:
            branch = lowrank.fit(error, self.settings.rank, self.seed, self.moment).half()
            if mean is not None:
                branch = replace(branch, bias=-(branch.up.float() @ (branch.down.float() @ mean)))
            corrected = _errors(branch.add_to(error, -1), self.moment, length, power)
        return QuantizedLayer(entries, branch, plain[0], corrected[0], plain[1], corrected[1], tuple(self.notes))

    def extras(self, smooth: Tensor | None) -> Entries:
        """The scales of the layer's input."""
        entries = {} if smooth is None else {"pre_quant_scale": 1 / smooth}
        if self.statistics is not None and self.settings.input_scale and isinstance(self.format, NVFP4):
            amax = self.statistics.amax if smooth is None else self.statistics.amax / smooth
            entries["input_scale"] = _input_scale(amax)
        return entries


def _errors(error: Tensor, moment: Moment | None, length: float, power: float) -> tuple[float, float | None]:
    """Relative error of the weight, and of the output if its input is known."""
    of_weight = norm(error) / length if length else 0.0
    if moment is None:
        return of_weight, None
    return of_weight, math.sqrt(moment.energy(error) / power) if power else 0.0


def moment_of(statistics: Statistics, centred: bool, notes: list[str]) -> Moment | None:
    """R for rounding and fitting: as much of it as the tokens carry, shrunk towards its diagonal."""
    moment, tokens = statistics.moment(), statistics.tokens
    if not torch.isfinite(moment.matrix).all():
        notes.append("its second moment is not finite; rounded without statistics")
        return None
    if centred:  # the bias makes up for the mean
        moment = moment.centred(statistics.mean)
    if moment.kind == "full" and tokens < moment.in_features:
        notes.append(f"{tokens} tokens for {moment.in_features} channels: blocks of {BLOCK} instead of the full moment")
        moment = moment.blocks_only()
    if moment.kind == "block" and tokens < BLOCK:
        notes.append(f"{tokens} tokens: only the power of each channel is used")
        moment = moment.diagonal_only()
    if moment.kind == "diagonal":  # as if one token more were equally loud everywhere: two alone are worse than none
        return Moment((tokens * moment.matrix + moment.matrix.mean()) / (tokens + 1), moment.in_features)
    return moment.shrunk(min(MAX_SHRINKAGE, moment.block / max(tokens, 1)))


def _input_scale(amax: Tensor) -> Tensor:
    """NVFP4's static tensor scale [] for inputs up to amax [in], with headroom: no pass over the input to find it."""
    return (INPUT_HEADROOM * amax.max() / (ref.E4M3_MAX * ref.E2M1_MAX)).clamp(min=1e-30).float()


def encode(format: Format, weight: Tensor, sweep: bool = True) -> Quantized:
    """Codes of a finite fp32 weight [out, in]: swept block scales where the format has a choice, else its standard."""
    return scales.encode(format, weight) if sweep and isinstance(format, NVFP4) else format.encode(weight)


def layer_errors(stored: Tensor, branch: LowRank | None, weight: Tensor) -> list[float]:
    """Relative error of a stored weight, then of it + branch if there is one. Adds the branch to `stored` in place."""
    errors = [relative_error(stored, weight)]
    return errors if branch is None else [*errors, relative_error(branch.add_to(stored), weight)]


def layer_seed(seed: int, name: str) -> int:
    """A seed of its own per layer, so that neither order nor other layers change a layer's bytes."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7])
