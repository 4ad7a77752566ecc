"""Learning-rate factors as functions of progress p in [0, 1], the share of the run's samples that have been seen.

A step uses the progress at its end, so that the first step's rate is above zero and the last step's is the target.
"""

from __future__ import annotations

import math

from fvlm.data.plan import Step
from fvlm.train_config import GROUPS, TrainConfig

COSINE_FLOOR = 0.1
HOLD_UNTIL = 0.8


def factor(schedule: str, progress: float, warmup: float, floor: float = COSINE_FLOOR) -> float:
    """Share of the base rate at `progress`; `floor` is target / base for `converging` and is read by it alone.

    Warm-up rises linearly to 1 at p = warmup. Then `constant` stays; `cosine` and `converging` follow
    r + (1 − r)·½(1 + cos π(p − p_w)/(1 − p_w)) with r = 0.1 and r = floor; `hold_linear` stays at 1 and falls
    linearly to 0 over the last fifth. Raises ValueError for a progress outside of [0, 1] or an unknown schedule.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress = {progress}: expected a share between 0 and 1")
    if progress < warmup:
        return progress / warmup
    if schedule == "constant":
        return 1.0
    if schedule in ("cosine", "converging"):
        low = COSINE_FLOOR if schedule == "cosine" else floor
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    if schedule == "hold_linear":
        return min(1.0, (1 - progress) / (1 - HOLD_UNTIL))
    raise ValueError(f"schedule = {schedule!r}: expected constant, cosine, converging or hold_linear")


def learning_rates(train: TrainConfig, progress: float) -> dict[str, float]:
    """Rate of each parameter group at `progress`; 0 while it is frozen."""
    rates, frozen = {}, train.frozen_at(progress)
    for group in GROUPS:
        rate = getattr(train.learning_rate, group)
        floor = (rate.target or rate.base) / rate.base
        rates[group] = 0.0 if group in frozen else rate.base * factor(train.schedule, progress, train.warmup, floor)
    return rates


def unfreezes(train: TrainConfig, step: Step) -> bool:
    """Whether a step is the first to train some part."""
    seen = (step.samples_seen_before, step.samples_seen)
    return len({train.frozen_at(samples / train.total_samples) for samples in seen}) > 1


def fine_iterations(choices: tuple[int, ...], step: int) -> int:
    """Fine passes of optimizer step `step` (from 0): the choices in turn, the same on all ranks."""
    return choices[step % len(choices)]
