"""Where a run starts: afresh, or from its newest valid checkpoint, which has to be of the same run."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fvlm.config import RunConfig, config_hash, identity
from fvlm.data.plan import PlanState
from fvlm.schema import ConfigError
from fvlm.train.checkpoint import CheckpointStore, RunState, read_state
from fvlm.train.describe import commit
from fvlm.train.engine import World

logger = logging.getLogger(__name__)


def seed_everything(seed: int, rank: int) -> None:
    """Random states of a fresh run, different on each rank."""
    random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def find_start(
    config: RunConfig, data: dict[str, Any], world: World, zero_stage: int, dtype: str, store: CheckpointStore
) -> tuple[RunState, Path | None]:
    """(state, checkpoint to load or None for a fresh run); collective.

    `data` is `TrainingData.identity()`. Damaged checkpoints are reported and passed over.

    Raises ConfigError if the ranks disagree; if the newest valid checkpoint is of another configuration, data set,
    number of ranks, ZeRO stage or dtype; if there are several and none is valid. It says what to do.
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
    if state.data != fresh.data:
        raise ConfigError(
            f"{found} was made from other data ({state.data}; now {fresh.data}); restore it, or {_start_over(config)}"
        )
    for name, what in (("world_size", "ranks"), ("zero_stage", "ZeRO stage"), ("dtype", "dtype")):
        before, now = getattr(state, name), getattr(fresh, name)
        if before != now:
            raise ConfigError(
                f"{found} was made with {what} {before}, this start has {what} {now}; start it as before: "
                f"its optimizer state is not converted. Its weights serve any run as init_from={found}"
            )


def _start_over(config: RunConfig) -> str:
    return f"choose another --out, or remove {config.folder} to start over"
