"""Gradients of head and cross-entropy in Triton, some vocabulary entries first:first+count at a time.

First d_logits of these entries, by position, with the logits computed again; then from them dW of these entries,
complete, and what they add to dH. dH is kept by position in float32 and scattered to its rows at the end. Shapes as in
``kernel.py``.

To form the gradients in the forward pass would save one of four products, but for the plain sum alone (DPO's factors
are not known yet), and the weight's gradient would be read and written in float32 for each block of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..device import dot
from .logits import find_tile, load_labels, logits


@triton.jit
def linear_cross_entropy_logits_bwd_kernel(
    hidden_ptr,
    weight_ptr,
    labels_ptr,
    order_ptr,
    num_rows_ptr,
    lse_ptr,
    d_logprobs_ptr,
    d_logits_ptr,
    first,
    count,
    stride,
    V,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """d_logits = upstream · (onehot − softmax) [R, count], the rows ``stride`` apart."""
    num_rows = tl.load(num_rows_ptr)
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    vocab_tiles = tl.cdiv(count, BLOCK_V)
    for index in range(tl.program_id(0), row_tiles * vocab_tiles, tl.num_programs(0)):
        row_tile, vocab_tile = find_tile(index, row_tiles, vocab_tiles)
        positions = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        entries = vocab_tile * BLOCK_V + tl.arange(0, BLOCK_V)
        rows, s = logits(
            hidden_ptr, weight_ptr, order_ptr, num_rows, row_tile * BLOCK_M,
            first + vocab_tile * BLOCK_V, first + count, D, BLOCK_M, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        lse = tl.load(lse_ptr + positions, mask=positions < num_rows, other=float("inf"))  # other rows: p = 0
        onehot = (load_labels(labels_ptr, rows, V) - first)[:, None] == entries[None, :]
        d_logits = tl.load(d_logprobs_ptr + rows)[:, None] * (tl.where(onehot, 1.0, 0.0) - tl.exp2(s - lse[:, None]))
        tl.store(
            d_logits_ptr + (positions.to(tl.int64) * stride)[:, None] + entries[None, :],
            d_logits.to(d_logits_ptr.dtype.element_ty),
            mask=(positions < num_rows)[:, None] & (entries < count)[None, :],
        )


@triton.jit
def linear_cross_entropy_bwd_kernel(
    d_logits_ptr,
    hidden_ptr,
    weight_ptr,
    order_ptr,
    num_rows_ptr,
    d_weight_ptr,
    d_hidden_ptr,
    first,
    count,
    stride,
    D: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """dW of the entries, and what they add to dH; a program owns BLOCK_A entries or rows, and BLOCK_D columns.

    Both in one launch, since neither fills a GPU alone; dW's programs, which take longest, come first.
    """
    num_rows = tl.load(num_rows_ptr)
    tile = tl.program_id(0) // tl.cdiv(D, BLOCK_D)
    columns = tl.program_id(0) % tl.cdiv(D, BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    weight_tiles = tl.cdiv(count, BLOCK_A) if WEIGHT_GRAD else 0
    start = tl.where(tile < weight_tiles, tile, tile - weight_tiles) * BLOCK_A
    if tile < weight_tiles:
        _write_weight_gradient(
            d_logits_ptr, hidden_ptr, order_ptr, d_weight_ptr, num_rows, first, count, stride, start, columns,
            D, BLOCK_A, BLOCK_D, BLOCK_I,
        )  # fmt: skip
    elif start < num_rows:
        _add_hidden_gradient(
            d_logits_ptr, weight_ptr, d_hidden_ptr, num_rows, first, count, stride, start, columns,
            D, BLOCK_A, BLOCK_I,
        )  # fmt: skip


@triton.jit
def _write_weight_gradient(
    d_logits_ptr,
    hidden_ptr,
    order_ptr,
    d_weight_ptr,
    num_rows,
    first,
    count,
    stride,
    start,
    columns,
    D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """A tile of dW: the sum over all labelled rows."""
    inside = start + tl.arange(0, BLOCK_A) < count
    # 64 bits for a tile's corner, 32 within it: pointers cost registers
    d_logits_ptrs = d_logits_ptr + start + tl.arange(0, BLOCK_I)[:, None] * stride + tl.arange(0, BLOCK_A)[None, :]
    acc = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
    for i in range(0, num_rows, BLOCK_I):
        labelled = tl.arange(0, BLOCK_I) < num_rows - i
        rows = tl.load(order_ptr + i + tl.arange(0, BLOCK_I), mask=labelled, other=0)
        d_logits = tl.load(d_logits_ptrs, mask=labelled[:, None] & inside[None, :], other=0.0)
        hidden = tl.load(
            hidden_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :],
            mask=labelled[:, None] & (columns < D)[None, :], other=0.0,
        )  # fmt: skip
        acc += dot(tl.trans(d_logits), hidden)
        d_logits_ptrs += stride * BLOCK_I
    d_weight_ptr += (first + start).to(tl.int64) * D
    tl.store(
        d_weight_ptr + tl.arange(0, BLOCK_A)[:, None] * D + columns[None, :],
        acc.to(d_weight_ptr.dtype.element_ty), mask=inside[:, None] & (columns < D)[None, :],
    )  # fmt: skip


@triton.jit
def _add_hidden_gradient(
    d_logits_ptr,
    weight_ptr,
    d_hidden_ptr,
    num_rows,
    first,
    count,
    stride,
    start,
    columns,
    D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """A tile of dH: what earlier entries gave, and the sum over these."""
    offsets = tl.arange(0, BLOCK_A)
    mask = (offsets < num_rows - start)[:, None] & (columns < D)[None, :]
    d_hidden_ptrs = d_hidden_ptr + start.to(tl.int64) * D + offsets[:, None] * D + columns[None, :]
    d_logits_ptr += start.to(tl.int64) * stride
    d_logits_offsets = tl.minimum(offsets, num_rows - 1 - start)[:, None] * stride + tl.arange(0, BLOCK_I)[None, :]
    weight_ptr += first.to(tl.int64) * D
    weight_offsets = tl.arange(0, BLOCK_I)[:, None] * D + columns[None, :]
    acc = tl.load(d_hidden_ptrs, mask=mask & (first > 0), other=0.0)
    for i in range(0, count, BLOCK_I):
        inside = tl.arange(0, BLOCK_I) < count - i
        d_logits = tl.load(d_logits_ptr + i + d_logits_offsets, mask=inside[None, :], other=0.0)
        weight = tl.load(weight_ptr + weight_offsets, mask=inside[:, None] & (columns < D)[None, :], other=0.0)
        acc += dot(d_logits, weight)
        weight_ptr += D * BLOCK_I
    tl.store(d_hidden_ptrs, acc, mask=mask)


@triton.jit
def linear_cross_entropy_scatter_kernel(
    sums_ptr, order_ptr, num_rows_ptr, d_hidden_ptr, K, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """dH from positions to rows; zero where there is no label."""
    positions = tl.program_id(0) // tl.cdiv(D, BLOCK_D) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % tl.cdiv(D, BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (positions < K)[:, None] & (columns < D)[None, :]
    rows = tl.load(order_ptr + positions, mask=positions < K, other=0)
    labelled = (positions < tl.load(num_rows_ptr))[:, None]
    sums = tl.load(sums_ptr + positions.to(tl.int64)[:, None] * D + columns[None, :], mask=mask & labelled, other=0.0)
    tl.store(
        d_hidden_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :],
        sums.to(d_hidden_ptr.dtype.element_ty), mask=mask,
    )  # fmt: skip
