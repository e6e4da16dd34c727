"""Inside the real ComfyUI: recording changes no picture, and what is recorded is what the layers saw."""

import gc
import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch

import comfy_host
from comfy_host import CALIBRATION_PAIRS, PROMPTS, node, sample
from host_server import HostError, HostServer
from tessera.checkpoint import Checkpoint
from tessera.quantization.calibration import Accumulator, fingerprint
from test_host_clip import LAYERS, LINEARS, TEXT, encode, encoder, stock  # noqa: F401 a fixture

pytestmark = pytest.mark.host
TESTS = Path(__file__).resolve().parent
STEPS = 3
CLOSE = 1e-5
BLOCKS = [
    *(f"{kind}_refiner.{i}" for kind in ("context", "noise") for i in range(2)),
    *(f"layers.{i}" for i in range(3)),
]


def relative(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.fixture(scope="module")
def model(tiny):
    return node("TesseraDiffusionModelLoader").execute(tiny["bf16"]).args[0]


def calibrate(model, **options):
    """(recording MODEL, recorder) from the node."""
    return node("TesseraCalibrate").execute(model, **options).args


def recorded(model, *prompts, steps=STEPS, **options):
    recording, recorder = calibrate(model, **options)
    for seed, text in enumerate(prompts or PROMPTS[:1]):
        sample(recording, text, seed, steps)
    return recorder


class Captured:
    """Every input of every linear layer, kept whole by plain hooks."""

    def __init__(self, model, run):
        self.calls, handles = {}, []
        for name, module in model.model.diffusion_model.named_modules():
            if hasattr(module, "in_features"):
                handles.append(module.register_forward_pre_hook(self._hook(name)))
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name):
        return lambda module, inputs: self.calls.setdefault(name, []).append(inputs[0].clone())

    def rows(self, name):
        return [x.reshape(-1, x.shape[-1]) for x in self.calls[name]]


