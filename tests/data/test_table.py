"""Tables on disk: the same as in memory, opened without reading an index, made anew when anything changes."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_server import PER_SHARD, SAMPLES, SIZE

from benchmarks.plan_index import STAGE_2, draw_index
from fvlm.data import index_file, table_store
from fvlm.data.capacities import Capacities
from fvlm.data.chat import load_tokenizer, tokenizer_hash
from fvlm.data.errors import ShardError
from fvlm.data.index_file import IndexFile
from fvlm.data.loader import PackLoader
from fvlm.data.mixture import Mixture
from fvlm.data.plan import Plan
from fvlm.data.shard import ShardIndex, find_shards
from fvlm.data.shard_index import fingerprint
from fvlm.data.table import SampleTable
from fvlm.data.table_store import open_table
from tests.data.tables import draw_table

TINY = load_tokenizer("tiny")
SIZES = (40, 7, 1, 25, 30)
ROOM = Capacities(frames=8, tokens=300, visual=40, coarse=200, samples=12, labels=200, max_seqlen=200)
TAGS = ("chain_of_thought", "ocr")


def write_shards(folder: Path, seed: int = 0) -> list[Path]:
    """Empty tars with drawn indexes, some of two sources, some with tags."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number, n in enumerate(SIZES):
        tar = folder / f"shard-{number:06d}.tar"
        tar.touch()
        source = STAGE_2[(5 * number + 2) % len(STAGE_2)]
        index = draw_index(source, n, random, tokenizer_hash(TINY), fingerprint(tar))
        if number % 2:
            names, of = (source.name, "another"), random.integers(0, 2, n).astype(np.int16)
            tags, tag_set = ((), ("ocr",), TAGS, ("other",)), random.integers(0, 4, n).astype(np.int32)
            index = replace(index, source_names=names, source=of, tag_sets=tags, tag_set=tag_set)
        index.save(tar.with_suffix(".idx"))
    return find_shards(folder)


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards")


def loaded(shards) -> list[ShardIndex]:
    return [ShardIndex.load(shard.with_suffix(".idx")) for shard in shards]


def assert_same(a: SampleTable, b: SampleTable) -> None:
    for field in fields(SampleTable):
        if field.name != "known_digest":
            left, right = getattr(a, field.name), getattr(b, field.name)
            np.testing.assert_array_equal(left, right) if isinstance(left, np.ndarray) else None
            assert type(left) is type(right)
            assert left is None or isinstance(left, tuple) or left.dtype == right.dtype
    assert (a.source_names, a.tag_sets) == (b.source_names, b.tag_sets)


def tables(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "tables").iterdir())


def spoil(path: Path, how: str) -> None:
    if how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "gone":
        path.unlink()
    else:
        path.write_text("{}")


# --- the same as in memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tags", [(), TAGS[:1], TAGS])
@pytest.mark.parametrize("held_out", [False, True])
def test_a_mapped_table_is_the_one_made_in_memory(shards, tmp_path, tags, held_out):
    indexes = loaded(shards)
    contents = np.sort(np.concatenate([index.content[::3] for index in indexes])) if held_out else None
    expected = SampleTable.from_indexes(indexes, contents, tags)
    for _ in range(2):  # made, and found
        found = open_table(shards, TINY, tmp_path / "cache", held_out=contents, tags=tags)
        assert_same(found.table, expected)
        assert found.table.known_digest == expected.digest()
    in_memory = open_table(shards, TINY, None, held_out=contents, tags=tags)
    assert_same(in_memory.table, expected)
    assert in_memory.left_out == found.left_out
    names = [name for index in indexes for name in np.array(index.source_names)[index.source]]
    kept = Counter(np.array(expected.source_names)[expected.source].tolist())
    assert Counter(names) == kept + Counter(found.left_out)


