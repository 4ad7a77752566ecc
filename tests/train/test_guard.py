"""A step that must not count leaves nothing behind, in every ZeRO stage; what is unusual, and who is named."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from spawned import run_ranks
from test_engine import Toy, make_engine, packs, planned, settings

from fvlm.model import build_model, tiny_config
from fvlm.schema import ConfigError, build
from fvlm.train import guard
from fvlm.train.engine import Engine, World
from fvlm.train.guard import Anomaly, Guard, Judged, ScoredPack
from fvlm.train.optimizer import parts
from fvlm.train.schedule import learning_rates
from fvlm.train_config import GuardConfig
from tests.model.samples import mixed, pack

NAN, INF = math.nan, math.inf


def judge(watch: Guard, loss: float, norm: float) -> tuple[bool, Anomaly | None]:
    """One step, judged on the device and then on the host: whether it was left out, and why."""
    left_out = watch.verdict(torch.tensor(loss, dtype=torch.float64))(torch.tensor(norm, dtype=torch.float64))
    assert left_out.dtype == torch.float32
    return bool(left_out), watch.observe(Judged(*watch.judged.tolist()))


def filled(values: list[tuple[float, float]], **settings) -> Guard:
    watch = Guard(GuardConfig(**settings), {})
    for loss, norm in values:
        assert judge(watch, loss, norm) == (False, None)
    return watch


def limits(watch: Guard) -> list[float]:
    return watch.statistics()[2].tolist()


def noise(num: int, seed: int = 0) -> list[tuple[float, float]]:
    random = np.random.default_rng(seed)
    return [(float(a), float(b)) for a, b in zip(random.uniform(2, 3, num), random.uniform(0.5, 1.5, num), strict=True)]


def test_limits_are_the_windows_mean_and_six_deviations():
    values = noise(300)
    watch = filled(values)
    last = np.array(values[-128:])
    mean, sigma = last.mean(0), last.std(0, ddof=1)
    for found, expected in zip(watch.statistics(), (mean, sigma, mean + 6 * sigma), strict=True):
        assert found.tolist() == pytest.approx(list(expected), rel=1e-12)


def test_spikes_are_judged_once_half_of_the_window_is_there():
    assert limits(filled(noise(63))) == [INF, INF]
    assert max(limits(filled(noise(64)))) < INF
    assert max(limits(filled(noise(4), window=8))) < INF
    assert limits(filled(noise(200), sigmas=0.0)) == [INF, INF]
    assert limits(filled([(0.1, 0.7)] * 200)) == [INF, INF]  # nothing varies: no measure of what is unusual


def test_a_norm_that_stays_high_is_a_new_level_and_the_window_begins_with_it():
    watch = filled(noise(128))
    for number in range(4):
        assert judge(watch, 2.5, 20.0 + number)[0]
    assert watch.skipped_steps == watch.in_a_row == 4
    assert judge(watch, 2.5, 30.0) == (False, None)
    assert watch.in_a_row == 0
    assert watch.state()["window"] == {"loss": [2.5], "grad_norm": [30.0]}
    assert limits(watch) == [INF, INF]
    for loss, norm in noise(70, seed=1):
        assert judge(watch, loss, 20 * norm) == (False, None)
    assert judge(watch, 2.5, 300.0)[0]


@pytest.mark.parametrize("between", [(2.5, 1.0), (99.0, 20.0), (NAN, 20.0), (2.5, INF)])
def test_what_is_no_high_norm_alone_makes_no_new_level(between):
    watch = filled(noise(128))
    for _ in range(3):
        assert judge(watch, 2.5, 20.0)[0]
    judge(watch, *between)
    for _ in range(4):
        assert judge(watch, 2.5, 20.0)[0]
    assert judge(watch, 2.5, 20.0) == (False, None)


def test_losses_that_stay_high_and_norms_that_are_to_stay_out_never_count():
    watch = filled(noise(128))
    assert all(judge(watch, 99.0, 20.0)[0] for _ in range(20))
    watch = filled(noise(128), new_level_after=0)
    assert all(judge(watch, 2.5, 20.0)[0] for _ in range(20))


def test_a_resumed_guard_finds_the_new_level_at_the_same_step():
    watch = filled(noise(128))
    for _ in range(3):
        assert judge(watch, 2.5, 20.0)[0]
    again = Guard(GuardConfig(), json.loads(json.dumps(watch.state())))
    assert judge(again, 2.5, 20.0)[0]
    assert judge(again, 2.5, 20.0) == (False, None)


@pytest.mark.parametrize(
    ("loss", "norm", "quantity"),
    [(2.5, 1.0, None), (99.0, 1.0, "loss"), (2.5, 99.0, "grad_norm"), (NAN, 1.0, "loss"), (2.5, NAN, "grad_norm"),
     (INF, INF, "loss"), (-INF, 1.0, "loss"), (-99.0, 0.0, None)],
)  # fmt: skip
def test_device_and_host_agree_and_only_a_step_that_counts_enters_the_window(loss, norm, quantity):
    watch = filled(noise(128))
    before = watch.state()["window"]
    left_out, anomaly = judge(watch, loss, norm)
    assert (anomaly.quantity if anomaly else None) == quantity
    assert left_out == watch.due == (anomaly is not None)
    assert (watch.state()["window"] == before) == (anomaly is not None)
    if anomaly is None:
        assert watch.state()["window"] == {
            "loss": [*before["loss"][1:], loss],
            "grad_norm": [*before["grad_norm"][1:], norm],
        }


def test_the_very_limit_counts_and_the_next_number_does_not():
    limit = limits(filled(noise(128)))[1]
    assert judge(filled(noise(128)), 2.5, limit) == (False, None)
    left_out, anomaly = judge(filled(noise(128)), 2.5, float(np.nextafter(limit, INF)))
    assert left_out
    assert anomaly.quantity == "grad_norm"


def test_a_host_that_would_decide_otherwise_ends_the_run():
    watch = filled(noise(128))
    judge(watch, 99.0, 1.0)
    judged = Judged(*watch.judged.tolist())
    with pytest.raises(RuntimeError, match=r"disagree.*the host finds nothing unusual"):
        watch.observe(judged._replace(loss=2.5))
    with pytest.raises(RuntimeError, match=r"disagree.*the host finds loss is 99"):
        watch.observe(judged._replace(left_out=0.0))


def test_without_a_window_only_what_is_not_finite_is_left_out():
    watch = Guard(GuardConfig(), {})
    assert judge(watch, 1e9, 1e9) == (False, None)
    assert str(judge(watch, 1.0, NAN)[1]) == "grad_norm is nan"


@pytest.mark.parametrize("num", [0, 50, 200])
def test_a_state_that_went_through_json_judges_the_same_to_the_last_bit(num):
    watch, values = filled(noise(num)), noise(100, seed=1)
    judge(watch, NAN, 1.0)
    watch.frozen.append("dino")
    again = Guard(GuardConfig(), json.loads(json.dumps(watch.state())))
    assert again.state() == watch.state()
    assert (again.skipped_steps, again.in_a_row, again.frozen, again.due) == (1, 1, ["dino"], True)
    for loss, norm in values:
        assert judge(again, loss, norm) == judge(watch, loss, norm)
        assert torch.equal(again.judged.nan_to_num(), watch.judged.nan_to_num())
    assert (again.skipped_steps, again.in_a_row) == (1, 0)


def test_a_smaller_window_keeps_the_newest():
    watch = Guard(GuardConfig(window=8), filled(noise(200)).state())
    assert watch.state()["window"]["loss"] == [loss for loss, _ in noise(200)[-8:]]


@pytest.mark.parametrize(
    ("given", "key"),
    [({"policy": "hope"}, "policy"), ({"sigmas": -1}, "sigmas"), ({"window": 1}, "window"),
     ({"max_skips": 0}, "max_skips"), ({"policy": "freeze_llm_bottom"}, "llm_bottom"),
     ({"llm_bottom": 0}, "llm_bottom")],
)  # fmt: skip
def test_settings_that_cannot_be_name_their_key(given, key):
    with pytest.raises(ConfigError, match=rf"train\.guard\.{key}"):
        build(GuardConfig, given, "train.guard")


# -- one broken sample ----------------------------------------------------------------------------------------------


def test_a_nan_in_one_frame_breaks_its_own_sample_and_no_other():
    torch.manual_seed(0)
    model = build_model(tiny_config(64)).train()
    _, rows, frames = mixed(8, 64)
    batch, keys = pack(rows, frames, spare=3), [f"k{number}" for number in range(8)]
    clean = model(batch=batch)
    broken, embed = int(rows[2].frame.max()), model.encoder.embed  # of the sample whose question comes first

    def embed_with_nan(frames):
        x = embed(frames).clone()
        x[broken] = NAN
        return x

    model.encoder.embed = embed_with_nan
    spoilt = model(batch=batch)
    assert spoilt.loss_sum.isnan()
    scored = [ScoredPack.of(batch, spoilt.logprobs, keys)]
    assert guard.suspects(scored) == ["k2"]
    ends = batch.cu_seqlens[1:].long()
    of_others = torch.searchsorted(ends, batch.loss_index, right=True) != 2
    assert torch.equal(spoilt.logprobs[of_others], clean.logprobs[of_others])
    clean_losses = dict(guard.sample_losses([ScoredPack.of(batch, clean.logprobs, keys)]))
    for key, loss in guard.sample_losses(scored):
        assert math.isnan(loss) if key == "k2" else loss == clean_losses[key]


def test_a_samples_loss_is_the_mean_over_its_own_labels():
    _, rows, frames = mixed(8, 64)
    batch, keys = pack(rows, frames, spare=3), [f"k{number}" for number in range(8)]
    logprobs = -torch.arange(len(batch.labels), dtype=torch.float32)
    found, first = dict(guard.sample_losses([ScoredPack.of(batch, logprobs, keys)])), 0
    for key, row in zip(keys, rows, strict=True):
        last = first + int(row.has_loss.sum())
        assert found[key] == pytest.approx((first + last - 1) / 2)
        first = last


# -- the engine -----------------------------------------------------------------------------------------------------


def everything(engine: Engine) -> list[torch.Tensor]:
    """Copies of this rank's fp32 masters and moments, Adam's counters, and on the first rank the model's weights."""
    share = engine.snapshot()
    weights = share.weights.state if share.weights is not None else {}
    return [torch.tensor([piece[1:] for piece in share.pieces]), *share.tensors.values(), *weights.values()]


