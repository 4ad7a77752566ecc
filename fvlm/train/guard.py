"""Stops a run whose loss or gradient is not finite, before the update, naming step, rank and samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fvlm.model.packed import PackedBatch
from fvlm.train.engine import World

MOST_KEYS = 8


class DivergenceError(RuntimeError):
    """Loss or gradient is not finite; the weights are those of the step before."""


class EvaluationError(RuntimeError):
    """The validation set cannot be scored: a score that is not finite, or no token with a label."""


def suspects(scored: Sequence[tuple[PackedBatch, Tensor, Sequence[str]]]) -> list[str]:
    """Keys of the samples with a label whose log-probability is not finite, from (pack, logprobs [K], keys) triples."""
    found = []
    for batch, logprobs, keys in scored:
        bad_rows = batch.loss_index[~torch.isfinite(logprobs) & (batch.labels >= 0)]
        ends = batch.cu_seqlens[1:].long().contiguous()
        samples = torch.searchsorted(ends, bad_rows, right=True).unique().tolist()
        found += [keys[sample] for sample in samples if sample < len(keys)]
    return found


def check(step: int, quantity: str, value: float, keys: Callable[[], Sequence[str]], world: World) -> None:
    """Raise DivergenceError on every rank if `value`, which all ranks share, is not finite.

    `keys` gives the samples of this rank that are suspected.
    """
    if math.isfinite(value):
        return
    by_rank = world.gather(list(keys()))
    named = [f"rank {rank}: {', '.join(found[:MOST_KEYS])}" for rank, found in enumerate(by_rank) if found]
    raise DivergenceError(
        f"step {step}: {quantity} is {value}; samples: {'; '.join(named) or 'none known'}. The weights were not "
        f"updated, the last checkpoint is sound: look at these samples, lower train.learning_rate, start again"
    )
