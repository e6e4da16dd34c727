"""Inside the real ComfyUI: LoRAs stack in any order, do not leak, leave nothing behind, take the memory they say."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora_files
import lora_models as models_
import lora_reference as reference
from comfy_host import node, relative, sample

pytestmark = pytest.mark.host
LAYERS = models_.BLOCKS["zimage"]
KINDS = ("lora", "lokr factored", "dora", "lora without alpha", "loha", "glora", "diff", "oft")
STRENGTHS = (0.5, -0.3, 0.8, 1.0, 0.25, 0.6, -0.7, 0.4)


@pytest.fixture(scope="module")
def stack(models):
    """Eight LoRA files of eight kinds, each on every second layer: (path, strength)."""
    own = load_file(models_.file_of(models, "zimage", "bf16"))
    return [
        (lora_files.save(
            models / "loras" / f"stack_{number}.safetensors",
            {f"diffusion_model.{layer}": (kind, own[f"{layer}.weight"]) for layer in LAYERS[number % 2 :: 2]},
            seed=100 * number,
        ), strength) for number, (kind, strength) in enumerate(zip(KINDS, STRENGTHS, strict=True))
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["ours", "stock"])
def loader(request):
    return request.param


@pytest.fixture
def model(models, loader):
    return models_.load(loader, models_.file_of(models, "zimage", "nvfp4"))


def attach(model, files):
    from tessera import host

    for path, strength in files:
        model, _ = host.attach_file(model, str(path), strength)
    return model


def inputs(model, layers=LAYERS):
    generator = torch.Generator().manual_seed(3)
    columns = {f"diffusion_model.{layer}": model.model.get_submodule(f"diffusion_model.{layer}").in_features
               for layer in layers}  # fmt: skip
    return {layer: torch.randn(1, 64, n, generator=generator) for layer, n in columns.items()}


def side_of(model):
    """The stack's branches, as the model of their own that the host sees."""
    [side] = model.get_nested_additional_models()
    return side


def stored(model):
    """Every byte of a model's weights and where it lies: {key: (address, uint8)}."""
    return {
        key: (value.data_ptr(), value.clone().contiguous().reshape(-1).view(torch.uint8))
        for key, value in model.model.state_dict().items() if not key.endswith("comfy_quant")
    }  # fmt: skip


def same(before, after):
    return before.keys() == after.keys() and all(
        before[key][0] == after[key][0] and torch.equal(before[key][1], after[key][1]) for key in before
    )


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_stack_adds_up(model, stack, count):
    """Each LoRA changes the base weight, never what another has made of it."""
    files = stack[:count]
    base = reference.weights(model)
    wanted, x = reference.changed(model, files, base), inputs(model)
    without, found = reference.outputs(model, x), reference.outputs(attach(model, files), x)
    touched = LAYERS[0::2] if count == 1 else LAYERS
    for layer in (f"diffusion_model.{layer}" for layer in touched):
        rounding = relative(without[layer], reference.product(base, layer, x[layer]))
        truth = reference.product(wanted, layer, x[layer])
        assert relative(found[layer], truth) < 1.5 * rounding + 1e-3, layer
        assert relative(without[layer], truth) > 0.02, layer


def test_order_changes_no_bit(model, stack):
    x, shuffled = inputs(model), random.Random(0).sample(stack, len(stack))
    wanted = reference.outputs(attach(model, stack), x)
    for files in (stack[::-1], shuffled):
        found = reference.outputs(attach(model, files), x)
        assert all(torch.equal(found[layer], wanted[layer]) for layer in x)
    latent = sample(attach(model, stack), steps=2)
    assert torch.equal(sample(attach(model, shuffled), steps=2), latent)


def test_one_side_model_per_stack_and_one_branch_per_layer(model, stack):
    loaded = attach(model, stack)
    reference.load(loaded)
    assert len(loaded.get_nested_additional_models()) == 1
    ours = [m for m in loaded.model.modules() if hasattr(m, "tessera_branch_pair") and m.tessera_branch_pair]
    hooked = [m for m in loaded.model.modules() if m._forward_hooks]
    assert {len(m._forward_hooks) for m in hooked} <= {1} and len(ours) + len(hooked) == len(LAYERS)
    loaded.cleanup()


def test_two_stacks_sampled_in_turn_do_not_leak(model, stack):
    """As with two samplers in one graph: three clones of one model, each as if it were alone."""
    alone = {}
    for name, files in (("a", stack[:2]), ("b", stack[2:5]), ("none", [])):
        fresh = attach(model, files)
        alone[name] = fresh, sample(fresh, steps=2)
    assert not torch.equal(alone["a"][1], alone["b"][1]) and not torch.equal(alone["a"][1], alone["none"][1])
    for name in ("b", "a", "none", "a", "none", "b"):
        clone, wanted = alone[name]
        assert torch.equal(sample(clone, steps=2), wanted), name


