"""A LoRA file of any kind in any spelling becomes the changes that ComfyUI makes of it; a damaged one is refused."""

import io
import itertools
import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapting import KINDS, boft, glora, loha, lokr, lora, oft, random
from tessera import lora as lora_files

OUT, IN = 24, 16
SPELLINGS = {  # up, down; those of ComfyUI
    "kohya": (".lora_up.weight", ".lora_down.weight"),
    "diffusers": ("_lora.up.weight", "_lora.down.weight"),
    "PEFT": (".lora_B.weight", ".lora_A.weight"),
    "diffusers with a dot": (".lora.up.weight", ".lora.down.weight"),
    "PEFT without weight": (".lora_B", ".lora_A"),
    "transformers": (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    "PEFT with its adapter's name": (".lora_B.default.weight", ".lora_A.default.weight"),
}
OURS = {  # and others that are met
    "kohya without weight": (".lora_up", ".lora_down"),
    "PEFT with its adapter's name, without weight": (".lora_B.default", ".lora_A.default"),
    "two spellings": (".lora_up.weight", ".lora_A.weight"),
}
BASES = ["diffusion_model.layers.0.attention.qkv", "lora_unet_layers_0_w1", "transformer.blocks.0.to_q", "layers.0.w1",
         "lycoris_layers_0_w1", "lora_te_text_model_encoder_layers_0_mlp_fc1", "base_model.model.blocks.0.w",
         "unet.down_blocks.0.attn.processor.to_q"]  # fmt: skip
BASE = BASES[0]
UP, DOWN = random(OUT, 4), random(4, IN)
EXTRA = {  # what may stand beside each kind, so that the host and we see it too
    "alpha": {".alpha": torch.tensor(2.0)},
    "DoRA": {".alpha": torch.tensor(2.0), ".dora_scale": random(OUT, 1)},
    "a bias": {".diff_b": random(OUT)},
}


def save(path, tensors):
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path)
    return path


def read(tmp_path, tensors, rename=None):
    return lora_files.read_adapters(save(tmp_path / "a.safetensors", tensors), rename)


def at(base, suffixes):
    return {base + suffix: tensor for suffix, tensor in suffixes.items()}


# ---- what is found


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("spelling", [*SPELLINGS, *OURS])
def test_every_spelling_is_the_same_lora(tmp_path, spelling, base):
    up, down = (SPELLINGS | OURS)[spelling]
    file = read(tmp_path, {base + up: UP, base + down: DOWN, f"{base}.alpha": torch.tensor(2.0)})
    ((name, change),) = file.changes.items()
    assert name == base and change.kind == "LoRA" and not file.ignored
    assert torch.equal(change.adapter.pair.up, UP / 2) and torch.equal(change.adapter.pair.down, DOWN)


@pytest.mark.host
@pytest.mark.parametrize("beside", [None, *EXTRA])
@pytest.mark.parametrize("kind", KINDS)
def test_the_host_finds_the_same_kinds(models, tmp_path, kind, beside):
    """Nothing of it is left over on either side but what we say."""
    tensors = at(BASE, KINDS[kind](OUT, IN) | EXTRA.get(beside, {}))
    file = read(tmp_path, tensors)
    found = host_kinds(tensors, [BASE])
    assert {key: change.kind.removeprefix("DoRA ") for key, change in file.changes.items()} == found
    assert file.raw[BASE].keys() | file.ignored.keys() == tensors.keys()
    assert {key for key in file.ignored if not key.endswith((".alpha", ".dora_scale"))} == set()


@pytest.mark.host
@pytest.mark.parametrize("spelling", [*SPELLINGS, *OURS])
def test_the_raw_tensors_are_the_hosts_lora(models, tmp_path, spelling):
    """Also of a spelling that it would not know, and under a name whose repeated prefix is stripped."""
    up, down = (SPELLINGS | OURS)[spelling]
    long = f"diffusion_model.model.{BASE}"
    file = read(tmp_path, {long + up: UP, long + down: DOWN, f"{long}.alpha": torch.tensor(2.0)})
    merged = host_merged(file.raw[BASE], torch.zeros(OUT, IN))
    torch.testing.assert_close(merged, UP @ DOWN / 2)


