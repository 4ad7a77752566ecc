"""Packed causal attention in Triton: forward kernel and host side (the gradients: ``kernel_backward.py``).

Shapes: T rows, S samples, H query heads in groups of GROUP that share a key/value head, K head width. Scores are kept
in base 2 (s · log₂e), so that exp and log are one instruction each.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import LN_2, LOG2_E, dot
from ..launching import Tiles, choose, launch, variant
from .kernel_backward import varlen_attention_bwd_dkv_kernel, varlen_attention_bwd_dq_kernel
from .tiling import find_tile, load_rows, store_rows


def _candidates(*choices: tuple[int, int, int, int]) -> list[Tiles]:
    """(BLOCK_M, BLOCK_N, warps, stages) each."""
    return [Tiles({"BLOCK_M": m, "BLOCK_N": n}, warps, stages) for m, n, warps, stages in choices]


CANDIDATES = {
    "varlen_attention_fwd": {
        2: _candidates(
            (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 4), (64, 32, 4, 3), (64, 32, 4, 4), (64, 64, 8, 3),
            (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3),
        ),
        4: _candidates((32, 32, 4, 2), (16, 16, 4, 1)),
    },
    "varlen_attention_bwd_dq": {
        2: _candidates(
            (64, 64, 4, 3), (64, 64, 4, 4), (64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (64, 64, 8, 3),
            (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3),
        ),
        4: _candidates((16, 32, 4, 1), (32, 32, 4, 1)),
    },
    "varlen_attention_bwd_dkv": {
        2: _candidates(
            (32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 4, 4), (32, 32, 4, 3), (64, 32, 4, 2), (64, 64, 8, 2),
            (32, 128, 8, 2), (32, 128, 8, 3),
        ),
        4: _candidates((32, 32, 8, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
    },
}  # fmt: skip

CANDIDATES_WIDE = {
    "varlen_attention_fwd": {2: _candidates((64, 64, 8, 2)), 4: _candidates((16, 32, 8, 1))},
    "varlen_attention_bwd_dq": {2: _candidates((64, 32, 8, 2)), 4: _candidates((16, 16, 8, 1))},
    "varlen_attention_bwd_dkv": {2: _candidates((32, 64, 8, 2)), 4: _candidates((16, 16, 8, 1))},
}
"""For heads wider than 64, which need more registers and shared memory."""


@triton.jit
def _attend(
    acc,
    m,
    total,
    q,
    key_ptr,
    value_ptr,
    key_stride,
    value_stride,
    start,
    end,
    row,
    first_key,
    last_key,
    scale_log2,
    DIAGONAL: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax of the queries row:row+BLOCK_M over the keys first_key:last_key, all counted in the sample."""
    for n in range(first_key, last_key, BLOCK_N):
        key = load_rows(key_ptr, start + n, end, key_stride, DIAGONAL, BLOCK_N, K, BLOCK_K)
        s = dot(q, tl.trans(key))
        if DIAGONAL:
            past = tl.arange(0, BLOCK_M)[:, None] + (row - n) >= tl.arange(0, BLOCK_N)[None, :]
            s = tl.where(past, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        value = load_rows(value_ptr, start + n, end, value_stride, DIAGONAL, BLOCK_N, K, BLOCK_K)
        total = alpha * total + tl.sum(p, 1)
        acc = alpha[:, None] * acc + dot(p.to(value.dtype), value)
        m = m_new
    return acc, m, total


@triton.jit
def varlen_attention_fwd_kernel(
    q_ptr,
    key_ptr,
    value_ptr,
    bounds_ptr,
    out_ptr,
    lse_ptr,
    q_row_stride,
    q_head_stride,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    scale_log2,
    T,
    S,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_BOUNDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = softmax(q·Kᵀ·scale)·V and the scores' logsumexp, for BLOCK_M queries of one sample and head."""
    head = (tl.program_id(0) % H).to(tl.int64)
    segment, start, end, tile = find_tile(bounds_ptr, tl.program_id(0) // H, T, S, NUM_BOUNDS, BLOCK_M)
    length = (end - start).to(tl.int32)
    row = (tl.cdiv(length, BLOCK_M) - 1 - tile) * BLOCK_M  # a sample's last tile has most to do, so it goes first
    if row < 0:
        return
    if segment == S:
        zeros = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        store_rows(out_ptr + head * K, zeros, start + row, end, H * K, BLOCK_M, K, BLOCK_K)
        return
    q = load_rows(q_ptr + head * q_head_stride, start + row, end, q_row_stride, True, BLOCK_M, K, BLOCK_K)
    key_ptr += head // GROUP * key_head_stride
    value_ptr += head // GROUP * value_head_stride
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    diagonal = row // BLOCK_N * BLOCK_N
    acc, m, total = _attend(
        acc, m, total, q, key_ptr, value_ptr, key_row_stride, value_row_stride,
        start, end, row, 0, diagonal, scale_log2, False, K, BLOCK_K, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    acc, m, total = _attend(
        acc, m, total, q, key_ptr, value_ptr, key_row_stride, value_row_stride,
        start, end, row, diagonal, tl.minimum(row + BLOCK_M, length), scale_log2, True, K, BLOCK_K, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    store_rows(out_ptr + head * K, acc / total[:, None], start + row, end, H * K, BLOCK_M, K, BLOCK_K)
    rows = row + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + head * T + start + rows, (m + tl.log2(total)) * LN_2, mask=rows < length)


def forward(q: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """out [T, h, k] and logsumexp float32 [h, T], which is not written in rows that belong to nobody."""
    num_rows, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, num_rows), dtype=torch.float32, device=q.device)
    _start(varlen_attention_fwd_kernel, "BLOCK_M", heads, q, key, value, cu_seqlens, out_ptr=out, lse_ptr=lse)
    return out, lse


def backward(
    q: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, out: Tensor, lse: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, key and value, each contiguous; zero in rows that belong to nobody."""
    d_q, d_key, d_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, key, value))
    delta = torch.empty_like(lse)
    d_out = _columns_together(d_out)
    common = {
        "lse_ptr": lse, "d_out_ptr": d_out, "delta_ptr": delta,
        "d_out_row_stride": d_out.stride(0), "d_out_head_stride": d_out.stride(1), "scale": 1 / math.sqrt(q.shape[2]),
    }  # fmt: skip
    _start(
        varlen_attention_bwd_dq_kernel, "BLOCK_M", q.shape[1], q, key, value, cu_seqlens,
        out_ptr=out, d_q_ptr=d_q, **common,
    )  # fmt: skip
    _start(
        varlen_attention_bwd_dkv_kernel, "BLOCK_N", key.shape[1], q, key, value, cu_seqlens,
        d_key_ptr=d_key, d_value_ptr=d_value, **common,
    )  # fmt: skip
    return d_q, d_key, d_value


def _start(
    kernel, block: str, heads: int, q: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, **arguments
) -> None:
    """One program a head and slot of ``block`` rows (``tiling.py``)."""
    num_rows, num_heads, width = q.shape
    group = num_heads // key.shape[1]
    q, key, value = _columns_together(q), _columns_together(key), _columns_together(value)
    name = kernel.__name__.removesuffix("_kernel")
    candidates = (CANDIDATES if width <= 64 else CANDIDATES_WIDE)[name]
    tiles = choose(name, variant(q, k=width, group=group), candidates, q)
    slots = num_rows // tiles.blocks[block] + cu_seqlens.numel()
    launch(
        kernel, slots * heads, tiles,
        q_ptr=q, key_ptr=key, value_ptr=value, bounds_ptr=cu_seqlens.contiguous(),
        q_row_stride=q.stride(0), q_head_stride=q.stride(1),
        key_row_stride=key.stride(0), key_head_stride=key.stride(1),
        value_row_stride=value.stride(0), value_head_stride=value.stride(1),
        scale_log2=LOG2_E.value / math.sqrt(width), T=num_rows, S=cu_seqlens.numel() - 1,
        H=num_heads, GROUP=group, K=width, BLOCK_K=max(16, triton.next_power_of_2(width)),
        NUM_BOUNDS=triton.next_power_of_2(cu_seqlens.numel()), **arguments,
    )  # fmt: skip


def _columns_together(x: Tensor) -> Tensor:
    """[T, h, k] whose rows and heads may lie apart, but not the columns of one."""
    return x if x.stride(2) == 1 else x.contiguous()
