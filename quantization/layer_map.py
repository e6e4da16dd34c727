"""What a list of rules decides for one model: a format, a reason and maybe a rank for every layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..formats import Format
from . import patterns as globs

MAX_RANK = 256
KEEP = "keep"  # the word for the format None: the layer stays as the source stores it

Hits = Mapping[str, list[tuple[int, str]]]
"""Per layer the (rule, pattern) of every match in rule order; rules count from 1."""


def label(format: Format | None) -> str:
    return KEEP if format is None else format.label


@dataclass(frozen=True)
class Rule:
    """Layers that any pattern matches take `format`; None keeps them as the source stores them.

    A pattern is a glob over the whole module path: `*` within a segment, `**` any number of segments, `{a,b,0-9}`
    alternatives. With `regex` it is searched in `<module path>.weight`. Raises ValueError if it is neither.
    """

    format: Format | None
    patterns: tuple[str, ...]
    reason: str
    regex: bool = False
    optional: bool = False  # no warning for a pattern that matches nothing
    rank: int | None = None  # of the layers' low-rank branch; None: the job's

    def __post_init__(self):
        if not self.patterns:
            raise ValueError(f"{label(self.format)} = [] names no layer; list a pattern or delete the rule")
        for pattern in self.patterns:
            globs.compile(pattern, self.regex)
        if self.rank is not None and self.format is None:
            raise ValueError(f"rank = {self.rank} for layers that are kept, which have no error to correct; delete it")
        if self.rank is not None and not 0 <= self.rank <= MAX_RANK:
            raise ValueError(f"rank = {self.rank}; write 0 (no low rank) to {MAX_RANK}")

    @property
    def decision(self) -> tuple[Format | None, int | None]:
        return self.format, self.rank

    def __str__(self) -> str:
        return label(self.format) + ("" if self.rank is None else f", rank {self.rank}")

    def matching(self, layer: str) -> list[str]:
        return [p for p in self.patterns if globs.compile(p, self.regex).search(f"{layer}.weight")]


@dataclass(frozen=True)
class LayerChoice:
    format: Format | None  # settled for the layer's shape; None: kept as the source stores it
    reason: str
    rule: int | None  # counted from 1; None: the architecture or the default
    rank: int | None = None  # of its low-rank branch; None: the job's


@dataclass(eq=False)
class LayerMap(Mapping[str, LayerChoice]):
    """The choices by module path. `problems` are layers that cannot take their format."""

    choices: dict[str, LayerChoice]
    warnings: list[str]
    problems: list[str]
    architecture: str | None = None  # the name of the one whose layers were kept

    def __getitem__(self, layer: str) -> LayerChoice:
        return self.choices[layer]

    def __iter__(self):
        return iter(self.choices)

    def __len__(self):
        return len(self.choices)

    def counts(self) -> dict[str, int]:
        """Layers per format label, most frequent first."""
        labels = [label(choice.format) for choice in self.values()]
        return {name: labels.count(name) for name in sorted(set(labels), key=lambda name: (-labels.count(name), name))}

    def table(self) -> str:
        """Markdown: a table per stack of numbered blocks, equal blocks joined into a pattern; then the other layers."""
        stacks, others = {}, {}
        for layer, choice in self.items():
            if found := re.fullmatch(r"(.+?)\.(\d+)\.(.+)", layer):
                stack, block, part = found.groups()
                stacks.setdefault(stack, {}).setdefault(int(block), {})[part] = label(choice.format)
            else:
                others[layer] = label(choice.format)
        tables = [_stack_table(stack, blocks) for stack, blocks in sorted(stacks.items())]
        if others:
            tables.append(_markdown(["layer", "format"], sorted(others.items())))
        return "\n\n".join(tables)


def choose(
    rules: Sequence[Rule],
    default: Format | None,
    reason: str,
    shapes: Mapping[str, tuple[int, ...]],
    exceptions: Sequence[Rule] | None = None,
) -> LayerMap:
    """The first matching rule's format for every two-dimensional `<module path>.weight`; the default for the others.

    `exceptions` (an architecture's) come before the default. With them the default is for whatever can take it: a
    layer that cannot is kept, with a warning; without them it is a problem, as always where a rule says so.
    """
    layers = {k.removesuffix(".weight"): s for k, s in shapes.items() if k.endswith(".weight") and len(s) == 2}
    hits = _hits(rules, layers)
    fallback = Rule(default, ("**",), reason)
    choices, problems, unfit = {}, [], []
    for layer, shape in layers.items():
        number = hits[layer][0][0] if hits[layer] else None
        rule = rules[number - 1] if number else _exception(exceptions, layer) or fallback
        format, why = rule.format, rule.reason
        try:
            format = format and format.for_shape(*shape)
        except ValueError as error:
            if number or exceptions is None:
                problems.append(f"{layer}: {error} ({f'rule {number}' if number else 'default'}: {format.label})")
            else:
                unfit.append(f"{layer}: {error}")
                format, why = None, f"cannot take {format.label}: {error}"
        choices[layer] = LayerChoice(format, why, number, rule.rank)
    warnings = _idle_patterns(rules, hits) + _conflicts(rules, hits) + _overridden(rules, hits, exceptions or ())
    if unfit:
        more = f"; and {len(unfit) - 1} more layers like it" if unfit[1:] else ""
        warnings.append(f"kept, because the default {label(default)} does not fit: {unfit[0]}{more}")
    if all(choice.format is None for choice in choices.values()):
        warnings.append("nothing is quantized: no rule gives a layer of this model a format; use a recipe made for it")
    return LayerMap(choices, warnings, problems)


def _hits(rules: Sequence[Rule], layers: Iterable[str]) -> Hits:
    """A recipe with a rule per layer has as many rules as layers: the plain names among its patterns are looked up."""
    named: dict[str, list[tuple[int, int, str]]] = {}
    others = []
    for n, rule in enumerate(rules, 1):
        for place, pattern in enumerate(rule.patterns):
            if rule.regex or set(pattern) & set("*{"):
                others.append((n, place, pattern, globs.compile(pattern, rule.regex)))
            else:
                named.setdefault(pattern, []).append((n, place, pattern))
    hits = {}
    for layer in layers:
        matching = [(n, place, pattern) for n, place, pattern, found in others if found.search(f"{layer}.weight")]
        hits[layer] = [(n, pattern) for n, _, pattern in sorted(named.get(layer, []) + matching)]
    return hits


def _exception(exceptions: Sequence[Rule] | None, layer: str) -> Rule | None:
    return next((rule for rule in exceptions or () if rule.matching(layer)), None)


def _idle_patterns(rules: Sequence[Rule], hits: Hits) -> list[str]:
    """Patterns that match no layer, come too late for each of theirs, or say what a later rule says."""
    matches: dict[tuple[int, str], list[list[int]]] = {}
    for found in hits.values():
        for hit in dict.fromkeys(found):
            matches.setdefault(hit, []).append([n for n, _ in found])
    warnings = []
    for number, pattern in ((n, p) for n, rule in enumerate(rules, 1) for p in rule.patterns):
        matched = matches.get((number, pattern), [])
        later = [next((n for n in found if n > number), 0) for found in matched if found[0] == number]
        subject = f"rule {number}: pattern '{pattern}'"
        if not matched:
            if not rules[number - 1].optional:
                warnings.append(f"{subject} matches no layer")
        elif not later:
            warnings.append(f"{subject} decides nothing; {_listed({found[0] for found in matched})} already did")
        elif all(n and rules[n - 1].decision == rules[number - 1].decision for n in later):
            warnings.append(f"{subject} is redundant; {_listed(set(later))} would decide the same")
    return warnings


def _conflicts(rules: Sequence[Rule], hits: Hits) -> list[str]:
    """Pairs of rules that give one layer different formats, and who wins."""
    named = {n: f"rule {n} ({rule})" for n, rule in enumerate(rules, 1)}
    pairs: dict[tuple[int, int], list[str]] = {}
    for layer, found in hits.items():
        for n in sorted({n for n, _ in found if rules[n - 1].decision != rules[found[0][0] - 1].decision}):
            pairs.setdefault((found[0][0], n), []).append(layer)
    return [
        f"{named[winner]} and {named[loser]} both match {layers[0]}"
        f"{f' and {len(layers) - 1} more' if layers[1:] else ''}; rule {winner} comes first and wins"
        for (winner, loser), layers in sorted(pairs.items())
    ]


def _overridden(rules: Sequence[Rule], hits: Hits, exceptions: Sequence[Rule]) -> list[str]:
    """Rules that pack what the architecture keeps; they win, and their author should know."""
    layers: dict[tuple[int, str], list[str]] = {}
    for layer, found in hits.items():
        exception = _exception(exceptions, layer) if found and rules[found[0][0] - 1].format is not None else None
        if exception is not None and exception.format is None:
            layers.setdefault((found[0][0], exception.reason), []).append(layer)
    return [
        f"rule {number} ({rules[number - 1]}) decides {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}, "
        f"which the architecture keeps: {reason}"
        for (number, reason), names in sorted(layers.items())
    ]


def _listed(numbers: set[int]) -> str:
    return " and ".join(f"rule {number}" for number in sorted(numbers))


def _stack_table(stack: str, blocks: dict[int, dict[str, str]]) -> str:
    """A line for each set of equal blocks, headed by the pattern that names them."""
    parts = list(dict.fromkeys(part for block in blocks.values() for part in block))
    rows: dict[tuple[str, ...], list[int]] = {}
    for number, block in sorted(blocks.items()):
        rows.setdefault(tuple(block.get(part, "") for part in parts), []).append(number)
    return _markdown(["block", *parts], [[f"{stack}.{globs.numbers(ns)}", *cells] for cells, ns in rows.items()])


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
