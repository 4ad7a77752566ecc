"""Shards and their indexes: bytes where the index says, reproducible, and honest about what cannot be read."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from fvlm.data.chat import load_tokenizer, text_counts, tokenizer_hash
from fvlm.data.errors import SampleError
from fvlm.data.shard import KINDS, ShardIndex, ShardReader, ShardWriter, build_index, find_shards, load_index
from fvlm.data.shard_index import VERSION
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


def test_the_format_is_what_it_was(tmp_path, tokenizer):
    """Shards out there must come out the same when preparation is repeated: index versions come and go, tars stay."""
    with ShardWriter(tmp_path, tokenizer) as writer:
        for i in range(3):
            meta = {"key": f"k{i}", "source": "s", "kind": "video" if i else "text", "duration": 1.5 * i}
            meta |= {"frame_count": i, "user": "Qué?", "assistant": "a"}
            writer.write(meta, [bytes([i]) * 700 * j for j in range(1, i + 1)])
    digest = hashlib.sha256((tmp_path / "shard-000000.tar").read_bytes()).hexdigest()
    assert digest == "0eb16250af02dafd31599890d14ad64ca3c4930c04960ae727fb02727ac77a1c"


def contents(folder: Path, tokenizer, made) -> list[int]:
    [path] = write(folder, tokenizer, made)
    return load_index(path, tokenizer).content.tolist()


def test_content_is_what_is_shown_and_said(tmp_path, tokenizer):
    meta, jpegs = {**samples(1)[0][0], "kind": "video", "frame_count": 2, "narration": [" a", ""]}, samples(3)[2][1][:2]
    same = [
        {"key": "b", "source": "elsewhere", "duration": 9.0, "tags": ["x"]},
        {"key": "c", "user": "", "assistant": "", "turns": [{"user": meta["user"], "assistant": meta["assistant"]}]},
    ]
    other = [
        {"assistant": meta["assistant"] + "s"},
        {"user": "Which form is it?"},
        {"narration": ["", " a"]},
        {"chosen": "ring", "rejected": "bar"},
        {"chosen": "ring", "rejected": "moon"},
        {"turns": [{"user": meta["user"], "assistant": meta["assistant"]}] * 2},
    ]
    varied = [meta, *(meta | change for change in same), *(meta | change for change in other)]
    made = [(each | {"key": f"k{i}"}, jpegs) for i, each in enumerate(varied)]
    made += [(meta | {"key": "swapped"}, jpegs[::-1])]
    made += [(meta | {"key": "cut", "frame_count": 1, "narration": [" a"]}, jpegs[:1])]
    made += [(meta | {"key": "joined", "frame_count": 1, "narration": [" a"]}, [b"".join(jpegs)])]
    found = contents(tmp_path, tokenizer, made)
    assert found[0] == found[1] == found[2]
    assert len(set(found[2:])) == len(found) - 2


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


def test_an_index_of_an_older_version_is_built_anew(tmp_path, tokenizer, caplog):
    [path] = write(tmp_path, tokenizer, samples(6))
    place = path.with_suffix(".idx")
    with np.load(place) as stored:
        old = {name: stored[name] for name in stored.files if name not in ("content", "checksum")}
    with open(place, "wb") as file:
        np.savez(file, **(old | {"version": np.int64(1)}))
    with pytest.raises(ValueError, match=f"it has version 1, expected {VERSION}"):
        load_index(path, tokenizer)
    rebuilt = load_index(path, tokenizer, tmp_path / "cache")
    assert "building the index" in caplog.text
    assert f"version 1, expected {VERSION}" in caplog.text
    assert len(rebuilt.content) == len(rebuilt.checksum) == 6


def test_an_index_at_odds_with_itself_is_not_readable(tmp_path, tokenizer):
    [path] = write(tmp_path, tokenizer, samples(6))
    index = load_index(path, tokenizer)
    for change in (
        {"num_frames": index.num_frames + 1},
        {"frame_size": index.frame_size[1:]},
        {"source": index.source + 3},
        {"content": index.content[:-1]},
        {"first_frame": index.first_frame[1:]},
    ):
        replace(index, **change).save(path.with_suffix(".idx"))
        with pytest.raises(ValueError, match="its columns do not fit each other"):
            load_index(path, tokenizer)


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


@pytest.mark.parametrize("where", ["a JSON", "a frame's middle", "a frame's last byte"])
def test_a_flipped_bit_is_found_when_it_is_read(tmp_path, tokenizer, where):
    made = samples(4)
    [path] = write(tmp_path, tokenizer, made)
    index = load_index(path, tokenizer)
    at, size = (index.frame_offset[0], index.frame_size[0]) if "frame" in where else (
        index.json_offset[0], index.json_size[0])  # fmt: skip
    content = bytearray(path.read_bytes())
    content[int(at + (size - 1 if "last" in where else size // 2))] ^= 1
    path.write_bytes(content)
    reader = ShardReader(path, index)
    with pytest.raises(SampleError, match=rf"changed_bytes: .*{path.name}, {index.keys[0]}: not the bytes"):
        reader.read(0)
    assert [reader.read(row) for row in range(1, 4)] == made[1:]


def test_damage_that_looks_like_the_end_of_a_tar_is_reported(tmp_path, tokenizer, caplog):
    """tarfile takes a broken header, or no more bytes, for the end of the archive."""
    [path] = write(tmp_path, tokenizer, samples(8))
    whole, content = load_index(path, tokenizer), path.read_bytes()
    header = int(whole.frame_offset[whole.first_frame[5]]) - 512
    for damaged, reason in (
        (content[:header] + bytes([content[header] ^ 1]) + content[header + 1 :], "damaged_tar"),
        (content[:header] + bytes(512) + content[header + 512 :], "damaged_tar"),
        (content[:header], "truncated_tar"),
        (content[: header + 100], "truncated_tar"),
        (content[: header + 600], "truncated_tar"),
    ):
        path.write_bytes(damaged)
        caplog.clear()
        assert build_index(path, tokenizer).keys.tolist() == whole.keys.tolist()[:5]
        assert f"{path}, what follows: left out: {reason}" in caplog.text
    for nothing in (b"", b"no tar at all", content[:100], bytes([content[0] ^ 1]) + content[1:]):
        path.write_bytes(nothing)
        with pytest.raises(ValueError, match="unreadable_tar"):
            build_index(path, tokenizer)


def test_fields_that_no_number_holds(tmp_path, tokenizer, caplog):
    meta = {"user": "What?", "assistant": "a"}
    path = make_tar(
        tmp_path / "odd.tar",
        {
            "a.json": json.dumps(meta | {"duration": 10**400}).encode(),
            "b.json": json.dumps(meta | {"duration": float("inf")}).encode(),
            "c.json": b"[" * 200_000,
            "d.json": json.dumps(meta | {"kind": "text"}).encode(),
            "d.jpg": b"x",
            "e_000.jpg": b"nobody's",
        },
    )
    index = build_index(path, tokenizer)
    assert index.duration.tolist() == [0.0, 0.0]
    assert index.keys.tolist() == ["a", "b"]
    for key, reason in {"c": "bad_json", "d": "bad_frames", "e_000.jpg": "unclaimed_member"}.items():
        assert any(f"{path}, {key}: left out: {reason}" in message for message in caplog.messages), key


def test_find_shards(tmp_path, tokenizer):
    for name in ("a", "b"):
        write(tmp_path / name, tokenizer, samples(4), per_shard=2)
    every = [tmp_path / name / f"shard-00000{i}.tar" for name in "ab" for i in range(2)]
    assert find_shards([tmp_path / "b", str(tmp_path / "a"), str(every[0])]) == every
    assert find_shards(str(tmp_path / "*" / "shard-000001.tar")) == every[1::2]
    for missing in (tmp_path, tmp_path / "none", str(tmp_path / "a" / "*.tgz")):
        with pytest.raises(FileNotFoundError, match="no shard"):
            find_shards(missing)
