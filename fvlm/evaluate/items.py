"""Validation samples for question tasks: found by their metadata, their frames read when they are needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from fvlm.data.batch import LoadedSample
from fvlm.data.chat import Layout, Text, Visual, segments
from fvlm.data.clip import Clip
from fvlm.data.errors import MediaError, SampleError
from fvlm.data.plan import Capacities
from fvlm.data.shard import ShardReader, load_index
from fvlm.data.video import decode_jpeg

T = TypeVar("T")
_NOTHING: Any = object()


@dataclass(frozen=True, kw_only=True)
class Presentation:
    """How samples are shown to a model; has to be what the model was trained with."""

    image_size: int
    """Side of a frame in pixels."""
    layout: Layout = Layout.VIDEO_FIRST
    looks: int = 8
    """Visual tokens of a still; the multi-token baseline takes 1."""
    tokens_per_frame: int = 1
    grid: int = 0
    """Cells a frame of the multi-token baseline; 0 for a foveated model."""

    def segments(self, meta: Mapping, tokenizer: PreTrainedTokenizerBase) -> list[Text | Visual]:
        """The sample in this presentation; raises SampleError where its text cannot be laid out."""
        return segments(meta, tokenizer, self.layout, looks=self.looks, tokens_per_frame=self.tokens_per_frame)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One sample: its metadata, and its frames on demand."""

    meta: dict[str, Any]
    num_frames: int
    read_frames: Callable[[], np.ndarray]
    """Gives uint8 [num_frames, 3, H, W]; raises SampleError where a frame cannot be read."""


def read_items(
    shards: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    image_size: int,
    wanted: Callable[[Mapping], bool],
    *,
    most: int | None = None,
    cache_dir: Path | None = None,
) -> tuple[list[Item], Counter]:
    """Samples whose metadata `wanted` accepts, in shard order, and the unreadable ones counted by reason.

    Of more than `most`, every n-th is taken, so that a limit keeps the set's composition.
    """
    items: list[Item] = []
    skipped: Counter = Counter()
    for path in shards:
        index = load_index(path, tokenizer, cache_dir)
        reader = ShardReader(path, index)
        for row in range(len(index)):
            try:
                meta, jpegs = reader.read(row)
            except SampleError as error:
                skipped[error.reason] += 1
                continue
            if wanted(meta):
                read = partial(_read_frames, reader, row, image_size)
                items.append(Item(meta=meta, num_frames=len(jpegs), read_frames=read))
        reader.close()
    return every_nth(items, most), skipped


def room_for(samples: Sequence[LoadedSample], grid: int = 0) -> Capacities:
    """Capacities that hold exactly these samples, none of which shares frames with another."""
    lengths = [segment_lengths(sample.segments, grid) for sample in samples]
    visual = [[isinstance(part, Visual) for part in sample.segments] for sample in samples]
    leading = [max((at + 1 for at, found in enumerate(kinds) if found), default=0) for kinds in visual]
    texts = [part for sample in samples for part in sample.segments if isinstance(part, Text)]
    sizes = {
        "frames": sum(len(sample.frames) for sample in samples),
        "tokens": sum(map(sum, lengths)),
        "visual": sum(n for rows, kinds in zip(lengths, visual, strict=True) for n in np.compress(kinds, rows)),
        "coarse": sum(sum(rows[:end]) for rows, end in zip(lengths, leading, strict=True)),
        "samples": len(samples),
        "labels": sum(int(part.is_answer.sum()) for part in texts),
        "max_seqlen": max(map(sum, lengths)),
    }
    return Capacities(**{name: max(1, int(size)) for name, size in sizes.items()})


def segment_lengths(text: Sequence[Text | Visual], grid: int) -> list[int]:
    """Rows of each segment."""
    return [part.token_ids.size if isinstance(part, Text) else max(1, grid) * len(part.frames) for part in text]


def every_nth(items: list, most: int | None) -> list:
    """At most `most` of the items, spaced evenly."""
    if most is None or len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def in_turn(things: Iterable[T], group: Callable[[T], Hashable]) -> list[T]:
    """The things reordered: the first of each group, then the second of each, ...; groups in order of appearance."""
    groups: dict[Hashable, list[T]] = {}
    for thing in things:
        groups.setdefault(group(thing), []).append(thing)
    rounds = zip_longest(*groups.values(), fillvalue=_NOTHING)
    return [thing for turn in rounds for thing in turn if thing is not _NOTHING]


def _read_frames(reader: ShardReader, row: int, size: int) -> np.ndarray:
    try:
        _, media = reader.read(row)
    except OSError as error:  # moved or unreadable while the run goes on
        raise SampleError("unreadable_shard", str(error)) from error
    reader.close()  # a set may lie in more shards than a process may hold open
    if not media:
        return np.zeros((0, 3, size, size), np.uint8)
    try:
        if isinstance(media, Clip):
            return media.decode(size).transpose(0, 3, 1, 2)
        return np.stack([decode_jpeg(jpeg, size) for jpeg in media])
    except MediaError as error:
        raise SampleError(error.reason, error.detail) from error


def has_options(meta: Mapping) -> bool:
    """Whether a sample is a multiple-choice question."""
    return bool(meta.get("options"))


def is_caption(meta: Mapping) -> bool:
    """Whether a sample's answer is one free text about its frames: no options, no list, no further turns."""
    answer = meta.get("assistant")
    free = isinstance(answer, str) and bool(answer.strip()) and not is_listing(meta)
    return free and meta.get("kind") != "text" and not has_options(meta) and not meta.get("turns")


def is_listing(meta: Mapping) -> bool:
    """Whether a sample's answer is a list of words, each said after one of its frames (so each word is a slot)."""
    narration, answer = meta.get("narration"), meta.get("assistant")
    if not isinstance(narration, list) or not all(isinstance(said, str) for said in narration):
        return False
    if has_options(meta) or meta.get("turns") or not isinstance(answer, str):
        return False
    said = "".join(narration).split()
    return len(said) > 1 and said == answer.split()
