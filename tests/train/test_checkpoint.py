"""Checkpoints: published whole or not at all, checked before they are used, pruned to the last two and the best."""

from __future__ import annotations

import errno
import json
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_metrics import config as run_config

from fvlm.config import config_hash, identity
from fvlm.schema import ConfigError
from fvlm.train import checkpoint
from fvlm.train.build import find_init
from fvlm.train.checkpoint import (
    CheckpointStore,
    RunState,
    damage,
    published,
    random_state,
    read_pointer,
    read_state,
    set_random_state,
)
from fvlm.train.engine import World
from fvlm.train.start import find_start

WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
DATA = {"plan": "p", "samples": 10}
ENGINE_FILE = "engine/rank-00000.safetensors"


class TwoAlike(World):
    """Rank 0 of two ranks that see the same."""

    def gather(self, value):
        return [value, value]


class TwoUnlike(World):
    """Rank 0 of two ranks, the other with another configuration."""

    def gather(self, value):
        return [value, ("other hash", *value[1:])]


class StubEngine:
    """Writes files where an engine would."""

    num_bytes = 10_007
    stage = 2

    def snapshot(self) -> StubEngine:
        return self

    def files(self) -> dict:
        def write_weights(folder: Path) -> None:
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"weights")

        state = random.Random(1).randbytes(10_000)
        return {ENGINE_FILE: lambda path: path.write_bytes(state), "weights": write_weights}

    def load(self, folder: Path) -> None:
        pass


def state(step: int, config, **changes) -> RunState:
    plan = {"window": 0, "pack": 0, "step": step, "samples_seen": 10 * step}
    base = {"run_id": "r", "config_hash": config_hash(config), "identity": identity(config), "commit": "c"}
    engine = {"world_size": 1, "zero_stage": 2, "dtype": "fp32", "data": DATA, "plan": plan}
    return RunState(**{**base, **engine, **changes})


@pytest.fixture
def config(tmp_path):
    return run_config(tmp_path, "disabled")


@pytest.fixture
def store(config):
    return CheckpointStore(config.folder / "checkpoints", WORLD)


def save(store, config, *steps, best=()):
    for step in steps:
        found = {"score": float(step), "step": step, "metrics": {}} if step in best else None
        store.save(StubEngine(), state(step, config, best=found), config, best=step in best)
        store.settle(required_step=step)


def start(config, store, **changes):
    arguments = {"data": DATA, "world": WORLD, "zero_stage": 2, "dtype": "fp32", "store": store, **changes}
    return find_start(config, **arguments)


def test_keeps_the_last_two_and_the_best(config, store):
    save(store, config, 1, 2, 3, 4, 5, best=(1, 2))
    assert [path.name for path in published(store.folder)] == ["step-00000002", "step-00000004", "step-00000005"]
    assert read_pointer(store.folder / "latest") == "step-00000005"
    assert read_pointer(store.folder / "best") == "step-00000002"
    assert not list(store.folder.glob(".tmp-*"))
    assert damage(store.folder / "step-00000005") is None
    assert read_state(store.folder / "step-00000005") == state(5, config)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: (path / ENGINE_FILE).write_bytes((path / ENGINE_FILE).read_bytes()[:-1]),
    "emptied": lambda path: (path / "state.json").write_bytes(b""),
    "byte flipped": lambda path: flip(path / ENGINE_FILE),
    "file missing": lambda path: (path / "weights/model.safetensors").unlink(),
    "manifest missing": lambda path: (path / "manifest.json").unlink(),
    "manifest cut": lambda path: (path / "manifest.json").write_text((path / "manifest.json").read_text()[:-9]),
    "half renamed": lambda path: [shutil.rmtree(path / "engine"), (path / "manifest.json").unlink()],
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_is_reported_and_the_previous_used(config, store, kind, caplog):
    save(store, config, 1, 2)
    DAMAGES[kind](store.folder / "step-00000002")
    found, path = start(config, store)
    assert path == store.folder / "step-00000001"
    assert found.step == 1
    assert "step-00000002" in caplog.text


def test_a_newest_that_cannot_be_read_is_reported_and_the_previous_used(config, store, monkeypatch, caplog):
    save(store, config, 1, 2)
    digest = checkpoint.sha256

    def stale(file: Path) -> str:
        if file.parent.parent.name == "step-00000002":
            raise OSError(errno.ESTALE, "Stale file handle")
        return digest(file)

    monkeypatch.setattr(checkpoint, "sha256", stale)
    assert start(config, store)[0].step == 1
    assert f"{ENGINE_FILE} cannot be read: [Errno 116] Stale file handle" in caplog.text


def test_saving_again_over_a_damaged_one_publishes_the_new(config, store):
    save(store, config, 1, 2)
    flip(store.folder / "step-00000002" / ENGINE_FILE)
    save(store, config, 2)
    assert start(config, store)[0].step == 2


def test_an_unfinished_save_is_not_seen_and_later_removed(config, store):
    save(store, config, 1)
    shutil.copytree(store.folder / "step-00000001", store.folder / ".tmp-step-00000002")
    assert start(config, store)[0].step == 1
    save(store, config, 2)
    assert not list(store.folder.glob(".tmp-*"))


