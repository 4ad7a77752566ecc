"""Shards elsewhere: found, fetched whole or not at all, kept within bounds, and the same packs as from here."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import resource
import sys
import time
from collections import Counter

import fsspec
import numpy as np
import pytest
from shard_server import QUICK, open_cache

from fvlm.data.errors import ShardError
from fvlm.data.remote import Patience, RemoteShard, download, find_all
from fvlm.data.shard import find_shards
from fvlm.data.shard_cache import Prefetcher, ShardCache, tar_size
from fvlm.data.shard_index import fingerprint


def one_shard(server, name="shard-000000.tar"):
    path = server.folder / name
    return RemoteShard(server.url(name)), fingerprint(path), path.read_bytes()


def leftovers(cache):
    """Files in the cache that are neither a copy nor the folder's lock."""
    return sorted(path.name for path in cache.folder.glob("shards/*") if path.suffix != ".tar" and path.name != "lock")


# -- finding ------------------------------------------------------------------------------------------------------


def test_folders_patterns_tars_and_lists_lead_to_the_same_shards(folder, server, tmp_path):
    names = [path.name for path in find_shards(folder)]
    expected = [RemoteShard(server.url(name)) for name in names]
    assert find_all(server.url()) == expected
    assert find_all(server.url("shard-*.tar")) == expected
    assert find_all([server.url(name) for name in reversed(names)]) == expected
    (folder / "near.txt").write_text("# the first three\n" + "\n".join(names[:3]) + "\n\n")
    sha256 = hashlib.sha256((folder / names[4]).read_bytes()).hexdigest()
    lines = [{"shard": server.url(names[3])}, {"shard": names[4], "sha256": sha256}, {"shard": names[5]}]
    (folder / "far.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = find_all([server.url("near.txt"), server.url("far.jsonl")])
    assert [shard.url for shard in found] == [shard.url for shard in expected]
    assert [shard.sha256 for shard in found] == [None] * 4 + [sha256, None]
    assert find_all(str(folder / "near.txt")) == find_shards(folder)[:3]
    assert find_all([str(folder), server.url(names[0])]) == [*find_shards(folder), expected[0]]


def test_any_protocol_of_fsspec(folder):
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.put(str(path), f"/made-up/{path.name}")
    try:
        for entry in ("memory://made-up", "memory://made-up/", "memory://made-up/*.tar"):
            names = [path.name for path in find_shards(folder)]
            assert [shard.url.rpartition("/")[2] for shard in find_all(entry)] == names
    finally:
        memory.rm("/made-up", recursive=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the list is empty"),
        ("a.tar\nb.zip\n", r"list.txt, line 2: 'b.zip': expected the path or URL of a .tar"),
        ("/etc/a.tar\n", "names no files of this machine"),
        ("file:///etc/a.tar\n", "names no files of this machine"),
    ],
)
def test_a_bad_list_names_its_line(folder, server, content, message):
    (folder / "list.txt").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_all(server.url("list.txt"))


