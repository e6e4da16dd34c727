"""A stack of LoRAs as text gives the lines it means, and says of every bad one where it is and what to write."""

import json

import pytest

from conftest import TESTS
from tessera import lora_stack

CASES = json.loads((TESTS / "web" / "lora_stack_cases.json").read_text())  # also read by lora_stack_text.test.mjs
NAMES = CASES["names"]


@pytest.mark.parametrize("case", CASES["lines"], ids=lambda case: repr(case["text"]))
def test_text_gives_its_active_lines(case):
    for text in (case["text"], case["written"]):
        found = [[line.name, line.strength_model, line.strength_clip] for line in lora_stack.parse(text, NAMES)]
        assert found == case["active"]


def test_a_name_is_found_however_its_system_writes_folders():
    assert lora_stack.parse("sub\\b.safetensors : 1", NAMES)[0].name == "sub/b.safetensors"
    assert lora_stack.parse("sub/b.safetensors : 1", ["sub\\b.safetensors"])[0].name == "sub\\b.safetensors"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("a.safetensors : abc", 'a.safetensors: "abc" is not one or two numbers; write a.safetensors : 0.8, or '),
        ("a.safetensors : 0,8", 'a.safetensors: "0,8" is not one or two numbers; write a.safetensors : 0.8, or '),
        ("a.safetensors :", 'a.safetensors: "" is not one or two numbers; '),
        ("a.safetensors : 1 : ", 'a.safetensors: "1 :" is not one or two numbers; '),
        ("a.safetensors : 1 : 2 : 3", 'a.safetensors: "1 : 2 : 3" is not one or two numbers; '),
        ("a.safetensors : nan", 'a.safetensors: "nan" is not one or two numbers; '),
        ("a.safetensors : 1_0", 'a.safetensors: "1_0" is not one or two numbers; '),
        ("a.safetensors : \u0661", 'a.safetensors: "\u0661" is not one or two numbers; '),
        ("a.safetensors : 101", "a.safetensors: strength 101 is outside -100 to 100"),
        ("a.safetensors : 1 : -1e9", "a.safetensors: strength -1e+09 is outside -100 to 100"),
        ("a : 0.8", 'there is no "a" in models/loras; did you mean a.safetensors?'),
        ("b.safetensors : 1", 'there is no "b.safetensors" in models/loras; did you mean sub/b.safetensors?'),
        ("a.safetensor : 1", 'there is no "a.safetensor" in models/loras; did you mean a.safetensors?'),
        ("a.safetensors 0.8", 'there is no "a.safetensors 0.8" in models/loras; did you mean a.safetensors?'),
        ("gone.ckpt : 1", 'there is no "gone.ckpt" in models/loras; put it there and press R, or mute the line'),
        (": 1", 'there is no ": 1" in models/loras; '),
        ("../secret.safetensors : 1", 'there is no "../secret.safetensors" in models/loras; '),
    ],
)
def test_a_bad_line_is_told_by_number_with_a_remedy(line, complaint):
    with pytest.raises(ValueError) as error:
        lora_stack.parse(f"a.safetensors : 1\n\n{line}", NAMES)
    assert str(error.value).startswith(f"line 3: {complaint}")


def test_every_bad_line_is_told():
    with pytest.raises(ValueError, match=r"^line 1: .*\nline 3: .*$"):
        lora_stack.parse("x : 1\na.safetensors\ny : 2\n# z : 3", NAMES)


def test_a_long_line_is_read_at_once():
    """The pattern looks for the shortest name: not again and again."""
    with pytest.raises(ValueError, match=r"^line 1: "):
        lora_stack.parse(": 1" * 3000, NAMES)
