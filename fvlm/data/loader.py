"""This rank's packs, read, decoded and laid out ahead of the step that needs them.

The main process plans; a worker gets one pack's rows and fills one of the shared buffers with it. The order is the
plan's, whatever the number of workers. A sample that cannot be read is dropped from its pack, logged and counted.
"""

from __future__ import annotations

import logging
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from fvlm.data.batch import PackLayout
from fvlm.data.buffers import BufferPool
from fvlm.data.errors import SampleError
from fvlm.data.look_ahead import LookAhead
from fvlm.data.plan import START, Plan, PlanState, Step
from fvlm.data.reader import LostSample, PackReader, ReadPack, Task
from fvlm.data.remote import RemoteShard
from fvlm.data.shard import ShardIndex
from fvlm.data.shard_cache import ShardCache
from fvlm.model.packed import PackedBatch

logger = logging.getLogger(__name__)

_AHEAD = 2  # packs on their way through each worker
_MIN_LOST = 10  # fewer lost samples than this stop no run, whatever their share


def num_buffers(num_workers: int, accumulation: int) -> int:
    """Packs that a rank holds in memory: on their way through its workers, and of three steps."""
    return _AHEAD * num_workers + 3 * accumulation + 1


@dataclass(kw_only=True, slots=True)
class LoadedStep:
    """This rank's share of one step."""

    step: Step
    batches: list[PackedBatch]
    """The micro-batches, on the device."""
    keys: list[list[str]]
    """Sample keys of each micro-batch, in its order; a preference pair's twice."""
    rows: list[list[int]]
    """The same samples' rows of the plan's table."""
    lost: list[LostSample]
    read_s: float
    """Seconds of the workers' time in this rank's packs, reading to finished buffer."""
    decode_s: float
    """Of these, in decoding JPEGs."""
    wait_s: float
    """Seconds that the caller waited for this step."""

    @property
    def skipped(self) -> Counter:
        """This rank's lost samples of the step by reason."""
        return Counter(sample.reason for sample in self.lost)


_Buffered = tuple[LoadedStep, list[torch.Tensor]]
"""A step whose batches are not made yet, and the buffers that hold them."""


class PackLoader:
    """Iterates over the steps of a plan from `start` on, with the packs of one rank."""

    def __init__(
        self,
        plan: Plan,
        shards: Sequence[str | Path | RemoteShard],
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
        cache: ShardCache | None = None,
        reference: np.ndarray | None = None,
    ):
        """`shards` and `indexes` in the order of the plan's table; `image_size` in pixels; `cache` for remote shards;
        `reference` float32 [n, 2]: log-probabilities of each table row's two answers, for the objective `dpo`.

        Raises ValueError if the ranks do not divide `packs_per_step`, or the shards are not those of the plan.
        Iterating raises SampleError `too_many_unreadable` when more than `max_bad_share` of the samples read so far
        (and at least 10) are lost, and whatever else goes wrong in a worker.
        """
        if packs_per_step < 1 or packs_per_step % world_size:
            raise ValueError(
                f"packs_per_step = {packs_per_step}: expected a multiple of the number of ranks, {world_size}"
            )
        if len(shards) != len(indexes) or not plan.table.fits([len(index) for index in indexes]):
            raise ValueError(
                f"{len(shards)} shards with {len(indexes)} indexes of {sum(len(index) for index in indexes)} samples: "
                f"expected those of the plan's table, {len(plan.table)} samples of {plan.table.num_shards} shards"
            )
        remote = any(isinstance(shard, RemoteShard) for shard in shards)
        if remote and cache is None:
            raise ValueError("remote shards need a folder for their copies; name one (data.cache_dir)")
        self._cache = cache if remote else None
        if remote:
            cache.forget_failures()
        if remote and rank == 0:  # it is the same for all
            _warn_of_small_cache(LookAhead(plan, shards, indexes, cache), start.window, cache)
        self._plan, self._packs_per_step, self._start = plan, packs_per_step, start
        self._rank, self._world_size = rank, world_size
        self._source = (plan, shards, indexes, tokenizer)
        self._layout = PackLayout(plan.capacities, image_size, plan.objective, plan.mixture.grid)
        self._reference = reference
        self._num_workers = num_workers
        self._device = torch.device(device)
        self._max_bad_share = max_bad_share

    def __iter__(self) -> Iterator[LoadedStep]:
        accumulation = self._packs_per_step // self._world_size
        pool = BufferPool(num_buffers(self._num_workers, accumulation), self._layout.nbytes)
        on_host = self._read_steps(pool, accumulation)
        steps = _copied_ahead(on_host, self._device) if self._device.type == "cuda" else on_host
        num_read, reasons = 0, Counter()
        with closing(on_host), closing(steps):
            while True:
                begin = time.perf_counter()
                loaded, buffers = next(steps, (None, []))
                if loaded is None:
                    return
                loaded.batches = [self._layout.batch(buffer) for buffer in buffers]
                del buffers  # the batches alone decide how long the memory is in use
                loaded.wait_s = time.perf_counter() - begin
                reasons += loaded.skipped
                num_read += sum(len(keys) for keys in loaded.keys) + len(loaded.lost)
                self._report(loaded.lost, num_read, reasons)
                yield loaded

    def _read_steps(self, pool: BufferPool, accumulation: int) -> Iterator[_Buffered]:
        """Steps as they come from the workers."""
        ahead: deque[Step] = deque()  # planned, and on their way through the workers
        reader = PackReader(
            *self._source,
            self._layout,
            pool,
            in_workers=self._num_workers > 0,
            cache=self._cache,
            reference=self._reference,
        )
        packs = iter(
            DataLoader(
                reader,
                batch_size=None,
                sampler=self._tasks(ahead, pool),
                num_workers=self._num_workers,
                prefetch_factor=_AHEAD if self._num_workers else None,
                multiprocessing_context="fork" if self._num_workers else None,  # workers share the indexes' memory
                generator=torch.Generator(),  # or it would draw from the run's own random numbers
                worker_init_fn=_outlive_a_notice,
            )
        )
        if self._device.type == "cuda":
            pool.pin()  # after the fork: workers have nothing to do with CUDA
        mine: list[ReadPack] = []
        try:
            for pack in packs:
                mine.append(pack)
                if len(mine) == accumulation:
                    yield _read_step(ahead.popleft(), mine), [pool.lend(pack.buffer) for pack in mine]
                    mine = []
        finally:
            reader.close()
            if self._num_workers:  # now: an error's traceback holds the workers, and garbage collection waits for them
                packs._shutdown_workers()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
                pool.unpin()

    def _tasks(self, ahead: deque[Step], pool: BufferPool) -> Iterator[Task]:
        for step in self._plan.steps(self._packs_per_step, self._start):
            ahead.append(step)
            for pack in step.packs[self._rank :: self._world_size]:
                yield Task(pack, pool.take(), step.state.window)

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


