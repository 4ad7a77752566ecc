"""What each policy does with a NaN in a frame, in one rank's gradient, in the loss; a crash changes none of it."""

from __future__ import annotations

import json
import math
import re
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from launched import final_weights, step_records
from safetensors.torch import load_file
from spawned import run_ranks

from fvlm.config import load_config
from fvlm.train import objectives
from fvlm.train.engine import World
from fvlm.train.guard import DivergenceError
from fvlm.train.loop import Trainer
from fvlm.train.zero_config import read_zero_json

BROKEN = 5
"""The step that is broken; checkpoints are made after every third."""


class Crash(RuntimeError):
    """The process dies."""


class Broken:
    """A run whose steps from BROKEN to `last` have a NaN on rank 1, `where` it is to be, and that may `crash`."""

    def __init__(self, world: World, where: str, last: int = BROKEN, crash: int = 0):
        self.world, self.where, self.steps, self.crash = world, where, range(BROKEN, last + 1), crash
        self.now, self.suspect = 0, ""
        self.before: dict[int, list[torch.Tensor]] = {}
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.rolled_back_to: list[int] = []

    def train(self, config) -> str:
        """The message with which the run ended; empty for a run that went through."""
        from launch.train import train

        step, loss_sum, roll_back = Trainer.step, objectives.loss_sum, Trainer._roll_back
        spoilt = {
            (Trainer, "step"): lambda trainer, loaded: self._step(step, trainer, loaded),
            (Trainer, "_roll_back"): lambda trainer: self._roll_back(roll_back, trainer),
            (objectives, "loss_sum"): lambda *args: self._loss(*loss_sum(*args)),
        }
        with ExitStack() as stack:
            for (owner, name), function in spoilt.items():
                stack.enter_context(patch.object(owner, name, function))
            try:
                train(config, read_zero_json("zero2"), self.world)
            except (DivergenceError, Crash) as error:
                return str(error)
        return ""

    def _loss(self, loss, pairs):
        return loss * (math.nan if self._hits("loss") else 1.0), pairs

    def _hits(self, where: str) -> bool:
        return self.where == where and self.world.rank == 1 and self.now in self.steps

    def _step(self, step, trainer, loaded):
        self.now = loaded.step.index + 1
        if self.now == self.crash:
            trainer.store.settle()  # what was saved is there
            raise Crash("crashed")
        self.before[self.now] = copies(trainer.engine)
        module = trainer.engine.module
        groups = module.param_groups().items()
        self.weights[self.now] = {group: named[0][1].detach().clone() for group, named in groups}
        encoder = module.encoder
        embed = encoder.embed
        with ExitStack() as stack:
            if self._hits("gradient"):
                handle = encoder.output_proj.weight.register_hook(lambda gradient: gradient * math.nan)
                stack.callback(handle.remove)
            if self._hits("frame"):
                batch = loaded.batches[0]
                row = batch.visual_index[batch.visual_frame == 0][0]
                sample = torch.searchsorted(batch.cu_seqlens[1:].long().contiguous(), row, right=True)
                self.suspect = loaded.keys[0][int(sample)]
                first = torch.zeros(1, dtype=torch.int64)
                stack.enter_context(
                    patch.object(encoder, "embed", lambda frames: embed(frames).index_fill(0, first, math.nan))
                )
            return step(trainer, loaded)

    def _roll_back(self, roll_back, trainer):
        roll_back(trainer)
        now = copies(trainer.engine)
        self.rolled_back_to = [step - 1 for step, before in self.before.items() if all(map(torch.equal, before, now))]


def copies(engine) -> list[torch.Tensor]:
    """This rank's masters and moments."""
    return [tensor.clone() for tensor in engine.snapshot().tensors.values()]


def configure(shards: Path, out: Path, *overrides: str):
    settings = [
        "train.total_samples=150",
        "train.checkpoint_every=3",
        "data.val=[]",
        f"data.train=[{shards / 'train'}]",
    ]
    return load_config("tiny_test", [*settings, f"out={out}", *overrides])


def guard_lines(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "guard"]


