"""Query attention in Triton: one program reads one head of one frame's K and V once, for all queries of that frame.

Shapes: V queries, F frames, N keys a frame, H heads, K head width. Scores are kept in base 2 (s · log₂e), so that
exp and log are one instruction each. ``offsets`` [F+1]: frame f owns the queries offsets[f]:offsets[f+1].
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import LN_2, LOG2_E, dot
from ..launching import choose, launch, tiles, variant

CANDIDATES = {
    "query_attention_fwd": {
        2: tiles("BLOCK_N", (64, 4, 2), (32, 4, 2), (32, 4, 3), (64, 4, 1), (64, 8, 2), (64, 4, 3), (128, 8, 2)),
        4: tiles("BLOCK_N", (32, 4, 1), (32, 4, 2), (16, 4, 1)),
    },
    "query_attention_bwd": {
        2: tiles("BLOCK_N", (32, 4, 2), (32, 4, 1), (32, 8, 3)),
        4: tiles("BLOCK_N", (32, 8, 1), (16, 8, 1)),
    },
}


@triton.jit
def _load_rows(pointer, rows, columns, row_stride, row_mask, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows [., BLOCK_K] of a matrix, zero outside."""
    mask = row_mask[:, None] & (columns < K)[None, :] if K < BLOCK_K else row_mask[:, None]
    return tl.load(pointer + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(pointer, x, rows, columns, row_stride, row_mask, K: tl.constexpr, BLOCK_K: tl.constexpr):
    mask = row_mask[:, None] & (columns < K)[None, :] if K < BLOCK_K else row_mask[:, None]
    tl.store(pointer + rows[:, None] * row_stride + columns[None, :], x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def query_attention_fwd_kernel(
    q_ptr,
    key_ptr,
    value_ptr,
    offsets_ptr,
    out_ptr,
    lse_ptr,
    entropy_ptr,
    key_frame_stride,
    key_row_stride,
    value_frame_stride,
    value_row_stride,
    scale_log2,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = softmax(q·Kᵀ·scale)·V, logsumexp and entropy, by one pass over the keys (online softmax).

    Beside total = Σ 2^(s−m) runs t = Σ 2^(s−m)·(s−m), and the entropy is ln 2 · (log₂ total − t/total): every term
    is small where an attention is sharp, so nothing cancels.
    """
    frame = tl.program_id(0) // H
    head = tl.program_id(0) % H
    first = tl.load(offsets_ptr + frame)
    last = tl.load(offsets_ptr + frame + 1)
    columns = tl.arange(0, BLOCK_K)
    key_ptr += frame.to(tl.int64) * key_frame_stride + head * K
    value_ptr += frame.to(tl.int64) * value_frame_stride + head * K
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        row_mask = rows < last
        q = _load_rows(q_ptr + head * K, rows, columns, H * K, row_mask, K, BLOCK_K)
        m = tl.full([BLOCK_M], -1e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        t = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for n in range(0, N, BLOCK_N):
            keys = n + tl.arange(0, BLOCK_N)
            key = _load_rows(key_ptr, keys, columns, key_row_stride, keys < N, K, BLOCK_K)
            value = _load_rows(value_ptr, keys, columns, value_row_stride, keys < N, K, BLOCK_K)
            s = tl.where((keys < N)[None, :], dot(q, tl.trans(key)) * scale_log2, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            shifted = s - m_new[:, None]
            w = tl.exp2(shifted)
            shifted = tl.where((keys < N)[None, :], shifted, 0.0)  # 0 · (−inf) is not 0
            alpha = tl.exp2(m - m_new)
            t = alpha * (t + (m - m_new) * total) + tl.sum(w * shifted, 1)
            total = alpha * total + tl.sum(w, 1)
            acc = alpha[:, None] * acc + dot(w.to(value.dtype), value)
            m = m_new
        _store_rows(out_ptr + head * K, acc / total[:, None], rows, columns, H * K, row_mask, K, BLOCK_K)
        tl.store(lse_ptr + rows * H + head, (m + tl.log2(total)) * LN_2, mask=row_mask)
        tl.store(entropy_ptr + rows * H + head, (tl.log2(total) - t / total) * LN_2, mask=row_mask)


@triton.jit
def _load_queries(
    q_ptr,
    out_ptr,
    d_out_ptr,
    lse_ptr,
    d_lse_ptr,
    entropy_ptr,
    d_entropy_ptr,
    rows,
    row_mask,
    columns,
    head,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LSE_GRAD: tl.constexpr,
    ENTROPY_GRAD: tl.constexpr,
):
    """A block of queries with what the gradient of their scores needs."""
    q = _load_rows(q_ptr + head * K, rows, columns, H * K, row_mask, K, BLOCK_K)
    out = _load_rows(out_ptr + head * K, rows, columns, H * K, row_mask, K, BLOCK_K)
    d_out = _load_rows(d_out_ptr + head * K, rows, columns, H * K, row_mask, K, BLOCK_K)
    lse = tl.load(lse_ptr + rows * H + head, mask=row_mask, other=float("inf"))  # unused rows: every weight is 0
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    if LSE_GRAD:
        delta -= tl.load(d_lse_ptr + rows * H + head, mask=row_mask, other=0.0)
    entropy = tl.zeros_like(delta)
    d_entropy = tl.zeros_like(delta)
    if ENTROPY_GRAD:
        entropy = tl.load(entropy_ptr + rows * H + head, mask=row_mask, other=0.0)
        d_entropy = tl.load(d_entropy_ptr + rows * H + head, mask=row_mask, other=0.0)
    return q, d_out, lse * LOG2_E, delta, entropy, d_entropy


@triton.jit
def _weights_and_score_gradient(
    q, d_out, lse_log2, delta, entropy, d_entropy, key, value, key_mask, scale_log2, scale, ENTROPY_GRAD: tl.constexpr
):
    """p [BLOCK_M, BLOCK_N], and the gradient of q·k: scale · p · (dp − δ − dH · (log p + H))."""
    log2_p = dot(q, tl.trans(key)) * scale_log2 - lse_log2[:, None]
    log2_p = tl.where(key_mask[None, :], log2_p, float("-inf"))
    p = tl.exp2(log2_p)
    d_s = dot(d_out, tl.trans(value)) - delta[:, None]
    if ENTROPY_GRAD:
        log_p = tl.where(p > 0, log2_p * LN_2, 0.0)
        d_s -= d_entropy[:, None] * (log_p + entropy[:, None])
    return p.to(value.dtype), (p * d_s * scale).to(key.dtype)


@triton.jit
def query_attention_bwd_kernel(
    q_ptr,
    key_ptr,
    value_ptr,
    offsets_ptr,
    out_ptr,
    lse_ptr,
    entropy_ptr,
    d_out_ptr,
    d_lse_ptr,
    d_entropy_ptr,
    d_q_ptr,
    d_key_ptr,
    d_value_ptr,
    key_frame_stride,
    key_row_stride,
    value_frame_stride,
    value_row_stride,
    scale_log2,
    scale,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LSE_GRAD: tl.constexpr,
    ENTROPY_GRAD: tl.constexpr,
    KV_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq, dK, dV: a program owns all of its frame and head, so every value is written once, by one program.

    Up to BLOCK_M queries a frame, which is the usual case, are served by one pass over the keys. More of them take a
    pass for dK and dV and one for dq; the second finds K and V in cache.
    """
    frame = tl.program_id(0) // H
    head = tl.program_id(0) % H
    first = tl.load(offsets_ptr + frame)
    last = tl.load(offsets_ptr + frame + 1)
    columns = tl.arange(0, BLOCK_K)
    key_ptr += frame.to(tl.int64) * key_frame_stride + head * K
    value_ptr += frame.to(tl.int64) * value_frame_stride + head * K
    d_key_ptr += frame.to(tl.int64) * N * H * K + head * K
    d_value_ptr += frame.to(tl.int64) * N * H * K + head * K
    d_q_ptr += head * K
    if last - first <= BLOCK_M:
        rows = first + tl.arange(0, BLOCK_M)
        row_mask = rows < last
        q, d_out, lse, delta, entropy, d_entropy = _load_queries(
            q_ptr, out_ptr, d_out_ptr, lse_ptr, d_lse_ptr, entropy_ptr, d_entropy_ptr,
            rows, row_mask, columns, head, H, K, BLOCK_K, LSE_GRAD, ENTROPY_GRAD,
        )  # fmt: skip
        d_q = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for n in range(0, N, BLOCK_N):
            keys = n + tl.arange(0, BLOCK_N)
            looked_at = (keys < N) & (first < last)  # of a frame that nobody looks at, nothing is read
            key = _load_rows(key_ptr, keys, columns, key_row_stride, looked_at, K, BLOCK_K)
            value = _load_rows(value_ptr, keys, columns, value_row_stride, looked_at, K, BLOCK_K)
            p, d_s = _weights_and_score_gradient(
                q, d_out, lse, delta, entropy, d_entropy, key, value, keys < N, scale_log2, scale, ENTROPY_GRAD
            )
            if KV_GRAD:
                _store_rows(d_value_ptr, dot(tl.trans(p), d_out), keys, columns, H * K, keys < N, K, BLOCK_K)
                _store_rows(d_key_ptr, dot(tl.trans(d_s), q), keys, columns, H * K, keys < N, K, BLOCK_K)
            d_q += dot(d_s, key)
        _store_rows(d_q_ptr, d_q, rows, columns, H * K, row_mask, K, BLOCK_K)
    else:
        for n in range(0, N if KV_GRAD else 0, BLOCK_N):
            keys = n + tl.arange(0, BLOCK_N)
            key = _load_rows(key_ptr, keys, columns, key_row_stride, keys < N, K, BLOCK_K)
            value = _load_rows(value_ptr, keys, columns, value_row_stride, keys < N, K, BLOCK_K)
            d_key = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            d_value = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            for start in range(first, last, BLOCK_M):
                rows = start + tl.arange(0, BLOCK_M)
                q, d_out, lse, delta, entropy, d_entropy = _load_queries(
                    q_ptr, out_ptr, d_out_ptr, lse_ptr, d_lse_ptr, entropy_ptr, d_entropy_ptr,
                    rows, rows < last, columns, head, H, K, BLOCK_K, LSE_GRAD, ENTROPY_GRAD,
                )  # fmt: skip
                p, d_s = _weights_and_score_gradient(
                    q, d_out, lse, delta, entropy, d_entropy, key, value, keys < N, scale_log2, scale, ENTROPY_GRAD
                )
                d_value += dot(tl.trans(p), d_out)
                d_key += dot(tl.trans(d_s), q)
            _store_rows(d_value_ptr, d_value, keys, columns, H * K, keys < N, K, BLOCK_K)
            _store_rows(d_key_ptr, d_key, keys, columns, H * K, keys < N, K, BLOCK_K)
        for start in range(first, last, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            row_mask = rows < last
            q, d_out, lse, delta, entropy, d_entropy = _load_queries(
                q_ptr, out_ptr, d_out_ptr, lse_ptr, d_lse_ptr, entropy_ptr, d_entropy_ptr,
                rows, row_mask, columns, head, H, K, BLOCK_K, LSE_GRAD, ENTROPY_GRAD,
            )  # fmt: skip
            d_q = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            for n in range(0, N, BLOCK_N):
                keys = n + tl.arange(0, BLOCK_N)
                key = _load_rows(key_ptr, keys, columns, key_row_stride, keys < N, K, BLOCK_K)
                value = _load_rows(value_ptr, keys, columns, value_row_stride, keys < N, K, BLOCK_K)
                _, d_s = _weights_and_score_gradient(
                    q, d_out, lse, delta, entropy, d_entropy, key, value, keys < N, scale_log2, scale, ENTROPY_GRAD
                )
                d_q += dot(d_s, key)
            _store_rows(d_q_ptr, d_q, rows, columns, H * K, row_mask, K, BLOCK_K)


def forward(q: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out [V, h, k], logsumexp and entropy float32 [V, h]; ``offsets`` int32 [F+1]."""
    q, key, value = q.contiguous(), _heads_together(key), _heads_together(value)
    out = torch.empty_like(q)
    lse, entropy = (torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) for _ in range(2))
    _start(query_attention_fwd_kernel, q, key, value, offsets, out_ptr=out, lse_ptr=lse, entropy_ptr=entropy)
    return out, lse, entropy


def backward(
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
    """Gradients of q, key and value, each contiguous; absent upstream gradients cost nothing.

    Without ``kv_grad`` (a frozen encoder) those of key and value are neither computed nor written, and come back empty.
    """
    q, key, value = q.contiguous(), _heads_together(key), _heads_together(value)
    d_q = torch.empty_like(q)
    d_key, d_value = (torch.empty(key.shape if kv_grad else 0, dtype=q.dtype, device=q.device) for _ in range(2))
    _start(
        query_attention_bwd_kernel, q, key, value, offsets,
        out_ptr=out, lse_ptr=lse, entropy_ptr=entropy,
        d_out_ptr=d_out.contiguous(),
        d_lse_ptr=lse if d_lse is None else d_lse.contiguous(),
        d_entropy_ptr=entropy if d_entropy is None else d_entropy.contiguous(),
        d_q_ptr=d_q, d_key_ptr=d_key, d_value_ptr=d_value,
        scale=1 / math.sqrt(q.shape[2]), LSE_GRAD=d_lse is not None, ENTROPY_GRAD=d_entropy is not None,
        KV_GRAD=kv_grad,
    )  # fmt: skip
    return d_q, d_key, d_value


def _start(kernel, q: Tensor, key: Tensor, value: Tensor, offsets: Tensor, **arguments) -> None:
    num_queries, heads, width = q.shape
    num_frames, num_keys = key.shape[:2]
    name = kernel.__name__.removesuffix("_kernel")
    # room for the average frame's queries and then some; frames with more take another turn
    most = 32 if q.element_size() == 2 and width <= 64 else 16  # larger tiles spill registers
    block_m = min(most, max(16, triton.next_power_of_2(triton.cdiv(2 * num_queries, max(num_frames, 1)))))
    key_of_tiles = variant(q, k=width, m=block_m)
    candidates = CANDIDATES[name]
    if width > 64:  # beside such rows only the narrowest block of fp32 keys has registers
        candidates = candidates | {4: candidates[4][-1:]}
    launch(
        kernel, num_frames * heads, choose(name, key_of_tiles, candidates, q),
        q_ptr=q, key_ptr=key, value_ptr=value, offsets_ptr=offsets.contiguous(),
        key_frame_stride=key.stride(0), key_row_stride=key.stride(1),
        value_frame_stride=value.stride(0), value_row_stride=value.stride(1),
        scale_log2=LOG2_E.value / math.sqrt(width), N=num_keys, H=heads, K=width,
        BLOCK_K=max(16, triton.next_power_of_2(width)), BLOCK_M=block_m, **arguments,
    )  # fmt: skip


def _heads_together(x: Tensor) -> Tensor:
    """[F, N, h, k] whose frames and rows may lie apart, but not the heads of a row."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()
