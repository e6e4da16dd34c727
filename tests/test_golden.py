"""What convert_to_quant wrote is read as it meant it, written alike, repaired where it erred, else refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tessera import lora
from tessera.checkpoint import Checkpoint
from tessera.formats import INT8
from tessera.quantization.metrics import relative_error

FOLDER = Path(__file__).with_name("golden")
FILES = json.loads((FOLDER / "golden.json").read_text())["files"]
READABLE = {name: file for name, file in FILES.items() if not name.startswith("refuse_")}
LAYERS = [(name, key) for name, file in READABLE.items() for key in file["layers"]]
LORAS = [name for name in FILES if (FOLDER / f"{name}_lora.safetensors").exists()]
RTN = [(name, key) for name, key in LAYERS if FILES[name]["rounding"] == "nearest"]

ERROR_TOLERANCE = 1e-5  # relative, of golden.json's six digits
# (share of codes one step off, ULPs of a scale): convert_to_quant multiplies by reciprocals where we divide. A rotation
# is a BLAS product, and another CPU may add in another order; where the files were made, those bytes are equal.
CLOSE = {"int8": (2e-3, 2), "int8_row": (2e-3, 2), "int8_convrot": (2e-3, 4), "fp8": (2e-2, 2)}

EVERY_LAYER = pytest.mark.parametrize(("name", "key"), LAYERS, ids=lambda value: value)


@pytest.fixture(scope="module")
def opened():
    return {name: Checkpoint(FOLDER / f"{name}.safetensors") for name in READABLE}


@pytest.fixture(scope="module")
def sources():
    return {path.stem: load_file(path) for path in FOLDER.glob("source_*.safetensors")}


def original(sources, name, key):
    return sources[FILES[name]["source"]][key.removeprefix(FILES[name]["prefix"]) + ".weight"].float()


def marked(name, key):
    """The layer's record in golden.json, header over tensor; {} in legacy files."""
    markers = FILES[name]["layers"][key]["markers"]
    return markers.get("tensor", {}) | markers.get("header", {})


@pytest.mark.parametrize("name", READABLE)
def test_layers_found_are_the_layers_marked(opened, name):
    prefix = FILES[name]["prefix"]
    assert opened[name].prefix == prefix
    assert {prefix + layer for layer in opened[name].layers} == set(FILES[name]["layers"])


@EVERY_LAYER
def test_format_is_the_one_marked(opened, name, key):
    layer, record = opened[name].layers[key.removeprefix(FILES[name]["prefix"])], marked(name, key)
    if name.startswith("legacy_") or name == "mislabel_nvfp4":
        assert layer.format.name == ("float8_e5m2" if name == "legacy_e5m2" else "float8_e4m3fn")
        return
    assert layer.format.name == record["format"]
    if record["format"] == "int8_tensorwise":
        assert layer.format.convrot == record.get("convrot", False)
        assert layer.format.convrot_groupsize == record.get("convrot_groupsize", 0)
        assert layer.format.per_row == record.get("per_row", False) or layer.zero


@EVERY_LAYER
def test_decoded_weight_has_kitchens_error(opened, sources, name, key):
    weight, expected = original(sources, name, key), FILES[name]["layers"][key].get("rel_l2")
    decoded = opened[name].weight(key.removeprefix(FILES[name]["prefix"]), tuple(weight.shape))
    if expected is None and name == "mislabel_nvfp4":  # kitchen trusted the marker
        expected = pytest.approx(0.0264, rel=0.1)
    if expected is None:  # kitchen fails on these
        assert not weight.any()
        expected = 0.0
    expected = expected if not isinstance(expected, float) else pytest.approx(expected, rel=ERROR_TOLERANCE)
    assert relative_error(decoded, weight) == expected


@pytest.mark.parametrize(("name", "key"), RTN, ids=lambda value: value)
def test_our_rounding_to_nearest_gives_its_bytes(opened, sources, name, key):
    weight, layer = original(sources, name, key), opened[name].layers[key]
    ours, theirs = layer.format.pack(layer.format.encode(weight)), opened[name].entries(layer)
    allowed = CLOSE.get(family(layer.format))
    for suffix, tensor in ours.items():
        stored = theirs[suffix].reshape(tensor.shape)
        if allowed is None:
            assert torch.equal(stored_bytes(tensor), stored_bytes(stored)), suffix
        elif suffix == "weight":
            off = (steps(tensor) - steps(stored)).abs()
            assert off.max() <= 1 and (off > 0).float().mean() <= allowed[0]
        else:
            used = ours["weight"].float().reshape(tensor.numel(), -1).any(1).reshape(tensor.shape)  # rows not all zero
            assert (tensor.view(torch.int32) - stored.view(torch.int32)).abs()[used].le(allowed[1]).all()


def stored_bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def family(format):
    if isinstance(format, INT8):
        return "int8_convrot" if format.convrot else format.label
    return "fp8" if format.name.startswith("float8") else format.name