def test_rows_are_those_of_the_indexes(shards, tmp_path):
    """Cell by cell, against the slowest way of doing it."""
    indexes = loaded(shards)
    held = {int(indexes[0].content[3]), int(indexes[3].content[0])}
    table = open_table(shards, TINY, tmp_path, held_out=np.array(sorted(held), np.uint64), tags=TAGS).table
    at = 0
    for number, index in enumerate(indexes):
        for row in range(len(index)):
            if int(index.content[row]) in held:
                continue
            assert (table.shard[at], table.row[at], table.kind[at]) == (number, row, index.kind[row])
            assert table.source_names[table.source[at]] == index.source_names[index.source[row]]
            carried = set(index.tag_sets[index.tag_set[row]]) & set(TAGS)
            assert set(table.tag_sets[table.tag_set[at]]) == carried
            assert (table.tokens[at], table.narrated_tail[at]) == (index.tokens[row], index.narrated_tail[row])
            at += 1
    assert at == len(table) == sum(SIZES) - 2


def test_a_plan_does_not_depend_on_where_its_table_lies(shards, tmp_path):
    room = Capacities(frames=200, tokens=9000, visual=900, coarse=2000, samples=64, labels=9000, max_seqlen=9000)
    plans = [
        Plan(open_table(shards, TINY, place).table, Mixture(text_share=0.2), room, "ce_all", 1, 200, 64)
        for place in (None, tmp_path / "a", tmp_path / "a", tmp_path / "b")
    ]
    assert len({plan.fingerprint() for plan in plans}) == 1
    packs = [[pack.rows.tolist() for pack in plan.window(1)] for plan in plans]
    assert all(each == packs[0] for each in packs)


def test_an_empty_table(tmp_path):
    tar = tmp_path / "shard-000000.tar"
    tar.touch()
    draw_index(STAGE_2[0], 3, np.random.default_rng(0), tokenizer_hash(TINY), fingerprint(tar)).save(
        tar.with_suffix(".idx")
    )
    everything = np.sort(ShardIndex.load(tar.with_suffix(".idx")).content)
    for _ in range(2):
        found = open_table([tar], TINY, tmp_path / "cache", held_out=everything)
        assert (len(found.table), found.table.num_shards, found.left_out) == (0, 0, {"cauldron": 3})
        assert found.table.fits([3])


def test_the_digest_follows_everything_and_copies_do_not_inherit_it(shards, tmp_path):
    table = open_table(shards, TINY, tmp_path, tags=TAGS).table
    seen = {table.digest()}
    for field in fields(SampleTable):
        if field.name == "known_digest":
            continue
        value = getattr(table, field.name)
        if isinstance(value, tuple):
            changed = (*value, "z") if field.name == "source_names" else (*value, ("z",))
        else:
            changed = value.copy()
            changed[5] += 1
        copy = replace(table, **{field.name: changed})
        assert copy.known_digest is None
        seen.add(copy.digest())
    assert len(seen) == len(fields(SampleTable))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.data())
@settings(max_examples=80, deadline=None)
def test_fits_against_brute_force(counts, data):
    shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    rows = [np.sort(data.draw(st.permutations(range(6)))[:count]) for count in counts]
    row = np.concatenate([*rows, np.zeros(0)]).astype(np.int32)
    table = replace(draw_table(len(row)), shard=shard, row=row)
    sizes = data.draw(st.lists(st.integers(0, 7), min_size=0, max_size=7))
    expected = all(s < len(sizes) and r < sizes[s] for s, r in zip(shard.tolist(), row.tolist(), strict=True))
    assert table.fits(sizes) == expected


# --- made once, and anew when something changes ------------------------------------------------------------------


def test_a_table_is_opened_without_reading_an_index(shards, tmp_path, monkeypatch):
    open_table(shards, TINY, tmp_path)

    def read(*_):
        raise AssertionError("an index was read")

    monkeypatch.setattr(ShardIndex, "load", read)
    found = open_table(shards, TINY, tmp_path)
    assert isinstance(found.table.tokens.base, np.memmap)
    assert [len(index) for index in found.indexes] == list(SIZES)
    assert {index.tar_fingerprint for index in found.indexes} == {fingerprint(shards[0])}


