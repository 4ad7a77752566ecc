"""kill -9 at any moment costs time and nothing else; and two runs never share a folder."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import finish, kill, start
from launched import arguments, evaluation_rows, final_weights, step_records

OVERRIDES = ["train.total_samples=160", "train.checkpoint_every=2", "train.eval_every=5"]
SLOW_DISK = 0.05
PATIENCE = 240


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """The folder of a run on two ranks that nobody killed."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    log = out.with_suffix(".log")
    assert finish(start(arguments(shards, out, *OVERRIDES), 2, log)) == [0, 0], log.read_text()
    return out


def wait_for(happened: Callable[[], bool], processes: list) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened() and any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.003)


def num_steps(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.exists() else 0


def saving(out: Path) -> set[str]:
    return {path.name for path in out.glob("checkpoints/.tmp-step-*")}


def wait_for_moment(moment: str, out: Path, processes: list, chance: random.Random) -> None:
    """Until a random moment while the run starts, between or inside steps, or while a checkpoint is written."""
    steps, saves = num_steps(out), saving(out)
    if moment == "start":
        time.sleep(chance.uniform(0, 4))
    elif moment == "step":
        wanted = steps + chance.randint(1, 3)
        wait_for(lambda: num_steps(out) >= wanted, processes)
        time.sleep(chance.uniform(0, 0.2))
    else:
        wait_for(lambda: bool(saving(out) - saves), processes)
        time.sleep(chance.uniform(0, 20 * SLOW_DISK))  # from the first file to the pointers and the pruning


def disturbed(shards: Path, out: Path, moments: list[str], chance: random.Random) -> tuple[list[str], int]:
    """One run, killed at these moments and started again each time, to its end.

    Returns the moments that were left over when it ended, and how many saves were cut short.
    """
    command, log = arguments(shards, out, *OVERRIDES), out.with_suffix(".log")
    interrupted, moments = 0, list(moments)
    while True:
        processes, before = start(command, 2, log, SLOW_DISK), saving(out)
        if moments:
            wait_for_moment(moments[0], out, processes, chance)
        if not moments or all(process.exitcode == 0 for process in processes):
            assert finish(processes) == [0, 0], log.read_text()
            return moments, interrupted
        moments.pop(0)
        if chance.random() < 0.5:  # one rank dies before the other, which may still be writing
            kill([processes.pop(chance.randrange(2))])
            time.sleep(chance.uniform(0, 0.3))
        kill(processes)
        interrupted += bool(saving(out) - before)


def require_the_same(out: Path, undisturbed: Path) -> None:
    assert step_records(out) == step_records(undisturbed)
    assert evaluation_rows(out) == evaluation_rows(undisturbed)
    expected, found = final_weights(undisturbed), final_weights(out)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_three_kills_change_nothing(shards, undisturbed, tmp_path):
    left, interrupted = disturbed(shards, tmp_path / "run", ["step", "save", "save"], random.Random(3))
    assert not left
    assert interrupted >= 1
    require_the_same(tmp_path / "run", undisturbed)


@pytest.mark.slow  # test_elastic.py goes from two ranks to others without a kill
@pytest.mark.parametrize(("ranks", "zero"), [(1, "zero3"), (4, "zero0")])
def test_killed_on_two_ranks_goes_on_with_others_under_another_stage(shards, undisturbed, tmp_path, ranks, zero):
    """fp32; sums in another order: 1e-5 relative on the curve."""
    out, packs = tmp_path / "run", "train.packs_per_step=4"
    expected = undisturbed
    if ranks == 4:
        expected = tmp_path / "undisturbed"
        assert finish(start(arguments(shards, expected, *OVERRIDES, packs), 2, tmp_path / "log")) == [0, 0]
    overrides = [*OVERRIDES, *([packs] if ranks == 4 else [])]
    first = start(arguments(shards, out, *overrides), 2, tmp_path / "first.log")
    wait_for(lambda: any(out.glob("checkpoints/step-*")), first)
    kill(first)
    log = tmp_path / "second.log"
    assert finish(start(arguments(shards, out, *overrides, zero=zero), ranks, log)) == [0] * ranks, log.read_text()
    named = "1 rank" if ranks == 1 else f"{ranks} ranks"
    assert f"checkpoint of 2 ranks, ZeRO-2: reshaped to {named}, ZeRO-{zero[-1]}" in log.read_text()
    for a, b in zip(step_records(out), step_records(expected), strict=True):
        assert a["samples_seen"] == b["samples_seen"]
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_fifty_kills_change_nothing(shards, undisturbed, tmp_path):
    """Over several runs, each killed until it is done, since a run of ten steps does not last for fifty."""
    chance = random.Random(50)
    moments = [chance.choice(["start", "step", "save", "save"]) for _ in range(50)]
    interrupted, runs = 0, 0
    while moments:
        out = tmp_path / f"run{runs}"
        moments, cut_short = disturbed(shards, out, moments, chance)
        require_the_same(out, undisturbed)
        shutil.rmtree(out)
        interrupted, runs = interrupted + cut_short, runs + 1
    print(f"{runs} runs; {interrupted} of 50 kills left a save cut short")
    assert interrupted >= 10


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused_and_the_first_goes_on(shards, undisturbed, tmp_path):
    out = tmp_path / "run"
    first = start(arguments(shards, out, *OVERRIDES), 2, tmp_path / "first.log")
    wait_for(lambda: num_steps(out) >= 1, first)
    second = start(arguments(shards, out, *OVERRIDES), 2, tmp_path / "second.log")
    codes = finish(second)
    printed = (tmp_path / "second.log").read_text()
    assert codes == [2, 2], printed
    assert f"train: {out}: a run is at work there already (host " in printed
    assert f"process {first[0].pid}, since " in printed
    assert finish(first) == [0, 0], (tmp_path / "first.log").read_text()
    require_the_same(out, undisturbed)
