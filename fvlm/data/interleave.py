"""Whose turn it is: a binary tree of two-way splits deals the positions of the order out to streams.

Of the first p samples that reach a node, `(p * left + phase) // (left + right)` go left, and at least 0. So shares hold
within about a sample over any stretch, every position is known in closed form, and integer weights equal to the
streams' sizes give exact epochs. A capped stream goes left with a negative phase: it comes late by as many samples as
the splits above may have let through early, so no prefix of the order holds more than its cap.

Where a number of samples is reached (caps, repeats), the next tree begins, without the streams that are used up. The
closed form is monotonic, so bisection finds these places once, and no position is ever reached by counting up to it.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fvlm.data.mixture import MixtureConfig
from fvlm.data.shares import (
    SCALE,
    Group,
    Limit,
    NobodyLeftError,
    Stream,
    capped_shares,
    sample_limits,
    share_limits,
    stream_groups,
    stream_weights,
)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One stream."""

    stream: int

    def split(self, positions: np.ndarray, where: np.ndarray):
        if len(positions):
            yield self.stream, where, positions

    def counts(self, position: int):
        yield self.stream, position

    def shares(self, whole: float):
        yield self.stream, whole


@dataclass(frozen=True, slots=True)
class Node:
    """A split of what reaches it."""

    left: Leaf | Node
    right: Leaf | Node
    left_share: int
    right_share: int
    phase: int

    def split(self, positions: np.ndarray, where: np.ndarray):
        """Yield (stream, its part of `where`, positions in the stream) of every stream that occurs."""
        total = self.left_share + self.right_share
        before = np.maximum((positions * self.left_share + self.phase) // total, 0)
        goes_left = ((positions + 1) * self.left_share + self.phase) // total > before
        yield from self.left.split(before[goes_left], where[goes_left])
        yield from self.right.split((positions - before)[~goes_left], where[~goes_left])

    def counts(self, position: int):
        """Yield (stream, how many of the first `position` samples are its)."""
        left = max((position * self.left_share + self.phase) // (self.left_share + self.right_share), 0)
        yield from self.left.counts(left)
        yield from self.right.counts(position - left)

    def shares(self, whole: float):
        """Yield (stream, its part of `whole`)."""
        left = whole * self.left_share / (self.left_share + self.right_share)
        yield from self.left.shares(left)
        yield from self.right.shares(whole - left)


Tree = Leaf | Node


@dataclass(frozen=True, slots=True)
class _Part:
    """A stretch of the order with one tree."""

    start: int
    used: Counter[int]
    """Samples of each stream before it."""
    tree: Tree


class Interleaving:
    """Which stream each position of the order belongs to, and which position in that stream it is."""

    def __init__(self, streams: Sequence[Stream], mixture: MixtureConfig, seed: int):
        """`mixture`: as `fitted` to the streams. Raises ValueError for caps that leave a share to nobody."""
        self._streams, self._mixture, self._seed = streams, mixture, seed
        self._groups = stream_groups(streams, mixture)
        self._parts: list[_Part] = []
        self.size: int | None = None
        """Samples after which a stated share can no longer be kept; None: the order is endless."""
        self.events: list[tuple[int, str]] = []
        """(position, what is reached there)."""
        alive = {i for group in self._groups for i in group.members}
        if not alive:
            raise ValueError("the data set is empty: no source with a weight holds a sample")
        self._lay_out(alive)

    def split(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (stream, indices into start..stop, successive positions in the stream), a stream once a part."""
        if self.size is not None and stop > self.size:
            raise ValueError(f"position {stop:,} of an order that ends at {self.size:,}: {self.events[-1][1]}")
        ends = [*(part.start for part in self._parts[1:]), stop]
        for part, end in zip(self._parts, ends, strict=True):
            low, high = max(start, part.start), min(stop, end)
            if low < high:
                there = np.arange(low, high, dtype=np.int64)
                for stream, where, positions in part.tree.split(there - part.start, there - start):
                    yield stream, where, positions + part.used[stream]

    def shares(self) -> Iterator[tuple[int, float]]:
        """Yield (stream, its share of the samples) before anything is used up."""
        return self._parts[0].tree.shares(1.0)

    def _lay_out(self, alive: set[int]) -> None:
        """Find the parts: where limits are reached, and what is left then."""
        start, used = 0, Counter()
        limits = sample_limits(self._streams, self._mixture)
        while True:
            try:
                tree = self._tree(alive)
            except NobodyLeftError as error:
                if not self._parts:
                    raise
                self._end(start, str(error))
                return
            self._parts.append(_Part(start, used, tree))
            length = _reach(tree, used, limits)
            if length is None:
                return
            after = used + Counter(dict(tree.counts(length + 1)))
            start, used = start + length, used + Counter(dict(tree.counts(length)))
            reached = [limit for limit in limits if _total(after, limit) > limit.most]
            limits = [limit for limit in limits if limit not in reached]
            alive = alive.difference(*(limit.members for limit in reached))
            keys = ", ".join(sorted({limit.key for limit in reached}))
            self.events.append((start, f"{keys} reached: the others take the place"))
            empty = [group.name for group in self._groups if alive.isdisjoint(group.members)]
            if empty:
                self._end(start, f"{keys} reached: no sample is left for the share of {', '.join(empty)}")
                return

    def _end(self, size: int, reason: str) -> None:
        self.size, self.events[-1] = size, (size, reason)

    def _tree(self, alive: set[int]) -> Tree:
        weights = stream_weights(self._streams, self._mixture, alive)
        limits = [limit for limit in share_limits(self._streams, self._mixture) if limit.members & alive]
        shares = capped_shares(self._groups, weights, limits) if limits else {}
        capped = frozenset().union(*(limit.members for limit in limits))
        trees = [self._group_tree(group, weights, shares, capped) for group in self._groups]
        if len(trees) == 1:
            return trees[0]
        if self._mixture.kinds is not None:
            parts = [(round(group.share * SCALE), tree) for group, tree in zip(self._groups, trees, strict=True)]
            return _huffman(parts, self._seed, "kinds")
        text = round(self._groups[0].share * SCALE)
        return Node(*trees, text, SCALE - text, stable_hash(self._seed, "text share") % SCALE)

    def _group_tree(
        self, group: Group, weights: dict[int, int], shares: dict[int, float], capped: frozenset[int]
    ) -> Tree:
        """One after the other the capped streams, each split off with a delay, and then the tree of the others."""
        label = "all" if len(self._groups) == 1 else group.name
        others = [(weights[i], Leaf(i)) for i in group.members if i in weights and i not in capped]
        parts = {i: int(shares[i] / group.share * SCALE) for i in group.members if i in shares and i in capped}
        chain = sorted(parts, key=parts.get)
        tree = _huffman(others, self._seed, label) if others else Leaf(chain.pop())
        chain = [i for i in chain if parts[i]]
        rest = SCALE - sum(parts[i] for i in chain)
        for number, i in reversed(list(enumerate(chain))):
            early = len(self._groups) + number  # at least the samples that the splits above let through too early
            tree = Node(Leaf(i), tree, parts[i], rest, -early * parts[i])
            rest += parts[i]
        return tree


def _reach(tree: Tree, used: Counter[int], limits: Sequence[Limit]) -> int | None:
    """Samples from here on within all limits; None where that is for ever."""
    there = {stream for stream, _ in tree.counts(0)}
    limits = [limit for limit in limits if limit.members & there]
    if not limits:
        return None

    def fits(length: int) -> bool:
        counts = used + Counter(dict(tree.counts(length)))
        return all(_total(counts, limit) <= limit.most for limit in limits)

    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _total(counts: Counter[int], limit: Limit) -> int:
    return sum(counts[i] for i in limit.members)


def _huffman(weighted: Sequence[tuple[int, Tree]], seed: int, label: str) -> Tree:
    """The tree that keeps heavy parts near the root, where their share is kept most closely."""
    heap = [(weight, i, tree) for i, (weight, tree) in enumerate(weighted)]
    heapq.heapify(heap)
    for number in range(len(weighted), 2 * len(weighted) - 1):
        (left_share, _, left), (right_share, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        total = left_share + right_share
        node = Node(left, right, left_share, right_share, stable_hash(seed, label, number) % total)
        heapq.heappush(heap, (total, number, node))
    return heap[0][2]


def stable_hash(*key: int | str) -> int:
    """64 bits that depend on every part of the key, the same on every machine and version."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
