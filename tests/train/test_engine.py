"""DeepSpeed, driven by Engine, against a plain torch loop over the same samples."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from spawned import run_ranks
from torch import nn

from fvlm.schema import ConfigError
from fvlm.train.engine import Engine, World
from fvlm.train.optimizer import build_adamw, set_rates
from fvlm.train.schedule import learning_rates
from fvlm.train.zero_config import read_zero_json
from fvlm.train_config import GroupRate, LearningRates, TrainConfig

STEPS, PACKS, WIDTH = 4, 4, 6


class Toy(nn.Module):
    """The three groups in small: a query, a norm, matrices with biases; the loss is a sum over rows, as the model's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_static = nn.Parameter(torch.randn(1, WIDTH))
        self.connector = nn.Linear(WIDTH, WIDTH)
        self.dino = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
        self.llm = nn.Linear(WIDTH, 1)

    def forward(self, batch):
        hidden = self.connector(self.dino(batch) + self.q_static)
        return (self.llm(hidden.tanh()) - 1).square().sum()

    def param_groups(self):
        named = dict(self.named_parameters())
        return {
            "connector": [(n, p) for n, p in named.items() if n.startswith(("q_static", "connector"))],
            "dino": [(n, p) for n, p in named.items() if n.startswith("dino")],
            "llm": [(n, p) for n, p in named.items() if n.startswith("llm")],
        }

    def save_pretrained(self, folder, state_dict):
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(state_dict, Path(folder) / "toy.pt")


def settings(**changes) -> TrainConfig:
    """Converging rates, large enough that a wrong one shows within four steps."""
    rates = LearningRates(
        connector=GroupRate(base=1e-2, target=1e-3),
        dino=GroupRate(base=1e-3, target=3e-3),
        llm=GroupRate(base=3e-3, target=3e-3),
    )
    base = {"total_samples": STEPS * 10, "packs_per_step": PACKS, "learning_rate": rates, "schedule": "converging"}
    return TrainConfig(**{**base, "weight_decay": 0.1, "clip": 0.5, "warmup": 0.3, **changes})


def packs(step: int) -> list[torch.Tensor]:
    """Rows of the step's packs, of different numbers."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(2 + index, WIDTH, generator=generator) for index in range(PACKS)]


def planned(step: int) -> int:
    return sum(len(pack) for pack in packs(step))


def plain_loop(train: TrainConfig) -> tuple[list[float], list[float], dict]:
    """One process, one batch a step, the mean taken once: what every rank count has to give."""
    model = Toy()
    optimizer = build_adamw(model, train)
    losses, norms = [], []
    for step in range(STEPS):
        loss = model(torch.cat(packs(step))) / planned(step)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), train.clip)))
        set_rates(optimizer.param_groups, learning_rates(train, (step + 1) / STEPS))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def train_steps(engine: Engine, train: TrainConfig, steps: range) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in steps:
        total = torch.zeros(())
        for pack in packs(step)[engine.world.rank :: engine.world.size]:
            loss = engine.forward(batch=pack.to(next(engine.module.parameters()).dtype))
            engine.backward(loss, planned(step))
            total += loss.detach().float()
        norms.append(float(engine.step(learning_rates(train, (step + 1) / STEPS))))
        losses.append(float(engine.world.sum(total)) / planned(step))
    return losses, norms


def make_engine(world: World, train: TrainConfig, zero: str) -> Engine:
    contents, origin = read_zero_json(zero)
    return Engine(Toy(), train, contents, origin, world)


def write(engine: Engine, folder: Path) -> None:
    """The engine's share of a checkpoint."""
    for name, write_file in engine.snapshot().files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(folder / name)
    engine.world.barrier()


def weights(engine: Engine, folder: Path) -> dict:
    write(engine, folder)
    return torch.load(folder / "weights/toy.pt", weights_only=True)


def run_plain(world: World, zeros: list[str], folder: Path) -> list[tuple]:
    results = []
    for zero in zeros:
        engine = make_engine(world, settings(), zero)
        losses, norms = train_steps(engine, settings(), range(STEPS))
        results.append((losses, norms, weights(engine, folder / zero)))
    return results


@pytest.mark.parametrize("world_size", [1, 2])
def test_agrees_with_a_plain_torch_loop(world_size, tmp_path):
    zeros = ["zero0", "zero1", "zero2", "zero2_offload", "zero3"]
    losses, norms, expected = plain_loop(settings())
    for by_zero in run_ranks(run_plain, world_size, zeros, tmp_path):
        for zero, (found_losses, found_norms, found) in zip(zeros, by_zero, strict=True):
            assert found_losses == pytest.approx(losses, rel=1e-6), zero
            assert found_norms == pytest.approx(norms, rel=1e-5), zero
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=f"{zero} {name}")


