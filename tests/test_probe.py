"""`tessera probe` and `tessera quantize --target-size`: exact sizes, recipes that can be used again, clear refusals."""

import json

import pytest
import torch

import synthetic
from tessera import calibration_file, cli
from tessera.checkpoint import Checkpoint
from tessera.quantization import recipe
from tessera.quantization.calibration import Accumulator, Calibration, fingerprint


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Z-Image's keys at width 128, two of its blocks and the refiners."""
    tensors = {
        key: tensor
        for key, tensor in synthetic.zimage(dim=128).items()
        if not key.startswith("layers.") or key.startswith(("layers.0.", "layers.1."))
    }
    return synthetic.save(tmp_path_factory.mktemp("source") / "source.safetensors", tensors)


@pytest.fixture(scope="module")
def statistics(source, tmp_path_factory):
    """A calibration in which w2 sees inputs with a few large channels, as it does in real models."""
    file, sites = Checkpoint(source), {}
    for name, (_, width) in ((k.removesuffix(".weight"), s) for k, s in file.shapes().items() if len(s) == 2):
        x = torch.randn(600, width, generator=torch.Generator().manual_seed(len(name)))
        x[:, ::37] *= 20.0 if name.endswith("w2") else 1.0
        accumulator = Accumulator(width, "diagonal")
        accumulator.add(x)
        sites[name] = accumulator.statistics()
    path = tmp_path_factory.mktemp("statistics") / "calibration.safetensors"
    calibration_file.write(Calibration(sites, {name: name for name in sites}, fingerprint(file), 1), path)
    return path


def run(capsys, *words):
    """(exit code, what --json printed, stderr)."""
    code = cli.main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def test_probe_scores_every_layer_in_every_format(source, capsys):
    code, found, _ = run(capsys, "probe", source)
    assert code == 0 and len(found["layers"]) == 30
    for row in found["layers"]:
        scores = row["scores"]
        assert 0 < scores["int8_convrot_64"] < scores["mxfp8"] < scores["nvfp4"]
        assert {"kurtosis", "dynamic_range", "aspect_ratio", "quant_probe"} <= row.keys()
    assert "relative weight error" in found["method"] and any("no model was run" in note for note in found["notes"])
    assert found["kept"]["cap_embedder.1"] and any("adaLN" in name for name in found["kept"])


def test_probe_with_a_calibration_scores_output_errors(source, statistics, capsys):
    _, plain, _ = run(capsys, "probe", source)
    code, found, _ = run(capsys, "probe", source, "--calibration", statistics)
    assert code == 0 and found["method"].startswith("relative output error")
    before, after = ({row["layer"]: row["scores"]["nvfp4"] for row in f["layers"]} for f in (plain, found))
    assert all(after[name] != before[name] for name in before if name.endswith("w2"))


