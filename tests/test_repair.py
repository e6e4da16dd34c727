"""Every row of format.md's table of repairs and refusals, in its order; and the repaired file that `inspect` writes."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tessera import cli, formats, lora, repairing
from tessera.checkpoint import Checkpoint
from tessera.formats import Quantized
from tessera.job import Job
from tessera.kernels import reference as ref
from tessera.quantization import recipe
from tessera.quantization.metrics import relative_error

GOLDEN = Path(__file__).with_name("golden")
SHAPE = (96, 128)
RECORDS = "_quantization_metadata"


def weight(shape=SHAPE, seed=0):
    """Rows and columns of different sizes, as a model has them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 0.05
    values *= torch.exp2(0.4 * torch.randn(shape[0], 1, generator=generator))
    return values * torch.exp2(0.4 * torch.randn(1, shape[1], generator=generator))


@dataclass
class Case:
    """A file of the layer `a`, sound but for what `edit` does to (tensors, record, metadata)."""

    label: str
    edit: object
    expect: str  # the format it is read as, or the refusal's words
    line: str = ""  # what the report says; "" if nothing
    shape: tuple[int, int] = SHAPE
    mark: str = "both"


def build(path, case):
    format = formats.parse(case.label).for_shape(*case.shape)
    tensors = {f"a.{k}": v for k, v in format.pack(format.encode(weight(case.shape))).items()}
    tensors |= {"a.bias": torch.arange(case.shape[0]).bfloat16(), "norm.weight": torch.full((5,), 2.5)}
    tensors["expected"] = format.decode(format.encode(weight(case.shape)))
    record, metadata = format.record(), {"note": "kept <b>"}
    changed = case.edit(tensors, record, metadata) if case.edit else None
    record = record if changed is None else changed
    if case.mark in ("both", "tensor"):
        tensors["a.comfy_quant"] = formats.marker(record)
    if case.mark in ("both", "header"):
        metadata.setdefault(RECORDS, json.dumps({"format_version": "1.0", "layers": {"a": record}}))
    expected = tensors.pop("expected")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)
    return expected


def says(**changes):
    """The record with other keys; None takes one out."""
    return lambda t, r, m: {k: v for k, v in (r | changes).items() if v is not None}


def tensor(suffix, change):
    def edit(tensors, record, metadata):
        tensors[f"a.{suffix}"] = change(tensors[f"a.{suffix}"])

    return edit


def removed(suffix):
    def edit(tensors, record, metadata):
        del tensors[f"a.{suffix}"]

    return edit


def header_says(**record):
    return lambda t, r, m: m.update({RECORDS: json.dumps({"layers": {"a": record}})})


def rename(**names):
    def edit(tensors, record, metadata):
        for old, new in names.items():
            tensors[f"a.{new}"] = tensors.pop(f"a.{old}")

    return edit


