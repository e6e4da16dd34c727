"""Layer maps: what the browser gets is small and adds up, edits by hand are made or refused, pictures show it."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import ROOT
from synthetic import ZIMAGE, block, recipe_file, save, zimage
from tessera import cli, edits, mosaic, planning
from tessera.checkpoint import Checkpoint
from tessera.formats import TensorSpec
from tessera.job import Job
from tessera.pictures import mosaic_image, mosaic_layout
from tessera.pictures.mosaic_colours import FORMATS, KERNELS, STEPS, family
from tessera.quantization import architecture, recipe
from tessera.quantization.indicators import Indicators
from tessera.quantization.measurement import LocalError, Measurement
from tessera.survey import FORMATS as MENU
from tessera.survey import RANKS, Menu, Outline, Survey
from tessera.tiles import Mosaic, Tile

TARGET = planning.Target(5_000_000_000)
HOSTILE = [
    "a\nb\x1b[31m<script>alert(1)</script>", "x" * 10_000, "\u202eevil.3.\u05d0\u05d1", "1." * 5000 + "q", "", ".",
    "<img src=x onerror=alert(1)>.0.a", "<img src=x onerror=alert(1)>.1.a", "layers.999999.x", "\u65e5\u672c.0.q",
    "\u65e5\u672c.1.q", "layers.1.\u05e9\u05dc\u05d5\u05dd",
]  # fmt: skip


def scored(shapes, ranks=RANKS):
    """A survey of a model with those shapes: damages as they would be measured, made up."""
    menu, chance = Menu.of(MENU, ranks), random.Random(4)
    tensors = {key: TensorSpec(torch.bfloat16, tuple(shape)) for key, shape in shapes.items()}
    nbytes = sum(spec.nbytes for spec in tensors.values())
    source = Outline("z.safetensors", "", {}, tensors, nbytes, {key: tuple(s) for key, s in shapes.items()})
    known, layers, kept = architecture.detect(source.shapes()), {}, {}
    for name in (key.removesuffix(".weight") for key, s in shapes.items() if key.endswith(".weight") and len(s) == 2):
        if why := known.keeps(name):
            kept[name] = why
            continue
        shape, errors = tuple(shapes[f"{name}.weight"]), {}
        for format, size in zip(menu.formats[:3], (1e-2, 4e-5, 7e-4), strict=True):
            settled, share = format.for_shape(*shape), chance.uniform(0.5, 1.5)
            left = {rank: 0.99**rank for rank in ranks}
            errors[settled.label] = LocalError(settled, size * share, None, 0.0, left)
        layers[name] = Measurement(shape, errors, Indicators(0.0, 1.0, 1.0), 1024)
    damages = {n: {w: e.energy / len(layers) for w, e in m.errors.items()} for n, m in layers.items()}
    return Survey(source, menu, layers, kept, damages, "made up")


@pytest.fixture(scope="module")
def survey():
    return scored(ZIMAGE)


@pytest.fixture(scope="module")
def base(survey):
    return planning.plan(survey, "mine", TARGET)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tmp_path_factory.mktemp("source") / "source.safetensors", block())


@pytest.fixture(scope="module")
def job(source):
    """A finished job of three layers, one of them kept."""
    rules = recipe_file(source.with_name("mine.toml"), ("nvfp4", "**.qkv"), ("mxfp8", "**.w1"))
    work = Job(Checkpoint(source), source.with_name("made.safetensors"), recipe.read(rules), rank=8)
    return work, work.run()


def sums(payload):
    """(bytes, error) as the browser adds them up."""
    layers, nbytes, damage = payload["layers"], payload["fixed"]["nbytes"], 0.0
    for index, menu in enumerate(payload["options"]):
        chosen = [o for o in menu if o[:2] == [layers["format"][index], layers["rank"][index]]]
        assert len(chosen) == (1 if menu else 0)
        for _, _, size, lost in chosen:
            nbytes, damage = nbytes + size, damage + lost
    return nbytes, damage**0.5


def column(payload, name):
    return dict(zip(payload["layers"]["name"], payload["layers"][name], strict=True))


# ---- payloads


def test_a_plan_of_z_image_is_below_100_kb_and_its_sums_are_the_plans(survey, base):
    plan, payload = base, mosaic.of_plan(base).payload()
    assert len(json.dumps(payload)) < 100_000 and len(payload["layers"]["name"]) == 208, len(json.dumps(payload))
    assert sum(map(len, payload["options"])) == 13 * len(survey.layers)
    nbytes, error = sums(payload)
    assert nbytes == plan.nbytes <= TARGET.nbytes and error == pytest.approx(plan.error, rel=1e-9)
    assert all(len(values) == 208 for values in payload["layers"].values())
    assert dict(payload["facts"])["size"] == f"{plan.nbytes / 1e9:.2f} GB"


def test_300_layers_take_less_than_100_kb_and_2000_still_little():
    kinds = ("qkv", "out", "w1", "w2", "w3", "to_v_proj")
    names = [f"transformer_blocks.{i}.attention.{kind}.weight" for i in range(50) for kind in kinds]
    plan = planning.plan(scored({name: [3072, 12288] for name in names}), "many", planning.Target(error=0.03))
    found = mosaic.of_plan(plan)
    payload = found.payload()
    assert len(payload["layers"]["name"]) == 300 and len(json.dumps(payload)) < 100_000
    assert all(len(menu) >= 4 for menu in payload["options"] if menu) and sums(payload)[0] == plan.nbytes
    tiles = [replace(tile, name=f"{n}.{tile.name}") for n in range(7) for tile in found.tiles][:2000]
    options = {tile.name: plan.options.get(tile.name.partition(".")[2], ()) for tile in tiles}
    payload = replace(found, tiles=tiles, options=options).payload()
    assert len(payload["options"]) == 2000 and len(json.dumps(payload)) < 800_000


def test_the_map_of_a_file_says_what_each_layer_cost_from_its_header(job):
    work, report = job
    file = Checkpoint(work.target)
    payload = mosaic.of_file(file).payload()
    rows = {row.name: row for row in report.layers}
    assert payload["kind"] == "file" and payload["formats"] == ["bf16", "nvfp4", "mxfp8"]
    errors, corrected = column(payload, "error"), column(payload, "corrected")
    for name, row in rows.items():
        assert errors[name] == pytest.approx(row.error, rel=1e-3)
        assert corrected[name] == pytest.approx(row.corrected_error, rel=1e-3)
    assert errors["layers.0.attention.out"] is None
    assert column(payload, "bits")["layers.0.feed_forward.w1"] == 8.33  # of 96 rows, whose scales are padded to 128


@pytest.mark.parametrize("said", ["[]", "{", '{"layers.0.attention.qkv": ["a", true]}', '{"layers.0.attention.qkv": 3}',
                                  "[" * 100_000, '{"layers.0.attention.qkv": [NaN, 1e999]}'])  # fmt: skip
def test_errors_that_are_none_are_nothing(said):
    found = mosaic.errors_of({"tessera_layers": said, "tessera_outputs": said})
    assert found.of("layers.0.attention.qkv") == (None, None)


def test_output_errors_are_shown_where_every_layer_has_one():
    weights, some = '{"a": [0.1, 0.05], "b": [0.2]}', '{"a": [0.01, 0.005]}'
    every = '{"a": [0.01, 0.005], "b": [0.02, null]}'
    assert mosaic.errors_of({"tessera_layers": weights, "tessera_outputs": some}).of("a") == (0.1, 0.05)
    found = mosaic.errors_of({"tessera_layers": weights, "tessera_outputs": every})
    assert found.measure == "output error" and found.of("a") == (0.01, 0.005) and found.of("b") == (0.02, None)


def test_a_jobs_map_holds_all_layers_and_fills_those_that_are_done(job):
    work, report = job
    before, half = mosaic.of_job(work).payload(), mosaic.of_job(work, report.layers[:1]).payload()
    after = mosaic.of_job(work, report=report).payload()
    assert [sum(p["layers"].get("done", [1] * 3)) for p in (before, half, after)] == [1, 2, 3]
    assert [sum(e is not None for e in p["layers"]["error"]) for p in (before, half, after)] == [0, 1, 2]
    assert column(before, "nbytes")["layers.0.attention.qkv"] == column(after, "nbytes")["layers.0.attention.qkv"]
    assert dict(half["facts"])["layers"] == "1 of 2 done" and "correction LoRA" in dict(after["facts"])
    alone = mosaic.of_report(report).payload()
    assert set(alone["layers"]["name"]) == {row.name for row in report.layers} and alone["facts"] == after["facts"]


def test_kernels_that_ran_come_most_first_and_none_yet_is_not_unknown():
    tiles = [Tile("a", "nvfp4", (4, 4), 8, ran={"host": 1, "nvfp4": 8}), Tile("b", "nvfp4", (4, 4), 8, ran={}),
             Tile("c", "bf16", (4, 4), 32)]  # fmt: skip
    payload = mosaic.of_inspection("m", tiles).payload()
    names = payload["kernels"]
    assert [[[names[k], n] for k, n in ran] if ran else ran for ran in payload["layers"]["ran"]] == [
        [["nvfp4", 8], ["host", 1]], [], None]  # fmt: skip


def test_hostile_names_and_numbers_leave_the_payload_harmless():
    tiles = [Tile(name, name or "?", (1, 1), 1, float("nan"), float("inf"), reason=name) for name in HOSTILE]
    text = json.dumps(Mosaic(HOSTILE[0], "file", [("size", HOSTILE[0])], tiles).payload(), allow_nan=False)
    assert len(text) < 30_000 and "<script" not in text and "\\u202e" not in text.replace("\\\\u202e", "")


# ---- edits by hand


def test_edits_are_made_after_the_allocation_and_sizes_stay_exact(survey, base):
    text = "layers.{3-5}.attention.qkv = mxfp8 r32  # by me\n\n# more\nlayers.4.** = keep\ncap_embedder.* = keep\n"
    plan = planning.plan(survey, "mine", TARGET, text)
    made = {n: (planning.label(plan.layers[n].format), plan.layers[n].rank) for n in plan.before}
    assert made["layers.3.attention.qkv"] == made["layers.5.attention.qkv"] == ("mxfp8", 32)
    assert made["layers.4.attention.qkv"] == made["layers.4.feed_forward.w1"] == ("keep", None)
    untouched = set(plan.layers) - set(made)
    assert all(plan.layers[n] == base.layers[n] for n in untouched) and plan.before.keys() == made.keys()
    payload = mosaic.of_plan(plan).payload()
    assert sums(payload) == (plan.nbytes, pytest.approx(plan.error, rel=1e-9)) and plan.nbytes > base.nbytes
    assert payload["edits"] == text and sum(column(payload, "edited").values()) == len(made)
    planned = column(payload, "planned")["layers.3.attention.qkv"]
    assert payload["formats"][planned] == planning.label(base.layers["layers.3.attention.qkv"].format)
    assert "edited by hand" in plan.layers["layers.3.attention.qkv"].reason and "edited by hand" in plan.toml()
    assert any(line.startswith(f"edited by hand: {len(made)} layers") for line in plan.summary())
    chosen = plan.recipe().resolve(survey.source.shapes())
    assert chosen["layers.3.attention.qkv"].rank == 32 and chosen["layers.4.attention.qkv"].format is None


def test_edits_that_say_what_was_planned_change_nothing(survey, base):
    name, layer = next((n, x) for n, x in base.layers.items() if x.format is not None)
    again = planning.plan(survey, "mine", TARGET, f"{name} = {planning.label(layer.format)} r{layer.rank}")
    assert (again.layers, again.nbytes, again.before) == (base.layers, base.nbytes, {})


@pytest.mark.parametrize(("line", "problem"), [
    ("layers.99.** = mxfp8", "names no layer of this model"),
    ("layers.3.attention.qkv mxfp8", "write PATTERN = FORMAT"),
    ("layers.3.attention.qkv = mxfp8 32", "write PATTERN = FORMAT"),
    ("= mxfp8", "write PATTERN = FORMAT"),
    ("layers.3.attention.qkv = int4", "unknown format 'int4'"),
    ("layers.3.attention.qkv = keep r32", "has no error to correct"),
    ("layers.3.attention.qkv = mxfp8 r48", "with rank 0, 16, 32, 64"),
    ("layers.3.attention.qkv = fp8", "was measured for nvfp4, int8_convrot_256, mxfp8, keep"),
    ("final_layer.linear = mxfp8", "must stay as it is"),
    ("layers.[3] = mxfp8", "which no module path has"),
    ("layers.**x = mxfp8", "not one whole segment"),
    ("layers.{9-3}.** = mxfp8", "counts down"),
])  # fmt: skip
def test_a_mistake_in_edits_is_refused_by_its_line(survey, base, line, problem):
    text = f"layers.1.** = mxfp8\n{line}\nlayers.2.** = mxfp8"
    with pytest.raises(ValueError, match=rf"edits, line 2 .*{re.escape(problem)}"):
        edits.apply(text, base.options, survey.source.shapes(), survey.kept)


def test_a_pattern_may_name_layers_that_cannot_be_it_and_the_report_says_so(survey):
    plan = planning.plan(survey, "mine", TARGET, "layers.0.** = mxfp8")
    assert plan.layers["layers.0.adaLN_modulation.0"].reason.startswith("kept")
    assert any("line 1: 1 layers cannot be that and stay as they were (layers.0.adaLN_modulation.0)" in line
               for line in plan.summary())  # fmt: skip


def test_a_layer_of_any_name_is_edited_by_its_name():
    odd = "blocks.0.to_q (copy)"
    assert edits.parse(f"{odd} = mxfp8")[0].layers([odd, "other"]) == [odd]
    with pytest.raises(ValueError, match="more than 400000"):
        edits.parse("a = keep\n" * 50_000)


# ---- layout and pictures


def test_blocks_stand_side_by_side_and_the_rest_apart():
    names = [key.removesuffix(".weight") for key, s in ZIMAGE.items() if key.endswith(".weight") and len(s) == 2]
    [panel], other = mosaic_layout.arrange(names)
    assert [(band.stack, len(band.columns)) for band in panel.bands] == [
        ("context_refiner", 2), ("layers", 30), ("noise_refiner", 2)]  # fmt: skip
    assert set(panel.rows) == {"adaLN_modulation.0", "attention.out", "attention.qkv", "feed_forward.w1",
                               "feed_forward.w2", "feed_forward.w3"}  # fmt: skip
    assert [names[i] for i in other] == ["cap_embedder.1", "final_layer.adaLN_modulation.1", "final_layer.linear",
                                         "t_embedder.mlp.0", "t_embedder.mlp.2", "x_embedder"]  # fmt: skip
    placed = [i for band in panel.bands for column in band.columns for i in column.cells if i is not None]
    assert sorted([*placed, *other]) == list(range(len(names)))


def test_every_layer_has_a_place_whatever_it_is_called():
    for names in (HOSTILE, [f"s{i}.{j}.k{i}" for i in range(100) for j in range(2)], [f"{i}" for i in range(50)],
                  [f"a.{i}.experts.{e}.up" for i in range(4) for e in range(8)]):  # fmt: skip
        panels, other = mosaic_layout.arrange(names)
        cells = [i for p in panels for b in p.bands for c in b.columns for i in c.cells if i is not None]
        assert sorted([*cells, *other]) == list(range(len(names)))
        assert all(len(column.cells) == len(p.rows) for p in panels for b in p.bands for column in b.columns)


def test_the_browser_arranges_and_colours_alike():
    playwright = pytest.importorskip("playwright", reason="Playwright is not installed: scripts/setup_host.py")
    own = Path(playwright.__file__).parent / "driver" / ("node.exe" if os.name == "nt" else "node")
    program = (
        "import { readFileSync } from 'node:fs';"
        "const { arrange } = await import(process.argv[1] + '/layer_map_data.js');"
        "const { FORMATS, STEPS, KERNELS, family } = await import(process.argv[1] + '/layer_map_colours.js');"
        "const { sets, labels } = JSON.parse(readFileSync(0));"
        "console.log(JSON.stringify({ sets: sets.map(arrange), colours: [FORMATS, STEPS, KERNELS],"
        " families: labels.map(family) }))"
    )
    zimage = [key.removesuffix(".weight") for key, s in ZIMAGE.items() if key.endswith(".weight") and len(s) == 2]
    unet = [f"{a}_blocks.{b}.1.transformer_blocks.{t}.{k}" for a, n in (("input", 2), ("output", 3)) for b in range(n)
            for t in range(b + 1) for k in ("attn1.to_q", "ff.net.0.proj", "ff.net.2")]  # fmt: skip
    experts = [f"layers.{i}.experts.{e}.up" for i in range(4) for e in range(8)] + ["head.0", "head.2"]
    sets, labels = [zimage, unet, experts], ["nvfp4", "int8_convrot_64", "int8", "float8_e4m3fn", "fp16", "w4a8"]
    done = subprocess.run(
        [str(own), "--input-type=module", "-e", program, (ROOT / "web").as_uri()], capture_output=True, text=True,
        input=json.dumps({"sets": sets, "labels": labels}), encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for names, theirs in zip(sets, found["sets"], strict=True):
        panels, other = mosaic_layout.arrange(names)
        mine = [(p.rows, [(b.stack, [(c.number, c.cells) for c in b.columns]) for b in p.bands]) for p in panels]
        bands = [(p["rows"], [(b["stack"], [(c["number"], c["cells"]) for c in b["columns"]]) for b in p["bands"]])
                 for p in theirs]  # fmt: skip
        if other:
            assert [cells for _, [cells] in bands.pop()[1][0][1]] == other
        assert mine == bands
    assert found["colours"] == [{k: list(v) for k, v in FORMATS.items()}, list(STEPS), list(KERNELS)]
    assert found["families"] == [family(word) for word in labels]


def colours(picture):
    return {colour for _, colour in picture.getcolors(1 << 24)}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_picture_shows_every_format_in_its_colour(base, theme):
    drawn = mosaic_image.draw(mosaic.of_plan(base), theme=theme)
    wanted = {(0xD5, 0x5E, 0x00), (0x44, 0xC9, 0xA0), (0x8A, 0x8A, 0x8A)}  # nvfp4, int8_convrot, kept
    assert drawn.width == 1200 and 300 < drawn.height < 700 and wanted <= colours(drawn)
    paper = drawn.getpixel((3, 3))
    assert (sum(paper) > 600) == (theme == "light") and drawn.getpixel((3, drawn.height - 3)) == paper


def test_pictures_by_error_sensitivity_size_and_kernel_differ(base):
    shown = mosaic.of_plan(base)
    drawn = {by: mosaic_image.draw(shown, by).tobytes() for by in mosaic_image.WAYS}
    assert len(set(drawn.values())) == 5 and drawn["error"] == mosaic_image.draw(shown, "error").tobytes()
    with pytest.raises(ValueError, match="color 'mood': must be one of format"):
        mosaic_image.draw(shown, "mood")


@pytest.mark.parametrize("by", mosaic_image.WAYS)
def test_hostile_names_are_drawn_within_the_page(by):
    tiles = [Tile(name, name or "?", (1, 1), n, n / 7, kernel=name) for n, name in enumerate(HOSTILE)]
    drawn = mosaic_image.draw(Mosaic(HOSTILE[1], "file", [(HOSTILE[0], HOSTILE[1])] * 9, tiles), by)
    edge = {drawn.getpixel((x, y)) for x in (*range(20), *range(1180, 1200)) for y in range(drawn.height)}
    assert drawn.width == 1200 and drawn.height < 1500 and edge == {(255, 255, 255)}


def test_no_layers_and_very_many_are_drawn_too():
    assert mosaic_image.draw(Mosaic("empty", "file", [], [])).height < 300
    tiles = [Tile(f"blocks.{i}.k{k}", "nvfp4", (1, 1), 1) for i in range(2) for k in range(2500)]
    drawn = mosaic_image.draw(Mosaic("tall", "file", [], tiles))
    assert 5000 < drawn.height <= 6000


# ---- the command line


def test_inspect_draws_the_map_of_a_file_and_overwrites_nothing(job, tmp_path, capsys):
    target = tmp_path / "map.png"
    words = ["inspect", str(job[0].target), "--map", str(target)]
    assert cli.main([*words, "--color", "error", "--theme", "dark"]) == 0
    assert "the layer map" in capsys.readouterr().out and Image.open(target).size[0] == 1200
    before = target.read_bytes()
    assert cli.main(words) == 1 and "already exists" in capsys.readouterr().err and target.read_bytes() == before
    assert cli.main([*words[:-1], str(tmp_path / "map.jpg")]) == 1 and "name it .png" in capsys.readouterr().err


def test_without_pillow_the_command_says_what_to_install(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert cli.main(["inspect", str(job[0].target), "--map", str(tmp_path / "map.png")]) == 1
    assert "pip install pillow" in capsys.readouterr().err and not (tmp_path / "map.png").exists()
    assert cli.main(["inspect", str(job[0].target)]) == 0


def test_probe_takes_edits_and_draws_the_plan(tmp_path, capsys):
    path, picture = save(tmp_path / "z.safetensors", zimage(64)), tmp_path / "plan.png"
    words = ["probe", str(path), "--rows", "8", "--ranks", "0", "--json"]
    assert cli.main([*words, "--target-size", "7MB", "--edits", "layers.3.** = keep; layers.4.attention.* = mxfp8",
                     "--map", str(picture)]) == 0  # fmt: skip
    found = {row["layer"]: row["format"] for row in json.loads(capsys.readouterr().out)["layers"]}
    assert found["layers.3.attention.qkv"] == "keep" and found["layers.4.attention.out"] == "mxfp8"
    assert Image.open(picture).format == "PNG"
    assert cli.main([*words, "--edits", "layers.3.** = keep"]) == 1 and "needs a target" in capsys.readouterr().err
