"""Ranks of a benchmark: processes of this machine that meet as training's do."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from fvlm.train.engine import start_ranks, stop_ranks


def run_ranks(function: Callable, ranks: int, *args: Any, prepare: Callable[[], None] | None = None) -> Any:
    """`function(world, *args)` on every rank, each a process of its own; rank 0's result, a small one.

    On a CPU a rank computes with one thread, unless OMP_NUM_THREADS says otherwise. `prepare` is called in each process
    before the ranks meet. All must be importable by name. Raises RuntimeError with a rank's traceback, whichever fails.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    results = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        multiprocessing.spawn(_rank, (ranks, port, results, prepare, function, args), nprocs=ranks)
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
        raise RuntimeError(str(error).strip()) from None
    return results.get()


def _rank(
    rank: int, ranks: int, port: int, results: Any, prepare: Callable[[], None] | None, function: Callable, args: tuple
) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable(logging.WARNING)
    if prepare is not None:
        prepare()
    world = start_ranks()
    found = function(world, *args)
    if world.is_main:
        results.put(found)
    stop_ranks()
