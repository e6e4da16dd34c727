"""What a model's architecture keeps in high precision, whatever the recipe: found from the checkpoint's keys.

A known architecture is a TOML file in `architectures/`. An unknown model gets safe defaults, from names and structure.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..formats import MXFP8, Format
from . import patterns as globs
from .layer_map import Rule

BUILTIN = Path(__file__).resolve().parent.parent / "architectures"
UNKNOWN = "unknown"
TINY = 1 << 16  # weights; packing fewer saves nothing
TABLE_ROWS = 1 << 15  # of a matrix that is looked up by row, or that scores every token
ODD = 16  # in_features of 4-bit blocks

Shapes = Mapping[str, tuple[int, ...]]
"""Logical shape of every tensor by its key without prefix, as `Checkpoint.shapes` gives them."""


@dataclass(frozen=True)
class Architecture:
    """The layers a model keeps. `keep` and `eight_bits` are rules without a format: patterns and their reason.

    `blocks` are globs of the layers that a recipe's default is for; all others are kept. Without any, all layers are.
    """

    name: str
    title: str
    keep: tuple[Rule, ...]
    eight_bits: tuple[Rule, ...] = ()  # layers that 4 bits harm: 8 there, where the default has 4
    blocks: tuple[str, ...] = ()
    present: tuple[str, ...] = ()  # patterns of tensor keys: each must match one
    absent: tuple[str, ...] = ()  # none may match
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()  # shape of every key that the pattern matches; 0: any size
    warning: str = ""

    def fits(self, shapes: Shapes) -> bool:
        """Whether the keys (and, where told, shapes) of a checkpoint are this architecture's."""
        return (
            all(any(_matching(pattern, shapes)) for pattern in self.present)
            and not any(any(_matching(pattern, shapes)) for pattern in self.absent)
            and all(_has(shapes[key], shape) for pattern, shape in self.shapes for key in _matching(pattern, shapes))
        )

    def rules(self, default: Format | None) -> tuple[Rule, ...]:
        """What it decides before a recipe's default, the first match first."""
        low = default is not None and default.codes_per_byte > 1
        eased = [(rule, MXFP8()) for rule in self.eight_bits if low]
        kept = [(rule, None) for rule in (*self.keep, *self._outside())]
        return tuple(
            Rule(format, rule.patterns, f"{rule.reason} ({self.name})", rule.regex, optional=True)
            for rule, format in (*kept, *eased)
        )

    def keeps(self, layer: str) -> str | None:
        """Why a layer must stay as it is; None where it may be packed."""
        return next((rule.reason for rule in (*self.keep, *self._outside()) if rule.matching(layer)), None)

    def eases(self, layer: str) -> str | None:
        """Why a layer should not have less than 8 bits; None where 4 are as good as anywhere."""
        return next((rule.reason for rule in self.eight_bits if rule.matching(layer)), None)

    def digest(self) -> list:
        """What decides, without names and reasons."""
        rules = [[rule.regex, *rule.patterns] for rule in self.keep]
        return [rules, [[rule.regex, *rule.patterns] for rule in self.eight_bits], list(self.blocks)]

    def _outside(self) -> tuple[Rule, ...]:
        """The rule that keeps whatever is not in `blocks`."""
        if not self.blocks:
            return ()
        inside = "|".join(globs.compile(pattern).pattern for pattern in self.blocks)
        return (Rule(None, (rf"\A(?!{inside})",), "outside the model's blocks", regex=True),)


def names() -> list[str]:
    """The architectures that come with Tessera."""
    return sorted(path.stem for path in BUILTIN.glob("*.toml"))


def builtin(name: str) -> Architecture:
    """The architecture of that name that comes with Tessera. Raises ValueError listing them."""
    if name not in names():
        raise ValueError(f"no architecture {name!r}; known are auto, none, {', '.join(names())}, or a .toml file")
    return _builtin(name)


