"""Inside the real ComfyUI: steps in full precision between steps on the fast kernels, over the same weights."""

import pytest
import torch

from comfy_host import STEPS, TINY, node, relative, sample

pytestmark = pytest.mark.host
LAYER = "diffusion_model.layers.0.feed_forward.w1"


@pytest.fixture(scope="module")
def names(models, tiny):
    """File names: one that this device multiplies as it is (int8), one that it must transcode (nvfp4)."""
    from tessera.checkpoint import Checkpoint
    from tessera.job import Job
    from tessera.quantization import recipe

    target = models / "diffusion_models" / "tiny_int8.safetensors"
    lora = models / "loras" / "tiny_int8_lora.safetensors"
    if not target.exists():
        Job(Checkpoint(TINY), target, recipe.builtin("int8_convrot"), lora).run()
    return {"int8": target.name, "nvfp4": tiny["model"]}


def load(name, speed="auto"):
    return node("TesseraDiffusionModelLoader").execute(name, speed=speed).args[0]


def schedule(model, first, last):
    return node("TesseraPrecisionSchedule").execute(model, first, last).args[0]


class Asked:
    """Asks a model what it answers at every step of a run, and follows another model's answers."""

    def __init__(self, truth=None):
        self.truth, self.calls, self.answers = truth, [], []

    def __call__(self, apply, call):
        answer = apply(call["input"], call["timestep"], **call["c"])
        self.answers.append(answer.clone())
        if self.truth is None:
            self.calls.append(call["input"].clone())
            return answer
        return self.truth[len(self.answers) - 1]


def answers(model, truth=None, sampler=sample, **options):
    """What a model says at each call of a run, whose inputs are those of the run that said `truth`."""
    asked, clone = Asked(truth), model.clone()
    clone.set_model_unet_function_wrapper(asked)
    sampler(clone, **options)
    return asked.answers


def equal(found, expected):
    return [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]


def runs(model):
    """Calls of every planned layer by how they were counted."""
    return {name: dict(m.tessera_runs) for name, m in model.model.named_modules() if getattr(m, "tessera_runs", None)}


def test_exact_steps_are_those_of_speed_exact_and_others_the_fast_ones(names):
    exact = answers(load(names["int8"], "exact"))
    model = load(names["int8"])
    fast = answers(model, exact)
    assert not any(equal(fast, exact))
    found = answers(schedule(model, 2, 1), exact)
    wanted = [True, True, *[False] * (STEPS - 3), True]
    assert equal(found, exact) == wanted
    assert equal(found, fast) == [not same for same in wanted]


def test_transcoded_layers_are_nearer_to_exact_in_exact_steps(names):
    exact = answers(load(names["nvfp4"], "exact"))
    model = load(names["nvfp4"])
    fast, whole = (answers(m, exact) for m in (model, schedule(model, STEPS, 0)))
    far, near = ([relative(a, b) for a, b in zip(run, exact, strict=True)] for run in (fast, whole))
    assert sum(near) < 0.9 * sum(far)
    half = answers(schedule(model, 0, 4), exact)
    assert equal(half, fast) == [True] * 4 + [False] * 4
    assert equal(half, whole) == [False] * 4 + [True] * 4


def test_kernels_of_both_plans_are_counted(names):
    model = load(names["nvfp4"])
    sample(schedule(model, 2, 1))
    counted = list(runs(model).values())
    (kernel,) = {plan.kernel for _, plan in plans(model)}
    assert len(counted) == 28 and all(c == {kernel: STEPS - 3, "decoded, exact step": 3} for c in counted)
    text = node("TesseraInspect").execute(model).args[0]
    assert "ran decoded, exact step: 84 calls in 28 layers" in text and "not as planned" not in text


def plans(model):
    from tessera import host

    return host.plans(model).values()


def test_nothing_is_loaded_or_rewritten(names, monkeypatch):
    import comfy.model_patcher
    import comfy.utils

    model = load(names["nvfp4"])
    sample(model)
    weight = model.model.get_submodule(LAYER).weight
    before = weight._qdata.data_ptr(), weight._qdata.clone()
    clones = [schedule(model, 1, 0), schedule(model, 0, 3)]
    monkeypatch.setattr(comfy.utils, "load_torch_file", lambda *_, **__: pytest.fail("read a file"))
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", lambda *_, **__: pytest.fail("loaded a model"))
    for clone in clones:
        sample(clone)
    now = model.model.get_submodule(LAYER).weight
    assert now is weight and now._qdata.data_ptr() == before[0] and torch.equal(now._qdata, before[1])


