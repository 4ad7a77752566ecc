"""Gradients of packed causal attention in Triton: a kernel for dq, one for dK and dV, no atomics: runs repeat exactly.

With p = softmax(s·scale), s = q·Kᵀ:  dV = pᵀ·dout,  ds = p·(dout·Vᵀ − δ),  δ = Σ out·dout,  dq = scale·ds·K,
dK = scale·dsᵀ·q. Shapes as in ``kernel.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..device import LOG2_E, dot
from .tiling import find_tile, load_rows, store_rows


@triton.jit
def _add_to_dq(
    d_q,
    q,
    d_out,
    lse_log2,
    delta,
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
    """What the keys first_key:last_key add to dq / scale of the queries from ``row`` on."""
    for n in range(first_key, last_key, BLOCK_N):
        key = load_rows(key_ptr, start + n, end, key_stride, DIAGONAL, BLOCK_N, K, BLOCK_K)
        value = load_rows(value_ptr, start + n, end, value_stride, DIAGONAL, BLOCK_N, K, BLOCK_K)
        log2_p = dot(q, tl.trans(key)) * scale_log2 - lse_log2[:, None]
        if DIAGONAL:
            past = tl.arange(0, BLOCK_M)[:, None] + (row - n) >= tl.arange(0, BLOCK_N)[None, :]
            log2_p = tl.where(past, log2_p, float("-inf"))
        d_s = tl.exp2(log2_p) * (dot(d_out, tl.trans(value)) - delta[:, None])
        d_q += dot(d_s.to(key.dtype), key)
    return d_q


@triton.jit
def varlen_attention_bwd_dq_kernel(
    q_ptr,
    key_ptr,
    value_ptr,
    bounds_ptr,
    out_ptr,
    lse_ptr,
    d_out_ptr,
    delta_ptr,
    d_q_ptr,
    q_row_stride,
    q_head_stride,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    d_out_row_stride,
    d_out_head_stride,
    scale_log2,
    scale,
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
    """dq of BLOCK_M queries of one sample and head, and their δ for the other kernel."""
    head = (tl.program_id(0) % H).to(tl.int64)
    segment, start, end, tile = find_tile(bounds_ptr, tl.program_id(0) // H, T, S, NUM_BOUNDS, BLOCK_M)
    length = (end - start).to(tl.int32)
    row = (tl.cdiv(length, BLOCK_M) - 1 - tile) * BLOCK_M  # a sample's last tile has most to do, so it goes first
    if row < 0:
        return
    d_q = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    if segment == S:
        store_rows(d_q_ptr + head * K, d_q, start + row, end, H * K, BLOCK_M, K, BLOCK_K)
        return
    first = start + row
    q = load_rows(q_ptr + head * q_head_stride, first, end, q_row_stride, True, BLOCK_M, K, BLOCK_K)
    d_out = load_rows(d_out_ptr + head * d_out_head_stride, first, end, d_out_row_stride, True, BLOCK_M, K, BLOCK_K)
    out = load_rows(out_ptr + head * K, first, end, H * K, True, BLOCK_M, K, BLOCK_K)
    rows = row + tl.arange(0, BLOCK_M)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + head * T + start + rows, delta, mask=rows < length)
    lse_log2 = tl.load(lse_ptr + head * T + start + rows, mask=rows < length, other=0.0) * LOG2_E
    key_ptr += head // GROUP * key_head_stride
    value_ptr += head // GROUP * value_head_stride
    diagonal = row // BLOCK_N * BLOCK_N
    d_q = _add_to_dq(
        d_q, q, d_out, lse_log2, delta, key_ptr, value_ptr, key_row_stride, value_row_stride,
        start, end, row, 0, diagonal, scale_log2, False, K, BLOCK_K, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    d_q = _add_to_dq(
        d_q, q, d_out, lse_log2, delta, key_ptr, value_ptr, key_row_stride, value_row_stride,
        start, end, row, diagonal, tl.minimum(row + BLOCK_M, length), scale_log2, True, K, BLOCK_K, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    store_rows(d_q_ptr + head * K, d_q * scale, first, end, H * K, BLOCK_M, K, BLOCK_K)


@triton.jit
def varlen_attention_bwd_dkv_kernel(
    q_ptr,
    key_ptr,
    value_ptr,
    bounds_ptr,
    lse_ptr,
    d_out_ptr,
    delta_ptr,
    d_key_ptr,
    d_value_ptr,
    q_row_stride,
    q_head_stride,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    d_out_row_stride,
    d_out_head_stride,
    scale_log2,
    scale,
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
    """dK and dV of BLOCK_N keys of one sample and key/value head.

    One flat loop over the blocks of queries of every head of the group, each of them masked: loops of their own for
    diagonal and heads take up to 90 registers more, and with them resident blocks.
    """
    H_KV: tl.constexpr = H // GROUP
    kv_head = (tl.program_id(0) % H_KV).to(tl.int64)
    segment, start, end, tile = find_tile(bounds_ptr, tl.program_id(0) // H_KV, T, S, NUM_BOUNDS, BLOCK_N)
    length = (end - start).to(tl.int32)
    first_key = tile * BLOCK_N
    if first_key >= length:
        return
    first = start + first_key
    d_key = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    d_value = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if segment == S:
        store_rows(d_key_ptr + kv_head * K, d_key, first, end, H_KV * K, BLOCK_N, K, BLOCK_K)
        store_rows(d_value_ptr + kv_head * K, d_value, first, end, H_KV * K, BLOCK_N, K, BLOCK_K)
        return
    key = load_rows(key_ptr + kv_head * key_head_stride, first, end, key_row_stride, True, BLOCK_N, K, BLOCK_K)
    value = load_rows(value_ptr + kv_head * value_head_stride, first, end, value_row_stride, True, BLOCK_N, K, BLOCK_K)
    keys = tl.arange(0, BLOCK_N)
    blocks = tl.cdiv(length - first_key, BLOCK_M)
    for i in range(blocks * GROUP):
        head = kv_head * GROUP + i // blocks
        behind = i % blocks * BLOCK_M  # by how much this block's first query lies behind the first key
        row = first + behind
        q = load_rows(q_ptr + head * q_head_stride, row, end, q_row_stride, True, BLOCK_M, K, BLOCK_K)
        d_out = load_rows(d_out_ptr + head * d_out_head_stride, row, end, d_out_row_stride, True, BLOCK_M, K, BLOCK_K)
        rows = tl.arange(0, BLOCK_M)
        inside = rows < (end - row).to(tl.int32)  # past the end p is wrong, but meets q, dout and δ that are 0
        lse = tl.load(lse_ptr + head * T + row + rows, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + head * T + row + rows, mask=inside, other=0.0)
        log2_p = dot(key, tl.trans(q)) * scale_log2 - (lse * LOG2_E)[None, :]
        p = tl.exp2(tl.where((rows + behind)[None, :] >= keys[:, None], log2_p, float("-inf")))
        d_value += dot(p.to(d_out.dtype), d_out)
        d_s = p * (dot(value, tl.trans(d_out)) - delta[None, :])
        d_key += dot(d_s.to(q.dtype), q)
    store_rows(d_key_ptr + kv_head * K, d_key * scale, first, end, H_KV * K, BLOCK_N, K, BLOCK_K)
    store_rows(d_value_ptr + kv_head * K, d_value, first, end, H_KV * K, BLOCK_N, K, BLOCK_K)
