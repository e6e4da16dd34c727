"""What each way of quantizing loses on a trained encoder, MiniLM-L6, on unseen texts. See bench/README.md."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import converter
import minilm
import record
import torch
from minilm import Model, Replacement

from tessera.formats import MXFP8, NVFP4, Format, parse
from tessera.quantization import allocation, indicators, pipeline
from tessera.quantization.calibration import Accumulator, Statistics
from tessera.quantization.pipeline import Settings

SEED = 0
PROMPTS = 12  # that the allocation's scores are measured on
BITS = (5.25, 6.0, 7.0)  # per weight, scales included
QUICK = (64, 16)  # texts
OURS, BASELINE, ABSORB = "ours r32", "convert_to_quant r32 (RTN + SVD)", "ours r32, absorb"
SMOOTHED = "ours r32, smoothing"
MEASURED, ORACLE = f"single layers, {PROMPTS} calibration texts", "oracle: single layers, test texts"

# name, format, settings, whether calibrated
METHODS = (
    ("swept scales", "nvfp4", Settings(rank=0, rounding="sweep"), False),
    ("GPTQ", "nvfp4", Settings(rank=0), True),
    ("ours r32, no calibration", "nvfp4", Settings(rank=32), False),
    ("ours r8", "nvfp4", Settings(rank=8), True),
    (OURS, "nvfp4", Settings(rank=32), True),
    (SMOOTHED, "nvfp4", Settings(rank=32, smoothing=True), True),
    (ABSORB, "nvfp4", Settings(rank=32, mode="absorb"), True),
    ("MXFP8 RTN", "mxfp8", Settings(rank=0, rounding="nearest"), False),
    ("MXFP8 GPTQ", "mxfp8", Settings(rank=0), True),
    ("INT8 row RTN", "int8_row", Settings(rank=0, rounding="nearest"), False),
    ("INT8-ConvRot g64 RTN", "int8_convrot_64", Settings(rank=0, rounding="nearest"), False),
    ("INT8-ConvRot g64 GPTQ", "int8_convrot_64", Settings(rank=0), True),
)  # fmt: skip


def calibrate(model: Model, moment: str = "full", tokens: int | None = None) -> dict[str, Statistics]:
    """Statistics of every input site on the calibration texts, or on their first tokens."""
    sites = {}
    for name, x in model.inputs(model.calibration).items():
        if (site := model.sites[name]) not in sites:
            accumulator = Accumulator(x.shape[1], moment)
            accumulator.add(x[:tokens])
            sites[site] = accumulator.statistics()
    return sites


def ablation(model: Model) -> list[dict]:
    """What kind of statistics, and how many tokens of them, are worth: a row each, rank 32."""
    rows = []
    for moment, tokens in (("diagonal", None), ("block", None), ("full", None), ("full", 2048), ("full", 1024),
                           ("full", 384), ("full", 100), ("block", 100)):  # fmt: skip
        started = time.perf_counter()
        layers, nbytes, lora = ours(model, NVFP4(), Settings(rank=32), calibrate(model, moment, tokens))
        name = f"{moment}, {tokens or 'all'} tokens"
        rows.append(row(model, name, layers, nbytes, lora, time.perf_counter() - started))
    return rows


def ours(
    model: Model, format: Format, settings: Settings, sites: Mapping[str, Statistics] | None
) -> tuple[dict[str, Replacement], int, int]:
    """(layers, bytes of their entries, bytes of their branches) of our pipeline; `sites` None: data-free."""
    layers, nbytes, lora = {}, 0, 0
    for name, (weight, bias) in model.linears.items():
        settled, statistics = format.for_shape(*weight.shape), sites[model.sites[name]] if sites else None
        layer = pipeline.quantize(settled, weight, settings, pipeline.layer_seed(SEED, name), statistics, bias)
        layers[name] = Replacement.of(settled, layer, weight.shape)
        nbytes += sum(entry.nbytes for suffix, entry in layer.entries.items() if suffix != "bias")
        lora += layer.branch.nbytes if layer.branch else 0
    return layers, nbytes, lora


def theirs(model: Model, converted: converter.Converted) -> dict[str, Replacement]:
    return {name: Replacement(converted.weights[name], NVFP4(), converted.branches[name]) for name in model.linears}


def row(
    model: Model, name: str, layers: Mapping[str, Replacement], nbytes: int, lora: int, seconds: float, act: str = "own"
) -> dict:
    weights, both = model.evaluate(layers), model.evaluate(layers, act)
    return {"method": name, "W": weights.layer_error, "W worst": weights.worst, "W+A": both.layer_error,
            "e2e W x1e-3": 1e3 * weights.embedding, "e2e W+A x1e-3": 1e3 * both.embedding,
            "MB": nbytes / 1e6, "branch MB": lora / 1e6, "s": seconds}  # fmt: skip


def at_zero(layers: Mapping[str, Replacement]) -> dict[str, Replacement]:
    return {name: replace(layer, strength=0.0) for name, layer in layers.items()}


def methods(model: Model, python: Path, learned: bool) -> list[dict]:
    """A row per method: convert_to_quant's files, then ours."""
    rows, runs = [], [(BASELINE, 32, False), ("convert_to_quant r8 (RTN + SVD)", 8, False)]
    runs += [("convert_to_quant r32, learned rounding", 32, True)] if learned else []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.safetensors"
        converter.write_source(source, {name: weight for name, (weight, _) in model.linears.items()})
        for name, rank, learn in runs:
            started = time.perf_counter()
            target = Path(folder) / f"r{rank}{'-learned' if learn else ''}.safetensors"
            converted = converter.nvfp4(python, source, target, rank, learn)
            spent, layers = time.perf_counter() - started, theirs(model, converted)
            rows.append(row(model, name, layers, converted.nbytes, converted.lora_nbytes, spent))
            if rank == 32:
                rows.append(row(model, f"{name}, strength 0", at_zero(layers), converted.nbytes, 0, spent))
    sites = calibrate(model)
    for name, label, settings, calibrated in METHODS:
        started = time.perf_counter()
        layers, nbytes, lora = ours(model, parse(label), settings, sites if calibrated else None)
        spent = time.perf_counter() - started
        rows.append(row(model, name, layers, nbytes, lora, spent))
        if name in (OURS, SMOOTHED, ABSORB):
            rows.append(row(model, f"{name}, strength 0", at_zero(layers), nbytes, 0, spent))
            rows.append(row(model, f"{name}, static input_scale", layers, nbytes, lora, spent, "static"))
    return rows


