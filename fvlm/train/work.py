"""Necessary floating-point operations of steps and samples, known from their plan alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fvlm.data.plan import Pack, Plan, Step
from fvlm.data.table import DIMENSIONS, sample_costs
from fvlm.model import FoveatedConfig
from fvlm.model.flops import Flops, pack_flops

_TOKENS, _COARSE = DIMENSIONS.index("tokens"), DIMENSIONS.index("coarse")


def step_flops(config: FoveatedConfig, plan: Plan, step: Step, mode: str, fine_iterations: int) -> float:
    """Forward and backward operations of all packs of a step, over all ranks."""
    return sum(planned_flops(config, plan, pack, mode, fine_iterations).training for pack in step.packs)


class MeanSample(NamedTuple):
    """Of a plan; samples that it refuses count as samples without work."""

    flops: float
    """Forward and backward operations."""
    packs: float
    """Share of a pack that it takes."""


def mean_sample(
    config: FoveatedConfig, plan: Plan, mode: str, fine_iterations: Sequence[int], most_windows: int = 8
) -> MeanSample:
    """Mean over windows from all over a plan, with its fine iterations taken in turn."""
    chosen = np.unique(np.linspace(0, plan.num_windows - 1, most_windows).astype(int)).tolist()
    iterations = sum(fine_iterations) / len(fine_iterations)
    flops = packs = samples = 0.0
    for window in chosen:
        first, end = plan.window_bounds(window)
        for pack in plan.window(window):
            flops += planned_flops(config, plan, pack, mode, iterations).training
            packs += 1
        samples += end - first
    return MeanSample(flops / samples, packs / samples)


def planned_flops(
    config: FoveatedConfig,
    plan: Plan,
    pack: Pack,
    mode: str,
    fine_iterations: float,
    recompute: tuple[float, float] = (0.0, 0.0),
) -> Flops:
    """Operations of a planned pack, as `pack_flops` counts them; a pair counts as two equal halves."""
    sequences = 2 if plan.objective == "dpo" else 1
    costs = sample_costs(plan.table, pack.rows, pack.layouts, plan.mixture, plan.objective)
    return pack_flops(
        config,
        num_frames=pack.frames,
        lengths=np.repeat(costs[:, _TOKENS] / sequences, sequences).tolist(),
        coarse_lengths=np.repeat(costs[:, _COARSE] / sequences, sequences).tolist(),
        num_visual=pack.visual,
        num_labels=pack.labels,
        mode=mode,
        fine_iterations=fine_iterations,
        recompute=recompute,
    )
