"""Which score gives the best mixture at equal bytes: tiny Z-Image in the real ComfyUI. See bench/README.md."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import record
import torch

sys.path.insert(0, str(record.ROOT / "tests"))
record.load_pack()

import comfy_host  # noqa: E402
from tessera.quantization import allocation, indicators  # noqa: E402
from tessera.quantization.allocation import Option  # noqa: E402
from tessera.survey import Menu, Survey  # noqa: E402

MENUS = {"nvfp4 or mxfp8": ("nvfp4", "mxfp8"), "nvfp4, mxfp8, int8 or bf16": ("nvfp4", "mxfp8", "int8_convrot", "bf16")}
BITS = (5.25, 6.0, 7.0)  # per weight of the layers that may be packed, scales included
CALLS = 3
MEASURED, ORACLE = f"measured, {CALLS} calls", "oracle: test calls"
BUDGETS = {MEASURED: 0, f"measured in one format, {CALLS} calls": 35 * CALLS, "measured in one format, 1 call": 35,
           "measured in one format, 1 call, pairs of layers": 20}  # forwards  # fmt: skip
TEST_CALLS = 32
Scores = Mapping[str, Mapping[str, float]]


@dataclass
class Mixtures:
    """The running model with some of its weights replaced, against itself, on calls it has not been measured with."""

    model: object
    survey: Survey
    calls: list

    def __post_init__(self):
        from tessera.host import probing

        self._prober = probing._Prober(self.model, self.survey, set())
        self._prober.replay(self.calls)
        words = {word for layer in self.survey.layers.values() for word in layer.errors}
        self._changes = {word: self._prober._perturbations(list(self.survey.layers), word) for word in words}

    def error(self, plan: Mapping[str, Option]) -> float:
        """Root mean square over the calls of the velocity's relative error, weights only."""
        packed = {name: option.format.label for name, option in plan.items() if option.format is not None}
        return self._prober._damage({name: self._changes[word][name] for name, word in packed.items()}) ** 0.5

    def singles(self) -> Scores:
        return {
            name: {word: self._prober._damage({name: self._changes[word][name]}) for word in layer.errors}
            for name, layer in self.survey.layers.items()
        }


def allocate(survey: Survey, scores: Scores, words, bits: float) -> dict[str, Option]:
    """The knapsack's choice for these scores."""
    options = {}
    for name, layer in survey.layers.items():
        options[name] = [
            Option(e.format, 0, e.format.nbytes(*layer.shape), scores[name][word])
            for word, e in layer.errors.items() if word.startswith(words)
        ]  # fmt: skip
        if "bf16" in words:
            options[name].append(Option(None, 0, 2 * layer.shape[0] * layer.shape[1], 0.0))
    return allocation.allocate(options, budget(survey, bits))


def highest_first(survey: Survey, values: Mapping[str, float], words, bits: float) -> dict[str, Option]:
    """As a threshold does it: the next better format for the layers with the highest values, as long as they fit."""
    high = next(word for word in words if word != "nvfp4")
    room = budget(survey, bits)
    low, better = ({name: next(Option(e.format, 0, e.format.nbytes(*layer.shape), 0.0)
                               for found, e in layer.errors.items() if found.startswith(word))
                    for name, layer in survey.layers.items()} for word in ("nvfp4", high))  # fmt: skip
    room -= sum(option.nbytes for option in low.values())
    plan = dict(low)
    for name in sorted(values, key=values.__getitem__, reverse=True):
        step = better[name].nbytes - low[name].nbytes
        if step > room:
            break
        plan[name], room = better[name], room - step
    return plan


def budget(survey: Survey, bits: float) -> int:
    return int(bits * sum(layer.shape[0] * layer.shape[1] for layer in survey.layers.values()) / 8)


def local_scores(survey: Survey) -> dict[str, Scores]:
    """What can be known of a layer without running the model."""
    weights = {name: survey.source.weight(name) for name in survey.layers}
    outputs = {}
    for name, layer in survey.layers.items():
        x = survey.statistics[name].moment().energy(weights[name])
        outputs[name] = {word: e.output * x for word, e in layer.errors.items()}
    errors = {name: layer.errors.items() for name, layer in survey.layers.items()}
    return {
        "local output error, relative": {n: {w: e.output for w, e in found} for n, found in errors.items()},
        "local output error, absolute": outputs,
        "weight error, relative": {n: {w: e.weight for w, e in found} for n, found in errors.items()},
        "weight error, absolute": {n: {w: e.weight * weights[n].square().sum().item() for w, e in found}
                                   for n, found in errors.items()},
    }  # fmt: skip


