"""What is known of a run before its first step, and what is left to say after its last."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fvlm.config import REPOSITORY, RunConfig
from fvlm.data.remote import RemoteShard
from fvlm.train.build import TrainingData
from fvlm.train.checkpoint import RunState
from fvlm.train.engine import Engine
from fvlm.train.schedule import learning_rates
from fvlm.train.work import step_flops
from fvlm.train_config import GROUPS

logger = logging.getLogger(__name__)

CONVERGED_WITHIN = 0.01
TERMS = ("licence", "citation")


def commit() -> str:
    """Commit of the checkout, `+changes` where it has any; `unknown` outside of git."""
    git = ["git", "-C", str(REPOSITORY)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode != 0:
        return "unknown"
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def environment() -> dict[str, Any]:
    """Hardware and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or platform.processor() or platform.machine(),
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in ("torch", "transformers", "deepspeed")},
    }


def derived_numbers(config: RunConfig, data: TrainingData, engine: Engine, state: RunState) -> dict[str, str]:
    """Name → text of every number that follows from the configuration, for the reader before the first step."""
    train, plan, world = config.train, data.plan, engine.world
    first = next(plan.steps(train.packs_per_step))
    window_samples, window_packs = plan.window_bounds(0)[1], len(plan.window(0))
    num_steps = train.total_samples / window_samples * window_packs / train.packs_per_step
    counted = "pairs" if train.objective == "dpo" else "loss tokens"
    flops = step_flops(engine.module.config, plan, first, train.mode, max(train.fine_iterations))
    start, end = learning_rates(train, train.warmup), learning_rates(train, 1.0)
    capacities = plan.capacities
    seen = Counter(data.table.source_names[source] for source in data.table.source)
    return {
        "run": f"{config.name} in {config.folder}, configuration {state.config_hash}, commit {state.commit[:12]}",
        "ranks": f"{world.size} on {world.device.type}, {engine.dtype}, ZeRO-{engine.stage}",
        "model": f"{config.model.preset} {config.model.architecture}, {_parameters(engine.module)}",
        "data": f"{len(data.table):,} samples in {len(data.shards)} shards: "
        + ", ".join(f"{name} {count:,}" for name, count in seen.most_common()),
        "refused": _counts(plan.refused) + " in the first window",
        "pack": f"{capacities.frames} frames, {capacities.tokens} tokens, {capacities.visual} visual, "
        f"{capacities.coarse} coarse, {capacities.samples} samples, {capacities.labels} labels",
        "step": f"{train.packs_per_step} packs = {world.size} ranks x {engine.accumulation} micro-batches; "
        f"the first has {first.samples} samples, {first.planned:,} {counted}, {flops / 1e9:,.1f} GFLOP",
        "plan": f"{train.total_samples:,} samples, about {num_steps:,.0f} steps, {flops * num_steps:.3g} FLOP in all",
        "rates": ", ".join(f"{group} {start[group]:.3g} -> {end[group]:.3g}" for group in GROUPS)
        + f" ({train.schedule})",
        "start": f"step {state.step}, {state.samples_seen:,} samples seen",
    }


def run_summary(config: RunConfig, data: TrainingData, engine: Engine, state: RunState) -> dict[str, Any]:
    """Contents of `run_summary.json`."""
    return {
        "run_id": state.run_id,
        "name": config.name,
        "config_hash": state.config_hash,
        "commit": state.commit,
        "steps": state.step,
        "samples_seen": state.samples_seen,
        "wall_time_sec": state.wall_time_sec,
        "cost": cost(state.device_sec, config.price_per_gpu_hour),
        "final_metrics": state.metrics,
        "best": state.best,
        "convergence_step": convergence_step(
            config.folder / "metrics.jsonl", "preference/loss" if config.train.objective == "dpo" else "val_loss"
        ),
        "skipped_samples": state.skipped,
        "skipped_steps": state.guard.get("skipped_steps", 0),
        "refused_samples": dict(data.plan.all_refused()),
        "world_size": engine.world.size,
        "zero_stage": engine.stage,
        "dtype": engine.dtype,
        "parameters": _trained(engine.module),
        "data": state.data,
        "sources": source_terms(data.shards, data.table.source_names),
        "environment": environment(),
    }


def cost(device_sec: float, price: float | None) -> dict[str, float | None]:
    """Device-hours over all starts and numbers of ranks, and what they cost at `price` an hour; None without one."""
    hours = device_sec / 3600
    return {"gpu_hours": hours, "price_per_gpu_hour": price, "money": None if price is None else hours * price}


def source_terms(shards: Sequence[Path | RemoteShard], sources: Sequence[str]) -> dict[str, dict[str, str]]:
    """Licence and citation of each source as the `summary.json` beside its shards states them, else `not stated`.

    Where folders state different ones for the same source, all of them. Remote folders are not asked.
    """
    stated: dict[str, dict[str, list[str]]] = {name: {term: [] for term in TERMS} for name in sources}
    for folder in dict.fromkeys(shard.parent for shard in shards if isinstance(shard, Path)):
        licences = _licences(folder / "summary.json")
        for name, terms in stated.items():
            for term, texts in terms.items():
                text = licences.get(name, {}).get(term)
                if text and text not in texts:
                    texts.append(text)
    return {
        name: {term: "; ".join(texts) or "not stated" for term, texts in terms.items()}
        for name, terms in stated.items()
    }


def _licences(summary: Path) -> dict[str, dict[str, str]]:
    """What preparation noted; nothing, with a message, where the file is another."""
    if not summary.is_file():
        return {}
    try:
        licences = json.loads(summary.read_text(encoding="utf-8"))["licences"]
        return {name: {term: str(terms[term]) for term in TERMS} for name, terms in licences.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        logger.warning("%s states no licences: %s: %s", summary, type(error).__name__, error)
        return {}


def convergence_step(jsonl_path: Path, loss: str) -> int | None:
    """First evaluated step whose validation `loss` is within 1 % of the run's lowest; None without evaluations."""
    with jsonl_path.open(encoding="utf-8") as file:
        evaluations = [line for line in map(json.loads, file) if line["kind"] == "evaluation"]
    losses = {line["step"]: line[loss] for line in evaluations if line.get(loss) is not None}
    close = [step for step, loss in losses.items() if loss <= min(losses.values()) * (1 + CONVERGED_WITHIN)]
    return min(close) if close else None


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write by rename, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    temporary.rename(path)


def _trained(model: nn.Module) -> dict[str, int]:
    """Trained parameters by group; under ZeRO-3 a parameter knows its whole size as `ds_numel`."""
    groups = model.param_groups()
    return {name: sum(getattr(p, "ds_numel", p.numel()) for _, p in named) for name, named in groups.items()}


def _parameters(model: nn.Module) -> str:
    total = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    return f"{total:,} parameters; trained: " + ", ".join(f"{name} {n:,}" for name, n in _trained(model).items())


def _counts(counter: Counter) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counter.items()) or "none"
