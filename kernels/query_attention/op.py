"""Public entry of query attention: validate, choose a back end, call it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Backend, debug_checks, require, select, under_autocast
from ..launching import refuses_triton
from .cpu import query_attention_cpu
from .reference import query_attention_reference, query_attention_torch

WIDEST = 128
"""The widest head that the Triton kernels' tiles have room for."""


def frame_offsets(visual_frame: Tensor, num_frames: int) -> Tensor:
    """Where each frame's queries begin and end: int32 [F+1]; frame f owns offsets[f]:offsets[f+1]."""
    frames = torch.arange(num_frames + 1, device=visual_frame.device)
    return torch.searchsorted(visual_frame, frames, out_int32=True)


@torch.library.custom_op("fvlm::query_attention", mutates_args=())
def _forward(q: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from .kernel import forward

    return forward(q, key, value, offsets)


@_forward.register_fake
def _(q, key, value, offsets):
    return q.new_empty(q.shape), *(q.new_empty(q.shape[:2], dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("fvlm::query_attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    out: Tensor,
    lse: Tensor,
    entropy: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    kv_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from .kernel import backward

    return backward(q, key, value, offsets, out, lse, entropy, d_out, d_lse, d_entropy, kv_grad)


@_backward.register_fake
def _(q, key, value, *others):
    kv_grad = others[-1]
    return q.new_empty(q.shape), *(x.new_empty(x.shape if kv_grad else 0) for x in (key, value))


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx, d_out, d_lse, d_entropy):
    saved = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(saved[0])
    kv_grad = any(ctx.needs_input_grad[1:3])
    d_q, d_key, d_value = torch.ops.fvlm.query_attention_backward(*saved, d_out, d_lse, d_entropy, kv_grad)
    return d_q, d_key if kv_grad else None, d_value if kv_grad else None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def query_attention_triton(q, key, value, visual_frame, offsets=None):
    """The Triton kernels (``kernel.py``); see :func:`query_attention`."""
    if offsets is None:
        offsets = frame_offsets(visual_frame, key.shape[0])
    return torch.ops.fvlm.query_attention(q, key, value, offsets)


def _refuses_triton(probe: Tensor, named: bool) -> str | None:
    if probe.shape[2] > WIDEST:
        return f"the kernels take heads of up to {WIDEST}, not {probe.shape[2]}"
    return refuses_triton(probe, named)


def _query_attention_torch(q, key, value, visual_frame, offsets=None):
    if q.device.type == "cpu":
        return query_attention_cpu(q, key, value, visual_frame)
    return query_attention_torch(q, key, value, visual_frame)


_BACKENDS = (
    Backend("triton", query_attention_triton, _refuses_triton),
    Backend("torch", _query_attention_torch),
    Backend("reference", query_attention_reference),
)


def query_attention(
    q: Tensor, key: Tensor, value: Tensor, visual_frame: Tensor, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Each query attends to all keys of one frame: softmax(q·Kᵀ / √k)·V (docs/model.md, Encoder).

    Args:
        q: [V, h, k], any temperature already multiplied in.
        key, value: [F, N, h, k], same dtype as ``q``.
        visual_frame: int64 [V], the frame each query looks at, sorted.
        offsets: :func:`frame_offsets` of ``visual_frame``, for callers with many layers; made here where None.

    Returns:
        out [V, h, k] in q's dtype; logsumexp of the scaled scores and entropy in nats, float32 (float64 for
        float64 input) [V, h]. All three are differentiable.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; under ``FVLM_DEBUG=1`` also unsorted or foreign frames.
    """
    op = "query_attention"
    require(q.ndim == 3, op, "q", "[V, h, k]", tuple(q.shape))
    shape = f"[F, N, {q.shape[1]}, {q.shape[2]}]"
    require(key.ndim == 4 and key.shape[2:] == q.shape[1:], op, "key", shape, tuple(key.shape))
    require(value.shape == key.shape, op, "value", f"key's shape {tuple(key.shape)}", tuple(value.shape))
    q, key, value = under_autocast(q, key, value)
    require(key.dtype == q.dtype == value.dtype, op, "key and value", f"{q.dtype} as q", (key.dtype, value.dtype))
    require(visual_frame.shape == q.shape[:1], op, "visual_frame", f"[{q.shape[0]}]", tuple(visual_frame.shape))
    require(visual_frame.dtype == torch.int64, op, "visual_frame", "int64", visual_frame.dtype)
    if offsets is not None:
        fits = offsets.dtype == torch.int32 and offsets.shape == (key.shape[0] + 1,)
        require(fits, op, "offsets", f"int32 [{key.shape[0] + 1}]", (offsets.dtype, tuple(offsets.shape)))
    for name, x in (("key", key), ("value", value), ("visual_frame", visual_frame), ("offsets", offsets)):
        require(x is None or x.device == q.device, op, name, f"on {q.device} as q", getattr(x, "device", None))
    if debug_checks() and visual_frame.numel():
        require(bool((visual_frame.diff() >= 0).all()), op, "visual_frame", "sorted", visual_frame.tolist())
        inside = int(visual_frame[0]) >= 0 and int(visual_frame[-1]) < key.shape[0]
        require(inside, op, "visual_frame", f"in [0, {key.shape[0]})", visual_frame.tolist())
        same = offsets is None or torch.equal(offsets, frame_offsets(visual_frame, key.shape[0]))
        require(same, op, "offsets", "frame_offsets(visual_frame, F)", offsets)
    return select(op, _BACKENDS, q)(q, key, value, visual_frame, offsets)
