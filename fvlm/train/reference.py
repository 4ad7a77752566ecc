"""Log-probabilities of a preference set's answers under the frozen reference: computed once, before training, and kept.

The reference is the model that the run starts from. In the run's folder `reference.safetensors` holds the figures of
the training pairs, `reference-val.safetensors` those of the validation pairs, and copies under `data.cache_dir` serve
other runs of the same weights, data and way of asking. So the reference is not in memory while the run trains.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from fvlm.config import RunConfig
from fvlm.data.loader import PackLoader
from fvlm.data.mixture import Mixture
from fvlm.data.plan import Plan
from fvlm.data.shard_index import complete
from fvlm.model.base import cast_parameters
from fvlm.schema import ConfigError
from fvlm.train.build import TrainingData, load_model
from fvlm.train.engine import World
from fvlm.train.heartbeat import Heartbeat
from fvlm.train.preference import answer_logprobs
from fvlm.train.zero_config import resolve_dtype

logger = logging.getLogger(__name__)

TRAINING, VALIDATION = "reference.safetensors", "reference-val.safetensors"


def reference_logprobs(
    config: RunConfig, sets: Mapping[str, TrainingData], world: World, resumed: bool, heartbeat: Heartbeat
) -> dict[str, np.ndarray]:
    """float32 [n, 2] for each of the `sets`, which are named by the files that keep what is found.

    These are the log-probabilities of each table row's chosen and rejected answer, NaN where it has none.

    Collective. A resumed run takes the figures that it began with.
    Raises ConfigError where these are gone or of other data.
    """
    asked = {name: _asked(config, data, world) for name, data in sets.items()}
    if resumed:
        return {name: _kept(config.folder / name, asked[name]) for name in sets}
    start = replace(config, train=replace(config.train, lora=None))
    model = load_model(start, len(next(iter(sets.values())).tokenizer))
    weights = world.broadcast(_digest(model) if world.is_main else None)
    found = {}
    for name, data in sets.items():
        key = hashlib.sha256(f"{weights} {asked[name]}".encode()).hexdigest()[:16]
        copies = [config.folder / name]
        copies += [Path(config.data.cache_dir) / f"reference-{key}.safetensors"] if config.data.cache_dir else []
        found[name] = world.broadcast(_first(copies, key) if world.is_main else None)
        if found[name] is None:
            found[name] = _compute(model, config, data, world, heartbeat)
            num_pairs = np.isfinite(found[name]).all(1).sum()
            logger.info("%-8s %s: log-probabilities of %s pairs computed", "dpo", name, f"{num_pairs:,}")
        else:
            logger.info("%-8s %s: log-probabilities of the reference found: key %s", "dpo", name, key)
        if world.is_main:
            for path in copies:
                _write(path, found[name], {"key": key, "asked": asked[name]})
        world.barrier()
    return found


def _kept(path: Path, asked: str) -> np.ndarray:
    found = _read(path, asked=asked)
    if found is None:
        raise ConfigError(
            f"{path}: missing, or not of this run's data; it holds the reference's log-probabilities. Copy it "
            f"back, or start anew with another --out"
        )
    return found


def _asked(config: RunConfig, data: TrainingData, world: World) -> str:
    """SHA-256 of what the figures depend on beside the weights."""
    layout = asdict(_whole(data))
    on_gpu = world.device.type == "cuda"
    tars = [index.tar_fingerprint for index in data.indexes]
    known: dict[str, Any] = {"samples": data.table.digest(), "tars": tars}
    known |= {"mode": config.train.mode, "fine_iterations": config.train.fine_iterations, "layout": layout}
    known |= {"dtype": resolve_dtype(config.train, on_gpu), "tokenizer": data.identity()["tokenizer"]}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _whole(data: TrainingData) -> Mixture:
    """Every sample once, laid out as in training."""
    trained = data.plan.mixture
    return Mixture(
        looks=trained.looks,
        question_first=trained.question_first,
        tokens_per_frame=trained.tokens_per_frame,
        grid=trained.grid,
    )


def _digest(model: nn.Module) -> str:
    """SHA-256 of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def _compute(model: nn.Module, config: RunConfig, data: TrainingData, world: World, heartbeat: Heartbeat) -> np.ndarray:
    on_gpu = world.device.type == "cuda"
    model.eval().to(world.device)
    if resolve_dtype(config.train, on_gpu) == "bf16":
        cast_parameters(model, torch.bfloat16)
    size = len(data.table)
    plan = Plan(data.table, _whole(data), data.plan.capacities, "dpo", seed=0, total_samples=size)
    loader = PackLoader(
        plan,
        data.shards,
        data.indexes,
        data.tokenizer,
        config.model.frame_size,
        packs_per_step=world.size,
        rank=world.rank,
        world_size=world.size,
        num_workers=config.data.num_workers,
        device=world.device,
        max_bad_share=config.data.max_bad_share,
        cache=data.cache,
    )
    sums, known = torch.zeros(size, 2), torch.zeros(size)
    arguments = {"mode": config.train.mode, "fine_iterations": config.train.fine_iterations[0]}
    with tqdm(total=size, desc="reference", unit="pair", disable=None if world.is_main else True, leave=False) as bar:
        for loaded in loader:
            heartbeat.beat("evaluation", loaded.step.index)
            for batch, rows in zip(loaded.batches, loaded.rows, strict=True):
                found = answer_logprobs(model(batch=batch, **arguments).logprobs, batch).cpu()
                pairs = torch.tensor(rows[::2], dtype=torch.int64)
                sums[pairs] = found[: len(rows)].view(-1, 2)
                known[pairs] = 1
            bar.update(loaded.step.samples)
    both = world.sum(torch.cat([sums, known[:, None]], dim=1).to(world.device)).cpu()  # each row is one rank's
    return torch.where(both[:, 2:] > 0, both[:, :2], torch.nan).numpy()


def _first(paths: list[Path], key: str) -> np.ndarray | None:
    return next((found for path in paths if (found := _read(path, key=key)) is not None), None)


def _read(path: Path, **expected: str) -> np.ndarray | None:
    """What a file holds, if it is there and of what is `expected`."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            known = file.metadata() or {}
            return file.get_tensor("logprob") if expected.items() <= known.items() else None
    except (OSError, SafetensorError) as error:
        logger.warning("%s: passed over, computing it anew: %s", path, error)
        return None


def _write(path: Path, logprob: np.ndarray, known: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete(path) as file:
        file.write(save({"logprob": torch.from_numpy(logprob)}, metadata=known))