def legacy(tensors, record, metadata):
    rename(weight_scale="scale_weight")(tensors, record, metadata)
    tensors |= {"a.scale_input": torch.tensor(2.0), "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}


def all_zero(tensors, record, metadata):
    tensors["a.weight"].zero_()
    tensors["a.weight_scale"] = torch.ones(4, 4)
    tensors["expected"].zero_()


def in_rows(low_nibble_first):
    """Block scales row by row, codes in either order: what ModelOpt writes."""

    def edit(tensors, record, metadata):
        nvfp4 = "a.weight_scale_2" in tensors
        rows, columns = tensors["a.weight"].shape[0], tensors["a.weight"].numel() * (2 if nvfp4 else 1)
        columns = columns // rows // (16 if nvfp4 else 32)
        raw = tensors["a.weight_scale"].view(torch.uint8)
        tensors["a.weight_scale"] = ref.unswizzle(raw, rows, columns).view(tensors["a.weight_scale"].dtype)
        if nvfp4 and low_nibble_first:
            tensors["a.weight"] = (tensors["a.weight"] << 4) | (tensors["a.weight"] >> 4)

    return edit


def blockwise(dtype, largest, block, name):
    """convert_to_quant's scales per row (block 0) or square block."""

    def edit(tensors, record, metadata):
        values = weight()
        rows, columns = (SHAPE[0], 1) if not block else (SHAPE[0] // block, SHAPE[1] // block)
        grid = values.reshape(rows, SHAPE[0] // rows, columns, SHAPE[1] // columns)
        scale = grid.abs().amax((1, 3), keepdim=True) / largest
        codes = (grid / scale).reshape(SHAPE)
        tensors["a.weight"] = codes.round().to(dtype) if dtype == torch.int8 else codes.to(dtype)
        tensors["expected"] = (tensors["a.weight"].float().reshape(grid.shape) * scale).reshape(SHAPE)
        tensors["a.weight_scale"] = scale.reshape(rows) if not block else scale.reshape(rows, columns)
        return {"format": name, "orig_dtype": "torch.bfloat16"} | ({"group_size": block} if block else {})

    return edit


def hybrid(tensors, record, metadata):
    tensors["a.weight_scalar"] = torch.tensor(0.5)
    return {"format": "hybrid_mxfp8", "group_size": 32}


def rotated(tensors, record, metadata):
    tensors["expected"] = ref.rotate(tensors["expected"], 64)
    return record | {"convrot": True, "convrot_groupsize": 64}


INT8_BLOCK = blockwise(torch.int8, 127, 32, "int8_blockwise")
FP8_ROW = blockwise(torch.float8_e4m3fn, 448, 0, "float8_e4m3fn_rowwise")
FP8_BLOCK = blockwise(torch.float8_e4m3fn, 448, 32, "float8_e4m3fn_blockwise")
LINEAR = "which no ComfyUI loads (first: a): laid out anew, exactly"
AGAIN = "which no ComfyUI loads (first: a): decoded and encoded as int8_row"

REPAIRS = {
    "marked in the header only": Case("nvfp4", None, "nvfp4", "1 layers are marked in the header only", mark="header"),
    "marked in the tensors only": Case("nvfp4", None, "nvfp4", mark="tensor"),
    "header contradicts tensors, and the marker tensor fits": Case(
        "nvfp4", header_says(format="mxfp8"), "nvfp4", "header says 'mxfp8', tensors are 'nvfp4'"),
    "header and tensor are merged": Case("int8_convrot_64", header_says(format="int8_tensorwise"), "int8_convrot_64"),
    "format missing: U8 with weight_scale_2": Case("nvfp4", says(format=None), "nvfp4", "format missing"),
    "format missing: E4M3 with scales of the mxfp8 shape": Case("mxfp8", says(format=None), "mxfp8", "format missing"),
    "format missing: the same with E8M0 scales": Case(
        "mxfp8", lambda t, r, m: tensor("weight_scale", lambda s: s.view(torch.float8_e8m0fnu))(t, r, m) or {"x": 1},
        "mxfp8", "format missing"),
    "format missing: I8 with one scale": Case("int8", says(format=None), "int8", "format missing"),
    "format missing: I8 with a scale per row": Case("int8_row", says(format=None), "int8_row", "format missing"),
    "format missing: E4M3 with one scale": Case("fp8_e4m3", says(format=None), "float8_e4m3fn", "format missing"),
    "format missing: E5M2 with one scale": Case("fp8_e5m2", says(format=None), "float8_e5m2", "format missing"),
    "no marker at all: nvfp4": Case("nvfp4", None, "nvfp4", "no quantization records", mark="none"),
    "no marker at all: int8 by row": Case("int8_row", None, "int8_row", "no quantization records", mark="none"),
    "fp8 marked nvfp4": Case("fp8_e4m3", says(format="nvfp4"), "float8_e4m3fn", "marked nvfp4, tensors are"),
    "fp8 marked mxfp8": Case("fp8_e4m3", says(format="mxfp8"), "float8_e4m3fn", "marked mxfp8, tensors are"),
    "e5m2 marked e4m3": Case("fp8_e5m2", says(format="float8_e4m3fn"), "float8_e5m2", "marked float8_e4m3fn"),
    "legacy scaled_fp8, e4m3": Case("fp8_e4m3", legacy, "float8_e4m3fn", "legacy scaled_fp8 file", mark="none"),
    "legacy scaled_fp8, e5m2": Case("fp8_e5m2", legacy, "float8_e5m2", "legacy scaled_fp8 file", mark="none"),
    "int8 scale [N]": Case("int8_row", tensor("weight_scale", torch.flatten), "int8_row"),
    "all-zero weight with odd scales": Case("int8_row", all_zero, "int8_row", "all-zero weight with unusable scales"),
    "a scalar as [1, 1]": Case("int8", tensor("weight_scale", lambda s: s.reshape(1, 1)), "int8"),
    "params nested": Case(
        "int8_convrot_64", says(convrot=None, convrot_groupsize=None,
                                params={"convrot": True, "convrot_groupsize": 64}), "int8_convrot_64"),
    "nvfp4 scales viewed as U8": Case("nvfp4", tensor("weight_scale", lambda s: s.view(torch.uint8)), "nvfp4"),
    "nvfp4 weight viewed as I8": Case("nvfp4", tensor("weight", lambda w: w.view(torch.int8)), "nvfp4"),
    "mxfp8 scales viewed as E8M0": Case("mxfp8", tensor("weight_scale", lambda s: s.view(torch.float8_e8m0fnu)),
                                        "mxfp8"),
    "convrot with one scale for all rows": Case(
        "int8", rotated, "int8_convrot_64", "one scale for all rows"),
    "int8_blockwise": Case("int8", INT8_BLOCK, "int8_row", f"1 layers of int8_blockwise, {AGAIN}"),
    "float8_e4m3fn_rowwise": Case(
        "int8", FP8_ROW, "int8_row", f"1 layers of float8_e4m3fn_rowwise, {AGAIN}"),
    "float8_e4m3fn_blockwise": Case(
        "int8", FP8_BLOCK, "int8_row", f"1 layers of float8_e4m3fn_blockwise, {AGAIN}"),
    "float8_e4m3fn_rowwise without a marker": Case(
        "int8", FP8_ROW, "int8_row", "decoded and encoded", mark="none"),
    "hybrid_mxfp8": Case("mxfp8", hybrid, "mxfp8", "marked hybrid_mxfp8, its spare weight_scalar is left out"),
    "ModelOpt nvfp4 without comfy_quant, scales row by row": Case(
        "nvfp4", in_rows(True), "nvfp4", f"1 layers of nvfp4 with scales row by row, {LINEAR}", mark="none"),
    "the same where both orders have one shape": Case(
        "nvfp4", in_rows(True), "nvfp4", f"1 layers of nvfp4 with scales row by row, {LINEAR}", (256, 512), "none"),
    "BFL's nvfp4 without comfy_quant, scales in tiles": Case(
        "nvfp4", None, "nvfp4", "no quantization records", (256, 512), "none"),
    "mxfp8 with scales row by row": Case(
        "mxfp8", in_rows(False), "mxfp8", f"1 layers of mxfp8 with scales row by row, {LINEAR}"),
    "mxfp8 with scales row by row where both orders have one shape": Case(
        "mxfp8", in_rows(False), "mxfp8", f"1 layers of mxfp8 with scales row by row, {LINEAR}", (256, 1024)),
}  # fmt: skip

REFUSED = {
    "format that nobody knows": Case("int8", says(format="int3"), r"'int3' is not loadable by ComfyUI .*; re-quantize"),
    "format of another converter": Case(
        "int8", says(format="float8_e4m3fn_block3d"), r"'float8_e4m3fn_block3d' is not loadable"),
    "format that is no name": Case("int8", says(format=["int8"]), r"\['int8'\] is not loadable"),
    "convrot group 512": Case(
        "int8_row", says(convrot=True, convrot_groupsize=512), r"group 512 is not a power of 4; .* 4, 16, 64, 256"),
    "convrot group that does not divide K": Case(
        "int8_row", says(convrot=True, convrot_groupsize=256), "128 is not a multiple of the ConvRot group 256"),
    "scale missing": Case("nvfp4", removed("weight_scale"), "weight_scale is missing, nvfp4"),
    "scale of a wrong shape": Case("nvfp4", tensor("weight_scale", lambda s: torch.zeros(96, 1)),
                                   r"weight_scale is \(96, 1\), nvfp4 needs \(128, 8\)"),
    "weight of another dtype": Case("nvfp4", tensor("weight", lambda w: torch.zeros(96, 64).bfloat16()),
                                    "weight is bfloat16, nvfp4 needs uint8"),
    "weight_correction": Case("int8", lambda t, r, m: t.update({"a.weight_correction": torch.zeros(4)}),
                              "asymmetric W4A8 weights are dropped by ComfyUI on load; re-quantize symmetric"),
    "several inferences fit": Case(
        "int8_row", tensor("weight_scale", torch.flatten),
        r"format is missing and ambiguous \(int8_tensorwise, convrot_w4a4\); add it to comfy_quant", mark="none"),
    "no inference fits": Case(
        "int8_row", tensor("weight_scale", lambda s: s[:5].clone()), "fits no format; re-quantize", mark="none"),
    "nvfp4 marked, scales row by row: which nibble is first?": Case(
        "nvfp4", in_rows(False), "weight_scale lies row by row, nvfp4 needs 128 x 4 tiles; .* make it again"),
    "the same where both orders have one shape ": Case(
        "nvfp4", in_rows(False), "weight_scale lies row by row", shape=(256, 512)),
    "convert_to_quant's fp8 rows marked nvfp4": Case(
        "int8", lambda t, r, m: FP8_ROW(t, r, m) | {"format": "nvfp4"},
        "marked nvfp4, but its tensors are float8_e4m3fn_rowwise: convert_to_quant's --layer-config does that; re-qua"),
    "mxfp8 marked nvfp4": Case("mxfp8", says(format="nvfp4"), "marked nvfp4, but its tensors are mxfp8"),
    "int8_blockwise whose scales do not divide the weight": Case(
        "int8", lambda t, r, m: INT8_BLOCK(t, r, m) | {"group_size": 64}, "one for each square block"),
    "rowwise fp8 on an int8 weight": Case(
        "int8_row", says(format="float8_e4m3fn_rowwise"), "needs two dimensions of float8_e4m3fn"),
    "two scales of one kind": Case("fp8_e4m3", lambda t, r, m: t.update({"a.scale_weight": torch.ones(1)}),
                                   "has scale_weight and weight_scale, which are the same"),
    "a switch that is neither on nor off": Case(
        "int8", says(full_precision_matrix_mult={"a": 1}), "neither true nor false"),
    "a layer of no weights": Case("int8", tensor("weight", lambda w: w[:0]), "a layer of no weights"),
    "a record with a key twice": Case(
        "int8", lambda t, r, m: t.update({"a.comfy_quant": torch.tensor(list(b'{"format":"x","format":"y"}'),
                                                                        dtype=torch.uint8)}),
        "format is there twice", mark="none"),
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


@pytest.mark.parametrize("name", REPAIRS)
def test_this_is_repaired(path, name):
    case = REPAIRS[name]
    expected = build(path, case)
    file = Checkpoint(path)
    assert file.layers["a"].format.label == case.expect
    assert any(case.line in line for line in file.repairs) if case.line else file.repairs == []
    decoded = file.weight("a")
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("name", REFUSED)
def test_this_is_refused(path, name):
    build(path, REFUSED[name])
    with pytest.raises(ValueError, match=rf"file\.safetensors: a.*{REFUSED[name].expect}"):
        Checkpoint(path)


@pytest.mark.parametrize("name", REPAIRS)
def test_the_repaired_file_needs_no_repair_and_keeps_all_else(path, name):
    case = REPAIRS[name]
    build(path, case)
    before, file = path.read_bytes(), Checkpoint(path)
    made = repairing.repair(path, path.with_name("out.safetensors"))
    again = Checkpoint(made.path)
    assert again.repairs == [line for line in file.repairs if line.endswith("less exact than row scales")]
    assert again.layers["a"].format == file.layers["a"].format and path.read_bytes() == before
    if made.losses:
        assert relative_error(again.weight("a"), file.weight("a")) == pytest.approx(made.losses["a"])
        assert made.losses["a"] < 0.012
    else:
        assert torch.equal(again.weight("a"), file.weight("a"))
    for key in ("a.bias", "norm.weight"):
        assert torch.equal(again.read(key), file.read(key))
    with safe_open(made.path, "pt") as written:
        metadata, keys = written.metadata(), set(written.keys())
    assert metadata["note"] == "kept <b>" and json.loads(metadata[repairing.REPAIRED])["repairs"] == file.repairs
    assert json.loads(metadata[RECORDS])["layers"]["a"] == again.layers["a"].record
    assert keys == {f"a.{s}" for s in again.layers["a"].sources} | {"a.bias", "norm.weight", "a.comfy_quant"}


@pytest.mark.parametrize("name", ["refuse_int8_blockwise", "refuse_fp8_rowwise", "refuse_fp8_blockwise",
                                  "refuse_hybrid_mxfp8"])  # fmt: skip
def test_files_of_convert_to_quant_that_no_host_loads_are_read_as_it_meant_them(name):
    file, source = Checkpoint(GOLDEN / f"{name}.safetensors"), load_file(GOLDEN / "source_small.safetensors")
    assert file.repairs
    for layer, format in file.layers.items():
        original = source[f"{layer}.weight"].float()
        own = relative_error(file.weight(layer), original)
        made = format.format.decode(format.format.unpack(file.entries(format), *format.shape))
        assert 0 < own < 0.04 and relative_error(made, original) < own + 0.01


def test_a_pair_of_nibbles_of_modelopt_is_read_low_first(path):
    format = formats.NVFP4()
    quantized = format.encode(weight())
    codes = quantized.qdata
    tensors = {"a.weight": (codes[:, 1::2] << 4) | codes[:, 0::2], "a.weight_scale": quantized.block_scale,
               "a.weight_scale_2": quantized.scale.reshape(1)}  # fmt: skip
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    assert torch.equal(Checkpoint(path).weight("a"), format.decode(Quantized(codes, quantized.scale,
                                                                             quantized.block_scale)))  # fmt: skip


@pytest.mark.parametrize("label", ["nvfp4", "mxfp8"])
def test_scales_in_tiles_are_never_taken_for_rows(path, label):
    format = formats.parse(label)
    for seed in range(20):
        shape = (128 * (1 + seed % 4), 256 * (1 + seed % 3))
        values = weight(shape, seed) if seed % 2 else torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        tensors = {f"a.{k}": v.contiguous() for k, v in format.pack(format.encode(values)).items()}
        save_file(tensors | {"a.comfy_quant": formats.marker(format.record())}, path)
        assert Checkpoint(path).repairs == []


def test_a_lora_with_its_prefix_twice_is_repaired(path):
    source = GOLDEN / "ctq126_mixed_prefixed_lora.safetensors"
    made = repairing.repair(source, path)
    assert "names had their prefix twice" in made.repairs[0]
    assert not any("model.diffusion_model." in key for key in Checkpoint(path).tensors)
    ours, theirs = lora.read(path), lora.read(source)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k].up, theirs[k].up) for k in ours)


def test_an_existing_file_is_never_overwritten(path):
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="already exists"):
        repairing.repair(GOLDEN / "legacy_e4m3.safetensors", path)
    assert path.read_bytes() == b"mine" and len(list(path.parent.iterdir())) == 1