@pytest.mark.host
def test_of_two_kinds_on_a_layer_the_hosts_choice_is_taken_and_the_other_named(models, tmp_path):
    found = [lora(OUT, IN), loha(OUT, IN), lokr(OUT, IN), glora(OUT, IN), oft(OUT, IN), {".w_norm": random(OUT, IN)},
             {".diff": random(OUT, IN)}, {".set_weight": random(OUT, IN)}]  # fmt: skip
    for first, second in itertools.pairwise(found):
        tensors = at(BASE, first | second)
        file = read(tmp_path, tensors)
        assert {BASE: file.changes[BASE].kind} == host_kinds(tensors, [BASE])
        assert file.ignored.keys() == at(BASE, first).keys() and "ComfyUI loads the layer's" in "".join(
            file.ignored.values()
        )
        assert file.raw[BASE].keys() == at(BASE, second).keys()


@pytest.mark.host
def test_the_hosts_own_conversions_are_followed(models, tmp_path):
    """BFL's control LoRAs: their own names, a factor's bias, a norm's scale and a wider first layer."""
    from comfy.lora_convert import convert_lora

    tensors = at(
        "img_in", {".lora_B.weight": random(OUT, 4), ".lora_A.weight": random(4, IN), ".lora_B.bias": random(OUT)}
    )
    tensors |= {"single_blocks.0.norm.key_norm.scale": random(8)}
    file = read(tmp_path, tensors, convert_lora)
    first, norm = file.changes["diffusion_model.img_in"], file.changes["diffusion_model.single_blocks.0.norm.key_norm"]
    assert first.reshape == (OUT, IN) and torch.equal(first.bias, tensors["img_in.lora_B.bias"])
    assert norm.kind == "replacement" and not file.ignored


def host_kinds(tensors, bases):
    """What comfy.lora.load_lora makes of each base, by our names."""
    import comfy.lora

    names = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT"}
    patches = comfy.lora.load_lora(dict(tensors), {base: f"{base}.weight" for base in bases}, log_missing=False)
    found = {}
    for base in bases:
        patch = patches[f"{base}.weight"]
        words = {"diff": "difference", "set": "replacement"}
        found[base] = words[patch[0]] if isinstance(patch, tuple) else names[patch.name]
    return found


def host_merged(tensors, weight):
    import comfy.lora

    (patch,) = comfy.lora.load_lora(dict(tensors), {BASE: "w"}).values()
    return comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weight.clone(), "w")


def test_norms_are_differences_with_their_bias(tmp_path):
    file = read(
        tmp_path, {"n.w_norm": random(8), "n.b_norm": random(8, seed=1), "m.diff": random(8), "m.diff_b": random(8)}
    )
    assert {base: (change.kind, change.bias is None) for base, change in file.changes.items()} == {
        "n": ("difference", False), "m": ("difference", False)}  # fmt: skip
    assert torch.equal(file.changes["n"].bias, random(8, seed=1)) and not file.ignored


def test_convolutions_are_read_for_the_host(tmp_path):
    """Their factors are kept as they are in the file; flattened they are a change of [out, in * 9]."""
    tensors = {"c.lora_up.weight": random(OUT, 4, 1, 1), "c.lora_down.weight": random(4, IN, 3, 3)}
    file = read(tmp_path, tensors)
    file.changes["c"].check((OUT, IN * 9))
    assert file.raw["c"]["c.lora_down.weight"].shape == (4, IN, 3, 3)


