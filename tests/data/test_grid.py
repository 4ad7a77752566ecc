"""The contract of the data: one global sequence of packs, whatever reads it, from wherever, whatever is damaged.

Ranks x workers x where a run is resumed x two budgets, every pack by its keys and its bytes. A subset that has every
pair of values runs always, the whole product as `slow`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from itertools import combinations, islice, product
from pathlib import Path

import numpy as np
import pytest
import torch
from tables import STAGE_2, draw_table

from fvlm.data.capacities import Capacities
from fvlm.data.chat import load_tokenizer
from fvlm.data.loader import PackLoader
from fvlm.data.order import SampleOrder
from fvlm.data.plan import START, Mixture, Plan, PlanState, SampleTable
from fvlm.data.shard import ShardWriter, find_shards, load_index
from fvlm.data.video import encode_jpeg

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores: that is asked
SIZE, SAMPLES, PER_SHARD = 16, 3600, 100
TINY = load_tokenizer("tiny")
RANKS, WORKERS, RESUMED_AFTER, BUDGETS = (1, 2, 4), (0, 1, 4), (0, 1, 7, 500), ("narrow", "wide")
PRODUCT = list(product(RANKS, WORKERS, RESUMED_AFTER, BUDGETS))
PACKS_PER_STEP = 4
COMPARED = 16
"""Packs that a case reads from where it resumes."""
CAPACITIES = {
    "narrow": Capacities(frames=8, tokens=200, visual=32, coarse=120, samples=8, labels=100, max_seqlen=150),
    "wide": Capacities(frames=14, tokens=210, visual=64, coarse=150, samples=16, labels=140, max_seqlen=150),
}
MIXTURE = Mixture(question_first=0.5, narrated=0.5, looks=2)


def covering_subset(cases):
    """Cases in which every pair of values of two dimensions occurs, found greedily."""
    missing = {(i, j, case[i], case[j]) for case in cases for i, j in combinations(range(len(case)), 2)}
    chosen = []
    while missing:
        best = max(cases, key=lambda case: sum((i, j, case[i], case[j]) in missing for i, j in pairs(case)))
        missing -= {(i, j, best[i], best[j]) for i, j in pairs(best)}
        chosen.append(best)
    return chosen


def pairs(case):
    return combinations(range(len(case)), 2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("grid"), np.random.default_rng(0)
    with ShardWriter(folder, TINY, PER_SHARD) as writer:
        for number in range(SAMPLES):
            kind = ("video", "image", "images", "text")[number % 4]
            count = {"video": 1 + number % 3, "image": 1, "images": 2, "text": 0}[kind]
            meta = {"key": f"s{number:04d}", "source": f"src{number % 3}", "kind": kind, "frame_count": count}
            meta |= {"user": "Which?", "assistant": f"ring {number}" + " red" * (number % 5)}
            meta |= {"narration": [" up"] * count} if kind == "video" else {}
            noise = random.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
            writer.write(meta, [encode_jpeg(frame) for frame in noise])
    return find_shards(folder)


@pytest.fixture(scope="module")
def indexes(shards):
    return [load_index(shard, TINY) for shard in shards]


@pytest.fixture(scope="module")
def plans(indexes):
    table = SampleTable.from_indexes(indexes)
    return {name: Plan(table, MIXTURE, room, "ce_answer", 7, SAMPLES, window=300) for name, room in CAPACITIES.items()}


@pytest.fixture(scope="module")
def whole(plans, shards, indexes):
    """Every pack of a run in one process, by budget: (keys, digest)."""
    return {
        name: [pack for step in read(plan, shards, indexes, packs_per_step=1) for pack in step]
        for name, plan in plans.items()
    }


def read(plan, shards, indexes, **options):
    """(keys, digest) of the packs of each step, of one rank."""
    loader = PackLoader(plan, shards, indexes, TINY, SIZE, max_bad_share=1.0, **options)
    for loaded in loader:
        yield [(tuple(keys), digest(batch)) for keys, batch in zip(loaded.keys, loaded.batches, strict=True)]


def digest(batch):
    content = [value.numpy().tobytes() for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    return hashlib.sha256(b"".join(content)).hexdigest()


def state_after(plan, num_packs) -> PlanState:
    if not num_packs:
        return START
    return next(islice(plan.steps(1), num_packs - 1, None)).state


def check(plan, shards, indexes, whole, num_ranks, num_workers, resumed_after):
    options = {"packs_per_step": PACKS_PER_STEP, "world_size": num_ranks, "num_workers": num_workers}
    options["start"] = state_after(plan, resumed_after)
    num_steps = COMPARED // PACKS_PER_STEP
    ranks = [list(islice(read(plan, shards, indexes, rank=r, **options), num_steps)) for r in range(num_ranks)]
    found = [pack for steps in zip(*ranks, strict=True) for turn in zip(*steps, strict=True) for pack in turn]
    assert found == whole[resumed_after : resumed_after + COMPARED]


@pytest.mark.parametrize(("num_ranks", "num_workers", "resumed_after", "budget"), covering_subset(PRODUCT))
def test_the_sequence_of_packs_is_one(plans, shards, indexes, whole, num_ranks, num_workers, resumed_after, budget):
    check(plans[budget], shards, indexes, whole[budget], num_ranks, num_workers, resumed_after)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "num_workers", "resumed_after", "budget"), PRODUCT)
def test_the_whole_product(plans, shards, indexes, whole, num_ranks, num_workers, resumed_after, budget):
    check(plans[budget], shards, indexes, whole[budget], num_ranks, num_workers, resumed_after)


def test_the_subset_covers_every_pair():
    subset = covering_subset(PRODUCT)
    seen = {(i, j, case[i], case[j]) for case in subset for i, j in pairs(case)}
    assert seen == {(i, j, case[i], case[j]) for case in PRODUCT for i, j in pairs(case)}
    assert len(subset) < len(PRODUCT) / 4


def test_a_run_read_to_its_end_by_ranks_and_workers_is_the_same(plans, shards, indexes, whole):
    options = {"packs_per_step": 4, "world_size": 2, "num_workers": 1}
    ranks = [list(read(plans["narrow"], shards, indexes, rank=rank, **options)) for rank in range(2)]
    found = [pack for steps in zip(*ranks, strict=True) for turn in zip(*steps, strict=True) for pack in turn]
    assert found[: len(whole["narrow"])] == whole["narrow"]
    assert {keys for keys, _ in found[len(whole["narrow"]) :]} <= {()}  # the last step is filled up with empty packs


@pytest.mark.parametrize("budget", BUDGETS)
def test_with_natural_weights_every_sample_comes_once_an_epoch(whole, budget):
    assert len(whole[budget]) > 500 + COMPARED
    assert len({digest for _, digest in whole[budget]}) == len(whole[budget])
    assert Counter(key for keys, _ in whole[budget] for key in keys) == {f"s{i:04d}": 1 for i in range(SAMPLES)}


def test_budgets_share_the_windows_but_not_the_packs(plans):
    narrow, wide = plans["narrow"], plans["wide"]
    assert narrow.num_windows == wide.num_windows > 1
    for window in range(narrow.num_windows):
        assert all(
            np.array_equal(*orders)
            for orders in zip(narrow.window_order(window), wide.window_order(window), strict=True)
        )
    assert len(narrow.window(0)) != len(wide.window(0))


def test_shares_hold_in_every_thousand_samples():
    table = draw_table(30_000)
    weights = dict(zip(sorted(STAGE_2), (40, 3, 10, 2, 9, 11, 2, 1, 8), strict=True))
    for mixture in (Mixture(weights=weights, text_share=0.14), Mixture(weights=weights), Mixture()):
        order = SampleOrder(table, mixture, seed=3)
        rows, _ = order.take(0, 30_000)
        for number, share in enumerate(order.shares().values()):
            before = np.concatenate([[0], np.cumsum(table.source[rows] == number)])
            assert np.abs((before[1000:] - before[:-1000]) / 1000 - share).max() <= 0.01


def copied(shards, folder):
    return [Path(shutil.copy(path, folder / path.name)) for path in shards]


def damage(copies, indexes) -> dict[str, set[str]]:
    """Spoil four shards, each in its own way: key -> reasons that may be given for its loss."""
    flipped, cut, shorter, gone = 3, 5, 8, 11
    lost = {}

    content, index = bytearray(copies[flipped].read_bytes()), indexes[flipped]
    content[int(index.frame_offset[index.first_frame[6]]) + 40] ^= 1
    copies[flipped].write_bytes(content)
    lost[str(index.keys[6])] = {"changed_bytes"}

    content, index = copies[cut].read_bytes(), indexes[cut]
    half = int(index.json_offset[50]) + 1
    copies[cut].write_bytes(content[:half])
    lost |= {key: {"truncated_shard"} for key in index.keys[50:].tolist()}

    content, index = copies[shorter].read_bytes(), indexes[shorter]
    header = int(index.frame_offset[index.first_frame[20]]) - 512  # of sample 20's first frame: a member goes
    following = header + 512 + -(-int(index.frame_size[index.first_frame[20]]) // 512) * 512
    copies[shorter].write_bytes(content[:header] + content[following:])
    lost |= {key: {"changed_bytes", "truncated_shard"} for key in index.keys[20:].tolist()}

    copies[gone].unlink()
    return lost | {key: {"unreadable_shard"} for key in indexes[gone].keys.tolist()}


def check_damage(steps, before, lost, copies, caplog):
    """`before` are the packs without damage; what is lost is said and counted, the rest is the same to the byte."""
    found = [
        (tuple(keys), digest(batch))
        for loaded in steps
        for keys, batch in zip(loaded.keys, loaded.batches, strict=True)
    ]
    assert len(found) == len(before)
    for (keys, whole), (left, after) in zip(before, found, strict=True):
        assert left == tuple(key for key in keys if key not in lost)
        assert (whole == after) == (not lost.keys() & set(keys))
    told = {sample.key: sample for loaded in steps for sample in loaded.lost}
    assert told.keys() == lost.keys()
    assert all(sample.reason in lost[key] for key, sample in told.items())
    assert sum((loaded.skipped for loaded in steps), Counter()).total() == len(lost)
    shards = {path.name: path for path in copies}
    assert all(sample.shard == str(shards[Path(sample.shard).name]) for sample in told.values())
    for sample in told.values():
        assert f"skipped {sample.shard}, {sample.key}: {sample.reason}" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_moves_no_other_sample(plans, shards, indexes, whole, tmp_path, num_workers, caplog):
    """A flipped bit, a tar cut in the middle, one that lacks a member (and so is younger than its index), one gone."""
    copies = copied(shards, tmp_path)
    lost = damage(copies, indexes)
    assert len(lost) == 1 + 50 + 80 + PER_SHARD
    options = {"packs_per_step": 1, "num_workers": num_workers, "max_bad_share": 1.0}
    steps = list(PackLoader(plans["wide"], copies, indexes, TINY, SIZE, **options))
    check_damage(steps, whole["wide"], lost, copies, caplog)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_deleted_during_the_run_costs_its_own_samples_only(
    plans, shards, indexes, whole, tmp_path, num_workers, caplog
):
    plan, copies = plans["wide"], copied(shards, tmp_path)
    first_use = {}
    for number, step in enumerate(plan.steps(1)):
        for shard in plan.table.shard[step.packs[0].rows].tolist():
            first_use.setdefault(shard, number)
    last, begins = max(first_use.items(), key=lambda item: item[1])
    assert begins > 20  # by far not read yet, nor ahead, when it goes
    options = {"packs_per_step": 1, "num_workers": num_workers, "max_bad_share": 1.0}
    loader = iter(PackLoader(plan, copies, indexes, TINY, SIZE, **options))
    steps = list(islice(loader, 10))
    copies[last].unlink()
    steps.extend(loader)
    lost = {key: {"unreadable_shard"} for key in indexes[last].keys.tolist()}
    check_damage(steps, whole["wide"], lost, copies, caplog)
