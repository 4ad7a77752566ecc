"""Short real runs of `launch/train.py`, for the tests."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from spawned import free_port

ROOT = Path(__file__).resolve().parents[2]


def arguments(shards: Path, out: Path, *overrides: str, zero: str = "zero2") -> list[str]:
    """Command line of the tiny run on `shards/train` and `shards/val`."""
    data = [f"data.train=[{shards / 'train'}]", f"data.val=[{shards / 'val'}]"]
    return ["--config", "tiny_test", "--ds_config", zero, "--out", str(out), *data, *overrides]


def launch(command_line: list[str], world_size: int = 1, launched: bool = True) -> list[subprocess.Popen]:
    """The ranks of one run, started; `launched` False: one plain process that no launcher told anything."""
    port, processes = free_port(), []
    for rank in range(world_size):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
        ranks |= {"MASTER_PORT": port, "LOCAL_WORLD_SIZE": world_size}
        environment = {key: value for key, value in os.environ.items() if key not in ranks}
        environment |= {key: str(value) for key, value in ranks.items()} if launched else {}
        environment |= {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "launch/train.py"), *command_line]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT.parent, **pipes))
    return processes


def finish(processes: list[subprocess.Popen], timeout: int = 300) -> tuple[list[int], str]:
    """(exit codes, everything that was printed)."""
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "\n".join(printed)


def run(command_line: list[str], world_size: int = 1, **kwargs) -> str:
    """A run that has to succeed; returns what it printed."""
    codes, printed = finish(launch(command_line, world_size, **kwargs))
    assert codes == [0] * world_size, printed
    return printed


def step_records(out: Path) -> list[dict]:
    """Training records, without what depends on the clock and on the number of ranks."""
    timing = {
        "kind",
        "wall_time_sec",
        "step_sec",
        "throughput_samples_sec",
        "tokens_sec",
        "tflops",
        "mfu",
        "data_wait_sec",
        "read_sec",
        "decode_sec",
    }
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    return [{key: value for key, value in record.items() if key not in timing} for record in steps]


def evaluation_rows(out: Path) -> list[dict]:
    """Rows of metrics.csv, without the clock and the run's name."""
    with (out / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("run_id", "wall_time_sec", "throughput")} for row in rows]


def final_weights(out: Path) -> dict[str, torch.Tensor]:
    """Weights of the newest checkpoint."""
    checkpoints = out / "checkpoints"
    return load_file(checkpoints / (checkpoints / "latest").read_text().strip() / "weights/model.safetensors")
