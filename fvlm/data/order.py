"""In which order samples come: a pure function of sample counts, mixture and seed, at any position without replay.

A stream is the samples of one source with frames, or without. Its order in an epoch: shards in a seeded permutation,
cut into blocks, and the samples of a block in a seeded permutation, so that few shards are in use at a time and only
the block at hand is in memory. Streams are interleaved by a binary tree of two-way splits: of the first p samples that
reach a node, `(p * left + phase) // (left + right)` go left. So shares hold within about a sample over any stretch,
every position is known in closed form, and integer weights equal to the stream sizes give exact epochs.
"""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fvlm.data.chat import Layout
from fvlm.data.table import TEXT, Mixture, SampleTable

BLOCK_SHARDS = 16
_WEIGHT_SCALE = 1 << 30


class SampleOrder:
    """The endless sequence of (table row, layout) that a mixture draws from a table."""

    def __init__(self, table: SampleTable, mixture: Mixture, seed: int):
        self._table, self._mixture, self._seed = table, mixture, seed
        self._streams = _streams(table, seed)
        self._tree = _mixture_tree(self._streams, table.source_names, mixture, seed)
        is_natural = mixture.weights is None and mixture.text_share is None
        self.epoch_size: int | None = len(table) if is_natural else None
        """Samples after which every sample has come once more; None where weights rule."""

    def take(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions start..stop of the sequence: table rows int64 [n], layouts uint8 [n]."""
        rows = np.zeros(stop - start, np.int64)
        layouts = np.zeros(stop - start, np.uint8)
        for stream_id, where, positions in self._tree.split(np.arange(start, stop, dtype=np.int64)):
            stream = self._streams[stream_id]
            rows[where] = stream.take(int(positions[0]), int(positions[-1]) + 1)
            if not stream.is_text:
                layouts[where] = self._layouts(rows[where], stream, positions)
        return rows, layouts

    def _layouts(self, rows: np.ndarray, stream: _Stream, positions: np.ndarray) -> np.ndarray:
        question_first = _uniform(positions, self._seed, stream.key, "question first") < self._mixture.question_first
        narrated = _uniform(positions, self._seed, stream.key, "narrated") < self._mixture.narrated
        narrated &= self._table.narrated_tokens[rows] > 0
        layouts = np.where(question_first, Layout.QUESTION_FIRST, Layout.VIDEO_FIRST)
        return np.where(narrated, Layout.NARRATED, layouts)


class _Stream:
    """The samples of one source, with frames or without, epoch after epoch."""

    def __init__(self, table: SampleTable, source: int, is_text: bool, shard_counts: np.ndarray, seed: int):
        self.source, self.is_text = source, is_text
        self.key = f"{table.source_names[source]}/{'text' if is_text else 'frames'}"  # by name: others do not shift it
        self.size = int(shard_counts.sum())
        self._table, self._seed = table, seed
        self._shards = np.flatnonzero(shard_counts)
        self._counts = shard_counts[self._shards]
        self._epoch = lru_cache(maxsize=2)(self._epoch_blocks)
        self._block = lru_cache(maxsize=2)(self._block_rows)

    def take(self, start: int, stop: int) -> np.ndarray:
        """Table rows of the stream's positions start..stop."""
        pieces = []
        while start < stop:
            epoch, first = divmod(start, self.size)
            last = min(first + stop - start, self.size)
            _, bounds = self._epoch(epoch)
            block = int(np.searchsorted(bounds, first, side="right")) - 1
            last = min(last, int(bounds[block + 1]))
            pieces.append(self._block(epoch, block)[first - bounds[block] : last - bounds[block]])
            start += last - first
        return np.concatenate(pieces)

    def _epoch_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and the bounds of its blocks in samples."""
        order = seeded_permutation(len(self._shards), self._seed, self.key, epoch, -1)
        ends = np.cumsum(self._counts[order])
        block_ends = np.append(ends[BLOCK_SHARDS - 1 : -1 : BLOCK_SHARDS], ends[-1])
        return self._shards[order], np.concatenate([[0], block_ends])

    def _block_rows(self, epoch: int, block: int) -> np.ndarray:
        shards, _ = self._epoch(epoch)
        shards = shards[block * BLOCK_SHARDS : (block + 1) * BLOCK_SHARDS]
        rows = np.concatenate([self._shard_rows(int(shard)) for shard in shards])
        return rows[seeded_permutation(len(rows), self._seed, self.key, epoch, block)]

    def _shard_rows(self, shard: int) -> np.ndarray:
        low, high = np.searchsorted(
            self._table.shard, np.array([shard, shard + 1], self._table.shard.dtype)
        )  # other types copy
        mine = (self._table.source[low:high] == self.source) & ((self._table.kind[low:high] == TEXT) == self.is_text)
        return low + np.flatnonzero(mine)


@dataclass(frozen=True)
class _Leaf:
    weight: int
    stream: int

    def split(self, positions: np.ndarray, where: np.ndarray | None = None):
        where = np.arange(len(positions)) if where is None else where
        if len(positions):
            yield self.stream, where, positions


@dataclass(frozen=True)
class _Node:
    left: _Leaf | _Node
    right: _Leaf | _Node
    left_share: int
    right_share: int
    phase: int

    @property
    def weight(self) -> int:
        return self.left.weight + self.right.weight

    def split(self, positions: np.ndarray, where: np.ndarray | None = None):
        """Yield (stream, indices into the caller's positions, positions in the stream) of every stream that occurs."""
        where = np.arange(len(positions)) if where is None else where
        total = self.left_share + self.right_share
        before = (positions * self.left_share + self.phase) // total
        goes_left = ((positions + 1) * self.left_share + self.phase) // total > before
        yield from self.left.split(before[goes_left], where[goes_left])
        yield from self.right.split((positions - before)[~goes_left], where[~goes_left])


def _streams(table: SampleTable, seed: int) -> list[_Stream]:
    shape = (len(table.source_names), 2, table.num_shards)
    stream = np.ravel_multi_index((table.source, (table.kind == TEXT).astype(np.int8), table.shard), shape)
    counts = np.bincount(stream, minlength=np.prod(shape, dtype=int)).reshape(shape)
    return [
        _Stream(table, source, bool(is_text), counts[source, is_text], seed)
        for source, is_text in np.ndindex(counts.shape[:2])
        if counts[source, is_text].any()
    ]


def _mixture_tree(streams: list[_Stream], names: tuple[str, ...], mixture: Mixture, seed: int) -> _Leaf | _Node:
    leaves = [_Leaf(weight, i) for i, weight in enumerate(_stream_weights(streams, names, mixture)) if weight]
    if mixture.text_share is None:
        return _huffman(leaves, seed, "all")
    text = [leaf for leaf in leaves if streams[leaf.stream].is_text]
    framed = [leaf for leaf in leaves if not streams[leaf.stream].is_text]
    text_share = round(mixture.text_share * _WEIGHT_SCALE)
    for what, share, group in (("text-only", text_share, text), ("visual", _WEIGHT_SCALE - text_share, framed)):
        if share and not group:
            raise ValueError(
                f"mixture.text_share = {mixture.text_share}: no source with a weight holds {what} samples; "
                f"add some, or set it to {0 if what == 'text-only' else 1} or null"
            )
    if text_share in (0, _WEIGHT_SCALE):
        return _huffman(text if text_share else framed, seed, "all")
    trees = _huffman(text, seed, "text"), _huffman(framed, seed, "frames")
    return _Node(*trees, text_share, _WEIGHT_SCALE - text_share, _hash(seed, "text share") % _WEIGHT_SCALE)


def _stream_weights(streams: list[_Stream], names: tuple[str, ...], mixture: Mixture) -> list[int]:
    """Integer weights: the sizes themselves, or the mixture's weights, split within a source by size."""
    if mixture.weights is None:
        return [stream.size for stream in streams]
    present = {names[stream.source] for stream in streams}
    if present != set(mixture.weights):
        raise ValueError(
            f"mixture.weights: sources without samples {sorted(set(mixture.weights) - present)}, sources without a "
            f"weight {sorted(present - set(mixture.weights))}; name exactly the sources present (0 leaves one out)"
        )
    total = sum(mixture.weights.values())
    if total <= 0:
        raise ValueError("mixture.weights: all are 0; give at least one source a weight")
    sizes = {name: sum(s.size for s in streams if names[s.source] == name) for name in present}
    shares = [mixture.weights[names[s.source]] / total * s.size / sizes[names[s.source]] for s in streams]
    return [max(round(share * _WEIGHT_SCALE), 1) if share else 0 for share in shares]


def _huffman(leaves: list[_Leaf], seed: int, label: str) -> _Leaf | _Node:
    """The tree that keeps heavy streams near the root, where their share is kept most closely."""
    if not leaves:
        raise ValueError("the data set is empty: no source with a weight holds a sample")
    heap = [(leaf.weight, i, leaf) for i, leaf in enumerate(leaves)]
    heapq.heapify(heap)
    for number in range(len(leaves), 2 * len(leaves) - 1):
        left, right = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        total = left.weight + right.weight
        node = _Node(left, right, left.weight, right.weight, _hash(seed, label, number) % total)
        heapq.heappush(heap, (total, number, node))
    return heap[0][2]


def _hash(*key: int | str) -> int:
    """64 bits that depend on every part of the key, the same on every machine and version."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")


def seeded_permutation(n: int, *key: int | str) -> np.ndarray:
    """By sorting raw Philox words: numpy promises those for all versions, but not `Generator.permutation`."""
    words = np.random.Philox(key=_hash(*key)).random_raw(n)
    return np.argsort(words, kind="stable")


def _uniform(positions: np.ndarray, *key: int | str) -> np.ndarray:
    """A number in [0, 1) for each position (splitmix64 of key and position)."""
    x = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(_hash(*key))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) / 2.0**53