def by_indicator(survey: Survey, values: Mapping[str, float]) -> Scores:
    """Gains over the best format are the indicator's; the formats between share it as their own errors do."""
    least = min(values.values())
    return {
        name: {word: (values[name] - least) * e.weight / max(f.weight for f in layer.errors.values())
               for word, e in layer.errors.items()}
        for name, layer in survey.layers.items()
    }  # fmt: skip


def plans(survey: Survey, measured: Mapping[str, Scores], words, bits: float) -> dict[str, list[dict[str, Option]]]:
    """The mixtures that each way of scoring asks for; several where chance decides."""
    found = {name: layer.indicators for name, layer in survey.layers.items()}
    kurtosis = {name: of.kurtosis for name, of in found.items()}
    values = {"quant_probe": indicators.quant_probe_scores(found), "kurtosis": kurtosis}
    chosen = {
        name: [allocate(survey, scores, words, bits)] for name, scores in (measured | local_scores(survey)).items()
    }
    for name, value in values.items():
        chosen[f"{name}, per byte"] = [allocate(survey, by_indicator(survey, value), words, bits)]
        chosen[f"{name}, highest first"] = [highest_first(survey, value, words, bits)]
    chosen["random, mean of 4"] = []
    for seed in range(4):
        draw = random.Random(seed)
        order = {name: draw.random() for name in survey.layers}
        chosen["random, mean of 4"].append(highest_first(survey, order, words, bits))
    return chosen


def measure(folder: Path, pairs: int) -> tuple[list[dict], dict]:
    """(a row per menu and score, seconds)."""
    from tessera import host

    models = folder / "models" / "diffusion_models"
    (models / "tiny.safetensors").symlink_to(comfy_host.TINY)
    model = comfy_host.node("TesseraDiffusionModelLoader").execute("tiny.safetensors").args[0]
    recorder = comfy_host.record(model)
    menu = Menu.of(MENUS["nvfp4, mxfp8, int8 or bf16"], (0,))
    surveys, seconds = {}, {}
    for name, forwards in BUDGETS.items():
        started = time.perf_counter()
        surveys[name] = host.measure(model, menu, recorder, host.Budget(CALLS, forwards), "off")
        seconds[name] = time.perf_counter() - started
    found = surveys[MEASURED]
    calibration = host.calibration_of(recorder)
    found.statistics = {name: calibration.of(name) for name in found.layers}
    unseen = [(text, 100 + i) for i, text in enumerate(comfy_host.PROMPTS[:pairs])]
    test = Mixtures(model, found, comfy_host.record(model, unseen, probes=TEST_CALLS).probes)
    measured = {name: survey.damages for name, survey in surveys.items()} | {ORACLE: test.singles()}
    rows = []
    for title, words in MENUS.items():
        chosen = {bits: plans(found, measured, words, bits) for bits in BITS}
        for name in chosen[BITS[0]]:
            errors = {f"{b:g} bits": 100 * mean(test.error(plan) for plan in chosen[b][name]) for b in BITS}
            rows.append({"menu": title, "score": name} | errors)
        for word in (
            w for w in dict.fromkeys(w for m in found.layers.values() for w in m.errors) if w.startswith(words)
        ):
            one = {n: Option(layer.errors[word].format, 0, 0, 0.0) for n, layer in found.layers.items()}
            rows.append({"menu": title, "score": f"all {word}"} | dict.fromkeys(errors, 100 * test.error(one)))
    return rows, seconds


def summary(rows: list[dict]) -> dict:
    """Ours beside the best of quant_probe's orders and the oracle; velocity errors, 0.01 is 1 %."""
    result = {}
    for title in MENUS:
        found = {row["score"]: row for row in rows if row["menu"] == title}
        for bits in (f"{b:g} bits" for b in BITS):
            probes = min(row[bits] for name, row in found.items() if name.startswith("quant_probe"))
            pairs = {"ours": found[MEASURED][bits], "baseline": probes, "oracle": found[ORACLE][bits]}
            result[f"{title}, {bits}"] = {name: value / 100 for name, value in pairs.items()}
    return {"allocation_tiny": result}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=16, help="unseen prompts and seeds (16)")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        sys.argv = sys.argv[:1]
        comfy_host.start(Path(folder))
        rows, seconds = measure(Path(folder), arguments.pairs)
    print("Velocity error in % of unseen prompts, each layer in the format that the score gives it:\n")
    record.table(rows)
    print("\n" + "; ".join(f"{name}: {spent:.0f} s" for name, spent in seconds.items()))
    if arguments.save:
        record.save("allocation tiny", rows)
    if arguments.json:
        print(json.dumps(summary(rows)))


if __name__ == "__main__":
    main()
