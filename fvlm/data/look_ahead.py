"""Which remote shards a plan will need next, so that they are there when it does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fvlm.data.plan import Pack, Plan
from fvlm.data.remote import RemoteShard
from fvlm.data.shard import ShardIndex
from fvlm.data.shard_cache import Prefetcher, ShardCache, tar_size

_WINDOWS = 3  # the one at hand and those after it
_SHARE = 0.75  # of the cache that may be filled ahead: what is in use needs room too


class LookAhead:
    """Tells a prefetcher, window by window, which shards come. Safe to copy into other processes before `expect`."""

    def __init__(
        self, plan: Plan, shards: Sequence[str | Path | RemoteShard], indexes: Sequence[ShardIndex], cache: ShardCache
    ):
        self._plan, self._shards, self._indexes = plan, shards, indexes
        self._limit, self._prefetcher = _SHARE * cache.limit, Prefetcher(cache)
        self._window = -1

    def expect(self, pack: Pack, window: int) -> None:
        """The pack is read now, and belongs to `window` or the one before."""
        if window == self._window:
            return
        self._window = window
        ahead: dict[int, None] = dict.fromkeys(self._remote(pack.rows))
        num_bytes = sum(self._num_bytes(shard) for shard in ahead)
        for number in range(window, min(window + _WINDOWS, self._plan.num_windows)):
            for shard in self.shards_of(number):
                num_bytes += 0 if shard in ahead else self._num_bytes(shard)
                if num_bytes > self._limit:
                    break
                ahead[shard] = None
        self._prefetcher.expect([(self._shards[shard], self._indexes[shard].tar_fingerprint) for shard in ahead])

    def shards_of(self, window: int) -> list[int]:
        """A window's remote shards, in the order of their samples."""
        return self._remote(self._plan.window_order(window)[0])

    def bytes_of(self, window: int) -> int:
        """Size of a window's remote shards."""
        return sum(self._num_bytes(shard) for shard in self.shards_of(window))

    def close(self) -> None:
        """Fetch nothing further."""
        self._prefetcher.close()

    def _remote(self, rows: np.ndarray) -> list[int]:
        shards, first = np.unique(self._plan.table.shard[rows], return_index=True)
        return [shard for shard in shards[np.argsort(first)].tolist() if isinstance(self._shards[shard], RemoteShard)]

    def _num_bytes(self, shard: int) -> int:
        return tar_size(self._indexes[shard].tar_fingerprint)