def steps(codes):
    """Codes as integers whose neighbours differ by 1."""
    return codes.int() if codes.dtype == torch.int8 else codes.view(torch.uint8).int()


@pytest.mark.parametrize("name", READABLE)
def test_repaired_file_needs_no_repair(opened, tmp_path, name):
    file = opened[name]
    repaired = file.repair({key: file.read(key) for key in file.tensors})
    save_file({key: tensor.contiguous() for key, tensor in repaired.items()}, tmp_path / "repaired.safetensors")
    again = Checkpoint(tmp_path / "repaired.safetensors")
    assert again.repairs == [] and again.layers.keys() == file.layers.keys()
    for name, layer in file.layers.items():
        weight = again.weight(name, layer.shape)
        assert torch.equal(weight, file.weight(name)) and weight.isfinite().all()
    marked = {key.removesuffix(".comfy_quant") for key in repaired if key.endswith(".comfy_quant")}
    assert marked == {layer.key for layer in file.layers.values()}


@pytest.mark.parametrize(("name", "found"), [
    ("ctq126_mixed", "nvfp4 weight without its padding"),
    ("ctq134_mixed", "nvfp4 weight without its padding"),
    ("ctq134_nvfp4", "weight_scale_2 0, block scales NaN"),
    ("ctq134_int8_tensor", "scale (1, 4)"),
    ("ctq134_int8_row", "scale (0, 1)"),
])  # fmt: skip
def test_all_zero_weight_with_unusable_scales_is_repaired_to_zero(opened, name, found):
    file = opened[name]
    assert "layers.1.feed_forward.w2: all-zero weight with unusable scales" in file.repairs, found
    layer = file.layers["layers.1.feed_forward.w2"]
    assert not file.weight("layers.1.feed_forward.w2").any()
    for suffix, spec in layer.format.storage(*layer.shape).items():
        entry = file.entries(layer)[suffix]
        assert (entry.dtype, tuple(entry.shape)) == (spec.dtype, spec.shape) and entry.float().isfinite().all()


def test_only_what_is_wrong_is_repaired(opened):
    sound = {"small_mxfp8", "legacy_converted", "ctq126_mixed_prefixed", "ctq134_mxfp8", "ctq134_fp8"}
    sound |= {name for name in READABLE if "convrot" in name or "qwen" in name}
    assert {name for name in READABLE if not opened[name].repairs} == sound


def test_mislabelled_fp8_is_relabelled(opened):
    assert [line.split(": ", 1)[1] for line in opened["mislabel_nvfp4"].repairs] == [
        "marked nvfp4, tensors are float8_e4m3fn", "marked mxfp8, tensors are float8_e4m3fn",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "format"), [
    ("legacy_e4m3", "float8_e4m3fn"), ("legacy_e5m2", "float8_e5m2"), ("legacy_converted", "float8_e4m3fn"),
])  # fmt: skip
def test_legacy_file_takes_the_dtype_of_its_weights(opened, name, format):
    assert {layer.format.name for layer in opened[name].layers.values()} == {format}
    assert all("scale_weight" not in key for key in repaired_keys(opened[name]))


def repaired_keys(file):
    return file.repair({key: file.read(key) for key in file.tensors})


def test_a_group_that_no_host_rotates_by_is_refused_with_file_layer_and_remedy():
    with pytest.raises(ValueError) as refusal:
        Checkpoint(FOLDER / "refuse_convrot_512.safetensors")
    message = str(refusal.value)
    assert message.startswith(
        "refuse_convrot_512.safetensors: layers.0.attention.out: convrot group 512 is not a power"
    )
    assert "; re-quantize" in message


@pytest.mark.parametrize("name", LORAS)
def test_error_lora_corrects_as_much_as_kitchen_says(opened, sources, name):
    pairs = lora.read(FOLDER / f"{name}_lora.safetensors")
    layers = {key: row for key, row in FILES[name]["layers"].items() if "rel_l2_with_lora" in row}
    assert layers and pairs.keys() == {f"diffusion_model.{k.removeprefix(FILES[name]['prefix'])}" for k in layers}
    for key, row in layers.items():
        weight, bare = original(sources, name, key), key.removeprefix(FILES[name]["prefix"])
        pair = pairs[f"diffusion_model.{bare}"]
        corrected = opened[name].weight(bare, tuple(weight.shape)) + pair.weight()
        assert pair.rank == 4 and row["rel_l2_with_lora"] < row["rel_l2"]
        assert relative_error(corrected, weight) == pytest.approx(row["rel_l2_with_lora"], rel=ERROR_TOLERANCE)


def test_a_wrong_logical_shape_is_refused(opened):
    with pytest.raises(ValueError, match=r"ctq134_mixed\.safetensors: layers\.0\.attention\.out: .*of another model"):
        opened["ctq134_mixed"].weight("layers.0.attention.out", (128, 64))