@pytest.mark.parametrize(("tensors", "reasons"), [
    ({"a.lora_up.bias": UP}, {"a.lora_up.bias": "not a part of any adapter"}),
    ({"a.lora_B.bias": random(OUT)}, {"a.lora_B.bias": "a factor's own bias"}),
    ({"a.lora_magnitude_vector": random(OUT)}, {"a.lora_magnitude_vector": "PEFT's DoRA"}),
    ({"b.alpha": torch.tensor(2.0)}, {"b.alpha": "alpha without an adapter"}),
    ({"b.diff": UP, "b.alpha": torch.tensor(1)}, {"b.alpha": "ComfyUI loads the layer's difference and not its alpha"}),
    ({"b.oft_blocks": random(4, 6, 6), "b.rescale": random(OUT, 1)}, {"b.rescale": "applies no rescale to OFT"}),
    ({"b.b_norm": random(OUT)}, {"b.b_norm": "b_norm without w_norm"}),
    ({"b.w_norm": random(OUT), "b.b_norm": random(OUT), "b.diff_b": random(OUT)}, {"b.b_norm": "and not its b_norm"}),
    ({"b.diff": UP, "b.reshape_weight": torch.tensor([30, 20])}, {"b.reshape_weight": "and not its reshape_weight"}),
    ({"bundle_emb.word.x": UP, "scalar": UP}, {"scalar": "not a part of", "bundle_emb.word.x": "not a part of"}),
])  # fmt: skip
def test_what_nothing_comes_of_is_named_with_its_reason(tmp_path, tensors, reasons):
    file = read(tmp_path, {"a.lora_up.weight": UP, "a.lora_down.weight": DOWN} | tensors)
    assert "a" in file.changes and file.ignored.keys() == reasons.keys()
    assert all(words in file.ignored[key] for key, words in reasons.items())


def test_tensors_are_read_once_and_shared(tmp_path):
    file = read(tmp_path, at("a", lora(OUT, IN)) | at("b", loha(OUT, IN)) | at("c", {".diff": random(OUT, IN)}))
    for base, change in file.changes.items():
        owned = {tensor.data_ptr() for tensor in change.tensors()}
        assert owned == {tensor.data_ptr() for tensor in file.raw[base].values()}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_fp8_and_double_factors_are_kept_exactly_or_in_fp32(tmp_path, dtype):
    up, down = UP.to(dtype), DOWN.to(dtype)
    pair = read(tmp_path, {"a.lora_up.weight": up, "a.lora_down.weight": down}).changes["a"].adapter.pair
    assert pair.up.dtype == (torch.float32 if dtype == torch.float64 else torch.float16)
    assert torch.equal(pair.up.float(), up.float()) and torch.equal(pair.down.float(), down.float())


def test_a_small_alpha_does_not_push_fp16_factors_below_their_range(tmp_path):
    up, down = (1e-5 * UP).half(), DOWN.half()
    tensors = {"a.lora_up.weight": up, "a.lora_down.weight": down, "a.alpha": torch.tensor(0.01)}
    pair = read(tmp_path, tensors).changes["a"].adapter.pair
    torch.testing.assert_close(pair.weight(), up.float() @ down.float() * 0.0025, rtol=1e-3, atol=0)


def test_identity_changes_with_the_file(tmp_path):
    first = read(tmp_path, at("a", lora(OUT, IN)))
    again = lora_files.read_adapters(tmp_path / "a.safetensors")
    other = read(tmp_path, at("a", lora(OUT, IN, rank=5)))
    assert first.identity == again.identity != other.identity and first.name == "a.safetensors"


@pytest.mark.parametrize(("base", "bare"), [
    ("diffusion_model.model.diffusion_model.layers.0.w1", "diffusion_model.layers.0.w1"),
    ("model.diffusion_model.model.diffusion_model.layers.0.w1", "diffusion_model.layers.0.w1"),
    ("layers.0.diffusion_model.w1", "layers.0.diffusion_model.w1"),
])  # fmt: skip
def test_repeated_prefixes_are_stripped(tmp_path, base, bare):
    assert list(read(tmp_path, at(base, lokr(OUT, IN))).changes) == [bare]


# ---- what is refused

PAIR = {"a.lora_up.weight": UP, "a.lora_down.weight": DOWN}
HADA, LOKR, GLORA = at("a", loha(OUT, IN)), at("a", lokr(OUT, IN, (True, True))), at("a", glora(OUT, IN))
NAN, INF = torch.full((4, IN), float("nan")), torch.full((OUT, 4), float("inf"))


