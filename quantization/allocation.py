"""Bit allocation: one format and rank per layer, the least damage under a size, or the least size under a damage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..formats import Format
from .layer_map import label

MOST_STATES = 1 << 16  # partial plans kept at once; real models need some thousand, only adversarial sizes more
ROUNDING = 1e-12  # of a sum of float64 numbers


@dataclass(frozen=True)
class Option:
    """One way to store a layer: what it takes on disk and what it does to the model's output."""

    format: Format | None  # None: kept as the source stores it
    rank: int
    nbytes: int  # everything that differs between a layer's options: entries, marker, correction LoRA
    damage: float  # additive over layers: a squared error

    def __post_init__(self):
        if not (math.isfinite(self.damage) and self.damage >= 0) or self.nbytes < 0:
            raise ValueError(f"{self}: damage {self.damage} and {self.nbytes} bytes must be finite and not negative")

    def __str__(self) -> str:
        return label(self.format) + (f" rank {self.rank}" if self.rank else "")


def allocate(
    options: Mapping[str, Sequence[Option]],
    budget_bytes: int | None = None,
    target_damage: float | None = None,
    fixed_bytes: int = 0,
) -> dict[str, Option]:
    """One option per layer: least total damage with fixed_bytes + total bytes <= budget_bytes, or least bytes with
    total damage <= target_damage.

    The optimum of this multiple-choice knapsack, so that a larger budget never does more damage; equal plans are told
    apart by size, then by name, never by the order of `options`. Raises ValueError that states the smallest possible
    size (or damage) if the limit is below it.
    """
    if (budget_bytes is None) == (target_damage is None):
        raise ValueError("give either a size or a damage to stay below")
    names = sorted(options)
    for name in names:
        if not options[name]:
            raise ValueError(f"{name}: has no option; leave it out and count its bytes as fixed")
    menus = [sorted(options[name], key=lambda o: (o.nbytes, o.damage, str(o))) for name in names]
    sizes = [np.array([float(o.nbytes) for o in menu]) for menu in menus]
    damages = [np.array([o.damage for o in menu]) for menu in menus]
    if budget_bytes is not None:
        least = sum(int(size.min()) for size in sizes)
        if budget_bytes - fixed_bytes < least:
            smallest = fixed_bytes + least
            raise ValueError(f"{_bytes(budget_bytes)} is too small: the smallest possible size is {_bytes(smallest)}, "
                             "with every layer in its cheapest format")  # fmt: skip
        chosen = _solve(sizes, damages, budget_bytes - fixed_bytes)
    else:
        least = math.fsum(damage.min() for damage in damages)
        if target_damage < least:
            raise ValueError(f"damage {target_damage:.4g} cannot be reached: the least possible is {least:.4g}, "
                             "with every layer in its best format")  # fmt: skip
        chosen = _solve(damages, sizes, target_damage * (1 + ROUNDING))
    return {name: menu[i] for name, menu, i in zip(names, menus, chosen, strict=True)}


def total(plan: Mapping[str, Option]) -> tuple[int, float]:
    """(bytes, damage) of a plan."""
    return sum(o.nbytes for o in plan.values()), math.fsum(o.damage for o in plan.values())


def _solve(weights: list[np.ndarray], costs: list[np.ndarray], capacity: float) -> list[int]:
    """Per item the index of an option: least total cost with total weight <= capacity. Exact.

    Lagrangian bound, then only the options whose reduced cost is within the gap to a good plan (Sinha and Zoltners
    1979), then dynamic programming over the few that are left, without what that bound rules out.
    """
    price, plan = _priced(weights, costs, capacity)
    plan = _improved(weights, costs, capacity, plan)
    reduced = [c + price * w for w, c in zip(weights, costs, strict=True)]
    least = [r.min() for r in reduced]
    best = math.fsum(c[i] for c, i in zip(costs, plan, strict=True))
    bound = math.fsum(least) - price * capacity
    gap = max(0.0, best - bound) + ROUNDING * (abs(best) + price * capacity)
    left = [np.flatnonzero(r - low <= gap) for r, low in zip(reduced, least, strict=True)]
    slack = [r - low for r, low in zip(reduced, least, strict=True)]
    return _exact(weights, costs, slack, left, capacity, price, gap, plan)


