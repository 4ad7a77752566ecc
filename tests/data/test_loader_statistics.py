"""What a run says of its data: fill, samples a pack, shares by source beside the mixture, time in the workers."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from tables import STAGE_2, draw_table

from fvlm.data.capacities import Capacities
from fvlm.data.plan import Mixture, Plan
from fvlm.data.statistics import DataStatistics
from fvlm.data.table import DIMENSIONS, sample_costs
from fvlm.train.metrics import MetricsWriter

WEIGHTS = {name: 1.0 + number for number, name in enumerate(sorted(STAGE_2))}
MIXTURES = {
    "natural": Mixture(),
    "weights": Mixture(weights=WEIGHTS, looks=4),
    "text": Mixture(text_share=0.3, question_first=0.5),
    "no text": Mixture(text_share=0.0),
}


def make_plan(mixture, total=12_000):
    table = draw_table(20_000)
    capacities = Capacities.propose(table, mixture, tokens=8192, objective="ce_all")
    return Plan(table, mixture, capacities, "ce_all", 0, total, window=2000)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_mixture_is_what_is_drawn(name):
    plan = make_plan(MIXTURES[name])
    drawn = np.concatenate([plan.window_order(window)[0] for window in range(plan.num_windows)])
    counts = np.bincount(plan.table.source[drawn], minlength=len(STAGE_2)) / len(drawn)
    shares = plan.mixture_shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares) == list(plan.table.source_names)
    assert np.abs(counts - list(shares.values())).max() < 0.002


def test_fill_and_shares_are_those_of_the_packs():
    plan = make_plan(MIXTURES["weights"])
    statistics = DataStatistics(plan, {})
    steps = list(plan.steps(4))
    for step in steps[:10]:
        statistics.count(step)
    first = statistics.record()
    packs = [pack for step in steps[:10] for pack in step.packs]
    costs = sum(
        sample_costs(plan.table, pack.rows, pack.layouts, plan.mixture, plan.objective).sum(axis=0) for pack in packs
    )
    for name, cost, capacity in zip(DIMENSIONS, costs, plan.capacities.as_array(), strict=True):
        assert first[f"fill_{name}"] == pytest.approx(cost / (len(packs) * capacity))
    assert first["samples_per_pack"] == costs[DIMENSIONS.index("samples")] / len(packs)
    rows = np.concatenate([pack.rows for pack in packs])
    for number, name in enumerate(plan.table.source_names):
        assert first[f"share/{name}"] == np.mean(plan.table.source[rows] == number)
    for step in steps[10:]:
        statistics.count(step)
    last = statistics.record()
    assert all(abs(last[f"share/{name}"] - last[f"mixture/{name}"]) < 0.01 for name in plan.table.source_names)
    assert last["samples_per_pack"] != first["samples_per_pack"]


def test_counting_goes_on_where_an_earlier_start_stopped():
    plan = make_plan(MIXTURES["natural"])
    whole, one = DataStatistics(plan, {}), DataStatistics(plan, {})
    steps = list(plan.steps(4))
    for number, step in enumerate(steps):
        if number == 17:
            one = DataStatistics(plan, json.loads(json.dumps(one.samples_by_source)))
        whole.count(step)
        one.count(step)
    assert one.samples_by_source == whole.samples_by_source
    refused = sum(plan.refused.values())
    assert sum(whole.samples_by_source.values()) + refused == plan.total_samples


def record(step, **more):
    known = {"step": step, "samples_seen": 8 * step, "train_loss": 1.0, "data_wait_sec": 0.25, "read_sec": 1.0}
    known |= {"decode_sec": 0.5, "fill_frames": 0.97, "fill_tokens": 0.99, "samples_per_pack": 40.5}
    return known | {"skipped_samples": sum(more.values()), "share/a": 0.3, "mixture/a": 0.25} | more


def rows(folder):
    with open(folder / "data.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_step_has_a_row_in_data_csv(tmp_path):
    writer = MetricsWriter(tmp_path, "run-1", 0, 0)
    writer.step(record(1))
    writer.step(record(2, **{"skipped/bad_jpeg": 2, "skipped/changed_bytes": 1}))
    writer.close()
    first, second = rows(tmp_path)
    assert (first["step"], first["fill_frames"], first["share/a"], first["skipped"]) == ("1", "0.97", "0.3", "")
    assert (second["skipped_samples"], second["skipped"]) == ("3", "bad_jpeg=2 changed_bytes=1")
    assert "train_loss" not in first
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["skipped/bad_jpeg"] == 2


def test_a_resumed_data_csv_has_no_row_twice_and_no_torn_one(tmp_path):
    for start, stop in ((1, 8), (5, 11)):
        writer = MetricsWriter(tmp_path, "run-1", start - 1, 0)
        for step in range(start, stop):
            writer.step(record(step))
        writer.close()
        with open(tmp_path / "data.csv", "a") as file:
            file.write("9,72,0.2")  # the process died here
    MetricsWriter(tmp_path, "run-1", 10, 0).close()
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(1, 11))
    MetricsWriter(tmp_path, "run-2", 0, 0).close()
    assert rows(tmp_path) == []
