"""Runs a function on several real gloo ranks, each a process of its own, forked from one that has imported the rest."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any

import torch

TIMEOUT = 180
PRELOADED = ["torch", "deepspeed", "transformers", "launch.train"]


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def forkserver() -> BaseContext:
    """Where processes are forked from: it imports once what each of them would need many seconds for.

    With a GPU they are started afresh: CUDA does not outlive a fork once somebody has asked for it.
    """
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # its own; it is not given this one's
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_ranks(function: Callable, world_size: int, *args: Any) -> list[Any]:
    """`function(world, *args)` on every rank; results in rank order. Raises RuntimeError with a rank's traceback."""
    context = forkserver()
    results = context.Queue()
    port = free_port()
    environment = dict(os.environ)
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, function, args, results, environment), daemon=True)
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


def _rank(
    rank: int, world_size: int, port: int, function: Callable, args: tuple, results: Any, environment: dict
) -> None:
    os.environ |= environment | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
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
