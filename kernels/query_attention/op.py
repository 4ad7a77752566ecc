"""Public entry of query attention: validate, choose a back end, call it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Backend, debug_checks, require, select
from .reference import query_attention_reference, query_attention_torch

_BACKENDS = (Backend("torch", query_attention_torch), Backend("reference", query_attention_reference))


def query_attention(q: Tensor, key: Tensor, value: Tensor, visual_frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each query attends to all keys of one frame: softmax(q·Kᵀ / √k)·V (docs/model.md, Encoder).

    Args:
        q: [V, h, k], any temperature already multiplied in.
        key, value: [F, N, h, k], same dtype as ``q``.
        visual_frame: int64 [V], the frame each query looks at, sorted.

    Returns:
        out [V, h, k] in q's dtype; logsumexp of the scaled scores and entropy in nats, float32 (float64 for
        float64 input) [V, h].

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; under ``FVLM_DEBUG=1`` also unsorted or foreign frames.
    """
    op = "query_attention"
    require(q.ndim == 3, op, "q", "[V, h, k]", tuple(q.shape))
    require(
        key.ndim == 4 and key.shape[2:] == q.shape[1:],
        op,
        "key",
        f"[F, N, {q.shape[1]}, {q.shape[2]}]",
        tuple(key.shape),
    )
    require(value.shape == key.shape, op, "value", f"key's shape {tuple(key.shape)}", tuple(value.shape))
    require(key.dtype == q.dtype == value.dtype, op, "key and value", f"{q.dtype} as q", (key.dtype, value.dtype))
    require(visual_frame.shape == q.shape[:1], op, "visual_frame", f"[{q.shape[0]}]", tuple(visual_frame.shape))
    require(visual_frame.dtype == torch.int64, op, "visual_frame", "int64", visual_frame.dtype)
    require(visual_frame.device == q.device, op, "visual_frame", f"on {q.device}", visual_frame.device)
    if debug_checks() and visual_frame.numel():
        require(bool((visual_frame.diff() >= 0).all()), op, "visual_frame", "sorted", visual_frame.tolist())
        inside = int(visual_frame[0]) >= 0 and int(visual_frame[-1]) < key.shape[0]
        require(inside, op, "visual_frame", f"in [0, {key.shape[0]})", visual_frame.tolist())
    return select(op, _BACKENDS, q)(q, key, value, visual_frame)
