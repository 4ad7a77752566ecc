"""Indexes that are opened when they are needed: all of a large data set at once would fill the memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fvlm.data.errors import ShardError
from fvlm.data.shard_index import ShardIndex

OPEN_INDEXES = 512
"""Of each process: more than a plan reads from at a time (16 shards of each source; 0.2 MB for 1 000 samples)."""


class IndexFile:
    """A shard's index, to its users a `ShardIndex`; its length and the tar's fingerprint are known without the file.

    Whatever else is asked of it raises ShardError `unreadable_index` or `changed_index` where the file is not, or no
    longer, what it was when the table was made of it.
    """

    __slots__ = ("_num_samples", "path", "tar_fingerprint")

    def __init__(self, path: str, num_samples: int, tar_fingerprint: str):
        self.path, self._num_samples, self.tar_fingerprint = path, num_samples, tar_fingerprint

    def __len__(self) -> int:
        return self._num_samples

    def __getattr__(self, name: str) -> Any:
        if name not in ShardIndex.__dataclass_fields__:
            raise AttributeError(name)
        return getattr(_opened(self.path, self._num_samples, self.tar_fingerprint), name)


@lru_cache(OPEN_INDEXES)
def _opened(path: str, num_samples: int, tar_fingerprint: str) -> ShardIndex:
    try:
        index = ShardIndex.load(path)
    except ValueError as error:
        raise ShardError("unreadable_index", str(error)) from error
    if len(index) != num_samples or index.tar_fingerprint != tar_fingerprint:
        raise ShardError("changed_index", f"{path}: not the index that the plan was made of; start again")
    return index
