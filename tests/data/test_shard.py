"""Shards and their indexes: bytes where the index says, reproducible, and honest about what cannot be read."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import webdataset

from fvlm.data.chat import load_tokenizer, text_counts, tokenizer_hash
from fvlm.data.errors import SampleError
from fvlm.data.shard import KINDS, ShardIndex, ShardReader, ShardWriter, build_index, find_shards, load_index
from fvlm.data.video import encode_jpeg


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def samples(count: int, seed: int = 0) -> list[tuple[dict, list[bytes]]]:
    """Videos, stills, several images and texts of random sizes, in turn."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        frames = {"video": int(rng.integers(1, 9)), "image": 1, "images": 3, "text": 0}[kind]
        jpegs = [encode_jpeg(rng.integers(0, 255, (16, 16, 3), np.uint8)) for _ in range(frames)]
        meta = {"key": f"k{i:04d}", "source": f"s{i % 3}", "kind": kind, "duration": 1.5 * frames}
        meta |= {"frame_count": frames, "user": "Which shape is it?", "assistant": "ring " * int(rng.integers(1, 9))}
        if kind == "video":
            meta["narration"] = [" écoute", *[""] * (frames - 1)]
        made.append((meta, jpegs))
    return made


def write(folder: Path, tokenizer, made, per_shard=100) -> list[Path]:
    with ShardWriter(folder, tokenizer, per_shard) as writer:
        for meta, jpegs in made:
            writer.write(meta, jpegs)
    return find_shards(folder)


def test_what_was_written_is_read(tmp_path, tokenizer):
    made = samples(23)
    shards = write(tmp_path, tokenizer, made, per_shard=10)
    assert [path.name for path in shards] == [f"shard-00000{i}.tar" for i in range(3)]
    read = []
    for path in shards:
        index = load_index(path, tokenizer)
        reader = ShardReader(path, index)
        read += [reader.read(row) for row in range(len(index))]
    assert read == made


def test_index_agrees_with_tarfile_and_the_tokenizer(tmp_path, tokenizer):
    made = samples(12)
    [path] = write(tmp_path, tokenizer, made)
    index = load_index(path, tokenizer)
    with tarfile.open(path) as tar:
        members = {member.name: (member.offset_data, member.size, member.mtime) for member in tar}
    assert {mtime for *_, mtime in members.values()} == {0}
    for row, (meta, jpegs) in enumerate(made):
        key = meta["key"]
        assert members[f"{key}.json"][:2] == (index.json_offset[row], index.json_size[row])
        for i in range(len(jpegs)):
            at = index.first_frame[row] + i
            assert members[f"{key}.{i:03d}.jpg"][:2] == (index.frame_offset[at], index.frame_size[at])
        assert index.first_frame[row + 1] - index.first_frame[row] == index.num_frames[row] == len(jpegs)
        counts = text_counts(meta, tokenizer)
        for field in fields(counts):
            assert getattr(index, field.name)[row] == getattr(counts, field.name), field.name
        assert index.keys[row] == key
        assert index.source_names[index.source[row]] == meta["source"]
        assert KINDS[index.kind[row]] == meta["kind"]
        assert index.duration[row] == pytest.approx(meta["duration"])
    types = {name: getattr(index, name).dtype for name in ("source", "kind", "num_frames", "tokens", "json_offset")}
    assert types == {
        "source": np.int16,
        "kind": np.uint8,
        "num_frames": np.int32,
        "tokens": np.int32,
        "json_offset": np.int64,
    }


def test_webdataset_reads_the_shards(tmp_path, tokenizer):
    made = samples(8)
    [path] = write(tmp_path, tokenizer, made)
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [meta["key"] for meta, _ in made]
    for sample, (meta, jpegs) in zip(read, made, strict=True):
        assert json.loads(sample["json"]) == meta
        assert [sample[f"{i:03d}.jpg"] for i in range(len(jpegs))] == jpegs


def test_bytes_depend_on_the_samples_only(tmp_path, tokenizer):
    for name in "ab":
        write(tmp_path / name, tokenizer, samples(9), per_shard=5)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_an_exception_leaves_no_unfinished_shard(tmp_path, tokenizer):
    def interrupted():
        with ShardWriter(tmp_path, tokenizer, 5) as writer:
            for meta, jpegs in samples(7):
                writer.write(meta, jpegs)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000000.idx", "shard-000000.tar"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key": "a.b"}, "bad_key"),
        ({"frame_count": 99}, "bad_frames"),
        ({"kind": "film"}, "bad_frames"),
        ({"kind": "text"}, "bad_frames"),
        ({"assistant": " "}, "empty_text"),
        ({"tags": ["\ud800"]}, "bad_text"),
        ({"narration": ["a"] * 50}, "bad_narration"),
    ],
)
def test_a_refused_sample_writes_nothing(tmp_path, tokenizer, change, reason):
    first, second = samples(2)
    with ShardWriter(tmp_path, tokenizer) as writer:
        writer.write(*first)
        with pytest.raises(SampleError) as caught:
            writer.write(first[0] | {"key": "bad"} | change, first[1])
        writer.write(*second)
    assert caught.value.reason == reason
    [path] = find_shards(tmp_path)
    index = load_index(path, tokenizer)
    assert [ShardReader(path, index).read(row) for row in range(len(index))] == [first, second]


def columns(index: ShardIndex) -> dict:
    return {field.name: np.asarray(getattr(index, field.name)).tolist() for field in fields(index)}