class Mix:
    """Layers in NVFP4 (swept scales, no branch) or MXFP8, inputs rounded with them; errors are squared embedding
    distances, mean over texts."""

    formats = (NVFP4(), MXFP8())

    def __init__(self, model: Model):
        self.model = model
        self.layers = {f.name: ours(model, f, Settings(rank=0, rounding="sweep"), None)[0] for f in self.formats}

    def error(self, names: Mapping[str, str], texts: Sequence[str]) -> float:
        """Of the model with the named layers in the named formats."""
        layers = {layer: self.layers[format][layer] for layer, format in names.items()}
        return 2 * self.model.distances(layers, texts, "own").mean().item()

    def singles(self, texts: Sequence[str]) -> dict[str, dict[str, float]]:
        """Each layer's score in each format: the error with that layer alone replaced."""
        return {n: {f.name: self.error({n: f.name}, texts) for f in self.formats} for n in self.model.linears}

    def choose(self, scores: Mapping[str, Mapping[str, float]], bits: float) -> dict[str, str]:
        """A format for every layer: the least sum of scores in that many bits per weight."""
        budget = int(bits * sum(w.numel() for w, _ in self.model.linears.values()) / 8)
        options = {
            name: [allocation.Option(f, 0, f.nbytes(*weight.shape), scores[name][f.name]) for f in self.formats]
            for name, (weight, _) in self.model.linears.items()
        }
        return {name: option.format.name for name, option in allocation.allocate(options, budget).items()}

    def first(self, indicator: Mapping[str, float], bits: float) -> dict[str, str]:
        """MXFP8 for the layers that score highest, as many as the size allows: a percentile, as quant_probe cuts."""
        size = {name: weight.numel() for name, (weight, _) in self.model.linears.items()}
        names, room = dict.fromkeys(size, "nvfp4"), (bits - 4.5) / (8.25 - 4.5) * sum(size.values())
        for name in sorted(size, key=indicator.__getitem__, reverse=True):
            if size[name] <= room:
                names[name], room = "mxfp8", room - size[name]
        return names


