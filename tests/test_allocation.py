"""The allocation is the optimum of its knapsack, and its sizes are those of the files a job writes."""

import itertools
import math
import random

import pytest
import torch

import synthetic
from tessera import formats, planning
from tessera.checkpoint import Checkpoint
from tessera.job import Job
from tessera.planning import Target
from tessera.quantization import indicators, measurement, pipeline
from tessera.quantization.allocation import Option, allocate, total
from tessera.quantization.calibration import Accumulator
from tessera.quantization.pipeline import Settings
from tessera.survey import Menu
from tessera.survey import survey as survey_of

FORMATS = [formats.NVFP4(), formats.parse("int8_convrot_256"), formats.MXFP8(), None]
SHAPES = {"qkv": (11520, 3840), "out": (3840, 3840), "w1": (10240, 3840), "w3": (10240, 3840), "w2": (3840, 10240)}
DAMAGE = {"nvfp4": 9e-3, "int8_convrot_256": 8e-5, "mxfp8": 7e-4}


def small(seed):
    """Up to six layers with up to five options each, sizes and damages of all kinds, ties and zeros among them."""
    draw = random.Random(seed)
    damage = [draw.random, lambda: draw.random() ** 4, lambda: 0.0, lambda: 0.5]
    return {
        f"l{i}": [
            Option(draw.choice(FORMATS), 0, draw.randint(1, 50) * draw.choice([1, 10]), draw.choice(damage)())
            for _ in range(draw.randint(1, 5))
        ]
        for i in range(draw.randint(1, 6))
    }


def z_image(seed, ranks=(0, 16, 32, 64)):
    """The 170 linears of Z-Image's blocks with made-up scores: log-normal, as measured ones are."""
    draw = random.Random(seed)
    options = {}
    for block, (part, shape) in itertools.product(range(34), SHAPES.items()):
        score, take = math.exp(draw.gauss(0, 1.5)), draw.uniform(0.5, 1.5)
        options[f"layers.{block}.{part}"] = [
            Option(f, r, f.nbytes(*shape) + 30 + 2 * r * sum(shape), score * DAMAGE[f.label] * (1 - take * r / 200))
            for f in FORMATS[:3] for r in ranks
        ] + [Option(None, 0, 2 * shape[0] * shape[1], 0.0)]  # fmt: skip
    return options


def every_plan(options):
    for choice in itertools.product(*options.values()):
        yield sum(o.nbytes for o in choice), math.fsum(o.damage for o in choice)


# ---- the knapsack