def without(tensors, *keys):
    return {key: tensor for key, tensor in tensors.items() if key not in keys}


MALFORMED = {
    # halves
    "up without down": (without(PAIR, "a.lora_down.weight"), "a: lora_down is missing; the file is incomplete"),
    "down without up": (without(PAIR, "a.lora_up.weight"), "a: lora_up is missing; the file is incomplete"),
    "PEFT's A without B": ({"a.lora_A.weight": DOWN}, "a: lora_up is missing"),
    "half a pair among whole ones": (PAIR | {"b.lora_up.weight": UP}, "b: lora_down is missing"),
    "mid alone": ({"a.lora_mid.weight": random(4, 4, 1, 1)}, "a: lora_up is missing"),
    "half a pair with a bias": ({"a.lora_up.weight": UP, "a.diff_b": random(OUT)}, "a: lora_down is missing"),
    "LoHa without w1_a": (without(HADA, "a.hada_w1_a"), "a: hada_w1_a is missing; the file is incomplete"),
    "LoHa without w2_b": (without(HADA, "a.hada_w2_b"), "a: hada_w2_b is missing; the file is incomplete"),
    "LoHa with one Tucker core": (HADA | {"a.hada_t1": random(2, 2, 1, 1)}, "a: hada_t2 is missing; the file is inc"),
    "LoHa's Tucker core alone": ({"a.hada_t1": random(2, 2, 1, 1)}, "a: hada_w1_a is missing"),
    "LoKr without w1": (at("a", {".lokr_w2": random(6, 4)}), "a: lokr_w1 is missing; the file is incomplete"),
    "LoKr without w2": (at("a", {".lokr_w1": random(6, 4)}), "a: lokr_w2 is missing"),
    "LoKr without w1_b": (without(LOKR, "a.lokr_w1_b"), "a: lokr_w1_b is missing"),
    "LoKr without w2_a": (without(LOKR, "a.lokr_w2_a"), "a: lokr_w2_a is missing"),
    "LoKr's Tucker core alone": ({"a.lokr_t2": random(2, 2, 1, 1)}, "a: lokr_w1 is missing"),
    "GLoRA without a2": (without(GLORA, "a.a2.weight"), "a: a2 is missing; the file is incomplete"),
    "GLoRA without b1": (without(GLORA, "a.b1.weight"), "a: b1 is missing"),
    "DoRA scale alone": ({"a.dora_scale": random(OUT, 1)}, "a: dora_scale stands without an adapter; the file is inc"),
    # twice
    "one factor in two spellings": (PAIR | {"a.lora_B.weight": UP}, r"a.lora_\w+.weight: .*twice, in two"),
    "one factor under a repeated prefix": (
        {"diffusion_model.a.lora_up.weight": UP, "diffusion_model.model.diffusion_model.a.lora_up.weight": UP},
        "diffusion_model.*: the file has this twice"),
    "LoKr whole and in factors": (LOKR | {"a.lokr_w1": random(2, 2)}, "a: lokr_w1 is there whole and in factors; keep"),
    # shapes
    "ranks that differ": ({"a.lora_up.weight": UP, "a.lora_down.weight": random(3, IN)},
                          r"a: up \[24, 4\] and down \[3, 16\] are no \[out, r\] and \[r, in\]; the file is damaged"),
    "up and down exchanged": ({"a.lora_up.weight": DOWN, "a.lora_down.weight": UP}, r"a: up \[4, 16\] and down"),
    "rank 0": ({"a.lora_up.weight": random(OUT, 0), "a.lora_down.weight": random(0, IN)}, r"a: up \[24, 0\] and"),
    "up of one dimension": (PAIR | {"a.lora_up.weight": random(OUT)}, r"a: up \[24\] and down"),
    "down of one dimension": (PAIR | {"a.lora_down.weight": random(4)}, r"a: up \[24, 4\] and down \[4\]"),
    "down a number": (PAIR | {"a.lora_down.weight": torch.tensor(1.0)}, r"a: up \[24, 4\] and down \[\]"),
    "up of a 3x3 convolution": (PAIR | {"a.lora_up.weight": random(OUT, 4, 3, 3)}, r"a: up \[24, 4, 3, 3\] and down"),
    "mid of two dimensions": (PAIR | {"a.lora_mid.weight": random(4, 4)}, r"a: mid \[4, 4\] does not fit up"),
    "mid of another rank": (PAIR | {"a.lora_mid.weight": random(5, 5, 1, 1)}, r"a: mid \[5, 5, 1, 1\] does not fit"),
    "alpha of many numbers": (PAIR | {"a.alpha": random(4)}, r"a: alpha is \[4\], not one number; repair"),
    "alpha of none": (PAIR | {"a.alpha": random(0)}, r"a: alpha is \[0\], not one number"),
    "LoHa's ranks differ": (HADA | {"a.hada_w1_b": random(3, IN)}, r"a: hada_w1_a \[24, 2\] and hada_w1_b \[3, 16\]"),
    "LoHa's halves differ": (HADA | {"a.hada_w2_a": random(OUT + 1, 2)},
                             r"a: hada_w1 is \[24, 16\] and hada_w2 is \[25, 16\], they must be alike"),
    "LoHa's factor of one dimension": (HADA | {"a.hada_w1_b": random(2)}, r"a: hada_w1_a .* and hada_w1_b \[2\]"),
    "LoHa's cores of other ranks": (HADA | {f"a.hada_t{n}": random(5, 5, 1, 1) for n in (1, 2)},
                                    r"a: hada_w1_a .* do not fit their Tucker core \[5, 5, 1, 1\]"),
    "LoKr of vectors": (at("a", {".lokr_w1": random(6), ".lokr_w2": random(4, 4)}), r"a: lokr_w1 is \[6\], not a mat"),
    "LoKr's ranks differ": (LOKR | {"a.lokr_w1_b": random(3, 2)}, r"a: lokr_w1_a .* and lokr_w1_b \[3, 2\]"),
    "GLoRA without a common rank": (GLORA | {"a.b2.weight": random(7, 5)}, r"a: a1 \[16, 3\], .* share no rank"),
    "GLoRA of vectors": (GLORA | {"a.b2.weight": random(7)}, "a: .* must be matrices"),
    "OFT of two dimensions": ({"a.oft_blocks": random(4, 4)}, r"a: oft_blocks is \[4, 4\], it must be"),
    "OFT whose blocks are not square": ({"a.oft_blocks": random(4, 6, 5)}, r"a: oft_blocks is \[4, 6, 5\]"),
    "OFT without blocks": ({"a.oft_blocks": random(0, 4, 4)}, r"a: oft_blocks is \[0, 4, 4\]"),
    "BOFT whose blocks are not square": ({"a.oft_blocks": random(2, 6, 4, 2)}, r"a: oft_blocks is \[2, 6, 4, 2\]"),
    "BOFT of odd blocks": ({"a.oft_blocks": random(1, 8, 3, 3)}, "a: .* of even size"),
    "BOFT's rescale of other outputs": (
        at("a", boft(OUT, IN) | {".rescale": random(OUT + 1, 1)}), r"a: rescale is \[25, 1\], it must be \[24, 1\]"),
    "BOFT's rescale along the inputs": (
        at("a", boft(OUT, IN) | {".rescale": random(OUT)}), r"a: rescale is \[24\], it must be \[24, 1\]"),
    "DoRA scale of one dimension": (PAIR | {"a.dora_scale": random(OUT)}, r"a: dora_scale is \[24\], it must be"),
    "DoRA scale of a 3x3 kernel": (PAIR | {"a.dora_scale": random(OUT, 1, 3, 3)}, r"a: dora_scale is \[24, 1, 3, 3\]"),
    "bias of two dimensions": (PAIR | {"a.diff_b": random(OUT, 1)}, r"a: the bias difference is \[24, 1\], it must be"),
    "reshape of one number": (PAIR | {"a.reshape_weight": torch.tensor([7])}, r"a: reshape_weight \[7\] is no shape"),
    "reshape below 1": (PAIR | {"a.reshape_weight": torch.tensor([24, 0])}, r"a: reshape_weight \[24, 0\] is no shape"),
    "reshape of fractions": (PAIR | {"a.reshape_weight": random(2)}, "a: reshape_weight .* is no shape"),
    # numbers
    "NaN in down": (PAIR | {"a.lora_down.weight": NAN}, "a.lora_down.weight: holds NaN or .*; .*download"),
    "infinity in up": (PAIR | {"a.lora_up.weight": INF}, "a.lora_up.weight: holds NaN or infinite"),
    "NaN in bf16": (PAIR | {"a.lora_down.weight": NAN.bfloat16()}, "a.lora_down.weight: holds NaN"),
    "NaN in fp8": ({k: t.to(torch.float8_e5m2) for k, t in (PAIR | {"a.lora_down.weight": NAN}).items()},
                   "a.lora_down.weight: holds NaN"),
    "NaN as alpha": (PAIR | {"a.alpha": torch.tensor(float("nan"))}, "a.alpha: holds NaN"),
    "NaN in a difference": ({"a.diff": NAN}, "a.diff: holds NaN"),
    "infinity in a bias": (PAIR | {"a.diff_b": INF[:, 0]}, "a.diff_b: holds NaN or infinite"),
    "NaN in a DoRA scale": (PAIR | {"a.dora_scale": torch.full((OUT, 1), float("nan"))}, "a.dora_scale: holds NaN"),
    # dtypes
    "int8 factors": ({k: t.to(torch.int8) for k, t in PAIR.items()},
                     r"a.lora_\w+.weight: is int8 \[.*\], a quantized factor; use the LoRA in 16 bit"),
    "packed factors": (PAIR | {"a.lora_up.weight": torch.zeros(OUT, 2, dtype=torch.uint8)}, "a.lora_up.*: is uint8"),
    "fp8 factors with scales": (
        {k: t.to(torch.float8_e4m3fn) for k, t in PAIR.items()} | {"a.lora_up.weight_scale": torch.tensor(1.0)},
        r"a.lora_\w+.weight: is float8_e4m3fn \[.*\] with scales \(a.lora_up.weight_scale\), a quantized factor"),
    "boolean difference": ({"a.diff": torch.ones(OUT, IN, dtype=torch.bool)}, "a.diff: is bool"),
    "integer bias": (PAIR | {"a.diff_b": torch.ones(OUT, dtype=torch.int32)}, "a.diff_b: is int32"),
    # other files
    "nothing": ({}, "holds no tensors; the file is damaged"),
    "a whole model": ({f"layers.{n}.w.weight": UP for n in range(9)} | {"norm.bias": random(4)},
                      r"is a model and not a LoRA \(10 tensors, no adapter; first: .*\); put it in"),
    "an embedding": ({"emb_params": random(2, IN)}, "none of its 1 tensors belongs to a LoRA; first: emb_params:"),
    "IA3": ({"a.weight": random(OUT), "a.on_input": torch.tensor(True)}, "none of its 2 .*a.on_input: IA3, which"),
    "alphas only": ({"a.alpha": torch.tensor(1.0)}, "none of its 1 tensors .*a.alpha: alpha without an adapter"),
}  # fmt: skip


