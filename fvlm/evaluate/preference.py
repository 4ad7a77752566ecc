"""How a model prefers the chosen answers of a fixed set of pairs, beside the frozen reference."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fvlm.evaluate.ranks import sum_over_ranks
from fvlm.evaluate.validation import evaluating
from fvlm.train.figures import PREFERENCE_FIGURES
from fvlm.train.preference import Preferences, preferences


def preference_figures(
    model: nn.Module, loader: Iterable, beta: float, mode: str, fine_iterations: int = 1
) -> dict[str, float]:
    """Means over the pairs under the names of `PREFERENCE_FIGURES`, the same on every rank; without gradient.

    Args:
        loader: as for `evaluate_losses`; its batches carry the reference's log-probabilities.
        beta: scale of the rewards.

    Raises ValueError where there is no pair, or a figure is not finite.
    """
    totals: Tensor | None = None
    with evaluating(model):
        for step in loader:
            for batch in step.batches:
                out = model(batch=batch, mode=mode, fine_iterations=fine_iterations)
                sums = torch.stack(preferences(out.logprobs, batch, beta)).double()
                totals = sums if totals is None else totals + sums
    if totals is None:
        raise ValueError("preference_figures: the loader gave no batch; check the validation shards and their plan")
    found = Preferences(*sum_over_ranks(totals).tolist())
    if not found.pairs:
        raise ValueError("preference_figures: no pair of the validation set could be read")
    margin = found.chosen - found.rejected
    means = torch.tensor([found.loss, found.correct, margin], dtype=torch.float64) / found.pairs
    if not means.isfinite().all():
        raise ValueError(f"preference_figures: non-finite loss, accuracy or margin: {means.tolist()}")
    return dict(zip(PREFERENCE_FIGURES, means.tolist(), strict=True))
