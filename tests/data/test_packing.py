"""Packing: a partition within capacities, nearly as few packs as the sums allow, against a slow and plain version."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlm.data.capacities import Capacities
from fvlm.data.mixture import Mixture
from fvlm.data.packing import _EVENNESS, MAIN, pack_samples
from fvlm.data.table import sample_costs
from tests.data.tables import draw_table


def plainly(costs: np.ndarray, capacity: np.ndarray) -> list[list[int]]:
    """The same rule, pack by pack and dimension by dimension."""
    groups, todo = [], list(range(len(costs)))
    while todo:
        total = costs[todo].sum(axis=0)
        num_packs = max(-(-int(need) // int(most)) for need, most in zip(total, capacity, strict=True))
        even = np.maximum(total / num_packs, 1)
        weight = [1.0 if dim < MAIN else _EVENNESS for dim in range(len(capacity))]
        share = {i: [costs[i, dim] / even[dim] * weight[dim] for dim in range(len(capacity))] for i in todo}
        packs = [{"room": list(capacity), "missing": list(weight), "members": []} for _ in range(num_packs)]
        left_over = []
        for i in sorted(todo, key=lambda i: (-max(costs[i, dim] / even[dim] for dim in range(MAIN)), i)):
            best, best_alignment = None, -np.inf
            for pack in packs:
                if any(cost > room for cost, room in zip(costs[i], pack["room"], strict=True)):
                    continue
                length = max(float(np.sqrt(sum(m * m for m in pack["missing"]))), 1e-9)
                alignment = sum(m * s for m, s in zip(pack["missing"], share[i], strict=True)) / length
                if alignment > best_alignment:
                    best, best_alignment = pack, alignment
            if best is None:
                left_over.append(i)
                continue
            best["members"].append(i)
            best["room"] = [room - cost for room, cost in zip(best["room"], costs[i], strict=True)]
            best["missing"] = [m - s for m, s in zip(best["missing"], share[i], strict=True)]
        groups += [sorted(pack["members"]) for pack in packs if pack["members"]]
        todo = sorted(left_over)
    return groups


@given(st.integers(1, 120), st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 5, 30]))
@settings(max_examples=100, deadline=None)
def test_packs_are_those_of_the_plain_version(n, seed, scale):
    random = np.random.default_rng(seed)
    capacity = random.integers(20, 100, 6)
    costs = random.integers(0, np.maximum(capacity // scale, 1) + 1, (n, 6))
    assert [group.tolist() for group in pack_samples(costs, capacity)] == plainly(costs, capacity)


@pytest.mark.parametrize("n", [500, 2000])
def test_nearly_as_few_packs_as_the_sums_allow(n):
    table, mixture = draw_table(n), Mixture(question_first=0.5)
    room = Capacities.propose(table, mixture, tokens=16384, objective="ce_answer").as_array()
    costs = sample_costs(table, np.arange(n), np.zeros(n, np.uint8), mixture, "ce_answer")
    groups = pack_samples(costs, room)
    assert sorted(np.concatenate(groups).tolist()) == list(range(n))
    assert all((costs[group].sum(axis=0) <= room).all() for group in groups)
    assert len(groups) <= max(-(-costs.sum(axis=0) // room)) + 1


def test_nothing_to_pack():
    assert pack_samples(np.zeros((0, 6), np.int64), np.ones(6, np.int64)) == []