def test_clipping_and_rates_matter_in_that_comparison():
    """Otherwise the test above could not tell a clip or a rate that is ignored."""
    _, norms, expected = plain_loop(settings())
    assert max(norms) > 2 * settings().clip
    for change in ({"clip": 1e9}, {"weight_decay": 0.0}, {"warmup": 0.0}):
        _, _, other = plain_loop(settings(**change))
        assert any((other[n] - expected[n]).abs().max() > 1e-4 for n in expected), change


def run_halves(world: World, zero: str, folder: Path) -> tuple[dict, dict]:
    whole = make_engine(world, settings(), zero)
    train_steps(whole, settings(), range(STEPS))
    first = make_engine(world, settings(), zero)
    train_steps(first, settings(), range(STEPS // 2))
    write(first, folder / "half")
    second = make_engine(world, settings(), zero)
    second.load(folder / "half")
    train_steps(second, settings(), range(STEPS // 2, STEPS))
    return weights(whole, folder / "whole"), weights(second, folder / "second")


@pytest.mark.parametrize("zero", [pytest.param("zero0", marks=pytest.mark.slow), "zero2", "zero2_offload", "zero3"])
def test_resumed_equals_uninterrupted_bit_for_bit(zero, tmp_path):
    for whole, resumed in run_ranks(run_halves, 2, zero, tmp_path):
        for name, value in whole.items():
            assert torch.equal(value, resumed[name]), name


def run_bf16(world: World, zeros: list[str], folder: Path) -> list[tuple]:
    train = settings(
        dtype="bf16", schedule="constant", warmup=0.0, clip=0.0, weight_decay=0.0, learning_rate=tiny_rates()
    )
    results = []
    for zero in zeros:
        engine = make_engine(world, train, zero)
        before = [p.detach().clone() for p in masters(engine)]
        for _ in range(25):
            train_steps(engine, train, range(STEPS))
        moved = max(float((p - q).abs().max()) for p, q in zip(masters(engine), before, strict=True))
        results.append((engine.dtype, moved))
    return results


def tiny_rates() -> LearningRates:
    return LearningRates(connector=GroupRate(base=1e-6), dino=GroupRate(base=1e-6), llm=GroupRate(base=1e-6))


def masters(engine: Engine) -> list[torch.Tensor]:
    return [p for group in engine._engine.basic_optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("zeros", [["zero2"], pytest.param(["zero0", "zero1"], marks=pytest.mark.slow)])
def test_bf16_keeps_fp32_masters_that_a_rate_of_1e6_moves(zeros):
    """A hundred steps at 1e-6 move a weight by about 1e-4; in bf16 most weights would not move at all."""
    for by_zero in run_ranks(run_bf16, 2, zeros, Path()):
        assert len(by_zero) == len(zeros)
        for dtype, moved in by_zero:
            assert dtype == "bf16"
            assert 2e-5 < moved < 2e-4


def run_bad_gradient(world: World, zeros: list[str]) -> list[tuple]:
    results = []
    for dtype in ("fp32", "bf16"):
        for zero in zeros:
            train = settings(dtype=dtype)
            engine = make_engine(world, train, zero)
            before = copy.deepcopy(engine.module.state_dict())
            for pack in packs(0)[world.rank :: world.size]:
                factor = math.nan if world.rank == world.size - 1 else 1.0
                loss = engine.forward(batch=pack.to(next(engine.module.parameters()).dtype)) * factor
                engine.backward(loss, planned(0))
            norm = float(engine.step(learning_rates(train, 0.5)))
            same = all(torch.equal(value, before[name]) for name, value in engine.module.state_dict().items())
            results.append((dtype, zero, norm, same))
    return results


def test_gradient_that_is_not_finite_on_one_rank_updates_nothing_anywhere():
    for results in run_ranks(run_bad_gradient, 2, ["zero0", "zero1", "zero2"]):
        for dtype, zero, norm, same in results:
            assert not math.isfinite(norm), (dtype, zero)
            assert same, (dtype, zero)


def run_refused(world: World) -> str:
    contents, _ = read_zero_json("zero2")
    contents["zero_optimization"]["stage"] = 7
    try:
        Engine(Toy(), settings(), contents, "mine.json", world)
    except ConfigError as error:
        return str(error)
    return ""


def test_what_deepspeed_refuses_is_a_configuration_error_that_names_the_file():
    assert "mine.json" in run_ranks(run_refused, 1)[0]
