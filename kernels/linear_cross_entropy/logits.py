"""A tile of logits: which one it is, the product itself, and the labels it may hold.

A *position* is a place in ``order``, which lists the rows that have a label first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..device import LOG2_E, dot

GROUP = tl.constexpr(16)


@triton.jit
def find_tile(index, row_tiles, vocab_tiles):
    """Row and vocabulary tile number ``index``: GROUP row tiles take a vocabulary tile one after the other, from L2."""
    within = index % (vocab_tiles * GROUP)
    first = index // (vocab_tiles * GROUP) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    return first + within % size, within // size


@triton.jit
def load_labels(labels_ptr, rows, V):
    """Labels as int32; −1, which equals no entry, where one lies outside the vocabulary."""
    labels = tl.load(labels_ptr + rows)
    return tl.where((labels >= 0) & (labels < V), labels, -1).to(tl.int32)


@triton.jit
def logits(
    hidden_ptr,
    weight_ptr,
    order_ptr,
    num_rows,
    position,
    entry,
    end,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The rows at the positions from ``position`` on, and their logits · log₂e for the entries from ``entry`` on.

    From ``num_rows`` and ``end`` on, the last row and the last entry are repeated, so that loads need no mask.
    """
    rows = tl.load(order_ptr + tl.minimum(position + tl.arange(0, BLOCK_M), num_rows - 1))
    hidden_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * D
    weight_ptr += entry.to(tl.int64) * D
    weight_offsets = tl.minimum(tl.arange(0, BLOCK_V), end - 1 - entry)[:, None] * D
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        hidden = _load_columns(hidden_ptrs + columns[None, :], columns, D, BLOCK_D)
        weight = _load_columns(weight_ptr + (weight_offsets + columns[None, :]), columns, D, BLOCK_D)
        acc += dot(hidden, tl.trans(weight))
    return rows, acc * LOG2_E


@triton.jit
def _load_columns(pointers, columns, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zero beyond D."""
    if D % BLOCK_D == 0:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    return x
