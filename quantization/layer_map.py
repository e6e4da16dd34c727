"""What a list of rules decides for one model: a format and a reason for every layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..formats import Format
from . import patterns as globs

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

    def __post_init__(self):
        if not self.patterns:
            raise ValueError(f"{label(self.format)} = [] names no layer; list a pattern or delete the rule")
        for pattern in self.patterns:
            globs.compile(pattern, self.regex)

    def matching(self, layer: str) -> list[str]:
        return [p for p in self.patterns if globs.compile(p, self.regex).search(f"{layer}.weight")]


@dataclass(frozen=True)
class LayerChoice:
    format: Format | None  # settled for the layer's shape; None: kept as the source stores it
    reason: str
    rule: int | None  # counted from 1; None: the default


@dataclass(eq=False)
class LayerMap(Mapping[str, LayerChoice]):
    """The choices by module path. `problems` are layers that cannot take their format."""

    choices: dict[str, LayerChoice]
    warnings: list[str]
    problems: list[str]

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
    rules: Sequence[Rule], default: Format | None, reason: str, shapes: Mapping[str, tuple[int, ...]]
) -> LayerMap:
    """The first matching rule's format for every two-dimensional `<module path>.weight`; the default for the others."""
    layers = {k.removesuffix(".weight"): s for k, s in shapes.items() if k.endswith(".weight") and len(s) == 2}
    hits = {layer: [(n, p) for n, rule in enumerate(rules, 1) for p in rule.matching(layer)] for layer in layers}
    choices, problems = {}, []
    for layer, shape in layers.items():
        number = hits[layer][0][0] if hits[layer] else None
        format, why = (rules[number - 1].format, rules[number - 1].reason) if number else (default, reason)
        try:
            format = format and format.for_shape(*shape)
        except ValueError as error:
            problems.append(f"{layer}: {error} ({f'rule {number}' if number else 'default'}: {format.label})")
        choices[layer] = LayerChoice(format, why, number)
    warnings = _idle_patterns(rules, hits) + _conflicts(rules, hits)
    if all(choice.format is None for choice in choices.values()):
        warnings.append("nothing is quantized: no rule gives a layer of this model a format; use a recipe made for it")
    return LayerMap(choices, warnings, problems)


def _idle_patterns(rules: Sequence[Rule], hits: Hits) -> list[str]:
    """Patterns that match no layer, come too late for each of theirs, or say what a later rule says."""
    warnings = []
    for number, pattern in ((n, p) for n, rule in enumerate(rules, 1) for p in rule.patterns):
        matched = [[n for n, _ in found] for found in hits.values() if (number, pattern) in found]
        later = [next((n for n in found if n > number), 0) for found in matched if found[0] == number]
        subject = f"rule {number}: pattern '{pattern}'"
        if not matched:
            if not rules[number - 1].optional:
                warnings.append(f"{subject} matches no layer")
        elif not later:
            warnings.append(f"{subject} decides nothing; {_listed({found[0] for found in matched})} already did")
        elif all(n and rules[n - 1].format == rules[number - 1].format for n in later):
            warnings.append(f"{subject} is redundant; {_listed(set(later))} would decide the same")
    return warnings


def _conflicts(rules: Sequence[Rule], hits: Hits) -> list[str]:
    """Pairs of rules that give one layer different formats, and who wins."""
    named = {n: f"rule {n} ({label(rule.format)})" for n, rule in enumerate(rules, 1)}
    pairs: dict[tuple[int, int], list[str]] = {}
    for layer, found in hits.items():
        for n in sorted({n for n, _ in found if rules[n - 1].format != rules[found[0][0] - 1].format}):
            pairs.setdefault((found[0][0], n), []).append(layer)
    return [
        f"{named[winner]} and {named[loser]} both match {layers[0]}"
        f"{f' and {len(layers) - 1} more' if layers[1:] else ''}; rule {winner} comes first and wins"
        for (winner, loser), layers in sorted(pairs.items())
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