def test_a_file_that_is_refused_leaves_nothing(path):
    with pytest.raises(ValueError, match="convrot group 512"):
        repairing.repair(GOLDEN / "refuse_convrot_512.safetensors", path)
    assert list(path.parent.iterdir()) == []


def test_kept_foreign_layers_stay_as_their_record_says(path):
    """A job that keeps such a layer copies it as it is: the header must not call it what it would become."""
    build(path, REPAIRS["int8_blockwise"])
    assert Checkpoint(path).records()["a"]["format"] == "int8_blockwise"
    build(path, REPAIRS["ModelOpt nvfp4 without comfy_quant, scales row by row"])
    assert Checkpoint(path).records() == {}


def test_inspect_writes_the_repaired_file(path, capsys):
    assert cli.main(["inspect", str(GOLDEN / "legacy_e5m2.safetensors"), "--repair", str(path)]) == 0
    said = capsys.readouterr().out
    assert "repaired on reading: legacy scaled_fp8 file" in said and f"wrote {path}: 1 repairs" in said
    assert Checkpoint(path).repairs == []


def test_a_weight_s_rel_makes_a_layer_asymmetric_w4a8(path):
    """Which only ComfyUI reads: it gets the layer as it is."""
    tensors = {"a.weight": torch.zeros(32, 32, dtype=torch.int8), "a.weight_s_rel": torch.ones(32, 4),
               "a.weight_s_channel": torch.ones(32)}  # fmt: skip
    for record in (None, {"group_size": 16}):
        marker = {} if record is None else {"a.comfy_quant": formats.marker(record)}
        save_file(tensors | marker, path)
        file = Checkpoint(path)
        assert file.opaque["a"]["format"] == "asym_w4a8_int8" and file.layers == {} and file.repairs


