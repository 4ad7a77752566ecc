"""In which order samples come: a pure function of sample counts, mixture and seed, at any position without replay.

A stream is the samples of one source that are alike to the mixture: with frames or without, or of one kind where it
states shares of kinds, and with the same of the tags that it caps. Its order in an epoch: shards in a seeded
permutation, cut into blocks, and the samples of a block in a seeded permutation, so that few shards are in use at a
time and only the block at hand is in memory. `fvlm.data.interleave` says whose turn it is.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fvlm.data.chat import Layout
from fvlm.data.interleave import Interleaving, stable_hash
from fvlm.data.mixture import Mixture
from fvlm.data.shard import KINDS
from fvlm.data.table import TEXT, SampleTable

BLOCK_SHARDS = 16
_CHUNK = 1 << 20


class SampleOrder:
    """The sequence of (table row, layout) that a mixture draws from a table; endless but for caps and repeats."""

    def __init__(self, table: SampleTable, mixture: Mixture, seed: int):
        """Raises ValueError for a mixture that the table cannot give, naming the key."""
        self._table, self._mixture, self._seed = table, mixture, seed
        self._streams = _streams(table, mixture, seed)
        fitted, self._notes = mixture.fitted({(stream.source_name, stream.kind) for stream in self._streams})
        self._notes += _unknown_tags(self._streams, mixture)
        self._turns = Interleaving(self._streams, fitted, seed)
        self.epoch_size: int | None = len(table) if _is_natural(fitted) else None
        """Samples after which every sample has come once more; None where weights or limits rule."""

    @property
    def size(self) -> int | None:
        """Samples after which a stated share can no longer be kept; None: endless."""
        return self._turns.size

    def notes(self, total: int) -> list[str]:
        """What a reader of the run should know of its first `total` samples: parts left out, sources used up.

        Raises ValueError if the order ends before.
        """
        if self.size is not None and total > self.size:
            raise ValueError(
                f"the mixture ends after {self.size:,} of {total:,} samples: {self._turns.events[-1][1]}; lower "
                f"train.total_samples, raise or remove the limit, or change the share"
            )
        used_up = [f"after {position:,} samples: {what}" for position, what in self._turns.events if position < total]
        return self._notes + used_up

    def take(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions start..stop of the sequence: table rows int64 [n], layouts uint8 [n]."""
        rows = np.zeros(stop - start, np.int64)
        layouts = np.zeros(stop - start, np.uint8)
        for number, where, positions in self._turns.split(start, stop):
            stream = self._streams[number]
            rows[where] = stream.take(int(positions[0]), int(positions[-1]) + 1)
            if stream.kind != "text":
                layouts[where] = self._layouts(rows[where], stream, positions)
        return rows, layouts

    def shares(self) -> dict[str, float]:
        """Source -> share of the samples that are drawn, before any source is used up."""
        shares = dict.fromkeys(self._table.source_names, 0.0)
        for stream, share in self._turns.shares():
            shares[self._streams[stream].source_name] += share
        return shares

    def _layouts(self, rows: np.ndarray, stream: _Stream, positions: np.ndarray) -> np.ndarray:
        question_first = _uniform(positions, self._seed, stream.key, "question first") < self._mixture.question_first
        narrated = _uniform(positions, self._seed, stream.key, "narrated") < self._mixture.narrated
        narrated &= self._table.narrated_tokens[rows] > 0
        layouts = np.where(question_first, Layout.QUESTION_FIRST, Layout.VIDEO_FIRST)
        return np.where(narrated, Layout.NARRATED, layouts)


class _Stream:
    """The samples of one source and class (`_classes`), epoch after epoch."""

    def __init__(
        self,
        table: SampleTable,
        source: int,
        kind: str,
        tags: tuple[str, ...],
        is_member: np.ndarray,
        shard_counts: np.ndarray,
        seed: int,
    ):
        """`is_member` bool [kinds, tag sets]: which samples of the source; `shard_counts` [shards]: how many."""
        self.source_name, self.kind, self.tags = table.source_names[source], kind, tags
        self.key = "/".join([self.source_name, kind, *tags])  # by name: others do not shift it
        self.size = int(shard_counts.sum())
        self._table, self._source, self._is_member, self._seed = table, source, is_member, seed
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
        part = slice(int(low), int(high))
        mine = self._is_member[self._table.kind[part], _tag_sets(self._table, part)]
        return low + np.flatnonzero(mine & (self._table.source[part] == self._source))


def _streams(table: SampleTable, mixture: Mixture, seed: int) -> list[_Stream]:
    names, class_of = _classes(table, mixture)
    counts = np.zeros((len(table.source_names), len(names), table.num_shards), np.int64)
    for start in range(0, len(table), _CHUNK):
        part = slice(start, start + _CHUNK)
        shard = table.shard[part]
        first, num = int(shard[0]), int(shard[-1] - shard[0]) + 1
        shape = (*counts.shape[:2], num)
        cell = np.ravel_multi_index(
            (table.source[part], class_of[table.kind[part], _tag_sets(table, part)], shard - first), shape
        )
        counts[:, :, first : first + num] += np.bincount(cell, minlength=np.prod(shape, dtype=int)).reshape(shape)
    return [
        _Stream(table, source, *names[number], class_of == number, counts[source, number], seed)
        for source, number in np.ndindex(counts.shape[:2])
        if counts[source, number].any()
    ]


def _classes(table: SampleTable, mixture: Mixture) -> tuple[list[tuple[str, tuple[str, ...]]], np.ndarray]:
    """What the mixture tells apart: (kind, tags) of each class, and the class int64 [kinds, tag sets] of a sample."""
    capped = mixture.tag_caps or {}
    if capped and table.tag_set is None:
        raise ValueError(f"mixture.tag_caps: the table holds no tags; build it with tags = {sorted(capped)}")
    tags = [tuple(tag for tag in given if tag in capped) for given in table.tag_sets]
    two = ["text" if number == TEXT else "frames" for number in range(len(KINDS))]
    kinds = two if mixture.kinds is None else KINDS
    names = list(dict.fromkeys((kind, each) for kind in sorted(set(kinds)) for each in tags))
    return names, np.array([[names.index((kind, each)) for each in tags] for kind in kinds])


def _tag_sets(table: SampleTable, part: slice) -> np.ndarray | int:
    """Positions in `tag_sets` of some rows; one for all where there are no tags."""
    return 0 if table.tag_set is None else table.tag_set[part]


def _unknown_tags(streams: list[_Stream], mixture: Mixture) -> list[str]:
    known = {tag for stream in streams for tag in stream.tags}
    return [f"tag_caps.{tag}: no sample has the tag {tag}" for tag in mixture.tag_caps or () if tag not in known]


def _is_natural(mixture: Mixture) -> bool:
    stated = (mixture.weights, mixture.text_share, mixture.kinds, mixture.caps, mixture.repeats, mixture.tag_caps)
    return not any(each is not None for each in stated)


def seeded_permutation(n: int, *key: int | str) -> np.ndarray:
    """By sorting raw Philox words: numpy promises those for all versions, but not `Generator.permutation`."""
    words = np.random.Philox(key=stable_hash(*key)).random_raw(n)
    return np.argsort(words, kind="stable")


def _uniform(positions: np.ndarray, *key: int | str) -> np.ndarray:
    """A number in [0, 1) for each position (splitmix64 of key and position)."""
    x = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(stable_hash(*key))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) / 2.0**53
