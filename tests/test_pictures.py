"""What is drawn is what the numbers say: looked up pixel by pixel."""

import math
import re

import numpy as np
import pytest
import torch

from tessera import likeness, pictures, sweep
from tessera.pictures import HEAT, curves


def rgb(text):
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


def count(image, colour, near=0):
    return int((np.abs(np.asarray(image).astype(int) - rgb(colour)).max(-1) <= near).sum())


# Colours


def test_picture_to_tensor_and_back_is_exact():
    picture = torch.randint(0, 256, (7, 5, 3)).float() / 255
    assert torch.equal(pictures.tensor([pictures.image(picture)])[0], picture)


def test_colour_scale_goes_from_its_first_stop_to_its_last():
    row = np.asarray(pictures.coloured(torch.tensor([[0.0, 0.25, 0.5, 7.0]]), 0.5))[0]
    assert tuple(row[0]) == rgb(HEAT[0]) and tuple(row[2]) == tuple(row[3]) == rgb(HEAT[-1])
    light = [sum(map(int, colour)) for colour in row[:3]]
    assert light == sorted(light)


def test_colour_scale_ends_at_a_round_number_that_few_exceed():
    planes = torch.rand(2, 100, 100) * 0.13
    planes[0, 0, 0] = 5.0
    assert pictures.top_of(planes) == pytest.approx(0.15)
    assert pictures.top_of(torch.zeros(1, 4, 4)) == 1.0
    assert pictures.top_of(torch.tensor([[0.0] * 999 + [0.4]])) == pytest.approx(0.4)


def test_heat_map_shows_every_number_and_its_scale():
    plane = torch.zeros(16, 16)
    plane[4, 6] = 1.0
    drawn = pictures.heat_map(plane, 1.0, "difference")
    factor = 384 // 16
    assert count(drawn, HEAT[-1]) >= factor * factor  # the one number, and the end of the scale
    assert count(drawn, HEAT[0]) >= 255 * factor * factor


# Sheets


def test_side_by_side_holds_each_picture_whole():
    a, b = (pictures.image(torch.full((300, 400, 3), value)) for value in (0.2, 0.8))
    sheet = pictures.side_by_side([("a", a), ("b", b)])
    assert count(sheet, "#333333") >= 300 * 400 and count(sheet, "#cccccc") >= 300 * 400
    assert sheet.width > 800 and sheet.height > 300


@pytest.mark.parametrize(("number", "columns"), [(1, 1), (5, 5), (6, 3), (7, 4), (8, 4), (9, 3), (10, 5)])
def test_grid_breaks_into_lines_that_are_full(number, columns):
    cells = [pictures.image(torch.full((256, 256, 3), 0.4)) for _ in range(number)]
    sheet = pictures.grid([cells], [(str(i), "") for i in range(number)])
    assert round(sheet.width / (256 + 9)) == columns
    assert count(sheet, "#666666") >= number * 256 * 256


def test_grid_frames_the_best_and_keeps_the_rows_of_a_batch():
    cells = [[pictures.image(torch.full((300, 256, 3), 0.4)) for _ in range(7)] for _ in range(2)]
    labels = [(str(i), "") for i in range(7)]
    assert count(pictures.grid(cells, labels), pictures.GOOD) == 0
    framed = pictures.grid(cells, labels, marked=3)
    at = np.argwhere((np.asarray(framed) == rgb(pictures.GOOD)).all(-1))
    (top, left), (bottom, right) = at.min(0), at.max(0)
    assert 3 < left / (256 + 9) < 3.2 and 3.8 < right / (256 + 9) < 4.1
    assert bottom > 600 and top < 10  # the label, too


def test_large_pictures_are_made_smaller_and_keep_their_shape():
    wide = pictures.image(torch.rand(500, 1000, 3))
    sheet = pictures.grid([[wide]], [("0", "")], cell=128)
    assert sheet.width < 180 and 64 < sheet.height < 140


def test_a_label_that_is_too_long_is_cut_and_breaks_nothing():
    small = pictures.image(torch.zeros(64, 64, 3))
    plain = pictures.side_by_side([("a", pictures.enlarged(small))])
    long = pictures.side_by_side([("a very long\nlabel <b>" * 50, pictures.enlarged(small))])
    assert long.size == plain.size


# Curves


def drawn(values, ratios, strengths=(0.0, 0.5, 1.0, 1.5), best=2):
    error = curves.Series("error", "%", values, "#0072B2")
    ratio = curves.Series("PSNR", "dB", ratios, "#D55E00")
    return curves.curve("title", "strength", strengths, error, ratio, best)


def test_curve_passes_through_its_points():
    chart = np.asarray(drawn([8.0, 4.0, 0.0, 4.0], [22, 27, 30, 27])).astype(int)
    width, height = curves.WIDTH - curves.LEFT - curves.RIGHT, curves.HEIGHT - curves.UPPER - curves.LOWER
    for strength, error in ((0, 8), (0.5, 4), (1.5, 4)):
        x = curves.LEFT + (strength + 0.045) / 1.59 * width
        y = curves.UPPER + (1 - error / 8) * height
        assert np.abs(chart[round(y), round(x)] - rgb("#0072B2")).max() < 40, (strength, error)


def test_curve_marks_the_best_strength():
    chart = drawn([8.0, 4.0, 1.0, 4.0], [20, 25, 30, 25], best=2)
    columns = np.argwhere((np.abs(np.asarray(chart).astype(int) - rgb(pictures.GOOD)).max(-1) < 30)[100:400])[:, 1]
    x = curves.LEFT + (1.0 + 0.045) / 1.59 * (curves.WIDTH - curves.LEFT - curves.RIGHT)
    assert np.abs(np.median(columns) - x) < 3


