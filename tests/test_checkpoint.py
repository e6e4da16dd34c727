"""The reader takes every marker variant and refuses damage; the writer never harms what is there."""

import json
import os
import struct
import tracemalloc

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tessera import formats
from tessera.checkpoint import LAYER_ERRORS, PROVENANCE, Checkpoint
from tessera.formats import TensorSpec
from tessera.writer import Writer

LABELS = ["nvfp4", "mxfp8", "int8", "int8_row", "int8_convrot_64", "fp8_e4m3", "fp8_e5m2"]


def weight(seed=0, shape=(96, 128)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def file_of(path, layers, prefix="", mark="both", edit=None, plain=None):
    """A checkpoint of `layers` (name -> format label), marked in tensors, header, both, or not at all."""
    tensors, records = dict(plain or {}), {}
    for index, (name, label) in enumerate(layers.items()):
        format = formats.parse(label).for_shape(96, 128)
        for suffix, tensor in format.pack(format.encode(weight(index))).items():
            tensors[f"{prefix}{name}.{suffix}"] = tensor.contiguous()
        records[f"{prefix}{name}"] = format.record()
    if mark in ("both", "tensors"):
        tensors |= {f"{k}.comfy_quant": formats.marker(r) for k, r in records.items()}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": records})}
    if edit:
        edit(tensors, records, metadata)
    save_file(tensors, path, metadata=metadata if mark in ("both", "header") else None)
    return path


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("mark", ["both", "tensors", "header"])
def test_markers_and_prefixes_all_decode_alike(tmp_path, mark, prefix):
    layers = {f"layers.{i}.w": label for i, label in enumerate(LABELS)}
    plain = {f"{prefix}norm.weight": torch.ones(4, dtype=torch.bfloat16)}
    file = Checkpoint(file_of(tmp_path / "a.safetensors", layers, prefix, mark, plain=plain))
    assert file.prefix == prefix and sorted(file.layers) == sorted(layers)
    for index, (name, label) in enumerate(layers.items()):
        format = formats.parse(label).for_shape(96, 128)
        assert file.layers[name].format == format
        assert torch.equal(file.weight(name), format.decode(format.encode(weight(index))))
    assert file.shapes()["layers.0.w.weight"] == (96, 128) and file.shapes()["norm.weight"] == (4,)


def test_header_names_may_lack_the_prefix(tmp_path):
    def strip(tensors, records, metadata):
        bare = {k.removeprefix("model.diffusion_model."): v for k, v in records.items()}
        metadata["_quantization_metadata"] = json.dumps({"layers": bare})

    path = file_of(tmp_path / "a.safetensors", {"a": "nvfp4"}, "model.diffusion_model.", "header", strip)
    assert Checkpoint(path).layers["a"].key == "model.diffusion_model.a"


def test_contradicting_header_loses_to_a_fitting_tensor(tmp_path):
    def lie(tensors, records, metadata):
        metadata["_quantization_metadata"] = json.dumps({"layers": {"a": {"format": "mxfp8"}}})

    file = Checkpoint(file_of(tmp_path / "a.safetensors", {"a": "nvfp4"}, edit=lie))
    assert file.layers["a"].format.name == "nvfp4" and "header says 'mxfp8'" in file.repairs[0]


@pytest.mark.parametrize("label", ["nvfp4", "mxfp8", "int8", "int8_row", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("mark", ["tensors", "none"])
def test_missing_format_is_inferred_from_the_tensors(tmp_path, label, mark):
    def drop(tensors, records, metadata):
        if mark == "tensors":
            tensors["a.comfy_quant"] = formats.marker({"group_size": 16})

    file = Checkpoint(file_of(tmp_path / "a.safetensors", {"a": label}, mark=mark, edit=drop))
    assert file.layers["a"].format == formats.parse(label) and file.repairs


def test_fp8_tensors_labelled_nvfp4_are_relabelled(tmp_path):
    def lie(tensors, records, metadata):
        tensors["a.comfy_quant"] = formats.marker({"format": "nvfp4"})

    file = Checkpoint(file_of(tmp_path / "a.safetensors", {"a": "fp8_e4m3"}, mark="tensors", edit=lie))
    assert file.layers["a"].format.name == "float8_e4m3fn" and "marked nvfp4" in file.repairs[0]


@pytest.mark.parametrize(("label", "said"), [("fp8_e4m3", "float8_e5m2"), ("fp8_e5m2", "float8_e4m3fn")])
def test_fp8_weights_under_the_other_fp8s_name_are_relabelled(tmp_path, label, said):
    def lie(tensors, records, metadata):
        tensors["a.comfy_quant"] = formats.marker({"format": said})

    file = Checkpoint(file_of(tmp_path / "a.safetensors", {"a": label}, mark="tensors", edit=lie))
    assert file.layers["a"].format == formats.parse(label) and f"marked {said}" in file.repairs[0]


@pytest.mark.parametrize("label", ["fp8_e4m3", "int8_row", "int8"])
def test_scales_in_half_precision_are_read(tmp_path, label):
    def halve(tensors, records, metadata):
        tensors["a.weight_scale"] = tensors["a.weight_scale"].bfloat16()

    file = Checkpoint(file_of(tmp_path / "a.safetensors", {"a": label}, edit=halve))
    assert ((file.weight("a") - weight(0)).norm() / weight(0).norm()) < 0.04
    assert file.entries(file.layers["a"])["weight_scale"].dtype == torch.float32


@pytest.mark.parametrize(("label", "said"), [("fp8_e4m3", "int8_tensorwise"), ("int8", "float8_e4m3fn")])
def test_one_bytes_codes_are_never_read_as_anothers(tmp_path, label, said):
    def lie(tensors, records, metadata):
        tensors["a.comfy_quant"] = formats.marker({"format": said})

    with pytest.raises(ValueError, match=r"bad\.safetensors: a: weight is \w+, \w+ needs"):
        Checkpoint(file_of(tmp_path / "bad.safetensors", {"a": label}, mark="tensors", edit=lie))


@pytest.mark.parametrize("label", ["fp8_e4m3", "fp8_e5m2"])
def test_legacy_scaled_fp8_takes_the_weights_own_dtype(tmp_path, label):
    def legacy(tensors, records, metadata):
        tensors["a.scale_weight"] = tensors.pop("a.weight_scale")
        tensors["a.scale_input"] = torch.tensor(2.0)
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)

    file = Checkpoint(file_of(tmp_path / "a.safetensors", {"a": label}, mark="none", edit=legacy))
    layer = file.layers["a"]
    assert layer.format.name == formats.parse(label).name and layer.format.full_precision_matrix_mult
    repaired = file.repair({k: file.read(k) for k in file.tensors})
    assert set(repaired) == {"a.weight", "a.weight_scale", "a.input_scale", "a.comfy_quant"}


def test_repair_gives_the_host_canonical_entries(tmp_path):
    def spoil(tensors, records, metadata):
        tensors["a.weight_scale"] = tensors["a.weight_scale"].view(torch.uint8)  # viewed as bytes
        tensors["b.weight_scale"] = tensors["b.weight_scale"].flatten()  # [out]
        records["b"] = {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 64}}
        metadata["_quantization_metadata"] = json.dumps({"layers": records})

    path = file_of(tmp_path / "a.safetensors", {"a": "nvfp4", "b": "int8_convrot_64"}, mark="header", edit=spoil)
    file = Checkpoint(path)
    repaired = file.repair({k: file.read(k) for k in file.tensors})
    assert repaired["a.weight_scale"].dtype == torch.float8_e4m3fn
    assert repaired["b.weight_scale"].shape == (96, 1)
    record = json.loads(bytes(repaired["b.comfy_quant"].tolist()))
    assert record == {"format": "int8_tensorwise", "per_row": True, "convrot": True, "convrot_groupsize": 64}


def test_padded_weight_reads_back_in_its_logical_shape(tmp_path):
    format, w = formats.NVFP4(), weight(3, (100, 72))
    tensors = {f"a.{k}": v for k, v in format.pack(format.encode(w)).items()}
    tensors["a.comfy_quant"] = formats.marker(format.record() | {"orig_shape": [100, 72]})
    save_file(tensors, tmp_path / "a.safetensors")
    file = Checkpoint(tmp_path / "a.safetensors")
    assert torch.equal(file.weight("a"), format.decode(format.encode(w)))


@pytest.mark.parametrize(("edit", "words"), [
    (lambda t: t.pop("a.weight_scale_2"), "weight_scale_2 is missing"),
    (lambda t: t.update({"a.weight_scale": torch.zeros(96, 1)}), r"weight_scale is \(96, 1\), nvfp4 needs \(128, 8\)"),
    (lambda t: t.update({"a.weight": torch.zeros(96, 64).bfloat16()}), "weight is bfloat16, nvfp4 needs uint8"),
    (lambda t: t.update({"a.comfy_quant": formats.marker({"format": "int4_x"})}), "'int4_x' is not loadable"),
    (lambda t: t.update({"a.comfy_quant": torch.zeros(4, dtype=torch.uint8)}), "not a quantization record"),
    (lambda t: t.update({"a.weight_correction": torch.zeros(8, 96)}), "asymmetric W4A8"),
    (lambda t: t.pop("a.weight"), "weight is missing"),
])  # fmt: skip
def test_bad_layers_are_refused_by_name(tmp_path, edit, words):
    path = file_of(tmp_path / "bad.safetensors", {"a": "nvfp4"}, mark="tensors", edit=lambda t, r, m: edit(t))
    with pytest.raises(ValueError, match=rf"bad\.safetensors: a.*{words}"):
        Checkpoint(path)


# ---- branches that are part of a layer


RANK = 4
UP, DOWN = torch.randn(96, RANK).half(), torch.randn(RANK, 128).half()


def absorbed(path, label="nvfp4", edit=None, prefix="", marked=True, errors=None):
    """A file of layers a and b in absorb mode."""

    def add(tensors, records, metadata):
        for name in "ab":
            tensors |= {f"{prefix}{name}.absorb_up": UP.clone(), f"{prefix}{name}.absorb_down": DOWN.clone()}
        if marked:
            metadata[PROVENANCE] = json.dumps({"mode": "absorb"})
        if errors:
            metadata[LAYER_ERRORS] = json.dumps(errors)
        if edit:
            edit(tensors)

    return file_of(path / "absorb.safetensors", {"a": label, "b": label}, prefix, edit=add)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("label", LABELS)
def test_the_weight_of_an_absorbing_layer_includes_its_branch(tmp_path, label, prefix):
    file = Checkpoint(absorbed(tmp_path, label, prefix=prefix))
    format = formats.parse(label).for_shape(96, 128)
    alone = format.decode(format.encode(weight(0)))
    assert torch.equal(file.weight("a", absorbed=False), alone)
    torch.testing.assert_close(file.weight("a"), alone + UP.float() @ DOWN.float())
    assert torch.equal(file.branch("a").up, UP) and torch.equal(file.branch("a").down, DOWN)
    assert file.shapes().keys() == {"a.weight", "b.weight"}


def test_pre_quant_scale_smooths_the_codes_and_not_the_branch(tmp_path):
    scale = torch.rand(128) + 0.5
    plain, smoothed = (tmp_path / name for name in ("plain", "smoothed"))
    for folder in (plain, smoothed):
        folder.mkdir()
    alone = Checkpoint(absorbed(plain)).weight("a", absorbed=False)
    file = Checkpoint(absorbed(smoothed, edit=lambda t: t.update({"a.pre_quant_scale": scale})))
    torch.testing.assert_close(file.weight("a"), alone * scale + UP.float() @ DOWN.float())


def test_a_layer_without_a_branch_has_none(tmp_path):
    file = Checkpoint(file_of(tmp_path / "a.safetensors", {"a": "nvfp4"}))
    assert file.branch("a") is None and not file.layers["a"].absorbs


def test_the_host_never_sees_a_branch(tmp_path):
    file = Checkpoint(absorbed(tmp_path))
    repaired = file.repair({k: file.read(k) for k in file.tensors})
    suffixes = ("comfy_quant", "weight", "weight_scale", "weight_scale_2")
    assert set(repaired) == {f"{name}.{suffix}" for name in "ab" for suffix in suffixes}


def test_an_all_zero_weight_keeps_its_branch(tmp_path):
    def empty(tensors):
        tensors |= {f"a.{suffix}": torch.zeros_like(tensors[f"a.{suffix}"])
                    for suffix in ("weight", "weight_scale", "weight_scale_2")}  # fmt: skip

    torch.testing.assert_close(Checkpoint(absorbed(tmp_path, edit=empty)).weight("a"), UP.float() @ DOWN.float())


@pytest.mark.parametrize(("edit", "words"), [
    (lambda t: t.pop("a.absorb_up"), "absorb_up is missing, half a branch is none"),
    (lambda t: t.pop("a.absorb_down"), "absorb_down is missing, half a branch is none"),
    (lambda t: t.update({"a.absorb_up": UP[:95].clone()}), r"absorb_up is float16 \[95, 4\] .* a layer of \[96, 128\]"),
    (lambda t: t.update({"a.absorb_down": DOWN[:3].clone()}), r"absorb_down is float16 \[3, 128\]"),
    (lambda t: t.update({"a.absorb_up": UP[0].clone()}), r"absorb_up is float16 \[4\]"),
    (lambda t: t.update({"a.absorb_up": UP[:, :0].clone(), "a.absorb_down": DOWN[:0].clone()}), r"\[96, 0\]"),
    (lambda t: t.update({"a.absorb_up": UP.to(torch.int8)}), r"absorb_up is int8 \[96, 4\] .* must be float16"),
    (lambda t: [t.pop(f"a.absorb_{part}") for part in ("up", "down")],
     "absorb_up and absorb_down are missing, but the file is marked absorb: .* make it again from the original"),
    (lambda t: t.update({"a.norm.absorb_up": UP.clone()}), r"a branch of a layer that is not quantized here"),
])  # fmt: skip
def test_half_or_lost_branches_are_refused_by_name(tmp_path, edit, words):
    with pytest.raises(ValueError, match=rf"absorb\.safetensors: a.*{words}"):
        Checkpoint(absorbed(tmp_path, edit=edit))


def test_the_list_of_errors_says_which_layers_must_have_a_branch(tmp_path):
    """One number: a layer of rank 0. Two: without and with its branch."""

    def drop(tensors):
        del tensors["a.absorb_up"], tensors["a.absorb_down"]

    Checkpoint(absorbed(tmp_path, edit=drop, errors={"a": [0.1], "b": [0.5, 0.1]}))
    for errors in ({"a": [0.5, 0.1]}, {"b": [0.5, 0.1], "gone": [0.5, 0.1]}):
        with pytest.raises(ValueError, match=r"absorb\.safetensors: (a|gone): absorb_up and absorb_down are missing"):
            Checkpoint(absorbed(tmp_path, edit=drop, errors=errors))


def header(entries, data=b"", length=None):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(("content", "words"), [
    (b"", "header length"),
    (b"\x80\x04pickle....", "header length"),
    (header({}, length=1 << 60), "header length"),
    (struct.pack("<Q", 4) + b"[1,2", "not JSON"),
    (header([]), "not a JSON object"),
    (header({"a": F32}, b"1234"), "file has .* bytes, its header describes"),
    (header({"a": F32}, b"123456789"), "file has .* bytes, its header describes"),
    (header({"a": F32 | {"dtype": "F4"}}, b"12345678"), "a: header entry"),
    (header({"a": F32 | {"shape": [3]}}, b"12345678"), "a: header entry"),
    (header({"a": F32 | {"shape": [-1]}}, b"12345678"), "a: header entry"),
    (header({"a": F32, "b": F32}, b"12345678"), "b: header entry"),
    (header({"a": 7}), "a: header entry"),
    (header({"__metadata__": 7}), "__metadata__ is not"),
])  # fmt: skip
def test_damaged_files_are_refused(tmp_path, content, words):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.safetensors: .*{words}"):
        Checkpoint(path)


def test_missing_file_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"nothere\.safetensors: cannot be read: No such file"):
        Checkpoint(tmp_path / "nothere.safetensors")