def allocations(model: Model) -> list[dict]:
    """A row per score: the test error of the mix it chooses at each size."""
    mix, weights = Mix(model), {name: weight for name, (weight, _) in model.linears.items()}
    plans = {}
    for name, texts in ((MEASURED, model.calibration[:PROMPTS]), (ORACLE, model.test)):
        singles = mix.singles(texts)
        plans[name] = [mix.choose(singles, bits) for bits in BITS]
    found = {name: indicators.of(weight) for name, weight in weights.items()}
    kurtosis = {name: of.kurtosis for name, of in found.items()}
    for name, values in (("quant_probe", indicators.quant_probe_scores(found)), ("kurtosis", kurtosis)):
        least = min(values.values())
        gains = {layer: {"nvfp4": value - least, "mxfp8": 0.0} for layer, value in values.items()}
        plans[f"{name}, per bit"] = [mix.choose(gains, bits) for bits in BITS]
        plans[f"{name}, highest first"] = [mix.first(values, bits) for bits in BITS]
    plans |= {f"all {f.name}": [dict.fromkeys(weights, f.name)] * len(BITS) for f in mix.formats}
    return [
        {"score": name} | {f"{b:g} bits": mix.error(plan, model.test) for b, plan in zip(BITS, chosen, strict=True)}
        for name, chosen in plans.items()
    ]


def summary(rows: Sequence[dict], mixes: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Ours beside convert_to_quant's, in plain units."""
    found = {r["method"]: r for r in rows}
    by_score = {r["score"]: r["6 bits"] for r in mixes}

    def pair(column: str, method: str = OURS, unit: float = 1.0) -> dict[str, float]:
        return {"ours": unit * found[method][column], "baseline": unit * found[BASELINE][column]}

    quant_probe_best = min(error for score, error in by_score.items() if score.startswith("quant_probe"))
    return {
        "layer_error": pair("W"),
        "embedding_weights_only": pair("e2e W x1e-3", unit=1e-3),
        "embedding_w4a4": pair("e2e W+A x1e-3", SMOOTHED, 1e-3),
        "embedding_w4a4_not_smoothed": pair("e2e W+A x1e-3", unit=1e-3),
        "embedding_w4a4_absorb": pair("e2e W+A x1e-3", ABSORB, 1e-3),
        "allocation_6bit": {"ours": by_score[MEASURED], "baseline": quant_probe_best, "oracle": by_score[ORACLE]},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--convert-to-quant", metavar="PYTHON", help="a Python that has it; else .cache gets one")
    parser.add_argument("--learned", action="store_true", help="its learned rounding too, some minutes")
    parser.add_argument("--ablation", action="store_true", help="kinds and amounts of statistics too, some minutes")
    parser.add_argument("--quick", action="store_true", help="fewer texts: does it run, not how good is it")
    parser.add_argument("--json", action="store_true", help="the main figures as one JSON object in the last line")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    with torch.inference_mode():
        model = minilm.load(*QUICK) if arguments.quick else minilm.load()
        python = converter.environment(arguments.convert_to_quant)
        for name, texts in (("calibration", model.calibration), ("test", model.test)):
            tokens = len(next(iter(model.inputs(texts).values())))
            print(f"{name}: {len(texts)} texts, {tokens} tokens, {minilm.digest(texts)}")
        rows, mixes = methods(model, python, arguments.learned), allocations(model)
        kinds = ablation(model) if arguments.ablation else []
    record.table(rows)
    print("\nSquared embedding error of the test texts, NVFP4 or MXFP8 per layer as the score decides:\n")
    record.table(mixes)
    if kinds:
        print("\nStatistics, rank 32:\n")
        record.table(kinds)
    if arguments.save:
        record.save("quality_minilm statistics", kinds)
        record.save("quality_minilm", rows)
        record.save("quality_minilm allocation", mixes)
    if arguments.json:
        print(json.dumps(summary(rows, mixes)))


if __name__ == "__main__":
    main()
