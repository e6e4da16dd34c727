"""Promises of recipes: the maps of the seed recipes, what a pattern matches, and what is said about a bad recipe."""

import dataclasses
import json
import math
import random
import re
from pathlib import Path

import pytest

from tessera import formats
from tessera.formats import BF16, INT8, MXFP8, NVFP4
from tessera.quantization import architecture
from tessera.quantization import recipe as recipes
from tessera.quantization.layer_map import LayerChoice, label
from tessera.quantization.patterns import alternatives, compile
from tessera.quantization.recipe import Recipe, Rule

ZIMAGE = json.loads(Path(__file__).with_name("data").joinpath("zimage_keys.json").read_text())
TINY = {k: v for k, v in ZIMAGE.items() if not re.match(r"layers\.([3-9]|\d\d)\.", k)}
QWEN_LINEARS = {
    "self_attn.q_proj": (4096, 2560), "self_attn.k_proj": (1024, 2560), "self_attn.v_proj": (1024, 2560),
    "self_attn.o_proj": (2560, 4096), "mlp.gate_proj": (9728, 2560), "mlp.up_proj": (9728, 2560),
    "mlp.down_proj": (2560, 9728),
}  # fmt: skip
QWEN = {
    "model.embed_tokens.weight": (151936, 2560),
    "model.norm.weight": (2560,),
    **{f"model.layers.{n}.{part}.weight": s for n in range(36) for part, s in QWEN_LINEARS.items()},
    **{f"model.layers.{n}.input_layernorm.weight": (2560,) for n in range(36)},
}

PARTS = (
    "attention.qkv",
    "attention.out",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
    "adaLN_modulation.0",
)
LETTERS = {"N": "nvfp4", "M": "mxfp8", "I": "int8_convrot_256", "B": "keep"}
OTHERS = (
    "x_embedder", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear",
    "final_layer.adaLN_modulation.1",
)  # fmt: skip
BLOCKS = {  # formats of PARTS, block by block; context refiners have no modulation
    "z_image_nvfp4": """
        layers 0-1 NMNNNB      layers 2 NNNNNB         layers 3,6,9,11-14 NMMNNB
        layers 4,5,7,8,15,22-25 NNMNNB                 layers 10 MNMNNB
        layers 16 MNMNNM       layers 17,18,21 NNMNNM  layers 19,20 NMMNNM
        layers 26-28 MMMNNB    layers 29 BMMNNB
        context_refiner 0-1 MBMMM   noise_refiner 0 MMMMBB   noise_refiner 1 BBMBBB""",
    "z_image_mxfp8": """
        layers 0-28 MMMMMB   layers 29 BMMMMB
        context_refiner 0 MBMMM   context_refiner 1 MBMBM   noise_refiner 0 MMMMBB   noise_refiner 1 BBMBBB""",
    "int8_convrot": """
        layers 0-29 IIIIIB   context_refiner 0-1 IIIII   noise_refiner 0-1 IIIIIB""",
}
GENERIC = ("nvfp4", "mxfp8", "int8")
COUNTS = {
    "z_image_nvfp4": {"nvfp4": 102, "mxfp8": 66, "keep": 40},
    "z_image_mxfp8": {"mxfp8": 161, "keep": 47},
    "int8_convrot": {"int8_convrot_256": 170, "keep": 38},
}

C = (
    r"layers\.(10|16|26)\.attention\.qkv\.weight|layers\.(27|28)\.attention\.qkv\.weight|layers\.(0|1)\.attention\.out\.weight"
    r"|layers\.(3|6|9|11|12|13|14|19|20|26)\.attention\.out\.weight|layers\.(27|28|29)\.attention\.out\.weight"
    r"|layers\.(3|4|5|6|7|8|9|10|11|12|13|14|15|16|17|18|19|20|21|22|23|24|25|26)\.feed_forward\.w1\.weight"
    r"|layers\.(27|28|29)\.feed_forward\.w1\.weight|layers\.(16|17|18|19|20|21)\.adaLN_modulation\.0\.weight"
    r"|context_refiner\.(0|1)\.attention\.qkv\.weight|context_refiner\.(0|1)\.feed_forward\.w1\.weight"
    r"|context_refiner\.(0|1)\.feed_forward\.w2\.weight|context_refiner\.(0|1)\.feed_forward\.w3\.weight"
    r"|noise_refiner\.(0)\.attention\.(qkv|out)\.weight|noise_refiner\.(0)\.feed_forward\.(w1|w2)\.weight"
    r"|noise_refiner\.(1)\.feed_forward\.w1\.weight"
)
X = (
    r"layers\.(29)\.attention\.qkv\.weight|layers\.(22|23|24|25|26)\.adaLN_modulation\.0\.weight"
    r"|layers\.(27|28|29)\.adaLN_modulation\.0\.weight|context_refiner\.(0|1)\.attention\.out\.weight"
    r"|context_refiner\.(1)\.feed_forward\.w2\.weight|noise_refiner\.(1)\.attention\.qkv\.weight"
    r"|noise_refiner\.(1)\.attention\.out\.weight|noise_refiner\.(1)\.feed_forward\.w2\.weight"
    r"|noise_refiner\.(0|1)\.feed_forward\.w3\.weight"
)
COMMANDS = {
    "z_image_nvfp4": "convert_to_quant -i in.safetensors --nvfp4 --zimage --comfy_quant --save-quant-metadata "
    f"--custom-type mxfp8 --custom-layers '{C}' \\\n --exclude-layers '{X}' --num-iter 6000 --top-p 0.35 "
    "--calib-samples 8192 --scale-optimization iterative --scale-refinement-rounds 2 --extract-lora --lora-rank 32",
    "z_image_mxfp8": "--mxfp8 --zimage --comfy_quant --save-quant-metadata --simple --low-memory --calib-samples 8192 "
    f'--exclude-layers "{X}"',
    "int8_convrot": "--int8 --scaling_mode row --simple --low-memory --convrot --convrot-group-size 256 --zimage "
    "--comfy_quant --save-quant-metadata",
}