@pytest.mark.parametrize(
    "line", ['{"url": "a.tar"}', '{"shard": 3}', '{"shard": "a.tar", "sha256": "12"}', "nonsense", "[]"]
)
def test_a_bad_entry_names_its_line(folder, line):
    (folder / "list.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"list.jsonl, line 1"):
        find_all(str(folder / "list.jsonl"))


def test_what_leads_to_nothing_is_named(server, monkeypatch):
    (server.folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no shard in 'http.*empty'.*name the shards in a list"):
        find_all(server.url("empty"))
    with pytest.raises(ShardError, match=r"unlisted.*nowhere"):
        find_all("nowhere://bucket/shards")
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
    with pytest.raises(ShardError, match=r"unlisted.*s3:// needs s3fs: pip install s3fs"):
        find_all("s3://bucket/shards")


# -- fetching -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manner", ["error", "short", "page", "flipped", "drip", "silent"])
def test_a_download_that_fails_twice_is_tried_again(server, tmp_path, manner):
    shard, expected, content = one_shard(server)
    (server.folder / "shard-000000.tar.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  shard-000000.tar\n")
    server.manners["shard-000000.tar"], server.times["shard-000000.tar"] = manner, 2
    cache = open_cache(tmp_path)
    with cache.held(shard, expected) as path:
        assert path.read_bytes() == content
    assert server.asked["shard-000000.tar"] == 3
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    ("manner", "reason", "asked"),
    [
        ("error", "unreachable_shard", 3),
        ("short", "unreachable_shard", 3),
        ("silent", "unreachable_shard", 3),
        ("drip", "unreachable_shard", 3),
        ("page", "damaged_download", 3),
        ("flipped", "damaged_download", 3),
        ("forbidden", "forbidden_shard", 1),
    ],
)
def test_a_shard_that_cannot_be_had_says_why_and_leaves_nothing(server, tmp_path, manner, reason, asked):
    shard, expected, content = one_shard(server)
    shard = RemoteShard(shard.url, hashlib.sha256(content).hexdigest())
    server.manners["shard-000000.tar"] = manner
    cache = open_cache(tmp_path)
    for _ in range(2):  # the second time it is remembered
        with pytest.raises(ShardError, match=reason) as caught, cache.held(shard, expected):
            pass
        assert shard.url in str(caught.value)
    assert server.asked["shard-000000.tar"] == asked
    assert leftovers(cache) == [f"{shard.stem}.failed"]
    assert not list(cache.folder.glob("shards/*.tar"))
    del server.manners["shard-000000.tar"]
    cache.forget_failures()
    with cache.held(shard, expected) as path:
        assert path.read_bytes() == content


def test_a_deleted_and_a_changed_shard(server, tmp_path):
    shard, expected, _ = one_shard(server)
    cache = open_cache(tmp_path)
    (server.folder / "shard-000000.tar").unlink()
    with pytest.raises(ShardError, match="missing_shard"), cache.held(shard, expected):
        pass
    cache.forget_failures()
    other = bytearray(one_shard(server, "shard-000001.tar")[2].ljust(tar_size(expected), b"\0")[: tar_size(expected)])
    (server.folder / "shard-000000.tar").write_bytes(other)
    changed = pytest.raises(ShardError, match=r"changed_shard.*not the tar that its index was made of")
    with changed, cache.held(shard, expected):
        pass


def test_a_full_disk_is_called_that(server, tmp_path):
    shard, expected, _ = one_shard(server)
    cache = open_cache(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # what a file may grow to: fails as a full disk does
    try:
        with pytest.raises(ShardError, match=r"disk_full.*File too large"), cache.held(shard, expected):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert server.asked["shard-000000.tar"] == 1
    assert leftovers(cache) == [f"{shard.stem}.failed"]


def test_what_the_check_refuses_never_gets_the_name(server, tmp_path):
    def refuse(path):
        raise ShardError("damaged_download", f"{path}: no")

    with pytest.raises(ShardError, match="damaged_download"):
        download(server.url("shard-000000.tar"), tmp_path / "part", QUICK, refuse)
    assert server.asked["shard-000000.tar"] == QUICK.attempts


# -- keeping ------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_shards_make_room_and_none_that_is_in_use(server, tmp_path):
    shards = [one_shard(server, path.name) for path in find_shards(server.folder)]
    limit = 3.5 * max(len(content) for *_, content in shards)
    cache = open_cache(tmp_path, limit)

    def kept():
        found = {path.name for path in cache.folder.glob("shards/*.tar")}
        return [number for number, (shard, *_) in enumerate(shards) if any(n.startswith(shard.stem) for n in found)]

    with cache.held(*shards[0][:2]) as first:
        for number in (1, 2, 1, 3):
            with cache.held(*shards[number][:2]):
                pass
            time.sleep(0.02)
        assert kept() == [0, 1, 3]
        assert first.exists()
        with cache.held(*shards[4][:2]):
            assert kept() == [0, 3, 4]
    with cache.held(*shards[5][:2]):
        assert sum(path.stat().st_size for path in cache.folder.glob("shards/*.tar")) <= limit
        assert kept() == [3, 4, 5]
    assert server.asked["shard-000001.tar"] == 1


def test_a_shard_larger_than_the_cache_names_the_setting(server, tmp_path):
    shard, expected, content = one_shard(server)
    cache = open_cache(tmp_path, len(content) - 1)
    with pytest.raises(ShardError, match=r"cache_full.*raise data.cache_gb"), cache.held(shard, expected):
        pass


def size_if_there(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process made room
        return 0


def read_often(folder, shards, limit, seed, results):
    """Hold shards in a random order; count what was not the right bytes."""
    cache, wrong, most = ShardCache(folder, limit, Patience(silence_s=30)), 0, 0
    for number in np.random.default_rng(seed).integers(0, len(shards), 30):
        shard, expected, digest = shards[number]
        with cache.held(shard, expected) as path:
            wrong += hashlib.sha256(path.read_bytes()).hexdigest() != digest
            most = max(most, sum(map(size_if_there, folder.glob("shards/*.tar"))))
    results.put((wrong, most))


def test_processes_share_one_cache(server, tmp_path):
    """Three processes, room for four shards: bytes are right, the bound holds, nobody downloads what is there."""
    shards = [one_shard(server, path.name) for path in find_shards(server.folder)]
    limit = 4 * max(len(content) for *_, content in shards)
    arguments = [(shard, expected, hashlib.sha256(content).hexdigest()) for shard, expected, content in shards]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=read_often, args=(tmp_path / "cache", arguments, limit, seed, results))
        for seed in range(3)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [wrong for wrong, _ in found] == [0, 0, 0]
    assert max(most for _, most in found) <= limit
    assert sum(server.asked[f"shard-{i:06d}.tar"] for i in range(6)) < 60  # 90 reads
    assert leftovers(open_cache(tmp_path)) == []


def test_processes_that_want_the_same_shard_download_it_once(server, tmp_path):
    shard, expected, content = one_shard(server)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    shards = [(shard, expected, hashlib.sha256(content).hexdigest())]
    processes = [
        context.Process(target=read_often, args=(tmp_path / "cache", shards, 1e9, 0, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=60)[0] for _ in processes] == [0] * 4
    for process in processes:
        process.join(60)
    assert server.asked["shard-000000.tar"] == 1


@pytest.mark.parametrize("succeeds", [True, False])
def test_a_download_that_ends_while_another_process_looks_is_not_done_twice(server, tmp_path, succeeds):
    """Between finding nothing and locking: the copy, or the failure, is noticed all the same."""
    shard, expected, _ = one_shard(server)
    cache, other = open_cache(tmp_path), open_cache(tmp_path)
    look = cache._find

    def look_too_early(*arguments):
        found = look(*arguments)
        cache._find = look
        if succeeds:
            other.fetch(shard, expected)
        else:
            with pytest.raises(ShardError, match="missing_shard"):
                other.fetch(shard, expected)
        return found

    cache._find = look_too_early
    if succeeds:
        assert cache.fetch(shard, expected)
    else:
        (server.folder / "shard-000000.tar").unlink()
        with pytest.raises(ShardError, match="missing_shard"):
            cache.fetch(shard, expected)
    assert server.asked["shard-000000.tar"] == 1
    assert [name for name in leftovers(cache) if not name.endswith(".failed")] == []


def hang(folder, shard, expected):
    ShardCache(folder, 1e9, Patience(silence_s=60)).fetch(shard, expected)


def test_a_download_whose_process_was_killed_is_taken_over(server, tmp_path):
    shard, expected, content = one_shard(server)
    server.manners["shard-000000.tar"], server.times["shard-000000.tar"] = "silent", 1
    process = multiprocessing.get_context("fork").Process(target=hang, args=(tmp_path / "cache", shard, expected))
    process.start()
    cache = open_cache(tmp_path)
    deadline = time.monotonic() + 20
    while not server.asked["shard-000000.tar"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not cache.fetch(shard, expected, wait=False)  # it is at it
    process.kill()
    process.join()
    assert len(leftovers(cache)) >= 1
    with cache.held(shard, expected) as path:
        assert path.read_bytes() == content
    assert leftovers(cache) == []


def test_what_a_killed_process_left_of_another_shard_makes_room(server, tmp_path):
    first, second = one_shard(server), one_shard(server, "shard-000001.tar")
    cache = open_cache(tmp_path, 1.5 * len(second[2]))
    stale = cache.folder / "shards" / f"{first[0].stem}-{len(first[2])}.reserved"
    stale.parent.mkdir(parents=True)
    stale.touch()
    stale.with_suffix(".part").write_bytes(first[2][:100])
    with cache.held(*second[:2]):
        assert leftovers(cache) == []


def test_prefetched_shards_are_there_when_they_are_needed(server, tmp_path):
    shards = [one_shard(server, path.name)[:2] for path in find_shards(server.folder)]
    cache = open_cache(tmp_path)
    prefetcher = Prefetcher(cache)
    prefetcher.expect([(RemoteShard(server.url("gone.tar")), "100-00000000"), *shards])
    deadline = time.monotonic() + 20
    while len(list(cache.folder.glob("shards/*.tar"))) < len(shards) and time.monotonic() < deadline:
        time.sleep(0.02)
    prefetcher.close()
    before = Counter(server.asked)
    for shard, expected in shards:
        with cache.held(shard, expected):
            pass
    assert server.asked == before
