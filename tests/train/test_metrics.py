"""Records: the columns that every run has, and curves that continue without duplicates after a kill."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest

from fvlm.config import RunConfig
from fvlm.schema import build
from fvlm.train.describe import cost
from fvlm.train.metrics import MetricsWriter, Progress, open_writer
from fvlm.train_config import GROUPS

SPEC_COLUMNS = (
    "run_id, step, samples_seen, wall_time_sec, train_loss, val_loss, loss_fine, loss_coarse, loss_ratio, grad_norm, "
    "attention_entropy, lr_connector, lr_dino, lr_llm, throughput, gpu_mem_gb"
)


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fill(folder, first, last, resume_step=0, last_evaluation=None):
    known = resume_step if last_evaluation is None else last_evaluation
    writer = MetricsWriter(folder, "run-1", resume_step, known)
    for step in range(first, last + 1):
        writer.step({"step": step, "train_loss": 1 / step})
        if step % 2 == 0:
            writer.evaluation({"step": step, "val_loss": 2 / step, "val_loss/a": 3.0, "gpu_mem_gb": None})
    writer.close()


def test_columns_are_those_of_the_specification(tmp_path):
    fill(tmp_path, 1, 2)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == SPEC_COLUMNS.replace(" ", "")
    assert (
        rows(tmp_path)[0] | {"run_id": "run-1", "step": "2", "val_loss": "1.0", "gpu_mem_gb": ""} == rows(tmp_path)[0]
    )
    assert lines(tmp_path)[-1]["val_loss/a"] == 3.0


def test_resumed_curve_continues_without_duplicates_and_without_a_torn_line(tmp_path):
    fill(tmp_path / "whole", 1, 10)
    fill(tmp_path / "cut", 1, 7)
    for name, torn in (("metrics.csv", "run-1,8,1"), ("metrics.jsonl", '{"kind": "step", "st')):
        with (tmp_path / "cut" / name).open("a") as file:
            file.write(torn)
    fill(tmp_path / "cut", 5, 10, resume_step=4)
    for name in ("metrics.csv", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


@pytest.mark.parametrize("damage", [b"\0" * 40, b'{"kind": "st', b"run-1", b"5", b"\xff\xfe,1"])
@pytest.mark.parametrize("name", ["metrics.csv", "metrics.jsonl", "data.csv"])
def test_a_line_that_a_crash_left_damaged_is_dropped_and_named(tmp_path, caplog, name, damage):
    fill(tmp_path, 1, 6)
    whole = (tmp_path / name).read_bytes()
    lines = whole.split(b"\n")
    (tmp_path / name).write_bytes(b"\n".join([*lines[:2], damage, *lines[2:]]))
    fill(tmp_path, 7, 6, resume_step=6)
    assert (tmp_path / name).read_bytes() == whole
    assert f"{name}: dropped 1 damaged lines, the first is line 3 (" in caplog.text


def test_an_evaluation_that_the_checkpoint_does_not_know_of_is_recorded_once(tmp_path):
    """Told to stop before the evaluation after step 4, started again, evaluated, and killed before the next save."""
    fill(tmp_path, 1, 4)
    fill(tmp_path, 5, 6, resume_step=4, last_evaluation=2)
    assert [row["step"] for row in rows(tmp_path)] == ["2", "6"]
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "evaluation"] == [2, 6]
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_a_fresh_start_keeps_nothing_of_an_older_run(tmp_path):
    fill(tmp_path, 1, 4)
    fill(tmp_path, 1, 2, resume_step=0)
    assert [row["step"] for row in rows(tmp_path)] == ["2"]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 2]


def config(tmp_path, mode: str) -> RunConfig:
    rates = {group: {"base": 1e-3} for group in GROUPS}
    train = {"total_samples": 100, "packs_per_step": 2, "learning_rate": rates}
    run = {"name": "run", "phase": "demo", "out": str(tmp_path), "data": {"train": ["x"]}, "train": train}
    return build(RunConfig, run | {"wandb": {"mode": mode}})


def test_only_the_main_rank_writes(tmp_path):
    with open_writer(config(tmp_path / "a", "disabled"), "run-1", 0, 0, writes=False) as writer:
        assert writer is None
    assert not (tmp_path / "a").exists()


WANDB = """
import logging, sys
logging.basicConfig(level=logging.INFO)
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_metrics import config
from fvlm.train.metrics import open_writer
with open_writer(config(Path({folder!r}), {mode!r}), "run-1", 0, 0, writes=True) as writer:
    writer.step({{"step": 1, "train_loss": 1.0}})
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_wandb_needs_no_login_and_no_network(tmp_path, repo_root, mode):
    """Asked for `online` by somebody who is not logged in, it records offline instead of waiting for an answer."""
    code = WANDB.format(tests=str(repo_root / "tests/train"), folder=str(tmp_path), mode=mode)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(repo_root), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("wandb/offline-run-*")), done.stderr
    assert ("recording offline" in done.stderr) == (mode == "online")


def test_a_resumed_bar_counts_this_start_only(capfd):
    progress = Progress(1000, 900, shown=True)
    bar = progress._bar
    bar.start_t -= 10  # ten seconds ago
    progress.update(920, loss=0.51234, mfu=0.4)
    shown = bar.format_meter(**bar.format_dict)
    assert "920/1000 [00:10<00:40" in shown  # 80 samples to go, at 20 in 10 seconds
    assert "2.00sample/s" in shown or "1.99sample/s" in shown
    assert "loss=0.5123, mfu=0.4" in shown
    progress.close()
    assert "920/1000" in capfd.readouterr().err


def test_cost_is_device_hours_times_the_price():
    assert cost(7200, 2.5) == {"gpu_hours": 2.0, "price_per_gpu_hour": 2.5, "money": 5.0}
    assert cost(7200, None)["money"] is None
