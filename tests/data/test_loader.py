"""The loader: one global sequence on any ranks and workers, from any step, and damage that stays where it is."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import Counter

import numpy as np
import pytest
import torch

import fvlm.data.reader
from fvlm.data.buffers import BufferPool
from fvlm.data.capacities import Capacities
from fvlm.data.chat import load_tokenizer
from fvlm.data.errors import SampleError
from fvlm.data.loader import PackLoader
from fvlm.data.plan import START, Mixture, Plan, SampleTable
from fvlm.data.shard import ShardWriter, find_shards, load_index
from fvlm.data.video import encode_jpeg

SIZE = 16
TINY = load_tokenizer("tiny")
CAPACITIES = Capacities(frames=12, tokens=400, visual=80, coarse=200, samples=12, labels=300, max_seqlen=256)
MIXTURE = Mixture(question_first=0.5, narrated=0.5, looks=4)


def draw_sample(random, number):
    kind = ("video", "image", "images", "text")[number % 4]
    frame_count = {"video": int(random.integers(1, 5)), "image": 1, "images": 2, "text": 0}[kind]
    meta = {"key": f"s{number:03d}", "source": f"src{number % 3}", "kind": kind, "frame_count": frame_count}
    meta |= {"user": "Which shape?", "assistant": f"A red {'ring ' * (number % 7)}here."}
    if number % 8 == 0:
        meta["narration"] = ["red"] * frame_count
    frames = np.full((frame_count, SIZE, SIZE, 3), 2 * number, np.uint8)  # a frame tells whose it is
    return meta, [encode_jpeg(frame) for frame in frames]


@pytest.fixture
def shards(tmp_path):
    random = np.random.default_rng(0)
    with ShardWriter(tmp_path, TINY, samples_per_shard=16) as writer:
        for number in range(60):
            writer.write(*draw_sample(random, number))
    return find_shards(tmp_path)


def make_loader(shards, total=60, mixture=MIXTURE, **options):
    indexes = [load_index(shard, TINY) for shard in shards]
    plan = Plan(SampleTable.from_indexes(indexes), mixture, CAPACITIES, "ce_answer", 0, total, window=32)
    return PackLoader(plan, shards, indexes, TINY, SIZE, **({"packs_per_step": 4} | options))


def digest(batch):
    content = [value.numpy().tobytes() for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    return hashlib.sha256(b"".join(content)).hexdigest()


def sequence(shards, world_size=1, num_workers=0, skip_steps=0):
    """(keys, digest) of every pack in global order, put together from all ranks."""
    start = START
    if skip_steps:
        start = [loaded.step.state for loaded in make_loader(shards, total=180)][skip_steps - 1]
    options = {"total": 180, "world_size": world_size, "num_workers": num_workers, "start": start}
    ranks = [list(make_loader(shards, rank=rank, **options)) for rank in range(world_size)]
    packs = []
    for steps in zip(*ranks, strict=True):
        assert len({(loaded.step.index, loaded.step.planned) for loaded in steps}) == 1
        for number in range(4 // world_size):
            packs += [(loaded.keys[number], digest(loaded.batches[number])) for loaded in steps]
    return packs


def samples_by_key(loaded_steps):
    """token ids, labels and the frames looked at of every sample, wherever it is packed."""
    found = {}
    for loaded in loaded_steps:
        for batch, keys in zip(loaded.batches, loaded.keys, strict=True):
            for number, key in enumerate(keys):
                start, stop = batch.cu_seqlens[number : number + 2].tolist()
                mine = (batch.visual_index >= start) & (batch.visual_index < stop)
                pixels = batch.frames[batch.visual_frame[mine]].float().mean(dim=(1, 2, 3))
                labels = batch.labels[(batch.labels >= 0) & (batch.loss_index >= start) & (batch.loss_index < stop)]
                found[key] = (batch.token_ids[start:stop].tolist(), labels.tolist(), pixels.tolist())
    return found


def damage_frame(shard, index, key):
    """Overwrite the head of a sample's first JPEG; a run that has read its indexes does not know."""
    row = index.keys.tolist().index(key)
    with open(shard, "r+b") as file:
        file.seek(index.frame_offset[index.first_frame[row]])
        file.write(b"not a picture")


