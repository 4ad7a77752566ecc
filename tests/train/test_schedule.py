"""Learning rates against the formulas of docs/model.md, written out a second time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvlm.train.schedule import factor, fine_iterations, learning_rates
from fvlm.train_config import GroupRate, LearningRates, TrainConfig

WARMUP = 0.03


def train(schedule: str, **changes) -> TrainConfig:
    rates = LearningRates(
        connector=GroupRate(base=1e-3, target=3e-5 if schedule == "converging" else None),
        dino=GroupRate(base=1e-5, target=3e-5 if schedule == "converging" else None),
        llm=GroupRate(base=1e-5, target=3e-5 if schedule == "converging" else None),
    )
    base = {"total_samples": 1000, "packs_per_step": 1, "learning_rate": rates, "schedule": schedule}
    return TrainConfig(**base, warmup=WARMUP, **changes)


@given(st.floats(0, 1), st.floats(0.01, 20))
def test_cosine_and_converging_follow_the_formula(p, r):
    def formula(r):
        if p < WARMUP:
            return p / WARMUP
        return r + (1 - r) * (1 + math.cos(math.pi * (p - WARMUP) / (1 - WARMUP))) / 2

    assert factor("converging", p, WARMUP, r) == pytest.approx(formula(r))
    assert factor("cosine", p, WARMUP) == pytest.approx(formula(0.1))


def test_converging_groups_meet_at_the_target():
    config = train("converging")
    top, end = learning_rates(config, WARMUP), learning_rates(config, 1.0)
    assert top == pytest.approx({"connector": 1e-3, "dino": 1e-5, "llm": 1e-5})
    assert end == pytest.approx({"connector": 3e-5, "dino": 3e-5, "llm": 3e-5})
    middle = learning_rates(config, (1 + WARMUP) / 2)
    assert middle == pytest.approx({"connector": (1e-3 + 3e-5) / 2, "dino": 2e-5, "llm": 2e-5})


def test_cosine_ends_at_a_tenth_and_constant_stays():
    assert learning_rates(train("cosine"), 1.0)["connector"] == pytest.approx(1e-4)
    assert [factor("constant", p, WARMUP) for p in (WARMUP, 0.5, 1.0)] == [1, 1, 1]


def test_hold_linear_holds_and_then_falls_to_zero_over_the_last_fifth():
    found = [factor("hold_linear", p, WARMUP) for p in (WARMUP, 0.5, 0.8, 0.85, 0.9, 1.0)]
    assert found == pytest.approx([1, 1, 1, 0.75, 0.5, 0])


def test_first_step_is_above_zero_and_warm_up_is_linear():
    """A step takes the progress at its end."""
    first = learning_rates(train("cosine"), 1 / 1000)["connector"]
    assert first == pytest.approx(1e-3 / 30)
    assert factor("constant", 0.015, WARMUP) == pytest.approx(0.5)
    assert factor("constant", 0.0, 0.0) == 1.0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"progress = 1\.5"):
        factor("cosine", 1.5, WARMUP)
    with pytest.raises(ValueError, match="'linear'"):
        factor("linear", 0.5, WARMUP)


def test_fine_iterations_take_turns():
    assert [fine_iterations((1, 2, 3), step) for step in range(7)] == [1, 2, 3, 1, 2, 3, 1]
