"""What a worker does: a pack's rows in, its tensors in a buffer out."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from fvlm.data.batch import LoadedSample, PackLayout, collate_placed
from fvlm.data.buffers import BufferPool
from fvlm.data.chat import Layout, Text, Visual, segments
from fvlm.data.clip import Clip
from fvlm.data.errors import MediaError, SampleError, ShardError
from fvlm.data.look_ahead import LookAhead
from fvlm.data.plan import Pack, Plan
from fvlm.data.remote import RemoteShard
from fvlm.data.shard import ShardIndex, ShardReader
from fvlm.data.shard_cache import ShardCache
from fvlm.data.video import decode_jpeg_into

_OPEN_SHARDS = 64


@dataclass(frozen=True, slots=True)
class LostSample:
    """A planned sample that could not be read."""

    shard: str
    key: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Task:
    """One pack to read."""

    pack: Pack
    buffer: int | None
    """Number of the pool's buffer to fill; None: a new one."""
    window: int
    """Of the plan, in which the pack's step ends."""


@dataclass(kw_only=True, slots=True)
class ReadPack:
    """One pack that was read."""

    buffer: int | torch.Tensor
    """Number of the pool's buffer that holds it, or the buffer itself."""
    keys: list[str]
    """Of the samples in it, in its order."""
    rows: list[int]
    """Of the plan's table, of these samples."""
    lost: list[LostSample]
    read_s: float
    """Seconds from the task's arrival to the finished pack."""
    decode_s: float
    """Of these, in decoding."""


class PackReader(Dataset):
    """Reads the packs of a plan. Safe to copy into other processes before the first read."""

    def __init__(
        self,
        plan: Plan,
        shards: Sequence[str | Path | RemoteShard],
        indexes: Sequence[ShardIndex],
        tokenizer: PreTrainedTokenizerBase,
        layout: PackLayout,
        pool: BufferPool,
        *,
        in_workers: bool,
        cache: ShardCache | None,
        reference: np.ndarray | None,
    ):
        """`reference` float32 [n, 2]: log-probability of each table row's chosen and rejected answer."""
        self._reference = reference
        self._plan, self._table, self._mixture = plan, plan.table, plan.mixture
        self._shards, self._indexes, self._tokenizer = shards, indexes, tokenizer
        self._layout, self._pool, self._in_workers = layout, pool, in_workers
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._cache = cache
        self._ahead = LookAhead(plan, shards, indexes, cache) if cache is not None else None

    def __getitem__(self, task: Task) -> ReadPack:
        begin = time.perf_counter()
        if self._ahead is not None:
            self._ahead.expect(task.pack, task.window)
        buffer = self._layout.new_buffer(self._in_workers) if task.buffer is None else self._pool.view(task.buffer)
        pixels = self._layout.pixels(buffer)
        frames = _Frames(pixels.numpy())
        samples, rows, lost = [], [], []
        for row, layout in zip(task.pack.rows.tolist(), task.pack.layouts.tolist(), strict=True):
            try:
                found = self._load(row, Layout(layout), frames)
                samples += found
                rows += [row] * len(found)
            except (SampleError, MediaError) as error:
                shard, key = self._shards[self._table.shard[row]], self._key(row)
                lost.append(LostSample(str(shard), key, error.reason, error.detail))
        frames.clear_rest()
        plan = self._plan
        batch = collate_placed(samples, pixels.permute(0, 3, 1, 2), plan.capacities, plan.objective, self._mixture.grid)
        self._layout.store(batch, buffer)
        return ReadPack(
            buffer=buffer if task.buffer is None else task.buffer,
            keys=[sample.key for sample, _ in samples],
            rows=rows,
            lost=lost,
            read_s=time.perf_counter() - begin,
            decode_s=frames.decode_s,
        )

    def _key(self, row: int) -> str:
        try:
            return str(self._indexes[self._table.shard[row]].keys[self._table.row[row]])
        except ShardError:  # its index is the trouble
            return f"row {self._table.row[row]}"

    def _load(self, row: int, layout: Layout, frames: _Frames) -> list[tuple[LoadedSample, int]]:
        """A sample, or a pair's two, and from which row of the pack's frames on its own lie."""
        try:
            meta, media = self._read(int(self._table.shard[row]), int(self._table.row[row]))
        except ShardError as error:
            raise SampleError(error.reason, error.detail) from error
        except OSError as error:  # deleted or unreadable while the run goes on
            raise SampleError("unreadable_shard", str(error)) from error
        answers = ("chosen", "rejected") if self._plan.objective == "dpo" else ("chosen",)
        parts = [self._segments(row, meta, layout, answer) for answer in answers]
        reference = [0.0] * len(parts) if self._reference is None else self._reference[row].tolist()
        if not all(map(math.isfinite, reference)):
            raise SampleError("no_reference", "the reference model gave it no log-probability; see the run's start")
        first, own = frames.add(media[:1] if meta["kind"] == "image" else media)
        source = int(self._table.source[row])
        keys = (meta["key"], f"{meta['key']} (rejected)")
        return [
            (LoadedSample(key=key, segments=each, frames=own, source_id=source, reference_logprob=logprob), first)
            for key, each, logprob in zip(keys, parts, reference, strict=False)
        ]

    def _segments(self, row: int, meta: dict, layout: Layout, answer: str) -> list[Text | Visual]:
        """The sample with its chosen or its rejected answer."""
        parts = segments(meta, self._tokenizer, layout, **self._mixture.visual_arguments, answer=answer)
        name = "narrated_tokens" if layout == Layout.NARRATED else "tokens" if answer == "chosen" else "rejected_tokens"
        planned = getattr(self._table, name)[row]
        found = sum(part.token_ids.size for part in parts if isinstance(part, Text))
        if found != planned:
            raise SampleError("index_mismatch", f"{found} text tokens, the index says {planned}; build the index anew")
        return parts

    def close(self) -> None:
        """Fetch nothing further ahead."""
        if self._ahead is not None:
            self._ahead.close()

    def _read(self, number: int, row: int) -> tuple[dict, list[bytes] | Clip]:
        shard, index = self._shards[number], self._indexes[number]
        if not isinstance(shard, RemoteShard):
            return self._local(number).read(row)
        with self._cache.held(shard, index.tar_fingerprint) as path, closing(ShardReader(path, index)) as reader:
            return reader.read(row)

    def _local(self, number: int) -> ShardReader:
        if number not in self._open:
            if len(self._open) >= _OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[number] = ShardReader(self._shards[number], self._indexes[number])
        self._open.move_to_end(number)
        return self._open[number]


class _Frames:
    """A pack's frames, decoded one after the other right where they are to lie."""

    def __init__(self, pixels: np.ndarray):
        """`pixels` uint8 [F, size, size, 3]; what it holds does not matter."""
        self._pixels, self._used = pixels, 0
        self.decode_s = 0.0

    def add(self, media: Sequence[bytes] | Clip) -> tuple[int, np.ndarray]:
        """Decode a sample's JPEGs or video: its first row, and its rows. One with a bad frame leaves none behind."""
        begin = time.perf_counter()
        first = self._used
        own = self._pixels[first : first + len(media)]
        if isinstance(media, Clip):
            own[...] = media.decode(self._pixels.shape[1])
        else:
            for pixels, jpeg in zip(own, media, strict=True):
                decode_jpeg_into(pixels, jpeg)
        self._used += len(media)
        self.decode_s += time.perf_counter() - begin
        return first, own.transpose(0, 3, 1, 2)

    def clear_rest(self) -> None:
        """Zero the rows that no sample uses."""
        self._pixels[self._used :] = 0
