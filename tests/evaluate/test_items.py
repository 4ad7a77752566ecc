"""Questions are found in shards by their metadata, and their frames are read when they are needed."""

from __future__ import annotations

import numpy as np
import pytest

from fvlm.data.errors import SampleError
from fvlm.data.shard import ShardWriter, find_shards
from fvlm.data.video import encode_jpeg
from fvlm.evaluate.items import every_nth, has_options, is_listing, read_items


@pytest.fixture
def shards(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path, tokenizer, samples_per_shard=4) as writer:
        for number in range(6):
            meta = {
                "key": f"c{number}",
                "source": "s",
                "kind": "video",
                "duration": 2.0,
                "frame_count": 2,
                "user": "Which?",
            }
            if number % 2:
                meta |= {"assistant": "ring moon", "narration": [" ring", " moon"]}
            else:
                meta |= {"assistant": "ring", "options": ["bar", "ring"], "answer": 1}
            frames = rng.integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)
            frames[:] = 40 * number
            writer.write(meta, [encode_jpeg(frame) for frame in frames])
        writer.write({"key": "t", "source": "s", "kind": "text", "frame_count": 0, "user": "u", "assistant": "a"}, [])
    return find_shards(tmp_path)


def test_items_are_found_and_read(shards, tokenizer):
    items, skipped = read_items(shards, tokenizer, 56, has_options)
    assert [item.meta["key"] for item in items] == ["c0", "c2", "c4"]
    assert not skipped
    for item in items:
        frames = item.read_frames()
        assert (frames.shape, frames.dtype) == ((2, 3, 56, 56), np.uint8)
        assert abs(int(frames.mean()) - 40 * int(item.meta["key"][1:])) <= 1
    lists, _ = read_items(shards, tokenizer, 56, is_listing)
    assert [item.meta["key"] for item in lists] == ["c1", "c3", "c5"]
    text, _ = read_items(shards, tokenizer, 56, lambda meta: meta["kind"] == "text")
    assert text[0].read_frames().shape == (0, 3, 56, 56)


def test_a_limit_keeps_the_spread(shards, tokenizer):
    items, _ = read_items(shards, tokenizer, 56, lambda meta: True, most=3)
    assert [item.meta["key"] for item in items] == ["c0", "c3", "t"]
    assert every_nth([1, 2], 5) == [1, 2]


def test_damage_is_counted_where_it_is_met(shards, tokenizer):
    items, _ = read_items(shards, tokenizer, 56, has_options)
    content = bytearray(shards[0].read_bytes())
    start = content.index(b"\xff\xd8")
    content[start : start + 200] = bytes(200)
    shards[0].write_bytes(content)
    with pytest.raises(SampleError, match="changed_bytes"):
        items[0].read_frames()
    shards[1].write_bytes(shards[1].read_bytes()[:600])
    with pytest.raises(SampleError, match="truncated_shard"):
        items[2].read_frames()


def test_a_shard_that_was_moved_costs_its_samples_only(shards, tokenizer):
    items, _ = read_items(shards, tokenizer, 56, has_options)
    shards[0].rename(shards[0].with_suffix(".moved"))
    with pytest.raises(SampleError, match=r"unreadable_shard: .*shard-000000\.tar"):
        items[0].read_frames()
    assert items[2].read_frames().shape == (2, 3, 56, 56)


def test_what_a_list_answer_is():
    narrated = {"assistant": "ring moon", "narration": ["", " ring", " moon"]}
    assert is_listing(narrated)
    assert not is_listing({**narrated, "options": ["ring moon", "bar"]})
    assert not is_listing({**narrated, "assistant": "ring"})
    assert not is_listing({"assistant": "ring moon"})
    assert not is_listing({"assistant": "ring", "narration": ["", " ring"]}), "one word is no list"
    assert not is_listing({**narrated, "turns": [{"user": "Which?", "assistant": "ring moon"}]})


@pytest.mark.parametrize("narration", [[1, 2], ["", None, " ring"], 5, {"a": 1}, "ring moon"])
def test_narration_of_the_wrong_type_is_no_list_answer(narration):
    assert not is_listing({"assistant": "ring moon", "narration": narration})
