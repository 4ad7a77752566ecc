"""The scaling model: bytes against real ranks, times against arithmetic by hand, the document against the script."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from benchmarks import scaling, scaling_model, scaling_tables
from benchmarks.scaling_model import Cluster, Link, Run, exposed_seconds, ring_seconds, seconds_of, simulate
from benchmarks.scaling_ranks import fit_link
from fvlm.schema import ConfigError
from fvlm.train.gpus import GPUS
from fvlm.train.memory import Parameters
from fvlm.train.planner import geometry_of, parameters_of
from fvlm.train.traffic import gathers_of, sent, step_messages, use_order
from fvlm.train.zero_config import read_zero_json

LINK = Link(rate=1e9, hop=1e-3, call=5e-3)
H100 = GPUS["h100"]


def ring_by_hand(collective: str, size: float, ranks: int, link: Link) -> float:
    """Each rank passes one chunk a round; all-reduce goes around twice."""
    seconds = link.call
    for _ in range(2 if collective == "all_reduce" else 1):
        for _ in range(ranks - 1):
            seconds += link.hop + (size / ranks) / link.rate
    return seconds


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter", "all_gather"])
def test_a_ring_by_hand(collective, ranks):
    assert ring_seconds(collective, 1e8, ranks, LINK) == pytest.approx(ring_by_hand(collective, 1e8, ranks, LINK))
    assert ring_seconds(collective, 1e8, 1, LINK) == 0


def test_an_all_reduce_takes_the_better_algorithm():
    many = Cluster(gpus=64, inside=LINK)
    small, large = 1e3, 1e10
    assert seconds_of("all_reduce", small, many) < ring_seconds("all_reduce", small, 64, LINK)  # 12 hops, not 126
    assert seconds_of("all_reduce", large, many) == ring_seconds("all_reduce", large, 64, LINK)


def test_a_node_s_network_carries_the_whole_tensor_once_a_pass():
    slow = Link(rate=1e6, hop=0.0, call=0.0)
    cluster = Cluster(gpus=8, inside=Link(rate=1e15, hop=0.0, call=0.0), nodes=4, between=slow)
    for collective, passes in (("all_reduce", 2), ("reduce_scatter", 1), ("all_gather", 1)):
        assert seconds_of(collective, 1e6, cluster) == pytest.approx(passes * 3 / 4, rel=1e-6)


def test_buckets_wait_for_their_link():
    timeline = [(1.0, 0), (1.0, 10), (1.0, 10), (1.0, 10)]  # gradients after seconds 2, 3 and 4
    cost = {10: 0.25, 20: 0.5, 30: 3.0}.__getitem__
    assert exposed_seconds(timeline, 10, cost, overlap=True) == pytest.approx(0.5)  # two go at the end
    assert exposed_seconds(timeline, 10, cost, overlap=False) == pytest.approx(0.75)
    assert exposed_seconds(timeline, 20, cost, overlap=True) == pytest.approx(0.75)  # 20 at second 4, then 10
    assert exposed_seconds(timeline, 30, cost, overlap=True) == pytest.approx(3.0)
    busy = {10: 1.5}.__getitem__  # leaves at 3 (until 4.5), at 4 (until 6), at the end (until 7.5)
    assert exposed_seconds(timeline, 10, busy, overlap=True) == pytest.approx(3.5)


def test_a_gradient_larger_than_the_bucket_travels_alone():
    sizes = []

    def cost(elements: int) -> float:
        sizes.append(elements)
        return 0.0

    exposed_seconds([(1.0, 4), (1.0, 100), (1.0, 4)], 10, cost, overlap=True)
    assert sizes == [4, 100, 4]


@pytest.mark.parametrize("model", ["135m", "360m", "1b7"])
def test_the_order_of_use_has_nearly_all_weights_and_the_timeline_all_of_them(model):
    order = use_order(geometry_of(model))
    listed = sum(dict(order).values())
    assert 0.985 * parameters_of(model).trained < listed < parameters_of(model).trained
    flops = scaling_model.flops_per_sample(geometry_of(model), scaling_model.SAMPLES["stage2"])
    timeline = scaling_model.backward_timeline(flops, order, 2.0)
    assert sum(seconds for seconds, _ in timeline) == pytest.approx(2.0)
    assert sum(elements for _, elements in timeline) == listed


def test_gathers_by_hand():
    order = [("a", 10), ("b", 20), ("a", 10), ("b", 20)]
    assert gathers_of(order, 1000) == 1
    assert gathers_of(order, 0) == 2
    assert gathers_of(order, 20) == pytest.approx((10 + 20 + 10) / 30)  # a's next use is behind b's 20 elements
    assert gathers_of(order, 10) == 2  # and b's behind a's 10
    assert gathers_of(order, 21) == 1


def test_bytes_of_a_step_by_hand():
    parameters = Parameters(all=1000, trained=1000, largest=10)

    def of(zero: str, packs: int) -> float:
        return sent(step_messages(parameters, read_zero_json(zero)[0], "bf16", packs, gathers=3.0), 4)

    assert of("zero1", 1) == of("zero1", 7) == 0.75 * (2 * 2000 + 2000)
    assert of("zero0", 7) == of("zero1", 7)  # in bf16 it is ZeRO-1
    assert of("zero2", 7) == of("zero2_offload", 7) == 0.75 * (7 * 2 * 2000 + 2000)
    assert of("zero3", 7) == 0.75 * 7 * (3 * 2000 + 2000)


@pytest.mark.parametrize("zero", scaling_tables.STAGES)
def test_efficiency_falls_with_nodes_and_rises_with_the_network(zero):
    run = Run(model="360m", zero=zero, gpu=H100)
    by_nodes = [simulate(run, scaling_tables.across(run, n, 100), 1).efficiency for n in (2, 4, 8, 16)]
    assert by_nodes == sorted(by_nodes, reverse=True)
    by_rate = [simulate(run, scaling_tables.across(run, 4, g), 1).efficiency for g in (25, 50, 100, 200, 400)]
    assert by_rate == sorted(by_rate)
    assert 0 < by_nodes[-1] < by_nodes[0] < 1


def test_more_packs_help_zero_1_and_not_zero_2():
    one, two = (Run(model="1b7", zero=zero, gpu=H100) for zero in ("zero1", "zero2"))
    place = scaling_tables.across(one, 16, 100)
    assert simulate(one, place, 16).efficiency > 2 * simulate(one, place, 1).efficiency
    assert simulate(two, place, 16).efficiency < 1.25 * simulate(two, place, 1).efficiency
    needed = scaling_model.packs_for(one, place, 0.9)
    assert simulate(one, place, needed).efficiency >= 0.9 > simulate(one, place, needed - 1).efficiency
    assert scaling_model.packs_for(two, place, 0.9) is None


def test_a_measured_pack_takes_the_place_of_the_prediction():
    predicted, measured = (
        Run(model="135m", zero="zero1", gpu=H100),
        Run(model="135m", zero="zero1", gpu=H100, pack_seconds=3.0),
    )
    place = scaling_tables.inside(predicted, 4, "PCIe")
    assert simulate(measured, place, 2).compute == 6.0
    assert simulate(measured, place, 2).communication == simulate(predicted, place, 2).communication


def test_stragglers_by_hand():
    work = np.array([1.0, 3.0, 2.0, 2.0, 9.0])  # two steps of two ranks; the last pack fills no step
    assert scaling_tables.waiting(work, 2, 1) == pytest.approx((3 / 2 + 1) / 2 - 1)
    assert scaling_tables.waiting(work, 2, 2) == pytest.approx(5 / 4 - 1)  # packs 0 and 2, 1 and 3


def test_a_link_is_found_again_from_its_times():
    link = Link(rate=2e9, hop=0.0, call=3e-4)
    seconds = {size: ring_seconds("all_reduce", size, 4, link) for size in (1 << 12, 1 << 20, 1 << 26)}
    found = fit_link("all_reduce", seconds, 4)
    assert found.rate == pytest.approx(2e9)
    assert found.call == pytest.approx(3e-4)


def test_the_document_has_what_the_script_prints(repo_root):
    document = (repo_root / "docs" / "scaling.md").read_text(encoding="utf-8")
    tables = scaling_tables.all_tables(
        scaling.base_run(scaling.parse([])), scaling.read_loader(scaling.newest_loader())
    )
    assert scaling.fill(document, tables) == document
    assert set(re.findall(r"<!-- scaling: (\w+) -->", document)) == set(tables)
    assert (repo_root / "docs" / "scaling" / "efficiency.png").stat().st_size < 200_000


def test_every_table_says_that_it_is_predicted_until_a_pack_is_measured(monkeypatch):
    monkeypatch.setattr(scaling_tables, "packs_of_a_plan", lambda **_: (None, None, None, []))
    monkeypatch.setattr(scaling_tables, "pack_work", lambda *_: {"done": np.ones(600), "necessary": np.ones(600)})
    monkeypatch.setattr(scaling_tables, "packs_for", lambda *_: 1)
    found = scaling.read_loader(scaling.newest_loader())
    given = ("messages", "stragglers")  # of which no GPU's time is part
    for arguments, said in (([], "predicted, not measured"), (["--model", "135m", "--step-time", "0.1"], "measured")):
        tables = scaling_tables.all_tables(scaling.base_run(scaling.parse(arguments)), found)
        for name, table in tables.items():
            assert said in table.splitlines()[0] or name in given
            assert ("predicted, not measured" in table) == (not arguments) or name in given


def test_a_throughput_result_gives_the_time_of_a_pack(tmp_path):
    path = tmp_path / "throughput-x.json"
    path.write_text(json.dumps({"figures": {"naive/samples_per_s": 1.0, "product/samples_per_s": 50.0}}))
    run = scaling.base_run(scaling.parse(["--model", "135m", "--measured", str(path)]))
    assert run.pack_seconds == pytest.approx(0.97 * 16384 / 215 / 50)


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ("{", "expected a benchmark's JSON"),
        ('{"figures": {"speedup": 2}}', "expected one of the figures"),
        ('{"figures": {"samples_per_s": 0}}', "above 0"),
        ('{"figures": {"samples_per_s": NaN}}', "above 0"),
    ],
)
def test_a_result_without_samples_a_second_is_an_error(tmp_path, capsys, contents, said):
    path = tmp_path / "x.json"
    path.write_text(contents)
    assert scaling.main(["--model", "135m", "--measured", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(path) in error


def test_a_measured_time_without_its_model_is_an_error(capsys):
    assert scaling.main(["--step-time", "0.1"]) == 2
    assert "--model" in capsys.readouterr().err
    assert scaling.main(["--model", "135m", "--step-time", "-1"]) == 2
    assert "above 0" in capsys.readouterr().err


def test_a_document_without_markers_is_an_error():
    with pytest.raises(ConfigError, match="machine"):
        scaling.fill("<!-- scaling: nodes -->\n<!-- end: nodes -->", {"nodes": "x", "machine": "y"})


@pytest.mark.slow
def test_two_real_ranks_send_the_bytes_of_the_formula():
    from benchmarks import scaling_validate

    rows = scaling_validate.compare_bytes()
    assert all(row["equal"] for row in rows), [row for row in rows if not row["equal"]]
    assert {row["ZeRO"] for row in rows} == set(scaling_tables.STAGES)
    assert all(math.isfinite(row["counted"]) and row["counted"] > 0 for row in rows)
