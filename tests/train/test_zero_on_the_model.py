"""Every ZeRO stage on the real model, each parameter partitioned, against plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from spawned import run_ranks

from fvlm.config import load_config
from fvlm.model import build_model, tiny_config
from fvlm.train.engine import Engine, World
from fvlm.train.optimizer import build_adamw, set_rates
from fvlm.train.zero_config import read_zero_json
from tests.model.samples import mixed, pack

RATES = {"connector": 1e-3, "dino": 1e-3, "llm": 1e-3}
STEPS, PLANNED = 3, 100
VOCABULARY = 64


def settings(checkpointing: bool):
    train = load_config("tiny_test", ["data.train=[unused]"]).train
    return replace(train, packs_per_step=2, activation_checkpointing=checkpointing, clip=0.0)


def model():
    torch.manual_seed(0)
    return build_model(tiny_config(VOCABULARY, query_logit_scale="learnable")).train()


def packs():
    """Two packs; the second holds text alone, so that ranks have different work."""
    _, rows, frames = mixed(8, VOCABULARY)
    return [pack(rows, frames, spare=2), pack(rows[5:6], frames, spare=2)]


def plain() -> list[float]:
    net, train = model(), settings(checkpointing=False)
    optimizer, losses = build_adamw(net, train), []
    for step in range(STEPS):
        total = sum(net(batch=batch, fine_iterations=1 + step % 2).loss_sum for batch in packs())
        (total / PLANNED).backward()
        set_rates(optimizer.param_groups, RATES)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses


def run_engine(world: World, stage: int, checkpointing: bool) -> list[float]:
    zero, origin = read_zero_json(f"zero{stage}")
    if stage == 3:  # small parameters would otherwise stay whole on every rank
        zero["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}
    engine, losses = Engine(model(), settings(checkpointing), zero, origin, world), []
    mine = packs()[world.rank :: world.size]
    for step in range(STEPS):
        total = torch.zeros(1, dtype=torch.float64)
        for batch in mine:
            out = engine.forward(batch=batch, fine_iterations=1 + step % 2)
            engine.backward(out.loss_sum, PLANNED)
            total += out.loss_sum.item()
        engine.step(RATES)
        losses.append(world.sum(total).item())
    return losses


RARE = [pytest.param(0, 2, False, marks=pytest.mark.slow), pytest.param(1, 2, True, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("stage", "ranks", "checkpointing"), [*RARE, (2, 2, False), (3, 2, True)])
def test_loss_curve_is_plain_torchs(stage, ranks, checkpointing):
    for losses in run_ranks(run_engine, ranks, stage, checkpointing):
        assert losses == pytest.approx(plain(), rel=1e-5)