@pytest.mark.parametrize("skip_steps", [0, 1, 5])
def test_the_global_sequence_is_the_same_for_ranks_workers_and_resumption(shards, skip_steps):
    whole = sequence(shards)
    assert sorted(key for keys, _ in whole for key in keys) == sorted(3 * [f"s{i:03d}" for i in range(60)])
    for world_size in (1, 2, 4):
        for num_workers in (0, 1, 2):
            assert sequence(shards, world_size, num_workers, skip_steps) == whole[4 * skip_steps :]


def test_batches_hold_the_right_samples(shards):
    """Read back from the packs: the chat's words, as many labels as planned, and each sample's own pixels."""
    steps = list(make_loader(shards, num_workers=1))
    for loaded in steps:
        for batch in loaded.batches:
            batch.validate()
        labels = sum(int((batch.labels >= 0).sum()) for batch in loaded.batches)
        assert (labels, loaded.skipped) == (loaded.step.planned, Counter())
    found = samples_by_key(steps)
    for number in range(60):
        token_ids, labels, pixels = found[f"s{number:03d}"]
        text = TINY.decode([token for token in token_ids if token])
        assert "Which shape?" in text
        assert "here." in TINY.decode(labels) or TINY.decode(labels).startswith("red")
        assert len(pixels) == 0 if number % 4 == 3 else len(pixels) >= 1
        assert all(abs(pixel - 2 * number) <= 2 for pixel in pixels)
        assert number % 4 != 1 or len(pixels) == MIXTURE.looks


def test_steps_report_what_schedules_and_checkpoints_need(shards):
    steps = list(make_loader(shards))
    assert [loaded.step.index for loaded in steps] == list(range(len(steps)))
    assert steps[-1].step.samples_seen == 60
    assert all(loaded.wait_s > 0 for loaded in steps)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_sample_moves_nobody(shards, num_workers, caplog):
    before = list(make_loader(shards))
    loader = make_loader(shards, num_workers=num_workers)
    damage_frame(shards[1], load_index(shards[1], TINY), "s021")
    after = list(loader)
    for old, new in zip(before, after, strict=True):
        for old_keys, new_keys, old_batch, new_batch in zip(old.keys, new.keys, old.batches, new.batches, strict=True):
            assert new_keys == [key for key in old_keys if key != "s021"]
            assert (digest(old_batch) == digest(new_batch)) == ("s021" not in old_keys)
            new_batch.validate()
        assert new.step.planned == old.step.planned
    old, new = samples_by_key(before), samples_by_key(after)
    assert old.pop("s021")
    assert old == new
    (lost,) = [sample for loaded in after for sample in loaded.lost]
    assert (lost.shard, lost.key, lost.reason) == (str(shards[1]), "s021", "changed_bytes")
    assert sum((loaded.skipped for loaded in after), Counter()) == Counter(changed_bytes=1)
    assert "s021" in caplog.text
    assert "changed_bytes" in caplog.text


def test_other_damage_has_its_reason(shards):
    """A cut tar, JSON that does not fit its index, frames of another size, a deleted shard."""
    loader = make_loader(shards, max_bad_share=1.0)
    cut, changed, gone = shards[0], shards[1], shards[3]
    index = load_index(changed, TINY)
    content = bytearray(changed.read_bytes())
    start = int(index.json_offset[2])
    meta = json.loads(content[start : start + int(index.json_size[2])])
    meta["assistant"] = meta["assistant"].replace("A red ", "qz red ").replace("here.", "her.")
    content[start : start + int(index.json_size[2])] = json.dumps(meta).encode().ljust(int(index.json_size[2]))
    changed.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[: int(load_index(cut, TINY).json_offset[-1])])
    gone.unlink()
    reasons = Counter()
    for loaded in loader:
        reasons += loaded.skipped
    assert reasons == Counter(truncated_shard=1, changed_bytes=1, unreadable_shard=12)


