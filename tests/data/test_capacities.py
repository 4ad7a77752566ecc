"""Capacities: what they are proposed from, against brute force, and how full packs get."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fvlm.data.capacities import FILL, Capacities, _balanced_frames, _largest
from fvlm.data.chat import Layout
from fvlm.data.mixture import Mixture
from fvlm.data.order import SampleOrder
from fvlm.data.plan import Plan
from fvlm.data.proposal import WINDOWS, propose_plan
from fvlm.data.table import DIMENSIONS, sample_costs
from tests.data.tables import STAGE_2, draw_table

TABLE = draw_table(3000)
MIXTURE = Mixture(text_share=0.14, question_first=0.5)


def fill_of(plan: Plan) -> dict[str, float]:
    packs = [pack for window in range(plan.num_windows) for pack in plan.window(window)]
    means = {name: np.mean([getattr(pack, name) for pack in packs]) for name in DIMENSIONS}
    return {name: mean / getattr(plan.capacities, name) for name, mean in means.items()}


@pytest.mark.parametrize("mixture", [Mixture(), Mixture(question_first=0.3), Mixture(narrated=0.5, question_first=1)])
@pytest.mark.parametrize("objective", ["ce_all", "ce_answer"])
@pytest.mark.parametrize("longest", [150, 16384])
def test_the_largest_sample_is_found(mixture, objective, longest):
    limit = np.array([40, longest, *[1 << 40] * 4])
    largest = np.zeros(len(DIMENSIONS), np.int64)
    drawn = [Layout.VIDEO_FIRST]
    drawn += [Layout.QUESTION_FIRST] if mixture.question_first else []
    drawn += [Layout.NARRATED] if mixture.narrated else []
    for row in range(len(TABLE)):
        for layout in drawn:
            if layout == Layout.NARRATED and not TABLE.narrated_tokens[row]:
                continue
            costs = sample_costs(TABLE, np.array([row]), np.array([layout], np.uint8), mixture, objective)[0]
            if (costs <= limit).all():
                largest = np.maximum(largest, costs)
    assert _largest(TABLE, mixture, objective, limit).tolist() == largest.tolist()


def test_balanced_frames_are_the_best_of_all():
    """Against every multiple of 4, for windows of which some are rich in frames and others in tokens."""
    random = np.random.default_rng(0)
    needed = np.stack([random.integers(30_000, 40_000, 32), random.integers(1_200_000, 1_500_000, 32)], axis=1)

    def slack(frames: int) -> float:
        packs = sum(max(-(-int(f) // frames), -(-int(t) // 16384)) for f, t in needed)
        filled = needed.sum(axis=0) / packs / [frames, 16384]
        return min(filled[0] - FILL["frames"], filled[1] - FILL["tokens"])

    best = max(range(4, 1000, 4), key=slack)
    assert slack(_balanced_frames(needed, 16384)) == pytest.approx(slack(best))


@pytest.mark.parametrize(
    "mixture",
    [
        MIXTURE,
        pytest.param(Mixture(), marks=pytest.mark.slow),
        pytest.param(Mixture(question_first=0.5, narrated=0.5), marks=pytest.mark.slow),
    ],
)
def test_proposed_packs_are_full(mixture):
    """Measured here over the whole epoch, in another order than the one they are proposed from."""
    table = draw_table(60_000)
    proposal = propose_plan(table, mixture, tokens=16384, objective="ce_answer", seed=1)
    assert proposal.is_full
    assert not proposal.refused
    plan = Plan(table, mixture, proposal.capacities, "ce_answer", 2, len(table), proposal.window)
    fill = fill_of(plan)
    assert fill["frames"] >= 0.97
    assert fill["tokens"] >= 0.99
    assert min(fill.values()) > 0.84
    assert not plan.refused


def test_a_proposal_says_what_is_so():
    table = draw_table(9000)
    proposal = propose_plan(table, MIXTURE, tokens=4096, objective="ce_answer", seed=3)
    assert proposal.window in WINDOWS
    plan = Plan(table, MIXTURE, proposal.capacities, "ce_answer", 3, len(table), proposal.window)
    packs = [pack for window in range(plan.num_windows) for pack in plan.window(window)]
    assert (proposal.packs, proposal.samples) == (len(packs), sum(pack.samples for pack in packs))
    assert proposal.fill == pytest.approx(fill_of(plan))


def test_refused_samples_are_counted_by_reason():
    tokens, frames, answer = TABLE.tokens.copy(), TABLE.num_frames.copy(), TABLE.answer.copy()
    video = np.flatnonzero(TABLE.num_frames > 1)
    tokens[video[:3]], answer[video[3:5]] = 99_999, 0
    spoiled = replace(TABLE, tokens=tokens, num_frames=frames, answer=answer)
    proposal = propose_plan(spoiled, MIXTURE, tokens=8192, objective="ce_answer", frames=50)
    over_frames = TABLE.num_frames > 50
    assert proposal.refused == {
        "over_frames": over_frames.sum(),
        "over_tokens": (~over_frames[video[:3]]).sum(),
        "no_loss_tokens": (~over_frames[video[3:5]]).sum(),
    }


def test_one_sample_too_long_does_not_decide_the_frames():
    """It is refused whatever is proposed, so the balance is that of the others."""
    tokens = TABLE.tokens.copy()
    tokens[7] = 10_000_000
    options = {"tokens": 8192, "objective": "ce_all"}
    with_it = Capacities.propose(replace(TABLE, tokens=tokens), Mixture(), **options)
    assert abs(with_it.frames / Capacities.propose(TABLE, Mixture(), **options).frames - 1) < 0.02


def test_a_mixture_that_ends_early_is_proposed_for_as_far_as_it_goes():
    names = ("smoltalk", "webvid")
    table = draw_table(3000, {name: STAGE_2[name] for name in names})
    limited = Mixture(text_share=0.5, repeats={"webvid": 1})
    size = SampleOrder(table, limited, 0).size
    assert size < len(table)
    assert propose_plan(table, limited, tokens=8192, objective="ce_all").samples == size