def test_removing_the_node_restores_every_bit(model, stack):
    before, bytes_before = sample(model, steps=2), stored(model)
    loaded = attach(model, stack)
    assert not torch.equal(sample(loaded, steps=2), before)
    assert torch.equal(sample(model, steps=2), before) and same(bytes_before, stored(model))
    loaded.detach()
    assert not any(m._forward_hooks for m in model.model.modules())
    assert not any(getattr(m, "tessera_branch_pair", None) for m in model.model.modules())


def test_a_lora_and_the_correction_add_up(models, loader, tiny, stack):
    """Both share the layer's one branch; the correction's 1.0 stays 1.0."""
    model = models_.load(loader, models / "diffusion_models" / tiny["model"])
    corrected = node("TesseraCorrectionLoRA").execute(model, tiny["lora"], 1.0).args[0]
    both = attach(corrected, stack[:1])
    base = reference.weights(model)
    x = inputs(model, [layer for layer in LAYERS if f"diffusion_model.{layer}.weight" in base])
    wanted = reference.changed(model, [stack[0], (models / "loras" / tiny["lora"], 1.0)], base)
    without, found = reference.outputs(model, x), reference.outputs(both, x)
    for layer in x:
        rounding = relative(without[layer], reference.product(base, layer, x[layer]))
        assert relative(found[layer], reference.product(wanted, layer, x[layer])) < 1.5 * rounding + 1e-3, layer
    turned = node("TesseraCorrectionLoRA").execute(attach(model, stack[:1]), tiny["lora"], 1.0).args[0]
    again = reference.outputs(turned, x)
    assert all(torch.equal(again[layer], found[layer]) for layer in x)
    assert len(both.get_nested_additional_models()) == 1


