"""A recipe says which layer takes which format, and why: read from TOML or from a convert_to_quant command line."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import formats
from ..formats import Format
from .layer_map import KEEP, LayerChoice, LayerMap, Rule, choose, label
from .patterns import alternatives

__all__ = ["LayerChoice", "LayerMap", "Recipe", "Rule", "builtin", "find", "from_convert_to_quant", "names", "read"]

BUILTIN = Path(__file__).resolve().parent.parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """Rules in order, the first that matches a layer wins; `default` is for the layers that none matches."""

    name: str
    description: str
    rules: tuple[Rule, ...]
    default: Format | None = None
    default_reason: str = "no rule matches"
    notes: tuple[str, ...] = ()  # what an import changed or left out

    @property
    def digest(self) -> str:
        """sha256 of what decides the map: formats, patterns and their order; not names, reasons or layout."""
        rules = [[label(rule.format), rule.regex, *rule.patterns] for rule in self.rules]
        return hashlib.sha256(json.dumps([rules, label(self.default)]).encode()).hexdigest()

    def resolve(self, shapes: Mapping[str, tuple[int, ...]]) -> LayerMap:
        """A choice for every two-dimensional `<module path>.weight` in `shapes`; the other tensors are no layers."""
        return choose(self.rules, self.default, self.default_reason, shapes)


def names() -> list[str]:
    """The recipes that come with Tessera."""
    return sorted(path.stem for path in BUILTIN.glob("*.toml"))


def builtin(name: str) -> Recipe:
    """The recipe of that name that comes with Tessera. Raises ValueError listing them."""
    if name not in names():
        raise ValueError(f"no recipe {name!r}; known are {', '.join(names())}, or give the path of a .toml file")
    return read(BUILTIN / f"{name}.toml")


def find(name_or_path: str | Path) -> Recipe:
    """The recipe in that .toml file, or the built-in one of that name."""
    return read(name_or_path) if Path(name_or_path).suffix == ".toml" else builtin(str(name_or_path))


def read(path: str | Path) -> Recipe:
    """The recipe in a TOML file. Raises ValueError naming file, rule and value of the first mistake."""
    try:
        return _recipe(tomllib.loads(Path(path).read_text(encoding="utf-8-sig")), Path(path).stem)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}; built in are {', '.join(names())}") from error
    except ValueError as error:  # bad TOML and bad UTF-8 are ValueErrors too
        raise ValueError(f"{path}: {error}") from error


def _recipe(table: dict, stem: str) -> Recipe:
    known = ("name", "description", "default", "default_reason", "rule")
    for key in table:
        if key not in known:
            raise ValueError(f"unknown key {key!r}; known are {', '.join(known)}")
    tables = table.get("rule", [])
    if not isinstance(tables, list) or not all(isinstance(rule, dict) for rule in tables):
        raise ValueError("rule is not a list of tables; write [[rule]] above each")
    rules = []
    for number, rule in enumerate(tables, 1):
        try:
            rules.append(_rule(rule))
        except ValueError as error:
            raise ValueError(f"rule {number}: {error}") from error
    default = _format(_value(table, "default", KEEP))
    if not rules and default is None:
        raise ValueError("no rules and default keep change nothing; add a [[rule]] or set default to a format")
    return Recipe(
        name=_value(table, "name", stem),
        description=_value(table, "description", ""),
        rules=tuple(rules),
        default=default,
        default_reason=_value(table, "default_reason", Recipe.default_reason),
    )


def _rule(table: dict) -> Rule:
    options = ("reason", "regex", "optional")
    found = {key: _format(key, *options) for key in table if key not in options}
    if len(found) != 1:
        raise ValueError(f'{" and ".join(found) or "no format"}; write exactly one, as in mxfp8 = ["layers.*.w1"]')
    [(word, format)] = found.items()
    patterns = table[word]
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f'{word} is {patterns!r}; write a list of patterns, as in {word} = ["layers.*.w1"]')
    reason = _value(table, "reason", "")
    if not reason.strip():
        raise ValueError('no reason; write one, reason = "...", for those who will read the recipe')
    return Rule(format, tuple(patterns), reason, _value(table, "regex", False), _value(table, "optional", False))


def _value(table: dict, key: str, default: str | bool):
    """The value at that key, of the default's type."""
    value = table.get(key, default)
    if type(value) is not type(default):
        raise ValueError(f"{key} is {value!r}; write {'true or false' if default is False else 'a text in quotes'}")
    return value


def _format(word: str, *others: str) -> Format | None:
    if word == KEEP:
        return None
    try:
        return formats.parse(word)
    except ValueError as error:
        raise ValueError(f"{error}; other words are {', '.join((KEEP, *others))}") from error


_INERT = {
    "switch": "comfy-quant save-quant-metadata simple custom-simple low-memory extract-lora full-matrix calib-cpu "
    "use-speed verbose-pinned no-normalize-scales",
    "value": "input output device verbose manual-seed calib-samples optimizer num-iter top-p min-k max-k block-size "
    "group-size custom-block-size scale-optimization scale-refinement scale-refinement-rounds lora-rank lora-target "
    "lora-depth lora-ar-threshold lora-output early-stop-loss early-stop-lr early-stop-stall lr lr-schedule lr-gamma "
    "lr-patience lr-factor lr-min lr-cooldown lr-threshold lr-adaptive-mode lr-threshold-mode lr-shape-influence",
}
"""convert_to_quant's flags that choose no format."""

