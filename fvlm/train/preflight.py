"""The worst-case pack before the first step: what does not fit in memory is known in the first minute.

A whole step is made of it, reductions and all, and then left out by the same mechanism as a step that must not count
(`Engine.step`): weights, moments, gradients, counters and random states are as before, bit for bit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from fvlm.config import RunConfig
from fvlm.data.capacities import Capacities
from fvlm.model import FoveatedConfig, PackedBatch
from fvlm.model.packed import SampleRows, assemble
from fvlm.schema import ConfigError
from fvlm.train import objectives, schedule
from fvlm.train.checkpoint import random_state, set_random_state
from fvlm.train.engine import Engine
from fvlm.train.gpus import GIB
from fvlm.train.planner import predict

logger = logging.getLogger(__name__)

SMALLER = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Shares of the capacities that are tried in turn once the whole did not fit."""


def preflight(engine: Engine, config: RunConfig, capacities: Capacities, zero: Mapping[str, Any]) -> None:
    """Run the worst-case pack, where `train.preflight` asks for it; every rank has to call it.

    Raises ConfigError, naming capacities that are predicted to fit, on a rank that runs out of memory; the launcher
    then ends the others, which may be waiting for it in a reduction.
    """
    train, world = config.train, engine.world
    wanted = train.preflight if train.preflight is not None else world.device.type == "cuda"
    if not wanted:
        return
    geometry = engine.module.config
    before = random_state()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    try:
        with engine.rehearsal():
            _run(engine, config, worst_case_pack(geometry, capacities))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise ConfigError(_advice(engine, config, capacities, zero, error)) from error
    set_random_state(before)
    if world.is_main:
        peak = torch.cuda.max_memory_allocated(world.device) / GIB if world.device.type == "cuda" else None
        measured = f"peak {peak:.2f} of {memory_of(world.device) / GIB:.2f} GiB allocated" if peak else "it ran"
        logger.info("%-8s worst-case pack, %s micro-batches of it: %s", "memory", engine.accumulation, measured)


def worst_case_pack(geometry: FoveatedConfig, capacities: Capacities) -> PackedBatch:
    """A pack at its capacities: T rows in samples as long as allowed, V looks over all F frames, K labels, on the CPU.

    Coarse rows are filled up with text before the first sample's looks, as far as they go.
    """
    grid = geometry.grid if geometry.architecture == "multi_token" else 0
    lengths = [capacities.max_seqlen] * (capacities.tokens // capacities.max_seqlen)
    lengths += [capacities.tokens % capacities.max_seqlen] if capacities.tokens % capacities.max_seqlen else []
    lengths = lengths[: capacities.samples]
    looks, coarse, labels = capacities.visual, capacities.coarse - capacities.visual, capacities.labels
    first_look, rows = 0, []
    for length in lengths:
        num_looks = max(0, min(looks, length - 2))  # two rows of text: one that predicts, one that is predicted
        lead = max(0, min(coarse, length - 2 - num_looks)) if num_looks else 0
        frame = np.full(length, -1)
        order = np.arange(first_look, first_look + num_looks)
        frame[lead : lead + num_looks] = order * capacities.frames // max(capacities.visual, 1)
        has_loss = (frame < 0) & (np.cumsum(frame < 0) > 1)
        has_loss[np.flatnonzero(has_loss)[labels:]] = False
        cell = np.where(frame >= 0, np.arange(length) % max(grid, 1), 0) if grid else None
        token_ids = np.arange(length) % geometry.llm_config.vocab_size
        rows.append(SampleRows(token_ids=token_ids, frame=frame, has_loss=has_loss, cell=cell))
        looks, coarse, labels = looks - num_looks, coarse - lead, labels - int(has_loss.sum())
        first_look += num_looks
    sizes = {"T": capacities.tokens, "V": capacities.visual, "C": capacities.coarse, "S": capacities.samples,
             "K": capacities.labels}  # fmt: skip
    side = geometry.image_size
    frames = torch.zeros((capacities.frames, 3, side, side), dtype=torch.uint8)
    return assemble(rows, frames, sizes, capacities.max_seqlen)


def memory_of(device: torch.device) -> int:
    """Bytes that this process may take: of the GPU, as far as torch's allocator is allowed to, or of the host."""
    if device.type != "cuda":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = torch.cuda.get_device_properties(device).total_memory
    return int(total * torch.cuda.get_per_process_memory_fraction(device))


def capacities_that_fit(
    engine: Engine, config: RunConfig, capacities: Capacities, zero: Mapping[str, Any], limit: float
) -> tuple[Capacities | None, float]:
    """The largest share of the capacities that is predicted to fit, or None, and the prediction for the whole, bytes.

    Where the planner had predicted that the whole fits, it is corrected by what was seen: the whole took more than
    `limit`.
    """

    def predicted(tried: Capacities) -> float:
        on_gpu = engine.world.device.type == "cuda"
        found = predict(
            engine.module.config, tried, zero, engine.world.size, dtype=engine.dtype, freeze=config.train.frozen,
            lora=config.train.lora, checkpointing=config.train.checkpointing, backend="triton" if on_gpu else "torch",
            **objectives.call_arguments(config.train, max(config.train.fine_iterations)),
        )  # fmt: skip
        return sum(found.values())

    whole = predicted(capacities)
    correction = max(1.0, 1.02 * limit / whole)
    for share in SMALLER:
        tried = _scaled(capacities, share)
        if correction * predicted(tried) <= limit:
            return tried, whole
    return None, whole


def _run(engine: Engine, config: RunConfig, batch: PackedBatch) -> None:
    train = config.train
    arguments = objectives.call_arguments(train, max(train.fine_iterations))
    if train.objective == "dpo":
        batch.reference_logprob = torch.zeros(len(batch.source_id))
    batch = batch.to(engine.world.device)
    for _ in range(engine.accumulation):
        out = engine.forward(batch=batch, **arguments)
        engine.backward(objectives.loss_sum(out, batch, train)[0], max(1, int(out.num_labels)))
        del out
    engine.step(schedule.learning_rates(train, 0.0), lambda norm: torch.ones_like(norm, dtype=torch.float32))


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in str(error)


def _scaled(capacities: Capacities, share: float) -> Capacities:
    sizes = {name: max(1, int(value * share)) for name, value in asdict(capacities).items()}
    sizes["max_seqlen"] = min(capacities.max_seqlen, sizes["tokens"])
    return replace(capacities, **sizes)


def _advice(
    engine: Engine, config: RunConfig, capacities: Capacities, zero: Mapping[str, Any], error: Exception
) -> str:
    """What to write instead."""
    if engine.world.device.type == "cuda":
        torch.cuda.empty_cache()
    limit = memory_of(engine.world.device)
    found, whole = capacities_that_fit(engine, config, capacities, zero, limit)
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    message = (
        f"out of memory: the worst-case pack (data.tokens = {capacities.tokens}, data.frames = {capacities.frames}) "
        f"does not fit into {limit / GIB:.1f} GiB (predicted: {whole / GIB:.1f} GiB; {said}). "
    )
    shares = config.train.checkpointing
    less = [] if shares.encoder == shares.llm == 1 else ["train.activation_checkpointing=true"]
    less += [] if "offload" in str(zero) else ["--ds_config zero2_offload.json"]
    others = f" Also: {', '.join(less)}." if less else ""
    if found is None:
        return f"{message}No smaller pack is predicted to fit.{others} python launch/plan.py says what does"
    return (
        f"{message}Predicted to fit: data.tokens={found.tokens} data.frames={found.frames}, with "
        f"data.longest={found.max_seqlen} or less.{others}"
    )
