"""Public entry of the fused head and cross-entropy: validate, choose a back end, call it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import Backend, debug_checks, require, select, under_autocast
from ..launching import refuses_triton
from .reference import linear_cross_entropy_reference, linear_cross_entropy_torch


@torch.library.custom_op("fvlm::linear_cross_entropy", mutates_args=())
def _forward(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .kernel import forward

    return forward(hidden, weight, labels)


@_forward.register_fake
def _(hidden, weight, labels):
    logprobs, lse = (hidden.new_empty(hidden.shape[:1], dtype=torch.float32) for _ in range(2))
    return logprobs, lse, labels.new_empty(labels.shape, dtype=torch.int32), labels.new_empty(1, dtype=torch.int32)


@torch.library.custom_op("fvlm::linear_cross_entropy_backward", mutates_args=())
def _backward(
    d_logprobs: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    order: Tensor,
    num_labels: Tensor,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    from .kernel import backward

    return backward(d_logprobs, hidden, weight, labels, lse, order, num_labels, hidden_grad, weight_grad)


@_backward.register_fake
def _(d_logprobs, hidden, weight, labels, lse, order, num_labels, hidden_grad, weight_grad):
    return hidden.new_empty(hidden.shape if hidden_grad else 0), weight.new_empty(weight.shape if weight_grad else 0)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[1:])


def _gradients(ctx, d_logprobs, *_):
    hidden_grad, weight_grad, _ = ctx.needs_input_grad
    if d_logprobs is None:
        return None, None, None
    d_hidden, d_weight = torch.ops.fvlm.linear_cross_entropy_backward(
        d_logprobs, *ctx.saved_tensors, hidden_grad, weight_grad
    )
    return d_hidden if hidden_grad else None, d_weight if weight_grad else None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def linear_cross_entropy_triton(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The Triton kernels (``kernel.py``): log-probabilities, float32."""
    return torch.ops.fvlm.linear_cross_entropy(hidden, weight, labels)[0]


_BACKENDS = (
    Backend("triton", linear_cross_entropy_triton, refuses_triton),
    Backend("torch", linear_cross_entropy_torch),
    Backend("reference", linear_cross_entropy_reference),
)


class LinearCrossEntropy(NamedTuple):
    """What the op returns."""

    loss_sum: Tensor
    """Scalar, float32 (float64 for float64 input): Σ −log p over rows that have a label."""
    logprobs: Tensor
    """[K], same dtype: log p of each row's label, 0 where the label is −100."""
    num_labels: Tensor
    """Scalar int64: rows that have a label."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> LinearCrossEntropy:
    """Cross-entropy of softmax(hidden · weightᵀ) against labels; rows without a label change nothing.

    Args:
        hidden: [K, d].
        weight: [vocabulary, d], the (tied) language-model head, same dtype as ``hidden``.
        labels: int64 [K]; −100 = no label. Any other label outside the vocabulary is the caller's error: the Triton
            kernels then give log p = −∞ and the softmax's gradient, torch its own error.

    Returns:
        Differentiable in ``loss_sum`` and ``logprobs``, once.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; under ``FVLM_DEBUG=1`` also foreign labels.
    """
    op = "linear_cross_entropy"
    require(hidden.ndim == 2, op, "hidden", "[K, d]", tuple(hidden.shape))
    fits = weight.ndim == 2 and len(weight) > 0 and weight.shape[1] == hidden.shape[1]
    require(fits, op, "weight", f"[vocabulary, {hidden.shape[1]}]", tuple(weight.shape))
    hidden, weight = under_autocast(hidden, weight)
    require(weight.dtype == hidden.dtype, op, "weight", f"{hidden.dtype} as hidden", weight.dtype)
    require(labels.shape == hidden.shape[:1], op, "labels", f"[{hidden.shape[0]}]", tuple(labels.shape))
    require(labels.dtype == torch.int64, op, "labels", "int64", labels.dtype)
    for name, x in (("weight", weight), ("labels", labels)):
        require(x.device == hidden.device, op, name, f"on {hidden.device} as hidden", x.device)
    if debug_checks():
        foreign = labels[(labels != -100) & ((labels < 0) | (labels >= len(weight)))]
        require(foreign.numel() == 0, op, "labels", f"-100 or in [0, {len(weight)})", foreign.tolist())
    logprobs = select(op, _BACKENDS, hidden)(hidden, weight, labels)
    return LinearCrossEntropy(-logprobs.sum(), logprobs, (labels != -100).sum())
