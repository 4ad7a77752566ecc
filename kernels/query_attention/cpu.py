"""Query attention on the CPU: frame by frame, with each frame's K and V read where they lie, forward and backward.

Shapes: V queries, F frames, N keys a frame, h heads, k head width, m queries of one frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def _frames(visual_frame: Tensor) -> Iterator[tuple[int, slice]]:
    """Each frame that is looked at, and its rows among the (sorted) queries."""
    frames, counts = visual_frame.unique_consecutive(return_counts=True)
    start = 0
    for frame, count in zip(frames.tolist(), counts.tolist(), strict=True):
        yield frame, slice(start, start + count)
        start += count


def _log_weights(q_mhk: Tensor, key_Nhk: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [h, m, N] in float32 or wider and their logsumexp [h, m, 1]; of each other, log p."""
    scores = torch.bmm(q_mhk.transpose(0, 1), key_Nhk.permute(1, 2, 0))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / math.sqrt(q_mhk.shape[-1])
    return scores, scores.logsumexp(-1, keepdim=True)


def _entropy(p: Tensor, log_p: Tensor) -> Tensor:
    # a weight that underflowed to 0 contributes 0, not 0 · (−inf)
    return -(p * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1, keepdim=True)


@torch.library.custom_op("fvlm::query_attention_cpu", mutates_args=(), device_types="cpu")
def _forward(q: Tensor, key: Tensor, value: Tensor, visual_frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, entropy = q.new_empty(q.shape), _new_figures(q), _new_figures(q)
    for frame, rows in _frames(visual_frame):
        scores, sums = _log_weights(q[rows], key[frame])
        log_p = scores - sums
        p = log_p.exp()
        out[rows] = torch.bmm(p.to(q.dtype), value[frame].transpose(0, 1)).transpose(0, 1)
        lse[rows], entropy[rows] = sums[..., 0].T, _entropy(p, log_p)[..., 0].T
    return out, lse, entropy


def _new_figures(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@_forward.register_fake
def _(q, key, value, visual_frame):
    return q.new_empty(q.shape), _new_figures(q), _new_figures(q)


@torch.library.custom_op("fvlm::query_attention_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    visual_frame: Tensor,
    d_out: Tensor | None,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_key, d_value = q.new_empty(q.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    for frame, rows in _frames(visual_frame):
        scores, sums = _log_weights(q[rows], key[frame])
        log_p = scores - sums
        p = log_p.exp()
        d_scores = torch.zeros_like(p)
        if d_out is not None:
            d_seen = d_out[rows].transpose(0, 1)
            d_value[frame] = torch.bmm(p.to(q.dtype).transpose(1, 2), d_seen).transpose(0, 1)
            d_p = torch.bmm(d_seen, value[frame].permute(1, 2, 0)).to(p.dtype)
            d_scores += p * (d_p - (p * d_p).sum(-1, keepdim=True))
        if d_lse is not None:
            d_scores += p * d_lse[rows].T.unsqueeze(-1)
        if d_entropy is not None:
            finite = log_p.clamp(min=torch.finfo(log_p.dtype).min)
            d_scores -= p * (finite + _entropy(p, log_p)) * d_entropy[rows].T.unsqueeze(-1)
        d_scores = (d_scores / math.sqrt(q.shape[-1])).to(q.dtype)
        d_q[rows] = torch.bmm(d_scores, key[frame].transpose(0, 1)).transpose(0, 1)
        d_key[frame] = torch.bmm(d_scores.transpose(1, 2), q[rows].transpose(0, 1)).transpose(0, 1)
    return d_q, d_key, d_value


@_backward.register_fake
def _(q, key, value, *_):
    return q.new_empty(q.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _gradients(ctx, d_out, d_lse, d_entropy):
    return *torch.ops.fvlm.query_attention_cpu_backward(*ctx.saved_tensors, d_out, d_lse, d_entropy), None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def query_attention_cpu(q: Tensor, key: Tensor, value: Tensor, visual_frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fvlm.kernels.query_attention.query_attention`; for tensors on the CPU."""
    return torch.ops.fvlm.query_attention_cpu(q, key, value, visual_frame)
