"""Where a run starts: afresh, or from its newest valid checkpoint, which has to be of the same run."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from fvlm.config import RunConfig, config_hash, identity
from fvlm.data.plan import PlanState
from fvlm.schema import ConfigError
from fvlm.train.checkpoint import CheckpointStore, RunState, read_state
from fvlm.train.describe import commit
from fvlm.train.engine import World

logger = logging.getLogger(__name__)

LOCK = ".lock"


def seed_everything(seed: int, rank: int) -> None:
    """Random states of a fresh run, different on each rank."""
    random.seed(seed + rank)
    torch.manual_seed(seed + rank)


@contextmanager
def alone_in(folder: Path, world: World) -> Iterator[None]:
    """Keep other runs out of `folder` while the `with` block lasts; collective.

    The kernel holds the lock for rank 0's process and lets go of it when that ends, however it ends; a lock file that a
    dead run left behind therefore stands in nobody's way. Raises ConfigError, on all ranks, where a run is at work.
    """
    file, problem = _lock(folder / LOCK) if world.is_main else (None, None)
    problem = world.broadcast(problem)
    if problem is not None:
        raise ConfigError(problem)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _lock(path: Path) -> tuple[IO[str] | None, str | None]:
    """(the locked file, None), or (None, who has it); no lock, and a warning, where the file system knows none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning("%s: %s; a second run in this folder would not be noticed", path, error)
            return file, None
        file.seek(0)
        owner = file.read().strip() or "of unknown host and process"
        file.close()
        return None, (
            f"{path.parent}: a run is at work there already ({owner}); wait for it, stop it, or choose another --out"
        )
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file, None


def find_start(
    config: RunConfig, data: dict[str, Any], world: World, zero_stage: int, dtype: str, store: CheckpointStore
) -> tuple[RunState, Path | None]:
    """(state, checkpoint to load or None for a fresh run); collective.

    `data` is `TrainingData.identity()`. Damaged checkpoints are reported and passed over.

    Another number of ranks or ZeRO stage than the checkpoint's is no obstacle: `CheckpointStore.load` reshapes it.

    Raises ConfigError if the ranks disagree; if the newest valid checkpoint is of another configuration, data set or
    dtype; if there are several and none is valid. It says what to do.
    """
    seen = world.gather((config_hash(config), data, zero_stage, dtype))
    if different := [rank for rank, found in enumerate(seen) if found != seen[0]]:
        raise ConfigError(
            f"ranks {different} see another configuration or other data than rank 0: {seen[different[0]]} against "
            f"{seen[0]}; give all nodes the same files"
        )
    found, damaged = store.find()
    for problem in damaged:
        logger.warning("checkpoint passed over: %s", problem)
    fresh = RunState(
        run_id=f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}",
        config_hash=config_hash(config),
        identity=identity(config),
        commit=commit(),
        world_size=world.size,
        zero_stage=zero_stage,
        dtype=dtype,
        data=data,
        plan=asdict(PlanState()),
    )
    if found is None:
        if len(damaged) > 1:  # a single one is a run's first save: starting over loses one interval
            raise ConfigError(f"{store.folder}: none of its {len(damaged)} checkpoints is valid; {_start_over(config)}")
        return fresh, None
    state = read_state(found)
    _require_same(state, fresh, found, config)
    state.data = data
    return state, found


def _require_same(state: RunState, fresh: RunState, found: Path, config: RunConfig) -> None:
    keys = sorted(state.identity.keys() | fresh.identity.keys())
    changed = [
        f"{key} = {state.identity.get(key)!r} -> {fresh.identity.get(key)!r}"
        for key in keys
        if state.identity.get(key) != fresh.identity.get(key)
    ]
    if changed or state.config_hash != fresh.config_hash:
        shown = "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise ConfigError(f"{found} is of another configuration ({shown}); undo that, or {_start_over(config)}")
    pairs = [(key, old, fresh.data.get(key)) for key, old in state.data.items()]  # an older program's has fewer keys
    if other := [f"{key} = {old!r} -> {new!r}" for key, old, new in pairs if old != new]:
        raise ConfigError(
            f"{found} was made from other data ({'; '.join(other)}); restore the shards, or {_start_over(config)}"
        )
    if state.dtype != fresh.dtype:
        raise ConfigError(
            f"{found} was made with dtype {state.dtype}, this start has dtype {fresh.dtype}, which is another curve; "
            f"set train.dtype={state.dtype}. Its weights serve any run as init_from={found}"
        )


def _start_over(config: RunConfig) -> str:
    return f"choose another --out, or remove {config.folder} to start over"