def formats_of(layer_map):
    return {layer: label(choice.format) for layer, choice in layer_map.items()}


def spelled_out(blocks):
    expected = dict.fromkeys(OTHERS, "keep")
    for stack, spans, letters in re.findall(r"(\w+) ([\d,-]+) ([A-Z]+)", blocks):
        for span in spans.split(","):
            low, _, high = span.partition("-")
            for number in range(int(low), int(high or low) + 1):
                for part, letter in zip(PARTS, letters, strict=False):
                    expected[f"{stack}.{number}.{part}"] = LETTERS[letter]
    return expected


def recipe(*rules, default=None):
    return Recipe("test", "", tuple(Rule(f, tuple(p), "a reason") for f, *p in rules), default)


def shapes(*layers, shape=(64, 64)):
    return {f"{layer}.weight": shape for layer in layers}


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_the_recipes_that_come_with_tessera():
    assert recipes.names() == sorted([*BLOCKS, *GENERIC])


@pytest.mark.parametrize("name", BLOCKS)
def test_builtin_map_is_the_seed_recipes(name):
    layer_map = recipes.builtin(name).resolve(ZIMAGE)
    assert formats_of(layer_map) == spelled_out(BLOCKS[name])
    assert layer_map.counts() == COUNTS[name]
    assert (layer_map.warnings, layer_map.problems) == ([], [])


@pytest.mark.parametrize("name", BLOCKS)
def test_every_layer_of_a_builtin_has_a_rule_of_its_own(name):
    layer_map = recipes.builtin(name).resolve(ZIMAGE)
    assert all(choice.rule and choice.reason for choice in layer_map.values())


@pytest.mark.parametrize("name", BLOCKS)
def test_builtin_resolves_on_a_three_layer_model(name):
    layer_map = recipes.builtin(name).resolve(TINY)
    assert len(layer_map) == 46
    assert layer_map.problems == []
    assert all(re.search(r"pattern 'layers\..*' matches no layer", w) for w in layer_map.warnings)


def test_int8_convrot_packs_qwen_linears_and_keeps_the_embedding():
    layer_map = recipes.builtin("int8_convrot").resolve(QWEN)
    assert layer_map.counts() == {"int8_convrot_256": 252, "keep": 1}
    assert layer_map["model.embed_tokens"].format is None
    assert (layer_map.warnings, layer_map.problems) == ([], [])


def test_int8_convrot_leaves_unknown_models_alone_and_says_so():
    layer_map = recipes.builtin("int8_convrot").resolve(
        shapes("double_blocks.0.img_attn.qkv", "transformer_blocks.3.attn.to_q", "visual.blocks.0.attn.qkv")
    )
    assert layer_map.counts() == {"keep": 3}
    [warning] = layer_map.warnings
    assert "nothing is quantized" in warning


@pytest.mark.parametrize("name", COMMANDS)
def test_seed_command_line_gives_the_map_of_the_builtin(name):
    imported = recipes.from_convert_to_quant(COMMANDS[name]).resolve(ZIMAGE)
    assert formats_of(imported) == formats_of(recipes.builtin(name).resolve(ZIMAGE))
    assert imported.problems == []


