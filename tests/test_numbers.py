"""Numbers are true: golden files never change, every shape and value round-trips or is refused, twice is the same."""

import hashlib
import importlib.util
import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import powercut
from conftest import TESTS
from synthetic import fingerprint
from tessera import formats
from tessera.checkpoint import Checkpoint
from tessera.formats import FORMATS, INT8, MXFP8, NVFP4, Plain, TensorSpec, base
from tessera.quantization import metrics, pipeline
from tessera.quantization.pipeline import Settings
from tessera.writer import Writer

GOLDEN = TESTS / "golden"
LISTED = json.loads((GOLDEN / "golden.json").read_text())
OWN = sorted(path.parent for path in (GOLDEN / "own").glob("*/golden.json"))
PACKED = ("nvfp4", "mxfp8", "float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_row", "int8_convrot")
PLAIN = tuple(name for name, cls in FORMATS.items() if issubclass(cls, Plain))
EVERY = pytest.mark.parametrize("label", (*PACKED, *PLAIN))
EVERY_PACKED = pytest.mark.parametrize("label", PACKED)

SIZES = {"tiny": (1, 17), "odd": (18, 140), "wide": (128, 300)}
CHECKED = settings(derandomize=True, database=None, deadline=None, max_examples=40,
                   suppress_health_check=list(HealthCheck))  # fmt: skip


# ---- golden files


def test_golden_files_never_change():
    listed = {f"{name}.safetensors": sha256 for name, sha256 in LISTED["sources"].items()}
    for file in LISTED["files"].values():
        listed |= file["sha256"]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in GOLDEN.glob("*.safetensors")}
    assert found == listed


@pytest.mark.parametrize("folder", OWN, ids=lambda path: path.name)
def test_what_a_version_wrote_is_read_as_that_version_meant_it(folder):
    spec = importlib.util.spec_from_file_location("own_golden", GOLDEN / "own" / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    said, found = json.loads((folder / "golden.json").read_text()), make.described(folder)
    assert found.keys() == said.keys() and found["sha256"] == said["sha256"]
    for part in said.keys() - {"sha256"}:
        assert found[part].keys() == said[part].keys()
        for name, numbers in said[part].items():
            assert found[part][name] == pytest.approx(numbers, rel=1e-5, abs=1e-5), (part, name)


def test_every_format_has_a_golden_file():
    held = {layer.format.name for folder in OWN for layer in Checkpoint(folder / "model.safetensors").layers.values()}
    assert held == {name for name in FORMATS if name not in PLAIN}


# ---- every shape, every kind of numbers


def settled(label, shape):
    format = formats.parse(label)
    if isinstance(format, INT8) and format.convrot and shape[1] % 4:
        shape = (shape[0], shape[1] + 4 - shape[1] % 4)
    return format.for_shape(*shape), shape


@st.composite
def weights(draw, label):
    """(format, weight): of any shape, 1e-6 to 1e3 large, some rows or blocks zero, some values far out."""
    low, high = SIZES[draw(st.sampled_from(sorted(SIZES)))]
    format, shape = settled(label, (draw(st.integers(low, high)), draw(st.integers(low, high))))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    weight = torch.randn(shape, generator=random) * 10.0 ** draw(st.integers(-6, 3))
    if draw(st.booleans()):
        weight[draw(st.integers(0, shape[0] - 1))] = 0.0
    if draw(st.booleans()):
        first = draw(st.integers(0, shape[1] - 1))
        weight[:, first : first + 32] = 0.0
    if draw(st.booleans()):
        weight[draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))] *= 100
    return format, weight


def bound(format, quantized, weight):
    """The most that rounding to nearest may move each number."""
    if isinstance(format, NVFP4):  # the widest gap is 2 steps; a block scale may be rounded down by a sixteenth
        step = (quantized.scale * quantized.block_scale.float()).repeat_interleave(16, 1)[:, : weight.shape[1]]
        return torch.where(step == 0, weight.abs(), step)
    if isinstance(format, MXFP8):
        step = torch.exp2(quantized.block_scale.float() - 127).repeat_interleave(32, 1)[:, : weight.shape[1]]
        return torch.maximum(weight.abs() / 16, step * 2.0**-10)
    if isinstance(format, INT8):
        return quantized.scale.expand_as(weight) / 2
    part, least = {"float8_e4m3fn": (16, 2.0**-10), "float8_e5m2": (8, 2.0**-17)}[format.name]
    return torch.maximum(weight.abs() / part, quantized.scale * least)