def _priced(weights, costs, capacity) -> tuple[float, list[int]]:
    """(price per unit of weight at which the hull's walk passes the capacity, the last plan before): the largest
    Lagrangian bound and a plan that fits."""
    steps = []
    for item, (w, c) in enumerate(zip(weights, costs, strict=True)):
        hull = _hull(w, c)
        for a, b in itertools.pairwise(hull):
            steps.append((-(c[a] - c[b]) / (w[b] - w[a]), item, a, b))
    plan = [_hull(w, c)[0] for w, c in zip(weights, costs, strict=True)]
    used = math.fsum(w[i] for w, i in zip(weights, plan, strict=True))
    for slope, item, a, b in sorted(steps):
        used += weights[item][b] - weights[item][a]
        if used > capacity:
            return -slope, plan
        plan[item] = b
    return 0.0, plan


def _hull(w: np.ndarray, c: np.ndarray) -> list[int]:
    """Options on the lower convex hull, from the lightest to the cheapest, gains per weight falling."""
    hull: list[int] = []
    for i in np.lexsort((c, w)):
        if hull and c[i] >= c[hull[-1]]:
            continue
        while len(hull) > 1 and _gain(w, c, hull[-2], i) >= _gain(w, c, hull[-2], hull[-1]):
            hull.pop()
        hull.append(int(i))
    return hull


def _gain(w, c, a: int, b: int) -> float:
    return (c[a] - c[b]) / (w[b] - w[a])


def _improved(weights, costs, capacity, plan: list[int]) -> list[int]:
    """A plan that fits, made better by single changes until none helps: a tight start for the exact search."""
    plan = list(plan)
    used = math.fsum(w[i] for w, i in zip(weights, plan, strict=True))
    while True:
        gains = []
        for item, (w, c) in enumerate(zip(weights, costs, strict=True)):
            fits = np.flatnonzero((used + w - w[plan[item]] <= capacity) & (c < c[plan[item]]))
            gains += [(c[plan[item]] - c[i], -item, i) for i in fits]
        if not gains:
            return plan
        _, item, i = max(gains)
        used += weights[-item][i] - weights[-item][plan[-item]]
        plan[-item] = int(i)


def _exact(weights, costs, slack, left, capacity, price, gap, plan) -> list[int]:
    """The best plan over the options in `left`; `plan` if there is none better.

    A state is a partial plan: weight, cost, and the sum of the slacks of its options over the bound. States that are
    heavier and dearer than another, too heavy for the lightest rest, or beyond the gap are dropped.
    """
    order = sorted(range(len(left)), key=lambda i: (len(left[i]), i))
    rest = math.fsum(w[o].min() for w, o in zip(weights, left, strict=True))
    weight, cost, over, trail = np.zeros(1), np.zeros(1), np.zeros(1), []
    for item in order:
        choices = left[item]
        w, c, s = weights[item][choices], costs[item][choices], slack[item][choices]
        rest -= w.min()
        grown = [(x[:, None] + y).ravel() for x, y in ((weight, w), (cost, c), (over, s))]
        room = np.full(len(grown[0]), capacity - rest) - grown[0]
        # what a state leaves of the capacity costs its price, at least where nothing is left to choose
        keep = np.flatnonzero((room >= -ROUNDING * capacity) & (grown[2] <= gap))
        ranked = keep[np.lexsort((grown[1][keep], grown[0][keep]))]
        falling = grown[1][ranked] < np.concatenate(([np.inf], np.minimum.accumulate(grown[1][ranked])[:-1]))
        ranked = ranked[falling]
        if len(ranked) > MOST_STATES:
            ranked = np.sort(ranked[np.argsort(grown[2][ranked], kind="stable")[:MOST_STATES]])
        weight, cost, over = (x[ranked] for x in grown)
        trail.append((item, choices, len(w), ranked))
    if not len(weight):
        return plan
    state, chosen = int(np.argmin(cost)), list(plan)
    for item, choices, width, ranked in reversed(trail):
        state, choice = divmod(int(ranked[state]), width)
        chosen[item] = int(choices[choice])
    found = math.fsum(c[i] for c, i in zip(costs, chosen, strict=True))
    kept = math.fsum(c[i] for c, i in zip(costs, plan, strict=True))
    return chosen if found <= kept else plan


def _bytes(nbytes: int) -> str:
    return f"{nbytes:,} bytes ({nbytes / 1e9:.3f} GB, {nbytes / 2**30:.3f} GiB)"
