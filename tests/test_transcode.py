"""A layer in another format: near what the file's codes stand for, at the price that is told, or refused."""

import math

import pytest
import torch

from tessera import formats, transcode
from tessera.formats.fp8 import FP8Row
from tessera.kernels import dispatch
from tessera.kernels import reference as ref
from tessera.kernels.dispatch import Plan
from tessera.quantization.metrics import relative_error
from tessera.transcode import Cache

REAL = [(3840, 3840), (512, 10240), (11520, 256)]  # widths of Z-Image, cut to what a test may take


def plan(target, code_max=127):
    bound = dispatch.FP8_BOUND if target == "fp8_row" else dispatch.INT8_BOUND
    return Plan(dispatch.TRANSCODE, "test", "x", target, code_max, bound)


def weights(shape, kind="gaussian"):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator) * 0.02
    if kind == "heavy":  # Student-t with 4 degrees of freedom
        chi = torch.randn(4, *shape, generator=generator).square().sum(0) / 4
        return w / chi.sqrt()
    return w * torch.exp(torch.randn(shape[1], generator=generator)) if kind == "channels" else w


def stored(label, w):
    format = formats.parse(label)
    return format, format.pack(format.encode(w))


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "channels"])
@pytest.mark.parametrize(("label", "largest", "total"), [
    ("nvfp4", 127, (0.0955, 0.0922, 0.0915)), ("mxfp8", 127, (0.0279, 0.0279, 0.0279)),
])  # fmt: skip
def test_int8_adds_what_was_measured_before(label, largest, total, kind):
    """kernels.md 3: relative weight error of NVFP4 and MXFP8 after transcoding to INT8 in groups of 256."""
    w = weights((1024, 3840), kind)
    format, entries = stored(label, w)
    made = transcode.transcode(format, entries, w.shape, plan("int8_convrot_256", largest))
    error = relative_error(made.format.decode(made.format.unpack(made.entries, *w.shape)), w)
    expected = dict(zip(("gaussian", "heavy", "channels"), total, strict=True))[kind]
    assert error == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("shape", REAL)
@pytest.mark.parametrize("label", ["nvfp4", "mxfp8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("largest", [127, 64])
def test_told_distance_is_the_distance_and_stays_in_its_bound(label, shape, largest):
    w = weights(shape)
    format, entries = stored(label, w)
    made = transcode.transcode(format, entries, shape, plan("int8_convrot_256", largest))
    before, after = format.decode(format.unpack(entries, *shape)), made.format.unpack(made.entries, *shape)
    assert made.distance == pytest.approx(relative_error(made.format.decode(after), before), rel=1e-3)
    own = transcode.ROUNDING[format.name]
    assert made.added == pytest.approx(math.hypot(own, made.distance) - own) and made.added < dispatch.INT8_BOUND
    assert made.entries["weight"].abs().max() <= largest
    assert {k: v.shape for k, v in made.entries.items()} == {"weight": shape, "weight_scale": (shape[0], 1)}


@pytest.mark.parametrize("shape", REAL)
def test_mxfp8_keeps_its_codes_as_fp8_with_row_scales(shape):
    w = weights(shape)
    format, entries = stored("mxfp8", w)
    made = transcode.transcode(format, entries, shape, plan("fp8_row"))
    source = format.unpack(entries, *shape)
    values = made.format.decode(made.format.unpack(made.entries, *shape))
    assert made.distance <= 1e-4 and (values == format.decode(source)).float().mean() > 0.999
    assert torch.equal(ref.power_of_2_scale(made.entries["weight_scale"], 1.0), made.entries["weight_scale"])


def test_row_scales_are_powers_of_two_that_saturate_nothing():
    amax = torch.tensor([0.0, 448.0, 448.1, 1e-30, 2.0**-130, 3e4, 447.9999])
    scale = ref.power_of_2_scale(amax, 448.0)
    assert (amax / scale <= 448.0).all() and scale[0] == 1.0 and scale[1] == 1.0 and scale[2] == 2.0
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))


