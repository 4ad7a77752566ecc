"""A checkpoint that cannot be written: said, counted, tried again; training goes on, on all ranks alike."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from forked import finish, start
from launched import arguments, step_records
from safetensors.torch import save_file
from spawned import run_ranks
from test_checkpoint import ENGINE_FILE, WORLD, StubEngine, state
from test_metrics import config as run_config

from fvlm.train.checkpoint import CheckpointError, CheckpointStore, damage, published, read_pointer
from fvlm.train.engine import World


class FullEngine(StubEngine):
    """Its second file meets a full disk."""

    def files(self) -> dict:
        def no_space(path: Path) -> None:
            path.write_bytes(b"the first part")
            raise OSError(errno.ENOSPC, "No space left on device")

        return {"engine/engine.json": lambda path: path.write_text("{}"), ENGINE_FILE: no_space}


@pytest.fixture
def config(tmp_path):
    return run_config(tmp_path, "disabled")


@pytest.fixture
def store(config):
    return CheckpointStore(config.folder / "checkpoints", WORLD)


def require_only(store: CheckpointStore, *names: str) -> None:
    """Whole checkpoints of these names and nothing else, not even an unfinished one."""
    assert [path.name for path in published(store.folder)] == list(names)
    assert not list(store.folder.glob(".tmp-*"))
    assert all(damage(path) is None for path in published(store.folder))


def test_a_full_disk_is_said_and_counted_and_the_next_interval_is_the_next_try(config, store, caplog):
    best = {"score": 1.0, "step": 1, "metrics": {}}
    store.save(StubEngine(), state(1, config, best=best), config, best=True)
    going_on = state(2, config, best={"score": 2.0, "step": 2, "metrics": {}})
    store.save(FullEngine(), going_on, config, best=True)
    store.settle()
    assert "step 2 was not saved: rank 0: " in caplog.text
    assert "rank-00000.safetensors: [Errno 28] No space left on device (a checkpoint takes 10,007 bytes)" in caplog.text
    assert "the last checkpoint is step-00000001" in caplog.text
    assert going_on.failed_saves == 1
    assert going_on.best == best  # the next evaluation that is better than what exists is saved as the best
    assert store.saved_step == 1
    require_only(store, "step-00000001")
    store.save(StubEngine(), state(3, config), config, best=False)
    store.settle(required_step=3)
    require_only(store, "step-00000001", "step-00000003")
    assert read_pointer(store.folder / "best") == "step-00000001"


def test_a_disk_known_to_be_too_small_is_not_written_to(config, store, caplog, monkeypatch):
    written = []
    monkeypatch.setattr(StubEngine, "files", lambda self: {"engine/x": written.append})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(20_000, 15_000, 5_000))
    going_on = state(1, config)
    store.save(StubEngine(), going_on, config, best=False)
    assert "5,000 bytes free on this disk (a checkpoint takes 10,007 bytes)" in caplog.text
    assert "no checkpoint yet" in caplog.text
    assert going_on.failed_saves == 1
    assert not written
    require_only(store)


def test_the_last_save_has_to_succeed(config, store):
    store.save(StubEngine(), state(1, config), config, best=False)
    store.save(FullEngine(), state(2, config), config, best=False)
    with pytest.raises(CheckpointError, match=r"step 2 could not be saved: rank 0: .*No space left.*step-00000001"):
        store.settle(required_step=2)


def test_the_kernels_own_refusal_inside_safetensors(config, store, caplog):
    """A limit on the size of files stands in for the full disk."""

    class Large(StubEngine):
        def files(self) -> dict:
            return {ENGINE_FILE: lambda path: save_file({"master": torch.zeros(100_000)}, path)}

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        store.save(Large(), state(1, config), config, best=False)
        store.settle()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "rank-00000.safetensors: " in caplog.text
    assert "File too large" in caplog.text
    require_only(store)


def poll(store: CheckpointStore) -> None:
    """What the training loop does once it has read that all ranks have written."""
    if int(store.world.sum(torch.tensor(float(store.written)))) == store.world.size:
        store.settle()


def test_training_goes_on_while_files_are_written_and_a_second_save_waits(config, store):
    released = threading.Event()

    class Slow(StubEngine):
        def files(self) -> dict:
            return super().files() | {"engine/slow": lambda path: (released.wait(), path.write_bytes(b"x"))}

    store.save(Slow(), state(1, config), config, best=False)
    for _ in range(5):
        poll(store)
    assert not published(store.folder)
    threading.Timer(0.2, released.set).start()
    store.save(StubEngine(), state(2, config), config, best=False)
    assert [path.name for path in published(store.folder)] == ["step-00000001"]
    deadline = time.monotonic() + 30
    while store.saved_step != 2 and time.monotonic() < deadline:
        poll(store)
        time.sleep(0.01)
    require_only(store, "step-00000001", "step-00000002")


def test_what_is_written_is_what_was_at_the_step(config, store):
    """The run's state goes on changing while it is written."""
    released = threading.Event()

    class Slow(StubEngine):
        def files(self) -> dict:
            return super().files() | {"engine/slow": lambda path: (released.wait(), path.write_bytes(b"x"))}

    going_on = state(1, config)
    store.save(Slow(), going_on, config, best=False)
    going_on.plan = going_on.plan | {"step": 2}
    going_on.metrics = {"val_loss": 1.0}
    released.set()
    store.settle(required_step=1)
    saved = json.loads((store.folder / "step-00000001/state.json").read_text())
    assert saved["plan"]["step"] == 1
    assert saved["metrics"] == {}


