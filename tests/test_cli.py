"""The command line: results on stdout, one line about what went wrong on stderr, an exit code that says which."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import killed
from absorbing import absorb
from conftest import ROOT
from synthetic import block, fingerprint, noise, recipe_file, save, zimage
from tessera import calibration_file, cli, formats
from tessera.checkpoint import Checkpoint
from tessera.version import VERSION

GOLDEN = Path(__file__).with_name("golden")
LAYERS = ["layers.0.attention.out", "layers.0.attention.qkv", "layers.0.feed_forward.w1"]
PROGRAM = (
    "import importlib.util, sys; root = sys.argv.pop(1);"
    "spec = importlib.util.spec_from_file_location("
    "'tessera', f'{root}/__init__.py', submodule_search_locations=[root]);"
    "sys.modules['tessera'] = module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module);"
    "from tessera.cli import main; sys.exit(main())"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder: a source of one block, a recipe, a finished model with its LoRA."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "source.safetensors", block())
    recipe_file(tmp_path / "mine.toml", ("nvfp4", "**.{qkv,out}"), ("mxfp8", "**.w1"))
    assert cli.main(["quantize", "source.safetensors", "-o", "done.safetensors", "--recipe", "mine.toml"]) == 0
    return tmp_path


@pytest.fixture
def run(capsys):
    def run(command):
        """(exit code, stdout, stderr) of one command line."""
        capsys.readouterr()
        code = cli.main(command.split() if isinstance(command, str) else command)
        return code, *capsys.readouterr()

    return run


def test_quantize_prints_a_table_and_names_both_files(folder, run):
    code, out, err = run("quantize source.safetensors -o new.safetensors --recipe mine.toml --rank 8 --seed 3")
    assert (code, err) == (0, "") and {"new.safetensors", "new_lora.safetensors"} <= fingerprint(folder).keys()
    assert "new.safetensors" in out and "layers: 2 nvfp4, 1 mxfp8; 2 tensors kept; recipe mine" in out
    assert "correction LoRA new_lora.safetensors: rank 8" in out
    assert all(f"| {name} | " in out for name in LAYERS)


def test_json_is_the_whole_report(folder, run):
    code, out, _ = run("quantize source.safetensors -o new.safetensors --recipe mine.toml --lora l.safetensors --json")
    report = json.loads(out)
    assert code == 0 and report["counts"] == {"nvfp4": 2, "mxfp8": 1} and report["lora"] == "l.safetensors"
    assert [layer["name"] for layer in report["layers"]] == LAYERS
    assert report["model_bytes"] == (folder / "new.safetensors").stat().st_size


@pytest.mark.parametrize(("name", "counts"), [
    ("z_image_nvfp4", {"nvfp4": 102, "mxfp8": 66}), ("z_image_mxfp8", {"mxfp8": 161}),
    ("int8_convrot", {"int8_convrot_64": 170}),
])  # fmt: skip
def test_built_in_recipes_run_by_name(tmp_path_factory, tmp_path, run, name, counts):
    shared = tmp_path_factory.getbasetemp() / "small_z_image.safetensors"
    source = shared if shared.exists() else save(shared, zimage(64))
    command = [
        "quantize",
        str(source),
        "-o",
        str(tmp_path / "o.safetensors"),
        "--recipe",
        name,
        "--rank",
        "0",
        "--json",
    ]
    code, out, err = run(command)
    assert (code, err) == (0, "") and json.loads(out)["counts"] == counts


@pytest.mark.parametrize("flags", [["--convert-to-quant", "--nvfp4 --zimage"], ["--convert-to-quant=--nvfp4"]])
def test_flags_of_convert_to_quant_are_a_recipe(folder, run, flags):
    code, out, err = run(["quantize", "source.safetensors", "-o", "new.safetensors", "--json", *flags])
    assert code == 0 and json.loads(out)["counts"] == {"nvfp4": 3}
    assert err.startswith("note: embeddings and lm_head stay as stored")


def test_warnings_are_notes_on_stderr(folder, run):
    recipe_file(folder / "r.toml", ("nvfp4", "**"), ("mxfp8", "**.w1"))
    code, out, err = run("quantize source.safetensors -o new.safetensors --recipe r.toml --json")
    assert code == 0 and json.loads(out)["warnings"]
    assert "note: rule 1 (nvfp4) and rule 2 (mxfp8) both match layers.0.feed_forward.w1; rule 1 comes first" in err


def test_simple_rounds_to_nearest(folder, run):
    run("quantize source.safetensors -o new.safetensors --recipe mine.toml --simple --rank 0")
    weight, format = block()[f"{LAYERS[0]}.weight"].float(), formats.NVFP4()
    assert torch.equal(Checkpoint("new.safetensors").weight(LAYERS[0]), format.decode(format.encode(weight)))


def test_overwrite_replaces_both_files(folder, run):
    before = fingerprint(folder)
    command = "quantize source.safetensors -o done.safetensors --recipe mine.toml --rank 4"
    assert run(command)[0] == 1 and fingerprint(folder) == before
    assert run(f"{command} --overwrite")[0] == 0 and fingerprint(folder).keys() == before.keys()
    assert sum(fingerprint(folder)[name] != before[name] for name in before) == 2


def test_calibration_is_used_and_the_report_says_for_which_layers(tmp_path, run):
    killed.source(tmp_path)
    statistics = killed.statistics(Checkpoint(tmp_path / "source.safetensors"))
    calibration_file.write(statistics, tmp_path / "inputs.safetensors")
    (tmp_path / "foreign").mkdir()
    save(tmp_path / "foreign" / "source.safetensors", block())

    def command(source, output, *more):
        return run(["quantize", f"{tmp_path / source}", "-o", f"{tmp_path / output}", "--recipe",
                    f"{tmp_path / 'mine.toml'}", "--rank", "2", "--json", *more])  # fmt: skip

    given = ("--calibration", f"{tmp_path / 'inputs.safetensors'}")
    code, out, err = command("source.safetensors", "a.safetensors", *given)
    report = json.loads(out)
    assert code == 0 and report["basis"] == "calibrated: 1 of 8 layers, by 1 model calls"
    missing = f"{', '.join(killed.LAYERS[1:4])}, ..."
    assert f"note: no statistics for 7 of 8 layers ({missing}): they are quantized data-free" in err
    assert [row["calibrated"] for row in report["layers"]] == [True] + [False] * 7
    assert all((row["output_error"] is None) != row["calibrated"] for row in report["layers"])
    code, out, _ = command("source.safetensors", "b.safetensors", *given, "--rounding", "sweep")
    assert json.loads(out)["basis"] == "data-free: rounding sweep takes no statistics, the calibration was not used"
    code, _, err = command("foreign/source.safetensors", "c.safetensors", *given)
    assert code == 1 and re.search(r"tessera: source\.safetensors: statistics of another model \(\w{12}, this", err)
    code, out, _ = command("source.safetensors", "d_absorb.safetensors", *given, "--mode", "absorb", "--smoothing")
    report = json.loads(out)
    assert code == 0 and report["mode"] == "absorb" and report["lora"] is None
    assert any("layers are smoothed" in warning for warning in report["warnings"])
    code, _, err = command("source.safetensors", "d.safetensors", *given, "--mode", "absorb")
    assert code == 1 and "d.safetensors: name it with the word absorb, d_absorb.safetensors for instance" in err


def test_verbose_is_a_line_per_layer(folder, run):
    code, _, err = run("quantize source.safetensors -o new.safetensors --recipe mine.toml --verbose")
    lines = err.splitlines()
    assert code == 0 and len(lines) == 3
    for name, line in zip(LAYERS, lines, strict=True):
        assert re.match(rf" *\d+% {re.escape(name)}, (nvfp4|mxfp8), weight error 0\.\d+ \(0\.\d+ with its", line)


def test_kill_and_resume_give_the_bytes_of_an_undisturbed_run(tmp_path, run):
    """From outside, with SIGKILL, as soon as the journal knows of a layer."""
    weights = {f"layers.{n}.w.weight": noise(1024, 1024, seed=n) for n in range(24)}
    save(tmp_path / "source.safetensors", weights)
    recipe_file(tmp_path / "mine.toml", ("nvfp4", "**"))
    sound = [str(tmp_path / word) if word.endswith(("s", "toml")) else word for word in SOUND.split()]
    command = [*sound, "--recipe", str(tmp_path / "mine.toml")]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(ROOT), *command])
    while not any(path.read_text().count("\n") > 1 for path in tmp_path.glob(".*.journal")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    code, out, _ = run([*command, "--resume"])
    resumed = {path.name: path.read_bytes() for path in tmp_path.glob("*")}
    assert code == 0 and "- note: resumed: " in out and not [name for name in resumed if name.startswith(".")]
    assert run([*command, "--overwrite"])[0] == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*")} == resumed


def test_inspect_shows_layers_errors_and_provenance(folder, run):
    code, out, _ = run("inspect done.safetensors")
    assert code == 0 and "quantized: 2 nvfp4, 1 mxfp8" in out and all(name in out for name in LAYERS)
    found = json.loads(run("inspect done.safetensors --json")[1])
    assert [row["layer"] for row in found["layers"]] == LAYERS and all(
        len(row["error"]) == 2 for row in found["layers"]
    )
    assert found["provenance"]["version"] == VERSION and found["provenance"]["recipe"]["name"] == "mine"


def test_inspect_tells_the_mode_and_the_ranks_of_branches_inside_the_file(folder, run):
    absorb("source.safetensors", "absorb.safetensors", {LAYERS[0]: "nvfp4", LAYERS[1]: "mxfp8"}, rank=8)
    code, out, _ = run("inspect absorb.safetensors")
    assert code == 0 and "absorb: 2 layers have a branch inside the file, rank 8; only Tessera's loader" in out
    found = json.loads(run("inspect absorb.safetensors --json")[1])
    assert found["mode"] == "absorb" and [row["rank"] for row in found["layers"]] == [8, 8]
    assert json.loads(run("inspect done.safetensors --json")[1])["mode"] is None


def test_inspect_and_verify_mark_smoothed_layers(folder, run):
    absorb("source.safetensors", "absorb.safetensors", dict.fromkeys(LAYERS[:2], "nvfp4"), 8, {LAYERS[1]})
    _, out, _ = run("inspect absorb.safetensors")
    assert "smoothed: 1 layers have a pre_quant_scale; " in out
    marked = [f"{LAYERS[0]}  nvfp4  ", f"{LAYERS[1]}  nvfp4 smoothed  "]
    assert all(line in out for line in marked)
    code, out, _ = run("verify absorb.safetensors --against source.safetensors")
    assert code == 0 and all(line in out for line in marked)
    found = json.loads(run("inspect absorb.safetensors --json")[1])["layers"]
    assert [row["smoothed"] for row in found] == [False, True]
    assert "smoothed" not in run("inspect done.safetensors")[1]


def test_inspect_takes_a_plain_file(folder, run):
    code, out, _ = run("inspect source.safetensors")
    assert code == 0 and "quantized: no layer" in out


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda path: path.stem)
def test_inspect_reads_or_refuses_every_golden_file(run, path):
    code, out, err = run(["inspect", str(path), "--json"])
    assert code == (1 if path.name == "refuse_convrot_512.safetensors" else 0)
    assert err.startswith(f"tessera: {path.name}: layers.0.attention.out: ") if code else json.loads(out)


@pytest.mark.parametrize("name", [
    "ctq126_mixed", "ctq126_mixed_prefixed", "ctq134_nvfp4", "ctq134_int8_row", "legacy_e5m2", "mislabel_nvfp4",
])  # fmt: skip
def test_verify_accepts_files_of_convert_to_quant(run, name):
    source = json.loads((GOLDEN / "golden.json").read_text())["files"][name]["source"]
    lora = GOLDEN / f"{name}_lora.safetensors"
    command = ["verify", str(GOLDEN / f"{name}.safetensors"), "--against", str(GOLDEN / f"{source}.safetensors")]
    code, out, err = run([*command, *(["--lora", str(lora)] if lora.exists() else [])])
    assert (code, err) == (0, "") and "layers verified" in out


def test_verify_measures_with_and_without_the_lora(folder, run):
    code, out, _ = run("verify done.safetensors --against source.safetensors --lora done_lora.safetensors --json")
    rows = json.loads(out)["layers"]
    errors = json.loads(run("inspect done.safetensors --json")[1])["layers"]
    assert code == 0 and [row["layer"] for row in rows] == LAYERS
    for row, written in zip(rows, errors, strict=True):
        assert row["errors"] == pytest.approx(written["error"], abs=2e-6) and row["errors"][1] < row["errors"][0]


def test_verify_fails_where_the_weights_are_others(folder, run):
    weights = block() | {f"{LAYERS[1]}.weight": noise(96, 128, seed=77)}
    save(folder / "other.safetensors", weights | {"extra.weight": noise(4)})
    code, out, err = run("verify done.safetensors --against other.safetensors")
    assert (code, err) == (1, "") and f"{LAYERS[1]}: weight error 1.4" in out and "is above 0.2" in out
    assert "extra.weight: missing in done.safetensors" in out
    assert run("verify done.safetensors --against source.safetensors --max-error 0.01")[0] == 1


# ---- bad input


def edited(edit):
    """Writes done.safetensors with its tensors edited as bad.safetensors; markers in tensors only."""

    def write(folder):
        file = Checkpoint(folder / "done.safetensors")
        tensors = {key: file.read(key) for key in file.tensors}
        edit(tensors)
        save_file(tensors, folder / "bad.safetensors")

    return write


def truncated(folder):
    (folder / "bad.safetensors").write_bytes((folder / "source.safetensors").read_bytes()[:-1000])


def not_finite(folder):
    weights = block()
    weights[f"{LAYERS[2]}.weight"][0, 0] = float("nan")
    save(folder / "bad.safetensors", weights)


def other_lora(folder):
    save(
        folder / "bad.safetensors",
        {"lora_unet_a.lora_up.weight": noise(8, 2), "lora_unet_a.lora_down.weight": noise(2, 8)},
    )


def small_lora(folder):
    base = f"diffusion_model.{LAYERS[0]}"
    save(folder / "bad.safetensors", {f"{base}.lora_up.weight": noise(8, 2), f"{base}.lora_down.weight": noise(2, 8)})


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


QUANTIZE, INSPECT = "quantize bad.safetensors -o new.safetensors --recipe mine.toml", "inspect bad.safetensors"
VERIFY = "verify done.safetensors --against source.safetensors --lora bad.safetensors"
SOUND = "quantize source.safetensors -o new.safetensors"
FILE, LAYER = r"bad\.safetensors", LAYERS[0].replace(".", r"\.")
BAD = {  # what is wrong: (what makes it so, the command, what the line says)
    "missing source": (None, QUANTIZE, rf"{FILE}: cannot be read: No such file"),
    "not safetensors": (text("bad.safetensors", "{}" * 40), QUANTIZE, rf"{FILE}: header length .* download or copy it"),
    "truncated source": (truncated, QUANTIZE, rf"{FILE}: file has \d+ bytes, its header describes \d+; .* copy it"),
    "NaN weights": (not_finite, QUANTIZE,
                    rf"{FILE}: layers\.0\.feed_forward\.w1: 1 values are not finite.* \[0, 0\] is nan; .*source"),
    "missing scale": (edited(lambda t: t.pop(f"{LAYERS[0]}.weight_scale_2")), INSPECT,
                      rf"{FILE}: {LAYER}: weight_scale_2 is missing, nvfp4 needs it as .*; .* from the original"),
    "wrong scale": (edited(lambda t: t.update({f"{LAYERS[0]}.weight_scale": torch.ones(96, 1)})), QUANTIZE,
                    rf"{FILE}: {LAYER}: weight_scale is \(96, 1\), nvfp4 needs \(128, 8\); .* from the original"),
    "wrong dtype": (edited(lambda t: t.update({f"{LAYERS[0]}.weight": noise(96, 64)})), INSPECT,
                    rf"{FILE}: {LAYER}: weight is bfloat16, nvfp4 needs uint8; .* make it again"),
    "unknown format": (edited(lambda t: t.update({f"{LAYERS[0]}.comfy_quant": formats.marker({"format": "int3"})})),
                       INSPECT, rf"{FILE}: {LAYER}: format 'int3' is not loadable by ComfyUI .*; re-quantize"),
    "K not divisible": (lambda folder: recipe_file(folder / "r.toml", ("int8_convrot_256", "**")),
                        f"{SOUND} --recipe r.toml",
                        rf"source\.safetensors: {LAYER}: in_features 128 is not a multiple .*; use .* 2 more layers"),
    "LoRA for another model": (other_lora, VERIFY,
                               rf"{FILE}: 0 of 1 LoRA layers match done\.safetensors, first lora_unet_a; .*another"),
    "LoRA of another size": (small_lora, VERIFY,
                             rf"{FILE}: {LAYER}: the LoRA is \[8, 8\], the layer \[96, 128\]; .*another model"),
    "no LoRA": (lambda folder: save(folder / "bad.safetensors", block()), VERIFY,
                rf"{FILE}: .*: not a LoRA tensor; .*Load LoRA"),
    "output = input": (None, "quantize source.safetensors -o source.safetensors --recipe mine.toml --overwrite",
                       r"source\.safetensors: source, target and LoRA must be different files; choose another name"),
    "output exists": (None, "quantize source.safetensors -o done.safetensors --recipe mine.toml --seed 1",
                      r"done\.safetensors: already exists; choose another name, or allow overwriting"),
    "LoRA exists": (None, f"{SOUND} --recipe mine.toml --lora done_lora.safetensors",
                    r"done_lora\.safetensors: already exists; choose another name"),
    "no folder": (None, "quantize source.safetensors -o no/new.safetensors --recipe mine.toml",
                  r"no: no such folder; create it or choose another target"),
    "wrong ending": (None, "quantize source.safetensors -o new.gguf --recipe mine.toml",
                     r"new\.gguf: name it \.safetensors"),
    "another model's recipe": (None, f"{SOUND.replace('source', 'done_lora')} --recipe int8_convrot",
                               r"done_lora\.safetensors: recipe int8_convrot quantizes none .*; choose a recipe"),
    "no recipe": (None, SOUND, r"--recipe is missing; built in are int8, int8_convrot"),
    "unknown recipe": (None, f"{SOUND} --recipe q4_k_m", r"no recipe 'q4_k_m'; known are int8, int8_convrot.*\.toml"),
    "missing recipe": (None, f"{SOUND} --recipe no.toml", r"no\.toml: cannot be read: No such file.*; built in are"),
    "broken recipe": (text("r.toml", "[[rule]\n"), f"{SOUND} --recipe r.toml", r"r\.toml: .*line 1"),
    "recipe with a typo": (text("r.toml", '[[rule]]\nnvpf4 = ["**"]\nreason = "x"\n'), f"{SOUND} --recipe r.toml",
                           r"r\.toml: rule 1: unknown format 'nvpf4'; known are .*nvfp4"),
    "foreign flags": (None, [*SOUND.split(), "--convert-to-quant", "--int4 x"],
                      r"convert_to_quant: --int4 cannot be imported"),
    "no such device": (None, f"{SOUND} --recipe mine.toml --device warp", r"device 'warp': .*; use cpu"),
    "damaged metadata": (lambda folder: save(folder / "bad.safetensors", block(), metadata={"tessera": "{"}), INSPECT,
                         rf"{FILE}: metadata 'tessera' is not JSON .*; make"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_says_where_and_what_to_do(folder, run, case):
    prepare, command, words = BAD[case]
    if prepare:
        prepare(folder)
    before = fingerprint(folder)
    code, out, err = run(command)
    assert code == 1 and out == "" and fingerprint(folder) == before
    assert err.count("\n") == 1, err
    assert re.match(rf"tessera: .*{words}", err), err


def test_a_full_disk_is_one_line_and_leaves_nothing(folder):
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); {PROGRAM}"
    before = fingerprint(folder)
    found = subprocess.run([sys.executable, "-c", limited, str(ROOT), *SOUND.split(), "--recipe", "mine.toml"],
                           capture_output=True, text=True, cwd=folder)  # fmt: skip
    assert found.returncode == 1 and fingerprint(folder) == before
    assert found.stderr.startswith(
        "tessera: new.safetensors: needs 0.00 GB on that disk, which has less; free some space"
    )
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["", "quantise a", "quantize", "quantize a", "inspect", "verify a", "inspect a b"])
def test_wrong_usage_exits_with_2(capsys, command):
    with pytest.raises(SystemExit) as exit:
        cli.main(command.split())
    assert exit.value.code == 2 and "usage: tessera" in capsys.readouterr().err


def test_version_and_help_exit_with_0(capsys):
    for flag in ("--version", "--help"):
        with pytest.raises(SystemExit) as exit:
            cli.main([flag])
        assert exit.value.code == 0
    assert f"tessera {VERSION}" in capsys.readouterr().out


def test_ctrl_c_exits_with_130_and_leaves_nothing(tmp_path):
    weights = {f"layers.{n}.w.weight": noise(1024, 1024, seed=n) for n in range(24)}
    save(tmp_path / "source.safetensors", weights)
    recipe_file(tmp_path / "mine.toml", ("nvfp4", "**"))
    before = fingerprint(tmp_path)
    command = [sys.executable, "-c", PROGRAM, str(ROOT), *SOUND.split(), "--recipe", "mine.toml"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background jobs
    )  # fmt: skip
    while not list(tmp_path.glob(".new_lora.safetensors.*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "tessera: stopped, nothing was saved\n" and process.returncode == 130
    assert fingerprint(tmp_path) == before
