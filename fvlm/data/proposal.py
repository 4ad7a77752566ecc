"""What a pack should hold for given data: capacities and a window that fill it, and how full it then is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from fvlm.data.capacities import FILL, REFUSALS, Capacities
from fvlm.data.chat import Layout
from fvlm.data.mixture import Mixture
from fvlm.data.order import SampleOrder
from fvlm.data.plan import Plan
from fvlm.data.table import DIMENSIONS, SampleTable, sample_costs

WINDOWS = (4096, 8192, 16384)
"""Samples packed together: larger ones fill packs better, smaller ones are planned sooner."""
_ENOUGH = 0.004  # above FILL, so that other samples than those looked at reach it too
_PACKED = 1 << 16  # samples
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """Capacities, and what was found with them."""

    capacities: Capacities
    window: int
    samples: int
    """That were packed to find the fill."""
    packs: int
    """They took."""
    fill: dict[str, float]
    """Of each of `DIMENSIONS`: share in use."""
    refused: Counter
    """Samples of the table that find no place, by reason."""

    @property
    def is_full(self) -> bool:
        """Whether frames and tokens are in use as far as they should be (`FILL`)."""
        return all(self.fill[name] >= share for name, share in FILL.items())


def propose_plan(
    table: SampleTable,
    mixture: Mixture,
    *,
    tokens: int,
    objective: str,
    frames: int | None = None,
    max_seqlen: int | None = None,
    seed: int = 0,
) -> Proposal:
    """Capacities as `Capacities.propose` finds them, in the smallest window that fills packs as far as they should be.

    Raises ValueError for a mixture that the table cannot give, and where no sample fits.
    """
    size = SampleOrder(table, mixture, seed).size
    total = min(len(table), size or len(table))
    for window in WINDOWS:
        capacities = Capacities.propose(
            table,
            mixture,
            tokens=tokens,
            frames=frames,
            objective=objective,
            max_seqlen=max_seqlen,
            seed=seed,
            window=window,
        )
        plan = Plan(table, mixture, capacities, objective, seed, total, window)
        fill, samples, packs = _fill(plan, capacities)
        enough = all(fill[name] >= share + _ENOUGH for name, share in FILL.items())
        if enough or window == WINDOWS[-1] or window >= total:
            break
    refused = _refused(table, mixture, objective, capacities)
    return Proposal(capacities=capacities, window=window, samples=samples, packs=packs, fill=fill, refused=refused)


def _fill(plan: Plan, capacities: Capacities) -> tuple[dict[str, float], int, int]:
    """Shares in use, samples and packs of windows from all over the plan."""
    num_windows = plan.num_windows
    first, last = plan.window_bounds(0)
    chosen = np.unique(np.linspace(0, num_windows - 1, max(_PACKED // (last - first), 1)).astype(int))
    packs = [pack for window in chosen.tolist() for pack in plan.window(window)]
    room = len(packs) * capacities.as_array()
    used = {name: sum(getattr(pack, name) for pack in packs) for name in DIMENSIONS}
    return (
        {name: used[name] / most for name, most in zip(DIMENSIONS, room.tolist(), strict=True)},
        used["samples"],
        len(packs),
    )


def _refused(table: SampleTable, mixture: Mixture, objective: str, capacities: Capacities) -> Counter:
    """How many samples of the table are refused, laid out as takes most (narrations aside), by reason."""
    layout = Layout.QUESTION_FIRST if mixture.question_first else Layout.VIDEO_FIRST
    reasons = np.zeros(len(REFUSALS), np.int64)
    for start in range(0, len(table), _CHUNK):
        stop = min(start + _CHUNK, len(table))
        layouts = np.full(stop - start, layout, np.uint8)
        costs = sample_costs(table, slice(start, stop), layouts, mixture, objective)
        reasons += np.bincount(capacities.refusals(costs), minlength=len(REFUSALS))
    return Counter({name: num for name, num in zip(REFUSALS[1:], reasons[1:].tolist(), strict=True) if num})