@pytest.mark.parametrize(
    ("values", "ratios", "strengths"),
    [([0.0], [math.inf], (1.0,)), ([0.0, 0.0], [math.inf, math.inf], (0.0, 1.0)), ([5.0, 5.0], [3.0, -2.0], (-1, -1)),
     ([1e-7, 1e6], [300.0, 0.0], (0.0, 1e-3))],
)  # fmt: skip
def test_curve_of_odd_numbers_is_drawn(values, ratios, strengths):
    assert drawn(values, ratios, strengths, best=0).size == (curves.WIDTH, curves.HEIGHT)


# Compared


def test_likeness_shows_where_two_pictures_differ():
    a = torch.rand(2, 400, 420, 3)
    b = a.clone()
    b[1, 100:110, 50:60] = 1 - b[1, 100:110, 50:60]
    found = likeness.of_pictures(a, b, ("original", "mine"))
    assert found.each[0].identical and not found.all.identical
    heat = found.heat_maps()
    same, other = ((heat[i] * 255).round().to(torch.uint8).numpy() for i in (0, 1))
    assert count(same, HEAT[0]) >= 400 * 420 and 400 * 420 - 150 < count(other, HEAT[0]) < count(same, HEAT[0])
    assert found.side_by_side().shape[0] == 2
    assert "| 1 | identical | 1.0000 | 0 % |" in found.markdown()
    assert found.markdown().startswith("**mine** against **original** (pictures)")


def test_likeness_of_latents_shows_their_channel_mean():
    a = torch.randn(1, 16, 24, 32)
    b = a.clone()
    b[:, :, 3, 5] += 4.0
    found = likeness.of_latents(a, b, ("a", "b"))
    assert found.difference.shape == (1, 24, 32)
    assert found.difference.argmax().item() == 3 * 32 + 5
    assert found.largest == pytest.approx(4.0, abs=1e-4) and "latents" in found.markdown()


# Strengths


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0, 0.5, 1, 1.5", [0, 0.5, 1, 1.5]), ("0..2 step 0.5", [0, 0.5, 1, 1.5, 2]), ("1 0 1", [1, 0]),
     ("0..1 step 0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]), ("0..0.5", [0, 0.25, 0.5]),
     ("1..0 step 0.5", [1, 0.5, 0]), ("-1; 0.9 .. 1.1 step 0.1", [-1, 0.9, 1, 1.1]), ("\n1\n", [1])],
)  # fmt: skip
def test_strengths_are_read(text, expected):
    assert sweep.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "there is none"), ("a", "'a' is not a number"), ("0..2 step 0", "the step is 0"), ("0..1e9", "beyond 100"),
     ("nan", "beyond 100"), ("0..2 step 0.001", "more than 64"), ("0..", "not a number")],
)  # fmt: skip
def test_strengths_that_are_none_are_named(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        sweep.parse(text)


# Sweeps


def swept(**given):
    """Pictures and latents that are nearest to the reference at 1."""
    torch.manual_seed(3)
    reference, wrong = torch.rand(2, 1, 32, 32, 3)
    latent, off = torch.randn(2, 1, 16, 16, 16)
    strengths = [0.0, 0.5, 1.0, 1.5]
    images = [reference + (1.05 - s) * 0.2 * wrong for s in strengths]
    latents = [latent + (1.05 - s) * 0.2 * off for s in strengths]
    whole = {"images": images, "reference_image": reference, "latents": latents, "reference_latent": latent}
    return sweep.Result.of(sweep.Sweep(strengths, **(whole | given)))


def test_sweep_finds_the_best_strength_and_says_so():
    result = swept()
    assert result.best == 2
    assert re.fullmatch(r"best strength 1: latent error 1\.\d\d? %, .* dB; at 0 latent error 2\d(\.\d)? %, .* dB",
                        result.line())  # fmt: skip
    rows = result.markdown().splitlines()
    assert len([row for row in rows if row.startswith("| ")]) == 5
    assert rows[2].count("|") == 8 and any(row.startswith("| **1**, best |") for row in rows)


def test_sweep_with_one_reference_measures_by_that():
    pictures_only = swept(latents=None, reference_latent=None)
    assert pictures_only.best == 2 and "picture error" in pictures_only.markdown()
    latents_only = swept(reference_image=None)
    assert latents_only.best == 2 and "picture" not in latents_only.markdown()


def test_sweep_without_a_reference_still_shows_the_grid():
    result = swept(reference_image=None, latents=None, reference_latent=None)
    assert result.best is None and "none is the best" in result.line()
    assert result.grid().shape[-1] == 3
    assert result.curve().shape == (1, curves.HEIGHT, curves.WIDTH, 3)


def test_sweep_whose_best_is_the_last_says_to_go_on():
    result = swept()
    part = sweep.Sweep(result.sweep.strengths[:3], result.sweep.images[:3], result.sweep.reference_image)
    assert "go further" in sweep.Result.of(part).line()


def test_sweep_names_what_does_not_fit():
    with pytest.raises(ValueError, match="images has 1 entries for 4 strengths"):
        swept(images=[torch.zeros(1, 32, 32, 3)])
    with pytest.raises(ValueError, match="reference_latent is connected without latents"):
        swept(latents=None)
    with pytest.raises(ValueError, match="reference_image is 16 x 32, 3 channels, strength 0 is 32 x 32"):
        swept(reference_image=torch.zeros(1, 32, 16, 3))