@pytest.mark.parametrize("seed", range(40))
def test_least_damage_in_a_budget_is_that_of_brute_force(seed):
    options = small(seed)
    plans = list(every_plan(options))
    for budget in random.Random(seed).choices(range(min(plans)[0], max(plans)[0] + 5), k=4):
        nbytes, damage = total(allocate(options, budget))
        assert nbytes <= budget
        assert damage == pytest.approx(min(d for b, d in plans if b <= budget), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_least_size_for_a_damage_is_that_of_brute_force(seed):
    options = small(seed)
    plans = list(every_plan(options))
    for target in random.Random(seed).choices([d for _, d in plans], k=4):
        nbytes, damage = total(allocate(options, target_damage=target))
        assert damage <= target * (1 + 1e-9) and nbytes == min(b for b, d in plans if d <= target * (1 + 1e-12))


def test_a_larger_budget_never_does_more_damage():
    options = z_image(0)
    damages = [total(allocate(options, budget))[1] for budget in range(3_500_000_000, 6_500_000_000, 91_123_457)]
    assert damages == sorted(damages, reverse=True)


def test_a_model_of_real_size_is_within_a_few_thousandths_of_the_bound():
    """The bound: the same budget if fractions of options could be taken, at the best price for a byte."""
    options = z_image(1)
    for budget in (4_000_000_000, 4_840_000_000, 6_000_000_000):

        def bound(price, budget=budget):
            return sum(min(o.damage + price * o.nbytes for o in menu) for menu in options.values()) - price * budget

        low, high = 0.0, 1e-6
        for _ in range(80):  # concave in the price
            third = (high - low) / 3
            low, high = (low + third, high) if bound(low + third) < bound(high - third) else (low, high - third)
        nbytes, damage = total(allocate(options, budget))
        assert nbytes <= budget and bound(low) <= damage <= 1.003 * bound(low)


def test_ties_do_not_depend_on_the_order_of_anything():
    menu = [Option(f, 0, n, d) for f, n, d in zip(FORMATS, (45, 81, 83, 160), (1.0, 0.1, 0.1, 0.0), strict=True)]
    names = [f"layers.{i}" for i in range(20)]
    first = allocate(dict.fromkeys(names, menu), 1400)
    again = allocate(dict.fromkeys(reversed(names), menu[::-1]), 1400)
    assert first == {name: again[name] for name in names}


def test_equal_damage_takes_the_smaller_option():
    assert allocate({"a": [Option(None, 0, 9, 1.0), Option(None, 0, 5, 1.0)]}, 10)["a"].nbytes == 5


def test_a_budget_below_the_smallest_size_is_refused_with_that_size():
    with pytest.raises(ValueError, match=r"smallest possible size is 1,012 bytes"):
        allocate({"a": [Option(None, 0, 12, 0.0)]}, 1000, fixed_bytes=1000)


def test_a_damage_nothing_reaches_is_refused_with_the_least():
    with pytest.raises(ValueError, match=r"least possible is 0\.25"):
        allocate({"a": [Option(None, 0, 12, 0.25)]}, target_damage=0.1)


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), -1e-3])
def test_a_damage_that_is_none_is_refused(damage):
    with pytest.raises(ValueError, match="must be finite and not negative"):
        Option(FORMATS[0], 16, 12, damage)


# ---- local errors


@pytest.fixture(scope="module")
def weight():
    return synthetic.noise(192, 256, seed=3).float()


@pytest.fixture(scope="module")
def statistics():
    x = torch.randn(2000, 256, generator=torch.Generator().manual_seed(4)) @ torch.diag(torch.linspace(0.1, 3, 256))
    accumulator = Accumulator(256)
    accumulator.add(x)
    return accumulator.statistics()


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("format", [FORMATS[0], FORMATS[2]], ids=lambda f: f.label)
def test_what_a_rank_leaves_is_what_the_pipeline_leaves(weight, statistics, format, calibrated):
    """One fit at the largest rank stands for all smaller ones. The pipeline's factors are fp16."""
    known = statistics if calibrated else None
    found = measurement.measure(weight, [format], (0, 8, 32), known).errors[format.label]
    assert found.left[0] == 1.0
    residual = weight - format.decode(pipeline.encode(format, weight))
    moment = known.moment() if calibrated else None
    energy = moment.energy if calibrated else lambda rows: rows.square().sum().item()
    for rank in (8, 32):
        branch = pipeline.lowrank.fit(residual, rank, 1, moment)
        assert found.left[rank] == pytest.approx(energy(residual - branch.weight()) / energy(residual), rel=0.01)


def test_local_error_is_the_pipelines_without_statistics(weight):
    found = measurement.measure(weight, FORMATS[:3], (0,)).errors
    for format in FORMATS[:3]:
        layer = pipeline.quantize(format, weight, Settings(rank=0, rounding="sweep"), 0)
        assert found[format.label].weight == pytest.approx(layer.error**2, rel=1e-4)


def test_some_rows_measure_what_all_rows_do(weight):
    whole = measurement.measure(weight.repeat(4, 1), FORMATS[:3], (0, 16)).errors
    some = measurement.measure(weight.repeat(4, 1), FORMATS[:3], (0, 16), rows=256).errors
    for word, found in whole.items():
        assert some[word].weight == pytest.approx(found.weight, rel=0.03)


def test_a_rank_is_not_overrated_where_only_some_rows_were_measured():
    noise = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0))
    whole, some = (measurement.measure(noise, FORMATS[:1], (0, 32), rows=n).errors["nvfp4"].left[32]
                   for n in (None, 512))  # fmt: skip
    assert 1 - some == pytest.approx(1 - whole, rel=0.15)


