"""Packed causal attention in plain torch.

Shapes: T rows, S samples, L the longest sample, h heads, k head width.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import without_autocast


@without_autocast
def varlen_attention_reference(q: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """The definition, sample by sample, in float32 (float64 for float64 input)."""
    upcast = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // key.shape[1]
    bounds = cu_seqlens.tolist()
    parts = []
    for start, end in pairwise(bounds):
        q_Lhk = q[start:end].to(upcast)
        key_Lhk = key[start:end].to(upcast).repeat_interleave(group, dim=1)
        value_Lhk = value[start:end].to(upcast).repeat_interleave(group, dim=1)
        scores_hLL = torch.einsum("ihk,jhk->hij", q_Lhk, key_Lhk) / math.sqrt(q.shape[-1])
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        weights_hLL = scores_hLL.masked_fill(future, -math.inf).softmax(-1)
        parts.append(torch.einsum("hij,jhk->ihk", weights_hLL, value_Lhk).to(q.dtype))
    parts.append(torch.zeros_like(q[bounds[-1] :]))
    return torch.cat(parts)


def varlen_attention_padded(q: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Rows unpacked to [S, L], one batched SDPA, packed again."""
    slots = _Slots(cu_seqlens.long(), max_seqlen, q.shape[0])
    group = q.shape[1] // key.shape[1]
    padded = [slots.unpack(x) for x in (q, key, value)]
    padded[1:] = [x.repeat_interleave(group, dim=1) for x in padded[1:]] if group > 1 else padded[1:]
    out_ShLk = F.scaled_dot_product_attention(*padded, is_causal=True)
    return slots.pack(out_ShLk)


class _Slots:
    """The one-to-one map between packed rows [T] and padded slots [S·L], in both directions."""

    def __init__(self, bounds: Tensor, length: int, num_rows: int):
        starts, ends = bounds[:-1], bounds[1:]
        row_of_slot = starts[:, None] + torch.arange(length, device=bounds.device)
        self.shape = tuple(row_of_slot.shape)
        self.slot_used = (row_of_slot < ends[:, None]).flatten()
        self.row_of_slot = row_of_slot.flatten().clamp(max=num_rows - 1)
        rows = torch.arange(num_rows, device=bounds.device)
        sample = (torch.searchsorted(bounds, rows, right=True) - 1).clamp(max=len(starts) - 1)
        self.row_used = rows < bounds[-1]
        self.slot_of_row = torch.where(self.row_used, sample * length + rows - bounds[sample], 0)

    def unpack(self, x_Thk: Tensor) -> Tensor:
        """[T, h, k] → [S, h, L, k], zero in unused slots."""
        x = _Remap.apply(x_Thk, self.row_of_slot, self.slot_used, self.slot_of_row, self.row_used)
        return x.view(*self.shape, *x_Thk.shape[1:]).transpose(1, 2)

    def pack(self, x_ShLk: Tensor) -> Tensor:
        """[S, h, L, k] → [T, h, k], zero in rows that belong to nobody."""
        x = x_ShLk.transpose(1, 2).flatten(0, 1)
        return _Remap.apply(x, self.slot_of_row, self.row_used, self.row_of_slot, self.slot_used)


class _Remap(torch.autograd.Function):
    """y[i] = x[index[i]] where used[i], else 0. The map is one-to-one, so its gradient is the inverse gather."""

    @staticmethod
    def forward(ctx, x, index, used, inverse, inverse_used):
        ctx.save_for_backward(index, used, inverse, inverse_used)
        return x.index_select(0, index).masked_fill_(~used.view(-1, 1, 1), 0)

    @staticmethod
    def backward(ctx, grad):
        index, used, inverse, inverse_used = ctx.saved_tensors
        return _Remap.apply(grad.contiguous(), inverse, inverse_used, index, used), None, None, None, None
