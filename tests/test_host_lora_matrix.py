"""Inside the real ComfyUI: every kind of LoRA, beside weights of every format, equals its change made in fp32."""

import pytest
import torch

import lora_files
import lora_models as models_
import lora_reference as reference
from comfy_host import relative

pytestmark = pytest.mark.host
STRENGTH = 0.7
ROWS = 64  # integer kernels of a CPU take as many
SHARE = {"diff of small rank": 0.021}  # may be reduced, by 2 % at most
ELSE = 0.005
ON_OUTPUT = ("oft", "boft", "dora", "glora")  # may act on the layer's output, with what its input's rounding does


class Case:
    """One model, format and loader: its layers with and without the file that holds every kind."""

    def __init__(self, models, name, format, loader):
        from tessera import host

        self.name, self.base = name, models_.load(loader, models_.file_of(models, name, format))
        self.lora, self.attached = host.attach_file(self.base, str(models_.every_kind(models, name)), STRENGTH)
        self.before = reference.weights(self.base)
        self.after = reference.changed(self.base, [(models_.every_kind(models, name), STRENGTH)], self.before)
        generator = torch.Generator().manual_seed(7)
        self.layers = [key.removesuffix(".weight") for key in self.after
                       if key.endswith(".weight") and self.after[key].ndim == 2
                       and (self._differs(key) or self._differs(f"{key.removesuffix('weight')}bias"))]  # fmt: skip
        inputs = {
            layer: torch.randn(1, ROWS, self.before[f"{layer}.weight"].shape[1], generator=generator)
            for layer in self.layers
        }
        self.without = reference.outputs(self.base, inputs)
        self.found = reference.outputs(self.lora, inputs)
        self.wanted_without = {layer: reference.product(self.before, layer, x) for layer, x in inputs.items()}
        self.wanted = {layer: reference.product(self.after, layer, x) for layer, x in inputs.items()}

    def _differs(self, key):
        return key in self.after and not torch.equal(self.after[key], self.before[key])

    def check(self, layer, kind, columns=slice(None)):
        """The layer, or some of its outputs, is as close to its truth as it was, and what came to it is right."""
        layer = f"diffusion_model.{layer}"
        found, without, wanted, wanted_without = (
            outputs[layer][..., columns] for outputs in (self.found, self.without, self.wanted, self.wanted_without)
        )
        added, delta = found - without, wanted - wanted_without
        rounding = relative(without, wanted_without)  # of the input, by the format's kernel; 0 where that decodes
        share = SHARE.get(kind, ELSE)
        size = (delta.norm() / wanted.norm()).item()
        assert size > 0.01, f"{layer}: the file changes nothing"
        assert relative(found, wanted) < 1.3 * rounding + share * size + 1e-5, layer
        carried = 1.5 * rounding if kind.startswith(ON_OUTPUT) else 0
        carried = 1.5 * rounding / size if kind == "set" else carried  # the layer's own rounding goes with its product
        assert relative(added, delta) < share + carried, layer
        least = 1 - max(0.001, carried**2)
        assert torch.cosine_similarity(added.flatten(), delta.flatten(), dim=0) > least, layer


@pytest.fixture(
    scope="module",
    params=[
        (name, format, loader) for name in models_.MODELS for format in models_.FORMATS for loader in models_.LOADERS
    ],
    ids=lambda case: "-".join(case),
)
def case(request, models):
    return Case(models, *request.param)


@pytest.mark.parametrize("kind", [*lora_files.KINDS, *lora_files.WITH_BIAS])
def test_layer_equals_decoded_weight_and_delta(case, kind):
    for layer in models_.layers_by_kind(case.name).get(kind, []):
        case.check(layer, kind)


def test_slices_of_a_fused_layer_change_their_rows_only(case):
    sliced = {}
    for kind, layer, start, rows in models_.SLICES[case.name].values():
        case.check(layer, kind, slice(start, start + rows))
        sliced.setdefault(layer, torch.ones(case.found[f"diffusion_model.{layer}"].shape[-1], dtype=torch.bool))
        sliced[layer][start : start + rows] = False
    for layer, other in sliced.items():
        layer = f"diffusion_model.{layer}"
        torch.testing.assert_close(case.found[layer][..., other], case.without[layer][..., other], rtol=0, atol=0)


def test_halves_that_a_file_keeps_the_other_way_round(case):
    """diffusers' norm_out.linear is ComfyUI's final_layer.adaLN_modulation.1 with scale and shift swapped."""
    if case.name in models_.TURNED:
        case.check("final_layer.adaLN_modulation.1", "lora")


def test_nothing_of_the_file_is_left_out(case):
    """Every layer that ComfyUI would patch is among those checked, and the summary says that nothing is ignored."""
    checked = {layer for found in models_.layers_by_kind(case.name).values() for layer in found}
    checked |= {layer for _, layer, _, _ in models_.SLICES[case.name].values()}
    checked |= {"final_layer.adaLN_modulation.1"} if case.name in models_.TURNED else set()
    assert {f"diffusion_model.{layer}" for layer in checked} == set(case.layers)
    assert "ignored" not in case.attached.text, case.attached.text


def test_whole_model_answers_like_one_with_the_changed_weights(case, models):
    """Norms and tokens, which the host patches, included."""
    call = models_.call(case.name)
    plain = models_.load("stock", models_.file_of(models, case.name, "bf16"))
    with reference.Swapped(plain, case.before):
        wanted_without = reference.answer(plain, call)
    with reference.Swapped(plain, case.after):
        wanted = reference.answer(plain, call)
    rounding = relative(reference.answer(case.base, call), wanted_without)
    assert relative(wanted, wanted_without) > 0.1
    assert relative(reference.answer(case.lora, call), wanted) < 1.5 * rounding + 0.005
