"""Checkpoints: published whole or not at all, checked before they are used, pruned to the last two and the best."""

from __future__ import annotations

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

    def save(self, folder: Path) -> None:
        (folder / "engine").mkdir()
        (folder / "engine" / "state.pt").write_bytes(random.Random(1).randbytes(10_000))

    def write_weights(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")


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
        store.save(StubEngine(), state(step, config), config, best=step in best)


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
    "truncated": lambda path: (path / "engine/state.pt").write_bytes((path / "engine/state.pt").read_bytes()[:-1]),
    "emptied": lambda path: (path / "state.json").write_bytes(b""),
    "byte flipped": lambda path: flip(path / "engine/state.pt"),
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


def test_saving_again_over_a_damaged_one_publishes_the_new(config, store):
    save(store, config, 1, 2)
    flip(store.folder / "step-00000002/engine/state.pt")
    save(store, config, 2)
    assert start(config, store)[0].step == 2


def test_an_unfinished_save_is_not_seen_and_later_removed(config, store):
    save(store, config, 1)
    shutil.copytree(store.folder / "step-00000001", store.folder / ".tmp-step-00000002")
    assert start(config, store)[0].step == 1
    save(store, config, 2)
    assert not list(store.folder.glob(".tmp-*"))


def test_a_lost_best_pointer_is_restored_on_resume(config, store):
    class Loads(StubEngine):
        def load(self, folder):
            pass

    best = {"score": 1.0, "step": 3, "metrics": {}}
    path = store.save(StubEngine(), state(3, config, best=best), config, best=True)
    (store.folder / "best").unlink()
    store.load(Loads(), path, read_state(path))
    assert read_pointer(store.folder / "best") == path.name


def test_no_checkpoint_or_one_damaged_one_starts_afresh_but_several_damaged_ones_stop(config, store):
    assert start(config, store)[1] is None
    save(store, config, 1)
    flip(store.folder / "step-00000001/engine/state.pt")
    assert start(config, store)[1] is None
    save(store, config, 2)
    flip(store.folder / "step-00000002/engine/state.pt")
    with pytest.raises(ConfigError, match=r"none of its 2 checkpoints is valid.*--out"):
        start(config, store)


def test_another_run_in_the_same_folder_is_refused_with_the_difference(config, store):
    save(store, config, 1)
    other = replace(config, train=replace(config.train, seed=43))
    with pytest.raises(ConfigError, match=r"train\.seed = 42 -> 43.*--out"):
        start(other, store)
    with pytest.raises(ConfigError, match=r"other data.*'samples': 10"):
        start(config, store, data={**DATA, "samples": 11})
    with pytest.raises(ConfigError, match="made with ranks 1, this start has ranks 2"):
        start(config, store, world=TwoAlike(rank=0, size=2, local_rank=0, device=WORLD.device))
    with pytest.raises(ConfigError, match="made with ZeRO stage 2, this start has ZeRO stage 3"):
        start(config, store, zero_stage=3)
    with pytest.raises(ConfigError, match="made with dtype fp32, this start has dtype bf16"):
        start(config, store, dtype="bf16")


def test_ranks_that_see_different_things_are_refused(config, store):
    with pytest.raises(ConfigError, match=r"ranks \[1\] see another configuration or other data than rank 0"):
        start(config, store, world=TwoUnlike(rank=0, size=2, local_rank=0, device=WORLD.device))


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