@pytest.fixture
def calls(monkeypatch):
    """Counts what the host would do to change a weight or to load a model again."""
    import comfy.lora
    import comfy.model_patcher

    found = Counter()

    def count(owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            found[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for name in ("load", "patch_weight_to_device", "partially_unload"):
        count(comfy.model_patcher.ModelPatcher, name)
    count(comfy.model_patcher.LowVramPatch, "__call__")
    count(comfy.lora, "calculate_weight")
    count(torch.nn.Module, "load_state_dict")
    return found


def test_a_strength_change_writes_no_byte_and_loads_nothing(model, stack, calls):
    """By a node, which makes another clone; and by a schedule, which writes the strengths of the clone that runs."""
    from tessera.host import stacking

    first = attach(model, stack)
    latent, before = sample(first, steps=2), stored(first)
    factors = stored(side_of(first))
    assert calls["load"] > 0  # the counter counts
    calls.clear()
    moved = attach(model, [(path, strength / 2) for path, strength in stack])
    changed = sample(moved, steps=2)
    assert not torch.equal(changed, latent)
    assert not calls, calls
    moved.get_attachment(stacking.STACK).strengths.set([0.0] * len(stack))
    assert not torch.equal(sample(moved, steps=2), changed)
    assert not calls, calls
    assert same(before, stored(moved)) and same(factors, stored(side_of(moved)))
    assert torch.equal(sample(attach(model, stack), steps=2), latent)


def test_a_strength_change_compiles_nothing_again(model, stack):
    """A whole feed-forward block as one graph: gate, siblings that share their input, three branches."""
    from torch._dynamo.testing import CompileCounterWithBackend

    from tessera.host import stacking

    loaded = attach(model, [(path, strength) for path, strength in stack if "stack_6" not in path.name])
    reference.load(loaded)
    block, x = loaded.model.get_submodule("diffusion_model.layers.0.feed_forward"), torch.randn(1, 64, 256)
    strengths = loaded.get_attachment(stacking.STACK).strengths
    full = list(strengths.values)
    eager = {}
    for factor in (1.0, 0.5, -2.0):
        strengths.set([factor * value for value in full])
        eager[factor] = block(x)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(block, backend=counter)
    strengths.set(full)
    compiled(x)
    graphs = counter.frame_count
    for factor, wanted in eager.items():
        strengths.set([factor * value for value in full])
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == graphs
    loaded.detach()


def test_memory_planned_is_memory_used(model, stack):
    """What the host plans for a stack is every byte of its joined factors; once loaded it counts all of them."""
    import comfy.model_management

    loaded = attach(model, stack)
    side = side_of(loaded)
    planned = side.model_size()
    base = model.model_size()
    comfy.model_management.unload_all_models()
    before = {id(m) for m in comfy.model_management.current_loaded_models}
    comfy.model_management.load_models_gpu([side])
    assert len(side.model.items) == len(LAYERS)  # joined in time to be loaded, wherever that is
    reference.load(loaded)
    kept = {id(t): t for module in side.model.modules() for t in (*module.parameters(), *module.buffers())}
    assert planned == sum(t.nbytes for t in kept.values()) == side.loaded_size()
    joined = [t for layer in loaded.model.modules() for t in _factors(layer)]
    assert {t.data_ptr() for t in joined} <= {t.data_ptr() for t in kept.values()}  # nothing lies beside what counts
    new = [m for m in comfy.model_management.current_loaded_models if id(m) not in before]
    assert sum(m.model_memory() for m in new) == base + planned == sum(m.model_loaded_memory() for m in new)
    assert {t.device for t in kept.values()} == {loaded.load_device}
    loaded.cleanup()


def _factors(layer):
    branch, _ = getattr(layer, "tessera_branch_pair", None) or (None, None)
    return [] if branch is None else list(branch.parameters())


def test_only_the_last_stack_of_a_chain_is_joined(model, stack):
    """Nodes build up eight stacks, one on the other; what does not run takes no memory."""
    from tessera.host import stacking

    loaded = attach(model, stack)
    reference.load(loaded)
    made = stacking.kept(model).stacks.values()
    assert [len(kept.side.model.items) > 0 for kept in made] == [False] * (len(stack) - 1) + [True]


def test_a_model_remembers_the_last_stacks_only(model, stack):
    """However many combinations are tried."""
    from tessera.host import stacking

    for size in range(1, 9):
        for start in range(8):
            attach(model, [stack[(start + n) % 8] for n in range(size)])
    assert len(stacking.kept(model).stacks) == stacking.MOST_KEPT


def test_plain_loras_take_the_bytes_of_their_file(model, stack):
    """Joining adds nothing: the factors of a stack of pairs as large as in their files."""
    plain = [stack[0], stack[3]]
    files = sum(t.nbytes for path, _ in plain for t in load_file(path).values() if t.ndim == 2)
    assert side_of(attach(model, plain)).model_size() == files


def offload(monkeypatch, state, free):
    """Has the host treat this CPU as a device of `free` bytes in that VRAM state: its own loading decides the rest."""
    import comfy.model_management as management

    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "vram_state", state)
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
    asked = management.get_free_memory

    def get_free_memory(device=None, torch_free_too=False):  # attention wants both, and may have them: same chunks
        return asked(device, True) if torch_free_too else free

    monkeypatch.setattr(management, "get_free_memory", get_free_memory)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("state", ["LOW_VRAM", "NO_VRAM"])
def test_layers_offloaded_by_load_models_gpu_give_the_same_bits(model, stack, monkeypatch, state, share):
    """--lowvram and --novram decide by the same states; a CPU cannot take the flags, so they are set before loading."""
    import comfy.model_management as management

    loaded = attach(model, stack)
    wanted = sample(loaded, steps=2)
    management.unload_all_models()
    size = loaded.model_size() + side_of(loaded).model_size()
    with monkeypatch.context() as patch:
        offload(patch, management.VRAMState[state], int(share * size))
        assert torch.equal(sample(loaded, steps=2), wanted)
        lowered = [m for m in loaded.model.modules() if hasattr(m, "prev_comfy_cast_weights")]
        assert loaded.model.model_lowvram and len(lowered) >= len(LAYERS) // 2
        if state == "NO_VRAM":
            assert loaded.loaded_size() < 0.1 * loaded.model_size()
    management.unload_all_models()
    assert torch.equal(sample(loaded, steps=2), wanted)


RUN = """
import sys
from pathlib import Path
import os
sys.path[:0] = [os.environ["COMFYUI_PATH"], {tests!r}]
sys.argv = ["main.py", "--cpu", *{flags!r}, "--base-directory", {base!r}]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.cli_args
import conftest, comfy_host, torch
argv = sys.argv
comfy_host.start(Path({base!r}))
import folder_paths
folder_paths.add_model_folder_path("diffusion_models", {models!r})
import lora_models
from tessera import host
from comfy.cli_args import args
assert all(getattr(args, flag.strip("-").replace("-", "_")) for flag in {flags!r})
with torch.inference_mode():
    found = {{}}
    for loader in ("ours", "stock"):
        model = lora_models.load(loader, Path({model!r}))
        for path, strength in {files!r}:
            model, _ = host.attach_file(model, path, strength)
        found[loader] = comfy_host.sample(model, steps=2)
torch.save(found, {target!r})
"""


@pytest.mark.parametrize("flags", [["--disable-dynamic-vram"]], ids=" ".join)
def test_a_host_started_with_flags_a_cpu_takes_gives_the_same_bits(models, stack, tmp_path, flags):
    path = models_.file_of(models, "zimage", "nvfp4")
    wanted = {loader: sample(attach(models_.load(loader, path), stack[:3]), steps=2) for loader in ("ours", "stock")}
    target = tmp_path / "found.pt"
    script = RUN.format(tests=str(Path(__file__).parent), flags=flags, base=str(tmp_path / "base"),
                        models=str(path.parent), model=str(path), target=str(target),
                        files=[(str(p), s) for p, s in stack[:3]])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(target, weights_only=True)
    for loader in wanted:
        assert torch.equal(found[loader], wanted[loader]), loader