@pytest.mark.parametrize("lost", ["best", "latest"])
def test_a_lost_pointer_is_restored_on_resume(config, store, lost):
    save(store, config, 1, 2, 3, best=(1,))
    (store.folder / lost).unlink()
    found, path = start(config, store)
    store.load(StubEngine(), path, replace(found, best={"score": 1.0, "step": 1, "metrics": {}}))
    assert read_pointer(store.folder / "best") == "step-00000001"
    assert read_pointer(store.folder / "latest") == "step-00000003"
    save(store, config, 4)
    assert [path.name for path in published(store.folder)] == ["step-00000001", "step-00000003", "step-00000004"]


def test_a_pointer_to_a_damaged_newest_is_turned_back(config, store):
    save(store, config, 1, 2, best=(1, 2))
    flip(store.folder / "step-00000002" / ENGINE_FILE)
    found, path = start(config, store)
    store.load(StubEngine(), path, found)
    assert read_pointer(store.folder / "best") == read_pointer(store.folder / "latest") == "step-00000001"


def test_steps_that_the_run_has_turned_back_from_are_removed(config, store):
    """Damaged and passed over, or of a run that was rolled back: neither counts among the newest two."""
    save(store, config, 1, 5, 9, 7)
    assert [path.name for path in published(store.folder)] == ["step-00000005", "step-00000007"]
    assert start(config, store)[0].step == 7


def test_of_another_format_is_said_and_passed_over(config, store, caplog):
    save(store, config, 1, 2)
    manifest = store.folder / "step-00000002/manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 1'))
    assert start(config, store)[0].step == 1
    assert "format 1, this program reads 2" in caplog.text


def test_no_checkpoint_or_one_damaged_one_starts_afresh_but_several_damaged_ones_stop(config, store):
    assert start(config, store)[1] is None
    save(store, config, 1)
    flip(store.folder / "step-00000001" / ENGINE_FILE)
    assert start(config, store)[1] is None
    save(store, config, 2)
    flip(store.folder / "step-00000002" / ENGINE_FILE)
    with pytest.raises(ConfigError, match=r"none of its 2 checkpoints is valid.*--out"):
        start(config, store)


def test_another_run_in_the_same_folder_is_refused_with_the_difference(config, store):
    save(store, config, 1)
    other = replace(config, train=replace(config.train, seed=43))
    with pytest.raises(ConfigError, match=r"train\.seed = 42 -> 43.*--out"):
        start(other, store)
    with pytest.raises(ConfigError, match=r"other data \(samples = 10 -> 11\); restore the shards.*--out"):
        start(config, store, data={**DATA, "samples": 11})
    with pytest.raises(ConfigError, match="made with dtype fp32, this start has dtype bf16"):
        start(config, store, dtype="bf16")


def test_other_ranks_and_another_stage_resume_and_say_so(config, store, caplog):
    """Random states of ranks that were not there before: from the seed, the step and the rank."""
    save(store, config, 7)
    world = TwoAlike(rank=1, size=2, local_rank=1, device=WORLD.device)
    found, path = start(config, store, world=world, zero_stage=3)
    engine, drawn = StubEngine(), []
    engine.stage = 3
    for rank, before in ((1, 1), (1, 1), (0, 1), (1, 4)):
        other = TwoAlike(rank=rank, size=2, local_rank=rank, device=WORLD.device)
        with caplog.at_level("INFO"):
            CheckpointStore(store.folder, other).load(engine, path, replace(found, world_size=before))
        drawn.append((random.random(), torch.rand(3).tolist()))
    assert "checkpoint of 1 rank, ZeRO-2: reshaped to 2 ranks, ZeRO-3" in caplog.text
    assert drawn[0] == drawn[1] == drawn[3] != drawn[2]
    assert drawn[0][0] != drawn[2][0]


def test_ranks_that_see_different_things_are_refused(config, store):
    with pytest.raises(ConfigError, match=r"ranks \[1\] see another configuration or other data than rank 0"):
        start(config, store, world=TwoUnlike(rank=0, size=2, local_rank=0, device=WORLD.device))


def test_shards_written_anew_are_refused_unless_the_checkpoint_is_older_than_their_digest(config, store):
    save(store, config, 1)
    found, _ = start(config, store, data={**DATA, "tars": "a"})
    assert found.data["tars"] == "a"  # the next checkpoint has it
    store.save(StubEngine(), replace(found, plan={**found.plan, "step": 2}), config, best=False)
    store.settle(required_step=2)
    with pytest.raises(ConfigError, match=r"tars = 'a' -> 'b'"):
        start(config, store, data={**DATA, "tars": "b"})


def test_operational_changes_resume(config, store):
    save(store, config, 1)
    changed = replace(config, train=replace(config.train, log_every=5, checkpoint_every=7))
    assert start(changed, store)[0].step == 1


def test_random_states_come_back():
    before = random_state()
    drawn = random.random(), torch.rand(3).tolist()
    set_random_state(before)
    assert (random.random(), torch.rand(3).tolist()) == drawn


def test_run_state_is_json(config):
    assert RunState(**json.loads(json.dumps(asdict(state(1, config))))) == state(1, config)


def test_init_from_names_a_runs_best_a_checkpoint_or_a_folder(config, store, tmp_path):
    with pytest.raises(ConfigError, match=r"init_from = 'nowhere': no such file.*hf:owner/name"):
        find_init("nowhere")
    store.folder.mkdir()
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        find_init(str(config.folder))
    save(store, config, 1, 2, best=(1,))
    weights = store.folder / "step-00000001/weights"
    assert find_init(str(config.folder)) == str(weights)
    assert find_init(str(store.folder / "step-00000001")) == str(weights)
    assert find_init(str(weights)) == str(weights)
    assert find_init("hf:owner/name") == "owner/name"
