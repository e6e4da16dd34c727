"""A recipe says which layer takes which format, and why: read from TOML or from a convert_to_quant command line."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import stat
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import formats
from ..formats import Format
from . import architecture as architectures
from .architecture import Architecture
from .layer_map import KEEP, LayerChoice, LayerMap, Rule, choose, label
from .patterns import alternatives, natural

__all__ = [
    "LayerChoice", "LayerMap", "Recipe", "Rule", "builtin", "dumps", "find", "from_convert_to_quant", "loads", "names",
    "read",
]  # fmt: skip

BUILTIN = Path(__file__).resolve().parent.parent / "recipes"
MAX_TEXT = 400_000  # bytes; a rule for each layer of a large model takes a quarter
MAX_DOTS = 16  # in a line without quotes; the TOML parser takes quadratic time for them
_QUOTED = re.compile("[\"']")
GENERIC = "nvfp4"  # for any model: what its architecture keeps is kept
AUTO, NONE = "auto", "none"  # an architecture found from the model's keys; no architecture


@dataclass(frozen=True)
class Recipe:
    """Rules in order, the first that matches a layer wins; `default` is for the layers that none matches.

    `architecture` stands between them and keeps what a model should keep: one, "auto" for the one its keys belong to,
    or None.
    """

    name: str
    description: str
    rules: tuple[Rule, ...]
    default: Format | None = None
    default_reason: str = "no rule matches"
    notes: tuple[str, ...] = ()  # what an import changed or left out
    architecture: Architecture | str | None = None

    @property
    def digest(self) -> str:
        """sha256 of what decides the map: formats, ranks, patterns and their order; not names, reasons or layout."""
        rules = [
            [label(rule.format), rule.regex, *rule.patterns, *([] if rule.rank is None else [rule.rank])]
            for rule in self.rules
        ]
        decides = [rules, label(self.default)]
        if self.architecture == AUTO:
            decides.append([architectures.builtin(name).digest() for name in architectures.names()])
        elif self.architecture is not None:
            decides.append(self.architecture.digest())
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def resolve(self, shapes: Mapping[str, tuple[int, ...]]) -> LayerMap:
        """A choice for every two-dimensional `<module path>.weight` in `shapes`; the other tensors are no layers."""
        if self.architecture is None:
            return choose(self.rules, self.default, self.default_reason, shapes)
        found = architectures.detect(shapes) if self.architecture == AUTO else self.architecture
        layer_map = choose(self.rules, self.default, self.default_reason, shapes, found.rules(self.default))
        layer_map.architecture = found.name
        if found.warning:
            layer_map.warnings.append(found.warning)
        if not found.fits(shapes):
            layer_map.warnings.append(f"architecture {found.name}: these are not its keys; use auto, or the right one")
        return layer_map


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
        return _recipe(_toml(_text(Path(path))), Path(path).stem, Path(path).parent)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}; built in are {', '.join(names())}") from error
    except ValueError as error:  # bad TOML and bad UTF-8 are ValueErrors too
        raise ValueError(f"{path}: {error}") from error


def loads(text: str, name: str = "recipe") -> Recipe:
    """The recipe in a file's text; `name` where it has none of its own. Raises ValueError naming rule and value."""
    try:
        return _recipe(_toml(text), name, Path())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _text(path: Path) -> str:
    """A file's text. Raises ValueError for what is no file, or too large to be a recipe."""
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):  # a pipe would wait for ever
        raise ValueError("is not a file; give the path of a .toml file")
    if info.st_size > MAX_TEXT:
        raise ValueError(f"has {info.st_size} bytes, a recipe has up to {MAX_TEXT}")
    return path.read_text(encoding="utf-8-sig")


def _toml(text: str) -> dict:
    """Raises ValueError if it is no TOML, or TOML that takes the parser for ever."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"has {len(text)} characters, a recipe has up to {MAX_TEXT}")
    if any(line.count(".") > MAX_DOTS and not _QUOTED.search(line) for line in text.splitlines()):
        raise ValueError("has a key of too many parts; a recipe's keys have one")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("is nested too deep to be a recipe") from None


def _recipe(table: dict, name: str, folder: Path) -> Recipe:
    known = ("name", "description", "default", "default_reason", "rule", "architecture")
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
        name=_value(table, "name", name),
        description=_value(table, "description", ""),
        rules=tuple(rules),
        default=default,
        default_reason=_value(table, "default_reason", Recipe.default_reason),
        architecture=_architecture(_value(table, "architecture", NONE), folder),
    )


def _architecture(word: str, folder: Path) -> Architecture | str | None:
    """A name, "auto" or "none", or a .toml file below the recipe's folder or anywhere."""
    if word in (AUTO, NONE):
        return AUTO if word == AUTO else None
    return architectures.read(folder / word) if word.endswith(".toml") else architectures.builtin(word)


def _rule(table: dict) -> Rule:
    options = ("reason", "regex", "optional", "rank")
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
    rank = table.get("rank")
    if rank is not None and type(rank) is not int:
        raise ValueError(f"rank is {rank!r}; write a whole number")
    return Rule(format, tuple(patterns), reason, _value(table, "regex", False), _value(table, "optional", False), rank)


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


def dumps(
    name: str,
    description: str,
    choices: Mapping[str, LayerChoice],
    default: str = KEEP,
    default_reason: str = Recipe.default_reason,
) -> str:
    """A recipe file's text with a rule for every layer, in the model's order; neighbours that agree in all share one.

    A choice needs `format`, `reason` and `rank`. On the same layers the recipe makes the same choices, but that a kept
    layer has no rank, and none of its rules is idle. Raises ValueError where there is nothing to write.
    """
    if not choices:
        raise ValueError("no choices; a recipe needs at least one layer")
    groups: list[tuple[tuple, list[str]]] = []
    for layer in sorted(choices, key=natural):
        choice = choices[layer]
        if not choice.reason.strip():
            raise ValueError(f"{layer}: no reason; every rule of a recipe has one")
        key = (label(choice.format), choice.reason, None if choice.format is None else choice.rank)
        if not groups or groups[-1][0] != key:
            groups.append((key, []))
        groups[-1][1].append(layer)
    head = {"name": name, "description": description, "default": default, "default_reason": default_reason}
    lines = [f"{key} = {_quoted(text)}" for key, text in head.items()]
    for (word, reason, rank), layers in groups:
        plain = all(re.fullmatch(r"[\w-]+(\.[\w-]+)*", layer, re.ASCII) and _is_glob(layer) for layer in layers)
        patterns = layers if plain else [rf"\A{re.escape(layer)}\.weight\Z" for layer in layers]
        lines += ["", "[[rule]]", f"{word} = {_list(patterns)}", f"reason = {_quoted(reason)}"]
        lines += [] if plain else ["regex = true"]
        lines += [] if rank is None else [f"rank = {rank}"]
    return "\n".join(lines) + "\n"


def _is_glob(layer: str) -> bool:
    """Whether a module path, as a pattern, means itself."""
    return not layer.endswith(".weight") and not layer.startswith("model.diffusion_model.")


def _list(texts: Sequence[str]) -> str:
    if len(texts) == 1:
        return f"[{_quoted(texts[0])}]"
    return "[\n" + "".join(f"    {_quoted(text)},\n" for text in texts) + "]"


_ESCAPES = {n: f"\\u{n:04x}" for n in (*range(32), 127)} | {ord("\\"): "\\\\", ord('"'): '\\"', 10: "\\n", 9: "\\t"}


def _quoted(text: str) -> str:
    """A TOML basic string."""
    return f'"{text.translate(_ESCAPES)}"'


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
