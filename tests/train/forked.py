"""Runs of `launch/train.py` whose ranks are forked from a process that has imported everything."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from spawned import forkserver, free_port


def start(command_line: Sequence[str], world_size: int, log: Path, slow_disk: float = 0.0) -> list[BaseProcess]:
    """The ranks of one run, started; what they print goes to `log`.

    `slow_disk`: seconds, at most, that each flush to the disk takes longer, so that saving can be interrupted.
    """
    context, port = forkserver(), free_port()
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, list(command_line), log, slow_disk))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: Sequence[BaseProcess], timeout: float = 300) -> list[int | None]:
    """Exit codes; None for what had to be killed."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    kill(processes)
    return codes


def kill(processes: Sequence[BaseProcess]) -> None:
    """kill -9, one after the other, and wait until they are gone."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _rank(rank: int, world_size: int, port: int, command_line: list[str], log: Path, slow_disk: float) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {key: str(value) for key, value in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    import torch

    import launch.train

    torch.set_num_threads(1)
    if slow_disk:
        _slow_down(slow_disk)
    sys.argv = ["train.py", *command_line]
    sys.exit(launch.train.main())


def _slow_down(seconds: float) -> None:
    own, fsync = random.Random(), os.fsync

    def slow_fsync(descriptor: int) -> None:
        time.sleep(own.uniform(0, seconds))
        fsync(descriptor)
        time.sleep(own.uniform(0, seconds))

    os.fsync = slow_fsync
