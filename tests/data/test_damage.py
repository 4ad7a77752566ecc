"""Shards that are damaged while a run reads them: a message, a count, and nobody else's place changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import fvlm.data.reader
from fvlm.data.capacities import Capacities
from fvlm.data.chat import load_tokenizer
from fvlm.data.content import Piece, checksum
from fvlm.data.loader import PackLoader
from fvlm.data.plan import Mixture, Plan, SampleTable
from fvlm.data.shard import ShardWriter, find_shards, load_index
from fvlm.data.video import encode_jpeg

SIZE, PER_SHARD, NUM_SHARDS = 16, 20, 4
TINY = load_tokenizer("tiny")
CAPACITIES = Capacities(frames=12, tokens=400, visual=40, coarse=200, samples=12, labels=300, max_seqlen=256)


def write(folder: Path, spoil=lambda number, jpegs: jpegs) -> list[Path]:
    """Shards of videos of noise and of texts; `spoil` may change what is written of a sample."""
    random = np.random.default_rng(0)
    with ShardWriter(folder, TINY, PER_SHARD) as writer:
        for number in range(PER_SHARD * NUM_SHARDS):
            count = number % 4
            jpegs = [encode_jpeg(random.integers(0, 255, (SIZE, SIZE, 3), np.uint8)) for _ in range(count)]
            meta = {"key": f"s{number:03d}", "source": f"src{number % 3}", "kind": "video" if count else "text"}
            meta |= {
                "frame_count": count,
                "user": "What is it?",
                "assistant": f"noise {'again ' * (number % 5)}{number}",
            }
            writer.write(meta, spoil(number, jpegs))
    return find_shards(folder)


@pytest.fixture
def shards(tmp_path):
    return write(tmp_path)


def make_loader(shards, num_workers=0) -> PackLoader:
    indexes = [load_index(shard, TINY) for shard in shards]
    total = PER_SHARD * NUM_SHARDS
    plan = Plan(SampleTable.from_indexes(indexes), Mixture(), CAPACITIES, "ce_answer", 0, total, window=40)
    options = {"packs_per_step": 2, "num_workers": num_workers, "max_bad_share": 1.0}
    return PackLoader(plan, shards, indexes, TINY, SIZE, **options)


def samples(batch, keys) -> dict:
    """Token ids and frames of each sample of a batch, copied: the batch is the loader's again at the next step."""
    found = {}
    for number, key in enumerate(keys):
        start, stop = batch.cu_seqlens[number : number + 2].tolist()
        mine = (batch.visual_index >= start) & (batch.visual_index < stop)
        found[key] = (batch.token_ids[start:stop].clone(), batch.frames[batch.visual_frame[mine]])
    return found


def read(loader, after_first=lambda: None) -> tuple[list, list]:
    """((planned, samples by pack) of every step, lost samples); something may happen after the first one."""
    steps, lost = [], []
    for loaded in loader:
        planned = (loaded.step.planned, loaded.step.state)
        steps.append((planned, [samples(*pack) for pack in zip(loaded.batches, loaded.keys, strict=True)]))
        lost += loaded.lost
        assert loaded.skipped == Counter(sample.reason for sample in loaded.lost)
        if len(steps) == 1:
            after_first()
    return steps, lost


def read_while(shards, num_workers, damage) -> tuple[list, set]:
    """Lost samples and their reasons, with `damage` done after the first step; the rest is as if nothing happened."""
    before, _ = read(make_loader(shards))
    after, lost = read(make_loader(shards, num_workers), damage)
    gone = {sample.key for sample in lost}
    assert len(before) == len(after)
    for (old_plan, old_packs), (new_plan, new_packs) in zip(before, after, strict=True):
        assert old_plan == new_plan
        for old, new in zip(old_packs, new_packs, strict=True):
            assert list(new) == [key for key in old if key not in gone]
            for key, content in new.items():
                assert all(torch.equal(a, b) for a, b in zip(old[key], content, strict=True)), key
    return lost, {sample.reason for sample in lost}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_deleted_during_the_run(shards, num_workers, caplog, monkeypatch):
    monkeypatch.setattr(fvlm.data.reader, "_OPEN_SHARDS", 1)  # what is open can be read to its end
    lost, reasons = read_while(shards, num_workers, lambda: [shard.unlink() for shard in shards[1:]])
    assert reasons == {"unreadable_shard"}
    assert {sample.shard for sample in lost} <= {str(shard) for shard in shards[1:]}
    assert all(f"skipped {sample.shard}, {sample.key}: unreadable_shard" in caplog.text for sample in lost)


