"""Head and cross-entropy in Triton: only labelled rows are computed, and the forward pass keeps no logits.

Shapes: K rows of which R carry a label, d width, V vocabulary. ``order`` int32 [K] lists the labelled rows first and
``num_rows`` int32 [1] holds R: both stay on the device, and products stop at R. A *position* is a place in ``order``.
Logits are kept in base 2 (s · log₂e), so that exp and log are one instruction each.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import LN_2
from ..launching import Tiles, choose, launch, variant
from .kernel_backward import (
    linear_cross_entropy_bwd_kernel,
    linear_cross_entropy_logits_bwd_kernel,
    linear_cross_entropy_scatter_kernel,
)
from .logits import find_tile, load_labels, logits

MERGE = Tiles({"BLOCK_M": 32, "BLOCK_T": 64}, 4, 1)
SCATTER = Tiles({"BLOCK_M": 8, "BLOCK_D": 256}, 4, 1)
PROGRAMS_PER_MULTIPROCESSOR = 12  # whole turns, whether 1, 2, 3 or 4 programs fit at once
CHUNK = 256  # entries of a chunk are a multiple of this, so that tiles and rows of d_logits are aligned


def _tiles(blocks: str, *choices: tuple[int, int, int, int, int]) -> list[Tiles]:
    """(a size for each of the blocks, warps, stages) each."""
    return [Tiles(dict(zip(blocks.split(), sizes, strict=True)), warps, stages) for *sizes, warps, stages in choices]


_LOGITS, _GRADIENTS = "BLOCK_M BLOCK_V BLOCK_D", "BLOCK_A BLOCK_D BLOCK_I"
CANDIDATES = {
    "linear_cross_entropy_fwd": {
        2: _tiles(
            _LOGITS, (128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3),
            (256, 128, 64, 8, 3),
        ),
        4: _tiles(_LOGITS, (64, 64, 32, 4, 2), (64, 128, 32, 8, 2), (128, 64, 32, 8, 2)),
    },
    "linear_cross_entropy_logits_bwd": {
        2: _tiles(
            _LOGITS, (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 256, 64, 8, 3),
            (128, 64, 64, 4, 4), (64, 128, 64, 4, 3),
        ),
        4: _tiles(_LOGITS, (64, 64, 32, 4, 2), (64, 128, 32, 8, 2), (128, 64, 32, 8, 2)),
    },
    "linear_cross_entropy_bwd": {
        2: _tiles(
            _GRADIENTS, (128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4),
            (256, 64, 64, 8, 3),
        ),
        4: _tiles(_GRADIENTS, (64, 64, 32, 4, 2), (64, 128, 32, 8, 2), (128, 64, 32, 8, 2)),
    },
}  # fmt: skip


@triton.jit
def linear_cross_entropy_fwd_kernel(
    hidden_ptr,
    weight_ptr,
    labels_ptr,
    order_ptr,
    num_rows_ptr,
    max_ptr,
    total_ptr,
    logit_ptr,
    K,
    V,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of every tile of logits: each row's maximum m and Σ 2^(s−m) [vocabulary tiles, K], and the label's logit [K]."""
    num_rows = tl.load(num_rows_ptr)
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    vocab_tiles = tl.cdiv(V, BLOCK_V)
    # tiles in turns, not a program each: where few rows are labelled, most programs would start only to end
    for index in range(tl.program_id(0), row_tiles * vocab_tiles, tl.num_programs(0)):
        row_tile, vocab_tile = find_tile(index, row_tiles, vocab_tiles)
        positions = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tl.arange(0, BLOCK_V)
        start = vocab_tile * BLOCK_V
        rows, s = logits(
            hidden_ptr, weight_ptr, order_ptr, num_rows, row_tile * BLOCK_M, start, V, D, BLOCK_M, BLOCK_V, BLOCK_D
        )
        label = load_labels(labels_ptr, rows, V) - start
        logit = tl.sum(tl.where(label[:, None] == columns[None, :], s, 0.0), 1)
        tl.store(logit_ptr + positions, logit, mask=(positions < num_rows) & (label >= 0) & (label < BLOCK_V))
        s = tl.where((start + columns < V)[None, :], s, float("-inf"))
        m = tl.max(s, 1)
        partial = vocab_tile.to(tl.int64) * K + positions
        tl.store(max_ptr + partial, m, mask=positions < num_rows)
        tl.store(total_ptr + partial, tl.sum(tl.exp2(s - m[:, None]), 1), mask=positions < num_rows)


