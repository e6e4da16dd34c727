"""Promises of every format: pack is exact, comfy-kitchen reads and writes the same bytes, numbers stay in bounds."""

import comfy_kitchen as ck
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

from tessera import formats
from tessera.formats import FORMATS, INT8, MXFP8, NVFP4, Plain
from tessera.kernels import reference as ref

QUANTIZED = [
    *(cls() for cls in FORMATS.values() if not issubclass(cls, Plain)),
    *(formats.parse(label) for label in ("int8_row", "int8_convrot_4", "int8_convrot_16", "int8_convrot_64")),
    formats.parse("int8_convrot_256"),
]
SHAPES = [(128, 256), (96, 80), (100, 72), (1, 16), (300, 208), (63, 40)]
CASES = pytest.mark.parametrize(
    ("format", "shape"),
    [(f, s) for f in QUANTIZED for s in SHAPES if not getattr(f, "convrot", False) or s[1] % f.convrot_groupsize == 0],
    ids=lambda value: getattr(value, "label", str(value)),
)
MAX_ERROR = {"nvfp4": 0.11, "mxfp8": 0.03, "float8_e4m3fn": 0.03, "float8_e5m2": 0.06, "int8_tensorwise": 0.025}


def weight(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(shape[0], 1, generator=generator) + 0.5
    return torch.randn(shape, generator=generator) * 0.05 * rows


def stored_bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


@CASES
def test_pack_then_unpack_is_exact(format, shape):
    quantized = format.encode(weight(shape))
    entries = format.pack(quantized)
    for suffix, spec in format.storage(*shape).items():
        assert (entries[suffix].dtype, tuple(entries[suffix].shape)) == (spec.dtype, spec.shape), suffix
    again = format.unpack(entries, *shape)
    for field in ("qdata", "scale", "block_scale"):
        a, b = getattr(quantized, field), getattr(again, field)
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(stored_bytes(a), stored_bytes(b)), field
    assert sum(t.nbytes for t in entries.values()) == format.nbytes(*shape)


@CASES
def test_error_is_within_the_formats_bound(format, shape):
    w = weight(shape)
    error = (format.decode(format.encode(w)) - w).norm() / w.norm()
    assert error < MAX_ERROR[format.name]


@pytest.mark.parametrize("format", QUANTIZED, ids=lambda f: f.label)
def test_record_round_trips(format):
    format = format.for_shape(64, 256)
    storage = format.storage(64, 256)
    assert formats.from_record(format.record(), storage) == format
    assert formats.parse(format.label) == format


@pytest.mark.parametrize("format", QUANTIZED, ids=lambda f: f.label)
def test_zero_weight_decodes_to_zero(format):
    format = format.for_shape(64, 256)
    entries = format.pack(format.encode(torch.zeros(64, 256)))
    assert all(torch.isfinite(t.float()).all() for t in entries.values())
    assert format.decode(format.unpack(entries, 64, 256)).abs().max() == 0


def kitchen_entries(format, w):
    """The same weight packed by comfy-kitchen itself."""
    if isinstance(format, NVFP4):
        scale = w.abs().amax() / (448 * 6)
        qdata, block_scale = ck.quantize_nvfp4(w, scale, pad_16x=any(n % 16 for n in w.shape))
        return {"weight": qdata, "weight_scale": block_scale, "weight_scale_2": scale}
    if isinstance(format, MXFP8):
        qdata, block_scale = ck.quantize_mxfp8(w, pad_32x=any(n % 32 for n in w.shape))
        return {"weight": qdata, "weight_scale": block_scale.view(torch.uint8)}
    layout = get_layout_class(format.layout) if isinstance(format, INT8) else None
    if layout is not None:
        qdata, params = layout.quantize(
            w, per_channel=format.per_row, convrot=format.convrot, convrot_groupsize=format.convrot_groupsize or 256
        )
        return {"weight": qdata, "weight_scale": params.scale}
    scale = w.abs().amax() / torch.finfo(format.dtype).max
    return {"weight": ck.quantize_per_tensor_fp8(w, scale, format.dtype), "weight_scale": scale}


@CASES
def test_bytes_equal_comfy_kitchen(format, shape):
    w = weight(shape)
    ours, theirs = format.pack(format.encode(w)), kitchen_entries(format, w)
    assert ours.keys() == theirs.keys()
    for suffix, tensor in ours.items():
        a, b = stored_bytes(tensor), stored_bytes(theirs[suffix])
        if format.name.startswith("float8") and suffix == "weight":
            # kitchen multiplies by the reciprocal of the scale: a value at a tie may fall to the other side
            assert (a != b).float().mean() < 0.002
        else:
            assert torch.equal(a, b), suffix


def as_kitchen(format, entries, shape):
    cls = {"float8_e4m3fn": "TensorCoreFP8Layout", "float8_e5m2": "TensorCoreFP8Layout"}.get(format.name, format.layout)
    layout = get_layout_class(cls)
    params = {"scale": entries["weight_scale"], "orig_dtype": torch.float32, "orig_shape": shape}
    if isinstance(format, NVFP4):
        params |= {"scale": entries["weight_scale_2"], "block_scale": entries["weight_scale"]}
    if isinstance(format, MXFP8):
        params["scale"] = entries["weight_scale"].view(torch.float8_e8m0fnu)
    if isinstance(format, INT8) and format.convrot:
        params |= {"convrot": True, "convrot_groupsize": format.convrot_groupsize}
    return QuantizedTensor(entries["weight"], cls, layout.Params(**params))


@CASES
def test_decode_equals_comfy_kitchen(format, shape):
    entries = format.pack(format.encode(weight(shape)))
    ours = format.decode(format.unpack(entries, *shape))
    theirs = as_kitchen(format, entries, shape).dequantize()[: shape[0], : shape[1]]
    tolerance = 1e-6 * ours.abs().max() if isinstance(format, INT8) and format.convrot else 0  # order of additions
    torch.testing.assert_close(ours, theirs.reshape(shape), rtol=0, atol=float(tolerance))


def test_e2m1_ties_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 100.0, -0.25, -5.0])
    assert ref.e2m1_decode(ref.e2m1_encode(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 0, -4]


def test_e2m1_every_code_round_trips():
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(ref.e2m1_encode(ref.e2m1_decode(codes)), codes)


def test_e2m1_round_equals_encode_then_decode():
    x = torch.cat([torch.linspace(0, 6, 200_001), torch.tensor(ref.E2M1_VALUES)])
    assert torch.equal(ref.e2m1_round(x), ref.e2m1_decode(ref.e2m1_encode(x)))


def test_swizzle_golden_offsets():
    """Offsets of format.md 2.3 for a tensor of 8 scale columns."""
    for (row, column), offset in {
        (0, 1): 1, (32, 0): 4, (1, 0): 16, (0, 4): 512, (5, 6): 594, (37, 6): 598, (128, 0): 1024,
    }.items():  # fmt: skip
        scales = torch.zeros(256, 8, dtype=torch.uint8)
        scales[row, column] = 1
        assert ref.swizzle(scales).flatten().argmax() == offset


@pytest.mark.parametrize("shape", [(128, 4), (256, 8), (100, 5), (300, 13)])
def test_swizzle_equals_comfy_kitchen(shape):
    from comfy_kitchen.float_utils import to_blocked

    scales = torch.randint(0, 255, shape, dtype=torch.uint8)
    assert torch.equal(ref.swizzle(scales), to_blocked(scales, flatten=False))
    assert torch.equal(ref.unswizzle(ref.swizzle(scales), *shape), scales)


def test_high_nibble_is_the_even_column():
    assert ref.e2m1_decode(ref.unpack_nibbles(torch.tensor([[0x2F]], dtype=torch.uint8))).tolist() == [[1.0, -6.0]]


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_rotation_is_its_own_inverse_and_orthogonal(group):
    x = torch.randn(3, 512)
    rotated = ref.rotate(x, group)
    torch.testing.assert_close(ref.rotate(rotated, group), x, rtol=0, atol=2e-6)
    torch.testing.assert_close(rotated.norm(dim=1), x.norm(dim=1))


@pytest.mark.parametrize(("label", "columns", "words"), [
    ("int8_convrot_512", 512, "not a power of 4"),
    ("int8_convrot_64", 96, "not a multiple of the ConvRot group 64"),
    ("int8_convrot", 102, "not a multiple of 4"),
    ("int9", 64, "unknown format 'int9'"),
])  # fmt: skip
def test_what_a_format_cannot_store_is_said(label, columns, words):
    with pytest.raises(ValueError, match=words):
        formats.parse(label).for_shape(64, columns)


def test_convrot_group_is_the_largest_that_divides():
    groups = {k: formats.parse("int8_convrot").for_shape(8, k).convrot_groupsize for k in (3840, 10240, 320, 48, 20)}
    assert groups == {3840: 256, 10240: 256, 320: 64, 48: 16, 20: 4}


def test_wrong_entries_are_named():
    format, shape = NVFP4(), (128, 64)
    entries = format.pack(format.encode(weight(shape)))
    with pytest.raises(ValueError, match="weight_scale_2 is missing"):
        format.unpack({k: v for k, v in entries.items() if k != "weight_scale_2"}, *shape)
    with pytest.raises(ValueError, match=r"weight_scale is \(128, 1\), nvfp4 needs \(128, 4\)"):
        format.unpack(entries | {"weight_scale": torch.zeros(128, 1)}, *shape)
    with pytest.raises(ValueError, match="weight is bfloat16, nvfp4 needs uint8"):
        format.unpack(entries | {"weight": torch.zeros(128, 32, dtype=torch.bfloat16)}, *shape)


def test_not_finite_weight_is_located():
    w = torch.zeros(4, 4)
    w[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"1 values are not finite, the first at \[2, 3\]"):
        formats.require_finite(w)