def test_a_shard_deleted_before_it_is_opened_loses_all_its_samples(shards, caplog):
    loader = make_loader(shards)
    shards[2].unlink()
    lost = [sample for loaded in loader for sample in loaded.lost]
    assert sorted(sample.key for sample in lost) == [f"s{i:03d}" for i in range(2 * PER_SHARD, 3 * PER_SHARD)]
    assert {sample.reason for sample in lost} == {"unreadable_shard"}
    assert caplog.text.count("No such file") == PER_SHARD


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_cut_during_the_run(shards, num_workers, caplog):
    cuts = {str(shard): int(load_index(shard, TINY).json_offset[7]) for shard in shards}

    def cut():
        for shard in shards:
            with open(shard, "r+b") as file:
                file.truncate(cuts[str(shard)])

    lost, reasons = read_while(shards, num_workers, cut)
    assert reasons == {"truncated_shard"}
    assert all(int(sample.key[1:]) % PER_SHARD >= 7 for sample in lost)
    assert all(f"skipped {sample.shard}, {sample.key}: truncated_shard" in caplog.text for sample in lost)


@pytest.mark.parametrize("member", ["frame", "metadata"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bits_flipped_during_the_run(shards, num_workers, member, caplog):
    """One bit in the middle of every sample's last frame (most still decode), or of its metadata."""

    def flip():
        for shard in shards:
            index = load_index(shard, TINY)
            offsets, sizes = (index.json_offset, index.json_size) if member == "metadata" else (
                index.frame_offset, index.frame_size)  # fmt: skip
            with open(shard, "r+b") as file:
                for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
                    file.seek(offset + size // 2)
                    byte = file.read(1)[0]
                    file.seek(-1, 1)
                    file.write(bytes([byte ^ 1]))

    lost, reasons = read_while(shards, num_workers, flip)
    assert reasons == {"changed_bytes"}
    assert member == "metadata" or all(int(sample.key[1:]) % 4 for sample in lost)
    assert all(f"skipped {sample.shard}, {sample.key}: changed_bytes" in caplog.text for sample in lost)


def test_damage_from_before_the_index(tmp_path, caplog):
    """The index has seen these bytes; what is in them shows when they are decoded."""
    bomb = bytearray(encode_jpeg(np.zeros((SIZE, SIZE, 3), np.uint8)))
    header = bomb.index(b"\xff\xc0")
    bomb[header + 5 : header + 9] = (20_000).to_bytes(2, "big") * 2
    spoilt = {5: b"no JPEG", 22: bytes(bomb), 43: encode_jpeg(np.zeros((8, 8, 3), np.uint8))}
    shards = write(tmp_path, lambda number, jpegs: [spoilt.get(number, jpeg) for jpeg in jpegs])
    lost = {sample.key: sample.reason for loaded in make_loader(shards) for sample in loaded.lost}
    assert lost == {"s005": "bad_jpeg", "s022": "too_many_pixels", "s043": "too_small"}
    assert "a JPEG of 20000 x 20000 pixels" in caplog.text


def test_a_text_that_the_index_counted_otherwise(shards):
    """Checksums fit and the counts do not: an index from somewhere else."""
    index = load_index(shards[0], TINY)
    index.tokens[3] += 1
    index.save(shards[0].with_suffix(".idx"))
    [lost] = [sample for loaded in make_loader(shards) for sample in loaded.lost]
    assert (lost.key, lost.reason) == ("s003", "index_mismatch")


def test_metadata_that_is_none_is_skipped_too(shards):
    """An index that takes any bytes for a sample's metadata."""
    index = load_index(shards[0], TINY)
    with open(shards[0], "rb") as file:
        file.seek(int(index.json_offset[4]))
        start = file.read(10)
    index.json_size[4], index.checksum[4] = 10, checksum([Piece.of(start, 0).crc])
    index.save(shards[0].with_suffix(".idx"))
    [lost] = [sample for loaded in make_loader(shards) for sample in loaded.lost]
    assert (lost.key, lost.reason) == ("s004", "bad_json")
