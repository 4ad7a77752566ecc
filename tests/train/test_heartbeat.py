"""Ranks that stand still end, and say which one it was; ranks that are only slow where they may be do not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from spawned import free_port

from fvlm.train.heartbeat import LIMITS, Beat, Heartbeat

SCRIPT = """
import sys, time
import torch, torch.distributed as dist
from fvlm.train.heartbeat import Heartbeat

dist.init_process_group("gloo")
rank, num_ranks = dist.get_rank(), dist.get_world_size()
what, limits = sys.argv[1], {"step": 3.0, "data": 3.0, "start": 30.0, "checkpoint": 30.0, "evaluation": 8.0}
with Heartbeat(rank, num_ranks, limits) as heart:
    for step in range(200):
        heart.beat("data", step)
        if what == "sleeps" and rank == 1 and step == 5:
            time.sleep(60)
        heart.beat("step", step)
        dist.all_reduce(torch.ones(1))
        if what == "evaluates" and step == 5:
            heart.beat("evaluation", step)
            time.sleep(4)
        if what == "evaluates" and step == 9:
            break
        print(f"rank {rank} step {step}", flush=True)
        time.sleep(0.1)
print(f"rank {rank} is through", flush=True)
"""


def start(what: str) -> list[subprocess.Popen]:
    port, processes = free_port(), []
    for rank in range(2):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {key: str(value) for key, value in ranks.items()} | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([sys.executable, "-c", SCRIPT, what], env=environment, **pipes))
    return processes


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"ended without {text!r}: {process.stderr.read()}")


def end(processes: list[subprocess.Popen], seconds: float) -> list[tuple[int, str]]:
    """(exit code, standard error) of each rank; those still there after `seconds` are killed: -9."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.1)
    for process in processes:
        process.kill()
    return [(process.wait(), process.communicate()[1]) for process in processes]


def test_a_rank_that_stands_still_is_named_by_every_rank_and_all_end():
    ranks = end(start("sleeps"), 60)
    assert [code for code, _ in ranks] == [1, 1]
    for rank, (_, printed) in enumerate(ranks):
        # "not heard of" where a starved machine let rank 1's own thread fall silent too
        said = f"train: rank {rank}: rank 1 (came no further|was not heard of) for [0-9]+ s in phase 'data' of step 5"
        assert re.search(f"{said}; the limit there is 3 s", printed), printed
    assert "time.sleep" in ranks[1][1] or '"<string>", line 13' in ranks[1][1]  # where it slept


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_ends_the_others(stopped):
    processes = start("goes on")
    wait_for(processes[stopped], "step 5")
    processes[stopped].send_signal(signal.SIGSTOP)
    code, printed = end([processes[1 - stopped]], 30)[0]
    processes[stopped].kill()
    processes[stopped].communicate()
    assert code == 1, printed
    assert f"rank {stopped} was not heard of for" in printed or f"rank {stopped}, which holds" in printed


@pytest.mark.slow
def test_a_long_evaluation_is_no_silence():
    processes = start("evaluates")
    assert [(code, error) for code, error in end(processes, 60) if code] == []


def test_who_waits_for_a_rank_that_is_slow_where_it_may_be_is_not_overdue():
    """Rank 1 waits for a shard, rank 0 for rank 1 in a step; once the shard is there, rank 0's wait is not held against
    it."""
    heart, now = Heartbeat(0, 2), time.monotonic()
    heart._heard = {0: (Beat(8, "step", 4, 300.0, 60), now), 1: (Beat(7, "data", 3, 300.0, 60), now)}
    assert heart._overdue(now) is None
    heart._heard[1] = (Beat(9, "step", 4, 5.0, 61), now)
    assert heart._overdue(now) is None
    heart._heard = {0: (Beat(8, "step", 4, 901.0, 180), now), 1: (Beat(7, "data", 3, 905.0, 180), now)}
    assert "rank 1 came no further for 905 s in phase 'data' of step 3; the limit there is 900 s" in heart._overdue(now)
    heart._heard = {0: (Beat(8, "step", 4, 61.0, 70), now), 1: (Beat(7, "data", 3, 2.0, 58), now - 61)}
    assert "rank 1 was not heard of for 61 s" in heart._overdue(now)  # its process is gone, whatever it waited for


def test_what_moves_within_its_phase_is_not_overdue_and_no_further_on():
    heart = Heartbeat(0, 2)
    heart._at -= 4000
    heart.moving()
    assert time.monotonic() - heart._at < 60
    assert heart._count == 0


def test_one_rank_alone_is_watched_too(monkeypatch):
    ended = []
    monkeypatch.setattr(Heartbeat, "_end", lambda self, reason: ended.append(reason) or self._stopped.set())
    with Heartbeat(0, 1, LIMITS | {"step": 0.3}) as heart:
        heart.beat("step", 7)
        time.sleep(1)
    assert len(ended) == 1
    assert re.fullmatch(r"rank 0 came no further for \d+ s in phase 'step' of step 7; the limit there is 0 s", ended[0])
