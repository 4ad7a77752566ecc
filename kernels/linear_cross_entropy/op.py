"""Public entry of the fused head and cross-entropy: validate, choose a back end, call it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import Backend, require, select
from .reference import linear_cross_entropy_reference, linear_cross_entropy_torch

_BACKENDS = (Backend("torch", linear_cross_entropy_torch), Backend("reference", linear_cross_entropy_reference))


class LinearCrossEntropy(NamedTuple):
    """What the op returns."""

    loss_sum: Tensor
    """Scalar, float32 (float64 for float64 input): Σ −log p over rows that have a label."""
    logprobs: Tensor
    """[K], same dtype: log p of each row's label, 0 where the label is −100."""
    num_labels: Tensor
    """Scalar int64: rows that have a label."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> LinearCrossEntropy:
    """Cross-entropy of softmax(hidden · weightᵀ) against labels.

    Args:
        hidden: [K, d].
        weight: [vocabulary, d], the (tied) language-model head.
        labels: int64 [K]; −100 = no label.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    op = "linear_cross_entropy"
    require(hidden.ndim == 2, op, "hidden", "[K, d]", tuple(hidden.shape))
    fits = weight.ndim == 2 and weight.shape[1] == hidden.shape[1]
    require(fits, op, "weight", f"[vocabulary, {hidden.shape[1]}]", tuple(weight.shape))
    require(labels.shape == hidden.shape[:1], op, "labels", f"[{hidden.shape[0]}]", tuple(labels.shape))
    require(labels.dtype == torch.int64, op, "labels", "int64", labels.dtype)
    logprobs = select(op, _BACKENDS, hidden)(hidden, weight, labels)
    return LinearCrossEntropy(-logprobs.sum(), logprobs, (labels != -100).sum())