# -- skip and stop --------------------------------------------------------------------------------------------------


def run_skip(world: World, shards: Path, out: Path) -> dict:
    found = {}
    for where in ("frame", "gradient", "loss"):
        broken = Broken(world, where)
        found[where] = (broken.train(configure(shards, out / where)), broken.suspect)
    return found


def run_stop(world: World, shards: Path, out: Path) -> dict:
    broken, found = Broken(world, "frame"), {}
    found["stop"] = broken.train(configure(shards, out / "stop", "train.guard.policy=stop"))
    found["suspect"] = broken.suspect
    found["stopped at"] = step_records(out / "stop")[-1]["step"]
    found["resumed"] = Broken(world, "frame").train(configure(shards, out / "stop"))
    limit = "train.guard.max_skips=2"
    found["too many"] = Broken(world, "loss", last=BROKEN + 5).train(configure(shards, out / "many", limit))
    return found


@pytest.fixture(scope="module")
def skipped(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("skipped")
    return out, run_ranks(run_skip, 2, shards, out)


@pytest.mark.parametrize("where", ["frame", "gradient", "loss"])
def test_skip_leaves_out_the_step_and_says_whose_samples_were_in_it(skipped, where):
    out, (_, ours) = skipped
    (line,), records = guard_lines(out / where), step_records(out / where)
    message, suspect = ours[where]
    assert message == ""
    assert (line["step"], line["policy"], line["value"]) == (BROKEN, "skip", "nan" if where != "gradient" else "inf")
    assert line["quantity"] == ("grad_norm" if where == "gradient" else "loss")
    assert [rank["packs"] for rank in line["ranks"]] == [[0], [1]]
    assert all(rank["keys"] for rank in line["ranks"])
    assert [rank["suspects"] for rank in line["ranks"]] == [[], [suspect] if where == "frame" else []]
    assert [record["skipped_steps"] for record in records] == [
        int(step >= BROKEN) for step in range(1, len(records) + 1)
    ]
    broken = records[BROKEN - 1]
    assert (broken["train_loss"] is None) == (where != "gradient")
    assert broken["grad_norm"] is None
    assert all(record["train_loss"] is not None for record in records if record is not broken)


def test_whatever_broke_the_step_the_rest_of_the_run_is_the_same(skipped):
    expected = final_weights(skipped[0] / "frame")
    assert all(value.isfinite().all() for value in expected.values())
    for where in ("gradient", "loss"):
        for name, value in final_weights(skipped[0] / where).items():
            assert torch.equal(value, expected[name]), (where, name)


@pytest.fixture(scope="module")
def stopped(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped")
    return out, run_ranks(run_stop, 2, shards, out)


@pytest.mark.slow
def test_stop_stops_all_ranks_and_another_policy_goes_on_from_the_checkpoint(skipped, stopped):
    first, second = stopped[1]
    suspect = second["suspect"]
    assert first["stop"] == second["stop"]
    assert first["stop"].startswith(f"step {BROKEN}: loss is nan; samples: rank 1: {suspect}. The weights were not")
    assert first["stopped at"] == BROKEN - 1
    assert first["resumed"] == ""
    expected = final_weights(skipped[0] / "frame")
    assert all(torch.equal(value, expected[name]) for name, value in final_weights(stopped[0] / "stop").items())


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run(stopped):
    for found in stopped[1]:
        assert found["too many"].startswith(f"step {BROKEN + 1}: loss is nan")
        assert "2 steps in a row without an update (train.guard.max_skips)" in found["too many"]


# -- roll back and freeze -------------------------------------------------------------------------------------------

ACTING = {
    "roll_back": ["train.guard.policy=roll_back"],
    "freeze_dino": ["train.guard.policy=freeze_dino"],
    "freeze_llm_bottom": ["train.guard.policy=freeze_llm_bottom", "train.guard.llm_bottom=2"],
}


EVERY = (3, BROKEN)
"""Steps between checkpoints: the second has one of the broken step itself, before its effects."""


def run_acting(world: World, shards: Path, out: Path, crashes: list[int]) -> dict:
    """Each policy undisturbed, and with a crash at each of the steps in turn, started again after it."""
    found = {}
    for policy, every in product(ACTING, EVERY):
        overrides, name = [*ACTING[policy], f"train.checkpoint_every={every}"], f"{policy}-{every}"
        whole = Broken(world, "gradient")
        message = whole.train(configure(shards, out / name, *overrides))
        moved = {
            group: [step for step in whole.weights if step + 1 in whole.weights
                    and not torch.equal(whole.weights[step][group], whole.weights[step + 1][group])]
            for group in ("dino", "llm")
        }  # fmt: skip
        found[policy, every] = (message, whole.rolled_back_to, moved)
        for crash in (*crashes, 0):
            Broken(world, "gradient", crash=crash).train(configure(shards, out / f"{name}-crashed", *overrides))
    return found


@pytest.fixture(scope="module")
def acted(shards, tmp_path_factory):
    """Crashes right after the broken step, before its effects are saved, and after they are."""
    out = tmp_path_factory.mktemp("acted")
    return out, run_ranks(run_acting, 2, shards, out, [BROKEN + 1, BROKEN + 3])


@pytest.mark.slow
@pytest.mark.parametrize(("every", "same"), [(3, [3]), (BROKEN, [BROKEN - 1, BROKEN])])
def test_roll_back_returns_to_the_checkpoints_weights_and_not_to_its_data(acted, every, same):
    """Also after a checkpoint of the broken step: that has the weights from before it."""
    out, results = acted
    for found in results:
        message, rolled_back_to, _ = found["roll_back", every]
        assert (message, rolled_back_to) == ("", same)
    records = step_records(out / f"roll_back-{every}")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert [line["policy"] for line in guard_lines(out / f"roll_back-{every}")] == ["roll_back"]


@pytest.mark.slow
@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("policy", ACTING)
def test_a_crash_before_or_after_changes_nothing(acted, policy, every):
    whole, crashed = acted[0] / f"{policy}-{every}", acted[0] / f"{policy}-{every}-crashed"
    assert step_records(crashed) == step_records(whole)
    expected = final_weights(whole)
    for name, value in final_weights(crashed).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["freeze_dino", "freeze_llm_bottom"])
def test_checkpoints_do_not_decide_when_a_part_is_frozen(acted, policy):
    whole, other = (acted[0] / f"{policy}-{every}" for every in EVERY)
    assert step_records(whole) == step_records(other)
    expected = final_weights(whole)
    for name, value in final_weights(other).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("every", EVERY)
def test_the_step_after_the_broken_one_still_trains_the_part(acted, every):
    for found in acted[1]:
        moved = found["freeze_dino", every][2]
        assert moved["dino"] == [1, 2, 3, 4, BROKEN + 1]
        assert moved["llm"][:7] == [1, 2, 3, 4, BROKEN + 1, BROKEN + 2, BROKEN + 3]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["freeze_dino", "freeze_llm_bottom"])
def test_a_frozen_part_stays_as_it_is(acted, policy):
    out = acted[0] / f"{policy}-3"
    state = json.loads(
        (out / "checkpoints" / (out / "checkpoints/latest").read_text().strip() / "state.json").read_text()
    )
    assert state["guard"]["frozen"] == [policy.removeprefix("freeze_")]
    published = sorted((out / "checkpoints").glob("step-*"))
    first, last = (load_file(path / "weights/model.safetensors") for path in (published[0], published[-1]))
    assert published[0].name > f"step-{BROKEN:08d}"
    for name, value in first.items():
        layer = re.search(r"llm\.model\.layers\.(\d+)", name)
        frozen = name.startswith("encoder.dino") if policy == "freeze_dino" else layer and int(layer[1]) < 2
        if frozen:
            assert torch.equal(value, last[name]), name
    assert not torch.equal(first["dino_to_llm.weight"], last["dino_to_llm.weight"])
    for record in step_records(out):
        assert (record["lr_dino"] == 0) == (policy == "freeze_dino" and record["step"] > BROKEN + 1)