def test_import_reports_what_the_seed_command_says_twice():
    warnings = recipes.from_convert_to_quant(COMMANDS["z_image_nvfp4"]).resolve(ZIMAGE).warnings
    assert warnings == [
        r"rule 2: pattern 'layers\.(22|23|24|25|26)\.adaLN_modulation\.0\.weight' is redundant; "
        "rule 3 would decide the same",
        r"rule 2: pattern 'layers\.(27|28|29)\.adaLN_modulation\.0\.weight' is redundant; rule 3 would decide the same",
        r"rule 2: pattern 'context_refiner\.(1)\.feed_forward\.w2\.weight' decides nothing; rule 1 already did",
        "rule 1 (mxfp8) and rule 2 (keep) both match context_refiner.1.feed_forward.w2; rule 1 comes first and wins",
        "rule 1 (mxfp8) and rule 3 (keep) both match layers.16.adaLN_modulation.0 and 5 more; "
        "rule 1 comes first and wins",
    ]


def test_import_notes_the_flags_without_effect():
    notes = recipes.from_convert_to_quant(COMMANDS["z_image_nvfp4"]).notes
    assert any("--num-iter" in note and "--scale-refinement-rounds" in note and "--input" in note for note in notes)
    assert not any("--zimage" in note or "--custom-type" in note for note in notes)


def test_import_of_the_text_encoder_command_keeps_the_embedding():
    command = COMMANDS["int8_convrot"].replace("--zimage ", "").replace("256", "64")
    imported = recipes.from_convert_to_quant(command)
    assert imported.resolve(QWEN).counts() == {"int8_convrot_64": 252, "keep": 1}
    assert any("embeddings" in note for note in imported.notes)


@pytest.mark.parametrize(("flags", "format"), [
    ("--nvfp4", NVFP4()),
    ("--mxfp8 --scaling-mode row", MXFP8()),
    ("--int8", INT8()),
    ("--int8 --convrot", INT8()),
    ("--int8 --scaling_mode row", INT8(per_row=True)),
    ("--int8 --scaling-mode=row --convrot", formats.parse("int8_convrot_256")),
    ("--int8 --scaling_mode row --convrot --convrot_group_size 16", formats.parse("int8_convrot_16")),
])  # fmt: skip
def test_primary_format_of_a_command_line(flags, format):
    assert recipes.from_convert_to_quant(flags).default == format
    assert recipes.from_convert_to_quant(flags.split()).default == format


def test_custom_layers_inherit_or_override_the_scaling():
    command = "--nvfp4 --custom-type int8 --custom-layers a "
    rows = {
        "--scaling_mode row --convrot --convrot-group-size 64": "int8_convrot_64",
        "--scaling_mode row --custom-convrot": "int8_convrot_256",
        "--custom-scaling-mode row": "int8_row",
        "": "int8",
    }
    assert {f: label(recipes.from_convert_to_quant(command + f).rules[0].format) for f in rows} == rows


@pytest.mark.parametrize(("command", "words"), [
    ("", "no flags"),
    ("--nvfp4 --flux2", "--flux2 cannot be imported; leave it out"),
    ("--nvfp4 --fallback fp8", "--fallback cannot be imported"),
    ("--nvfp4 --mxfp8", "--nvfp4 and --mxfp8 are both given"),
    ("--nvfp4 --custom-layers a", "--custom-layers and --custom-type need each other"),
    ("--nvfp4 --custom-type int4 --custom-layers a", "--custom-type int4 is not"),
    ("--nvfp4 --custom-layers", "expected one argument"),
    ("--nvfp4 --exclude-layers 'a(b'", r"pattern 'a\(b' is no regular expression"),
    ("--int8 --scaling_mode block", "cannot load int8 with --scaling_mode block"),
    ("--scaling_mode row", "cannot load fp8 with --scaling_mode row"),
    ("--int8 --scaling_mode row --convrot --convrot-group-size 512", "512 is not a power of 4"),
    ("--nvfp4 --exclude-layers 'a", "No closing quotation"),
])  # fmt: skip
def test_what_a_command_line_cannot_say(command, words):
    with pytest.raises(ValueError, match=f"convert_to_quant: .*{words}"):
        recipes.from_convert_to_quant(command)


@pytest.mark.parametrize(("expression", "parts"), [
    (r"a\.(0|1)|b", (r"a\.(0|1)", "b")),
    (r"a\|b", (r"a\|b",)),
    (r"(?i)a|b", ("(?i)a|b",)),
    (r"[|]|b", ("[|]|b",)),
    (r"(a)\1|b", (r"(a)\1|b",)),
])  # fmt: skip
def test_alternatives_search_as_the_whole_expression(expression, parts):
    assert alternatives(expression) == parts