@pytest.mark.parametrize("name", ["int8_blockwise", "hybrid_mxfp8", "mxfp8 with scales row by row",
                                  "ModelOpt nvfp4 without comfy_quant, scales row by row"])  # fmt: skip
def test_a_job_takes_such_layers_and_keeps_such_layers(path, name):
    """`a` is kept as it is, `b` is quantized anew from what the file says."""
    build(path, REPAIRS[name])
    metadata = {}
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    tensors |= {key.replace("a.", "b.", 1): tensor.clone() for key, tensor in tensors.items() if key.startswith("a.")}
    if RECORDS in metadata:
        record = json.loads(metadata[RECORDS])["layers"]["a"]
        metadata[RECORDS] = json.dumps({"layers": {"a": record, "b": record}})
    save_file(tensors, path, metadata=metadata)
    source = Checkpoint(path)
    rules = (recipe.Rule(formats.parse("int8_row"), ("b",), "test"),)
    Job(source, path.with_name("made.safetensors"), recipe.Recipe("r", "", rules), rank=0).run()
    made = Checkpoint(path.with_name("made.safetensors"))
    assert torch.equal(made.weight("a", source.layers["a"].shape), source.weight("a"))
    assert relative_error(made.weight("b"), source.weight("b")) < 0.012 and made.layers["b"].format.label == "int8_row"
    assert not {"b.weight_scalar", "b.weight_scale_2"} & made.tensors.keys()
