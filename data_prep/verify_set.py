"""All shards of a set together: what they hold, and which samples are in it, or in another set, more than once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from data_prep.verify_findings import BINS, MOST_FRAMES, OCTAVE, SHEET_SAMPLES, SHORTEST, Draw, Findings, Problem
from fvlm.data.content import contents_digest
from fvlm.data.shard import KINDS

_TOTALS = ("samples", "frames", "tokens", "seconds")


class SampleSet:
    """Sums over the findings of shards. Keeps 8 bytes and the key of every sample, nothing else that grows."""

    def __init__(self, name: str):
        self.name = name
        self.bytes = 0
        self.notes: Counter = Counter()
        self.tokenizers: set[str] = set()
        self.by_source: dict[str, Counter] = {}
        self.frame_sizes: Counter = Counter()
        self.frames = np.zeros((len(KINDS), MOST_FRAMES + 1), np.int64)
        self.tokens = np.zeros((len(KINDS), BINS), np.int64)
        self.seconds = np.zeros((len(KINDS), BINS), np.int64)
        self.draws: dict[str, list[Draw]] = {}
        self.shards: list[str] = []
        self._keys: list[np.ndarray] = []
        self._contents: list[np.ndarray] = []

    def add(self, found: Findings) -> None:
        """Take in one shard."""
        self.bytes += found.size
        self.notes += found.notes
        self.tokenizers |= found.tokenizers
        self.frame_sizes += found.frame_sizes
        self.frames += found.frames
        self.tokens += found.tokens
        self.seconds += found.seconds
        for source, counts in found.by_source.items():
            self.by_source.setdefault(source, Counter()).update(counts)
            drawn = self.draws.get(source, []) + found.draws[source]
            self.draws[source] = sorted(drawn)[:SHEET_SAMPLES]
        self.shards.append(found.shard)
        self._keys.append(found.keys)
        self._contents.append(found.content)

    def __len__(self) -> int:
        return sum(map(len, self._contents))

    @cached_property
    def content(self) -> np.ndarray:
        """uint64 [n], once all shards are in."""
        return np.concatenate([np.zeros(0, np.uint64), *self._contents])

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.content, kind="stable")

    @cached_property
    def _first(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self._contents)])

    def digest(self) -> str:
        """Of the contents, whatever their order."""
        return contents_digest(self.content)

    def duplicates(self) -> Iterator[Problem]:
        """Every sample that says and shows what one before it does."""
        ordered = self.content[self._order]
        again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        originals = self._order[np.searchsorted(ordered, ordered[again])]
        copies = self._order[again]
        for at in np.argsort(copies).tolist():
            shard, key = self._place(int(originals[at]))
            yield Problem(*self._place(int(copies[at])), "duplicate_sample", f"the same content as {shard}, {key}")

    def also_in(self, other: SampleSet) -> Iterator[Problem]:
        """Every sample of this set whose content is in the other one."""
        if not len(other):
            return
        ordered = other.content[other._order]
        at = np.minimum(np.searchsorted(ordered, self.content), len(ordered) - 1)
        for mine in np.flatnonzero(ordered[at] == self.content).tolist():
            shard, key = other._place(int(other._order[at[mine]]))
            yield Problem(*self._place(mine), "validation_in_training", f"the same content as {shard}, {key}")

    def _place(self, at: int) -> tuple[str, str]:
        """Shard and key of a sample."""
        shard = int(np.searchsorted(self._first, at, side="right")) - 1
        key = self._keys[shard][at - self._first[shard]]
        return self.shards[shard], bytes(key).decode("utf-8", "backslashreplace")

    def totals(self) -> dict[str, Any]:
        """Sums over all sources."""
        sums = sum(self.by_source.values(), Counter())
        return {name: sums[name] for name in _TOTALS} | {"distinct": len(np.unique(self.content))}

    def summary(self) -> dict[str, Any]:
        """Everything but the sheets, for report.json; histogram bin i of tokens and seconds begins at start[i]."""
        starts = np.exp2(np.arange(BINS) / OCTAVE)
        return {
            "shards": len(self.shards),
            "bytes": self.bytes,
            **self.totals(),
            "tokenizers": sorted(self.tokenizers),
            "by_source": {name: dict(counts) for name, counts in sorted(self.by_source.items())},
            "frame_sizes": {f"{width}x{height}": n for (width, height), n in self.frame_sizes.most_common()},
            "histograms": {
                "frames": _histogram(self.frames, np.arange(MOST_FRAMES + 1)),
                "tokens": _histogram(self.tokens, starts),
                "seconds": _histogram(self.seconds, starts * SHORTEST),
            },
        }


def _histogram(counts: np.ndarray, starts: np.ndarray) -> dict[str, Any]:
    """Without the empty bins at the end."""
    used = int(np.flatnonzero(counts.sum(axis=0)).max(initial=-1)) + 1
    by_kind = {kind: counts[number, :used].tolist() for number, kind in enumerate(KINDS)}
    return {"start": [round(float(start), 4) for start in starts[:used]], **by_kind}
