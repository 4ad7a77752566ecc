"""Necessary floating-point operations of a step, known from its plan alone."""

from __future__ import annotations

import numpy as np

from fvlm.data.plan import Pack, Plan, Step
from fvlm.data.table import DIMENSIONS, sample_costs
from fvlm.model import FoveatedConfig
from fvlm.model.flops import Flops, pack_flops

_TOKENS, _COARSE = DIMENSIONS.index("tokens"), DIMENSIONS.index("coarse")


def step_flops(config: FoveatedConfig, plan: Plan, step: Step, mode: str, fine_iterations: int) -> float:
    """Forward and backward operations of all packs of a step, over all ranks."""
    return sum(planned_flops(config, plan, pack, mode, fine_iterations).training for pack in step.packs)


def planned_flops(config: FoveatedConfig, plan: Plan, pack: Pack, mode: str, fine_iterations: int) -> Flops:
    """Forward operations of a planned pack, by component; a pair counts as two equal halves."""
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
    )
