"""This rank's packs, read, decoded and laid out ahead of the step that needs them.

The main process plans; a worker gets one pack's rows and returns the finished `PackedBatch`. The order is the plan's,
whatever the number of workers. A sample that cannot be read is dropped from its pack, logged and counted.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from fvlm.data.batch import LoadedSample, collate
from fvlm.data.chat import Layout, Text, segments
from fvlm.data.errors import MediaError, SampleError
from fvlm.data.plan import START, Pack, Plan, PlanState, Step
from fvlm.data.shard import ShardIndex, ShardReader
from fvlm.data.video import decode_jpeg
from fvlm.model.packed import PackedBatch

logger = logging.getLogger(__name__)

_OPEN_SHARDS = 64
_MIN_LOST = 10  # fewer lost samples than this stop no run, whatever their share


@dataclass(frozen=True, slots=True)
class LostSample:
    """A planned sample that could not be read."""

    shard: str
    key: str
    reason: str
    detail: str


@dataclass(kw_only=True, slots=True)
class LoadedPack:
    """A pack on the host."""

    batch: PackedBatch
    keys: list[str]
    """Of the samples in the batch, in its order."""
    lost: list[LostSample]

    def pin_memory(self) -> LoadedPack:
        """Called by torch's DataLoader."""
        return replace(self, batch=self.batch.pin_memory())


@dataclass(kw_only=True, slots=True)
class LoadedStep:
    """This rank's share of one step."""

    step: Step
    batches: list[PackedBatch]
    """The micro-batches, on the device."""
    keys: list[list[str]]
    """Sample keys of each micro-batch, in its order."""
    lost: list[LostSample]
    wait_s: float
    """Seconds that the caller waited for this step."""

    @property
    def skipped(self) -> Counter:
        """This rank's lost samples of the step by reason."""
        return Counter(sample.reason for sample in self.lost)


class PackLoader:
    """Iterates over the steps of a plan from `start` on, with the packs of one rank."""

    def __init__(
        self,
        plan: Plan,
        shards: Sequence[str | Path],
        indexes: Sequence[ShardIndex],
        tokenizer: PreTrainedTokenizerBase,
        image_size: int,
        *,
        packs_per_step: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        start: PlanState = START,
        device: torch.device | str = "cpu",
        max_bad_share: float = 0.01,
    ):
        """`shards` and `indexes` in the order of the plan's table; `image_size` in pixels.

        Raises ValueError if the ranks do not divide `packs_per_step`, or the shards are not those of the plan.
        Iterating raises SampleError `too_many_unreadable` when more than `max_bad_share` of the samples read so far
        (and at least 10) are lost, and whatever else goes wrong in a worker.
        """
        if packs_per_step < 1 or packs_per_step % world_size:
            raise ValueError(
                f"packs_per_step = {packs_per_step}: expected a multiple of the number of ranks, {world_size}"
            )
        if len(shards) != len(indexes) or sum(len(index) for index in indexes) != len(plan.table):
            raise ValueError(
                f"{len(shards)} shards with {len(indexes)} indexes of {sum(len(index) for index in indexes)} samples: "
                f"expected those of the plan's table, {len(plan.table)} samples"
            )
        self._plan, self._packs_per_step, self._start = plan, packs_per_step, start
        self._rank, self._world_size = rank, world_size
        self._reader = _PackReader(plan, shards, indexes, tokenizer, image_size)
        self._num_workers = num_workers
        self._device = torch.device(device)
        self._max_bad_share = max_bad_share

    def __iter__(self) -> Iterator[LoadedStep]:
        steps = self._host_steps()
        if self._device.type == "cuda":
            steps = _copied_ahead(steps, self._device)
        num_read, reasons = 0, Counter()
        with closing(steps):
            while True:
                begin = time.perf_counter()
                loaded = next(steps, None)
                if loaded is None:
                    return
                loaded.wait_s = time.perf_counter() - begin
                reasons += loaded.skipped
                num_read += sum(len(keys) for keys in loaded.keys) + len(loaded.lost)
                self._report(loaded.lost, num_read, reasons)
                yield loaded

    def _host_steps(self) -> Iterator[LoadedStep]:
        ahead: deque[Step] = deque()  # planned, and on their way through the workers
        packs = iter(
            DataLoader(
                self._reader,
                batch_size=None,
                sampler=self._my_packs(ahead),
                num_workers=self._num_workers,
                multiprocessing_context="fork" if self._num_workers else None,  # workers share the indexes' memory
                pin_memory=self._device.type == "cuda",
                generator=torch.Generator(),  # or it would draw from the run's own random numbers
            )
        )
        mine: list[LoadedPack] = []
        try:
            for pack in packs:
                mine.append(pack)
                if len(mine) == self._packs_per_step // self._world_size:
                    yield _host_step(ahead.popleft(), mine)
                    mine = []
        finally:
            if self._num_workers:  # now: an error's traceback holds the workers, and garbage collection waits for them
                packs._shutdown_workers()

    def _my_packs(self, ahead: deque[Step]) -> Iterator[Pack]:
        for step in self._plan.steps(self._packs_per_step, self._start):
            ahead.append(step)
            yield from step.packs[self._rank :: self._world_size]

    def _report(self, lost: list[LostSample], num_read: int, reasons: Counter) -> None:
        for sample in lost:
            logger.warning("skipped %s, %s: %s: %s", sample.shard, sample.key, sample.reason, sample.detail)
        if lost and reasons.total() >= _MIN_LOST and reasons.total() > self._max_bad_share * num_read:
            raise SampleError(
                "too_many_unreadable",
                f"{reasons.total()} of {num_read} samples could not be read: {dict(reasons)}, the last one "
                f"{lost[-1].key} of {lost[-1].shard}; more than max_bad_share = {self._max_bad_share} allows: "
                f"repair the shards or raise it",
            )