def test_index_is_rebuilt_for_another_tokenizer_or_another_tar(tmp_path, tokenizer):
    made = samples(6)
    [path] = write(tmp_path, tokenizer, made)
    other = load_tokenizer("tiny")
    other.add_tokens(["ring ring"])
    assert tokenizer_hash(other) != tokenizer_hash(tokenizer)
    with pytest.raises(ValueError, match="counted with tokenizer"):
        load_index(path, other)
    rebuilt = load_index(path, other, tmp_path / "cache")
    assert rebuilt.tokenizer_hash == tokenizer_hash(other)
    assert rebuilt.tokens.tolist() == [text_counts(meta, other).tokens for meta, _ in made]
    [stored] = (tmp_path / "cache").iterdir()
    before = stored.stat().st_mtime_ns
    assert columns(load_index(path, other, tmp_path / "cache")) == columns(rebuilt)
    assert stored.stat().st_mtime_ns == before  # used, not built again

    content = path.with_suffix(".idx").read_bytes()
    write(tmp_path / "new", tokenizer, [(meta, jpegs[::-1]) for meta, jpegs in made])
    changed = (tmp_path / "new" / path.name).read_bytes()
    assert len(changed) == path.stat().st_size
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=r"another version of the tar; .*data\.cache_dir.*--cache-dir"):
        load_index(path, tokenizer)
    path.with_suffix(".idx").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a readable index"):
        load_index(path, tokenizer)
    path.with_suffix(".idx").unlink()
    with pytest.raises(ValueError, match="does not exist"):
        load_index(path, tokenizer)
    index = load_index(path, tokenizer, tmp_path / "cache")
    assert ShardReader(path, index).read(0)[1] == made[0][1][::-1]


def test_a_built_index_equals_a_written_one(tmp_path, tokenizer):
    [path] = write(tmp_path, tokenizer, samples(20))
    assert columns(build_index(path, tokenizer)) == columns(load_index(path, tokenizer))


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_published_layouts_read_as_they_are(tmp_path, tokenizer, caplog):
    jpegs = [encode_jpeg(np.full((16, 16, 3), i * 20, np.uint8)) for i in range(6)]
    text = {"user": "What is it?", "assistant": "A ring.", "source": "openvid"}
    path = make_tar(
        tmp_path / "published.tar",
        {
            "clip_7_000.jpg": jpegs[0],
            "clip_7_001.jpg": jpegs[1],
            "clip_7.json": json.dumps({**text, "duration": 2.0, "frame_count": 2}).encode(),
            "b.000.jpg": jpegs[2],
            "b.json": json.dumps(text).encode(),
            "still_042.jpg": jpegs[3],
            "still_042.json": json.dumps({"user": "", "assistant": "A ring.", "source": "openvid"}).encode(),
            "words.json": json.dumps(text).encode(),
            "words.tokens.npy": b"ignored",
            "broken.json": b"{",
            "silent_000.jpg": jpegs[4],
            "silent.json": json.dumps({"user": "What?", "assistant": ""}).encode(),
            "gap_000.jpg": jpegs[4],
            "gap_002.jpg": jpegs[5],
            "gap.json": json.dumps(text).encode(),
            "list.json": b"[]",
        },
    )
    index = load_index(path, tokenizer, tmp_path / "cache")
    reader = ShardReader(path, index)
    read = {key: reader.read(row) for row, key in enumerate(index.keys.tolist())}
    assert {key: (meta["kind"], meta["frame_count"]) for key, (meta, _) in read.items()} == {
        "clip_7": ("video", 2),
        "b": ("image", 1),
        "still_042": ("image", 1),
        "words": ("text", 0),
    }
    assert read["clip_7"][1] == jpegs[:2]
    for key, reason in {
        "broken": "bad_json",
        "silent": "empty_text",
        "gap": "missing_frames",
        "list": "bad_json",
    }.items():
        assert any(key in message and reason in message for message in caplog.messages), key
    with pytest.raises(ValueError, match="holds videos"):
        build_index(make_tar(tmp_path / "clips.tar", {"a.mp4": b"x", "a.txt": b"y"}), tokenizer)


def test_a_cut_tar_is_indexed_as_far_as_it_goes(tmp_path, tokenizer):
    made = samples(20)
    [path] = write(tmp_path, tokenizer, made)
    whole = load_index(path, tokenizer)
    path.write_bytes(path.read_bytes()[: int(whole.json_offset[11]) + 10])
    index = build_index(path, tokenizer)
    assert index.keys.tolist() == whole.keys.tolist()[:11]
    with pytest.raises(SampleError, match="truncated_shard") as caught:
        ShardReader(path, whole).read(15)
    assert whole.keys[15] in caught.value.detail
    assert ShardReader(path, whole).read(3) == made[3]


def test_find_shards(tmp_path, tokenizer):
    for name in ("a", "b"):
        write(tmp_path / name, tokenizer, samples(4), per_shard=2)
    every = [tmp_path / name / f"shard-00000{i}.tar" for name in "ab" for i in range(2)]
    assert find_shards([tmp_path / "b", str(tmp_path / "a"), str(every[0])]) == every
    assert find_shards(str(tmp_path / "*" / "shard-000001.tar")) == every[1::2]
    for missing in (tmp_path, tmp_path / "none", str(tmp_path / "a" / "*.tgz")):
        with pytest.raises(FileNotFoundError, match="no shard"):
            find_shards(missing)