@triton.jit
def linear_cross_entropy_merge_kernel(
    max_ptr,
    total_ptr,
    logit_ptr,
    labels_ptr,
    order_ptr,
    num_rows_ptr,
    lse_ptr,
    logprobs_ptr,
    K,
    V,
    num_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """lse in base 2, by position, and log p of the label, by row; both 0 where there is no label."""
    num_rows = tl.load(num_rows_ptr)
    positions = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    labelled = positions < num_rows
    m = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.where(labelled, 0.0, 1.0)
    if tl.program_id(0) * BLOCK_M < num_rows:
        for start in range(0, num_tiles, BLOCK_T):
            tiles = start + tl.arange(0, BLOCK_T)
            mask = (tiles < num_tiles)[:, None] & labelled[None, :]
            partial = tiles.to(tl.int64)[:, None] * K + positions[None, :]
            tile_max = tl.load(max_ptr + partial, mask=mask, other=float("-inf"))
            tile_total = tl.load(total_ptr + partial, mask=mask, other=0.0)
            m_new = tl.maximum(m, tl.max(tile_max, 0))
            total = total * tl.exp2(m - m_new) + tl.sum(tile_total * tl.exp2(tile_max - m_new[None, :]), 0)
            m = m_new
    lse = tl.where(labelled, m + tl.log2(total), 0.0)
    rows = tl.load(order_ptr + positions, mask=positions < K, other=0)
    known = labelled & (load_labels(labels_ptr, rows, V) >= 0)
    logit = tl.load(logit_ptr + positions, mask=known, other=float("-inf"))
    tl.store(lse_ptr + positions, lse, mask=positions < K)
    tl.store(logprobs_ptr + rows, tl.where(labelled, (logit - lse) * LN_2, 0.0), mask=positions < K)


def forward(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p of each label float32 [K]; for the backward pass lse float32 [K], order int32 [K], num_rows int32 [1]."""
    hidden, weight, labels = hidden.contiguous(), weight.contiguous(), labels.contiguous()
    (size, width), vocabulary = hidden.shape, len(weight)
    order = (labels == -100).to(torch.uint8).argsort(stable=True).to(torch.int32)
    num_rows = (labels != -100).sum(dtype=torch.int32).view(1)
    tiles = _choose(linear_cross_entropy_fwd_kernel, hidden)
    num_tiles = triton.cdiv(vocabulary, tiles.blocks["BLOCK_V"])
    tile_max, tile_total = (_float32(hidden, num_tiles, size) for _ in range(2))
    logit, lse, logprobs = (_float32(hidden, size) for _ in range(3))
    common = {
        "labels_ptr": labels, "order_ptr": order, "num_rows_ptr": num_rows, "K": size, "V": vocabulary,
        "max_ptr": tile_max, "total_ptr": tile_total, "logit_ptr": logit,
    }  # fmt: skip
    launch(
        linear_cross_entropy_fwd_kernel, _programs(triton.cdiv(size, tiles.blocks["BLOCK_M"]) * num_tiles, hidden),
        tiles, hidden_ptr=hidden, weight_ptr=weight, D=width, **common,
    )  # fmt: skip
    launch(
        linear_cross_entropy_merge_kernel, triton.cdiv(size, MERGE.blocks["BLOCK_M"]), MERGE,
        lse_ptr=lse, logprobs_ptr=logprobs, num_tiles=num_tiles, **common,
    )  # fmt: skip
    return logprobs, lse, order, num_rows


def backward(
    d_logprobs: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    order: Tensor,
    num_rows: Tensor,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight; one that is not wanted costs nothing and comes back empty."""
    hidden, weight = hidden.contiguous(), weight.contiguous()
    (size, width), vocabulary = hidden.shape, len(weight)
    at_once = entries_at_once(size, vocabulary, width, hidden.element_size())
    d_logits = torch.empty((size, at_once), dtype=hidden.dtype, device=hidden.device)
    d_weight = torch.empty(weight.shape if weight_grad else 0, dtype=weight.dtype, device=weight.device)
    sums = _float32(hidden, size if hidden_grad else 0, width)
    common = {"hidden_ptr": hidden, "weight_ptr": weight, "d_logits_ptr": d_logits, "stride": at_once, "D": width}
    rows = {"order_ptr": order, "num_rows_ptr": num_rows}
    upstream = {"labels_ptr": labels.contiguous(), "lse_ptr": lse, "d_logprobs_ptr": d_logprobs.contiguous()}
    for first in range(0, vocabulary, at_once):
        count = min(at_once, vocabulary - first)
        tiles = _choose(linear_cross_entropy_logits_bwd_kernel, hidden)
        num_tiles = triton.cdiv(size, tiles.blocks["BLOCK_M"]) * triton.cdiv(count, tiles.blocks["BLOCK_V"])
        launch(
            linear_cross_entropy_logits_bwd_kernel, _programs(num_tiles, hidden), tiles,
            first=first, count=count, V=vocabulary, **rows, **upstream, **common,
        )  # fmt: skip
        tiles = _choose(linear_cross_entropy_bwd_kernel, hidden)
        along = (count if weight_grad else 0, size if hidden_grad else 0)
        num_tiles = sum(triton.cdiv(length, tiles.blocks["BLOCK_A"]) for length in along)
        launch(
            linear_cross_entropy_bwd_kernel, num_tiles * triton.cdiv(width, tiles.blocks["BLOCK_D"]), tiles,
            d_weight_ptr=d_weight, d_hidden_ptr=sums, first=first, count=count, WEIGHT_GRAD=weight_grad,
            **rows, **common,
        )  # fmt: skip
    del d_logits, common  # before dH needs memory
    d_hidden = torch.empty(hidden.shape if hidden_grad else 0, dtype=hidden.dtype, device=hidden.device)
    if hidden_grad:
        num_tiles = triton.cdiv(size, SCATTER.blocks["BLOCK_M"]) * triton.cdiv(width, SCATTER.blocks["BLOCK_D"])
        launch(
            linear_cross_entropy_scatter_kernel, num_tiles, SCATTER,
            sums_ptr=sums, d_hidden_ptr=d_hidden, K=size, D=width, **rows,
        )  # fmt: skip
    return d_hidden, d_weight


def entries_at_once(size: int, vocabulary: int, width: int, itemsize: int) -> int:
    """Of how many vocabulary entries the backward pass holds d_logits, for all K rows.

    With dH's float32 sums these take a twentieth of what float32 logits would, or 64 MiB where that is more; but they
    are never so few that their tiles would not be worth a launch.
    """
    room = max(size * vocabulary * 4 // 20, 64 * 2**20) - size * width * 4
    entries = room // (max(size, 1) * itemsize) // CHUNK * CHUNK
    return min(max(entries, 2 * CHUNK), triton.cdiv(vocabulary, CHUNK) * CHUNK)


def _choose(kernel, hidden: Tensor) -> Tiles:
    name = kernel.__name__.removesuffix("_kernel")
    return choose(name, variant(hidden, d=hidden.shape[1]), CANDIDATES[name], hidden)


def _float32(like: Tensor, *size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


def _programs(num_tiles: int, probe: Tensor) -> int:
    """How many programs take the tiles of a product of logits in turns."""
    return min(num_tiles, PROGRAMS_PER_MULTIPROCESSOR * _num_multiprocessors(probe.device))


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
