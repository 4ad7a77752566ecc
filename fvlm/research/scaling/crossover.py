"""Where one kind of model takes the lead from another as budgets grow, or that it does not."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np

from fvlm.research.scaling.fits import CONFIDENCE, SURE, Estimate
from fvlm.research.scaling.points import SAME_BUDGET, Points


def crossover(kinds: list[Points]) -> dict[str, Any] | None:
    """Where the foveated kind and the baseline change places, by the lowest loss of each at a budget.

    None without runs of both.
    """
    sides = []
    for baseline in (False, True):
        own = [
            points
            for points in kinds
            if points.runs[0].is_baseline == baseline and points.runs[0].mode != "coarse_only" and len(points.budgets)
        ]
        if not own:
            return None
        sides.append(max(own, key=lambda points: len(points.runs)))
    shared = [
        (i, j)
        for i, budget in enumerate(sides[0].budgets)
        for j, other in enumerate(sides[1].budgets)
        if max(budget, other) / min(budget, other) < SAME_BUDGET
    ]
    names = [points.kind for points in sides]
    if len(shared) < 2:
        text = f"{len(shared)} budget(s) that both were trained at: a crossover needs 2"
        return {"kinds": names, "budgets": [], "losses": {}, "compute": None, "text": text}
    compute = np.array([np.sqrt(sides[0].budgets[i] * sides[1].budgets[j]) for i, j in shared])
    lowest = [
        [_lowest(points, pair[side], _common(sides, pair)) for pair in shared] for side, points in enumerate(sides)
    ]
    values = [np.array([value for value, _ in each]) for each in lowest]
    known = all(points.draws is not None for points in sides)
    drawn = [np.stack([draws for _, draws in each], axis=1) for each in lowest] if known else None
    difference = values[0] - values[1]
    spread = drawn[0] - drawn[1] if drawn else None
    estimate, text = _crossing(compute, difference, spread, names)
    return {
        "kinds": names,
        "budgets": compute.tolist(),
        "losses": {name: value.tolist() for name, value in zip(names, values, strict=True)},
        "compute": None if estimate is None else asdict(estimate),
        "text": text,
    }


def _common(sides: list[Points], pair: tuple[int, int]) -> set[str]:
    """Sizes that both kinds have at a budget, so that a failed run favours nobody.

    All, where they share no name, or where sizes have none: the kinds' counts of parameters differ at one size.
    """
    at = [(points, points.at(budget)) for points, budget in zip(sides, pair, strict=True)]
    own, other = ({points.label(i) for i in positions} for points, positions in at)
    named = all(points.runs[i].text("size") for points, positions in at for i in positions)
    return (own & other if named else set()) or own | other


def _lowest(points: Points, budget: int, sizes: set[str]) -> tuple[float, Any]:
    """Lowest loss of a budget over some sizes (each the mean of its seeds), and its draws."""
    groups = [[i for i in points.at(budget) if points.label(i) == name] for name in sorted(sizes)]
    groups = [group for group in groups if group]
    value = min(points.losses[group].mean() for group in groups)
    if points.draws is None:
        return float(value), None
    return float(value), np.min([points.draws[:, group].mean(axis=1) for group in groups], axis=0)


def _crossing(
    compute: np.ndarray, difference: np.ndarray, spread: np.ndarray | None, names: list[str]
) -> tuple[Estimate | None, str]:
    """Where the difference (first minus second) changes its sign, and what is to be said of it."""
    found = _zeros(compute, difference)
    reach = f"{compute.min():.3g} to {compute.max():.3g} FLOP"
    if not len(found):
        ahead, behind = names if difference[0] < 0 else names[::-1]
        size = np.abs(difference)
        text = (
            f"no crossover from {reach}: {ahead} has the lower loss at every budget, by {size.min():.4f} to "
            f"{size.max():.4f} nats, than {behind}"
        )
        if spread is None:
            return None, f"{text}; how much of that is noise is not known"
        low, high = np.percentile(spread, CONFIDENCE, axis=0)
        sure = int(((low > 0) | (high < 0)).sum())
        return None, f"{text}; beyond the noise at {sure} of {len(compute)} budgets"
    if len(found) > 1:
        return None, f"the lead changes {len(found)} times from {reach}: no one crossover"
    ahead = names[0] if difference[-1] < 0 else names[1]
    text = f"{ahead} takes the lead at"
    if spread is None:
        return Estimate(value=float(found[0])), f"{text} {found[0]:.3g} FLOP; how sure that is, is not known"
    places = [_zeros(compute, row) for row in spread]
    single = np.array([place[0] for place in places if len(place) == 1])
    if (share := len(single) / len(places)) < SURE:
        return None, f"{text} {found[0]:.3g} FLOP, but in {share:.0%} of the draws only: within the noise"
    estimate = Estimate.of(found[0], single)
    return estimate, f"{text} {estimate.words()} FLOP"


def _zeros(compute: np.ndarray, difference: np.ndarray) -> list[float]:
    """Changes of sign, between budgets in proportion over ln compute."""
    found = []
    for (c0, d0), (c1, d1) in pairwise(zip(np.log(compute), difference, strict=True)):
        if (d0 < 0) != (d1 < 0):
            found.append(float(np.exp(c0 + (c1 - c0) * d0 / (d0 - d1))))
    return found
