"""How a pack falls into tiles that never span two samples, and how their rows are read and written.

A pack is S samples, then the tail: rows that belong to nobody. Segment s of the pack, rows a:b (s = S: the tail,
bounds[S]:T), owns the slots a//B + s up to b//B + s + 1, where the next one's begin. These are b//B − a//B + 1 slots,
never fewer than its ⌈(b − a)/B⌉ tiles, since b − a < (b//B + 1 − a//B)·B; in all there are T//B + S + 1. So the
number of programs is known without reading a length, and a program finds its segment by counting.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(bounds_ptr, slot, T, S, NUM_BOUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """The segment of a slot, its first and last row (int64; the last exclusive), and the tile in it.

    At most one slot a segment is left over: its tile begins at or behind the segment's end.
    """
    segments = tl.arange(0, NUM_BOUNDS)
    bounds = tl.load(bounds_ptr + segments, mask=segments <= S, other=0)
    begun = (segments <= S) & (bounds // BLOCK + segments <= slot)
    segment = tl.sum(begun.to(tl.int32), 0) - 1
    start = tl.load(bounds_ptr + segment)
    end = tl.load(bounds_ptr + segment + 1, mask=segment < S, other=T)
    return segment, start.to(tl.int64), end.to(tl.int64), slot - start // BLOCK - segment


@triton.jit
def load_rows(
    pointer, first, end, stride, BOUNDED: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Rows first:first+BLOCK of a matrix [., K], zero from column K on; where BOUNDED, from row ``end`` on too."""
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_K)
    pointers = pointer + first * stride + rows[:, None] * stride + columns[None, :]
    if BOUNDED:
        mask = (rows < (end - first).to(tl.int32))[:, None]
        if K < BLOCK_K:
            mask = mask & (columns < K)[None, :]
        x = tl.load(pointers, mask=mask, other=0.0)
    elif K < BLOCK_K:
        x = tl.load(pointers, mask=(columns < K)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def store_rows(pointer, x, first, end, stride, BLOCK: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Write x [BLOCK, BLOCK_K] to the rows from ``first`` that lie before ``end``."""
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_K)
    mask = (rows < (end - first).to(tl.int32))[:, None]
    if K < BLOCK_K:
        mask = mask & (columns < K)[None, :]
    pointers = pointer + first * stride + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, x.to(pointer.dtype.element_ty), mask=mask)
