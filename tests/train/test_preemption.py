"""Told to stop by a signal, the ranks end together with a checkpoint, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import ROOT, arguments, final_weights, finish, launch, run, step_records
from spawned import free_port

WORKERS = "data.num_workers=1"


def wait_for_steps(out: Path, number: int, processes: list) -> None:
    deadline = time.monotonic() + 180
    while not (out / "metrics.jsonl").exists() or len(step_records(out)) < number:
        assert all(process.poll() is None for process in processes), finish(processes)
        assert time.monotonic() < deadline, finish(processes)
        time.sleep(0.02)


def family(pid: int) -> list[int]:
    """A process and its children: what a launcher or Slurm signals."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [pid, *map(int, listed.split())]


@pytest.mark.parametrize(("number", "told"), [(signal.SIGTERM, (0, 1)), (signal.SIGUSR1, (1,))])
def test_ranks_end_together_with_75_and_the_same_command_goes_on(shards, tmp_path, number, told):
    command = arguments(shards, tmp_path / "stopped", WORKERS)
    processes = launch(command, 2)
    wait_for_steps(tmp_path / "stopped", 3, processes)
    for rank in told:
        for pid in family(processes[rank].pid):
            os.kill(pid, number)
    codes, printed = finish(processes, 60)
    assert codes == [75, 75], printed
    done = len(step_records(tmp_path / "stopped"))
    assert f"train: stopped as told after step {done}" in printed
    assert (tmp_path / "stopped/checkpoints/latest").read_text().strip() == f"step-{done:08d}"
    if len(told) == 2:
        assert f"start    step {done}" in run(command, 2)
        run(arguments(shards, tmp_path / "whole", WORKERS), 2)
        assert step_records(tmp_path / "stopped") == step_records(tmp_path / "whole")
        whole = final_weights(tmp_path / "whole")
        assert all(value.equal(whole[name]) for name, value in final_weights(tmp_path / "stopped").items())


@pytest.mark.slow
def test_deepspeeds_launcher_passes_75_on(shards, tmp_path):
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    command = [*launcher, str(ROOT / "launch/train.py"), *arguments(shards, tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    wait_for_steps(tmp_path, 3, [process])
    subprocess.run(["pkill", "-TERM", "-f", f"train.py --local_rank=.*{tmp_path}"], check=True)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 75, printed
