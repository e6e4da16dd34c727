"""Words for messages."""

from __future__ import annotations

from collections.abc import Iterable


def first_of(names: Iterable[str], limit: int = 3) -> str:
    """The first few of a list."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