def test_rounded_inputs_are_not_corrected_by_rank():
    error = measurement.LocalError(FORMATS[0], 0.01, 0.01, 0.03, {0: 1.0, 32: 0.2})
    assert error.remaining(32) == 0.2 and error.remaining(32, activations=True) == pytest.approx(0.8)
    assert error.remaining(0, activations=True) == 1.0


def test_indicators_are_those_quant_probe_publishes():
    weight = torch.tensor([[-4.0, 0.5, 1.0], [0.5, 1.0, 1.0]])
    found = indicators.of(weight)
    centred = weight - weight.mean()
    assert found.kurtosis == pytest.approx(((centred**4).mean() / (centred**2).mean() ** 2 - 3).item(), rel=1e-5)
    assert (found.dynamic_range, found.aspect_ratio) == (3.5, 1.5)


def test_quant_probe_scores_lie_between_0_and_1_and_grow_with_kurtosis():
    found = {f"layers.{i}.w1": indicators.Indicators(float(i), 1.0 + i, 3.0) for i in range(8)}
    scores = list(indicators.quant_probe_scores(found).values())
    assert scores == sorted(scores) and scores[0] >= 0 and scores[-1] <= 1


# ---- plans and files


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Z-Image's keys at width 128, a block of each stack: 7 layers of every shape."""
    tensors = {
        key: tensor for key, tensor in synthetic.zimage(dim=128).items()
        if not key.startswith("layers.") or key.startswith(("layers.0.", "layers.11."))
    }  # fmt: skip
    path = tmp_path_factory.mktemp("source") / "small.safetensors"
    return Checkpoint(synthetic.save(path, tensors, metadata={"author": "Zoë"}))


@pytest.fixture(scope="module")
def survey(source):
    return survey_of(source, Menu.of(ranks=(0, 4, 8)))


def damages(survey):
    """Scores that differ from layer to layer, so that a plan uses everything on the menu."""
    draw = random.Random(0)
    scale = {name: math.exp(draw.gauss(0, 2)) for name in survey.layers}
    return {n: {word: d * scale[n] for word, d in scores.items()} for n, scores in survey.damages.items()}


@pytest.fixture(scope="module")
def scored(survey):
    survey.damages = damages(survey)
    return survey


@pytest.fixture(scope="module")
def ranked(source):
    """Nothing but NVFP4, so that all the room goes into ranks."""
    found = survey_of(source, Menu.of(["nvfp4"], (0, 4, 8)))
    found.damages = damages(found)
    return found


