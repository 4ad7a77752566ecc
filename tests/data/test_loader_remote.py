"""Runs on remote shards: the same packs as from local ones, indexes alone for planning, and losses that move nobody."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from shard_server import PER_SHARD, SAMPLES, SIZE, open_cache

from fvlm.data.capacities import Capacities
from fvlm.data.chat import load_tokenizer
from fvlm.data.errors import SampleError, ShardError
from fvlm.data.loader import PackLoader
from fvlm.data.look_ahead import LookAhead
from fvlm.data.plan import START, Mixture, Plan
from fvlm.data.remote import find_all
from fvlm.data.remote_index import find_remote_indexes
from fvlm.data.shard import find_shards, load_index
from fvlm.data.shard_cache import tar_size
from fvlm.data.table_store import open_table

TINY = load_tokenizer("tiny")
CAPACITIES = Capacities(frames=8, tokens=300, visual=40, coarse=200, samples=12, labels=200, max_seqlen=200)


def make_loader(shards, cache, num_workers=0, start=START, **options):
    opened = open_table(shards, TINY, None, cache=cache)
    plan = Plan(opened.table, Mixture(), CAPACITIES, "ce_answer", 0, SAMPLES, window=16)
    options = {"packs_per_step": 2, "num_workers": num_workers, "start": start, "cache": cache} | options
    return PackLoader(plan, shards, opened.indexes, TINY, SIZE, **options)


def packs(loader):
    """(keys, digest) of every pack."""
    found = []
    for loaded in loader:
        for batch, keys in zip(loaded.batches, loaded.keys, strict=True):
            content = [value.numpy().tobytes() for value in vars(batch).values() if isinstance(value, torch.Tensor)]
            found.append((keys, hashlib.sha256(b"".join(content)).hexdigest()))
    return found


def test_planning_needs_no_tar_and_indexes_are_kept(server, tmp_path):
    cache = open_cache(tmp_path)
    shards = find_all(server.url())
    loader = make_loader(shards, cache)
    assert not any(name.endswith(".tar") for name in server.asked)
    looked_at = []
    find_remote_indexes(shards, TINY, cache, lambda: looked_at.append(None))
    assert len(looked_at) == len(shards)
    assert next(loader._plan.steps(2)).samples > 0
    asked = server.asked["shard-000000.idx"]
    make_loader(shards, cache)
    assert server.asked["shard-000000.idx"] == asked
    os.utime(server.folder / "shard-000000.idx", (1, 1))  # the server calls it another version now
    make_loader(shards, cache)
    assert server.asked["shard-000000.idx"] == asked + 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_remote_shards_give_the_packs_of_local_ones(server, tmp_path, num_workers):
    expected = packs(make_loader(find_shards(server.folder), None))
    assert len(expected) > 8
    cache = open_cache(tmp_path)
    assert packs(make_loader(find_all(server.url()), cache, num_workers)) == expected
    tars = Counter({name: count for name, count in server.asked.items() if name.endswith(".tar")})
    assert set(tars.values()) == {1}
    assert packs(make_loader(find_all(server.url()), cache, num_workers)) == expected
    assert all(server.asked[name] == 1 for name in tars)


def test_a_cache_of_two_shards_is_enough_and_says_that_it_is_small(server, tmp_path, caplog):
    expected = packs(make_loader(find_shards(server.folder), None))
    limit = 2 * max(path.stat().st_size for path in find_shards(server.folder))
    assert packs(make_loader(find_all(server.url()), open_cache(tmp_path, limit))) == expected
    assert "data.cache_gb" in caplog.text
    assert "raise it" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_cannot_be_had_costs_its_own_samples_only(server, tmp_path, num_workers):
    local, remote = find_shards(server.folder), find_all(server.url())
    index = load_index(local[2], TINY)
    expected = packs(make_loader(local, None))
    loader = make_loader(remote, open_cache(tmp_path), num_workers, max_bad_share=1.0)
    (server.folder / "shard-000002.tar").unlink()
    steps = list(loader)
    assert sum((loaded.skipped for loaded in steps), Counter()) == Counter(missing_shard=PER_SHARD)
    lost = [sample for loaded in steps for sample in loaded.lost]
    assert {sample.shard for sample in lost} == {server.url("shard-000002.tar")}
    assert sorted(sample.key for sample in lost) == sorted(index.keys.tolist())
    found = [keys for loaded in steps for keys in loaded.keys]
    gone = set(index.keys.tolist())
    assert found == [[key for key in keys if key not in gone] for keys, _ in expected]
    untouched = [pack for pack in expected if not gone & set(pack[0])]
    assert untouched
    assert [pack for pack in packs(iter(steps)) if pack in untouched] == untouched


def test_a_run_without_its_shards_stops(server, tmp_path):
    loader = make_loader(find_all(server.url()), open_cache(tmp_path))
    server.manners = {path.name: "error" for path in find_shards(server.folder)}
    with pytest.raises(SampleError, match=r"could not be read.*unreachable_shard"):
        list(loader)


def test_shards_without_an_index_are_indexed_once(server, tmp_path, caplog):
    expected = packs(make_loader(find_shards(server.folder), None))
    for path in server.folder.glob("*.idx"):
        path.rename(tmp_path / path.name)
    cache = open_cache(tmp_path)
    loader = make_loader(find_all(server.url()), cache)
    assert "has no index beside it" in caplog.text
    assert packs(loader) == expected
    assert packs(make_loader(find_all(server.url()), cache)) == expected
    assert all(server.asked[path.name] == 1 for path in find_shards(server.folder))


def test_an_index_that_is_none_is_an_error_before_the_run(server, tmp_path):
    shutil.copy(server.folder / "shard-000000.tar", server.folder / "shard-000001.idx")
    with pytest.raises(ShardError, match=r"damaged_download.*shard-000001.idx"):
        make_loader(find_all(server.url()), open_cache(tmp_path))


def test_an_index_cannot_name_files_elsewhere(server, tmp_path):
    path = server.folder / "shard-000001.idx"
    with np.load(path) as stored:
        columns = dict(stored)
    np.savez(open(path, "wb"), **(columns | {"tar_fingerprint": np.array("5-/../../../x")}))  # noqa: SIM115
    with pytest.raises(ShardError, match=r"damaged_download.*fingerprint"):
        make_loader(find_all(server.url()), open_cache(tmp_path))


def test_remote_shards_need_a_folder(server):
    with pytest.raises(ValueError, match=r"data.cache_dir"):
        make_loader(find_all(server.url()), None)


def test_looking_ahead_begins_with_the_pack_and_stays_within_the_cache(server, tmp_path):
    shards = find_all(server.url())
    sizes = [path.stat().st_size for path in find_shards(server.folder)]
    cache = open_cache(tmp_path, 4 * max(sizes))
    loader = make_loader(shards, cache)
    plan, indexes = loader._plan, loader._source[2]
    ahead, told = LookAhead(plan, shards, indexes, cache), []
    ahead._prefetcher.expect = told.append
    pack = next(plan.steps(1)).packs[0]
    ahead.expect(pack, 0)
    ahead.expect(pack, 0)
    (wanted,) = told
    first = [shard.url for shard, _ in wanted][: len(set(plan.table.shard[pack.rows].tolist()))]
    assert set(first) == {shards[number].url for number in plan.table.shard[pack.rows]}
    assert len({shard for shard, _ in wanted}) == len(wanted)
    assert sum(tar_size(fingerprint) for _, fingerprint in wanted) <= max(0.75 * cache.limit, len(first) * max(sizes))
    assert threading.active_count() < 50
