"""What the plan knows of every sample, as columns, and what a sample costs in a pack."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fvlm.data.chat import Layout
from fvlm.data.content import occurs
from fvlm.data.mixture import Mixture
from fvlm.data.shard import KINDS

if TYPE_CHECKING:
    from fvlm.data.shard import ShardIndex

IMAGE, TEXT = KINDS.index("image"), KINDS.index("text")
OBJECTIVES = ("ce_all", "ce_answer", "dpo")
DIMENSIONS = ("frames", "tokens", "visual", "coarse", "labels", "samples")
"""What a pack has capacities for, and the columns of a cost matrix."""

_COUNT_COLUMNS = (
    "num_frames", "tokens", "head", "answer", "narrated_tokens", "narrated_answer", "narrated_tail",
    "rejected_tokens", "rejected_answer",
)  # fmt: skip
_DTYPES = {
    "shard": np.dtype(np.int32),
    "row": np.dtype(np.int32),
    "source": np.dtype(np.int16),
    "kind": np.dtype(np.uint8),
    **dict.fromkeys(_COUNT_COLUMNS, np.dtype(np.int32)),
    "tag_set": np.dtype(np.uint16),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleTable:
    """One row a sample, shard by shard; the counts are those of `fvlm.data.chat.TextCounts`.

    The columns lie in memory, or are mapped from disk (`fvlm.data.table_store`).
    """

    source_names: tuple[str, ...]
    shard: np.ndarray
    """int32 [n], ascending: position in the list of shards."""
    row: np.ndarray
    """int32 [n], ascending within a shard: position in the shard's index."""
    source: np.ndarray
    """int16 [n]: position in `source_names`."""
    kind: np.ndarray
    """uint8 [n]: position in `fvlm.data.shard.KINDS`."""
    num_frames: np.ndarray
    tokens: np.ndarray
    head: np.ndarray
    answer: np.ndarray
    narrated_tokens: np.ndarray
    narrated_answer: np.ndarray
    narrated_tail: np.ndarray
    rejected_tokens: np.ndarray
    rejected_answer: np.ndarray
    tag_sets: tuple[tuple[str, ...], ...] = ((),)
    """Of the tags that a mixture caps, the combinations that occur."""
    tag_set: np.ndarray | None = None
    """uint16 [n]: position in `tag_sets`; None where no tag is capped."""
    known_digest: str | None = field(default=None, init=False, repr=False, compare=False)
    """What `digest` returns, where it was computed before; copies with other columns do not inherit it."""

    def __len__(self) -> int:
        return len(self.row)

    @property
    def num_shards(self) -> int:
        return int(self.shard[-1]) + 1 if len(self) else 0

    @classmethod
    def from_indexes(
        cls, indexes: Iterable[ShardIndex], held_out: np.ndarray | None = None, tags: Collection[str] = ()
    ) -> SampleTable:
        """The indexes of all shards, in the shards' order, as one table; sources are numbered by their sorted names.

        Samples whose content is among `held_out` (uint64, ascending) have no row. `tags` are those to tell apart.
        """
        return cls.from_rows(TableRows(held_out, tags), indexes)

    @classmethod
    def from_rows(cls, rows: TableRows, indexes: Iterable[ShardIndex]) -> SampleTable:
        """What `rows`, which are new, make of the indexes."""
        pieces = [rows.add(index) for index in indexes]
        columns = {
            name: np.concatenate([np.zeros(0, dtype), *(piece.pop(name) for piece in pieces)])
            for name, dtype in rows.dtypes.items()
        }
        names, renumber = rows.sources()
        columns["source"] = renumber[columns["source"]]
        return cls(source_names=names, tag_sets=rows.tag_sets, **columns)

    def fits(self, sizes: Sequence[int]) -> bool:
        """Whether every row is one of shards with `sizes` samples."""
        if self.num_shards > len(sizes):
            return False
        ends = np.searchsorted(self.shard, np.arange(self.num_shards, dtype=np.int32), side="right")
        used = np.flatnonzero(np.diff(ends, prepend=0))
        return bool((self.row[ends[used] - 1] < np.array(sizes, np.int64)[used]).all())

    def digest(self) -> str:
        """64 hex digits that change with anything in the table, wherever its columns lie."""
        if self.known_digest is not None:
            return self.known_digest
        columns = {name: getattr(self, name) for name in _DTYPES}
        hashes = {
            name: hashlib.sha256(np.ascontiguousarray(column)).hexdigest()
            for name, column in columns.items()
            if column is not None
        }
        return table_digest(hashes, self.source_names, self.tag_sets)