def sizes_between(survey, count):
    """Targets from just above the smallest possible size to that of the source."""
    smallest = planning._Sizes(survey).smallest
    return [smallest + 1 + i * (survey.source.nbytes - smallest) // count for i in range(count)]


def test_planned_sizes_are_those_of_the_files_a_job_writes(scored, ranked, tmp_path):
    targets = [(scored, target) for target in sizes_between(scored, 4)]
    used = set()
    for number, (found, target) in enumerate([*targets, (ranked, sizes_between(ranked, 12)[2])]):
        plan = planning.plan(found, "planned", Target(target))
        work = Job(found.source, tmp_path / f"{number}.safetensors", plan.recipe(), rank=plan.rank)
        work.run()
        lora = work.lora.stat().st_size if work.lora else 0
        assert (plan.model_bytes, plan.lora_bytes) == (work.target.stat().st_size, lora)
        assert plan.nbytes <= target
        used |= {(row["format"].split("_")[0], row["rank"]) for row in plan.rows()}
    assert used == {("nvfp4", 0), ("nvfp4", 4), ("nvfp4", 8), ("int8", 0), ("keep", 0)}


def test_plans_use_the_room_they_are_given(scored):
    """What is left over is less than the smallest step that would still help."""
    for target in sizes_between(scored, 6)[1:5]:
        plan = planning.plan(scored, "planned", Target(target))
        assert target - plan.nbytes < 0.02 * target


def test_a_larger_target_never_has_a_larger_expected_error(scored):
    errors = [planning.plan(scored, "planned", Target(target)).error for target in sizes_between(scored, 12)]
    assert errors == sorted(errors, reverse=True)


def test_a_target_error_gives_the_smallest_file_that_keeps_to_it(scored):
    plan = planning.plan(scored, "planned", Target(error=0.02))
    assert plan.error <= 0.02
    smaller = planning.plan(scored, "planned", Target(plan.nbytes - 2000))
    assert smaller.error > 0.02


def test_a_target_below_everything_in_4_bits_is_refused_with_the_smallest_size(scored):
    smallest = planning._Sizes(scored).smallest
    assert planning.plan(scored, "planned", Target(smallest)).nbytes == smallest
    with pytest.raises(ValueError, match=rf"below the smallest possible, .* \({smallest:,} bytes\)"):
        planning.plan(scored, "planned", Target(smallest - 1))


def test_layers_the_architecture_keeps_are_never_demoted(scored):
    plan = planning.plan(scored, "planned", Target(planning._Sizes(scored).smallest))
    kept = [n for n in plan.layers if "adaLN" in n or n.startswith(("x_embedder", "final_layer", "cap_embedder"))]
    assert kept and all(plan.layers[name].format is None for name in kept)
    assert all(plan.layers[name].reason.startswith("kept: ") for name in kept)


def test_a_plan_is_a_recipe_that_gives_every_layer_its_format_rank_and_score(scored):
    plan = planning.plan(scored, "planned", Target(sizes_between(scored, 4)[1]))
    found = plan.recipe().resolve(scored.source.shapes())
    assert found.problems == [] and found.warnings == []
    for name, layer in plan.layers.items():
        assert (found[name].format, found[name].rank) == (layer.format, layer.rank), name
        assert found[name].reason == layer.reason
    assert all("squared error alone: nvfp4 " in plan.layers[name].reason for name in scored.layers)


def test_a_format_that_does_not_fit_a_layers_shape_is_no_option_for_it(source, tmp_path):
    tensors = {key: source.read(key) for key in source.tensors}
    odd = "layers.11.feed_forward.w2"
    tensors[f"{odd}.weight"] = synthetic.noise(128, 382)
    found = survey_of(
        Checkpoint(synthetic.save(tmp_path / "odd.safetensors", tensors)),
        Menu.of(["nvfp4", "int8_convrot"], (0,)),
    )
    assert list(found.layers[odd].errors) == ["nvfp4"]
    assert list(found.layers["layers.0.feed_forward.w2"].errors) == ["nvfp4", "int8_convrot_64"]


def test_without_bf16_on_the_menu_every_layer_that_may_be_is_packed(source):
    found = survey_of(source, Menu.of(["nvfp4", "mxfp8"], (0,)))
    plan = planning.plan(found, "planned", Target(source.nbytes))
    assert {plan.layers[name].format.label for name in found.layers} == {"mxfp8"}


def test_a_plan_is_saved_once_and_never_over_another(scored, tmp_path):
    plan = planning.plan(scored, "planned", Target(scored.source.nbytes))
    plan.save(tmp_path / "new" / "mine.toml")
    with pytest.raises(ValueError, match=r"mine\.toml: already exists"):
        plan.save(tmp_path / "new" / "mine.toml")


@pytest.mark.parametrize(("text", "nbytes"), [
    ("4.84GB", 4_840_000_000), ("4.5 GiB", 4_831_838_208), ("800mb", 800_000_000), ("1234 B", 1234),
])  # fmt: skip
def test_sizes_are_read_with_their_units(text, nbytes):
    assert planning.parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["4.84", "GB", "-1GB", "0 GB", "4,84 GB", "4 gigs", "nan GB"])
def test_a_size_without_number_or_unit_is_refused(text):
    with pytest.raises(ValueError, match="write a number and a unit"):
        planning.parse_size(text)


@pytest.mark.parametrize(("labels", "ranks", "words"), [
    (["bf16"], (0,), "no format to quantize with"), (["nvfp3"], (0,), "unknown format 'nvfp3'"),
    (["nvfp4"], (0, 300), "rank 300"), (["nvfp4"], (-1,), "rank -1"),
])  # fmt: skip
def test_a_menu_of_nothing_is_refused(labels, ranks, words):
    with pytest.raises(ValueError, match=words):
        Menu.of(labels, ranks)
