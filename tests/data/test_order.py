"""The order of samples: even shares, honest epochs, any stretch without the rest, the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlm.data.chat import Layout
from fvlm.data.order import SampleOrder
from fvlm.data.plan import Mixture, SampleTable
from fvlm.data.shard import KINDS
from tests.data.tables import COUNT_NAMES, STAGE_2, draw_table

TABLE = draw_table(3000)


@pytest.mark.parametrize("mixture", [{}, {"text_share": 0.14}, {"weights": dict.fromkeys(STAGE_2, 1.0)}])
def test_no_sample_repeats_before_its_source_is_used_up(mixture):
    order = SampleOrder(TABLE, Mixture(**mixture), seed=1)
    rows, _ = order.take(0, 20_000)
    for source in range(len(TABLE.source_names)):
        mine = rows[TABLE.source[rows] == source]
        size = int((TABLE.source == source).sum())
        for start in range(0, len(mine), size):
            assert len(np.unique(mine[start : start + size])) == len(mine[start : start + size])


def test_source_shares_within_a_point_in_every_thousand():
    weights = {name: STAGE_2[name][0] for name in STAGE_2}
    order = SampleOrder(TABLE, Mixture(weights=weights), seed=3)
    rows, _ = order.take(0, 20_000)
    for number, name in enumerate(TABLE.source_names):
        counts = np.convolve(TABLE.source[rows] == number, np.ones(1000), "valid")
        assert np.abs(counts / 1000 - weights[name]).max() < 0.01


@given(st.integers(0, 9000), st.integers(1, 3000), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_any_stretch_of_the_order_is_found_without_the_rest(start, length, seed):
    mixture = Mixture(text_share=0.2, question_first=0.5, narrated=0.3)
    whole = SampleOrder(TABLE, mixture, seed).take(0, 12_000)
    part = SampleOrder(TABLE, mixture, seed).take(start, start + length)
    for all_values, values in zip(whole, part, strict=True):
        np.testing.assert_array_equal(all_values[start : start + length], values)


def test_sources_do_not_shift_each_other():
    """Another source beside it, or other weights, and a source's own order stays."""
    alone = {name: STAGE_2[name] for name in ("vript", "webvid")}
    table = draw_table(1000, alone)
    both, _ = SampleOrder(table, Mixture(), 0).take(0, 1000)
    weighted, _ = SampleOrder(table, Mixture(weights={"vript": 1, "webvid": 9}), 0).take(0, 1000)
    vript = [rows[table.source[rows] == 0] for rows in (both, weighted)]
    np.testing.assert_array_equal(vript[0][: len(vript[1])], vript[1])


def test_shards_are_visited_in_blocks():
    """A stretch of a source's order stays within two blocks of shards, while neighbours come from many shards."""
    table = draw_table(20_000, {"vript": STAGE_2["vript"]}, shard_size=100)
    rows, _ = SampleOrder(table, Mixture(), 0).take(0, 20_000)
    shards = table.shard[rows]
    for start in range(0, 20_000, 1600):
        assert len(np.unique(shards[start : start + 1600])) <= 16
    assert len(np.unique(shards[:50])) > 10


def test_order_is_the_promised_one():
    """Runs resume by position: a change of the order, by us or by a library, must be noticed."""
    n = np.arange(300, dtype=np.int32)
    kind = np.where(n < 100, KINDS.index("text"), KINDS.index("video")).astype(np.uint8)
    counts = dict.fromkeys(COUNT_NAMES, n)
    source = (n // 150).astype(np.int16)
    table = SampleTable(
        source_names=("a", "b"), shard=n // 10, row=n % 10, source=source, kind=kind, num_frames=n, **counts
    )
    order = SampleOrder(table, Mixture(text_share=0.14, question_first=0.5, narrated=0.3), seed=42)
    rows, layouts = order.take(5000, 5012)
    assert rows.tolist() == GOLDEN_ROWS
    assert layouts.tolist() == GOLDEN_LAYOUTS


GOLDEN_ROWS = [182, 165, 244, 123, 14, 225, 171, 196, 109, 152, 158, 10]
GOLDEN_LAYOUTS = [2, 0, 0, 0, 0, 2, 1, 0, 2, 0, 2, 0]


def test_layout_shares():
    order = SampleOrder(TABLE, Mixture(question_first=0.5, narrated=0.25), seed=0)
    rows, layouts = order.take(0, 30_000)
    is_text = TABLE.kind[rows] == KINDS.index("text")
    can_narrate = TABLE.narrated_tokens[rows] > 0
    assert (layouts[is_text] == Layout.VIDEO_FIRST).all()
    assert (layouts[~can_narrate] != Layout.NARRATED).all()
    assert abs((layouts[can_narrate] == Layout.NARRATED).mean() - 0.25) < 0.02
    assert abs((layouts[~is_text & ~can_narrate] == Layout.QUESTION_FIRST).mean() - 0.5) < 0.02
    first, second = layouts[:3000][np.argsort(rows[:3000])], layouts[3000:6000][np.argsort(rows[3000:6000])]
    assert (first != second).any()  # drawn anew each epoch