def table_digest(
    columns: Mapping[str, str], source_names: tuple[str, ...], tag_sets: tuple[tuple[str, ...], ...]
) -> str:
    """`SampleTable.digest` from the SHA-256 of each column."""
    return hashlib.sha256(repr((sorted(columns.items()), source_names, tag_sets)).encode()).hexdigest()


class TableRows:
    """The rows that shards add to a table, one shard after the other; their sources are numbered as they come."""

    def __init__(self, held_out: np.ndarray | None, tags: Collection[str]):
        """As for `SampleTable.from_indexes`."""
        self._held_out, self._tags = held_out, sorted(tags)
        self._numbers: dict[str, int] = {}  # of the sources
        self._tag_numbers: dict[tuple[str, ...], int] = {(): 0}
        self._num_shards = 0
        self.left_out: Counter[str] = Counter()
        """Samples without a row, by source."""

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Of the columns."""
        return {name: dtype for name, dtype in _DTYPES.items() if name != "tag_set" or self._tags}

    @property
    def tag_sets(self) -> tuple[tuple[str, ...], ...]:
        """So far."""
        return tuple(self._tag_numbers)

    def add(self, index: ShardIndex) -> dict[str, np.ndarray]:
        """The columns of the next shard, `source` by the numbers so far."""
        kept = np.arange(len(index), dtype=np.int32)
        if self._held_out is not None:
            out = occurs(index.content, self._held_out)
            kept = np.flatnonzero(~out).astype(np.int32)
            by_source = np.bincount(index.source[out], minlength=len(index.source_names)).tolist()
            self.left_out.update(dict(zip(index.source_names, by_source, strict=True)))
        renumber = np.array([self._numbers.setdefault(name, len(self._numbers)) for name in index.source_names])
        columns = {
            "shard": np.full(len(kept), self._num_shards),
            "row": kept,
            "source": renumber.astype(np.int16)[index.source[kept]],
            **{name: getattr(index, name)[kept] for name in ("kind", *_COUNT_COLUMNS)},
        }
        if self._tags:
            known = [tuple(tag for tag in self._tags if tag in given) for given in index.tag_sets]
            numbers = [self._tag_numbers.setdefault(each, len(self._tag_numbers)) for each in known]
            columns["tag_set"] = np.array(numbers, np.uint16)[index.tag_set[kept]]
        self._num_shards += 1
        return {name: columns[name].astype(dtype, copy=False) for name, dtype in self.dtypes.items()}

    def sources(self) -> tuple[tuple[str, ...], np.ndarray]:
        """All sources by name, and the final number (int16) of each number given so far."""
        names = tuple(sorted(self._numbers))
        return names, np.array([names.index(name) for name in self._numbers], np.int16)


def sample_costs(
    table: SampleTable, rows: np.ndarray | slice, layouts: np.ndarray, mixture: Mixture, objective: str
) -> np.ndarray:
    """What each sample takes of a pack: int64 [n, 6], columns as `DIMENSIONS`; `tokens` are text and visual ones.

    With `dpo` a sample is a pair, two sequences over the same frames; one without a rejected answer has no labels.
    `rows` [n] of the table, `layouts` uint8 [n].
    """
    return np.stack(cost_columns(table, rows, layouts, mixture, objective), axis=1)


def cost_columns(
    table: SampleTable, rows: np.ndarray | slice, layouts: np.ndarray, mixture: Mixture, objective: str
) -> list[np.ndarray]:
    """The columns of `sample_costs`, int64 [n] each."""

    def column(name: str) -> np.ndarray:
        return getattr(table, name)[rows].astype(np.int64)

    kind, frames, text, answer = column("kind"), column("num_frames"), column("tokens"), column("answer")
    frames[kind == TEXT] = 0
    frames[kind == IMAGE] = 1
    repeats = np.where(kind == IMAGE, mixture.visual_arguments["looks"], mixture.tokens_per_frame)
    visual = frames * repeats * max(mixture.grid, 1)
    coarse = visual + np.where(layouts == Layout.QUESTION_FIRST, column("head"), 0)
    is_narrated = layouts == Layout.NARRATED
    if is_narrated.any():
        narrated = column("narrated_tokens")
        text = np.where(is_narrated, narrated, text)
        coarse = np.where(is_narrated, visual + narrated - column("narrated_tail"), coarse)
        answer = np.where(is_narrated, column("narrated_answer"), answer)
    coarse[frames == 0] = 0
    if objective == "dpo":
        rejected, is_pair = column("rejected_answer"), column("rejected_answer") > 0
        labels = (answer + rejected) * is_pair
        tokens = text + column("rejected_tokens") + 2 * visual
        return [frames, tokens, 2 * visual, 2 * coarse, labels, np.full_like(frames, 2)]
    labels = text - 1 if objective == "ce_all" else answer
    return [frames, text + visual, visual, coarse, labels, np.ones_like(frames)]
