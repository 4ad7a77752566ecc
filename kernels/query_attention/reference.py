"""Query attention in plain torch.

Shapes: V queries, F frames, N keys a frame, h heads, k head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dispatch import without_autocast


@without_autocast
def query_attention_reference(
    q: Tensor, key: Tensor, value: Tensor, visual_frame: Tensor, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, computed in float32 (float64 for float64 input)."""
    upcast = torch.promote_types(q.dtype, torch.float32)
    out, lse, entropy = query_attention_torch(q.to(upcast), key.to(upcast), value.to(upcast), visual_frame)
    return out.to(q.dtype), lse, entropy


def query_attention_torch(
    q: Tensor, key: Tensor, value: Tensor, visual_frame: Tensor, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Products in the input's precision, softmax in float32; a frame's K and V are copied once a query."""
    key_VNhk = key.index_select(0, visual_frame)
    value_VNhk = value.index_select(0, visual_frame)
    scores_VhN = torch.einsum("vhk,vnhk->vhn", q, key_VNhk) / math.sqrt(q.shape[-1])
    scores_VhN = scores_VhN.to(torch.promote_types(q.dtype, torch.float32))
    log_p_VhN = scores_VhN.log_softmax(-1)
    p_VhN = log_p_VhN.exp()
    out = torch.einsum("vhn,vnhk->vhk", p_VhN.to(q.dtype), value_VNhk)
    # a weight that underflowed to 0 contributes 0, not 0 · (−inf)
    entropy = -(p_VhN * log_p_VhN.clamp(min=torch.finfo(log_p_VhN.dtype).min)).sum(-1)
    return out, scores_VhN.logsumexp(-1), entropy


def attention_weights(q: Tensor, key: Tensor, visual_frame: Tensor) -> Tensor:
    """The weights themselves, float32 [V, h, N]: for heat maps, never on the training path."""
    scores = torch.einsum("vhk,vnhk->vhn", q.float(), key.float().index_select(0, visual_frame))
    return (scores / math.sqrt(q.shape[-1])).softmax(-1)
