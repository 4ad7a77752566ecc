"""What a training benchmark trains: samples of a mix, the stage's own configuration over them, and the plan.

Samples are drawn (`dataloader_samples`), weights are random in the published geometry, the tokenizer is the built-in
one: nothing is downloaded. The language model keeps its vocabulary of 49152, so that its head costs what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.dataloader_samples import DrawnSet, draw_set
from fvlm.config import RunConfig, load_config
from fvlm.data.chat import Layout, load_tokenizer
from fvlm.data.table import DIMENSIONS, sample_costs
from fvlm.model import FoveatedConfig, build_model
from fvlm.train.build import TrainingData, geometry, load_data

STAGES = {"stage1": "stage1", "stage2": "stage2", "dpo": "dpo"}
"""Mix -> prefix of its configurations in `launch/configs`."""
MODELS = ("135m", "360m", "1b7", "tiny")
SEED = 0
WINDOW = 4096
"""Samples that a run packs together."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Everything that a training step needs, on disk and as objects."""

    model: str
    mix: str
    folder: Path
    drawn: DrawnSet
    config: RunConfig
    """The stage's, with what the benchmark changes; `init_from` are the weights that all contenders start from."""
    geometry: FoveatedConfig
    data: TrainingData
    means: dict[str, float]
    """Of a drawn sample, by `DIMENSIONS`; `text` is the share without frames."""


def make_workload(
    folder: Path, model: str, mix: str, *, num_samples: int, seed: int = SEED, overrides: Sequence[str] = ()
) -> Workload:
    """Draw samples and weights into `folder`, and plan.

    `overrides` are `key=value` of the run's configuration. Raises ConfigError for a configuration that cannot be.
    """
    window = [f"data.window={num_samples}"] if num_samples < WINDOW else []  # an epoch, packed as a whole
    config = run_config(folder, model, mix, [*window, *overrides])
    drawn = draw_set(folder, num_samples, config.model.frame_size, seed, mix)
    geometry = draw_weights(folder / "weights", config, seed)
    data = load_data(config)
    means = sample_means(data)
    if config.data.frames == "auto":
        config, data = _balance_frames(config, data)
    return Workload(
        model=model, mix=mix, folder=folder, drawn=drawn, config=config, geometry=geometry, data=data, means=means,
    )  # fmt: skip


def run_config(folder: Path, model: str, mix: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The stage's configuration over what is drawn into `folder`.

    There is no warm-up and no probe, which is one step in fifty: every step is like any other, and learns.
    """
    stage = f"{STAGES[mix]}_{'135m' if model == 'tiny' else model}"
    changes = [
        f"out={folder / 'run'}",
        f"init_from={folder / 'weights'}",
        f"model.preset={model}",
        f"data.train=[{folder / 'shards'}]",
        "data.val=[]",
        "data.tokenizer=tiny",
        "data.cache_dir=null",
        "data.mixture.missing=skip",
        "train.warmup=0",
        "train.probe_every=0",
        "train.preflight=false",
    ]
    return load_config(stage, [*changes, *overrides])


def draw_weights(folder: Path, config: RunConfig, seed: int = SEED) -> FoveatedConfig:
    """Write a model with random weights; returns its geometry."""
    chosen = config.model
    shape = geometry(chosen, len(load_tokenizer("tiny")))
    torch.manual_seed(seed)
    build_model(shape).save_pretrained(folder)
    return shape


def sample_means(data: TrainingData) -> dict[str, float]:
    """What a drawn sample costs on average, and the share of text-only ones."""
    means = dict(zip(DIMENSIONS, _costs(data).mean(axis=0).tolist(), strict=True))
    return means | {"text": float((data.table.num_frames == 0).mean())}


def _costs(data: TrainingData) -> np.ndarray:
    """int64 [n, 6]: of the drawn samples, by `DIMENSIONS`."""
    plan, table = data.plan, data.table
    layouts = np.full(len(table), Layout.VIDEO_FIRST, np.uint8)
    return sample_costs(table, slice(0, len(table)), layouts, plan.mixture, plan.objective)


def _balance_frames(config: RunConfig, data: TrainingData) -> tuple[RunConfig, TrainingData]:
    """Packs that are small for a CPU, with as many frames as their tokens call for.

    By itself a pack has room for the longest clip of all, which would leave most of it empty; longer ones are refused.
    """
    table, capacities = data.table, data.plan.capacities
    if capacities.frames > table.num_frames.max():
        return config, data
    costs = _costs(data)
    frames = capacities.frames
    for _ in range(3):  # without the clips that are left out, fewer are called for
        fits = (costs[:, 0] <= frames) & (costs[:, 1] <= capacities.tokens)
        mean_frames, mean_tokens = costs[fits, :2].mean(axis=0)
        frames = int(1.02 * capacities.tokens * mean_frames / mean_tokens) + 1
    config = replace(config, data=replace(config.data, frames=frames))
    return config, load_data(config)
