"""Runs a function on several real gloo ranks, each a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT = 180


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(function: Callable, world_size: int, *args: Any) -> list[Any]:
    """`function(world, *args)` on every rank; results in rank order. Raises RuntimeError with a rank's traceback."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, function, args, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        return _collect(processes, results)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(processes: list, results: Any) -> list[Any]:
    found: dict[int, Any] = {}
    deadline = time.monotonic() + TIMEOUT
    while len(found) < len(processes):
        try:
            rank, value, error = results.get(timeout=1)
        except queue.Empty:
            silent = [p.exitcode for r, p in enumerate(processes) if r not in found and p.exitcode not in (None, 0)]
            if silent or time.monotonic() > deadline:
                raise RuntimeError(f"ranks without a result; exit codes {silent or 'none, time is up'}") from None
            continue
        if error is not None:
            raise RuntimeError(f"rank {rank}:\n{error}")
        found[rank] = pickle.loads(value)
    return [found[rank] for rank in range(len(processes))]


def _rank(rank: int, world_size: int, port: int, function: Callable, args: tuple, results: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    from fvlm.train.engine import start_ranks, stop_ranks

    torch.set_num_threads(1)
    try:
        world = start_ranks()
        value = function(world, *args)
        results.put(
            (rank, pickle.dumps(value), None)
        )  # as bytes: a queue shares tensors, and this process is about to end
        stop_ranks()
    except Exception:
        results.put((rank, None, traceback.format_exc()))