@pytest.mark.parametrize(("pattern", "matches", "misses"), [
    ("a.b", ["a.b"], ["a.bb", "x.a.b", "a", "aXb"]),
    ("layers.*.w1", ["layers.0.w1", "layers.12.w1"], ["layers.0.x.w1", "layers.w1"]),
    ("layers.1*.w1", ["layers.1.w1", "layers.12.w1"], ["layers.2.w1"]),
    ("**.qkv", ["qkv", "a.qkv", "a.b.qkv"], ["a.xqkv", "qkv.a"]),
    ("a.**.z", ["a.z", "a.b.z", "a.b.c.z"], ["b.z", "az"]),
    ("a.**", ["a", "a.b", "a.b.c"], ["ab", "b.a"]),
    ("**", ["a", "a.b"], []),
    ("l.{0-9,11,15-17}.w", ["l.0.w", "l.9.w", "l.11.w", "l.16.w"], ["l.10.w", "l.18.w", "l.1.1.w"]),
    ("l.{9-11}.w", ["l.9.w", "l.10.w", "l.11.w"], ["l.1.w", "l.12.w"]),
    ("a.{qkv,out}", ["a.qkv", "a.out"], ["a.qk", "a.qkvout"]),
    ("{layers,refiner.0}.{q,k}_proj", ["layers.q_proj", "refiner.0.k_proj"], ["refiner.0.v_proj"]),
    ("a.{w*,out}", ["a.w1", "a.out"], ["a.x"]),
    ("to-q.{a-b}", ["to-q.a-b"], ["to-q.a"]),
])  # fmt: skip
def test_glob_matches(pattern, matches, misses):
    found = {layer for layer in matches + misses if compile(pattern).search(f"{layer}.weight")}
    assert found == set(matches)


@pytest.mark.parametrize(("pattern", "words"), [
    ("", "empty segment"),
    ("a..b", "empty segment"),
    (".a", "empty segment"),
    (r"layers\.0", r"has '\\\\'.* add regex = true"),
    ("layers.(0|1)", r"has '\('"),
    ("a.{0-9", "bad brace"),
    ("a.0-9}", "bad brace"),
    ("a.{b,}", "bad brace"),
    ("a.{}", "bad brace"),
    ("a.{b,{c,d}}", "bad brace"),
    ("a,b", "bad brace"),
    ("a.b**", "one whole segment"),
    ("**.**", "one whole segment"),
    ("a.{9-3}", "counts down; write 3-9"),
    ("layers.0.w1.weight", "write the module path"),
    ("model.diffusion_model.layers.0.w1", "write the module path"),
])  # fmt: skip
def test_a_glob_that_can_never_match_is_refused(pattern, words):
    with pytest.raises(ValueError, match=f"^pattern '{re.escape(pattern)}' .*{words}"):
        Rule(NVFP4(), ("a.b", pattern), "a reason")


def test_first_matching_rule_wins():
    rules = recipe((MXFP8(), "a.0"), (NVFP4(), "a.*"), default=BF16())
    assert formats_of(rules.resolve(shapes("a.0", "a.1", "b"))) == {"a.0": "mxfp8", "a.1": "nvfp4", "b": "bf16"}
    assert [choice.rule for choice in rules.resolve(shapes("a.0", "a.1", "b")).values()] == [1, 2, None]


def test_only_two_dimensional_weights_are_layers():
    tensors = {
        "a.weight": (8, 8),
        "a.bias": (8,),
        "norm.weight": (8,),
        "conv.weight": (8, 8, 3, 3),
        "pad_token": (1, 8),
    }
    assert list(recipe(default=NVFP4()).resolve(tensors)) == ["a"]


def test_format_is_settled_for_the_shape():
    layer_map = recipe(default=INT8(per_row=True, convrot=True)).resolve({"a.weight": (8, 320), "b.weight": (8, 48)})
    assert formats_of(layer_map) == {"a": "int8_convrot_64", "b": "int8_convrot_16"}


@pytest.mark.parametrize(("rules", "warnings"), [
    ([(NVFP4(), "a.*", "layers.9.x")], ["rule 1: pattern 'layers.9.x' matches no layer"]),
    (
        [(MXFP8(), "a.0"), (NVFP4(), "a.*")],
        ["rule 1 (mxfp8) and rule 2 (nvfp4) both match a.0; rule 1 comes first and wins"],
    ),
    (
        [(MXFP8(), "a.*"), (NVFP4(), "a.{0,1}")],
        [
            "rule 2: pattern 'a.{0,1}' decides nothing; rule 1 already did",
            "rule 1 (mxfp8) and rule 2 (nvfp4) both match a.0 and 1 more; rule 1 comes first and wins",
        ],
    ),
    ([(NVFP4(), "a.0"), (NVFP4(), "a.*")], ["rule 1: pattern 'a.0' is redundant; rule 2 would decide the same"]),
    ([(None, "a.0"), (NVFP4(), "a.{1,2}")], []),
])  # fmt: skip
def test_what_is_said_about_idle_and_overlapping_rules(rules, warnings):
    assert recipe(*rules).resolve(shapes("a.0", "a.1", "a.2")).warnings == warnings


