"""Calibration without ComfyUI: sums against float64, moments as a metric, the recorder's sites, files, saved inputs."""

import json
import runpy
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import synthetic
from tessera import calibration_file, cli, saved_inputs
from tessera.checkpoint import Checkpoint
from tessera.formats import MXFP8, NVFP4
from tessera.kernels import reference as ref
from tessera.quantization.calibration import (
    SAMPLE,
    Accumulator,
    Calibration,
    fingerprint,
    full_precision,
    gram,
    moment_bytes,
)
from tessera.quantization.moment import BLOCK
from tessera.quantization.recorder import Forward, Recorder, RecordOptions

WIDTHS = (1, 63, 128, 200, 300)
KINDS = ("full", "block", "diagonal")
CLOSE = 1e-5  # relative L2 of fp32 sums against float64 ones


def relative(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


def inputs(width, tokens=500, seed=0):
    """Correlated columns of very different size, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    x = x + x.roll(1, 1) + 0.3
    return x * torch.logspace(-2, 1, width)


def dense(moment, kind=None):
    """The matrix [in, in] that a moment stands for."""
    if moment.matrix.ndim == 1:
        return moment.matrix.diag()
    if moment.matrix.ndim == 2:
        return moment.matrix
    return torch.block_diag(*moment.matrix)[: moment.in_features, : moment.in_features]


def masked(matrix, kind, block=BLOCK):
    """A dense matrix with zeros where a moment of that kind knows nothing."""
    index = torch.arange(len(matrix))
    if kind == "diagonal":
        return matrix * torch.eye(len(matrix))
    return matrix if kind == "full" else matrix * (index[:, None] // block == index // block)


def collected(calls, kind="full", weights=None):
    accumulator = Accumulator(calls[0].shape[1], kind)
    for x, weight in zip(calls, weights or [1.0] * len(calls), strict=True):
        accumulator.add(x, weight)
    return accumulator.statistics()


# Accumulator


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_sums_equal_those_in_float64(width, kind):
    calls = [inputs(width, 40 * (i + 1), seed=i) for i in range(4)]
    found = collected(calls, kind)
    x = torch.cat(calls).double()
    assert found.tokens == len(x) == 400 and found.skipped == 0
    assert relative(found.mean, x.mean(0)) < CLOSE
    assert torch.equal(found.amax, torch.cat(calls).abs().amax(0))
    truth = masked((x.T @ x / len(x)).float(), kind)
    assert relative(dense(found.moment()), truth) < CLOSE
    assert found.moment().kind == kind
    assert found.second.ndim == 1 or torch.equal(found.second, found.second.mT)


def test_weight_times_tokens_is_a_calls_share():
    a, b = inputs(32, 100, seed=1), 50 * inputs(32, 300, seed=2)
    found = collected([a, b], weights=[3.0, 0.5])
    share = torch.tensor([3.0 * 100, 0.5 * 300], dtype=torch.float64)
    share /= share.sum()
    mean = share[0] * a.double().mean(0) + share[1] * b.double().mean(0)
    second = share[0] * (a.double().T @ a.double()) / 100 + share[1] * (b.double().T @ b.double()) / 300
    assert relative(found.mean, mean) < CLOSE and relative(found.second, second) < CLOSE


@pytest.mark.parametrize("format", [NVFP4(), MXFP8()], ids=lambda f: f.name)
def test_noise_is_the_formats_rounding_error(format):
    x = inputs(96)
    error = (format.decode(format.encode(x)) - x).double().square().mean(0)
    assert error.sum() > 0
    assert relative(collected([x]).noise[format.name], error) < CLOSE


def test_sample_has_the_moment_of_what_it_stands_for():
    calls = [inputs(16, 2000, seed=i) * 10**i for i in range(3)]
    found = collected(calls, weights=[1 / x.square().mean().item() for x in calls])
    assert found.sample.shape == (SAMPLE, 16)
    power = found.sample.float().square().mean() / found.moment().diagonal().mean()
    assert 0.8 < power < 1.25


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_tokens_that_are_not_finite_are_left_out_and_counted(bad):
    x = inputs(40)
    spoiled = x.clone()
    spoiled[[3, 77], [0, 39]] = bad  # 1e30 is finite, its square is not
    keep = torch.ones(len(x), dtype=torch.bool)
    keep[[3, 77]] = False
    found, truth = collected([spoiled]), collected([x[keep]])
    assert found.skipped == 2 and found.tokens == len(x) - 2
    for part in ("mean", "amax", "second", "sample"):
        assert torch.equal(getattr(found, part), getattr(truth, part))
    assert all(torch.isfinite(value).all() for value in found.noise.values())


def test_nothing_finite_is_no_statistics():
    accumulator = Accumulator(8)
    accumulator.add(torch.full((5, 8), float("nan")))
    assert accumulator.statistics() is None and accumulator.skipped == 5


def test_half_precision_inputs_are_summed_in_fp32():
    x = inputs(64).bfloat16()
    assert relative(collected([x]).second, x.double().T @ x.double() / len(x)) < CLOSE


def test_a_lower_precision_of_the_process_changes_no_sum():
    x, before = inputs(256), torch.get_float32_matmul_precision()
    expected = collected([x]).second
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(collected([x]).second, expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_inputs_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"inputs are \[3, 7\], expected \[tokens, 8\]"):
        Accumulator(8).add(torch.ones(3, 7))


@pytest.mark.parametrize("width", WIDTHS)
def test_narrowing_keeps_what_the_narrower_moment_holds(width):
    x, later = inputs(width), inputs(width, seed=1)
    for kinds in (("full", "block"), ("full", "block", "diagonal"), ("block", "diagonal"), ("block", "block")):
        accumulator = Accumulator(width, kinds[0])
        accumulator.add(x)
        for kind in kinds[1:]:
            accumulator.narrow(kind)
        accumulator.add(later)
        assert accumulator.nbytes == Accumulator.cost(width, kinds[-1])
        assert relative(accumulator.statistics().second, collected([x, later], kinds[-1]).second) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_cost_is_what_is_held(width, kind):
    accumulator = Accumulator(width, kind)
    accumulator.add(inputs(width, 2 * SAMPLE))
    held = {id(t): t.nbytes for t in vars(accumulator).values() if isinstance(t, torch.Tensor) and t.shape != (SAMPLE,)}
    held |= {id(t): t.nbytes for t in accumulator._noise.values()}
    assert Accumulator.cost(width, kind) == accumulator.nbytes == sum(held.values())
    assert moment_bytes(width, kind) == accumulator.statistics().second.nbytes


# Moment


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
class TestMomentIsItsMatrix:
    """Every operation of a Moment is the same operation on the matrix it stands for."""

    def moment(self, width, kind):
        return collected([inputs(width)], kind).moment()

    def test_times(self, width, kind):
        moment, rows = self.moment(width, kind), torch.randn(5, width)
        assert relative(moment.times(rows), rows.double() @ dense(moment).double()) < CLOSE

    def test_energy(self, width, kind):
        moment, rows = self.moment(width, kind), torch.randn(5, width).double()
        truth = torch.trace(rows @ dense(moment).double() @ rows.T)
        assert abs(moment.energy(rows.float()) / truth.item() - 1) < 1e-4

    def test_diagonal(self, width, kind):
        moment = self.moment(width, kind)
        assert torch.equal(moment.diagonal(), dense(moment).diagonal())

    def test_scaled(self, width, kind):
        moment, factor = self.moment(width, kind), torch.rand(width) + 0.5
        assert relative(dense(moment.scaled(factor)), dense(moment) * factor * factor[:, None]) < CLOSE

    def test_shrunk(self, width, kind):
        moment = self.moment(width, kind)
        truth = 0.7 * dense(moment) + 0.3 * dense(moment).diagonal().diag()
        assert relative(dense(moment.shrunk(0.3)), truth) < CLOSE

    def test_blocks_only_and_diagonal_only(self, width, kind):
        moment = self.moment(width, kind)
        assert torch.equal(dense(moment.diagonal_only()), dense(moment).diagonal().diag())
        assert torch.equal(dense(moment.blocks_only()), masked(dense(moment), "block"))

    def test_tiles(self, width, kind):
        moment = self.moment(width, kind)
        whole = torch.block_diag(*moment.tiles())
        assert torch.equal(whole[:width, :width], dense(moment))
        assert torch.equal(whole[width:, width:], torch.eye(len(whole) - width))
        assert not whole[width:, :width].any() and not whole[:width, width:].any()


@pytest.mark.parametrize("group", [4, 16, 64, 256])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [256, 768])
def test_rotated_moment_is_the_moment_of_rotated_inputs(width, kind, group):
    x = inputs(width)
    moment = collected([x], kind).moment()
    rotation = ref.rotate(torch.eye(width), group).double()  # rows: x @ rotation is the rotated x
    truth = (rotation.T @ dense(moment).double() @ rotation).float()
    assert relative(dense(moment.rotated(group)), truth) < 1e-4
    if kind == "full":
        assert relative(moment.rotated(group).matrix, collected([ref.rotate(x, group)]).second) < 1e-4


def test_gram_of_an_odd_width_pads_its_last_block_with_zeros():
    x = inputs(200)
    tiles = gram(x, 3)
    assert tiles.shape == (2, BLOCK, BLOCK) and not tiles[1, 72:].any() and not tiles[1, :, 72:].any()
    with full_precision():
        assert relative(tiles[1, :72, :72], x[:, 128:].T @ x[:, 128:]) < CLOSE


# Recorder


def recorder(widths, limit=10**9, **options):
    return Recorder("model", widths, RecordOptions(**options), limit)


def forward(recorder, *calls, state=None):
    state = state or Forward()
    recorder.begin(state)
    for layer, x in calls:
        recorder.add(layer, x, state)
    return state


def test_layers_that_read_one_tensor_share_a_site():
    found = recorder({"w1": 8, "w3": 8, "w2": 16})
    for seed in range(3):
        x = inputs(8, seed=seed)
        forward(found, ("w1", x), ("w2", inputs(16, seed=seed)), ("w3", x))
    calibration = found.calibration()
    assert calibration.layers == {"w1": "w1", "w3": "w1", "w2": "w2"} and calibration.runs == 3
    assert calibration.of("w3").tokens == 1500 and calibration.of("w4") is None


def test_equal_but_different_tensors_do_not_share():
    found = recorder({"a": 8, "b": 8})
    forward(found, ("a", inputs(8)), ("b", inputs(8)))
    assert found.calibration().layers == {"a": "a", "b": "b"}


def test_a_tensor_changed_in_place_between_two_layers_is_not_shared():
    found, x = recorder({"a": 8, "b": 8}), inputs(8)
    state = Forward()
    found.begin(state)
    found.add("a", x, state)
    x.mul_(2)
    found.add("b", x, state)
    assert found.calibration().layers == {"a": "a", "b": "b"}
    assert torch.equal(found.calibration().of("b").amax, x.abs().amax(0))


def test_an_address_used_again_is_not_taken_for_the_old_tensor():
    found, state = recorder({f"layer{i}": 8 for i in range(50)}), Forward()
    found.begin(state)
    for i in range(50):
        found.add(f"layer{i}", torch.full((4, 8), float(i + 1)), state)  # freed at once: ids repeat
    assert len(found.calibration().sites) == 50


def test_a_layer_that_ceases_to_share_is_recorded_on_its_own_from_there():
    found, x = recorder({"a": 8, "b": 8}), inputs(8)
    forward(found, ("a", x), ("b", x))
    other = inputs(8, 100, seed=5)
    forward(found, ("a", x), ("b", other))
    forward(found, ("a", x), ("b", x))
    calibration = found.calibration()
    assert calibration.layers == {"a": "a", "b": "b"}
    assert calibration.of("a").tokens == 1500 and calibration.of("b").tokens == 600
    assert calibration.notes == ["b: ceased to read the input of a at call 2; recorded on its own since"]


def test_layers_that_come_to_share_later_stay_apart():
    found, x = recorder({"a": 8, "b": 8}), inputs(8)
    forward(found, ("a", inputs(8)), ("b", inputs(8)))
    forward(found, ("a", x), ("b", x))
    assert found.calibration().layers == {"a": "a", "b": "b"}
    assert found.calibration().of("a").tokens == found.calibration().of("b").tokens == 1000


def test_every_call_weighs_the_same_however_large_its_numbers():
    quiet, loud = inputs(8, seed=1), 1000 * inputs(8, seed=2)
    found = recorder({"a": 8})
    for x in (quiet, loud):
        forward(found, ("a", x))
    weights = [1 / x.square().mean().item() for x in (quiet, loud)]
    assert relative(found.calibration().of("a").second, collected([quiet, loud], weights=weights).second) < CLOSE
    shares = [w * x.square().sum() for w, x in zip(weights, (quiet, loud), strict=True)]
    assert abs(shares[0] / shares[1] - 1) < 1e-4


def test_tokens_are_a_random_choice_that_a_seed_repeats():
    def run(seed):
        found = recorder({"a": 8}, tokens=100, seed=seed)
        for call in range(3):
            forward(found, ("a", inputs(8, 1000, seed=call).view(2, 500, 8)))
        return found.calibration().of("a")

    first, again, other = run(0), run(0), run(1)
    assert first.tokens == 300
    assert torch.equal(first.second, again.second) and not torch.equal(first.second, other.second)


def test_zero_input_is_recorded():
    found = recorder({"a": 8})
    forward(found, ("a", torch.zeros(20, 8)))
    statistics = found.calibration().of("a")
    assert statistics.tokens == 20 and not statistics.second.any() and torch.isfinite(statistics.mean).all()


def test_inputs_without_a_finite_token_are_left_out_and_noted():
    found = recorder({"a": 4, "b": 4})
    forward(found, ("a", torch.full((20, 4), float("nan"))), ("b", inputs(4)))
    calibration = found.calibration()
    assert calibration.layers == {"b": "b"} and list(calibration.sites) == ["b"]
    assert calibration.notes == [
        "20 tokens with NaN or infinity were left out, most at a",
        "1 inputs had no finite token and are not calibrated (first: a)",
    ]


def test_few_tokens_are_noted():
    found = recorder({"a": 64})
    forward(found, ("a", inputs(64, 10)))
    assert found.calibration().notes == [
        "1 of 1 inputs saw fewer tokens than channels (first: a); more prompts or steps help"
    ]


def test_layers_that_did_not_run_are_noted():
    found = recorder({"a": 8, "b": 8})
    assert found.notes() == []
    forward(found, ("a", inputs(8)))
    assert found.notes() == ["1 of 2 layers did not run (first: b)"]


def test_auto_is_full_up_to_4096_and_blocks_above():
    found = recorder({"a": 4096, "b": 4128})
    forward(found, ("a", torch.ones(1, 4096)), ("b", torch.ones(1, 4128)))
    kinds = {name: s.moment().kind for name, s in found.calibration().sites.items()}
    assert kinds == {"a": "full", "b": "block"}


def test_memory_stays_below_the_limit_and_nothing_is_lost():
    widths = dict.fromkeys("abcd", 512)
    limit = 3 * Accumulator.cost(512, "full")
    found = recorder(widths, limit=limit)
    assert found.most() == limit
    for seed in range(2):
        for name in widths:
            forward(found, (name, inputs(512, seed=seed)))
            assert found.nbytes <= limit
    assert found.nbytes == 4 * Accumulator.cost(512, "block")
    calibration = found.calibration()
    assert calibration.notes[0] == f"second moments are block: wider ones would exceed {limit / 1e9:.2f} GB"
    expected = recorder(widths, moment="block")
    for seed in range(2):
        for name in widths:
            forward(expected, (name, inputs(512, seed=seed)))
    for name in widths:
        assert relative(calibration.of(name).second, expected.calibration().of(name).second) < CLOSE


def test_a_limit_below_the_diagonals_is_refused_before_recording():
    with pytest.raises(ValueError, match=r"needs .* GB at least, the limit is 0\.00 GB; raise it"):
        recorder({"a": 512}, limit=1000)


def test_what_the_sums_may_come_to_is_said_before_recording():
    found = recorder({"a": 256, "b": 8192})
    assert found.most() == Accumulator.cost(256, "full") + Accumulator.cost(8192, "block")
    assert found.summary() == f"2 layers, at most {found.most() / 1e9:.2f} of 1.00 GB"


# Files


@pytest.fixture
def calibration():
    found = recorder({"a": 200, "b": 200, "c": 63})
    x = inputs(200)
    x[7, 3] = float("nan")
    forward(found, ("a", x), ("b", x), ("c", inputs(63)))
    return found.calibration()


@pytest.mark.parametrize("kind", KINDS)
def test_file_gives_back_every_number(tmp_path, kind):
    found = recorder({"a": 200, "b": 200, "c": 63}, moment=kind)
    x = inputs(200)
    x[7, 3] = float("inf")
    forward(found, ("a", x), ("b", x), ("c", inputs(63)))
    calibration, path = found.calibration(), tmp_path / "c.safetensors"
    calibration_file.write(calibration, path)
    again = calibration_file.read(path)
    assert (again.layers, again.model, again.runs, again.notes) == (
        calibration.layers, "model", 1, ["1 tokens with NaN or infinity were left out, most at a"],
    )  # fmt: skip
    assert again.digest() == calibration.digest()
    for name in ("a", "c"):
        mine, stored = calibration.of(name), again.of(name)
        assert (mine.tokens, mine.skipped) == (stored.tokens, stored.skipped)
        for part in ("mean", "amax", "second", "sample"):
            assert torch.equal(getattr(mine, part), getattr(stored, part))
        assert mine.noise.keys() == stored.noise.keys()
        assert all(torch.equal(mine.noise[f], stored.noise[f]) for f in mine.noise)


def test_digest_changes_with_any_number(calibration):
    before = calibration.digest()
    sites = dict(calibration.sites)
    sites["c"].mean[5] += 1e-6
    assert Calibration(sites, calibration.layers, "model").digest() != before
    assert Calibration(calibration.sites, calibration.layers, "another").digest() != before


def test_file_is_not_overwritten_unless_asked(tmp_path, calibration):
    path = tmp_path / "c.safetensors"
    calibration_file.write(calibration, path)
    with pytest.raises(ValueError, match="already exists"):
        calibration_file.write(calibration, path)
    calibration_file.write(calibration, path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_nothing_recorded_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="nothing was recorded yet"):
        calibration_file.write(recorder({"a": 8}).calibration(), tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


def damage(path, how):
    tensors = load_file(path)
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    said = json.loads(header["__metadata__"][calibration_file.METADATA])
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
        return
    if how == "missing":
        del tensors["a.second"]
    elif how == "dtype":
        tensors["a.mean"] = tensors["a.mean"].half()
    elif how == "shape":
        tensors["a.second"] = tensors["a.second"][:-1].contiguous()
    elif how == "homeless":
        said["layers"]["d"] = "d"
    elif how == "incomplete":
        del said["layers"]
    elif how == "newer":
        said["version"] = 99
    text = {"json": "{", "foreign": None}.get(how, json.dumps(said))
    save_file(tensors, path, metadata={calibration_file.METADATA: text} if text else {"format": "pt"})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "not a complete safetensors file"), ("missing", "a: second is missing"), ("dtype", "a.mean: is"),
        ("shape", "a.second: is"), ("homeless", "d: its statistics are missing"), ("incomplete", "incomplete"),
        ("newer", "version 99, this Tessera reads 1"), ("json", "is not JSON"), ("foreign", "is no calibration file"),
    ],
)  # fmt: skip
def test_damaged_file_is_refused_by_name(tmp_path, calibration, how, message):
    path = tmp_path / "c.safetensors"
    calibration_file.write(calibration, path)
    damage(path, how)
    with pytest.raises(ValueError, match=rf"c\.safetensors: .*{message}"):
        calibration_file.read(path)


def test_numbers_that_became_nan_are_refused_when_read(tmp_path, calibration):
    path = tmp_path / "c.safetensors"
    calibration_file.write(calibration, path)
    tensors, said = load_file(path), Checkpoint(path).metadata
    tensors["c.second"][2, 3] = float("nan")
    save_file(tensors, path, metadata=said)
    read = calibration_file.read(path)
    assert read.of("a") is not None
    with pytest.raises(ValueError, match=r"c\.safetensors: c\.second: holds NaN or infinity"):
        read.of("c")


# Fingerprint


def test_fingerprint_is_that_of_the_weights(tmp_path):
    tensors = synthetic.hostable_zimage()
    first = fingerprint(Checkpoint(synthetic.save(tmp_path / "a.safetensors", tensors)))
    prefixed = synthetic.save(tmp_path / "b.safetensors", tensors, prefix="model.diffusion_model.")
    assert fingerprint(Checkpoint(prefixed)) == first
    half = {key: value.half() for key, value in tensors.items()}
    assert fingerprint(Checkpoint(synthetic.save(tmp_path / "c.safetensors", half))) == first
    trained = {key: value * 1.01 for key, value in tensors.items()}
    assert fingerprint(Checkpoint(synthetic.save(tmp_path / "d.safetensors", trained))) != first


def test_fingerprint_of_a_text_encoder_goes_without_its_tables(tmp_path):
    tensors = synthetic.qwen()
    tied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    files = [synthetic.save(tmp_path / f"{name}.safetensors", t) for name, t in (("a", tensors), ("b", tied))]
    assert len({fingerprint(Checkpoint(path)) for path in files}) == 1


# Saved inputs


LAYERS = ("layers.0.attention.qkv", "layers.0.attention.out", "layers.0.feed_forward.w1")


@pytest.fixture
def model(tmp_path):
    return Checkpoint(synthetic.save(tmp_path / "model.safetensors", synthetic.block(), "model.diffusion_model."))


def saved(folder, *calls):
    folder.mkdir(exist_ok=True)
    for index, tensors in enumerate(calls):
        save_file(tensors, folder / f"call_{index:04}.safetensors")
    return folder


def test_folder_of_saved_inputs_is_a_calibration(tmp_path, model):
    x, y = inputs(128, 300).view(2, 150, 128), inputs(128, 50, seed=1)
    calls = [
        {LAYERS[0]: x, f"{LAYERS[1]}.input": y, f"model.diffusion_model.{LAYERS[2]}": x.clone()},
        {LAYERS[0]: 2 * x, LAYERS[1]: y.bfloat16(), LAYERS[2]: 2 * x},
    ]
    found = saved_inputs.calibrate(model, saved(tmp_path / "inputs", *calls))
    assert found.layers == {LAYERS[0]: LAYERS[0], LAYERS[2]: LAYERS[0], LAYERS[1]: LAYERS[1]}
    assert found.model == fingerprint(model) and found.runs == 2
    flat = x.view(-1, 128)
    truth = collected([flat, 2 * flat], weights=[1.0, 0.25])
    assert found.of(LAYERS[0]).tokens == 600 and relative(found.of(LAYERS[0]).second, truth.second) < CLOSE


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.7.attention.qkv": inputs(128)}, "layers.7.attention.qkv: .* has no such linear layer"),
        ({"layers.0.attention_norm1": inputs(128)}, "has no such linear layer"),
        ({LAYERS[0]: inputs(64)}, r"layers.0.attention.qkv: is .*, the layer reads \[tokens, 128\]"),
        ({LAYERS[0]: inputs(128)[0]}, r"the layer reads \[tokens, 128\]"),
        ({LAYERS[0]: torch.ones(4, 128, dtype=torch.int32)}, "floating point"),
        ({LAYERS[0]: torch.full((9, 128), float("nan"))}, "every token has NaN or infinity"),
    ],
    ids=["unknown", "not linear", "width", "one dimension", "integers", "nan"],
)
def test_saved_inputs_that_do_not_fit_are_refused(tmp_path, model, tensors, message):
    with pytest.raises(ValueError, match=message):
        saved_inputs.calibrate(model, saved(tmp_path / "inputs", tensors))


def test_a_folder_without_files_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match=r"inputs: holds no \.safetensors files"):
        saved_inputs.calibrate(model, saved(tmp_path / "inputs"))


def test_command_calibrates_and_inspect_describes(tmp_path, model, capsys):
    folder, target = saved(tmp_path / "inputs", {LAYERS[0]: inputs(128)}), tmp_path / "c.safetensors"
    command = ["calibrate", str(model.path), "--inputs", str(folder), "-o", str(target), "--json"]
    assert cli.main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["sites"] == [{"site": LAYERS[0], "in_features": 128, "moment": "full", "tokens": 500, "skipped": 0}]
    assert cli.main(["inspect", str(target)]) == 0
    assert "1 model calls, 1 layers, 1 inputs of 500 to 500 tokens" in capsys.readouterr().out
    assert cli.main(command) == 1 and "already exists" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0


def test_the_documented_way_to_save_inputs_works(tmp_path):
    """The code in the module's docstring, as a user would paste it."""
    lines = saved_inputs.__doc__[saved_inputs.__doc__.index("    def save(") :].splitlines()
    script = tmp_path / "script.py"
    script.write_text("import safetensors.torch, torch\n" + "\n".join(line[4:] for line in lines))
    save = runpy.run_path(str(script))["save"]
    model = torch.nn.Sequential(torch.nn.Linear(128, 96), torch.nn.ReLU(), torch.nn.Linear(96, 4))
    save_file({f"{k}.weight": model.get_submodule(k).weight.data for k in ("0", "2")}, tmp_path / "m.safetensors")
    (tmp_path / "inputs").mkdir()
    for number in range(3):
        save(tmp_path / "inputs", model, number, inputs(128, seed=number))
    found = saved_inputs.calibrate(Checkpoint(tmp_path / "m.safetensors"), tmp_path / "inputs")
    assert found.layers == {"0": "0", "2": "2"} and found.of("2").tokens == 1500