def detect(shapes: Shapes) -> Architecture:
    """The architecture a checkpoint's keys belong to; safe defaults, and a warning, where none is known."""
    known = (_builtin(name) for name in names())
    return next((found for found in known if found.fits(shapes)), None) or safe_defaults(shapes)


def read(path: str | Path) -> Architecture:
    """The architecture in a TOML file. Raises ValueError naming file, rule and value of the first mistake."""
    try:
        return _architecture(tomllib.loads(Path(path).read_text(encoding="utf-8-sig")), Path(path).stem)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # bad TOML and bad UTF-8 are ValueErrors too
        raise ValueError(f"{path}: {error}") from error


def table() -> str:
    """Markdown: every architecture that comes with Tessera, the layers it treats with care, and why."""
    lines = ["| architecture | models | kept, or 8 bits at least | because |", "| --- | --- | --- | --- |"]
    for found in map(_builtin, names()):
        head = f"`{found.name}` | {found.title}"
        for rules, note in ((found.keep, ""), (found.eight_bits, "8 bits: ")):
            for rule in rules:
                layers = ", ".join(f"`{pattern}`" for pattern in rule.patterns)
                lines.append(f"| {head} | {note}{layers} | {rule.reason} |")
                head = " | "
    return "\n".join(lines)


@cache
def _builtin(name: str) -> Architecture:
    return read(BUILTIN / f"{name}.toml")


KEYS = ("name", "title", "detect", "absent", "blocks", "shapes", "keep", "eight_bits")


def _architecture(table: dict, stem: str) -> Architecture:
    for key in table:
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}; known are {', '.join(KEYS)}")
    name = table.get("name", stem)
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name) or name in ("auto", "none", UNKNOWN):
        raise ValueError(f"name is {name!r}; write a word of letters, digits and _, not auto, none or {UNKNOWN}")
    title = table.get("title", name)
    if not isinstance(title, str):
        raise ValueError(f"title is {title!r}; write a text in quotes")
    found = Architecture(
        name=name,
        title=title,
        keep=_rules(table, "keep"),
        eight_bits=_rules(table, "eight_bits"),
        blocks=_texts(table, "blocks"),
        present=_texts(table, "detect"),
        absent=_texts(table, "absent"),
        shapes=_shapes(table),
    )
    for pattern in found.blocks:
        globs.compile(pattern)
    for pattern in (*found.present, *found.absent, *(pattern for pattern, _ in found.shapes)):
        globs.key(pattern)
    if not found.keep and not found.blocks:
        raise ValueError('nothing is kept; add a [[keep]] with layers and reason, or blocks = ["layers.*.**"]')
    return found


def _rules(table: dict, key: str) -> tuple[Rule, ...]:
    entries = table.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{key} is not a list of tables; write [[{key}]] above each")
    rules = []
    for number, entry in enumerate(entries, 1):
        try:
            if unknown := [word for word in entry if word not in ("layers", "reason")]:
                raise ValueError(f"unknown key {unknown[0]!r}; known are layers, reason")
            reason = entry.get("reason", "")
            if not isinstance(reason, str) or not reason.strip():
                raise ValueError('no reason; write one, reason = "...", for those who will read it')
            rules.append(Rule(None, _texts(entry, "layers"), reason))
        except ValueError as error:
            raise ValueError(f"{key} {number}: {error}") from error
    return tuple(rules)


def _texts(table: dict, key: str) -> tuple[str, ...]:
    texts = table.get(key, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{key} is {texts!r}; write a list of patterns, as in {key} = ["layers.*.w1"]')
    return tuple(texts)


def _shapes(table: dict) -> tuple[tuple[str, tuple[int, ...]], ...]:
    shapes = table.get("shapes", {})
    if not isinstance(shapes, dict):
        raise ValueError('shapes is not a table; write [shapes] and below "img_in.weight" = [0, 64]')
    for key, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"shapes: {key} is {shape!r}; write sizes, as in [0, 64]; 0 is any")
    return tuple((key, tuple(shape)) for key, shape in shapes.items())