def test_redundancy_looks_at_the_next_rule_only():
    """Without rule 1 the layer would be NVFP4, so rule 1 is needed although rule 3 repeats it."""
    warnings = recipe((None, "a.0"), (NVFP4(), "a.{0,1}"), (None, "**")).resolve(shapes("a.0", "a.1", "b")).warnings
    assert not any("redundant" in warning for warning in warnings)


def test_optional_rule_may_match_nothing():
    rule = Rule(NVFP4(), ("a", "b"), "a reason", optional=True)
    assert Recipe("test", "", (rule,)).resolve(shapes("a")).warnings == []


def test_layers_that_cannot_take_their_format_are_problems():
    layer_map = recipe((INT8(per_row=True, convrot=True), "a.*"), default=formats.parse("int8_convrot_64")).resolve(
        {"a.0.weight": (8, 102), "a.1.weight": (8, 64), "b.weight": (8, 96)}
    )
    assert layer_map.problems == [
        "a.0: in_features 102 is not a multiple of 4, so ConvRot cannot rotate it; use int8_row (rule 1: int8_convrot)",
        "b: in_features 96 is not a multiple of the ConvRot group 64; use a smaller group, int8_row or bf16 "
        "(default: int8_convrot_64)",
    ]


def test_table_joins_equal_blocks_and_lists_the_rest():
    layer_map = recipe((MXFP8(), "l.{0,2}.w"), default=None).resolve(
        shapes("l.0.w", "l.1.w", "l.2.w", "l.3.w", "l.4.w", "l.3.ada", "head")
    )
    assert layer_map.table().splitlines() == [
        "| block | w | ada |", "| --- | --- | --- |", "| l.{0,2} | mxfp8 |  |", "| l.{1,4} | keep |  |",
        "| l.3 | keep | keep |", "", "| layer | format |", "| --- | --- |", "| head | keep |",
    ]  # fmt: skip


def test_digest_is_that_of_the_decisions(tmp_path):
    one = written(tmp_path / "one.toml", 'name = "x"\n[[rule]]\nmxfp8 = ["a"]\nreason = "r"\n')
    two = written(tmp_path / "two.toml", '# note\n[[rule]]\nreason = "other"\nmxfp8 = [\n  "a",\n]\n')
    digest = recipes.read(one).digest
    assert digest == recipes.read(two).digest
    assert digest == "b511320c6607d0b6cbdc6bbdc9a94d94ae88d30a6b1d66f2208d0e79bf97e099"  # written into files: stable
    changed = [
        recipe((MXFP8(), "b")), recipe((NVFP4(), "a")), recipe((MXFP8(), "a"), default=NVFP4()),
        recipe((None, "c"), (MXFP8(), "a")), Recipe("x", "", (Rule(MXFP8(), ("a",), "r", regex=True),)),
    ]  # fmt: skip
    assert len({digest, *(other.digest for other in changed)}) == 6


def test_toml_rule_has_every_field(tmp_path):
    text = '\ufeffdefault = "bf16"\ndefault_reason = "rest"\n[[rule]]\nint8_convrot_64 = ["a|b"]\nreason = "r"\n'
    found = recipes.find(written(tmp_path / "mine.toml", text + "regex = true\noptional = true\n"))
    rule = Rule(formats.parse("int8_convrot_64"), ("a|b",), "r", regex=True, optional=True)
    assert found == Recipe("mine", "", (rule,), BF16(), "rest")


