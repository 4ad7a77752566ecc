"""A part that is frozen for a time: nothing of it moves before, and afterwards it trains as a part that just began."""

from __future__ import annotations

import re
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from spawned import run_ranks
from test_engine import STEPS, Toy, make_engine, packs, planned, settings, train_steps, write
from test_guard import everything
from torch import nn

from fvlm.config import config_hash, load_config, save_config
from fvlm.model import build_model, tiny_config
from fvlm.schema import ConfigError, build
from fvlm.train.guard import Guard
from fvlm.train.optimizer import LLM_BOTTOM, parameter_groups
from fvlm.train.schedule import learning_rates, unfreezes
from fvlm.train_config import FreezeUntil, GuardConfig, TrainConfig

FEW = [("zero0", "fp32"), ("zero2", "fp32"), ("zero3", "bf16")]
MANY = [("zero1", "fp32"), ("zero2_offload", "fp32"), ("zero3", "fp32"), ("zero1", "bf16"), ("zero2", "bf16")]
HALF = STEPS // 2


def held(**changes) -> TrainConfig:
    return settings(freeze=(FreezeUntil(part="dino", until=0.5),), **changes)


def steps_of(engine, train: TrainConfig, steps: range) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in steps:
        engine.freeze_for_now(train.frozen_at((step + 1) / STEPS))
        (loss,), (norm,) = train_steps(engine, train, range(step, step + 1))
        losses.append(loss)
        norms.append(float(norm))
    return losses, norms


def plain() -> tuple[list[float], list[float], dict]:
    """torch's AdamW, which passes over a parameter without a gradient and begins its moments with the first one."""
    model, train = Toy(), held()
    optimizer = torch.optim.AdamW(parameter_groups(model, train), betas=train.betas, eps=train.eps)
    losses, norms = [], []
    for step in range(STEPS):
        loss = model(torch.cat(packs(step))) / planned(step)
        optimizer.zero_grad()
        loss.backward()
        if step < HALF:
            model.dino.zero_grad()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), train.clip)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rates(train, (step + 1) / STEPS)[group["name"]]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms, model.state_dict()


def run_held(world, cases: list[tuple[str, str]], folder: Path) -> dict:
    """By stage and type: losses, norms and weights at the boundary and at the end; does resuming change anything?"""
    found = {}
    for zero, dtype in cases:
        train, place = held(dtype=dtype), folder / f"{zero}-{dtype}"
        engine = make_engine(world, train, zero)
        curves = [steps_of(engine, train, range(1))]
        write(engine, place / "1")  # before the boundary
        curves.append(steps_of(engine, train, range(1, HALF)))
        write(engine, place / str(HALF))  # at it
        curves.append(steps_of(engine, train, range(HALF, STEPS)))
        write(engine, place / "end")
        same = []
        for step in (1, HALF):
            again = make_engine(world, train, zero)
            again.load(place / str(step))
            steps_of(again, train, range(step, STEPS))
            same.append(all(map(torch.equal, everything(engine), everything(again))))
        found[zero, dtype] = ([list(chain(*parts)) for parts in zip(*curves, strict=True)], same)
    return found