def test_any_change_of_the_data_makes_another_table(shards, tmp_path):
    cache = tmp_path / "cache"

    def digest(chosen=shards, **options) -> str:
        return open_table(chosen, TINY, cache, **options).table.digest()

    first = digest()
    assert digest() == first
    assert len(tables(cache)) == 1
    digest(tags=TAGS), digest(held_out=loaded(shards)[0].content[:1]), digest(shards[:3])
    assert len(tables(cache)) == 4
    fresh = draw_index(STAGE_2[0], 9, np.random.default_rng(9), tokenizer_hash(TINY), fingerprint(shards[1]))
    fresh.save(shards[1].with_suffix(".idx"))
    assert digest() != first
    assert digest() == SampleTable.from_indexes(loaded(shards)).digest()


def test_an_index_older_than_its_tar_is_built_anew(shards, tmp_path, caplog):
    """The rewritten tar holds nothing, so nothing is left of its samples."""
    open_table(shards, TINY, tmp_path / "cache")
    shards[2].write_bytes(bytes(10_240))
    for _ in range(2):
        found = open_table(shards, TINY, tmp_path / "cache")
        assert [len(index) for index in found.indexes] == [40, 7, 0, 25, 30]
    assert caplog.text.count("is of another version of the tar") == 1
    built = Path(found.indexes[2].path)
    assert built.parent == tmp_path / "cache"
    built.unlink()
    again = open_table(shards, TINY, tmp_path / "cache")
    assert again.table.digest() == found.table.digest()
    assert built.exists()
    assert "is gone, or was written anew" in caplog.text


@pytest.mark.parametrize("name", ["tokens", "source", "shard", "table.json"])
@pytest.mark.parametrize("how", ["cut", "gone", "emptied"])
def test_a_damaged_table_is_made_anew(shards, tmp_path, name, how, caplog):
    expected = open_table(shards, TINY, None).table
    open_table(shards, TINY, tmp_path / "cache")
    [folder] = (tmp_path / "cache" / "tables").iterdir()
    spoil(folder / name, how)
    assert_same(open_table(shards, TINY, tmp_path / "cache").table, expected)
    if (how, name) != ("gone", "table.json"):
        assert "made anew" in caplog.text
    caplog.clear()
    assert_same(open_table(shards, TINY, tmp_path / "cache").table, expected)
    assert not caplog.records
    assert tables(tmp_path / "cache") == [folder.name]


def test_what_cannot_be_read_leaves_no_table(shards, tmp_path):
    os.truncate(shards[3].with_suffix(".idx"), 500)
    with pytest.raises(ValueError, match=r"shard-000003.idx is not a readable index"):
        open_table([shard.with_suffix(".idx") for shard in shards], None, tmp_path / "cache")
    assert tables(tmp_path / "cache") == []


def _open(start, shards, cache, results):
    start.wait()
    table = open_table(shards, TINY, cache).table
    results.put((table.digest(), int(table.tokens.sum())))


