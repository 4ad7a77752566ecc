"""A step of a run again: the recorded loss and norm to the last bit, and nothing written to the run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import pytest
import torch
from launched import ROOT, arguments, finish, run, step_records
from safetensors.torch import load_file
from spawned import run_ranks

from fvlm.config import load_config
from fvlm.train.engine import World
from fvlm.train.replay import replay, text
from fvlm.train.zero_config import read_zero_json

SHORT = ["data.val=[]", "train.total_samples=120", "train.checkpoint_every=3"]


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file's size and time of the last change."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def run_and_replay(world: World, zeros: list[str], shards: Path, out: Path) -> list[tuple]:
    """For each stage, a run and two of its steps again: right after a checkpoint, and from the run's start."""
    from launch.train import train

    found = []
    for zero in zeros:
        folder = out / zero
        data = [f"data.train=[{shards / 'train'}]", f"out={folder}"]
        train(load_config("tiny_test", [*data, *SHORT]), read_zero_json(zero), world)
        world.barrier()
        before = contents(folder)
        config = load_config(str(folder / "config.yaml"))
        for step in (2, 8):
            report, gradients = replay(config, read_zero_json(zero), world, step)
            total = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients.values()]))
            found.append((zero, step, report, float(total), len(gradients)))
        world.barrier()
        assert contents(folder) == before
    return found


@pytest.mark.parametrize("zeros", [["zero2"], pytest.param(["zero0", "zero3"], marks=pytest.mark.slow)])
def test_a_replayed_step_is_the_recorded_one_bit_for_bit(zeros, shards, tmp_path):
    results = run_ranks(run_and_replay, 2, zeros, shards, tmp_path)
    for zero, step, report, total, num in results[0]:
        record = step_records(tmp_path / zero)[step - 1]
        assert report["recorded"] == {"train_loss": record["train_loss"], "grad_norm": record["grad_norm"]}, zero
        assert report["train_loss"] == record["train_loss"], (zero, step)
        assert report["grad_norm"] == record["grad_norm"], (zero, step)
        assert total == pytest.approx(record["grad_norm"], rel=1e-5), (zero, step)
        groups = math.sqrt(sum(norm**2 for norm in report["group_norms"].values()))
        assert groups == pytest.approx(record["grad_norm"], rel=1e-5), (zero, step)
        assert num > 50
        assert not report["skipped"]
        assert report["not_finite"] == {"outputs": [[], []], "gradients": []}
        assert (report["checkpoint"] is None) == (step == 2), report["checkpoint"]
        assert [list(rank["packs"]) for rank in report["ranks"]] == [[0], [1]]
        losses = [loss for rank in report["ranks"] for pack in rank["packs"].values() for loss in pack.values()]
        assert min(losses) < record["train_loss"] < max(losses)
        assert f"step {step}, replayed from" in text(report)
    for ours, theirs in zip(*results, strict=True):
        assert ours[2]["ranks"] == theirs[2]["ranks"]


def command(*options: str) -> tuple[int, str]:
    process = Popen([sys.executable, str(ROOT / "launch/replay.py"), *options], stdout=PIPE, stderr=STDOUT, text=True)
    codes, printed = finish([process])
    return codes[0], printed


@pytest.mark.slow
def test_the_command_shows_and_saves(shards, tmp_path):
    out, saved, report = tmp_path / "run", tmp_path / "gradients.safetensors", tmp_path / "step.json"
    run(arguments(shards, out, *SHORT, "train.total_samples=60"), launched=False)
    step = len(step_records(out))
    code, printed = command("--run", str(out), "--step", str(step), "--save", str(saved), "--json", str(report))
    assert code == 0, printed
    record = step_records(out)[-1]
    assert f"loss {record['train_loss']!r}, gradient norm {record['grad_norm']!r}" in printed
    assert "largest gradients:" in printed
    assert json.loads(report.read_text())["train_loss"] == record["train_loss"]
    norms = torch.stack([gradient.norm() for gradient in load_file(saved).values()])
    assert float(norms.norm()) == pytest.approx(record["grad_norm"], rel=1e-5)
    code, printed = command("--run", str(out), "--step", str(step + 1))
    assert code == 2
    assert f"replay: --step {step + 1}: this run's plan ends before it" in printed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param(["--step", "3"], "replay: '/nowhere/config.yaml': no such file", marks=pytest.mark.slow),
        (["--step", "0"], "replay: --step 0: expected 1"),
    ],
)
def test_what_cannot_be_replayed_is_said(options, expected):
    code, printed = command("--run", "/nowhere", *options)
    assert code == 2
    assert expected in printed


@pytest.mark.slow
def test_help_shows_an_example():
    code, printed = command("--help")
    assert code == 0
    assert "python launch/replay.py --run runs/demo --step 250" in printed
