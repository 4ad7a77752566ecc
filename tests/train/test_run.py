"""Whole runs: ranks do not matter, kills do not matter, and the same run is the same again."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import pytest
import torch
from launched import ROOT, arguments, evaluation_rows, final_weights, finish, launch, run, step_records
from spawned import free_port

GOLDEN = ROOT / "tests/golden/tiny_test.txt"
STEPS_20 = ["train.total_samples=320", "train.eval_every=0", "train.checkpoint_every=0"]


@pytest.fixture(scope="module")
def two_ranks(shards, tmp_path_factory):
    """An undisturbed run on two ranks."""
    out = tmp_path_factory.mktemp("runs") / "two"
    run(arguments(shards, out), world_size=2)
    return out


@pytest.fixture(scope="module")
def twenty_steps(shards, tmp_path_factory):
    """An undisturbed run of one plain process."""
    out = tmp_path_factory.mktemp("runs") / "twenty"
    printed = run(arguments(shards, out, *STEPS_20), launched=False)
    return out, printed


def test_one_rank_and_two_ranks_give_the_same_curve_and_weights(shards, two_ranks, tmp_path):
    """fp32; sums in another order: 1e-5 relative on the curve, 2e-5 absolute on weights after 12 steps at 1e-3."""
    run(arguments(shards, tmp_path / "one"), launched=False)
    one, two = step_records(tmp_path / "one"), step_records(two_ranks)
    assert len(one) == len(two) >= 12
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert (a[key] is None) == (b[key] is None), (a["step"], key)
            assert a[key] is None or a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), (a["step"], key)
    exact = ("step", "samples_seen", "labels", "lr_connector", "fine_iterations")
    assert [[a[key] for key in exact] for a in one] == [[b[key] for key in exact] for b in two]
    for a, b in zip(evaluation_rows(tmp_path / "one"), evaluation_rows(two_ranks), strict=True):
        for key in a:
            assert float(a[key] or 0) == pytest.approx(float(b[key] or 0), rel=1e-5), (a["step"], key)
    other = final_weights(two_ranks)
    for name, value in final_weights(tmp_path / "one").items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=2e-5, msg=name)


def kill_after(out, processes, step: int) -> None:
    """kill -9 of all ranks once the checkpoint of this step is published."""
    deadline = time.monotonic() + 120
    while not (out / f"checkpoints/step-{step:08d}").exists():
        assert time.monotonic() < deadline, finish(processes)
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow  # test_kills.py kills at random moments
def test_killed_and_started_again_equals_undisturbed_bit_for_bit(shards, two_ranks, tmp_path):
    """Twice: after the first checkpoint (step 5) and after the second (step 10)."""
    command = arguments(shards, tmp_path)
    for step in (5, 10):
        kill_after(tmp_path, launch(command, world_size=2), step)
    printed = run(command, world_size=2)
    assert "start    step 10" in printed
    assert step_records(tmp_path) == step_records(two_ranks)
    assert evaluation_rows(tmp_path) == evaluation_rows(two_ranks)
    expected = final_weights(two_ranks)
    for name, value in final_weights(tmp_path).items():
        assert torch.equal(value, expected[name]), name


def test_a_finished_run_started_again_has_nothing_to_do(shards, two_ranks, tmp_path):
    shutil.copytree(two_ranks, tmp_path / "copy")
    before = (tmp_path / "copy/metrics.csv").read_text()
    run(arguments(shards, tmp_path / "copy"), world_size=2)
    assert (tmp_path / "copy/metrics.csv").read_text() == before


def test_a_damaged_checkpoint_costs_one_interval(shards, two_ranks, tmp_path):
    shutil.copytree(two_ranks, tmp_path / "copy")
    checkpoints = tmp_path / "copy/checkpoints"
    newest = checkpoints / (checkpoints / "latest").read_text().strip()
    file = next(newest.glob("engine/rank-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    printed = run(arguments(shards, tmp_path / "copy"), world_size=2)
    assert f"checkpoint passed over: {newest}" in printed
    assert "start    step 10" in printed
    expected = final_weights(two_ranks)
    for name, value in final_weights(tmp_path / "copy").items():
        assert torch.equal(value, expected[name]), name


def test_losses_of_twenty_steps_are_the_recorded_ones(twenty_steps):
    """Other CPUs sum in another order: 1e-5 relative. On purpose changed: run with FVLM_WRITE_GOLDEN=1."""
    losses = [record["train_loss"] for record in step_records(twenty_steps[0])]
    assert len(losses) == 20
    if os.environ.get("FVLM_WRITE_GOLDEN"):
        GOLDEN.write_text("".join(f"{loss:.9g}\n" for loss in losses))
    assert losses == pytest.approx([float(line) for line in GOLDEN.read_text().split()], rel=1e-5)


@pytest.mark.slow
def test_the_same_run_again_is_the_same_exactly(shards, twenty_steps, tmp_path):
    run(arguments(shards, tmp_path, *STEPS_20), launched=False)
    assert step_records(tmp_path) == step_records(twenty_steps[0])


def test_records_and_summary_are_complete(two_ranks):
    first = step_records(two_ranks)[0]
    for key in ("train_loss", "loss_fine", "loss_coarse", "loss_ratio", "grad_norm", "lr_dino", "skipped_samples"):
        assert isinstance(first[key], (int, float)), key
    probed = [record["step"] for record in step_records(two_ranks) if record["loss_ratio"] is not None]
    assert probed == [1, 6, 11]
    summary = json.loads((two_ranks / "run_summary.json").read_text())
    rows = evaluation_rows(two_ranks)
    assert summary["final_metrics"]["val_loss"] == float(rows[-1]["val_loss"])
    assert summary["best"]["metrics"]["val_loss"] == min(float(row["val_loss"]) for row in rows)
    assert summary["samples_seen"] == 200
    assert summary["convergence_step"] in [int(row["step"]) for row in rows]
    assert summary["world_size"] == 2
    not_stated = {"licence": "not stated", "citation": "not stated"}
    assert summary["sources"] == {"colours": not_stated, "words": not_stated}
    assert summary["cost"]["gpu_hours"] == pytest.approx(2 * summary["wall_time_sec"] / 3600)
    assert summary["cost"]["money"] is None


def test_derived_numbers_come_before_the_first_step(twenty_steps):
    printed = twenty_steps[1]
    for part in ("ranks    1 on cpu, fp32, ZeRO-2", "connector 43,520", "24 frames, 512 tokens", "2 micro-batches",
                 "320 samples, about", "FLOP", "connector 0.001 -> 0.0003"):  # fmt: skip
        assert part in printed.split("sample/s")[0], part


@pytest.mark.slow
def test_a_run_starts_from_the_best_of_another(shards, two_ranks, tmp_path):
    out = tmp_path / "next"
    run(
        arguments(shards, out, f"init_from={two_ranks}", "train.learning_rate.llm.base=1e-9", *STEPS_20[1:]),
        launched=False,
    )
    last = step_records(two_ranks)[-1]["train_loss"]
    assert step_records(out)[0]["train_loss"] < 1.5 * last


@pytest.mark.slow
def test_the_deepspeed_launcher_runs_it(shards, tmp_path):
    """`deepspeed` adds --local_rank and reports the ranks' exit code."""
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    options = ["--num_gpus", "2", "--master_port", str(free_port()), str(ROOT / "launch/train.py")]
    command = [sys.executable, deepspeed, *options, *arguments(shards, tmp_path, "train.total_samples=40")]
    codes, printed = finish([Popen(command, stdout=PIPE, stderr=STDOUT, text=True)])
    assert codes == [0], printed
    assert "ranks    2 on cpu" in printed
    codes, printed = finish([Popen([*command, "train.sede=1"], stdout=PIPE, stderr=STDOUT, text=True)])
    assert codes != [0]
    assert printed.count("train: unknown key train.sede (did you mean seed?)") == 1  # rank 0 says it


def test_help_shows_an_example():
    codes, printed = finish([Popen([sys.executable, str(ROOT / "launch/train.py"), "--help"], stdout=PIPE, text=True)])
    assert codes == [0]
    assert "deepspeed launch/train.py --config demo --ds_config zero2.json" in printed