@pytest.mark.parametrize(("text", "words"), [
    ("rule = 3 4", "at line 1"),
    ('title = "x"', "unknown key 'title'; known are name, description, default, default_reason, rule, architecture"),
    ("name = 3\ndefault = 'mxfp8'", "name is 3; write a text in quotes"),
    ('default = "int9"', "unknown format 'int9'; known are .*nvfp4.*; other words are keep"),
    ('default = "keep"', "no rules and default keep change nothing; add"),
    ('[rule]\nmxfp8 = ["a"]\nreason = "r"', r"write \[\[rule\]\] above each"),
    ('[[rule]]\nreason = "r"', "rule 1: no format; write exactly one"),
    ('[[rule]]\nmxfp8 = ["a"]\nreason = "r"\n[[rule]]\nmxfp8 = ["a"]\nnvfp4 = ["b"]\nreason = "r"',
     "rule 2: mxfp8 and nvfp4; write exactly one"),
    ('[[rule]]\nint9 = ["a"]\nreason = "r"',
     "rule 1: unknown format 'int9'; known are .*; other words are keep, reason, regex, optional, rank"),
    ('[[rule]]\nint8_convrot_512 = ["a"]\nreason = "r"', "rule 1: convrot group 512 is not a power of 4"),
    ('[[rule]]\nmxfp8 = "a"\nreason = "r"', "rule 1: mxfp8 is 'a'; write a list of patterns"),
    ('[[rule]]\nmxfp8 = [1]\nreason = "r"', r"rule 1: mxfp8 is \[1\]; write a list"),
    ('[[rule]]\nmxfp8 = []\nreason = "r"', r"rule 1: mxfp8 = \[\] names no layer; list a pattern"),
    ('[[rule]]\nmxfp8 = ["a"]', 'rule 1: no reason; write one, reason = "..."'),
    ('[[rule]]\nmxfp8 = ["a"]\nreason = " "', "rule 1: no reason"),
    ('[[rule]]\nmxfp8 = ["a"]\nreason = 1', "rule 1: reason is 1; write a text in quotes"),
    ('[[rule]]\nmxfp8 = ["a"]\nreason = "r"\noptional = 1', "rule 1: optional is 1; write true or false"),
    ('[[rule]]\nmxfp8 = ["a("]\nreason = "r"\nregex = true', r"rule 1: pattern 'a\(' is no regular expression"),
    ('[[rule]]\nmxfp8 = ["a.{b"]\nreason = "r"', "rule 1: pattern 'a.{b' has a bad brace"),
    ('[[rule]]\nmxfp8 = ["a"]\nreason = "r"\nrank = 1.5', "rule 1: rank is 1.5; write a whole number"),
    ('[[rule]]\nmxfp8 = ["a"]\nreason = "r"\nrank = true', "rule 1: rank is True; write a whole number"),
    ('[[rule]]\nmxfp8 = ["a"]\nreason = "r"\nrank = -1', r"rule 1: rank = -1; write 0 \(no low rank\) to 256"),
    ('[[rule]]\nmxfp8 = ["a"]\nreason = "r"\nrank = 257', "rule 1: rank = 257; write 0"),
    ('[[rule]]\nkeep = ["a"]\nreason = "r"\nrank = 8', "rule 1: rank = 8 for layers that are kept, .* delete it"),
    ('default = "mxfp8"\narchitecture = 3', "architecture is 3; write a text in quotes"),
    ('default = "mxfp8"\narchitecture = "flux9"', "no architecture 'flux9'; known are auto, none, .* or a .toml file"),
    ('default = "mxfp8"\narchitecture = "gone.toml"', "gone.toml: cannot be read"),
])  # fmt: skip
def test_a_mistake_in_a_file_is_named(tmp_path, text, words):
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}.bad\.toml: .*{words}"):
        recipes.read(written(tmp_path / "bad.toml", text))


@pytest.mark.parametrize("name", ["nvfp5", "../recipes/z_image_nvfp4"])
def test_unknown_builtin_lists_the_known(name):
    with pytest.raises(
        ValueError, match=f"no recipe '{name}'; known are int8, int8_convrot, mxfp8, nvfp4, z_image_mxfp8"
    ):
        recipes.find(name)


