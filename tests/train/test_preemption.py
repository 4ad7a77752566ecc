"""Told to stop by a signal, the ranks end together with a checkpoint, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from launched import ROOT, arguments, evaluation_rows, final_weights, finish, launch, run, step_records
from spawned import free_port, run_ranks

from fvlm.config import load_config
from fvlm.evaluate import validation
from fvlm.train.engine import World
from fvlm.train.loop import Trainer
from fvlm.train.preemption import Notice, Preempted
from fvlm.train.zero_config import read_zero_json

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


@pytest.mark.parametrize(
    ("number", "told"), [pytest.param(signal.SIGTERM, (0, 1), marks=pytest.mark.slow), (signal.SIGUSR1, (1,))]
)
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


SHORT = ["train.total_samples=50", "train.eval_every=2", "train.checkpoint_every=0", "evaluation.tasks=[]"]
TOLD_AT = 2
"""Step after which the notice comes to the last rank."""


def run_told(world: World, shards: Path, out: Path, moments: list[str]) -> dict:
    """A whole run; and for each moment one that is told to stop then, and goes on."""
    from launch.train import train

    def start(name: str, notice: Notice) -> str:
        data = [f"data.train=[{shards / 'train'}]", f"data.val=[{shards / 'val'}]", f"out={out / name}"]
        try:
            train(load_config("tiny_test", [*data, *SHORT]), read_zero_json("zero2"), world, notice)
        except Preempted as stopped:
            return str(stopped)
        return ""

    found = {"whole": start("whole", Notice())}
    step, batch_sums = Trainer.step, validation._batch_sums
    for moment in moments:
        notice, packs = Notice(), []

        def tell(at: str, notice=notice, moment=moment) -> None:
            if at == moment and world.rank == world.size - 1:
                notice.received = "SIGTERM"

        def counted_step(trainer, loaded, tell=tell):
            if loaded.step.index + 1 == TOLD_AT:
                tell("step")
            return step(trainer, loaded)

        def counted_sums(*args, tell=tell, packs=packs):
            packs.append(1)
            if len(packs) == 1:
                tell("evaluation")
            return batch_sums(*args)

        with patch.object(Trainer, "step", counted_step), patch.object(validation, "_batch_sums", counted_sums):
            message = start(moment, notice)
        latest = (out / moment / "checkpoints/latest").read_text().strip()
        rows = len(evaluation_rows(out / moment))
        world.barrier()
        found[moment] = (message, len(packs), latest, rows, start(moment, Notice()))
    return found


@pytest.mark.parametrize(
    ("world_size", "moments"),
    [(1, {"evaluation": 1}), pytest.param(2, {"evaluation": 1, "step": 0}, marks=pytest.mark.slow)],
)
def test_an_evaluation_ends_at_the_next_pack_and_is_made_after_the_restart(shards, tmp_path, world_size, moments):
    """Also where the notice came before it began: nothing of the run is lost. `moments`: with the packs until then."""
    for found in run_ranks(run_told, world_size, shards, tmp_path, list(moments)):
        assert found["whole"] == ""
        for moment, num_packs in moments.items():
            message, packs, latest, rows, resumed = found[moment]
            assert message.startswith(f"stopped as told after step {TOLD_AT};"), moment
            assert packs == num_packs, moment
            assert (latest, rows) == (f"step-{TOLD_AT:08d}", 0), moment
            assert resumed == "", moment
    whole = tmp_path / "whole"
    assert len(evaluation_rows(whole)) >= 2
    for moment in moments:
        assert step_records(tmp_path / moment) == step_records(whole)
        assert evaluation_rows(tmp_path / moment) == evaluation_rows(whole)
        expected = final_weights(whole)
        assert all(value.equal(expected[name]) for name, value in final_weights(tmp_path / moment).items())


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
