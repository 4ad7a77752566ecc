"""Tars of whole videos with their texts, as video2dataset makes them: indexed on first use, decoded when read."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
from drawn_videos import at_rate, draw
from shard_server import ShardServer, open_cache

import fvlm.data.clip
import fvlm.data.scan
from fvlm.data.capacities import Capacities
from fvlm.data.chat import SOURCE_PROMPTS, load_tokenizer
from fvlm.data.clip import Clip
from fvlm.data.errors import MediaError, SampleError
from fvlm.data.loader import PackLoader
from fvlm.data.plan import Mixture, Plan
from fvlm.data.remote import RemoteShard
from fvlm.data.remote_index import find_remote_indexes
from fvlm.data.shard import ShardIndex, ShardReader, build_index, find_shards, load_index
from fvlm.data.table_store import open_table
from fvlm.data.video import read_media
from fvlm.evaluate.items import read_items

SIZE = 16
TINY = load_tokenizer("tiny")
CAPACITIES = Capacities(frames=16, tokens=400, visual=80, coarse=200, samples=12, labels=300, max_seqlen=256)
SECONDS = {"a": 3.2, "b": 2.0, "c": 0.4}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, Path]:
    """MP4s of `SECONDS` at 10 frames a second, and `d` whose duration no header tells."""
    folder = tmp_path_factory.mktemp("videos")
    drawn = {key: draw(folder / f"{key}.mp4", at_rate(round(10 * s), 10)) for key, s in SECONDS.items()}
    return drawn | {"d": draw(folder / "d.mkv", at_rate(20, 10), container={"live": "1"})}


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def of_videos(videos, folder: Path, **more: bytes) -> Path:
    """`a` with text alone, `b` with a JSON besides, `c` with a JSON of user and assistant, `d` with text alone."""
    members = {
        "a.mp4": videos["a"].read_bytes(),
        "a.txt": b"A square drifts.\n",
        "b.mp4": videos["b"].read_bytes(),
        "b.txt": "Ein Würfel.".encode(),
        "b.json": json.dumps({"user": "Was ist das?", "url": "https://x/b.mp4", "source": "mine"}).encode(),
        "c.mp4": videos["c"].read_bytes(),
        "c.json": json.dumps({"user": "What?", "assistant": "Texture.", "source": "mine"}).encode(),
        "d.mkv": videos["d"].read_bytes(),
        "d.txt": b"Another.",
    }
    return make_tar(folder / "00000.tar", {**members, **more})


def read_all(path: Path, index) -> dict:
    reader = ShardReader(path, index)
    return {key: reader.read(row) for row, key in enumerate(index.keys.tolist())}


def test_frames_and_texts_are_those_of_preparation(tmp_path, videos):
    """The same frames as `read_media`, which preparation uses, and one a second of what the header says."""
    path = of_videos(videos, tmp_path / "openvid")
    index = load_index(path, TINY, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*.idx"))
    assert dict(zip(index.keys.tolist(), index.num_frames.tolist(), strict=True)) == {"b": 2, "c": 1, "a": 3, "d": 2}
    read = read_all(path, index)
    for key, (meta, clip) in read.items():
        media = read_media(videos[key], SIZE)
        assert (meta["kind"], meta["frame_count"], len(clip)) == ("video", len(media.frames), len(media.frames))
        assert meta["duration"] == pytest.approx(media.duration)
        np.testing.assert_array_equal(clip.decode(SIZE), media.frames)
    texts = {key: (meta.get("user"), meta["assistant"], meta["source"]) for key, (meta, _) in read.items()}
    assert texts == {
        "a": (None, "A square drifts.", "openvid"),
        "b": ("Was ist das?", "Ein Würfel.", "mine"),
        "c": ("What?", "Texture.", "mine"),
        "d": (None, "Another.", "openvid"),
    }
    again = load_index(path, TINY, tmp_path / "cache")
    assert again.content.tolist() == index.content.tolist()
    assert again.from_video.all()


def test_they_are_trained_on_and_evaluated(tmp_path, videos, caplog):
    paths = find_shards([of_videos(videos, tmp_path / "openvid")])
    with caplog.at_level(logging.WARNING):
        fvlm.data.shard_index._say_slow.cache_clear()
        opened = open_table(paths, TINY, tmp_path / "cache")
    assert caplog.text.count("openvid holds whole videos, which are decoded whenever they are read") == 1
    assert opened.table.source_names == ("mine", "openvid")
    for workers in (0, 1):
        plan = Plan(opened.table, Mixture(), CAPACITIES, "ce_answer", 0, 4, window=32)
        [loaded] = PackLoader(plan, paths, opened.indexes, TINY, SIZE, packs_per_step=1, num_workers=workers)
        [batch], [keys] = loaded.batches, loaded.keys
        assert sorted(keys) == ["a", "b", "c", "d"]
        assert not loaded.skipped
        first = 0
        for key, start in zip(keys, batch.cu_seqlens.tolist(), strict=False):
            frames = read_media(videos[key], SIZE).frames
            np.testing.assert_array_equal(
                batch.frames[first : first + len(frames)].numpy(), frames.transpose(0, 3, 1, 2)
            )
            first += len(frames)
            text = TINY.decode([token for token in batch.token_ids[start:].tolist() if token])
            assert key != "a" or SOURCE_PROMPTS["openvid"] in text.partition("drifts.")[0]
    items, skipped = read_items(paths, TINY, SIZE, lambda meta: True, cache_dir=tmp_path / "cache")
    assert not skipped
    for item in items:
        frames = read_media(videos[item.meta["key"]], SIZE).frames
        np.testing.assert_array_equal(item.read_frames(), frames.transpose(0, 3, 1, 2))


def test_the_folder_of_a_remote_tar_is_its_source(tmp_path, videos):
    of_videos(videos, tmp_path / "web" / "openvid")
    with ShardServer(tmp_path / "web") as server:
        shard = RemoteShard(server.url("openvid/00000.tar"))
        [place] = find_remote_indexes([shard], TINY, open_cache(tmp_path)).values()
        server.shutdown()
    assert ShardIndex.load(place).source_names == ("mine", "openvid")


def test_a_cut_video_gives_what_is_there(tmp_path):
    """The header says 6 s; as in preparation, the times are chosen anew within what the packets reach."""
    path = draw(tmp_path / "whole.mp4", at_rate(60, 10), container={"movflags": "faststart"})
    content = path.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) * 6 // 10])
    media = read_media(tmp_path / "cut.mp4", SIZE)
    assert 1 < len(media.frames) < 6
    tar = make_tar(tmp_path / "openvid" / "0.tar", {"k.mp4": (tmp_path / "cut.mp4").read_bytes(), "k.txt": b"Cut."})
    [(meta, clip)] = read_all(tar, build_index(tar, TINY)).values()
    assert meta["duration"] == pytest.approx(media.duration)
    np.testing.assert_array_equal(clip.decode(SIZE), media.frames)


def test_a_broken_video_costs_its_sample(tmp_path, videos, caplog, monkeypatch):
    monkeypatch.setattr(fvlm.data.scan, "MAX_MEMBER", 100_000)
    whole = videos["a"].read_bytes()
    more = {
        "empty.mp4": b"",
        "noise.mp4": b"no video at all",
        "noise.json": json.dumps({"user": "What?", "assistant": "Not a sample of text alone."}).encode(),
        "large.mp4": bytes(100_001),
        "large.json": json.dumps({"user": "What?", "assistant": "Nor is this."}).encode(),
        "silent.mp4": whole,
        "latin.mp4": whole,
        "latin.txt": "Würfel".encode("latin-1"),
        "both.mp4": whole,
        "both.json": b"{}",
        "both.000.jpg": b"x",
        "nobody.txt": b"No video of this name.",
    }
    path = of_videos(videos, tmp_path / "openvid", **more)
    index = build_index(path, TINY)
    assert index.keys.tolist() == ["b", "c", "a", "d"]
    for key, reason in {
        "empty.mp4": "unknown_format", "noise.mp4": "unknown_format", "large.mp4": "too_large", "silent": "empty_text",
        "latin": "bad_text", "both": "bad_frames", "nobody.txt": "unclaimed_member",
    }.items():  # fmt: skip
        assert f"{path}, {key}: left out: {reason}" in caplog.text, key
    assert "/proc/" not in caplog.text
    sources = build_index(of_videos(videos, tmp_path / "clips"), TINY)
    assert sources.keys.tolist() == ["b", "c"], "a folder's name without a prompt, and no user text"
    assert "a: left out: no_user_text" in caplog.text


def test_damage_after_indexing_is_a_reason_at_load(tmp_path, videos, monkeypatch):
    path = of_videos(videos, tmp_path / "openvid")
    index = load_index(path, TINY, tmp_path / "cache")
    row = index.keys.tolist().index("a")
    reader = ShardReader(path, index)
    _, clip = reader.read(row)
    with pytest.raises(MediaError, match=r"broken_video: .*3 frames can be decoded, 5 were planned"):
        Clip("a", clip.content, 5).decode(SIZE)
    with pytest.raises(MediaError, match=r"^unknown_format: a: "):
        Clip("a", b"nothing", 3).decode(SIZE)
    monkeypatch.setattr(fvlm.data.clip, "MOST_SECONDS", 0.0)
    with pytest.raises(MediaError, match=r"too_slow: .*not read within 0 s"):
        clip.decode(SIZE)
    content = path.read_bytes()
    for offset in (index.text_offset[row], index.frame_offset[index.first_frame[row]] + 1000):
        damaged = bytearray(content)
        damaged[int(offset)] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(SampleError, match=r"changed_bytes: .*00000\.tar, a: not the bytes"):
            reader.read(row)
    path.write_bytes(content)
    assert reader.read(row)[1] == clip
