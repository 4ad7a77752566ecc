"""Packed causal attention on the CPU: torch's own attention, one sample after the other, with nothing padded.

The lengths lie in the host's memory, so reading them waits for nothing; as a custom operation it breaks no graph.

Shapes: T rows, S samples, h heads, h_kv key/value heads, k head width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _samples(cu_seqlens: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(cu_seqlens.tolist()) if end > start]


def _heads_first(x: Tensor, rows: slice) -> Tensor:
    """[T, h, k] → [1, h, rows, k], a view."""
    return x[rows].transpose(0, 1).unsqueeze(0)


@torch.library.custom_op("fvlm::varlen_attention_cpu", mutates_args=(), device_types="cpu")
def _forward(q: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = q.new_zeros(q.shape), _new_lse(q)
    for rows in _samples(cu_seqlens):
        seen, sums = _attend(*(_heads_first(x, rows) for x in (q, key, value)), 0.0, True)
        _heads_first(out, rows).copy_(seen)
        lse[rows] = sums[0].T
    return out, lse


def _new_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@_forward.register_fake
def _(q, key, value, cu_seqlens):
    return q.new_empty(q.shape), _new_lse(q)


@torch.library.custom_op("fvlm::varlen_attention_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    d_out: Tensor, q: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = tuple(x.new_zeros(x.shape) for x in (q, key, value))
    for rows in _samples(cu_seqlens):
        d_seen, *inputs, seen = (_heads_first(x, rows) for x in (d_out, q, key, value, out))
        sums = lse[rows].T.contiguous().unsqueeze(0)
        for whole, part in zip(gradients, _attend_backward(d_seen, *inputs, seen, sums, 0.0, True), strict=True):
            _heads_first(whole, rows).copy_(part)
    return gradients


@_backward.register_fake
def _(d_out, q, key, value, *_):
    return q.new_empty(q.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx, d_out, d_lse):
    if d_out is None:
        return None, None, None, None
    return *torch.ops.fvlm.varlen_attention_cpu_backward(d_out, *ctx.saved_tensors), None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def varlen_attention_cpu(q: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
    """See :func:`fvlm.kernels.varlen_attention.varlen_attention`; for tensors on the CPU."""
    return torch.ops.fvlm.varlen_attention_cpu(q, key, value, cu_seqlens)[0]
