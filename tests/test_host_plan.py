"""Inside the real ComfyUI: a layer's score is what the quantized file does, the model stays as it was, plans hold."""

import shutil
from dataclasses import replace

import pytest
import torch

import comfy_host
from comfy_host import node, record, sample
from tessera import formats
from tessera.checkpoint import Checkpoint
from tessera.job import Job
from tessera.kernels import cpu
from tessera.quantization import recipe
from tessera.quantization.pipeline import Settings
from tessera.survey import LOCAL_OUTPUT, LOCAL_WEIGHT, PROXY, Menu

pytestmark = pytest.mark.host
MENU = Menu.of(["nvfp4", "int8_convrot", "bf16"], (0,))
SMALL = Menu.of(["nvfp4"], (0,))
SOME = ("layers.1.attention.qkv", "layers.2.feed_forward.w2", "noise_refiner.1.attention.out")
SWEEP = Settings(rank=0, rounding="sweep")


@pytest.fixture(scope="module")
def model(models):
    shutil.copy(comfy_host.TINY, models / "diffusion_models" / "tiny_to_plan.safetensors")
    return load("tiny_to_plan.safetensors")


@pytest.fixture(scope="module")
def recorded(model):
    return record(model, comfy_host.CALIBRATION_PAIRS[:3])


@pytest.fixture(scope="module")
def measured(model, recorded):
    """Every layer by itself, on all recorded calls but one."""
    from tessera import host

    return host.measure(model, MENU, recorded, host.Budget(calls=2))


def load(name, speed="auto"):
    return node("TesseraDiffusionModelLoader").execute(name, speed=speed).args[0]


def damage(model, candidate, calls):
    """Mean over calls of the squared velocity error, relative to the velocity."""
    found = []
    for call in calls:
        truth, answer = call.replay(model), call.replay(candidate)
        found.append(((answer - truth).square().sum() / (call.x - truth).square().sum()).item())
    return sum(found) / len(found)


def quantized(models, name, rules, speed="auto"):
    """The tiny model with these layers in these formats, as a job writes it, in our loader."""
    path = models / "diffusion_models" / f"{name}.safetensors"
    found = [recipe.Rule(formats.parse(word), tuple(layers), "test") for word, layers in rules.items()]
    Job(Checkpoint(comfy_host.TINY), path, recipe.Recipe(name, "", tuple(found)), settings=SWEEP).run()
    return load(path.name, speed)


def calls_of(recorded, count):
    from tessera.host import probing

    return probing._spread(sorted(recorded.probes, key=lambda call: call.position), count)


@pytest.mark.parametrize("word", ["nvfp4", "int8_convrot_256"])
@pytest.mark.parametrize("layer", SOME)
def test_a_layers_score_is_what_the_file_with_only_that_layer_quantized_does(
    models, model, recorded, measured, layer, word
):
    """Inputs are rounded where the device multiplies the format as it is stored and rounds them."""
    speed = "auto" if word.startswith("int8") else "exact"  # auto makes int8 of nvfp4 on a CPU
    candidate = quantized(models, f"only_{word}_{layer}", {word: [layer]}, speed)
    expected = damage(model, candidate, calls_of(recorded, 2))
    assert measured.damages[layer][word] == pytest.approx(expected, rel=0.02)


def test_damages_of_single_layers_add_up_to_that_of_all(models, model, recorded, measured):
    candidate = quantized(models, "all_nvfp4", {"nvfp4": list(measured.layers)})
    whole = damage(model, candidate, calls_of(recorded, 2))
    singles = sum(scores["nvfp4"] for scores in measured.damages.values())
    assert 0.7 < singles / whole < 1.4


def test_every_layer_that_may_be_packed_is_scored_in_every_format(measured):
    assert len(measured.layers) == 35 and not any("adaLN" in name or "embedder" in name for name in measured.layers)
    assert all(set(scores) == {"nvfp4", "int8_convrot_256"} for scores in measured.damages.values())
    assert all(scores["int8_convrot_256"] < scores["nvfp4"] for scores in measured.damages.values())
    assert "every layer was perturbed by itself" in measured.notes


def test_too_few_forwards_leave_the_coarsest_format_then_one_call_then_groups(model, recorded, measured):
    from tessera import host

    notes, worst = {}, {}
    for forwards in (139, 69, 25):
        found = host.measure(model, MENU, recorded, host.Budget(calls=2, forwards=forwards))
        notes[forwards] = " ".join(found.notes)
        for word in ("nvfp4", "int8_convrot_256"):
            before, after = (sum(scores[word] for scores in m.damages.values()) for m in (measured, found))
            assert 0.5 < after / before < 2
        worst[forwards] = set(sorted(found.damages, key=lambda n, m=found: m.damages[n]["nvfp4"])[-12:])
    assert "70 forwards" in notes[139] and "coarsest format only" in notes[139] and "by itself" in notes[139]
    assert "35 forwards" in notes[69] and "on 1 recorded calls" in notes[69] and "by itself" in notes[69]
    assert "20 forwards" in notes[25] and "up to 2 layers of one kind" in notes[25]
    truth = set(sorted(measured.damages, key=lambda n: measured.damages[n]["nvfp4"])[-12:])
    assert worst[139] == truth and len(worst[69] & truth) >= 10 and len(worst[25] & truth) >= 8


def test_less_time_than_any_grouping_takes_is_exceeded_as_little_as_possible(model, recorded):
    from tessera import host

    found = host.measure(model, SMALL, recorded, host.Budget(calls=2, forwards=1))
    assert any(note.startswith("15 forwards") and "on 1 recorded calls" in note for note in found.notes)


# ---- the model afterwards


