"""Inside the real ComfyUI, 8 prompts and seeds: the correction makes the tiny model better, merging it worse."""

import math
from statistics import mean, stdev

import pytest

from comfy_host import PROMPTS, measure, variants

pytestmark = pytest.mark.host
PAIRS = [(text, 100 + i) for i, text in enumerate(PROMPTS[::2])]
VELOCITY, LATENT = 0, 1


@pytest.fixture(scope="module")
def rows(tiny):
    reference, models = variants(tiny)
    return measure(reference, {k: models[k] for k in ("0", "1", "merged")}, PAIRS)


@pytest.mark.parametrize("metric", [VELOCITY, LATENT], ids=["velocity", "latent"])
def test_corrected_beats_quantized_beats_merged(rows, metric):
    corrected, quantized, merged = (mean(r[metric] for r in rows[name]) for name in ("1", "0", "merged"))
    assert corrected < quantized < merged


@pytest.mark.parametrize(("better", "worse"), [("1", "0"), ("0", "merged")])
def test_the_difference_is_no_accident(rows, better, worse):
    """Student's t of the paired log ratio of velocity errors; 3.5 is 1 % two-sided at 7 degrees of freedom."""
    ratios = [math.log(w[VELOCITY] / b[VELOCITY]) for b, w in zip(rows[better], rows[worse], strict=True)]
    assert mean(ratios) / (stdev(ratios) / math.sqrt(len(ratios))) > 3.5