@pytest.mark.host
@pytest.mark.parametrize("tensors", [
    {"img_in.lora_A.weight": DOWN, "single_blocks.0.norm.key_norm.scale": random(8)},
    {"img_in.lora_A.weight": DOWN[0], "img_in.lora_B.weight": UP, "single_blocks.0.norm.key_norm.scale": random(8)},
])  # fmt: skip
def test_what_the_hosts_conversion_stumbles_over_is_refused(models, tmp_path, tensors):
    from comfy.lora_convert import convert_lora

    with pytest.raises(ValueError, match=r"^a\.safetensors: not all .* \(.*\); the file is incomplete"):
        read(tmp_path, tensors, convert_lora)


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_by_name(tmp_path, case):
    tensors, words = MALFORMED[case]
    with pytest.raises(ValueError, match=rf"^a\.safetensors: ({words})"):
        read(tmp_path, tensors)


def legacy_pickle():
    file = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def zipped_pickle():
    file = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, file)
    return file.getvalue()


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("the pickle was opened",)


def header(entries, data=b""):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


PICKLE = "is a pickle.*opening one can run any program that is in it, so Tessera does not; convert it to safetensors"
INCOMPLETE = "it is not a complete safetensors file, download or copy it again"
OTHER_FILES = {
    "a pickle that runs code": ("a.pt", pickle.dumps(Bomb()), PICKLE),
    "torch's pickle": ("a.pt", zipped_pickle(), "is a pickle or zip archive: opening one"),
    "torch's old pickle": ("a.ckpt", legacy_pickle(), PICKLE),
    "a pickle called .bin": ("adapter_model.bin", zipped_pickle(), "is a pickle or zip archive: opening"),
    "a pickle called safetensors": ("a.safetensors", zipped_pickle(), "is a pickle or zip archive: opening"),
    "an old pickle called safetensors": ("a.safetensors", legacy_pickle(), PICKLE),
    "an unknown file called .pth": ("a.pth", b"\1\2\3\4\5\6\7\x08\x09", PICKLE),
    "a web page": ("a.safetensors", b"<!DOCTYPE html><html>login</html>", "is a web page; download the LoRA again"),
    "a GGUF file": ("a.safetensors", b"GGUF\3\0\0\0\1\2\3\4", "is a GGUF file; download"),
    "a Git LFS pointer": ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "an empty file": ("a.safetensors", b"", INCOMPLETE),
    "seven bytes": ("a.safetensors", b"\1\0\0\0\0\0\0", INCOMPLETE),
    "a header longer than the file": ("a.safetensors", struct.pack("<Q", 1 << 40) + b"{}", INCOMPLETE),
    "a header that is no JSON": ("a.safetensors", struct.pack("<Q", 4) + b"abcd", INCOMPLETE),
    "a header that is a list": ("a.safetensors", header([1, 2]), INCOMPLETE),
    "an unknown dtype": ("a.safetensors", header({"a.diff": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}},
                                                 bytes(8)), INCOMPLETE),
    "a size that is not its shape's": (
        "a.safetensors", header({"a.diff": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)),
        INCOMPLETE),
    "a file that is not there": ("", None, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_FILES)
