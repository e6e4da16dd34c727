"""Edits of a plan as text mean the same in Python as in the layer map's JavaScript (layer_map_edits.test.mjs)."""

import json

import pytest

from conftest import ROOT
from tessera import edits
from tessera.quantization.layer_map import label

CASES = json.loads((ROOT / "tests/web/layer_map_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES["lines"], ids=lambda case: case["text"])
def test_a_line_names_the_same_layers_as_in_the_browser(case):
    (edit,) = edits.parse(case["text"])
    assert edit.layers(CASES["names"]) == case["layers"]
    assert (label(edit.format), edit.rank) == (case["format"], case["rank"])
