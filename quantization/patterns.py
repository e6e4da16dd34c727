"""Which layers a recipe's pattern names: a glob over module paths, or a regular expression over tensor keys."""

from __future__ import annotations

import re
from functools import cache

MAX_RANGE, MAX_STARS = 100_000, 12


@cache
def compile(pattern: str, regex: bool = False) -> re.Pattern:
    """The expression to search in `<module path>.weight`."""
    if regex:
        try:
            return re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern '{pattern}' is no regular expression: {error}") from error
        except (RecursionError, OverflowError):
            raise ValueError(f"pattern '{pattern[:40]}...' is too deep or too large a regular expression") from None
    if mistake := _names_tensor(pattern) or _mistake(pattern):
        raise ValueError(f"pattern '{pattern}' {mistake}")
    return re.compile(rf"\A{_expression(pattern)}\.weight\Z")


@cache
def key(pattern: str) -> re.Pattern:
    """A glob over a whole tensor key, `.weight` and all, as the expression to search in it."""
    if mistake := _mistake(pattern):
        raise ValueError(f"pattern '{pattern}' {mistake}")
    return re.compile(rf"\A{_expression(pattern)}\Z")


def _expression(glob: str) -> str:
    words = {"**": ".*", "**.": r"(?:[^.]+\.)*", ".**": r"(?:\.[^.]+)*"}
    tokens = re.findall(r"\*\*\.|\.\*\*|\*\*|\{[^}]*\}|[^{}]", glob)
    return "".join(words.get(token) or _alternatives(token) for token in tokens)


def _names_tensor(pattern: str) -> str | None:
    if pattern.endswith(".weight") or pattern.startswith("model.diffusion_model."):
        return "names a tensor; write the module path, without model.diffusion_model. and .weight"
    return None


def _mistake(pattern: str) -> str | None:
    """What keeps a glob from ever meaning something."""
    if strange := re.search(r"[^\w.*{},/-]", pattern):
        return f"has {strange[0]!r}, which no module path has; for a regular expression add regex = true"
    if not re.fullmatch(r"([^{},]|\{[^{},]+(,[^{},]+)*\})*", pattern):
        return "has a bad brace; write {a,b} or {0-9,11}, neither nested nor with an empty alternative"
    if re.search(r"[^.]\*\*|\*\*[^.]|\*\*\.\*\*", pattern):
        return "has a ** that is not one whole segment; write * within a segment"
    if re.search(r"^\.|\.\.|\.$|^$", pattern):
        return "has an empty segment; write names between single dots"
    for low, high in re.findall(r"(?<=[{,])(\d+)-(\d+)(?=[,}])", pattern):
        if len(high) > 6 or len(low) > 6:
            return "counts beyond a million, which no model's layers do"
        if int(low) > int(high):
            return f"counts down; write {high}-{low}"
    if sum(int(high) - int(low) for low, high in re.findall(r"(?<=[{,])(\d+)-(\d+)(?=[,}])", pattern)) > MAX_RANGE:
        return f"counts more than {MAX_RANGE} layers; write ** or several patterns"
    if pattern.count("*") > MAX_STARS:  # matching takes a time to the power of their number
        return f"has more than {MAX_STARS} stars; write several patterns"
    return None


def _alternatives(token: str) -> str:
    """`{a,b,0-9}` or one character as an expression."""
    texts = []
    for text in token.strip("{}").split(","):
        low, dash, high = text.partition("-")
        counts = dash and low.isdecimal() and high.isdecimal()
        texts += [str(n) for n in range(int(low), int(high) + 1)] if counts else [text]
    return f"(?:{'|'.join(re.escape(text) for text in texts)})".replace(r"\*", "[^.]*")


def alternatives(expression: str) -> tuple[str, ...]:
    """The parts of a regular expression between its outermost `|`; searching for any of them is searching for it."""
    if re.search(r"\(\?|\\\d|\[", expression):  # flags, references and sets need the whole
        return (expression,)
    parts, depth = [""], 0
    for token in re.findall(r"\\.|.", expression, re.DOTALL):
        depth += (token == "(") - (token == ")")
        if token == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return tuple(parts)


def natural(name: str) -> list:
    """Sort key that puts layers.2 before layers.10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def numbers(values: list[int]) -> str:
    """Ascending numbers as a pattern: [3] is `3`, [0, 1, 2, 5] is `{0-2,5}`."""
    spans: list[list[int]] = []
    for value in values:
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    texts = [f"{low}-{high}" if low < high else f"{low}" for low, high in spans]
    return f"{{{','.join(texts)}}}" if len(values) > 1 else texts[0]