def test_another_file_is_refused_unopened(tmp_path, case):
    name, content, words = OTHER_FILES[case]
    path = tmp_path / (name or "missing.safetensors")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name}: {words}|{path.name}: .*; {words}"):
        lora_files.read_adapters(path)


@pytest.mark.parametrize("cut", [1, 100, 700])
def test_a_truncated_file_is_refused(tmp_path, cut):
    path = save(tmp_path / "a.safetensors", PAIR)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=rf"a\.safetensors: .*{INCOMPLETE}"):
        lora_files.read_adapters(path)


def test_a_truncated_file_whose_header_length_looks_like_a_pickle_is_no_pickle(tmp_path):
    path = save(tmp_path / "a.safetensors", PAIR)
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    text = path.read_bytes()[8 : 8 + length].ljust(0x280)
    path.write_bytes(struct.pack("<Q", len(text)) + text)  # 80 02 00 ...: a pickle of protocol 2 starts so too
    with pytest.raises(ValueError, match=INCOMPLETE):
        lora_files.read_adapters(path)


def test_there_are_at_least_50_malformed_files_and_none_changes_the_reader(tmp_path):
    """And a good file reads as before after all of them."""
    assert len(MALFORMED) + len(OTHER_FILES) >= 50
    for tensors, _ in MALFORMED.values():
        with pytest.raises(ValueError):
            read(tmp_path, tensors)
    assert list(read(tmp_path, PAIR).changes) == ["a"]


def test_safetensors_under_a_pickles_name_are_read(tmp_path):
    path = save(tmp_path / "a.bin", PAIR)
    assert lora_files.read_adapters(path).changes["a"].kind == "LoRA" and load_file(path).keys() == PAIR.keys()