def test_too_many_lost_samples_stop_the_run(shards):
    loader = make_loader(shards)
    shards[0].unlink()
    with pytest.raises(SampleError, match=r"samples could not be read.*unreadable_shard.*max_bad_share = 0.01"):
        list(loader)


def test_fewer_than_ten_lost_samples_stop_no_run(shards):
    loader = make_loader(shards)
    for shard in shards[:3]:
        index = load_index(shard, TINY)
        for key in index.keys[[0, 1, 2]].tolist():
            damage_frame(shard, index, key)
    assert sum(len(loaded.lost) for loaded in loader) == 9


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_worker_error_surfaces_with_its_message(shards, num_workers, monkeypatch):
    def fail(pixels, content):
        raise ArithmeticError("the decoder is broken")

    monkeypatch.setattr(fvlm.data.reader, "decode_jpeg_into", fail)
    with pytest.raises(ArithmeticError, match="the decoder is broken"):
        list(make_loader(shards, num_workers=num_workers))


def test_a_killed_worker_ends_the_run(shards, monkeypatch):
    monkeypatch.setattr(fvlm.data.reader, "decode_jpeg_into", lambda pixels, content: os._exit(1))
    with pytest.raises(RuntimeError, match="worker"):
        list(make_loader(shards, num_workers=1))


def test_leaving_early_leaves_no_worker(shards):
    before = set(multiprocessing.active_children())
    for _ in make_loader(shards, num_workers=2):
        break
    loader = make_loader(shards, num_workers=2)
    for shard in shards:
        shard.unlink()
    with pytest.raises(SampleError, match="could not be read") as caught:
        list(loader)
    assert caught  # the error is still held, and with it the loader's frames
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_draws_no_random_numbers(shards, num_workers):
    state = torch.get_rng_state()
    list(make_loader(shards, num_workers=num_workers))
    assert torch.equal(state, torch.get_rng_state())


def test_multi_token_baseline_reads_cells(shards):
    mixture = Mixture(grid=4, looks=8)
    for loaded in make_loader(shards, mixture=mixture):
        for batch, keys in zip(loaded.batches, loaded.keys, strict=True):
            batch.validate()
            used = batch.visual_index < CAPACITIES.tokens
            assert (torch.bincount(batch.visual_cell[used], minlength=4) == used.sum() // 4).all() or not keys


def test_wrong_arguments_are_named(shards):
    with pytest.raises(ValueError, match="packs_per_step = 4: expected a multiple of the number of ranks, 3"):
        make_loader(shards, world_size=3)
    loader = make_loader(shards)
    with pytest.raises(ValueError, match="expected those of the plan's table"):
        PackLoader(loader._plan, shards[:1], [load_index(shards[0], TINY)], TINY, SIZE, packs_per_step=4)


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 2])
def test_on_a_gpu_the_same_batches_arrive(shards, num_workers):
    expected = [digest(batch) for loaded in make_loader(shards) for batch in loaded.batches]
    found = []
    for loaded in make_loader(shards, num_workers=num_workers, device="cuda"):
        assert all(batch.frames.is_cuda and batch.labels.is_cuda for batch in loaded.batches)
        found += [digest(batch.to("cpu")) for batch in loaded.batches]
    assert found == expected


def test_memory_that_cuda_cannot_lock_is_used_all_the_same_and_its_error_is_not_the_next_launches(monkeypatch, caplog):
    launched = []

    class Runtime:
        def cudaHostRegister(self, *_) -> int:
            return 2

    def launch(*_, device: str) -> None:
        launched.append(device)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch, "zeros", launch)
    pool = BufferPool(2, 100)
    pool.pin()
    assert "CUDA cannot page-lock 100 bytes (error 2)" in caplog.text
    assert launched == ["cuda"]
    assert pool.take() is not None