def test_clones_are_independent(names):
    model = load(names["int8"])
    base = sample(model)
    early, late = schedule(model, 2, 0), schedule(model, 0, 2)
    found = [sample(m) for m in (early, late, model, early, late)]
    assert torch.equal(found[0], found[3]) and torch.equal(found[1], found[4]) and torch.equal(found[2], base)
    assert not torch.equal(found[0], base) and not torch.equal(found[0], found[1])
    assert torch.equal(sample(schedule(early, 0, 0)), base)  # the last node counts
    assert torch.equal(sample(schedule(early, 0, 2)), found[1])


def test_a_call_that_fails_leaves_the_fast_plan(names):
    model = load(names["int8"])
    base, clone = sample(model), schedule(model, 1, 0)

    def failing(*_):
        raise RuntimeError("cancelled")

    handle = model.model.get_submodule(LAYER).register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="cancelled"):
        sample(clone)
    handle.remove()
    assert torch.equal(sample(model), base)


def test_branches_run_in_both_plans(names, tiny):
    exact = load(names["nvfp4"], "exact")
    corrected = node("TesseraCorrectionLoRA").execute(load(names["nvfp4"]), tiny["lora"], 1.0).args[0]
    whole = schedule(corrected, STEPS, 0)
    truth = answers(node("TesseraCorrectionLoRA").execute(exact, tiny["lora"], 1.0).args[0])
    without = answers(exact, truth)
    found = answers(whole, truth)
    for answer, wanted, plain in zip(found, truth, without, strict=True):
        assert relative(answer, wanted) < 0.5 * relative(plain, wanted)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "res_multistep"])
def test_a_call_belongs_to_the_step_it_lies_in(names, sampler):
    """Samplers of second order call twice in a step; heun's second call is where the next step begins."""

    def run(model):
        import nodes

        from comfy_host import prompt

        empty = {"samples": torch.zeros(1, 16, 16, 16)}
        return nodes.common_ksampler(model, 5, 4, 1.0, sampler, "simple", prompt("big red star"), prompt(""), empty)

    model = load(names["int8"])
    truth = answers(model, sampler=run)
    found = equal(answers(schedule(model, 1, 1), truth, sampler=run), truth)
    expected = {
        "euler": [False, True, True, False], "res_multistep": [False, True, True, False],
        "dpm_2": [False, False, True, True, True, True, False], "heun": [False, True, True, True, True, False, False],
    }  # fmt: skip
    assert found == expected[sampler]


def test_a_model_of_another_loader_is_refused_with_what_to_do(names):
    import nodes

    stock = nodes.UNETLoader().load_unet(names["nvfp4"], "default")[0]
    with pytest.raises(ValueError, match=r"28 quantized layers .*load the file with Load Diffusion Model \(Tessera\)"):
        schedule(stock, 1, 1)


@pytest.mark.parametrize(("speed", "said"), [("exact", "every step is exact as it is"), ("", "no quantized layers")])
def test_a_model_that_is_exact_anyway_passes_with_a_word(names, tiny, caplog, speed, said):
    model = load(names["nvfp4"], speed) if speed else load(tiny["bf16"])
    with caplog.at_level("INFO", "tessera"):
        found = schedule(model, 1, 1)
    assert said in caplog.text and torch.equal(sample(found), sample(model))


def test_a_compiled_layer_has_one_graph_for_each_plan(names):
    from torch._dynamo.testing import CompileCounterWithBackend

    from tessera.host.precision import exactly

    model = load(names["nvfp4"])
    sample(model, steps=1)
    layer, x = model.model.get_submodule(LAYER), torch.randn(1, 64, 256)
    graphs = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled, fast = torch.compile(layer, backend=graphs, fullgraph=True), layer(x)
    with exactly(model.model):
        exact = layer(x)
    for _ in range(2):
        assert torch.equal(compiled(x), fast)
        with exactly(model.model):
            assert torch.equal(compiled(x), exact)
    assert graphs.frame_count == 2 and not torch.equal(fast, exact)