def test_the_text_is_a_table_of_all_layers(source, capsys):
    assert cli.main(["probe", str(source), "--target-size", "4MB"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n| ") == 31 and "| layer | format | rank | MB | score nvfp4 |" in text
    assert "kurtosis | range | aspect |" in text


def test_a_plan_is_written_as_a_recipe_with_scores_as_reasons(source, capsys, tmp_path):
    target = tmp_path / "mine.toml"
    code, found, _ = run(capsys, "probe", source, "--target-size", "4MB", "-o", target)
    assert code == 0 and found["bytes"] <= 4_000_000 and found["bytes"] == found["model_bytes"] + found["lora_bytes"]
    made = recipe.read(target).resolve(Checkpoint(source).shapes())
    assert made.problems == [] and made.warnings == []
    assert {row["layer"]: row["format"] for row in found["layers"]} == {
        row["layer"]: recipe.label(made[row["layer"]].format) for row in found["layers"]
    }
    assert all("squared error alone" in made[row["layer"]].reason for row in found["layers"])
    assert made["cap_embedder.1"].reason.startswith("kept: ")


def test_a_saved_plan_makes_a_file_of_the_planned_size(source, capsys, tmp_path):
    _, found, _ = run(capsys, "probe", source, "--target-size", "4MB", "-o", tmp_path / "mine.toml")
    out = tmp_path / "out.safetensors"
    code, _, _ = run(capsys, "quantize", source, "-o", out, "--recipe", tmp_path / "mine.toml")
    assert code == 0 and out.stat().st_size == found["model_bytes"]


def test_quantize_to_a_size_plans_first_and_keeps_to_it(source, capsys, tmp_path):
    out = tmp_path / "out.safetensors"
    code, report, err = run(capsys, "quantize", source, "-o", out, "--target-size", "3.4 MB")
    lora = tmp_path / "out_lora.safetensors"
    nbytes = out.stat().st_size + (lora.stat().st_size if lora.exists() else 0)
    assert code == 0 and 3_350_000 < nbytes <= 3_400_000
    assert "plan: out_planned: 3.3" in err and report["recipe"] == "out_planned"
    assert len(report["counts"]) > 1


def test_quantize_to_a_size_with_statistics_keeps_to_it(source, statistics, capsys, tmp_path):
    """Smoothing and input scales are counted as if every layer got them."""
    out = tmp_path / "out.safetensors"
    words = ("--target-size", "4.1MB", "--calibration", statistics, "--formats", "nvfp4,mxfp8", "--ranks", "0 8")
    code, report, _ = run(capsys, "quantize", source, "-o", out, *words)
    lora = tmp_path / "out_lora.safetensors"
    nbytes = out.stat().st_size + (lora.stat().st_size if lora.exists() else 0)
    assert code == 0 and 3_900_000 < nbytes <= 4_100_000
    assert set(report["counts"]) <= {"nvfp4", "mxfp8"}


def test_a_target_error_gives_a_smaller_file_the_more_it_allows(source, capsys):
    sizes = []
    for error in (0.005, 0.03, 0.08):
        code, found, _ = run(capsys, "probe", source, "--target-error", error)
        assert code == 0 and found["error"] <= error
        sizes.append(found["bytes"])
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.2 * sizes[-1]


def test_probing_some_rows_is_said(source, capsys):
    _, found, _ = run(capsys, "probe", source, "--rows", 64)
    assert any("64 evenly spaced rows stand for all" in note for note in found["notes"])
    _, found, _ = run(capsys, "probe", source, "--rows", 0)
    assert not any("evenly spaced" in note for note in found["notes"])


def test_the_same_probe_gives_the_same_recipe(source, capsys, tmp_path):
    for name in ("a", "b"):
        run(capsys, "probe", source, "--target-size", "4MB", "--rows", 64, "-o", tmp_path / f"{name}.toml")
    first, second = ((tmp_path / f"{name}.toml").read_text().split("\n", 1)[1] for name in ("a", "b"))
    assert first == second


REFUSED = {
    "a size below everything in 4 bits": (["--target-size", "1MB"], "below the smallest possible"),
    "a size without unit": (["--target-size", "4.8"], "write a number and a unit"),
    "two targets": (["--target-size", "4MB", "--target-error", "0.1"], "one of the two"),
    "an error nothing reaches": (["--formats", "nvfp4", "--target-error", "0.001"], "least possible is"),
    "an unknown format": (["--formats", "nvfp3"], "unknown format 'nvfp3'"),
    "a rank that is no number": (["--ranks", "0,many"], "write whole numbers"),
    "a recipe without a target": (["-o", "x.toml"], "give --target-size or --target-error"),
    "a recipe of another name": (["-o", "x.txt", "--target-size", "4MB"], "name it .toml"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_probe_refuses(case, source, capsys):
    words, message = REFUSED[case]
    code, found, err = run(capsys, "probe", source, *words)
    assert code == 1 and found is None and message in err


@pytest.mark.parametrize(("words", "message"), [
    (["--recipe", "int8_convrot"], "--recipe and --target-size both choose formats"),
    (["--mode", "absorb"], "plans are made for correction LoRAs"),
])  # fmt: skip
def test_quantize_to_a_size_refuses(words, message, source, capsys, tmp_path):
    code, _, err = run(capsys, "quantize", source, "-o", tmp_path / "x.safetensors", "--target-size", "4MB", *words)
    assert code == 1 and message in err and not list(tmp_path.iterdir())


def test_a_recipe_is_never_overwritten_and_that_is_known_before_measuring(capsys, tmp_path):
    (tmp_path / "mine.toml").write_text("mine")
    code, _, err = run(capsys, "probe", tmp_path / "no such file", "--target-size", "4MB", "-o", tmp_path / "mine.toml")
    assert code == 1 and "already exists" in err and (tmp_path / "mine.toml").read_text() == "mine"


def test_statistics_of_another_model_are_refused(source, statistics, capsys, tmp_path):
    other = synthetic.save(tmp_path / "other.safetensors", synthetic.zimage(dim=64))
    code, _, err = run(capsys, "probe", other, "--calibration", statistics)
    assert code == 1 and "statistics of another model" in err
