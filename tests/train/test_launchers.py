"""The scripts that start ranks: Slurm's, the one for a pod's volume, and two nodes of DeepSpeed's launcher."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import ROOT, arguments, final_weights, run, step_records
from spawned import free_port

SRUN = """#!/bin/bash
# As Slurm's: every task with its own variables; a failed task ends the others.
shift  # --kill-on-bad-exit
echo $$ > "$STUBS/srun.pid"
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$task SLURM_LOCALID=$task setsid "$@" & tasks+=($!)
done
echo "${tasks[@]}" > "$STUBS/tasks"
worst=0
for task in "${tasks[@]}"; do wait "$task" || { code=$?; [ $code -gt $worst ] && worst=$code; }; done
exit $worst
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$STUBS/scontrol.log"; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """An environment in which `srun` and `scontrol` are there, for a job of two tasks on one node."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": str(free_port())}
    job |= {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "STUBS": str(tmp_path), "PYTHON": sys.executable}
    return os.environ | job | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def slurm_job(environment: dict, command_line: list[str]) -> subprocess.Popen:
    command = ["bash", str(ROOT / "launch/slurm.sh"), *command_line]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_steps(out: Path, number: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 180
    while not (out / "metrics.jsonl").exists() or len(step_records(out)) < number:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no step was recorded in time"
        time.sleep(0.05)


@pytest.mark.slow
def test_slurm_signals_the_ranks_and_the_requeued_job_goes_on_where_it_was(shards, slurm, tmp_path):
    command_line = arguments(shards, tmp_path / "run")
    job = slurm_job(slurm, command_line)
    wait_for_steps(tmp_path / "run", 3, job)
    for task in (tmp_path / "tasks").read_text().split():
        os.killpg(int(task), signal.SIGUSR1)  # as Slurm: all processes of every task
    printed = job.communicate(timeout=120)[0]
    assert job.returncode == 75, printed
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    again = slurm_job(slurm, command_line)
    assert again.wait(timeout=300) == 0, again.communicate()[0]
    run(arguments(shards, tmp_path / "undisturbed"), world_size=2)
    assert step_records(tmp_path / "run") == step_records(tmp_path / "undisturbed")
    expected = final_weights(tmp_path / "undisturbed")
    assert all(value.equal(expected[name]) for name, value in final_weights(tmp_path / "run").items())


@pytest.mark.slow
def test_slurm_passes_on_that_a_run_cannot_start(slurm, tmp_path):
    job = slurm_job(slurm, ["--config", "no_such_config"])
    printed = job.communicate(timeout=120)[0]
    assert job.returncode == 2, printed
    assert "'no_such_config': no such file" in printed
    assert not (tmp_path / "scontrol.log").exists()


@pytest.mark.slow
def test_two_nodes_without_ssh_are_two_launchers_with_one_hostfile(shards, tmp_path):
    """Two launchers on this machine, each the node that its --node_rank says."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node-a slots=1\nnode-b slots=1\n")
    port, launchers = free_port(), []
    for node in range(2):
        nodes = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node)]
        address = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        script = [str(ROOT / "launch/train.py"), *arguments(shards, tmp_path / "nodes")]
        command = [str(Path(sys.executable).with_name("deepspeed")), *nodes, *address, *script]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        launchers.append(subprocess.Popen(command, env=environment, **pipes))
    printed = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], printed
    run(arguments(shards, tmp_path / "one_node"), world_size=2)
    assert step_records(tmp_path / "nodes") == step_records(tmp_path / "one_node")


def test_env_puts_caches_and_runs_on_the_volume_and_leaves_what_is_there(tmp_path):
    (tmp_path / "repository/launch").mkdir(parents=True)
    (tmp_path / "repository/runs").mkdir()
    (tmp_path / "repository/runs/mine").touch()
    script = tmp_path / "repository/launch/env.sh"
    script.write_bytes((ROOT / "launch/env.sh").read_bytes())
    (tmp_path / "volume").mkdir()
    told = f'source "{script}" "{tmp_path}/volume" && echo "$HF_HOME $TMPDIR $TRITON_CACHE_DIR" && ls -d "$TMPDIR"'
    result = subprocess.run(["bash", "-c", told], capture_output=True, text=True, check=True)
    for folder in ("cache/huggingface", "tmp", "cache/triton"):
        assert f"{tmp_path}/volume/{folder}" in result.stdout
    assert "runs is a folder of its own and stays" in result.stderr
    assert (tmp_path / "repository/runs/mine").exists()
    assert (tmp_path / "repository/shards").resolve() == tmp_path / "volume/shards"


@pytest.mark.parametrize("volume", ["", "/no/such/volume"])
def test_env_refuses_a_volume_that_is_none(volume):
    told = f'source "{ROOT}/launch/env.sh" "{volume}"; echo "code $?"'
    result = subprocess.run(["bash", "-c", told], capture_output=True, text=True, check=True)
    assert "code 2" in result.stdout
    assert f"VOLUME = '{volume}': expected a writable folder" in result.stderr