def test_several_processes_make_the_same_table_at_once(shards, tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.Queue()
    arguments = (start, shards, tmp_path / "cache", results)
    processes = [context.Process(target=_open, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    found = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    expected = SampleTable.from_indexes(loaded(shards))
    assert found == {(expected.digest(), int(expected.tokens.sum()))}
    [name] = tables(tmp_path / "cache")
    assert not name.startswith(".")


@pytest.mark.parametrize("damaged", [False, True])
def test_a_table_that_another_process_made_meanwhile_is_taken(shards, tmp_path, monkeypatch, damaged):
    """The other one is done while this one is at it; a damaged one in its place gives way."""
    real = table_store._publish

    def late(temporary, folder):
        shutil.copytree(temporary, folder)
        if damaged:
            os.truncate(folder / "tokens", 4)
        real(temporary, folder)

    monkeypatch.setattr(table_store, "_publish", late)
    found = open_table(shards, TINY, tmp_path)
    assert_same(found.table, SampleTable.from_indexes(loaded(shards)))
    assert len(tables(tmp_path)) == 1


def test_indexes_alone_will_do_if_one_tokenizer_counted(shards, tmp_path):
    alone = [shard.with_suffix(".idx") for shard in shards]
    expected = open_table(shards, TINY, None).table
    for shard in shards:
        shard.unlink()
    assert_same(open_table(alone, None, None).table, expected)
    index = replace(ShardIndex.load(alone[3]), tokenizer_hash="0123456789abcdef")
    index.save(alone[3])
    with pytest.raises(ValueError, match=r"shard-000003.idx was counted with tokenizer 0123456789abcdef"):
        open_table(alone, None, tmp_path / "cache")


# --- indexes that are opened when they are needed ----------------------------------------------------------------


def test_an_index_file_is_an_index(shards):
    for shard, file in zip(shards, open_table(shards, TINY, None).indexes, strict=True):
        index = ShardIndex.load(shard.with_suffix(".idx"))
        for field in fields(ShardIndex):
            found, expected = getattr(file, field.name), getattr(index, field.name)
            assert np.array_equal(found, expected) if isinstance(expected, np.ndarray) else found == expected
        with pytest.raises(AttributeError, match="colour"):
            _ = file.colour


def test_few_indexes_are_in_memory_at_a_time(shards):
    index_file._opened.cache_clear()
    files = open_table(shards, TINY, None).indexes
    assert index_file._opened.cache_info().currsize == 0
    assert [str(file.keys[0]) for file in files] == [str(index.keys[0]) for index in loaded(shards)]
    info = index_file._opened.cache_info()
    assert (info.currsize, info.maxsize) == (len(files), index_file.OPEN_INDEXES)


def test_an_index_that_is_no_longer_what_it_was(shards, caplog):
    caplog.set_level(logging.ERROR)
    index_file._opened.cache_clear()
    files: list[IndexFile] = open_table(shards, TINY, None).indexes
    shards[0].with_suffix(".idx").unlink()
    loaded(shards[1:2])[0].save(shards[4].with_suffix(".idx"))
    for file, reason in ((files[0], "unreadable_index"), (files[4], "changed_index")):
        with pytest.raises(ShardError) as error:
            _ = file.keys
        assert error.value.reason == reason
        assert Path(file.path).name in error.value.detail
    assert files[1].keys.shape == (7,)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_index_deleted_during_a_run_costs_its_own_samples_only(folder, num_workers):
    def read() -> tuple[list[str], Counter]:
        index_file._opened.cache_clear()
        opened = open_table(find_shards(folder), TINY, None)
        plan = Plan(opened.table, Mixture(), ROOM, "ce_answer", 0, SAMPLES, window=16)
        options = {"packs_per_step": 2, "num_workers": num_workers, "max_bad_share": 1.0}
        loader = PackLoader(plan, find_shards(folder), opened.indexes, TINY, SIZE, **options)
        if gone:
            find_shards(folder)[1].with_suffix(".idx").unlink()
        steps = list(loader)
        keys = [key for loaded in steps for keys in loaded.keys for key in keys]
        return keys, Counter((lost.reason, lost.key[:4]) for loaded in steps for lost in loaded.lost)

    gone = False
    whole, lost = read()
    assert (len(whole), lost) == (SAMPLES, Counter())
    theirs = ShardIndex.load(find_shards(folder)[1].with_suffix(".idx")).keys.tolist()
    gone = True
    rest, lost = read()
    assert rest == [key for key in whole if key not in theirs]
    assert lost == Counter({("unreadable_index", "row "): PER_SHARD})


def test_the_store_describes_itself(shards, tmp_path):
    open_table(shards, TINY, tmp_path)
    [folder] = (tmp_path / "tables").iterdir()
    described = json.loads((folder / "table.json").read_text())
    assert described["rows"] == sum(SIZES)
    sizes = {name: np.dtype(dtype).itemsize * sum(SIZES) for name, dtype in described["dtypes"].items()}
    assert sizes == {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "table.json"}
