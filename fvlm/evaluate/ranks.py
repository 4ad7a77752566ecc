"""The few collectives of evaluation; on one process, without a process group, they do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_is_alone: ContextVar[bool] = ContextVar("_is_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Within, this process counts as the only one: the caller has divided the work among the ranks already."""
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized() and not _is_alone.get():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of equally shaped float64 tensors over all ranks, on every rank."""
    if rank_and_world()[1] > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather_over_ranks(value: Any) -> list[Any]:
    """One picklable value from each rank, in rank order, on every rank."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, value)
    return gathered


def synchronize(device: torch.device) -> None:
    """Waits for the device's queued work, so that a clock read next is the time of the work and not of its launch."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