def test_a_bug_in_the_background_is_not_taken_for_a_full_disk(config, store):
    class Buggy(StubEngine):
        def files(self) -> dict:
            return {"engine/x": lambda path: {}["nothing"]}

    store.save(Buggy(), state(1, config), config, best=False)
    with pytest.raises(KeyError):
        store.settle()


def run_one_full(world: World, folder: Path) -> tuple:
    """The second of two ranks meets a full disk, once."""
    config = run_config(folder, "disabled")
    store = CheckpointStore(config.folder / "checkpoints", world)

    class Mine(StubEngine):
        def files(self) -> dict:
            return {f"engine/rank-{world.rank:05d}.safetensors": lambda path: path.write_bytes(b"x" * 1000)}

    class Full(Mine):
        def files(self) -> dict:
            return FullEngine().files() if world.rank == 1 else super().files()

    going_on = state(1, config)
    store.save(Full(), going_on, config, best=False)
    store.settle()
    after_failure = store.saved_step, going_on.failed_saves, len(published(store.folder))
    world.barrier()
    store.save(Mine(), state(2, config), config, best=False)
    polls = 0
    while store.saved_step is None:
        poll(store)
        polls += 1
        time.sleep(0.001)
    world.barrier()
    return after_failure, store.saved_step, polls, [damage(path) for path in published(store.folder)]


def test_ranks_agree_on_a_failure_of_one_of_them(tmp_path):
    first, second = run_ranks(run_one_full, 2, tmp_path)
    assert first == second == ((None, 1, 0), 2, first[2], [None])


def limited(processes: list, out: Path, log: Path, lift: bool) -> list[int | None]:
    """Exit codes of a run that cannot write large files from its first step on; with `lift`, until it has said so."""
    records, (process,) = out / "metrics.jsonl", processes
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def wait_for(file: Path, text: str) -> None:
        while process.is_alive() and not (file.exists() and text in file.read_text()):
            time.sleep(0.003)

    wait_for(records, '"kind": "step"')
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    if lift:
        wait_for(log, "was not saved")
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
    return finish(processes)


OVERRIDES = ["train.total_samples=160", "train.checkpoint_every=4", "train.eval_every=0"]


@pytest.mark.slow
def test_a_run_outlives_a_full_disk(shards, tmp_path):
    """The checkpoint of step 4 fails; a later one does not."""
    out, log = tmp_path / "run", tmp_path / "log"
    assert limited(start(arguments(shards, out, *OVERRIDES), 1, log), out, log, lift=True) == [0], log.read_text()
    printed = log.read_text()
    assert "step 4 was not saved: rank 0: " in printed
    assert "File too large" in printed
    last = published(out / "checkpoints")[-1]
    assert last.name == f"step-{len(step_records(out)):08d}"
    assert json.loads((last / "state.json").read_text())["failed_saves"] == printed.count("was not saved")


@pytest.mark.slow
def test_a_run_that_cannot_save_at_its_end_has_failed_and_can_go_on(shards, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    command = arguments(shards, out, *OVERRIDES)
    assert limited(start(command, 1, log), out, log, lift=False) == [1], log.read_text()
    printed = log.read_text()
    last = len(step_records(out))
    assert f"train: step {last} could not be saved: rank 0: " in printed
    assert "Traceback" not in printed
    assert not published(out / "checkpoints")
    assert finish(start(command, 1, log)) == [0], log.read_text()
    assert [path.name for path in published(out / "checkpoints")][-1] == f"step-{last:08d}"
