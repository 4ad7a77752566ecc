"""Who competes for throughput: the product's own training step, and `benchmarks.naive` with its variants.

All start from the same weights and take the same steps of one plan, loading included.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.mixes import Workload
from benchmarks.naive import NaiveTrainer, NaiveVLM
from fvlm.config import RunConfig
from fvlm.data.batch import LoadedSample
from fvlm.data.chat import Layout, segments
from fvlm.data.loader import LoadedStep
from fvlm.data.plan import START, Step
from fvlm.data.shard import ShardReader
from fvlm.data.video import decode_jpeg
from fvlm.schema import ConfigError
from fvlm.train import schedule
from fvlm.train.build import load_model, open_loader
from fvlm.train.checkpoint import CheckpointStore
from fvlm.train.engine import Engine, World
from fvlm.train.heartbeat import Heartbeat
from fvlm.train.loop import Trainer
from fvlm.train.preemption import Notice
from fvlm.train.start import find_start
from fvlm.train.zero_config import read_zero_json, resolve_dtype, zero_stage
from fvlm.train_config import TrainConfig

PREFETCH = 2
"""Batches on their way through each worker, in both loaders."""


class Records(list):
    """Stands in for `MetricsWriter`: keeps the records of steps."""

    def step(self, record: dict[str, Any]) -> None:
        """A step was read."""
        self.append(record)


class Contender(Protocol):
    """Trains one step after the other."""

    drain: int
    """Steps after which nothing is left of what loader processes prepared while others were computing."""

    def step(self) -> float:
        """One step, from loading on, as far as the host has to do with it: seconds spent waiting for data."""

    def finish(self) -> None:
        """Wait until the device is through."""

    @property
    def losses(self) -> list[float]:
        """Of each finished step, per label or pair."""

    def close(self) -> None:
        """End the loader's processes, and free what is held."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the product runs, beside the run's configuration."""

    train: Mapping[str, Any] = field(default_factory=dict)
    """Changes of `fvlm.train_config.TrainConfig`."""
    zero: str = "zero2"
    """DeepSpeed JSON."""
    kernels: str | None = None
    """`FVLM_KERNELS`; None: as the environment has it."""

    def of(self, config: RunConfig) -> RunConfig:
        """The configuration with this setting's changes. Raises ConfigError for a field that does not exist."""
        known = TrainConfig.__dataclass_fields__
        if unknown := sorted(set(self.train) - set(known)):
            raise ConfigError(f"train.{unknown[0]}: no such setting in this version")
        return replace(config, train=replace(config.train, **self.train))


class Product:
    """`PackLoader`, `Trainer` and `Engine`, as `launch/train.py` puts them together.

    Raises ConfigError for a setting that cannot run here.
    """

    def __init__(self, workload: Workload, setting: Setting, world: World, reference: np.ndarray | None = None):
        """`reference` of `dpo`, as `fvlm.train.reference` gives it."""
        self.config, self.setting, data = setting.of(workload.config), setting, workload.data
        zero = read_zero_json(setting.zero)
        dtype = resolve_dtype(self.config.train, world.device.type == "cuda")
        with _environment(FVLM_KERNELS=setting.kernels):
            self.engine = Engine(load_model(self.config, len(data.tokenizer)), self.config.train, *zero, world)
        store = CheckpointStore(workload.folder / "none", world)
        state, _ = find_start(self.config, data.identity(), world, zero_stage(zero[0], dtype), dtype, store)
        alone = Heartbeat(world.rank, world.size)  # not started: nobody is to be ended
        self._records = Records()
        self.trainer = Trainer(self.engine, self.config, data.plan, state, store, self._records, None, alone, Notice())
        self._steps = iter(open_loader(self.config, data, world, START, reference))
        self.drain = _drain(self.config, self.engine.accumulation) + (world.device.type == "cuda")
        self.loaded: LoadedStep | None = None
        """The last step that was loaded."""

    def step(self) -> float:
        """Load, train, and what the loop does about the step before."""
        begin = time.perf_counter()
        self.load()
        waited = time.perf_counter() - begin
        self.train()
        return waited

    def load(self) -> None:
        """The next step's packs."""
        self.loaded = next(self._steps)
        if self.loaded.lost:
            raise RuntimeError(f"sample lost: {self.loaded.lost[0]}")

    def train(self) -> None:
        """One step on what was loaded."""
        with _environment(FVLM_KERNELS=self.setting.kernels):
            self.trainer.advance(self.loaded)

    def finish(self) -> None:
        """Read the step under way."""
        self.trainer.settle()

    @property
    def losses(self) -> list[float]:
        """Of each step that was read, per label or pair."""
        found = [record["train_loss"] for record in self._records]
        return [math.nan if loss is None else loss for loss in found]  # a record has None for what is not finite

    def close(self) -> None:
        """End the loader's processes, and free the engine's memory."""
        self._steps.close()
        self.engine.close()