def state(model):
    return {key: value.clone() for key, value in model.model.state_dict().items()}


def untouched(model, before, latent):
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not any(module._forward_hooks for module in model.model.modules())
    assert torch.equal(sample(model), latent)


class Cancelled(Exception):
    pass


def cancel_while_probing(step):
    if step.share > 0.55:
        raise Cancelled


def interrupt_while_probing(step):
    import comfy.model_management

    if step.share > 0.55:
        comfy.model_management.interrupt_current_processing(True)


def test_the_model_is_the_same_to_the_bit_afterwards(model, recorded):
    from tessera import host

    before, latent = state(model), sample(model)
    runs, tokens = recorded.runs, recorded.calibration().of(SOME[0]).tokens
    host.measure(model, SMALL, recorded, host.Budget(calls=1, forwards=15))
    untouched(model, before, latent)
    assert (recorded.runs, recorded.calibration().of(SOME[0]).tokens) == (runs, tokens)


def test_cancelling_leaves_the_model_as_it_was(model, recorded):
    import comfy.model_management

    from tessera import host

    before, latent = state(model), sample(model)
    for stop, raised in ((cancel_while_probing, Cancelled),
                         (interrupt_while_probing, comfy.model_management.InterruptProcessingException)):  # fmt: skip
        with pytest.raises(raised):
            host.measure(model, SMALL, recorded, host.Budget(calls=1), progress=stop)
        untouched(model, before, latent)


def test_progress_runs_from_start_to_end_once(model, recorded):
    from tessera import host

    steps = []
    host.measure(model, SMALL, recorded, host.Budget(calls=1, forwards=35), progress=steps.append)
    shares = [step.share for step in steps]
    assert shares == sorted(shares) and shares[0] == 0 and 0.9 < shares[-1] < 1
    assert str(steps[0]).startswith("0/35 measuring ") and "probing " in str(steps[-1])


def test_the_recording_clone_itself_can_be_planned(models):
    """Its hooks record nothing while calls are replayed."""
    recording, recorder = node("TesseraCalibrate").execute(load("tiny_to_plan.safetensors")).args
    sample(recording)
    runs = recorder.runs
    made = node("TesseraPlan").execute(
        recording, 0.009, recorder, name="of_clone", mxfp8=False, ranks="0", calls=1, minutes=0.01
    )
    assert recorder.runs == runs and made.args[0].rules


# ---- what is measured


def test_inputs_are_rounded_only_where_asked_for_or_native(model, recorded, measured):
    from tessera.host import probing

    rounds = not cpu.facts().saturates  # without VNNI int8 layers are multiplied in fp32
    assert measured.activations == ({"int8_convrot_256"} if rounds else frozenset())
    few = replace(measured, layers={name: measured.layers[name] for name in SOME[:1]}, damages={})
    found = {wish: probing.probe(model, few, recorded.probes, probing.Budget(calls=1), wish).damages[SOME[0]]
             for wish in ("auto", "on", "off")}  # fmt: skip
    assert found["on"]["nvfp4"] > 1.2 * found["off"]["nvfp4"] == 1.2 * found["auto"]["nvfp4"]
    int8 = {wish: scores["int8_convrot_256"] for wish, scores in found.items()}
    assert int8["auto"] == int8["on" if rounds else "off"] and int8["on"] > int8["off"]


def test_without_recorded_calls_layers_are_measured_by_themselves(model, recorded):
    from tessera import host

    saved = host.calibration_of(recorded)
    for given, method in ((saved, LOCAL_OUTPUT), (None, LOCAL_WEIGHT)):
        found = host.measure(model, SMALL, given)
        assert found.method.startswith(method) and PROXY in found.notes
        assert any("holds no recorded calls" in note for note in found.notes) == (given is saved)


def test_statistics_of_another_model_are_refused(model, recorded):
    from tessera import host

    other = replace(host.calibration_of(recorded), model="0" * 64)
    with pytest.raises(ValueError, match="statistics of another model"):
        host.measure(model, SMALL, other)


# ---- the node


def test_a_plan_is_saved_as_a_recipe_that_makes_a_file_of_the_planned_size(models, model, recorded):
    from tessera import host

    made = [node("TesseraPlan").execute(model, 0.0083, recorded, name="mine", calls=1, minutes=0.02) for _ in range(2)]
    assert [m.args[2] for m in made] == ["mine.toml", "mine_2.toml"]
    chosen, report, name, _ = made[0].args
    assert recipe.read(host.recipes_folder() / name).digest == chosen.digest
    assert "| layers.0.attention.qkv | " in report and "kurtosis" in report
    [said] = made[0].ui["tessera_plan"]
    target = models / "diffusion_models" / "as_planned.safetensors"
    rank = max(row["rank"] for row in said["layers"])
    work = Job(Checkpoint(comfy_host.TINY), target, chosen, models / "loras" / "as_planned_lora.safetensors", rank=rank)
    work.run()
    lora = work.lora.stat().st_size if work.lora else 0
    assert target.stat().st_size <= said["model_bytes"] and lora <= said["lora_bytes"]
    assert target.stat().st_size + lora <= 8_300_000


@pytest.mark.parametrize(("size", "error"), [(0, 0), (0.008, 0.02)])
def test_exactly_one_target_must_be_set(model, size, error):
    with pytest.raises(ValueError, match="give a target size or a target error, one of the two"):
        node("TesseraPlan").execute(model, size, target_error=error)


def test_a_size_that_cannot_be_reached_is_refused_with_the_smallest(model):
    with pytest.raises(ValueError, match=r"target size 5\.00 MB is below the smallest possible"):
        node("TesseraPlan").execute(model, 0.005)
