"""Over two hundred files that must be refused: each has a name, what makes it, and what its refusal says.

A message names the file, the place and the remedy. `BAD` is by name; `reader` says which parser the file is for.
"""

# ruff: noqa: E501 - a table

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from tessera import formats

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
GB = 10**9
NO_TENSOR = "is not a tensor that follows the one before it; it is not a complete safetensors file, download"
JSON = "header is not JSON"
STRANGE = "control characters, markup or a path in it; no tool names a tensor so, do not use the file"


@dataclass(frozen=True)
class Bad:
    make: bytes | Callable[[Path], None]
    words: str  # a regular expression
    reader: str = "checkpoint"

    def write(self, path: Path) -> Path:
        if isinstance(self.make, bytes):
            path.write_bytes(self.make)
        else:
            self.make(path)
        return path


def file(header, data=b"", length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def sparse(header, size, length=None):
    """A file of that many bytes of which the disk holds but the first."""

    def make(path):
        path.write_bytes(file(header, length=length))
        os.truncate(path, size)

    return make


def entry(**changes):
    return file({"a": {k: v for k, v in (F32 | changes).items() if v is not None}}, bytes(8))


def named(name):
    return file({name: F32}, bytes(8))


BAD: dict[str, Bad] = {
    # ---- what comes before the header
    "empty file": Bad(b"", "header length -1 does not fit a file of 0 bytes; .* download or copy it again"),
    "one byte": Bad(b"\x00", "header length -1 does not fit a file of 1 bytes"),
    "seven bytes": Bad(bytes(7), "header length -1"),
    "eight zeros": Bad(bytes(8), "header length 0 does not fit"),
    "header of one byte": Bad(file(b"{"), "header length 1 does"),
    "header longer than the file": Bad(file({}, length=9), "header length 9 does not fit"),
    "header length 2^31": Bad(file({}, length=1 << 31), "header length 2147483648 does"),
    "header length 2^32 - 1": Bad(file({}, length=(1 << 32) - 1), "header length 4294967295 does"),
    "header length 2^63": Bad(file({}, length=1 << 63), "header length 9223372036854775808 does"),
    "header length 2^64 - 1": Bad(file({}, length=(1 << 64) - 1), "header length 18446744073709551615 does"),
    "header length with the bytes turned": Bad(struct.pack(">Q", 2) + b"{}", "header length 144115188075855872 does"),
    "pickle": Bad(b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins", "header length"),
    "zip": Bad(b"PK\x03\x04" + bytes(60), "header length"),
    "GGUF": Bad(b"GGUF\x03\x00\x00\x00" + bytes(60), "header length"),
    "web page": Bad(b"<!DOCTYPE html><html><script>alert(1)</script></html>", "header length"),
    "Git LFS pointer": Bad(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "header length"),
    "PNG": Bad(b"\x89PNG\r\n\x1a\n" + bytes(60), "header length"),
    "tar": Bad(b"model.pth".ljust(512, b"\0"), "header length"),
    "header of 33 MB of spaces": Bad(file(b"{}" + b" " * 33_000_000), "has 33000002 bytes, Tessera reads up to"),
    "header of 100 MB in a sparse file": Bad(sparse(b"{", 1 * GB, 100_000_000), "has 100000000 bytes, Tessera reads"),
    "header of 100 GB in a sparse file": Bad(sparse(b"{", 101 * GB, 100 * GB), "has 100000000000 bytes, Tessera reads"),
    "header of 31 MB of zeros in a sparse file": Bad(sparse(b"{", 31_000_100, 31_000_000), JSON),
    # ---- what is no JSON, or too much of it
    "binary header": Bad(file(bytes(range(128, 256))), JSON),
    "header of zeros": Bad(file(bytes(64)), JSON),
    "header cut off": Bad(file(b'{"a": {"dtype": "F32", "sha'), JSON),
    "header in UTF-16": Bad(file(json.dumps({"a": F32}).encode("utf-16"), bytes(8)), JSON),
    "header in UTF-16 without a mark": Bad(file(json.dumps({"a": F32}).encode("utf-16-le"), bytes(8)), JSON),
    "header in UTF-32": Bad(file(json.dumps({"a": F32}).encode("utf-32"), bytes(8)), JSON),
    "header with a byte order mark": Bad(file(b"\xef\xbb\xbf{}"), JSON),
    "header in Latin-1": Bad(file('{"\xe9": 1}'.encode("latin-1")), JSON),
    "overlong UTF-8": Bad(file(b'{"\xc0\xaf": 1}'), JSON),
    "half a surrogate in UTF-8": Bad(file(b'{"\xed\xa0\x80": 1}'), JSON),
    "two objects": Bad(file(b"{}{}"), JSON),
    "comma at the end": Bad(file(b'{"a": 1,}'), JSON),
    "single quotes": Bad(file(b"{'a': 1}"), JSON),
    "comment": Bad(file(b"{/* */}"), JSON),
    "space before the header": Bad(file(b' {"__metadata__": {}}'), "header is not a JSON object"),
    "NaN": Bad(file(b'{"a": NaN}'), "NaN is no number"),
    "Infinity": Bad(file(b'{"a": -Infinity}'), "-Infinity is no number"),
    "number of 5,000 digits": Bad(file(b'{"a": ' + b"9" * 5000 + b"}"), JSON),
    "lists in lists, 100,000 deep": Bad(file(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), JSON),
    "objects in objects, 100,000 deep": Bad(file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), JSON),
    "lists in lists, 500 deep": Bad(file(b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}"), f"a: header entry .* {NO_TENSOR}"),
    "ten million empty lists": Bad(file(b'{"a": [' + b"[]," * 10_000_000 + b"[]]}"), "parts, Tessera reads up to"),
    "two million tensors": Bad(file(b"{" + b'"a":[],' * 2_000_000 + b'"b":[]}'), "parts, Tessera reads up to"),
    "half a million numbers": Bad(file(b'{"a": [' + b"1," * 500_000 + b"1]}"), f"a: header entry .* {NO_TENSOR}"),
    "100,000 objects": Bad(file(b'{"a": [' + b"{}," * 100_000 + b"{}]}"), f"a: header entry .* {NO_TENSOR}"),
    "list": Bad(file([]), "header is not a JSON object"),
    "text": Bad(file("abc"), "header is not a JSON object"),
    "number": Bad(file(b"42"), "header is not a JSON object"),
    "null": Bad(file(b"null"), "header is not a JSON object"),
    # ---- keys twice
    "tensor twice": Bad(file(b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2), bytes(8)), "a is there twice"),
    "tensor twice, once escaped": Bad(file(b'{"a": 1, "\\u0061": 1}'), "a is there twice"),
    "metadata twice": Bad(file(b'{"__metadata__": {}, "__metadata__": {}}'), "__metadata__ is there twice"),
    "metadata's key twice": Bad(file(b'{"__metadata__": {"k": "1", "k": "2"}}'), "k is there twice"),
    "dtype twice": Bad(file(b'{"a": {"dtype": "F32", "dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}', bytes(8)),
                       "dtype is there twice"),
    "shape twice": Bad(file(b'{"a": {"dtype": "U8", "shape": [8], "shape": [4], "data_offsets": [0, 8]}}', bytes(8)),
                       "shape is there twice"),
    "key twice that is a script": Bad(file(b'{"<script>": 1, "<script>": 2}'), r"\\x3cscript> is there twice"),
    # ---- metadata
    "metadata is a number": Bad(file({"__metadata__": 7}), "__metadata__ is not a JSON object of texts"),
    "metadata is false": Bad(file({"__metadata__": False}), "__metadata__ is not"),
    "metadata is a list": Bad(file({"__metadata__": []}), "__metadata__ is not"),
    "metadata is a text": Bad(file({"__metadata__": ""}), "__metadata__ is not"),
    "metadata holds a number": Bad(file({"__metadata__": {"a": 1}}), "__metadata__ is not"),
    "metadata holds null": Bad(file({"__metadata__": {"a": None}}), "__metadata__ is not"),
    "metadata holds an object": Bad(file({"__metadata__": {"a": {}}}), "__metadata__ is not"),
    "metadata with half a character": Bad(file({"__metadata__": {"a": "\ud800"}}), "header is not JSON .half a Unicode character"),
    "metadata key with half a character": Bad(file({"__metadata__": {"\udfff": "a"}}), "header is not JSON .half a Unicode character"),
    # ---- the bytes of the file
    "a byte missing": Bad(file({"a": F32}, bytes(7)), "file has .* bytes, its header describes"),
    "all bytes missing": Bad(file({"a": F32}), "file has .* bytes, its header describes"),
    "a byte too many": Bad(file({"a": F32}, bytes(9)), "file has .* bytes, its header describes"),
    "bytes without a tensor": Bad(file({}, bytes(8)), "file has .* bytes, its header describes"),
    "100 GB without a tensor": Bad(sparse({}, 100 * GB), "file has 100000000000 bytes, its header describes 10"),
    "100 GB of which the header knows 8 bytes": Bad(sparse({"a": F32}, 100 * GB), "has 100000000000 bytes"),
    "two tensors in one place": Bad(file({"a": F32, "b": F32}, bytes(8)), f"b: header entry .* {NO_TENSOR}"),
    "tensors overlap": Bad(file({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12)), "b: header entry"),
    "tensor in a tensor": Bad(file({"a": F32, "b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}, bytes(8)),
                              "b: header entry"),
    "hole between tensors": Bad(file({"a": F32, "b": F32 | {"data_offsets": [9, 17]}}, bytes(17)), "b: header entry"),
    "hole before the first": Bad(file({"a": F32 | {"data_offsets": [1, 9]}}, bytes(9)), "a: header entry"),
    "empty tensor inside another": Bad(
        file({"a": F32, "b": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}}, bytes(8)), "b: header entry"),
    "offsets unaligned and wrong": Bad(entry(data_offsets=[3, 11]), "a: header entry"),
    "a whole tensor behind the end": Bad(entry(data_offsets=[8, 16]), "a: header entry"),
    # ---- one entry
    **{f"entry is {what}": Bad(file({"a": value}, bytes(8)), f"a: header entry .* {NO_TENSOR}") for what, value in {
        "null": None, "a number": 7, "a text": "F32", "a list": [], "an empty object": {}, "true": True,
        "a list of entries": [F32]}.items()},
    **{f"{key} missing": Bad(entry(**{key: None}), "a: header entry") for key in ("dtype", "shape", "data_offsets")},
    **{f"dtype {value!r}": Bad(entry(dtype=value), "a: header entry") for value in (
        "", "f32", "F32 ", "float32", "F4", "F6_E2M3", "F8_E4M3FN", "C64", "I4", "OBJECT", "<b>", 7, ["F32"], {})},
    **{f"shape {value}": Bad(entry(shape=value), "a: header entry") for value in (
        2, "2", {}, [3], [1], [], [-2], [-1, -2], [2.0], [2.5], ["2"], [[2]], [True, 2], [2, None],
        [1 << 31], [1 << 32, 1 << 32], [1 << 63], [1 << 64], [1 << 200], [0])},
    "shape of 65 dimensions": Bad(entry(shape=[1] * 64 + [2]), "a: header entry"),
    "shape of 100,000 dimensions": Bad(entry(shape=[1] * 99_999 + [2]), "a: header entry"),
    "shape of 50,000 huge dimensions": Bad(entry(shape=[(1 << 63) - 1] * 50_000), "a: header entry"),
    "empty tensor of absurd shape": Bad(
        file({"a": {"dtype": "U8", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}), "a: header entry"),
    "shape that overflows to the right size": Bad(entry(shape=[2, (1 << 62) + 1, 4]), "a: header entry"),
    **{f"data_offsets {value}": Bad(entry(data_offsets=value), "a: header entry") for value in (
        0, "0", {}, [], [0], [8], [0, 8, 16], [8, 0], [-8, 0], [0, -8], [0.0, 8.0], ["0", "8"], [None, 8], [0, [8]],
        [0, 1 << 31], [0, 1 << 63], [1 << 63, (1 << 63) + 8], [1 << 64, (1 << 64) + 8], [True, 9])},
    # ---- names
    "no name": Bad(named(""), "a tensor without a name; no tool names a tensor so"),
    "name of 100,000 characters": Bad(named("a" * 100_000), "a name of 100000 characters"),
    **{f"name with {what}": Bad(named(name), f"a name with {STRANGE}") for what, name in {
        "a newline": "a\nERROR tessera: all is well", "a carriage return": "a\rb", "a tab": "a\tb", "a zero": "a\0b",
        "an escape sequence": "a\x1b[31mb", "a deletion": "a\x7fb", "a control character of Latin-1": "a\x9bb",
        "turned text": "a\u202eb", "a line separator": "a\u2028b",
        "a script": "<script>alert(1)</script>.weight", "an image": "a.<img src=x onerror=alert(1)>.weight",
        "an end tag": "a</pre>.weight", "a comment": "<!-- a", "the folder above": "../../etc/passwd",
        "the folder above, Windows": "..\\..\\windows\\system.ini", "the folder above inside": "a/../../b",
        "nothing but the folder above": ".."}.items()},
    "name with half a character": Bad(named("a\ud800"), "header is not JSON .half a Unicode character"),
    "strange name of an empty tensor": Bad(file({"<b>": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}), STRANGE),
}  # fmt: skip


def layer(label, edit=None, mark=True, metadata=None, prefix=""):
    """A sound file of one layer, but for what `edit` does to its tensors."""

    def make(path):
        format = formats.parse(label).for_shape(96, 128)
        weight = torch.linspace(-1, 1, 96 * 128).reshape(96, 128)
        tensors = {f"{prefix}a.{suffix}": tensor for suffix, tensor in format.pack(format.encode(weight)).items()}
        if mark:
            tensors[f"{prefix}a.comfy_quant"] = formats.marker(format.record())
        if edit:
            edit(tensors)
        path.write_bytes(save({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata))

    return make


def put(suffix, tensor):
    return lambda tensors: tensors.update({f"a.{suffix}": tensor})


def record(text):
    return put("comfy_quant", torch.tensor(list(text if isinstance(text, bytes) else json.dumps(text).encode()),
                                           dtype=torch.uint8))  # fmt: skip


def without(suffix):
    return lambda tensors: tensors.pop(f"a.{suffix}")


def absorbed(up, down):
    return lambda tensors: tensors.update({"a.absorb_up": up, "a.absorb_down": down})


def huge(format, **specs):
    """A sparse file of a layer with those entries; each is (dtype, shape, bytes)."""

    def make(path):
        text, header, end = json.dumps({"format": format}).encode(), {}, 0
        sizes = {"comfy_quant": ("U8", [len(text)], len(text)), **specs}
        for suffix, (dtype, shape, nbytes) in sizes.items():
            header[f"a.{suffix}"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
            end += nbytes
        start = file(header)
        path.write_bytes(start + text)
        os.truncate(path, len(start) + end)

    return make


HALF, FLOAT, BYTES = torch.float16, torch.float32, torch.uint8
META = "_quantization_metadata"
NO_RECORD = "a.comfy_quant: is not a quantization record"
NO_LAYERS = r"_quantization_metadata is not \{'layers': \{name: record\}\}; re-quantize the file"

BAD |= {
    # ---- records
    **{f"record is {what}": Bad(layer("nvfp4", record(text)), f"{NO_RECORD} .*; re-quantize") for what, text in {
        "empty": b"", "zeros": bytes(8), "no JSON": b"nvfp4", "a list": b"[]", "a text": b'"nvfp4"', "null": b"null",
        "cut off": b'{"format": "nv', "no UTF-8": b'{"format": "\xff"}', "in UTF-16": '{"format": 1}'.encode("utf-16"),
        "60,000 deep": b"[" * 60_000, "too large": b" " * 64_001, "NaN": b'{"a": NaN}',
        "twice the same key": b'{"format": "mxfp8", "format": "nvfp4"}'}.items()},
    **{f"format {value!r}": Bad(layer("nvfp4", record({"format": value})), "a: format .* is not loadable by ComfyUI .*; re-q")
       for value in ("", "NVFP4", "nvfp4 ", "bf16", "fp32", "int4", "<script>", 7, True, [], {}, ["nvfp4"])},
    "format null and tensors that fit none": Bad(
        layer("int8_row", lambda t: (record({"format": None})(t), put("weight_scale", torch.ones(7))(t))),
        "format is missing and the tensors fit none; re-quantize"),
    **{f"convrot_groupsize {value!r}": Bad(
        layer("int8_row", record({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": value})),
        "a: .*group") for value in (0, 1, 2, 3, -4, 8, 12, 32, 128, 512, 256, 1 << 40, 4.0, "64", None, [64], True)},
    **{f"{key} is {value!r}": Bad(layer("int8_row", record({"format": "int8_tensorwise", key: value})),
                                  f"a: {key} is .*, neither true nor false; file damaged")
       for key in ("convrot", "full_precision_matrix_mult") for value in ("yes", [], {"a": 1}, 0.5, 64)},
    "int8_blockwise that says it is rotated": Bad(layer("int8", lambda t: (
        put("weight_scale", torch.ones(3, 4))(t), record({"format": "int8_blockwise", "convrot": True})(t))),
        "a: int8_blockwise with convrot, which no tool writes; re-quantize"),
    # ---- the header's records
    **{f"header records are {what}": Bad(layer("nvfp4", metadata={META: text}), NO_LAYERS) for what, text in {
        "empty": "", "no JSON": "{", "a list": "[]", "without layers": "{}", "null": "null", "a number": "7",
        "layers as a list": '{"layers": []}', "layers as a text": '{"layers": "a"}', "a record that is a number":
        '{"layers": {"a": 7}}', "a layer twice": '{"layers": {"a": {}, "a": {}}}',
        "100,000 deep": "[" * 100_000, "NaN": '{"layers": {"a": {"x": NaN}}}'}.items()},
    "header names a layer that is not there": Bad(
        layer("nvfp4", metadata={META: '{"layers": {"b": {"format": "nvfp4"}}}'}), "b: marked as quantized in the header"),
    "header names a script": Bad(layer("nvfp4", metadata={META: '{"layers": {"<script>\\n": {}}}'}),
                                 r"\\x3cscript>\\n: marked as quantized"),
    "header's format fits nothing": Bad(
        layer("int8", mark=False, metadata={META: '{"layers": {"a": {"format": "nvfp4"}}}'}), "a: .*nvfp4 needs"),
    # ---- entries of each format
    **{f"{label}: {suffix} missing": Bad(layer(label, without(suffix)), f"a: {suffix} is missing") for label, suffix in (
        ("nvfp4", "weight_scale"), ("nvfp4", "weight_scale_2"), ("mxfp8", "weight_scale"), ("int8", "weight_scale"),
        ("fp8_e4m3", "weight_scale"), ("fp8_e5m2", "weight_scale"))},
    **{f"{label}: weight missing": Bad(layer(label, without("weight")), "a: weight is missing") for label in (
        "nvfp4", "mxfp8", "int8", "int8_row", "int8_convrot_64", "fp8_e4m3")},
    **{f"{label}: weight of {len(shape)} dimensions": Bad(
        layer(label, put("weight", torch.zeros(shape, dtype=dtype))), "a: weight is .*, .* needs two dimensions")
       for label, dtype in (("nvfp4", BYTES), ("mxfp8", torch.float8_e4m3fn), ("int8", torch.int8))
       for shape in ((), (4,), (2, 2, 2))},
    **{f"{label}: weight as {dtype}": Bad(layer(label, put("weight", torch.ones(96, columns, dtype=dtype))),
                                          f"a: weight is {str(dtype)[6:]}, .* needs")
       for label, columns in (("nvfp4", 64), ("mxfp8", 128), ("int8", 128), ("fp8_e4m3", 128))
       for dtype in (torch.float32, torch.bfloat16, torch.int32)},
    **{f"{label}: scales {shape}": Bad(layer(label, put("weight_scale", torch.ones(shape))), "a: weight_scale is")
       for label in ("nvfp4", "mxfp8", "int8_row") for shape in ((2,), (96, 2), (128, 9), (1, 128), (2, 2, 2))},
    "nvfp4: block scales in fp32": Bad(layer("nvfp4", put("weight_scale", torch.ones(128, 8))),
                                       "weight_scale is float32, nvfp4 needs float8_e4m3fn"),
    "nvfp4: two tensor scales": Bad(layer("nvfp4", put("weight_scale_2", torch.ones(2))), "weight_scale_2 is"),
    "int8: scale in int32": Bad(layer("int8", put("weight_scale", torch.ones((), dtype=torch.int32))), "scale is int32"),
    "nvfp4: weight without a row": Bad(layer("nvfp4", put("weight", torch.zeros(0, 64, dtype=BYTES))), "no weights"),
    "nvfp4: weight without a column": Bad(layer("nvfp4", put("weight", torch.zeros(96, 0, dtype=BYTES))), "no weights"),
    "int8: weight without anything": Bad(layer("int8", put("weight", torch.zeros(0, 0, dtype=torch.int8))), "no weights"),
    "int8 without a record or a scale of use": Bad(layer("int8", put("weight_scale", torch.ones(5)), mark=False),
                                                   "has no quantization record and fits no format"),
    "mxfp8 unmarked with E5M2 codes": Bad(layer("mxfp8", lambda t: t.update(
        {"a.weight": t["a.weight"].view(torch.float8_e5m2)}), mark=False), "fits no format"),
    "scale under both its names": Bad(layer("fp8_e4m3", put("scale_weight", torch.ones(()))), "which are the same"),
    "input scale under both its names": Bad(
        layer("fp8_e4m3", lambda t: t.update({"a.scale_input": torch.ones(()), "a.input_scale": torch.ones(())})),
        "has scale_input and input_scale, which are the same"),
    "layer with and without a prefix": Bad(
        layer("int8", lambda t: t.update({f"diffusion_model.{k}": v.clone() for k, v in list(t.items())})),
        "is there with and without diffusion_model."),
    "weight_correction": Bad(layer("int8", put("weight_correction", torch.ones(4))), "asymmetric W4A8 weights are dropped"),
    # ---- branches
    "half a branch": Bad(layer("int8", put("absorb_up", torch.ones(96, 4).half())), "absorb_down is missing, half a"),
    "the other half": Bad(layer("int8", put("absorb_down", torch.ones(4, 128).half())), "absorb_up is missing, half a"),
    **{f"branch {what}": Bad(layer("int8", absorbed(up, down)), "absorb_up is .* and absorb_down is") for what, (up, down) in {
        "of rank 0": (torch.ones(96, 0).half(), torch.ones(0, 128).half()),
        "of two ranks": (torch.ones(96, 4).half(), torch.ones(5, 128).half()),
        "of another layer": (torch.ones(95, 4).half(), torch.ones(4, 128).half()),
        "of one dimension": (torch.ones(96).half(), torch.ones(128).half()),
        "of no dimension": (torch.ones(()).half(), torch.ones(()).half()),
        "of integers": (torch.ones(96, 4).int(), torch.ones(4, 128).int())}.items()},
    "branch of a plain layer": Bad(layer("int8", lambda t: t.update({"b.absorb_up": torch.ones(96, 4).half()})),
                                   "a branch of a layer that is not quantized here"),
    "absorb mode without a branch": Bad(layer("int8", metadata={"tessera": '{"mode": "absorb"}'}),
                                        "absorb_up and absorb_down are missing, but the file is marked absorb"),
    # ---- large ones
    "sparse 100 GB of nvfp4 with a scale too few": Bad(
        huge("nvfp4", weight=("U8", [100_000, 1_000_000], 100 * GB), weight_scale=("F8_E4M3", [8], 8),
             weight_scale_2=("F32", [], 4)), "weight_scale is"),
    "sparse 100 GB of int8 with scales of two rows": Bad(
        huge("int8_tensorwise", weight=("I8", [100_000, 1_000_000], 100 * GB), weight_scale=("F32", [2, 1], 8)),
        "weight_scale is"),
    "sparse weight of 2^32 rows": Bad(
        huge("int8_tensorwise", weight=("I8", [1 << 32, 16], 1 << 36), weight_scale=("F32", [2, 1], 8)), "weight_scale is"),
    "sparse weight in bf16 marked mxfp8": Bad(
        huge("mxfp8", weight=("BF16", [1_000_000, 50_000], 100 * GB), weight_scale=("U8", [8], 8)), "a: weight is"),
}  # fmt: skip


def _sparse_record(path):
    start = file({"a.comfy_quant": {"dtype": "U8", "shape": [100 * GB], "data_offsets": [0, 100 * GB]}})
    path.write_bytes(start)
    os.truncate(path, len(start) + 100 * GB)


def _loop(path):
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


BAD |= {
    "sparse record of 100 GB": Bad(_sparse_record, "is not a quantization record .100000000000 bytes"),
    # ---- what is no file
    "folder": Bad(lambda path: path.mkdir(), "is a folder; give a .safetensors file"),
    "pipe": Bad(lambda path: os.mkfifo(path), "is no file; give a .safetensors file"),
    "link to a device": Bad(lambda path: path.symlink_to("/dev/zero"), "is no file; give"),
    "link to a folder": Bad(lambda path: path.symlink_to("/"), "is a folder; give"),
    "link to itself": Bad(lambda path: path.symlink_to(path), "cannot be read"),
    "links in a circle": Bad(_loop, "cannot be read"),
    "link to nothing": Bad(lambda path: path.symlink_to("nowhere"), "cannot be read: No such file"),
    "link to a bad file above": Bad(lambda path: (
        (path.parent / "below").mkdir(), (path.parent / "real").write_bytes(b"no"),
        path.symlink_to(path.parent / "below" / ".." / "real")), "header length -1"),
}  # fmt: skip

SITE = {"mean": torch.ones(4), "amax": torch.ones(4), "second": torch.ones(4), "sample": torch.ones(2, 4).bfloat16()}
SAID = {"version": 1, "model": "m", "runs": 1, "layers": {"l": "s"}, "notes": [],
        "sites": {"s": {"tokens": 2, "skipped": 0}}}  # fmt: skip


def statistics(said=None, edit=None, text=None):
    def make(path):
        tensors = {f"s.{part}": tensor.clone() for part, tensor in SITE.items()}
        if edit:
            edit(tensors)
        metadata = {"tessera_calibration": json.dumps(SAID | (said or {})) if text is None else text}
        path.write_bytes(save(tensors, metadata))

    return make


BAD |= {f"calibration: {name}": Bad(make, words, "calibration") for name, (make, words) in {
    "a model": (layer("int8"), "is no calibration file; save one with"),
    "no JSON": (statistics(text="{"), "is not JSON"),
    "a list": (statistics(text="[]"), "is no calibration file"),
    "100,000 deep": (statistics(text="[" * 100_000), "is not JSON .*; record it again"),
    "a key twice": (statistics(text='{"version": 1, "version": 1}'), "version is there twice"),
    "newer": (statistics({"version": 2}), "calibration version 2, this Tessera reads 1"),
    "version of another kind": (statistics({"version": [1]}), "calibration version .* reads 1"),
    "sites a list": (statistics({"sites": []}), "metadata is incomplete"),
    "sites a text": (statistics({"sites": "s"}), "metadata is incomplete"),
    "site a number": (statistics({"sites": {"s": 1}}), "metadata is incomplete"),
    "layers a list": (statistics({"layers": ["l"]}), "metadata is incomplete"),
    "layer of a list": (statistics({"layers": {"l": []}}), "metadata is incomplete"),
    "tokens a text": (statistics({"sites": {"s": {"tokens": "2", "skipped": 0}}}), "metadata is incomplete"),
    "tokens Infinity": (statistics({"sites": {"s": {"tokens": float("inf"), "skipped": 0}}}), "is no number"),
    "tokens negative": (statistics({"sites": {"s": {"tokens": -1, "skipped": 0}}}), "metadata is incomplete"),
    "tokens 2^80": (statistics({"sites": {"s": {"tokens": 1 << 80, "skipped": 0}}}), "metadata is incomplete"),
    "runs 2^80": (statistics({"runs": 1 << 80}), "metadata is incomplete"),
    "notes a number": (statistics({"notes": 7}), "metadata is incomplete"),
    "layer without statistics": (statistics({"layers": {"l": "t"}}), "l: its statistics are missing"),
    "nothing in it": (statistics({"sites": {}, "layers": {}}), "holds no statistics; record it again"),
    **{f"{part} missing": (statistics(edit=lambda t, part=part: t.pop(f"s.{part}")), f"s: {part} is missing; record")
       for part in SITE},
    **{f"{part} of no dimension": (statistics(edit=lambda t, part=part: t.update(
        {f"s.{part}": torch.ones((), dtype=t[f"s.{part}"].dtype)})), "s.*; record it again") for part in SITE},
    "amax too short": (statistics(edit=lambda t: t.update({"s.amax": torch.ones(3)})), "does not fit a mean of 4"),
    "second moment of another size": (statistics(edit=lambda t: t.update({"s.second": torch.ones(4, 3)})), "does not fit"),
    "sample in fp32": (statistics(edit=lambda t: t.update({"s.sample": torch.ones(2, 4)})), "does not fit"),
    "truncated": (file({"s.mean": F32}, bytes(3)), "file has .* bytes"),
}.items()}  # fmt: skip

RULE = '[[rule]]\nnvfp4 = ["a"]\nreason = "r"\n'


def _sparse_text(path):
    path.write_text(RULE)
    os.truncate(path, 100 * GB)


BAD |= {f"recipe: {name}": Bad(make if callable(make) else make.encode() if isinstance(make, str) else make, words,
                               "recipe") for name, (make, words) in {
    "no TOML": ("a = ", "Invalid value"),
    "no UTF-8": (b"name = '\xff'", "utf-8"),
    "zeros": (bytes(64), "recipe"),
    "a model": (file({"a": F32}, bytes(8)), "recipe"),
    "sparse 100 GB": (_sparse_text, "has 100000000000 bytes, a recipe has up to"),
    "too long": ("#" * 400_001, "has 400001 bytes, a recipe has up to"),
    "pipe": (lambda path: os.mkfifo(path), "is not a file; give the path of a .toml file"),
    "folder": (lambda path: path.mkdir(), "is not a file|cannot be read"),
    "link to a device": (lambda path: path.symlink_to("/dev/zero"), "is not a file"),
    "link to itself": (lambda path: path.symlink_to(path), "cannot be read"),
    "lists in lists, 100,000 deep": ("a = " + "[" * 100_000 + "]" * 100_000, "nested too deep to be a recipe"),
    "tables in tables, 50,000 deep": ("a = " + "{a=" * 50_000 + "1" + "}" * 50_000, "nested too deep|recipe"),
    "key of 100,000 parts": ("a" + ".a" * 100_000 + " = 1", "has a key of too many parts"),
    "table of 100,000 parts": ("[a" + ".a" * 100_000 + "]", "has a key of too many parts"),
    "a key twice": ("name = 'a'\nname = 'b'", "Cannot overwrite"),
    "nothing": ("", "change nothing; add a"),
    "unknown key": ("color = 1", "unknown key 'color'"),
    "rule a number": ("rule = 1", "rule is not a list of tables"),
    "rule a list of numbers": ("rule = [1]", "rule is not a list of tables"),
    "rule without a format": ("[[rule]]\nreason = 'r'", "rule 1: no format"),
    "rule with two formats": ("[[rule]]\nnvfp4 = ['a']\nmxfp8 = ['b']\nreason = 'r'", "rule 1: nvfp4 and mxfp8"),
    "rule without a reason": ("[[rule]]\nnvfp4 = ['a']", "rule 1: no reason"),
    "unknown format": ("[[rule]]\nint3 = ['a']\nreason = 'r'", "unknown format 'int3'"),
    "group of 5,000 digits": (f"[[rule]]\nint8_convrot_{'4' * 5000} = ['a']\nreason = 'r'", "recipe"),
    "patterns a text": ("[[rule]]\nnvfp4 = 'a'\nreason = 'r'", "write a list of patterns"),
    "pattern a number": ("[[rule]]\nnvfp4 = [1]\nreason = 'r'", "write a list of patterns"),
    "rank a text": (RULE + "rank = '1'", "write a whole number"),
    "default a number": (RULE + "[default]", "default is"),
    "unknown architecture": ("architecture = 'nope'\n" + RULE, "nope"),
    "architecture that is not there": ("architecture = 'nope.toml'\n" + RULE, "nope.toml: cannot be read"),
    "brace that counts to a billion": ("[[rule]]\nnvfp4 = ['a.{0-999999999}']\nreason = 'r'", "counts beyond a million"),
    "brace that counts to 900,000": ("[[rule]]\nnvfp4 = ['a.{0-900000}']\nreason = 'r'", "counts more than 100000 layers"),
    "pattern of 40 stars": ("[[rule]]\nnvfp4 = ['" + "*a" * 40 + "']\nreason = 'r'", "has more than 12 stars"),
    "bad regular expression": ("[[rule]]\nnvfp4 = ['(']\nregex = true\nreason = 'r'", "is no regular expression"),
    "regular expression 20,000 deep": (
        "[[rule]]\nnvfp4 = ['" + "(" * 20_000 + ")" * 20_000 + "']\nregex = true\nreason = 'r'", "too deep or too"),
}.items()}  # fmt: skip