def one_step(engine: Engine, train, step: int, factor: float = 1.0, limit: float = INF) -> bool:
    """A step whose loss on the last rank is `factor` times what it was; returns whether it was left out."""
    watch = Guard(GuardConfig(), {})
    watch.statistics = lambda: torch.full((3, 2), limit, dtype=torch.float64)
    for pack_ in packs(step)[engine.world.rank :: engine.world.size]:
        loss = engine.forward(batch=pack_.to(next(engine.module.parameters()).dtype))
        is_last = engine.world.rank == engine.world.size - 1
        engine.backward(loss * (factor if is_last else 1.0), planned(step))
    engine.step(learning_rates(train, (step + 1) / 4), watch.verdict(torch.zeros(())))
    return bool(engine.skipped)


def run_skips(world: World, cases: list[tuple[str, str]], optimizer: str = "adamw") -> dict:
    """For each dtype and stage: were the broken steps left out, did they change anything, is what follows unchanged."""
    found = {}
    for dtype, zero in cases:
        train = settings(dtype=dtype, optimizer=optimizer)
        engine, undisturbed = make_engine(world, train, zero), make_engine(world, train, zero)
        skipped, same = [one_step(engine, train, 0), one_step(engine, train, 1)], []
        for factor, limit in ((1e4, 100.0), (NAN, INF), (INF, INF)):
            before = everything(engine)
            skipped.append(one_step(engine, train, 2, factor, limit))
            same.append(all(map(torch.equal, before, everything(engine))))
        skipped.append(one_step(engine, train, 3))
        for step in (0, 1, 3):
            one_step(undisturbed, train, step)
        same.append(all(map(torch.equal, everything(undisturbed), everything(engine))))
        found[dtype, zero] = (engine.judged_on, skipped, same, sum(map(torch.numel, everything(engine))))
    return found


