"""The plan: exact epochs, even shares, independent windows, honest costs, and resumption anywhere."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlm.data.chat import Layout, Text, Visual, load_tokenizer, segments, text_counts
from fvlm.data.packing import pack_samples
from fvlm.data.plan import Capacities, Mixture, Plan, PlanState, SampleTable
from fvlm.data.shard import KINDS
from fvlm.data.table import DIMENSIONS, sample_costs
from tests.data.tables import COUNT_NAMES, STAGE_2, draw_table

TABLE = draw_table(3000)
ROOMY = Capacities(frames=256, tokens=16384, visual=4096, coarse=4096, samples=256, labels=16384, max_seqlen=16384)


def make_plan(table=TABLE, total=3000, objective="ce_all", seed=42, window=512, capacities=ROOMY, **mixture):
    return Plan(table, Mixture(**mixture), capacities, objective, seed, total, window)


def all_windows(plan):
    return [plan.window(window) for window in range(plan.num_windows)]


def packed_rows(windows):
    return np.concatenate([pack.rows for window in windows for pack in window])


def as_lists(packs):
    return [(pack.rows.tolist(), pack.layouts.tolist(), pack.labels) for pack in packs]


# --- windows and packs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "size"), [(512, 3000), (4096, 3000), (250, 1000), (7, 50)])
def test_natural_weights_show_every_sample_once_an_epoch(window, size):
    table = draw_table(size)
    plan = make_plan(table, total=3 * size, window=window)
    per_epoch = -(-size // window)
    assert plan.num_windows == 3 * per_epoch
    for epoch in range(3):
        rows = [plan.window_order(epoch * per_epoch + w)[0] for w in range(per_epoch)]
        assert sorted(np.concatenate(rows).tolist()) == list(range(size))
        packs = [plan.window(epoch * per_epoch + w) for w in range(per_epoch)]
        assert sorted(packed_rows(packs).tolist()) == list(range(size))


@pytest.mark.parametrize("share", [0.14, 0.5, 0.0, 1.0])
@pytest.mark.parametrize("weights", [None, {name: 1.0 + i for i, name in enumerate(STAGE_2)}])
def test_text_share_within_a_point_in_every_thousand(share, weights):
    plan = make_plan(total=20_000, text_share=share, weights=weights, window=4096)
    rows = np.concatenate([plan.window_order(window)[0] for window in range(plan.num_windows)])
    assert len(rows) == 20_000
    is_text = TABLE.kind[rows] == KINDS.index("text")
    counts = np.convolve(is_text, np.ones(1000), "valid")
    assert np.abs(counts / 1000 - share).max() < 0.0021
    bursts = np.convolve(is_text, np.ones(50), "valid")  # evenly, not in bursts
    assert np.abs(bursts - 50 * share).max() < 2


def test_windows_are_independent():
    plan, fresh = make_plan(), make_plan()
    windows = all_windows(plan)
    for window in (5, 0, 3):
        assert as_lists(fresh.window(window)) == as_lists(windows[window])


def test_windows_depend_on_sample_counts_alone():
    longer = replace(TABLE, tokens=TABLE.tokens * 2, answer=TABLE.answer * 2)
    a, b = make_plan(), make_plan(longer)
    for window in range(a.num_windows):
        np.testing.assert_array_equal(a.window_order(window), b.window_order(window))


def test_packs_stay_within_capacities_and_count_right():
    plan = make_plan(text_share=0.14, question_first=0.5, narrated=0.5, total=2000)
    for pack in (pack for window in all_windows(plan) for pack in window):
        costs = sample_costs(TABLE, pack.rows, pack.layouts, plan.mixture, "ce_all").sum(axis=0)
        assert costs.tolist() == [getattr(pack, name) for name in DIMENSIONS]
        assert (costs <= ROOMY.as_array()).all()


def test_order_of_packs_is_shuffled():
    """Best fit, largest first, would put heavy packs first: after the shuffle, pack size says nothing of position."""
    packs = make_plan(window=4096).window(0)
    samples = np.array([pack.samples for pack in packs])
    assert abs(np.corrcoef(samples, np.arange(len(samples)))[0, 1]) < 0.5
    assert as_lists(packs) != as_lists(make_plan(window=4096, seed=43).window(0))


@given(st.integers(1, 200), st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 30]))
@settings(max_examples=60, deadline=None)
def test_packing_is_a_partition_within_capacity(n, seed, scale):
    random = np.random.default_rng(seed)
    capacity = random.integers(20, 100, 6)
    costs = random.integers(0, np.maximum(capacity // scale, 1) + 1, (n, 6))
    groups = pack_samples(costs, capacity)
    assert sorted(np.concatenate(groups).tolist()) == list(range(n))
    assert all((costs[group].sum(axis=0) <= capacity).all() for group in groups)


def test_fill_of_a_simulated_stage_2_mix():
    table = draw_table(40_000)
    mixture = Mixture(text_share=0.14, question_first=0.5)
    capacities = Capacities.propose(table, mixture, tokens=16384, objective="ce_answer")
    plan = Plan(table, mixture, capacities, "ce_answer", 0, 16384, window=4096)
    packs = [pack for window in all_windows(plan) for pack in window]
    assert not plan.refused
    fill = {name: np.mean([getattr(pack, name) for pack in packs]) / getattr(capacities, name) for name in DIMENSIONS}
    assert fill["frames"] > 0.96  # in four small windows; test_capacities has what is proposed, over an epoch
    assert fill["tokens"] > 0.985
    assert min(fill.values()) > 0.85
    is_text = table.kind[packed_rows([packs])] == KINDS.index("text")
    counts = np.convolve(is_text, np.ones(1000), "valid")
    assert np.abs(counts / 1000 - 0.14).max() < 0.03  # packing and shuffling make no bursts either


# --- costs -------------------------------------------------------------------------------------------------------

TINY = load_tokenizer("tiny")
METAS = [
    {"kind": "video", "source": "openvid", "frame_count": 5, "assistant": "A red ring moves."},
    {"kind": "video", "source": "a", "frame_count": 3, "user": "So?", "assistant": "L", "narration": ["x", "", "y z"]},
    {"kind": "video", "source": "a", "frame_count": 2, "user": "Where?", "assistant": "Up.", "narration": ["so", ""]},
    {"kind": "image", "source": "b", "frame_count": 1, "user": "What?", "assistant": "A star."},
    {"kind": "image", "source": "b", "frame_count": 1, "user": "What?", "assistant": "A star.", "narration": ["star"]},
    {"kind": "images", "source": "b", "frame_count": 4, "turns": [{"user": "1?", "assistant": "2"}] * 2},
    {"kind": "text", "source": "c", "frame_count": 0, "user": "Hi", "assistant": "Hello"},
]  # fmt: skip


def real_table():
    counts = [text_counts(meta, TINY) for meta in METAS]
    names = tuple(sorted({meta["source"] for meta in METAS}))
    n = len(METAS)
    return SampleTable(
        source_names=names,
        shard=np.zeros(n, np.int32),
        row=np.arange(n, dtype=np.int32),
        source=np.array([names.index(meta["source"]) for meta in METAS], np.int16),
        kind=np.array([KINDS.index(meta["kind"]) for meta in METAS], np.uint8),
        num_frames=np.array([meta["frame_count"] for meta in METAS], np.int32),
        **{name: np.array([getattr(count, name) for count in counts], np.int32) for name in COUNT_NAMES},
    )


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("objective", ["ce_all", "ce_answer"])
@pytest.mark.parametrize("visual", [{}, {"looks": 3, "tokens_per_frame": 2}, {"grid": 4}])
def test_costs_are_those_of_the_real_segments(layout, objective, visual):
    mixture, table = Mixture(**visual), real_table()
    for number, meta in enumerate(METAS):
        if layout == Layout.NARRATED and "narration" not in meta:
            continue
        costs = sample_costs(table, np.array([number]), np.array([layout], np.uint8), mixture, objective)[0]
        rows = []  # one letter a row of the sample, walked slowly
        for part in segments(meta, TINY, layout, **mixture.visual_arguments):
            if isinstance(part, Text):
                rows += ["answer" if flag else "text" for flag in part.is_answer]
            else:
                rows += ["visual"] * len(part.frames) * max(mixture.grid, 1)
        looked_at = {f for p in segments(meta, TINY, layout) if isinstance(p, Visual) for f in p.frames}
        visual_rows = [i for i, row in enumerate(rows) if row == "visual"]
        text_rows = [row for row in rows if row != "visual"]
        expected = {
            "frames": len(looked_at),
            "tokens": len(rows),
            "visual": len(visual_rows),
            "coarse": visual_rows[-1] + 1 if visual_rows else 0,
            "labels": len(text_rows) - 1 if objective == "ce_all" else text_rows.count("answer"),
            "samples": 1,
        }
        assert dict(zip(DIMENSIONS, costs.tolist(), strict=True)) == expected


# --- refusals ----------------------------------------------------------------------------------------------------


def test_refusals_are_counted_and_move_nobody():
    tokens, frames, answer = TABLE.tokens.copy(), TABLE.num_frames.copy(), TABLE.answer.copy()
    tokens[10], frames[2900], answer[20] = 99_999, 999, 0
    spoiled = replace(TABLE, tokens=tokens, num_frames=frames, answer=answer)
    plan, good = make_plan(spoiled, objective="ce_answer"), make_plan(objective="ce_answer")
    for window in range(plan.num_windows):
        np.testing.assert_array_equal(plan.window_order(window), good.window_order(window))
    packed = packed_rows(all_windows(plan))
    assert sorted(set(range(3000)) - set(packed.tolist())) == [10, 20, 2900]
    assert plan.refused == Counter(over_tokens=1, no_loss_tokens=1, over_frames=1)
    plan.window(0), plan.window(0)
    assert plan.refused.total() == 3  # planned again is not refused again
    resumed = make_plan(spoiled, objective="ce_answer")
    resumed.window(2)
    assert resumed.all_refused() == plan.refused  # whichever process planned the others
    steps = list(plan.steps(1))
    assert steps[-1].samples_seen == 3000  # refused ones are behind, too
    assert sum(step.samples for step in steps) == 2997
    ends = {step.samples_seen for step in steps if step.state.pack == 0}
    assert ends == {plan.window_bounds(window)[1] for window in range(plan.num_windows)}


@pytest.mark.parametrize("name", ["visual", "coarse", "labels", "max_seqlen"])
def test_every_capacity_is_honoured(name):
    tight = replace(ROOMY, **{name: 60})
    plan = make_plan(capacities=tight)
    packs = [pack for window in all_windows(plan) for pack in window]
    assert set(plan.refused) == {f"over_{name}"}
    assert sum(pack.samples for pack in packs) + plan.refused.total() == 3000
    if name != "max_seqlen":
        assert max(getattr(pack, name) for pack in packs) <= 60


def test_proposed_capacities_rarely_bind():
    mixture = Mixture(text_share=0.14, question_first=0.5, narrated=0.5)
    proposal = Capacities.propose(TABLE, mixture, tokens=8192, objective="ce_answer")
    unbounded = replace(proposal, visual=8192, coarse=8192, labels=8192, samples=8192, max_seqlen=8192)
    plans = [Plan(TABLE, mixture, capacities, "ce_answer", 7, 6000, 3000) for capacities in (proposal, unbounded)]
    packs = [sum(len(window) for window in all_windows(plan)) for plan in plans]
    assert packs[0] <= 1.02 * packs[1]
    assert plans[0].refused == plans[1].refused
    assert proposal.coarse < 8192 / 2
    assert proposal.samples < 200


def test_proposal_bounds_the_longest_sample():
    limited = Capacities.propose(TABLE, Mixture(), tokens=8192, objective="ce_all", max_seqlen=1024)
    assert limited.max_seqlen <= 1024
    text_only = draw_table(100, {"smoltalk": STAGE_2["smoltalk"]})
    assert Capacities.propose(text_only, Mixture(), tokens=8192, objective="ce_all").frames == 4
    with pytest.raises(ValueError, match="no sample fits"):
        Capacities.propose(TABLE, Mixture(), tokens=8, frames=8, objective="ce_all")


# --- steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 3000, 4321, 700])
@pytest.mark.parametrize("mixture", [{}, {"text_share": 0.14}])
def test_total_samples_end_exactly(total, mixture):
    plan = make_plan(total=total, **mixture)
    steps = list(plan.steps(packs_per_step=4))
    assert steps[-1].samples_seen == total
    assert sum(step.samples for step in steps) + plan.refused.total() == total
    assert all(len(step.packs) == 4 for step in steps)
    assert [step.index for step in steps] == list(range(len(steps)))
    assert [step.samples_seen_before for step in steps] == [0] + [step.samples_seen for step in steps[:-1]]
    assert all(step.planned == sum(pack.labels for pack in step.packs) for step in steps)
    packs = [pack for window in all_windows(plan) for pack in window]
    flat = [pack for step in steps for pack in step.packs]
    assert as_lists(flat[: len(packs)]) == as_lists(packs)
    assert all(pack.samples == 0 for pack in flat[len(packs) :])


def test_resume_at_any_step_continues_the_sequence():
    plan = make_plan(total=4000, text_share=0.14, question_first=0.5)
    steps = list(plan.steps(3))
    for k in range(len(steps)):
        again = list(make_plan(total=4000, text_share=0.14, question_first=0.5).steps(3, steps[k].state))
        assert [(s.index, s.samples_seen, s.state, as_lists(s.packs)) for s in again] == [
            (s.index, s.samples_seen, s.state, as_lists(s.packs)) for s in steps[k + 1 :]
        ]


def test_another_packs_per_step_resumes_the_same_packs():
    plan = make_plan()
    state = list(plan.steps(4))[2].state
    flat = [pack for step in plan.steps(1) for pack in step.packs]
    assert as_lists([pack for step in plan.steps(1, state) for pack in step.packs]) == as_lists(flat[12:])


def test_foreign_state_is_refused():
    with pytest.raises(ValueError, match="does not belong to this plan"):
        next(make_plan().steps(1, PlanState(window=0, pack=999)))


def test_fingerprint_follows_whatever_the_packs_depend_on():
    tokens = TABLE.tokens.copy()
    tokens[7] += 1
    plans = [
        make_plan(),
        make_plan(replace(TABLE, tokens=tokens)),
        make_plan(seed=1),
        make_plan(total=2999),
        make_plan(window=511),
        make_plan(question_first=0.5),
        make_plan(objective="ce_answer"),
        make_plan(capacities=replace(ROOMY, labels=9000)),
    ]
    assert make_plan().fingerprint() == plans[0].fingerprint()
    assert len({plan.fingerprint() for plan in plans}) == len(plans)


# --- configuration errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"weights": {"vript": 1.0}}, "name exactly the sources present"),
        ({"weights": dict.fromkeys(STAGE_2, 1.0) | {"laion": 1.0}}, "laion"),
        ({"weights": dict.fromkeys(STAGE_2, 0.0)}, "all are 0"),
        ({"weights": dict.fromkeys(STAGE_2, -1.0)}, "at least 0"),
        ({"text_share": 14}, "text_share = 14"),
        ({"question_first": -0.1}, "question_first"),
        ({"looks": 0}, "looks"),
        ({"grid": 3}, "grid"),
        ({"grid": 4, "tokens_per_frame": 2}, "tokens_per_frame"),
    ],
)
def test_wrong_mixtures_are_named(mixture, message):
    with pytest.raises(ValueError, match=message):
        make_plan(**mixture)


def test_wrong_plans_are_named():
    with pytest.raises(ValueError, match="objective"):
        make_plan(objective="ce")
    with pytest.raises(ValueError, match="total_samples"):
        make_plan(total=0)
    with pytest.raises(ValueError, match="no source with a weight holds text-only samples"):
        make_plan(draw_table(50, {"vript": STAGE_2["vript"]}), text_share=0.14)
    with pytest.raises(ValueError, match="all 3000 samples are refused"):
        make_plan(capacities=replace(ROOMY, tokens=9, visual=9, coarse=9, labels=9, max_seqlen=9))
    with pytest.raises(ValueError, match=r"capacities.visual = 20: expected at most tokens"):
        Capacities(frames=1, tokens=10, visual=20, coarse=1, samples=1, labels=1, max_seqlen=1)
    with pytest.raises(ValueError, match="data set is empty"):
        make_plan(SampleTable.from_indexes([]))