def hooks_of(model):
    """How many forward hooks hang on a MODEL's layers."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.model.diffusion_model.modules())


@pytest.fixture(scope="module")
def seen(model):
    """(recorder of two prompts, all inputs of the same two runs)."""
    truth = Captured(model, lambda: [sample(model, text, seed, STEPS) for seed, text in enumerate(PROMPTS[:2])])
    return recorded(model, *PROMPTS[:2]), truth


def test_statistics_are_those_of_the_captured_inputs(seen):
    recorder, truth = seen
    calibration = recorder.calibration()
    assert calibration.layers.keys() == truth.calls.keys() and len(calibration.layers) == 46
    for layer in calibration.layers:
        statistics, rows = calibration.of(layer), [x.double() for x in truth.rows(layer)]
        weights = [1 / x.square().mean() for x in rows]
        total = sum(w * len(x) for w, x in zip(weights, rows, strict=True))
        second = sum(w * x.T @ x for w, x in zip(weights, rows, strict=True)) / total
        mean = sum(w * x.sum(0) for w, x in zip(weights, rows, strict=True)) / total
        assert statistics.tokens == sum(map(len, rows)) and statistics.skipped == 0
        assert relative(statistics.second, second) < CLOSE and relative(statistics.mean, mean) < CLOSE
        assert torch.equal(statistics.amax, torch.cat(truth.rows(layer)).abs().amax(0))


def test_every_step_has_the_same_share_of_a_site(seen):
    recorder, truth = seen
    rows = truth.rows("layers.1.attention.qkv")
    powers = [x.square().mean().item() for x in rows]
    assert max(powers) > 1.5 * min(powers)  # there is something to level
    second = recorder.calibration().of("layers.1.attention.qkv").second.double()
    levelled = sum(x.double().T @ x.double() / p for x, p in zip(rows, powers, strict=True))
    assert relative(second / second.trace(), levelled / levelled.trace()) < CLOSE


def test_layers_with_one_input_share_its_statistics(seen):
    layers = seen[0].calibration().layers
    for block in BLOCKS:
        assert layers[f"{block}.feed_forward.w3"] == layers[f"{block}.feed_forward.w1"] == f"{block}.feed_forward.w1"
        for own in ("attention.qkv", "attention.out", "feed_forward.w2"):
            assert layers[f"{block}.{own}"] == f"{block}.{own}"
    modulated = {layers[f"{block}.adaLN_modulation.0"] for block in BLOCKS[2:]}
    assert len(modulated) == 1  # the timestep's embedding, one row a call
    assert seen[0].calibration().of("layers.0.adaLN_modulation.0").tokens == 2 * STEPS


def test_two_runs_accumulate(seen, model):
    one, two = recorded(model, PROMPTS[0]).calibration(), seen[0].calibration()
    assert (one.runs, two.runs) == (STEPS, 2 * STEPS)
    assert two.of("layers.0.attention.qkv").tokens == 2 * one.of("layers.0.attention.qkv").tokens
    assert one.digest() != two.digest()


def test_the_same_runs_give_the_same_numbers(model):
    found = [recorded(model, steps=2, tokens=40, seed=seed).calibration() for seed in (0, 0, 1)]
    assert found[0].digest() == found[1].digest() != found[2].digest()
    assert found[0].of("layers.0.attention.qkv").tokens == 2 * 40


def test_sampling_is_the_same_to_the_bit(model):
    expected = sample(model, steps=STEPS)
    recording, recorder = calibrate(model)
    assert torch.equal(sample(recording, steps=STEPS), expected)
    assert recorder.runs == STEPS
    assert torch.equal(sample(model, steps=STEPS), expected)


def test_only_the_recording_clone_records(model):
    recording, recorder = calibrate(model)
    sample(recording, steps=1)
    sample(model, steps=2)
    assert recorder.runs == 1
    sample(recording.clone(), steps=1)
    sample(recording, steps=1)
    assert recorder.runs == 3 and recorder.calibration().of("layers.0.attention.qkv").tokens == 3 * 96


def test_two_recordings_stack(model):
    first, one = calibrate(model)
    second, two = calibrate(first)
    sample(second, steps=2)
    sample(first, steps=1)
    assert (one.runs, two.runs) == (3, 2)


def test_deep_clone_records_too(model):
    recording, recorder = calibrate(model)
    deep = recording.deepclone_multigpu(recording.load_device) if hasattr(recording, "deepclone_multigpu") else None
    assert deep is not None and deep.model is not model.model
    sample(deep, steps=1)
    assert recorder.runs == 1 and recorder.calibration().of("layers.0.attention.qkv").tokens == 96


def test_batch_of_prompt_and_negative_prompt_is_recorded_whole(model):
    import nodes

    recording, recorder = calibrate(model)
    positive, negative = comfy_host.prompt(PROMPTS[0]), comfy_host.prompt(PROMPTS[1])
    empty = {"samples": torch.zeros(1, 16, 16, 16)}
    nodes.common_ksampler(recording, 5, 1, 3.0, "euler", "simple", positive, negative, empty)
    calibration = recorder.calibration()
    assert calibration.of("layers.0.attention.qkv").tokens == 2 * 96
    assert calibration.of("layers.0.adaLN_modulation.0").tokens == 2
    assert calibration.layers["layers.0.feed_forward.w3"] == "layers.0.feed_forward.w1"


def test_memory_that_is_said_is_memory_that_is_held(seen):
    recorder = seen[0]
    held = sum(Accumulator.cost(s.in_features, s.moment().kind) for s in recorder.calibration().sites.values())
    tensors = {}
    for site in recorder._sites.values():
        found = vars(site.accumulator)
        for tensor in (found["_sum"], found["_amax"], found["_second"], *found["_noise"].values()):
            tensors[tensor.data_ptr()] = tensor.nbytes
    samples = sum(512 * 2 * s.in_features for s in recorder.calibration().sites.values())
    assert held == sum(tensors.values()) + samples
    assert recorder.nbytes == held + sum(probe.nbytes for probe in recorder.probes)
    assert held <= recorder.most() <= recorder.limit


def test_what_does_not_fit_becomes_blocks(model):
    full = recorded(model, steps=1)
    limited = recorded(model, steps=1, memory_gb=0.03)
    assert limited.nbytes - sum(p.nbytes for p in limited.probes) <= 0.03e9 < full.nbytes
    calibration = limited.calibration()
    assert {s.moment().kind for s in calibration.sites.values()} == {"block"}
    assert any("second moments are block" in note for note in calibration.notes)
    qkv = full.calibration().of("layers.0.attention.qkv").moment().blocks_only().matrix
    assert relative(calibration.of("layers.0.attention.qkv").second, qkv) < CLOSE


def test_released_clones_leave_neither_hooks_nor_models(tiny):
    loaded = node("TesseraDiffusionModelLoader").execute(tiny["bf16"]).args[0]
    sample(loaded, steps=1)
    before = hooks_of(loaded)
    recording, recorder = calibrate(loaded)
    sample(recording, steps=1)
    assert hooks_of(loaded) > before
    clone = weakref.ref(recording)
    del recording
    gc.collect()
    assert clone() is None
    sample(loaded, steps=1)
    assert hooks_of(loaded) == before and recorder.runs == 1
    weights = weakref.ref(loaded.model)
    del loaded
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    assert weights() is None and recorder.calibration().sites  # the recorder kept nothing of the model


def test_fingerprint_of_a_model_is_that_of_its_file(model):
    assert recorded(model, steps=1).calibration().model == fingerprint(Checkpoint(comfy_host.TINY))


def test_a_quantized_model_is_refused(tiny):
    quantized = node("TesseraDiffusionModelLoader").execute(tiny["model"]).args[0]
    with pytest.raises(ValueError, match=r"is already quantized .*; quantize from the original file"):
        calibrate(quantized)


# Probe calls


def test_probe_calls_spread_over_steps_and_runs(model):
    cheap = {"steps": 8, "moment": "diagonal", "tokens": 16}
    recorder = recorded(model, *PROMPTS[:3], **cheap)
    positions = sorted(probe.position for probe in recorder.probes)
    assert len(positions) == 6 and {int(6 * p) for p in positions} >= {0, 2, 4, 5}
    assert len({probe.run for probe in recorder.probes}) > 1
    again = recorded(model, *PROMPTS[:3], **cheap)
    assert [(p.run, p.position) for p in again.probes] == [(p.run, p.position) for p in recorder.probes]
    assert not recorded(model, steps=1, probes=0).probes


def test_replay_is_what_the_sampler_got(model):
    answers = []
    recording, recorder = calibrate(model, probes=8)
    recording.set_model_unet_function_wrapper(
        lambda apply, call: (
            answers.append((call["input"].clone(), apply(call["input"], call["timestep"], **call["c"])))
            or answers[-1][1]
        )
    )
    sample(recording, steps=8)
    runs, tokens = recorder.runs, recorder.calibration().of("layers.0.attention.qkv").tokens
    assert len(recorder.probes) == 8
    for probe, (x, answer) in zip(recorder.probes, answers, strict=True):
        assert torch.equal(probe.x, x)
        assert torch.equal(probe.replay(model), answer) and torch.equal(probe.replay(recording), answer)
    assert recorder.runs == runs and recorder.calibration().of("layers.0.attention.qkv").tokens == tokens


def test_replay_puts_the_call_to_another_model(model, tiny):
    (probe,) = recorded(model, steps=1, probes=1).probes
    quantized = node("TesseraDiffusionModelLoader").execute(tiny["model"]).args[0]
    truth, found = probe.replay(model), probe.replay(quantized)
    wanted = (probe.x - truth) / probe.sigma
    error = relative((probe.x - found) / probe.sigma, wanted)
    assert 0.005 < error < 0.2


# Nodes


def saving(recorder, filename="calibration"):
    return node("TesseraSaveCalibration").execute(recorder, None, filename).args


def test_saved_calibration_loads_with_the_same_numbers(seen):
    recorder, name = saving(seen[0])
    (loaded,) = node("TesseraLoadCalibration").execute(name).args
    assert recorder is seen[0] and loaded.digest() == recorder.calibration().digest()
    assert loaded.layers == recorder.calibration().layers and loaded.notes == recorder.calibration().notes


def test_saving_numbers_its_files(seen):
    names = [saving(seen[0], "below/mine")[1] for _ in range(2)]
    assert names == ["below/mine_00001.safetensors", "below/mine_00002.safetensors"]
    choices = node("TesseraLoadCalibration").define_schema().inputs[0].options
    assert set(names) <= set(choices)


def test_saving_before_sampling_is_refused(model):
    with pytest.raises(ValueError, match="nothing was recorded yet: connect the sampler's output through"):
        saving(calibrate(model)[1])


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside"])
def test_a_name_outside_the_folder_is_refused(seen, name):
    with pytest.raises(ValueError, match="leaves the folder"):
        saving(seen[0], name)


def test_a_calibration_that_is_gone_is_refused():
    with pytest.raises(ValueError, match=r"gone\.safetensors: no such calibration"):
        node("TesseraLoadCalibration").execute("gone.safetensors")


def test_helper_of_other_tests_records_their_prompts(model):
    calibration = comfy_host.calibrate(model, CALIBRATION_PAIRS[:2])
    assert calibration.runs == 2 * comfy_host.STEPS and not set(PROMPTS) & {text for text, _ in CALIBRATION_PAIRS}


# Text encoders


@pytest.fixture(scope="module")
def clip(encoder):  # noqa: F811 a fixture
    return stock(encoder)


def test_text_encoder_is_recorded_while_it_encodes_the_same(clip, encoder):  # noqa: F811 a fixture
    expected = encode(clip)
    recording, recorder = node("TesseraCalibrateCLIP").execute(clip).args
    assert torch.equal(encode(recording), expected)
    once = recorder.calibration()
    assert once.model == fingerprint(Checkpoint(encoder)) and once.runs == 1 and not recorder.probes
    assert set(once.layers) == {f"model.layers.{i}.{name}" for i in range(LAYERS) for name in LINEARS}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        assert {once.layers[f"{layer}.self_attn.{kind}_proj"] for kind in "qkv"} == {f"{layer}.self_attn.q_proj"}
        assert {once.layers[f"{layer}.mlp.{kind}_proj"] for kind in ("gate", "up")} == {f"{layer}.mlp.gate_proj"}
    tokens = once.of("model.layers.0.mlp.down_proj").tokens
    assert tokens >= len(TEXT.split())
    encode(recording)
    encode(clip)
    assert recorder.runs == 2 and recorder.calibration().of("model.layers.0.mlp.down_proj").tokens == 2 * tokens
    assert "fewer tokens than channels" in recorder.calibration().notes[0]


def test_text_encoders_calibration_is_saved_after_its_conditioning(clip):
    recording, recorder = node("TesseraCalibrateCLIP").execute(clip).args
    conditioning = encode(recording)
    _, name = node("TesseraSaveCalibration").execute(recorder, conditioning, "encoder").args
    (loaded,) = node("TesseraLoadCalibration").execute(name).args
    assert loaded.digest() == recorder.calibration().digest()


# Over HTTP, as a user runs it


@pytest.fixture(scope="module")
def host():
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: run scripts/test, or scripts/setup_host.py")
    with HostServer({"tiny": TESTS / "tiny" / "node_pack"}, cpu=True) as server:
        shutil.copy(comfy_host.TINY, server.models("diffusion_models") / "tiny.safetensors")
        yield server


def workflow(text=PROMPTS[0], seed=5, after=("sample", 0)):
    def entry(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    sampler = {"seed": seed, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {
        "save": entry("TesseraSaveCalibration", calibration=["calibrate", 1], after=list(after), filename="graph"),
        "load": entry("TesseraDiffusionModelLoader", unet_name="tiny.safetensors", weight_dtype="default"),
        "calibrate": entry("TesseraCalibrate", model=["load", 0]),
        "prompt": entry("TinyPrompt", text=text),
        "latent": entry("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "sample": entry("KSampler", model=["calibrate", 0], positive=["prompt", 0], negative=["prompt", 0],
                        latent_image=["latent", 0], **sampler),
    }  # fmt: skip


def test_saving_waits_for_the_sampler_and_runs_again_with_it(host):
    folder = host.base / "user" / "tessera" / "calibrations"
    first = host.run(workflow())
    assert "graph_00001.safetensors" in first["outputs"]["save"]["text"][0]
    assert "2 model calls, 46 layers, 35 inputs" in first["outputs"]["save"]["text"][0]
    host.run(workflow())  # nothing changed: all cached
    assert [path.name for path in folder.iterdir()] == ["graph_00001.safetensors"]
    since = len(host.events)
    second = host.run(workflow(PROMPTS[1]))
    ran = [e["data"]["node"] for e in host.events[since:] if e["type"] == "executing" and e["data"]["node"]]
    assert ran == ["prompt", "sample", "save"]
    assert "4 model calls" in second["outputs"]["save"]["text"][0]  # the second prompt was added to the first
    assert sorted(path.name for path in folder.iterdir()) == ["graph_00001.safetensors", "graph_00002.safetensors"]
    texts = host.progress_texts("calibrate")
    assert any(text.startswith("46 layers, at most 0.04 of ") for text in texts)


def test_saving_without_a_sampler_says_what_to_connect(host):
    with pytest.raises(HostError, match="nothing was recorded yet: connect the sampler's output through"):
        host.run(workflow(seed=99, after=("latent", 0)) | {"calibrate": {
            "class_type": "TesseraCalibrate", "inputs": {"model": ["load", 0], "seed": 3}}})  # fmt: skip


def test_saved_calibration_is_offered_by_the_loader(host):
    host.run(workflow())
    choices = json.dumps(host.object_info("TesseraLoadCalibration")["input"]["required"]["calibration_name"])
    assert "graph_00001.safetensors" in choices

    def load(name):
        return {"class_type": "TesseraLoadCalibration", "inputs": {"calibration_name": name}}

    def save(loaded, name):
        inputs = {"calibration": loaded, "after": loaded, "filename": name}
        return {"class_type": "TesseraSaveCalibration", "inputs": inputs}

    host.run({"load": load("graph_00001.safetensors"), "save": save(["load", 0], "again"),
              "linked": load(["save", 1]), "last": save(["linked", 0], "last")})  # fmt: skip
    folder = host.base / "user" / "tessera" / "calibrations"
    first, again, last = ((folder / f"{name}_00001.safetensors").read_bytes() for name in ("graph", "again", "last"))
    assert first == again == last
