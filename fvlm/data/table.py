"""What the plan knows of every sample, as columns, and what a sample costs in a pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fvlm.data.chat import Layout
from fvlm.data.shard import KINDS

if TYPE_CHECKING:
    from fvlm.data.shard import ShardIndex

IMAGE, TEXT = KINDS.index("image"), KINDS.index("text")
OBJECTIVES = ("ce_all", "ce_answer")
GRIDS = (0, 1, 4, 16)
DIMENSIONS = ("frames", "tokens", "visual", "coarse", "labels", "samples")
"""What a pack has capacities for, and the columns of a cost matrix."""

_COUNT_COLUMNS = (
    "num_frames", "tokens", "head", "answer", "narrated_tokens", "narrated_answer", "narrated_tail"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleTable:
    """One row a sample, shard by shard; the counts are those of `fvlm.data.chat.TextCounts`."""

    source_names: tuple[str, ...]
    shard: np.ndarray
    """int32 [n], ascending: position in the list of shards."""
    row: np.ndarray
    """int32 [n]: position in the shard's index."""
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

    def __len__(self) -> int:
        return len(self.row)

    @property
    def num_shards(self) -> int:
        return int(self.shard[-1]) + 1 if len(self) else 0

    @classmethod
    def from_indexes(cls, indexes: Sequence[ShardIndex]) -> SampleTable:
        """The indexes of all shards, in the shards' order, as one table; sources are numbered by their sorted names."""
        names = tuple(sorted({name for index in indexes for name in index.source_names}))
        sizes = [len(index) for index in indexes]
        source = [np.zeros(0, np.int16)]
        for index in indexes:
            renumber = np.array([names.index(name) for name in index.source_names], np.int16)
            source.append(renumber[index.source])
        empty = np.zeros(0, np.int32)
        columns = {
            name: np.concatenate([empty, *(getattr(index, name) for index in indexes)]) for name in _COUNT_COLUMNS
        }
        return cls(
            source_names=names,
            shard=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
            row=np.concatenate([empty, *(np.arange(size, dtype=np.int32) for size in sizes)]),
            source=np.concatenate(source),
            kind=np.concatenate([np.zeros(0, np.uint8), *(index.kind for index in indexes)]),
            **columns,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Which samples are drawn how often, and how they are laid out."""

    weights: dict[str, float] | None = None
    """Relative weight of each source; None: every source by its size, so that an epoch shows each sample once."""
    text_share: float | None = None
    """Share of text-only samples, spread evenly; None: as the weights give it."""
    question_first: float = 0.0
    """Share of the samples with frames whose frames follow the first question."""
    narrated: float = 0.0
    """Share of the samples with a narration that are laid out with it."""
    looks: int = 8
    """Visual tokens of a still."""
    tokens_per_frame: int = 1
    """Visual tokens of every other frame."""
    grid: int = 0
    """Multi-token baseline: pooled cells a frame (1, 4, 16), stills once; 0: foveated."""

    def __post_init__(self):
        for name in ("text_share", "question_first", "narrated"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"mixture.{name} = {value}: expected a share between 0 and 1")
        for name in ("looks", "tokens_per_frame"):
            if getattr(self, name) < 1:
                raise ValueError(f"mixture.{name} = {getattr(self, name)}: expected at least 1")
        if self.grid not in GRIDS:
            raise ValueError(f"mixture.grid = {self.grid}: expected one of {GRIDS}")
        if self.grid and self.tokens_per_frame != 1:
            raise ValueError(f"mixture.tokens_per_frame = {self.tokens_per_frame}: must be 1 with grid = {self.grid}")
        for source, weight in (self.weights or {}).items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"mixture.weights.{source} = {weight}: expected a number of at least 0")

    @property
    def visual_arguments(self) -> dict[str, int]:
        """`looks` and `tokens_per_frame` for `fvlm.data.chat.segments`; a grid is multiplied in by `collate`."""
        return {"looks": 1 if self.grid else self.looks, "tokens_per_frame": self.tokens_per_frame}


def sample_costs(
    table: SampleTable, rows: np.ndarray, layouts: np.ndarray, mixture: Mixture, objective: str
) -> np.ndarray:
    """What each sample takes of a pack: int64 [n, 6], columns as `DIMENSIONS`; `tokens` are text and visual ones.

    `rows` [n] of the table, `layouts` uint8 [n].
    """
    kind, frames, text, head, answer, narrated, narrated_answer, tail = (
        getattr(table, name)[rows].astype(np.int64) for name in ("kind", *_COUNT_COLUMNS)
    )
    frames = np.where(kind == TEXT, 0, np.where(kind == IMAGE, 1, frames))
    repeats = np.where(kind == IMAGE, mixture.visual_arguments["looks"], mixture.tokens_per_frame)
    visual = frames * repeats * max(mixture.grid, 1)
    is_narrated = layouts == Layout.NARRATED
    text = np.where(is_narrated, narrated, text)
    coarse = visual + np.where(layouts == Layout.QUESTION_FIRST, head, 0)
    coarse = np.where(is_narrated, visual + narrated - tail, coarse)
    coarse = np.where(frames > 0, coarse, 0)
    answer = np.where(is_narrated, narrated_answer, answer)
    labels = text - 1 if objective == "ce_all" else answer
    return np.stack([frames, text + visual, visual, coarse, labels, np.ones_like(frames)], axis=1)