@EVERY_PACKED
@CHECKED
@given(data=st.data())
def test_every_weight_is_within_half_a_step_and_its_codes_survive_the_file(label, data):
    format, weight = data.draw(weights(label))
    quantized = format.encode(weight)
    entries = format.pack(quantized)
    storage = format.storage(*weight.shape)
    assert {suffix: TensorSpec(entry.dtype, tuple(entry.shape)) for suffix, entry in entries.items()} == storage
    again = format.unpack(entries, *weight.shape)
    for field in ("qdata", "scale", "block_scale"):
        one, other = getattr(quantized, field), getattr(again, field)
        assert (one is None and other is None) or torch.equal(one.float(), other.float())
    decoded = format.decode(again)
    off = (decoded - weight).abs()
    if getattr(format, "convrot", False):  # the steps are those of the rotated weight
        off = (format.rotate(decoded) - format.rotate(weight)).abs()
        off = (off - 1e-5 * weight.abs().amax()).clamp(min=0)
    assert (off <= bound(format, quantized, weight) * (1 + 1e-4) + 1e-30).all()


@EVERY_PACKED
@CHECKED
@given(data=st.data())
def test_a_file_of_any_shape_is_read_by_us_and_by_safetensors_as_it_was_written(label, data, tmp_path_factory):
    format, weight = data.draw(weights(label))
    prefix = data.draw(st.sampled_from(["", "model.diffusion_model.", "diffusion_model."]))
    path = tmp_path_factory.mktemp("shapes") / "model.safetensors"
    record = format.record() | {"orig_shape": list(weight.shape)}
    tensors = format.pack(format.encode(weight)) | {"comfy_quant": formats.marker(record)}
    tensors = {f"{prefix}layers.0.w.{suffix}": tensor for suffix, tensor in tensors.items()}
    with Writer(path, {k: TensorSpec(t.dtype, tuple(t.shape)) for k, t in tensors.items()}, 200) as writer:
        for key in data.draw(st.permutations(sorted(tensors))):
            writer.write(key, tensors[key])
        writer.finish({"made": "here"})
        writer.publish()
    file = Checkpoint(path)
    assert file.repairs == [] or "rotated" in file.repairs[0]
    assert torch.equal(file.weight("layers.0.w"), format.decode(format.encode(weight)))
    with safe_open(path, "pt") as opened:
        assert sorted(opened.keys()) == sorted(tensors)
        for key, tensor in tensors.items():
            assert torch.equal(opened.get_tensor(key).flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


@pytest.mark.parametrize(("label", "shape"), [
    ("nvfp4", (129, 321)), ("nvfp4", (130, 132)), ("nvfp4", (132, 140)), ("nvfp4", (261, 193)), ("nvfp4", (398, 213)),
    ("mxfp8", (129, 137)), ("mxfp8", (135, 135)), ("mxfp8", (257, 286)), ("mxfp8", (279, 139)), ("mxfp8", (131, 158)),
])  # fmt: skip
def test_padding_of_block_scales_is_not_taken_for_another_order(label, shape, tmp_path):
    """Such scales, which end in zeros, were read row by row once: a wrong model without a word."""
    for seed in range(8):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        weight[:, 40 : 40 + 32 * (seed % 2)] = 0.0
        format, path = formats.parse(label), tmp_path / f"{seed}.safetensors"
        tensors = format.pack(format.encode(weight)) | {"comfy_quant": formats.marker(format.record())}
        save_file({f"layers.0.w.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}, path)
        file = Checkpoint(path)
        assert file.repairs == []
        assert torch.equal(file.weight("layers.0.w", shape), format.decode(format.encode(weight)))


# ---- what is no number, nearly none, or too many at once


def layer(label, weight, **options):
    format, _ = settled(label, weight.shape)
    made = pipeline.quantize(format, weight, Settings(**{"rank": 2} | options), 0)
    return format.decode(format.unpack(made.entries, *weight.shape)), made


def ordinary(scale=0.02):
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(3)) * scale


@EVERY
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_and_located(label, value):
    weight = ordinary()
    weight[5, 7] = value
    with pytest.raises(ValueError, match=r"1 values are not finite, the first at \[5, 7\] is"):
        layer(label, weight)


@EVERY
@pytest.mark.parametrize("mode", pipeline.MODES)
def test_zero_weights_stay_zero(label, mode):
    decoded, made = layer(label, torch.zeros(32, 64), mode=mode)
    assert not decoded.any() and made.error == 0
    assert all(entry.float().isfinite().all() for entry in made.entries.values())


@EVERY
@pytest.mark.parametrize("mode", pipeline.MODES)
def test_zero_rows_and_columns_stay_zero_and_refuse_nothing(label, mode):
    """A branch's rounding noise in them must not count as blocks that vanish."""
    weight = ordinary()
    weight[::4], weight[:, 16:32] = 0.0, 0.0
    decoded, made = layer(label, weight, mode=mode)
    if not getattr(settled(label, weight.shape)[0], "convrot", False):  # rotating spreads columns
        assert not decoded[:, 16:32].any()
    assert not decoded[::4].any()
    assert made.error < 0.12 or mode == "absorb"


@EVERY_PACKED
def test_numbers_below_the_smallest_normal_one_become_zero_or_are_kept_and_the_error_says_which(label):
    for scale in (1e-45, 1e-42, 1e-39, 1e-36, 1e-30, 1e-20):
        weight = ordinary(scale)
        try:
            decoded, made = layer(label, weight)
        except ValueError as problem:
            assert label == "nvfp4" and "would become zero" in str(problem)
            continue
        assert decoded.isfinite().all() and all(entry.float().isfinite().all() for entry in made.entries.values())
        true = ((decoded.double() - weight.double()).norm() / weight.double().norm()).item()
        assert made.error == pytest.approx(true, rel=1e-3, abs=1e-6), scale


@EVERY
def test_what_is_beyond_a_format_is_refused_and_nothing_overflows(label):
    limit = torch.finfo(formats.parse(label).dtype).max if label in PLAIN else pipeline.LARGEST
    weight = ordinary()
    weight = weight / weight.abs().max() * (min(limit, 1e38) * 0.9)
    decoded, made = layer(label, weight)
    assert decoded.isfinite().all() and made.error < 0.12 and made.error == made.error
    if limit < 1e38:
        weight[0, 0] = limit * 1.1
        with pytest.raises(ValueError, match=r"its largest weight is .*, .* takes .*; keep this layer, or repair"):
            layer(label, weight)


def test_one_outlier_that_takes_the_whole_range_of_nvfp4_is_refused_with_a_remedy():
    weight = ordinary()
    weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"blocks of 16 would become zero beside the largest weight .*; use mxfp8"):
        layer("nvfp4", weight)
    for label in ("mxfp8", "int8_row"):  # there it costs its own block or row alone
        decoded, _ = layer(label, weight)
        assert metrics.relative_error(decoded[1:], weight[1:]) < 0.03


def test_the_measured_error_neither_vanishes_nor_overflows():
    x = ordinary(1.0)
    for scale in (1e-44, 1e-30, 1e-19, 1.0, 1e19, 1e30):
        assert metrics.relative_error(torch.zeros_like(x), x * scale) == pytest.approx(1.0)
        assert metrics.norm(x * scale) == pytest.approx((x * scale).double().norm().item(), rel=1e-6)
    assert metrics.relative_error(torch.zeros(3), torch.zeros(3)) == 0


# ---- twice the same


def encoded(label, weight):
    format, _ = settled(label, weight.shape)
    quantized = format.encode(weight)
    return [entry.flatten().view(torch.uint8).clone() for entry in format.pack(quantized).values()], quantized, format


@EVERY
def test_codes_do_not_depend_on_threads_or_on_how_many_rows_are_done_at_once(label, monkeypatch):
    weight, threads = ordinary().repeat(9, 4)[:283, :192].contiguous(), torch.get_num_threads()
    entries, quantized, format = encoded(label, weight)
    decoded = format.decode(quantized)
    try:
        for count, chunk in ((1, 1 << 20), (2, 1 << 20), (2, 4096), (1, 200)):
            torch.set_num_threads(count)
            monkeypatch.setattr(base, "CHUNK", chunk)
            found, _, _ = encoded(label, weight)
            assert all(torch.equal(one, other) for one, other in zip(entries, found, strict=True)), (count, chunk)
            assert metrics.relative_error(format.decode(quantized), decoded) < 1e-6
    finally:
        torch.set_num_threads(threads)


def test_a_job_gives_the_same_bytes_twice_whatever_the_order_of_its_tensors_on_disk(tmp_path):
    """With resume: tests/test_resume.py and tests/powercut.py. With other processes: tests/test_workers.py."""
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        powercut.source(tmp_path / name)
        powercut.run(tmp_path / name)
        made.append(fingerprint(tmp_path / name / "out"))
    assert made[0] == made[1]