def _outlive_a_notice(_: int) -> None:
    """What tells a rank to stop reaches its workers too, while it still needs them; a second SIGTERM ends them."""
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _warn_of_small_cache(ahead: LookAhead, window: int, cache: ShardCache) -> None:
    needed = ahead.bytes_of(window)
    if needed > cache.limit:
        logger.warning(
            "data.cache_gb = %.3g: a window of the plan reads from %d shards of %.3g GB together, which will be "
            "downloaded again and again; raise it",
            cache.limit / 1e9,
            len(ahead.shards_of(window)),
            needed / 1e9,
        )


def _read_step(step: Step, packs: list[ReadPack]) -> LoadedStep:
    return LoadedStep(
        step=step,
        batches=[],
        keys=[pack.keys for pack in packs],
        rows=[pack.rows for pack in packs],
        lost=[sample for pack in packs for sample in pack.lost],
        read_s=sum(pack.read_s for pack in packs),
        decode_s=sum(pack.decode_s for pack in packs),
        wait_s=0.0,
    )


def _copied_ahead(steps: Iterator[_Buffered], device: torch.device) -> Iterator[_Buffered]:
    """Each step's buffers on the device, a copy each, which runs while the step before is computed."""
    stream = torch.cuda.Stream(device)
    before: tuple[LoadedStep, list[torch.Tensor], torch.cuda.Event] | None = None
    sources: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()  # until they are copied
    for loaded, buffers in steps:
        with torch.cuda.stream(stream):
            pinned = [buffer if buffer.is_pinned() else buffer.pin_memory() for buffer in buffers]
            copies = [buffer.to(device, non_blocking=True) for buffer in pinned]
        copied = stream.record_event()
        sources.append((copied, buffers))
        if before is not None:
            yield _arrived(*before, device)
        before = (loaded, copies, copied)
        del buffers, pinned, copies
        if len(sources) > 1:  # the step that was just computed needed it: nothing is waited for
            sources.popleft()[0].synchronize()
    if before is not None:
        yield _arrived(*before, device)


def _arrived(
    loaded: LoadedStep, copies: list[torch.Tensor], copied: torch.cuda.Event, device: torch.device
) -> _Buffered:
    """The copies may be used on the current stream, and their memory is not reused before it is done."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for copy in copies:
        copy.record_stream(current)
    return loaded, copies
