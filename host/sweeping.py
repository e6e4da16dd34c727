"""One LoRA on a model at several strengths: clones that share its factors and every weight."""

from __future__ import annotations

from collections.abc import Sequence

from .attaching import Attached, attach_lora


def sweep(patcher, path: str, strengths: Sequence[float]) -> tuple[list, Attached]:
    """([a clone for each strength], what was attached). The file is read once, its factors are joined once.

    Raises ValueError as `attach_lora` does.
    """
    made = {}
    for strength in sorted(strengths, key=lambda s: s == 0):  # at 0 nothing is attached, so that nothing is kept
        made[strength] = attach_lora(patcher, path, strength)
    return [made[strength][0] for strength in strengths], made[max(strengths, key=abs)][1]
