"""The three kernels' operations as an exported model has them: the plain torch beside each kernel, nothing to choose.

Takes the place of `fvlm.kernels` in the flat files (`fvlm.hub.flatten`); the same arguments and results.
"""

from __future__ import annotations

from torch import Tensor

from ..kernels.linear_cross_entropy.op import LinearCrossEntropy
from ..kernels.linear_cross_entropy.reference import linear_cross_entropy_torch
from ..kernels.query_attention.op import frame_offsets
from ..kernels.query_attention.reference import query_attention_torch as query_attention
from ..kernels.varlen_attention.reference import varlen_attention_padded as varlen_attention


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> LinearCrossEntropy:
    """Cross-entropy of softmax(hidden · weightᵀ), [K, d] and [vocabulary, d], against labels [K]; −100 = none."""
    logprobs = linear_cross_entropy_torch(hidden, weight, labels)
    return LinearCrossEntropy(-logprobs.sum(), logprobs, (labels != -100).sum())


__all__ = ["LinearCrossEntropy", "frame_offsets", "linear_cross_entropy", "query_attention", "varlen_attention"]