EACH_STAGE = [("fp32", "zero0"), ("bf16", "zero1"), ("bf16", "zero2"), ("fp32", "zero2_offload"), ("bf16", "zero3")]
OTHER_DTYPE = [("bf16" if dtype == "fp32" else "fp32", zero) for dtype, zero in EACH_STAGE]
SKIPPING = {
    "zero2 and zero3": (EACH_STAGE[2], EACH_STAGE[4]),
    "other stages": (*EACH_STAGE[:2], EACH_STAGE[3]),
    "in the other dtype": OTHER_DTYPE,
}


@pytest.mark.parametrize(
    "which", [name if name == "zero2 and zero3" else pytest.param(name, marks=pytest.mark.slow) for name in SKIPPING]
)
def test_a_step_that_does_not_count_leaves_nothing_behind(which):
    """A finite spike, a NaN and an infinity on one of two ranks; and the step after is as if they had not been."""
    for results in run_ranks(run_skips, 2, SKIPPING[which]):
        assert len(results) == len(SKIPPING[which])
        for case, (judged_on, skipped, same, num_elements) in results.items():
            assert judged_on == "device", case
            assert skipped == [False, False, True, True, True, False], case
            assert same == [True] * 4, case
            assert num_elements > 150, case


def run_freeze(world: World, zeros: list[str]) -> dict:
    found = {}
    for zero in zeros:
        engine = make_engine(world, settings(), zero)
        one_step(engine, settings(), 0)
        before = engine.snapshot().weights
        engine.freeze("dino")
        one_step(engine, settings(), 1)
        after = engine.snapshot().weights
        found[zero] = (before.state, after.state, float(engine._norm)) if world.is_main else None
    return found


def test_a_frozen_part_stays_as_it_is_and_leaves_the_norm():
    for zero, (before, after, norm) in run_ranks(run_freeze, 2, ["zero0", "zero2", "zero3"])[0].items():
        model = Toy()
        model.load_state_dict(before)
        (model(torch.cat(packs(1))) / planned(1)).backward()
        others = [p.grad for name, p in model.named_parameters() if not name.startswith("dino")]
        assert norm == pytest.approx(float(torch.nn.utils.get_total_norm(others)), rel=1e-5), zero
        for name, value in before.items():
            assert torch.equal(after[name], value) == name.startswith("dino"), (zero, name)


def test_the_first_layers_of_the_language_model_are_a_part_of_their_own():
    model = build_model(tiny_config(64))
    found = parts(model, 2)
    bottom = {name for name, _ in found["llm_bottom"]}
    assert bottom == {name for name, _ in model.param_groups()["llm"] if ".layers.0." in name or ".layers.1." in name}
    assert {name for name, _ in found["llm"]} == {name for name, _ in model.param_groups()["llm"]} - bottom
    with pytest.raises(ConfigError, match=r"llm_bottom: 4 layers: expected less than the model's 4"):
        parts(model, 4)
