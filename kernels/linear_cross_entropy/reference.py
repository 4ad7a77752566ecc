"""Head and cross-entropy in plain torch.

Shapes: K rows, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..dispatch import without_autocast

ROWS_AT_ONCE = 2048


@without_autocast
def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label in float32 (float64 for float64 input), 0 where there is none, all at once."""
    upcast = torch.promote_types(hidden.dtype, torch.float32)
    return _logprobs(hidden.to(upcast), weight.to(upcast), labels)


def linear_cross_entropy_torch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same with logits in the input's precision, a chunk of rows at a time and recomputed in the backward pass."""
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        # choosing the labelled rows costs no synchronisation here, but would break a graph
        rows = (labels != -100).nonzero().squeeze(1)
        logprobs = _in_chunks(hidden.index_select(0, rows), weight, labels[rows])
        return torch.zeros(len(labels), dtype=logprobs.dtype).index_copy(0, rows, logprobs)
    return _in_chunks(hidden, weight, labels)


def _in_chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    if len(labels) <= ROWS_AT_ONCE:
        return _logprobs(hidden, weight, labels)
    chunks = zip(hidden.split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True)
    again = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random; the state is the host's to read
    return torch.cat([checkpoint(_logprobs, rows, weight, row_labels, **again) for rows, row_labels in chunks])


def _logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    # rows without a label as zeros: their gradient is 0 · softmax, and a NaN would spread to all of the weight's
    logits = hidden.masked_fill((labels == -100)[:, None], 0) @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _LabelLogprob.apply(logits, labels)


class _LabelLogprob(torch.autograd.Function):
    """log softmax(logits) at each label, 0 where it is −100; its gradient takes the place of what it has kept.

    Of [rows, vocabulary] that is one buffer beside the logits, where ``F.cross_entropy`` takes three.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        used, label = labels != -100, labels.masked_fill(labels == -100, 0)[:, None]
        log_p = logits.log_softmax(-1)
        ctx.save_for_backward(log_p, used, label)
        return log_p.gather(1, label).squeeze(1).masked_fill(~used, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_logprobs: Tensor) -> tuple[Tensor, None]:
        log_p, used, label = ctx.saved_tensors
        d_logprobs = d_logprobs.masked_fill(~used, 0)[:, None]
        return log_p.exp_().mul_(-d_logprobs).scatter_add_(1, label, d_logprobs), None