@pytest.fixture(scope="module", params=[FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def held_runs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    return folder, run_ranks(run_held, 2, request.param, folder)


def test_every_stage_holds_a_part_and_then_trains_it_as_plain_torch_does(held_runs):
    folder, by_rank = held_runs
    losses, norms, end = plain()
    start = Toy().state_dict()
    for (zero, dtype), ((found_losses, found_norms), _) in by_rank[0].items():
        files = [folder / f"{zero}-{dtype}" / at / "weights/toy.pt" for at in (str(HALF), "end")]
        half, last = (torch.load(file, weights_only=True) for file in files)
        for name, value in start.items():
            unmoved = torch.equal(half[name], value.to(half[name].dtype))
            assert unmoved == name.startswith("dino"), (zero, dtype, name)
        assert not torch.equal(last["dino.0.weight"], half["dino.0.weight"])
        if dtype == "fp32":
            assert found_losses == pytest.approx(losses, rel=1e-6), zero
            assert found_norms == pytest.approx(norms, rel=1e-5), zero
            for name, value in end.items():
                torch.testing.assert_close(last[name], value, rtol=1e-5, atol=1e-6, msg=f"{zero} {name}")


def test_a_run_that_is_resumed_across_the_boundary_or_at_it_is_the_same_bit_for_bit(held_runs):
    for found in held_runs[1]:
        assert {case: same for case, (_, same) in found.items()} == {case: [True, True] for case in found}


def test_what_is_frozen_for_good_stays_so_whatever_the_schedule_says():
    (weights,) = run_ranks(run_both, 1)
    assert all(torch.equal(a, b) for a, b in weights)


def run_both(world) -> list:
    engine = make_engine(world, held(), "zero2")
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters() if name.startswith("dino")}
    engine.freeze("dino")
    steps_of(engine, held(), range(STEPS))
    return [(p.detach(), before[name]) for name, p in engine.module.named_parameters() if name in before]


# -- configuration --------------------------------------------------------------------------------------------------


def train_section(*overrides: str) -> TrainConfig:
    return load_config("tiny_test", overrides).train


def test_rates_and_parts_follow_the_samples_seen():
    train = train_section(
        "train.freeze=[{part: llm, until: 0.25}, {part: 'llm:2', until: 0.5}, {part: dino, until: 0.1}]"
    )
    assert train.frozen_at(0.1) == {"llm", LLM_BOTTOM, "dino"}
    assert train.frozen_at(0.25) == {"llm", LLM_BOTTOM}
    assert train.frozen_at(0.26) == {LLM_BOTTOM}
    assert train.frozen_at(1.0) == frozenset()
    assert learning_rates(train, 0.2)["llm"] == 0
    assert learning_rates(train, 0.3)["llm"] == learning_rates(train_section(), 0.3)["llm"]
    assert train.llm_bottom == 2
    parts = {group["part"] for group in parameter_groups(build_model(tiny_config(64)), train)}
    assert parts == {"connector", "dino", "llm", LLM_BOTTOM}
    assert (train.frozen, train_section("train.freeze=[dino, 'llm:2']").frozen) == ((), ("dino", "llm:2"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.freeze=[{part: llm, until: 1}]"], "train.freeze[0].until = 1.0: expected a share of the run, above 0"),
        (["train.freeze=[{part: llms, until: 0.5}]"], "train.freeze[0] = 'llms': expected connector, dino, llm"),
        (["train.freeze=[{part: llm}]"], "missing key train.freeze[0].until"),
        (["train.freeze=[llm, {part: llm, until: 0.5}]"], "each part once"),
        (["train.freeze=[dino, llm, {part: connector, until: 0.5}]"], "at least one group left to train at any time"),
        (["train.freeze=[{part: 'llm:2', until: 0.5}]", "train.guard.llm_bottom=3"], "the same number of first layers"),
        (["train.freeze=[{part: 'llm:2', until: 0.5}, {part: 'llm:3', until: 0.5}]"], "the same number"),
        (["train.freeze=[llm, {part: 'llm:2', until: 0.5}]"], "expected no llm:K with until beside a part"),
    ],
)
def test_what_cannot_be_names_its_key(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        train_section(*overrides)


def test_it_is_part_of_what_a_run_is_and_survives_its_file(tmp_path):
    one, other = (load_config("tiny_test", [f"train.freeze=[{{part: llm, until: {x}}}]"]) for x in (0.2, 0.3))
    assert config_hash(one) != config_hash(other)
    save_config(one, tmp_path / "config.yaml")
    assert load_config(str(tmp_path / "config.yaml")) == one


def test_the_guards_window_begins_anew_where_other_parameters_begin_to_train():
    """Their gradient is larger: judged by the norms before, every step from there on would be left out."""
    watch = Guard(build(GuardConfig, {"window": 4}, "train.guard"), {})
    judged = []
    for number, norm in enumerate((1.0, 1.1, 0.9, 1.0, 50.0, 51.0, 49.0, 500.0)):
        verdict = watch.verdict(torch.tensor(2.0 + 0.01 * number, dtype=torch.float64), anew=number == 4)
        judged.append(float(verdict(torch.tensor(norm))))
    assert judged == [0, 0, 0, 0, 0, 0, 0, 1]


class Seen:
    """What a step knows of the samples."""

    def __init__(self, before: int, seen: int):
        self.samples_seen_before, self.samples_seen = before, seen


def test_one_step_is_the_first_to_train_a_part():
    train = held()
    ends = [round(n * train.total_samples / 8) for n in range(9)]
    first = [unfreezes(train, Seen(*pair)) for pair in pairwise(ends)]
    assert first == [False, False, False, False, True, False, False, False]