def _matching(pattern: str, shapes: Shapes) -> Iterator[str]:
    found = globs.key(pattern)
    return (key for key in shapes if found.search(key))


def _has(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(size in (0, found) for size, found in zip(wanted, shape, strict=True))


# ---- unknown models

_TABLE = re.compile(r"(^|[._])(embed_tokens|lm_head|shared|wte|wpe|tok_embeddings|token_type_embeddings|vocab)([._]|$)")
_EMBEDDER = re.compile(r"(^|[._])(\w*embed\w*|emb(_layers)?)\.", re.IGNORECASE)
_MODULATION = re.compile(
    r"(?i:mod(ulation)?s?([._]|\d|$)|ada_?(ln|(layer_?)?norm)|scale_shift|gate_logits)|(^|[._])mod[A-Z]+(\.|$)"
)
_NORM = re.compile(r"(^|[._])(\w*norm\w*|ln_?\w*)(\.|$)", re.IGNORECASE)


def safe_defaults(shapes: Shapes) -> Architecture:
    """For a model nobody described: only layers that repeat from block to block may be packed, and no first of them.

    Kept by name: tables, embedders, norms, modulation. By shape: tiny and odd ones. By structure: what stands outside
    the numbered blocks, thus the first and last projections, and the first of each kind, whose shape a host may read.
    """
    layers = {key.removesuffix(".weight"): s for key, s in shapes.items() if key.endswith(".weight") and len(s) == 2}
    outside, first = _structure(layers)
    tables = {
        name for name, (rows, _) in layers.items() if _TABLE.search(name) or (rows >= TABLE_ROWS and name in outside)
    }
    tests: list[tuple[str, Callable[[str, int, int], bool]]] = [
        ("a table of tokens: looked up by row", lambda name, *_: name in tables),
        ("outside the numbered blocks: an embedder, or a first or last projection", lambda name, *_: name in outside),
        ("modulation: scales, shifts or gates everything", lambda name, *_: bool(_MODULATION.search(name))),
        ("norm", lambda name, *_: bool(_NORM.search(name))),
        ("embedder: everything passes through it", lambda name, *_: bool(_EMBEDDER.search(f"{name}."))),
        (f"tiny: less than {TINY >> 10} K weights", lambda _, rows, columns: rows * columns < TINY),
        (f"odd shape: not a multiple of {ODD}", lambda _, rows, columns: columns % ODD > 0 or rows % ODD > 0),
        ("first of its kind: a host may know the model by its shape", lambda name, *_: name in first),
    ]
    groups: dict[str, list[str]] = {}
    for name, (rows, columns) in layers.items():
        reason = next((reason for reason, test in tests if test(name, rows, columns)), None)
        if reason:
            groups.setdefault(reason, []).append(name)
    keep = tuple(
        Rule(None, tuple(rf"\A{re.escape(name)}\.weight\Z" for name in names), reason, regex=True)
        for reason, names in groups.items()
    )
    count = sum(map(len, groups.values()))
    said = "; ".join(f"{len(names)} {reason.partition(':')[0]} ({_some(names)})" for reason, names in groups.items())
    warning = f"unknown architecture: safe defaults; kept {count} of {len(layers)} layers: {said or 'none'}"
    return Architecture(UNKNOWN, "unknown model", keep, warning=warning)


def _structure(layers: Iterable[str]) -> tuple[set[str], set[str]]:
    """(layers that do not repeat from block to block, the first of each kind of those that do)."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(layers, key=globs.natural):
        *path, last = name.split(".")
        kind = ".".join([re.sub(r"^(|block_?|layer_?)\d+$", r"\1#", part) for part in path] + [last])
        kinds.setdefault(kind, []).append(name)
    stacks = {kind: names for kind, names in kinds.items() if len(names) > 1}
    outside = {name for kind, names in kinds.items() for name in names if kind not in stacks}
    return outside, {names[0] for names in stacks.values()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if names[3:] else "")