def test_a_zero_layer_stays_zero():
    for label, target in (("nvfp4", "int8_convrot_256"), ("mxfp8", "fp8_row")):
        format, entries = stored(label, torch.zeros(32, 256))
        made = transcode.transcode(format, entries, (32, 256), plan(target))
        assert made.distance == 0.0 and not made.format.decode(made.format.unpack(made.entries, 32, 256)).any()


def test_scales_without_numbers_are_refused():
    format, entries = stored("nvfp4", weights((32, 256)))
    entries["weight_scale_2"] = torch.tensor(float("nan"))
    with pytest.raises(ValueError, match="its scales hold no numbers; make the file again"):
        transcode.transcode(format, entries, (32, 256), plan("int8_convrot_256"))


def test_smoothing_is_folded_back():
    w, smoothing = weights((64, 256)), torch.exp2(torch.randint(-2, 3, (256,)).float())
    format, entries = stored("nvfp4", w / smoothing)
    made = transcode.transcode(format, entries | {"pre_quant_scale": smoothing}, w.shape, plan("int8_convrot_256"))
    meant = format.decode(format.unpack(entries, *w.shape)) * smoothing
    kept = made.format.decode(made.format.unpack(made.entries, *w.shape))
    assert relative_error(kept, meant) == pytest.approx(made.distance, rel=1e-3) and made.distance < 0.01


def test_padded_rows_and_columns_are_cut_off():
    w = weights((100, 80))
    format, entries = stored("nvfp4", w)
    made = transcode.transcode(format, entries, (100, 80), plan("int8_convrot_16"))
    assert tuple(made.entries["weight"].shape) == (100, 80) and made.added < dispatch.INT8_BOUND


def test_row_fp8_rounds_like_fp8():
    w = weights((128, 256))
    format = FP8Row()
    made = format.pack(format.encode(w))
    assert 0.02 < relative_error(format.decode(format.unpack(made, 128, 256)), w) < 0.03


def test_digest_knows_bytes_target_and_codes():
    _, entries = stored("nvfp4", weights((32, 256)))
    other = {**entries, "weight": entries["weight"] ^ 1}
    plans = (plan("int8_convrot_256"), plan("int8_convrot_64"), plan("int8_convrot_256", 64))
    digests = [transcode.digest(entries, p) for p in plans] + [transcode.digest(other, plans[0])]
    assert len(set(digests)) == 4 and transcode.digest(dict(reversed(entries.items())), plans[0]) == digests[0]


def test_cache_gives_back_what_was_saved_and_nothing_else(tmp_path):
    path, wanted = tmp_path / "folder" / "cache.safetensors", plan("int8_convrot_256")
    format, entries = stored("nvfp4", weights((32, 256)))
    made, key = transcode.transcode(format, entries, (32, 256), wanted), transcode.digest(entries, wanted)
    cache = Cache(path)
    assert cache.read("a", key, made.format) is None
    cache.add("a", key, made)
    cache.save()
    again = Cache(path)
    found = again.read("a", key, made.format)
    assert all(torch.equal(found.entries[suffix], tensor) for suffix, tensor in made.entries.items())
    assert (found.distance, found.added, found.format) == (made.distance, made.added, made.format)
    assert (
        not again.stale and again.read("a", "other", made.format) is None and again.read("b", key, made.format) is None
    )
    before = path.stat().st_mtime_ns
    again.save()
    assert path.stat().st_mtime_ns == before  # nothing new, nothing written


@pytest.mark.parametrize("content", [b"", b"not a file", b'\x10\0\0\0\0\0\0\0{"a": 1}        '])
def test_a_damaged_cache_is_made_anew(tmp_path, content):
    path = tmp_path / "cache.safetensors"
    path.write_bytes(content)
    format, entries = stored("mxfp8", weights((32, 256)))
    made = transcode.transcode(format, entries, (32, 256), plan("fp8_row"))
    cache = Cache(path)
    assert cache.read("a", "key", made.format) is None
    cache.add("a", "key", made)
    cache.save()
    assert Cache(path).read("a", "key", FP8Row()) is not None
    assert [file.name for file in tmp_path.iterdir()] == ["cache.safetensors"]