def test_recipes_are_values():
    """They are compared, hashed as settings of a job, and never changed in place."""
    assert recipes.find("z_image_nvfp4") == recipes.find("z_image_nvfp4")
    assert hash(recipes.find("z_image_nvfp4")) == hash(recipes.find("z_image_nvfp4"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipes.find("z_image_nvfp4").default = NVFP4()


@pytest.mark.parametrize(("name", "nbytes"), [
    ("z_image_nvfp4", 4_939_045_400), ("z_image_mxfp8", 6_762_553_472), ("int8_convrot", 6_299_009_152),
])  # fmt: skip
def test_real_z_image_has_the_reference_files_size(name, nbytes):
    """Bytes of all tensors but the markers, as computed for the published files (docs/format.md 2)."""
    shapes = {key: tuple(shape) for key, shape in ZIMAGE.items()}
    layers = {f"{n}.weight": c.format for n, c in recipes.builtin(name).resolve(shapes).items() if c.format is not None}
    kept = sum(2 * math.prod(shape) for key, shape in shapes.items() if key not in layers)
    assert kept + sum(format.nbytes(*shapes[key]) for key, format in layers.items()) == nbytes


# ---- rank


def test_rank_of_a_rule_is_the_rank_of_its_layers(tmp_path):
    text = """default = "mxfp8"
        [[rule]]
        nvfp4 = ["a"]
        reason = "r"
        rank = 64
        [[rule]]
        nvfp4 = ["b"]
        reason = "r"
        rank = 0
        [[rule]]
        nvfp4 = ["c"]
        reason = "r"
    """
    layer_map = recipes.read(written(tmp_path / "ranks.toml", text)).resolve(shapes("a", "b", "c", "d"))
    assert {layer: choice.rank for layer, choice in layer_map.items()} == {"a": 64, "b": 0, "c": None, "d": None}


def test_rank_decides_like_a_format():
    """Same format, other rank: neither redundant nor in agreement."""
    rules = (Rule(NVFP4(), ("a.0",), "r", rank=64), Rule(NVFP4(), ("a.*",), "r"))
    assert Recipe("test", "", rules).resolve(shapes("a.0", "a.1")).warnings == [
        "rule 1 (nvfp4, rank 64) and rule 2 (nvfp4) both match a.0; rule 1 comes first and wins"
    ]


def test_digest_covers_rank_only_where_one_is_given():
    plain, low, high = (Recipe("x", "", (Rule(MXFP8(), ("a",), "r", rank=rank),)) for rank in (None, 0, 64))
    assert plain.digest == recipe((MXFP8(), "a")).digest
    assert len({plain.digest, low.digest, high.digest}) == 3


# ---- architecture

MINE = """
blocks = ["layers.*.**"]
[[keep]]
layers = ["layers.*.attention.qkv"]
reason = "mine"
"""


@pytest.mark.parametrize(("name", "format"), [("nvfp4", "nvfp4"), ("mxfp8", "mxfp8"), ("int8", "int8_convrot_256")])
def test_generic_recipe_packs_what_the_architecture_does_not_keep(name, format):
    layer_map = recipes.builtin(name).resolve(ZIMAGE)
    assert layer_map.counts() == {format: 170, "keep": 38}
    assert layer_map.architecture == "z_image"
    assert layer_map["cap_embedder.1"].reason.endswith("this weight's shape (z_image)")
    assert (layer_map.warnings, layer_map.problems) == ([], [])
    assert {choice.rule for choice in layer_map.values()} == {None}


@pytest.mark.parametrize("word", ["auto", "z_image"])
def test_own_rules_come_before_the_architecture_and_it_before_the_default(tmp_path, word):
    text = f'default = "nvfp4"\narchitecture = "{word}"\n[[rule]]\nmxfp8 = ["x_embedder"]\nreason = "r"'
    layer_map = recipes.read(written(tmp_path / "mine.toml", text)).resolve(ZIMAGE)
    assert formats_of(layer_map) == formats_of(recipes.builtin("nvfp4").resolve(ZIMAGE)) | {"x_embedder": "mxfp8"}
    assert layer_map.warnings == [
        "rule 1 (mxfp8) decides x_embedder, which the architecture keeps: "
        "embedders: everything passes through them (z_image)"
    ]


def test_architecture_of_ones_own_lies_beside_the_recipe(tmp_path):
    written(tmp_path / "mine.toml", MINE)
    found = recipes.read(written(tmp_path / "r.toml", 'default = "mxfp8"\narchitecture = "mine.toml"'))
    layer_map = found.resolve(ZIMAGE)
    assert layer_map.architecture == "mine" and layer_map.warnings == []
    assert layer_map["layers.3.attention.qkv"].reason == "mine (mine)"
    assert layer_map["noise_refiner.0.attention.out"].reason == "outside the model's blocks (mine)"
    assert layer_map.counts() == {"mxfp8": 30 * 5, "keep": 58}


def test_architecture_of_another_model_is_warned_about():
    other = Recipe("x", "", (), NVFP4(), architecture=architecture.builtin("flux"))
    warnings = other.resolve(ZIMAGE).warnings
    assert any("architecture flux: these are not its keys" in warning for warning in warnings)
    assert any("nothing is quantized" in warning for warning in warnings)


def test_default_with_an_architecture_keeps_what_it_cannot_take():
    odd = {f"layers.{n}.w.weight": (256, size) for n, size in enumerate((256, 256, 258, 254))}
    mine = architecture.Architecture("mine", "", (), blocks=("layers.*.**",))
    found = Recipe("x", "", (), formats.parse("int8_convrot"), architecture=mine).resolve(odd)
    assert formats_of(found) == dict(zip(found, ["int8_convrot_256"] * 2 + ["keep"] * 2, strict=True))
    assert found.problems == []
    assert found.warnings == [
        "kept, because the default int8_convrot does not fit: layers.2.w: in_features 258 is not a multiple of 4, so "
        "ConvRot cannot rotate it; use int8_row; and 1 more layers like it"
    ]
    assert found["layers.3.w"].reason.startswith("cannot take int8_convrot: in_features 254")
    strict = Rule(formats.parse("int8_convrot"), ("layers.2.w",), "r")
    assert Recipe("x", "", (strict,), MXFP8(), architecture=mine).resolve(odd).problems


def test_no_architecture_is_the_default_and_changes_no_digest(tmp_path):
    absent = recipes.read(written(tmp_path / "absent.toml", 'default = "mxfp8"'))
    none, *others = (
        recipes.read(written(tmp_path / "x.toml", f'default = "mxfp8"\narchitecture = "{word}"'))
        for word in ("none", "auto", "flux", "wan")
    )
    assert absent == dataclasses.replace(none, name=absent.name) and absent.architecture is None
    assert absent.digest == none.digest == recipe(default=MXFP8()).digest
    assert len({absent.digest, *(other.digest for other in others)}) == 4


@pytest.mark.parametrize(("name", "digest"), [
    ("int8_convrot", "7dc3b3eb3448c05245c319951b752e80e2807a687344e5e3950703014fe97df8"),
    ("z_image_mxfp8", "62e84f224a30038a63f542cbd807dca94ad5209ec42dc3c08804deb1487494ce"),
    ("z_image_nvfp4", "c4412eb4a13e250dfcfa6b92b2989a2882117f3c9a27f6ab76ff2c646c74445b"),
])  # fmt: skip
def test_digests_written_into_files_stay(name, digest):
    assert recipes.builtin(name).digest == digest


# ---- writing recipes

WORDS = ("nvfp4", "mxfp8", "int8_convrot_64", "int8_row", "int8", "fp8_e4m3", "bf16", None)
SEGMENTS = (
    "layers",
    "0",
    "3",
    "10",
    "w-1",
    "to_q",
    "a b",
    "ünï",
    "q(k)",
    "{x}",
    "*",
    "w,v",
    '"',
    "\\",
    "\n",
    "weight",
    "",
)


def random_choices(seed):
    """A map of layers with plain and odd names, some agreeing with their neighbours."""
    source = random.Random(seed)
    choices = {}
    for _ in range(source.randrange(1, 60)):
        odd = source.random() < 0.3
        name = ".".join(source.choice(SEGMENTS if odd else SEGMENTS[:6]) for _ in range(source.randrange(1, 5)))
        word = source.choice(WORDS)
        reason = source.choice(("score 1.25e-3", 'said "so"', "C:\\x\ty\nz", "±0.1 \x7f\x00", "  padded "))
        rank = None if word is None else source.choice((None, 0, 16, 256))
        choices[name] = LayerChoice(word and formats.parse(word), reason, None, rank)
    return choices


@pytest.mark.parametrize("seed", range(40))
def test_written_recipe_makes_the_same_choices(tmp_path, seed):
    choices = random_choices(seed)
    file = written(tmp_path / "plan.toml", recipes.dumps('a "plan"', "of\ttoday", choices, default_reason="é"))
    found = recipes.read(file)
    assert found == recipes.loads(file.read_text(encoding="utf-8"))
    assert (found.name, found.description, found.default, found.default_reason) == ('a "plan"', "of\ttoday", None, "é")
    layer_map = found.resolve(shapes(*choices) | shapes("elsewhere"))
    made = {layer: (c.format, c.reason, c.rank) for layer, c in layer_map.items()}
    assert made.pop("elsewhere") == (None, "é", None)
    assert made == {layer: (c.format, c.reason, c.rank) for layer, c in choices.items()}
    assert layer_map.problems == []
    assert set(layer_map.warnings) <= {w for w in layer_map.warnings if "nothing is quantized" in w}


def test_written_rules_are_in_the_models_order_and_neighbours_share_one():
    choices = {f"layers.{n}.w": LayerChoice(NVFP4(), reason, None, 32) for n, reason in
               ((10, "c"), (2, "b"), (1, "a"), (0, "a"))}  # fmt: skip
    text = recipes.dumps("plan", "", choices | {"head": LayerChoice(None, "last", 7, 32)}, default="mxfp8")
    assert (
        text
        == """name = "plan"
description = ""
default = "mxfp8"
default_reason = "no rule matches"

[[rule]]
keep = ["head"]
reason = "last"

[[rule]]
nvfp4 = [
    "layers.0.w",
    "layers.1.w",
]
reason = "a"
rank = 32

[[rule]]
nvfp4 = ["layers.2.w"]
reason = "b"
rank = 32

[[rule]]
nvfp4 = ["layers.10.w"]
reason = "c"
rank = 32
"""
    )


def test_text_of_a_recipe_is_named_by_its_reader():
    assert recipes.loads('default = "bf16"', "plan").name == "plan"
    with pytest.raises(ValueError, match=r"^plan: unknown key 'x'"):
        recipes.loads("x = 1", "plan")


@pytest.mark.parametrize(("choices", "words"), [
    ({}, "no choices"),
    ({"a": LayerChoice(NVFP4(), " ", None)}, "a: no reason; every rule of a recipe has one"),
])  # fmt: skip
def test_what_cannot_be_written(choices, words):
    with pytest.raises(ValueError, match=words):
        recipes.dumps("x", "", choices)