def _host_step(step: Step, packs: list[LoadedPack]) -> LoadedStep:
    return LoadedStep(
        step=step,
        batches=[pack.batch for pack in packs],
        keys=[pack.keys for pack in packs],
        lost=[sample for pack in packs for sample in pack.lost],
        wait_s=0.0,
    )


class _PackReader(Dataset):
    """Runs in the workers: a pack's rows in, a finished batch out."""

    def __init__(self, plan: Plan, shards, indexes, tokenizer: PreTrainedTokenizerBase, image_size: int):
        self._table, self._capacities, self._objective = plan.table, plan.capacities, plan.objective
        self._mixture = plan.mixture
        self._shards, self._indexes = [Path(shard) for shard in shards], indexes
        self._tokenizer, self._image_size = tokenizer, image_size
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    def __getitem__(self, pack: Pack) -> LoadedPack:
        samples, lost = [], []
        for row, layout in zip(pack.rows.tolist(), pack.layouts.tolist(), strict=True):
            shard, key = int(self._table.shard[row]), self._key(row)
            try:
                samples.append(self._load(row, Layout(layout)))
            except (SampleError, MediaError) as error:
                lost.append(LostSample(str(self._shards[shard]), key, error.reason, error.detail))
        batch = collate(samples, self._capacities, self._objective, self._image_size, self._mixture.grid)
        return LoadedPack(batch=batch, keys=[sample.key for sample in samples], lost=lost)

    def _key(self, row: int) -> str:
        return str(self._indexes[self._table.shard[row]].keys[self._table.row[row]])

    def _load(self, row: int, layout: Layout) -> LoadedSample:
        try:
            meta, jpegs = self._shard(int(self._table.shard[row])).read(int(self._table.row[row]))
        except OSError as error:  # deleted or unreadable while the run goes on
            raise SampleError("unreadable_shard", str(error)) from error
        parts = segments(meta, self._tokenizer, layout, **self._mixture.visual_arguments)
        planned = (self._table.narrated_tokens if layout == Layout.NARRATED else self._table.tokens)[row]
        found = sum(part.token_ids.size for part in parts if isinstance(part, Text))
        if found != planned:
            raise SampleError("index_mismatch", f"{found} text tokens, the index says {planned}; build the index anew")
        if meta["kind"] == "image":
            jpegs = jpegs[:1]
        frames = np.zeros((len(jpegs), 3, self._image_size, self._image_size), np.uint8)
        for number, jpeg in enumerate(jpegs):
            frames[number] = decode_jpeg(jpeg, self._image_size)
        return LoadedSample(key=meta["key"], segments=parts, frames=frames, source_id=int(self._table.source[row]))

    def _shard(self, number: int) -> ShardReader:
        if number not in self._open:
            if len(self._open) >= _OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[number] = ShardReader(self._shards[number], self._indexes[number])
        self._open.move_to_end(number)
        return self._open[number]


def _copied_ahead(steps: Iterator[LoadedStep], device: torch.device) -> Iterator[LoadedStep]:
    """Each step on the device; its copy runs on a stream of its own while the step before it is computed."""
    stream = torch.cuda.Stream(device)
    waiting: tuple[LoadedStep, torch.cuda.Event] | None = None
    for loaded in steps:
        with torch.cuda.stream(stream):
            loaded.batches = [batch.to(device, non_blocking=True) for batch in loaded.batches]
        if waiting is not None:
            yield _arrived(*waiting, device)
        waiting = (loaded, stream.record_event())
    if waiting is not None:
        yield _arrived(*waiting, device)


def _arrived(loaded: LoadedStep, copied: torch.cuda.Event, device: torch.device) -> LoadedStep:
    """The step's tensors may be used on the current stream, and their memory is not reused before it is done."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for batch in loaded.batches:
        for field in fields(batch):
            if isinstance(tensor := getattr(batch, field.name), torch.Tensor):
                tensor.record_stream(current)
    return loaded