SPECS = {
    "a": TensorSpec(torch.float32, (3,)),
    "b": TensorSpec(torch.uint8, (5,)),
    "c": TensorSpec(torch.bfloat16, (2, 2)),
}


def write_all(writer):
    for key, spec in SPECS.items():
        writer.write(key, torch.ones(spec.shape, dtype=spec.dtype))
    writer.finish({"note": "é<b>"})


def test_written_file_is_read_by_safetensors(tmp_path):
    path = tmp_path / "out.safetensors"
    with Writer(path, SPECS, reserve=100) as writer:
        write_all(writer)
        assert not path.exists()
        writer.publish()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"note": "é<b>"} and set(file.keys()) == set(SPECS)
        assert torch.equal(file.get_tensor("c"), torch.ones(2, 2, dtype=torch.bfloat16))
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert os.listdir(tmp_path) == ["out.safetensors"]


def test_unfinished_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "out.safetensors", SPECS, reserve=0) as writer:
        writer.write("a", torch.ones(3))
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_existing_file_is_kept_unless_overwriting(tmp_path):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="already exists"):
        Writer(path, SPECS, reserve=0)
    with Writer(path, SPECS, reserve=100, overwrite=True) as writer:
        write_all(writer)
        assert path.read_bytes() == b"mine"
        writer.publish()
    assert path.read_bytes() != b"mine"


def test_writer_refuses_wrong_tensors_and_gaps(tmp_path):
    with Writer(tmp_path / "out.safetensors", SPECS, reserve=0) as writer:
        with pytest.raises(ValueError, match="expected float32"):
            writer.write("a", torch.ones(4))
        writer.write("a", torch.ones(3))
        with pytest.raises(ValueError, match="once"):
            writer.write("a", torch.ones(3))
        with pytest.raises(RuntimeError, match="2 tensors were never written"):
            writer.finish({})


def test_a_full_disk_is_found_before_the_work(tmp_path):
    huge = {"a": TensorSpec(torch.uint8, (1 << 60,))}
    with pytest.raises(ValueError, match="free some space"):
        Writer(tmp_path / "out.safetensors", huge, reserve=0)
    assert os.listdir(tmp_path) == []


def test_reading_one_tensor_holds_one_tensor(tmp_path):
    save_file({f"t{i}": torch.zeros(1 << 20) for i in range(8)}, tmp_path / "a.safetensors")
    file = Checkpoint(tmp_path / "a.safetensors")
    tracemalloc.start()
    for key in file.tensors:
        assert file.read(key).shape == (1 << 20,)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20  # torch's buffers are not Python's; nothing else is held
    tracemalloc.stop()