class Naive:
    """`NaiveTrainer` behind a torch `DataLoader` with as many workers as the product has."""

    def __init__(self, workload: Workload, cls: type[NaiveVLM], world: World, batch_size: int):
        self._workload, self._train, config = workload, workload.config.train, workload.config
        model = cls(load_model(config, len(workload.data.tokenizer)))
        self.trainer = NaiveTrainer(model, self._train, world.device, batch_size)
        self._plan = workload.data.plan.steps(config.train.packs_per_step)
        self._ahead: list[tuple[Step, int]] = []  # planned, and the number of their batches
        workers = config.data.num_workers
        loader = DataLoader(
            BatchReader(workload, cls.collate),
            batch_size=None,
            sampler=self._tasks(batch_size),
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),
            pin_memory=world.device.type == "cuda",
        )
        self._batches = iter(loader)
        self._sums: list[tuple[torch.Tensor, int]] = []
        self.drain = _drain(config, 1)

    def step(self) -> float:
        """Load and train on the next step's samples."""
        self._waited = 0.0
        first = self._load()  # plans the step, if no worker has
        step, count = self._ahead.pop(0)
        batches = itertools.chain([first], (self._load() for _ in range(count - 1)))
        rates = schedule.learning_rates(self._train, step.samples_seen / self._train.total_samples)
        self._sums.append((self.trainer.step_on(batches, rates, step.planned), step.planned))
        return self._waited

    def _load(self) -> Any:
        begin = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - begin
        return batch

    def finish(self) -> None:
        """Read the last loss."""
        self._sums[-1][0].item()

    @property
    def losses(self) -> list[float]:
        """Of each step, per label or pair."""
        return [float(total) / planned for total, planned in self._sums]

    def _tasks(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows and layouts of each batch, step after step."""
        for step in self._plan:
            rows = np.concatenate([pack.rows for pack in step.packs])
            layouts = np.concatenate([pack.layouts for pack in step.packs])
            starts = range(0, len(rows), batch_size)
            self._ahead.append((step, len(starts)))
            for start in starts:
                yield rows[start : start + batch_size], layouts[start : start + batch_size]

    def close(self) -> None:
        """End the loader's processes."""
        if self._workload.config.data.num_workers:
            self._batches._shutdown_workers()


class BatchReader(Dataset):
    """Reads samples by rows of the plan's table, and collates them."""

    def __init__(self, workload: Workload, collate: Any):
        self._data, self._size, self._collate = workload.data, workload.config.model.frame_size, collate
        self._shards: dict[int, ShardReader] = {}

    def __getitem__(self, task: tuple[np.ndarray, np.ndarray]) -> Any:
        samples = [sample for row, layout in zip(*task, strict=True) for sample in self.read(int(row), Layout(layout))]
        return self._collate(samples, self._data.plan.objective)

    def read(self, row: int, layout: Layout) -> list[LoadedSample]:
        """A sample, or a pair's two, which share their frames."""
        data, table = self._data, self._data.table
        shard = int(table.shard[row])
        if shard not in self._shards:
            self._shards[shard] = ShardReader(data.shards[shard], data.indexes[shard])
        meta, media = self._shards[shard].read(int(table.row[row]))
        used = media[:1] if meta["kind"] == "image" else media
        frames = np.zeros((len(used), 3, self._size, self._size), np.uint8)
        for place, jpeg in enumerate(used):
            frames[place] = decode_jpeg(jpeg, self._size)
        shown, answers = data.plan.mixture.visual_arguments, ("chosen", "rejected")
        return [
            LoadedSample(
                key=meta["key"],
                segments=segments(meta, data.tokenizer, layout, **shown, answer=answer),
                frames=frames,
                source_id=int(table.source[row]),
            )
            for answer in answers[: 2 if data.plan.objective == "dpo" else 1]
        ]


def planned_steps(workload: Workload, count: int) -> list[Step]:
    """The first steps that every contender takes."""
    return list(itertools.islice(workload.data.plan.steps(workload.config.train.packs_per_step), count))


def _drain(config: RunConfig, per_step: int) -> int:
    """`Contender.drain` where a step is made of so many batches."""
    return -(-PREFETCH * config.data.num_workers // per_step)


@contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Environment variables for a while; None leaves one as it is."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
