"""Direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290, equation 7).

Samples 2i and 2i + 1 of a pack are the chosen and the rejected answer to one question about the same frames. With
log π the sum of an answer's token log-probabilities and log π_ref the same under the frozen reference,

    reward = β · (log π − log π_ref)          loss = −log σ(reward of the chosen − reward of the rejected)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fvlm.model.packed import PackedBatch


class Preferences(NamedTuple):
    """A pack's pairs, summed; float32 scalars."""

    loss: Tensor
    """Σ −log σ(margin); differentiable in the log-probabilities."""
    pairs: Tensor
    """Pairs in the pack."""
    chosen: Tensor
    """Σ reward of the chosen answers."""
    rejected: Tensor
    """Σ reward of the rejected answers."""
    correct: Tensor
    """Pairs whose chosen answer has the larger reward."""


def answer_logprobs(logprobs: Tensor, batch: PackedBatch) -> Tensor:
    """float32 [S]: Σ log-probability of each sample's labels; 0 for samples without.

    `logprobs` float32 [K], 0 where there is no label.
    """
    num_samples = len(batch.cu_seqlens) - 1
    sample = torch.searchsorted(batch.cu_seqlens[1:].long().contiguous(), batch.loss_index, right=True)
    owned = sample[:, None] == torch.arange(num_samples, device=sample.device)  # [K, S]
    owned &= batch.labels[:, None] >= 0
    # not a scatter: the order of the sums is fixed, and one sample's NaN stays with it
    return torch.where(owned, logprobs[:, None], 0.0).sum(0)


def preferences(logprobs: Tensor, batch: PackedBatch, beta: float) -> Preferences:
    """The pack's pairs under a model whose label log-probabilities are `logprobs`, float32 [K].

    Raises ValueError for a pack that carries no reference log-probabilities.
    """
    if batch.reference_logprob is None:
        raise ValueError("PackedBatch.reference_logprob is None: expected float32 [S], see fvlm.train.reference")
    reward = beta * (answer_logprobs(logprobs, batch) - batch.reference_logprob)
    chosen, rejected = reward.unflatten(0, (-1, 2)).unbind(1)
    is_pair = batch.cu_seqlens.diff().unflatten(0, (-1, 2))[:, 1] > 0
    margin = chosen - rejected

    def total(values: Tensor) -> Tensor:
        return torch.where(is_pair, values, 0.0).sum()

    return Preferences(
        loss=total(F.softplus(-margin)),
        pairs=is_pair.sum(dtype=torch.float32),
        chosen=total(chosen.detach()),
        rejected=total(rejected.detach()),
        correct=total((margin.detach() > 0).to(margin.dtype)),
    )