_ZIMAGE = (
    "cap_embedder.0", "cap_embedder.1", "cap_pad_token", "x_pad_token", "x_embedder", "t_embedder", "time_text_embed",
    "clip_text_pooled_proj", "final_layer", "adaLN_modulation", "attention_norm1", "attention_norm2", "ffn_norm1",
    "ffn_norm2", "q_norm", "k_norm",
)  # fmt: skip
_EMBEDDINGS = r"(^|\.)(embed_tokens|lm_head|shared)\.weight$"


def from_convert_to_quant(command: str | Sequence[str]) -> Recipe:
    """The recipe in a command line of convert_to_quant 1.3: its formats, not its rounding or LoRA.

    Same precedence: custom, exclude, preset, primary. `notes` says what was changed or left out. Raises ValueError for
    a flag that chooses formats in a way that cannot be imported.
    """
    try:
        if isinstance(command, str):
            command = shlex.split(re.sub(r"[\\^`]\r?\n", " ", command))
        return _imported(*_parse_flags(command))
    except (ValueError, argparse.ArgumentError) as error:
        raise ValueError(f"convert_to_quant: {error}") from error


def _imported(flags: argparse.Namespace, inert: Sequence[str]) -> Recipe:
    words = [word for word in ("nvfp4", "mxfp8", "int8") if getattr(flags, word)] or ["fp8"]
    if len(words) > 1:
        raise ValueError(f"--{' and --'.join(words)} are both given; keep one")
    if bool(flags.custom_layers) != bool(flags.custom_type):
        raise ValueError("--custom-layers and --custom-type need each other; give both")
    default = _flag_format(words[0], flags.scaling_mode, flags.convrot and flags.convrot_group_size)
    notes = ["embeddings and lm_head stay as stored, where convert_to_quant may quantize them"]
    if inert:
        notes.append(f"no effect on formats: {', '.join(inert)}")
    if flags.int8 and flags.convrot and flags.scaling_mode == "tensor":
        notes.append("--convrot without --scaling_mode row rotates nothing")
    description = "imported from a convert_to_quant command line"
    return Recipe("convert_to_quant", description, _flag_rules(flags), default, f"--{words[0]}", tuple(notes))


def _parse_flags(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """All flags, and the given ones among them that choose no format."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for word in ("nvfp4", "mxfp8", "int8", "zimage", "convrot", "custom-convrot"):
        parser.add_argument(f"--{word}", action="store_true")
    for word in ("custom-type", "custom-layers", "exclude-layers", "custom-scaling-mode"):
        parser.add_argument(f"--{word}")
    parser.add_argument("--scaling-mode", default="tensor")
    for word in ("convrot-group-size", "custom-convrot-group-size"):
        parser.add_argument(f"--{word}", type=int, default=256)
    short = {"input": ["-i"], "output": ["-o"], "low-memory": ["-lm"]}
    inert = []
    for word in _INERT["switch"].split():
        inert.append(parser.add_argument(f"--{word}", *short.get(word, []), action="store_true"))
    for word in _INERT["value"].split():
        inert.append(parser.add_argument(f"--{word}", *short.get(word, [])))
    words = [re.sub(r"^--[\w-]+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
    while words and not re.match(r"--|-[io]$", words[0]):
        del words[0]  # the program's name
    if not words:
        raise ValueError("no flags; give the whole command line, as in --nvfp4 --zimage")
    flags, unknown = parser.parse_known_args(words)
    if unknown:
        raise ValueError(f"{unknown[0]} cannot be imported; leave it out and write what it does as a rule in TOML")
    return flags, [flag.option_strings[0] for flag in inert if getattr(flags, flag.dest)]


def _flag_rules(flags: argparse.Namespace) -> tuple[Rule, ...]:
    rules = []
    if flags.custom_layers:
        group = flags.convrot and flags.convrot_group_size
        group = flags.custom_convrot_group_size if flags.custom_convrot else group
        custom = _flag_format(flags.custom_type, flags.custom_scaling_mode or flags.scaling_mode, group)
        rules.append(Rule(custom, alternatives(flags.custom_layers), "--custom-layers", regex=True))
    if flags.exclude_layers:
        rules.append(Rule(None, alternatives(flags.exclude_layers), "--exclude-layers", regex=True))
    if flags.zimage:
        rules.append(Rule(None, tuple(map(re.escape, _ZIMAGE)), "preset --zimage", regex=True, optional=True))
    reason = "an embedding is looked up by row; no ComfyUI reads block formats there, before 0.30 none reads INT8"
    return (*rules, Rule(None, (_EMBEDDINGS,), reason, regex=True, optional=True))


def _flag_format(word: str, scaling: str, group: int) -> Format:
    """`group` is the ConvRot group, 0 for none."""
    if word not in ("nvfp4", "mxfp8", "int8", "fp8"):
        raise ValueError(f"--custom-type {word} is not nvfp4, mxfp8, int8 or fp8")
    if word == "int8" and scaling == "row":
        word = f"int8_convrot_{group}" if group else "int8_row"
    elif word in ("int8", "fp8") and scaling != "tensor":
        raise ValueError(f"ComfyUI cannot load {word} with --scaling_mode {scaling}; use --int8 --scaling_mode row")
    return formats.parse(word)
