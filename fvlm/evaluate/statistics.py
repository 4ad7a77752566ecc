"""Accuracy with what it needs beside it: sample size, chance level, interval, and signs of a degenerate result."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
Z_95 = 1.959963984540054


def wilson_interval(correct: float, total: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a share; (0, 1) where nothing was counted.

    Raises ValueError where `correct` is not within [0, total].
    """
    if not 0 <= correct <= total:
        raise ValueError(f"wilson_interval: correct={correct} is not within 0..{total}")
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def bootstrap_interval(
    sums: Sequence[float], counts: Sequence[float] | None = None, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean Σ sums / Σ counts, over `RESAMPLES` draws of samples with replacement.

    Args:
        sums: one a sample.
        counts: what each sum is over, such as its tokens; None: 1 each.
    """
    sums = np.asarray(sums, np.float64)
    counts = np.ones_like(sums) if counts is None else np.asarray(counts, np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for draw in range(RESAMPLES):
        chosen = rng.integers(0, len(sums), len(sums))
        means[draw] = sums[chosen].sum() / counts[chosen].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def accuracy_figures(
    correct: Sequence[float], chances: Sequence[float], choices: Sequence[Any], answers: Sequence[Any]
) -> dict[str, Any]:
    """Figures of one group of independent items.

    Args:
        correct: share of each item that is right: 0 or 1, or a mean over an item's slots.
        chances: each item's accuracy under blind guessing.
        choices, answers: what was chosen and what was right, to notice one answer given always (any length).

    Returns:
        {"accuracy", "n", "chance", "low", "high", "flags"}: `n` counts items; the 95 % interval is Wilson's over
        items, so slots of one clip, which stand or fall together, do not narrow it.
    """
    n = len(correct)
    if n == 0:
        raise ValueError("accuracy_figures: no items; leave the group out instead")
    accuracy = math.fsum(correct) / n
    chance = math.fsum(chances) / n
    low, high = wilson_interval(math.fsum(correct), n)
    flags = degenerate_flags(choices, answers)
    if low <= chance:
        flags.append("not above chance")
    return {"accuracy": accuracy, "n": n, "chance": chance, "low": low, "high": high, "flags": flags}


def yes_no_figures(said: Sequence[bool], right: Sequence[bool]) -> dict[str, float | None]:
    """How well "yes" finds what is there: {"precision", "recall", "f1", "yes"}; None where the share is of nothing.

    Args:
        said: whether "yes" was answered, a question; an answer that is neither is no "yes".
        right: whether "yes" is right.

    Returns:
        Shares: right ones among the yeses, found ones among what is there, their harmonic mean, yeses among all.
    """
    found = sum(a and b for a, b in zip(said, right, strict=True))
    yes, there = sum(said), sum(right)

    def share(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    return {
        "precision": share(found, yes),
        "recall": share(found, there),
        "f1": share(2 * found, yes + there),
        "yes": share(yes, len(said)),
    }


def degenerate_flags(choices: Sequence[Any], answers: Sequence[Any]) -> list[str]:
    """["always answers X"] where ten or more choices are all X although the right answers differ."""
    given = Counter(choices)
    if len(choices) >= 10 and len(given) == 1 and len(set(answers)) > 1:
        return [f"always answers {next(iter(given))}"]
    return []
