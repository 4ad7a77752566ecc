"""Four steps of the mini model against plain torch, to 1e-6; and a hundred tiny ones in bf16 against fp32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from spawned import run_ranks

from fvlm.config import load_config
from fvlm.model import build_model, tiny_config
from fvlm.train.engine import Engine, World
from fvlm.train.optimizer import build_adamw, set_rates
from fvlm.train.schedule import learning_rates
from fvlm.train.zero_config import read_zero_json
from fvlm.train_config import GroupRate, LearningRates
from tests.model.samples import mixed, pack

STEPS, VOCABULARY = 4, 64
ZEROS = ["zero0", "zero1", "zero2", "zero2_offload", "zero3"]


def settings(**changes):
    """Converging rates by group, which fall, rise and stay; a clip that binds.

    `eps` is above the gradients' rounding: with 1e-8, Adam makes whole steps of what is rounding alone (the bias of a
    key has no gradient, for a softmax does not see it), and sums in another order go ways of their own.
    """
    rates = LearningRates(
        connector=GroupRate(base=1e-3, target=1e-4),
        dino=GroupRate(base=1e-5, target=3e-4),
        llm=GroupRate(base=3e-4, target=3e-4),
    )
    train = load_config("tiny_test", ["data.train=[unused]"]).train
    base = {
        "packs_per_step": 2,
        "learning_rate": rates,
        "schedule": "converging",
        "warmup": 0.3,
        "clip": 0.5,
        "eps": 1e-5,
    }
    return replace(train, **{**base, **changes})


def model():
    torch.manual_seed(0)
    return build_model(tiny_config(VOCABULARY)).train()


def packs(step: int):
    """Two packs of a step's samples, and their number of labels."""
    _, rows, frames = mixed(6, VOCABULARY, seed=step)
    halves = [pack(rows[:3], frames, spare=2), pack(rows[3:], frames, spare=2)]
    return halves, sum(int((half.labels >= 0).sum()) for half in halves)


def plain_trace() -> list[tuple[float, float, dict[str, torch.Tensor]]]:
    """(loss, gradient norm, weights) after each step, in one process without DeepSpeed."""
    train, net = settings(), model()
    optimizer, trace = build_adamw(net, train), []
    for step in range(STEPS):
        both, labels = packs(step)
        loss = sum(net(batch=batch, fine_iterations=1 + step % 2).loss_sum for batch in both) / labels
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), train.clip)
        set_rates(optimizer.param_groups, learning_rates(train, (step + 1) / STEPS))
        optimizer.step()
        trace.append((loss.item(), float(norm), {name: p.detach().clone() for name, p in net.named_parameters()}))
    return trace


def make_engine(world: World, train, zero: str) -> Engine:
    contents, origin = read_zero_json(zero)
    if zero == "zero3":  # small parameters would otherwise stay whole on every rank
        contents["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    return Engine(model(), train, contents, origin, world)


def one_step(engine: Engine, train, step: int, progress: float) -> tuple[float, float]:
    both, labels = packs(step)
    total = torch.zeros(1, dtype=torch.float64)
    for batch in both[engine.world.rank :: engine.world.size]:
        out = engine.forward(batch=batch, fine_iterations=1 + step % 2)
        engine.backward(out.loss_sum, labels)
        total += out.loss_sum.item()
    norm = float(engine.step(learning_rates(train, progress)))
    return engine.world.sum(total).item() / labels, norm


def run_trace(world: World, zeros: list[str]) -> dict:
    found = {}
    for zero in zeros:
        engine, trace = make_engine(world, settings(), zero), []
        for step in range(STEPS):
            loss, norm = one_step(engine, settings(), step, (step + 1) / STEPS)
            share = engine.snapshot()
            trace.append((loss, norm, share.weights.state if share.weights is not None else {}))
        found[zero] = trace
    return found


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_four_steps_are_plain_torchs_to_a_millionth(ranks):
    """Losses and norms 1e-6 relative, weights 1e-6 absolute (they are of order 1), after each of the steps."""
    expected = plain_trace()
    assert min(norm for _, norm, _ in expected) > settings().clip
    moved = [(expected[-1][2][name] - value).abs().max() for name, value in expected[0][2].items()]
    assert max(moved) > 1e-4  # or the comparison would say nothing
    for zero, trace in run_ranks(run_trace, ranks, ["zero0", "zero2", "zero3"])[0].items():
        for step, ((loss, norm, weights), (loss_2, norm_2, weights_2)) in enumerate(zip(expected, trace, strict=True)):
            assert loss_2 == pytest.approx(loss, rel=1e-6), (zero, step)
            assert norm_2 == pytest.approx(norm, rel=1e-6), (zero, step)
            for name, value in weights.items():
                torch.testing.assert_close(weights_2[name], value, rtol=0, atol=1e-6, msg=f"{zero} {step} {name}")


HUNDRED = settings(
    learning_rate=LearningRates(**{group: GroupRate(base=1e-6) for group in ("connector", "dino", "llm")}),
    schedule="constant", warmup=0.0, weight_decay=0.0, clip=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def moved_in_fp32() -> dict[str, torch.Tensor]:
    """By how much plain torch moves every weight in a hundred steps."""
    net = model()
    before = {name: p.detach().double().flatten() for name, p in net.named_parameters()}
    optimizer = build_adamw(net, HUNDRED)
    for step in range(100):
        both, labels = packs(step % 4)
        optimizer.zero_grad()
        (sum(net(batch=batch, fine_iterations=1 + step % 2).loss_sum for batch in both) / labels).backward()
        optimizer.step()
    return {name: p.detach().double().flatten() - before[name] for name, p in net.named_parameters() if p.requires_grad}


def run_hundred(world: World, zero: str) -> tuple[dict[str, torch.Tensor], set, int]:
    """By how much the masters moved, the moments' types, and the stage that ran; one rank, bf16."""
    train = replace(HUNDRED, dtype="bf16")
    engine = make_engine(world, train, zero)
    before = masters(engine)
    for step in range(100):
        one_step(engine, train, step % 4, 0.5)
    moved = {name: after - before[name] for name, after in masters(engine).items()}
    moments = {t.dtype for state in engine._engine.basic_optimizer.state.values() for t in state.values()}
    return moved, moments, engine.stage


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    """fp32 masters by parameter, flat, of a single rank."""
    share, found, at = engine.snapshot(), {}, 0
    for name, first, number, _ in share.pieces:
        assert first == 0
        found[name] = share.tensors["master"][at : at + number].double()
        at += number
    return found


@pytest.mark.slow
@pytest.mark.parametrize("zero", ZEROS)
def test_a_hundred_steps_at_1e6_move_bf16_as_they_move_fp32(zero, moved_in_fp32):
    """Same length within 5 %, same direction. The weights themselves, in bf16, could not move by so little."""
    ((moved, moments, stage),) = run_ranks(run_hundred, 1, zero)
    assert moments == {torch.float32}
    assert stage == {"zero0": 1, "zero1": 1, "zero3": 3}.get(zero, 2)
    ours, plain = (torch.cat([values[name] for name in moved_in_fp32]) for values in (moved, moved_in_fp32))
    print(zero, float(ours.norm() / plain.norm()), float(ours @ plain / (ours.norm() * plain.norm())))
    assert 2e-5 < float(plain.abs().max()) < 2e-4
    assert float(ours.norm() / plain.norm()) == pytest.approx(1, abs=0.05)
    assert float(ours @ plain / (ours.norm() * plain.norm())) > 0.9
