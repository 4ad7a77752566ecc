"""Verification: every kind of damage has its line, and a clean set has none."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import verify as command
from data_prep.unit import RECORDS, write_json
from data_prep.verify import main
from data_prep.verify_set import SampleSet
from data_prep.verify_shard import Checks, verify_shard
from fvlm.data.chat import load_tokenizer
from fvlm.data.shard import ShardIndex, ShardReader, ShardWriter, find_shards, load_index
from fvlm.data.video import encode_jpeg

TINY = load_tokenizer("tiny")
SIZE = 32


def write(folder: Path, count: int = 12, per_shard: int = 6, seed: int = 0) -> list[Path]:
    """Shards of videos, stills, several images and texts, every one different."""
    random = np.random.default_rng(seed)
    with ShardWriter(folder, TINY, per_shard) as writer:
        for number in range(count):
            kind = ("video", "image", "images", "text")[number % 4]
            frames = {"video": 3, "image": 1, "images": 2, "text": 0}[kind]
            jpegs = [encode_jpeg(random.integers(0, 255, (SIZE, SIZE, 3), np.uint8)) for _ in range(frames)]
            meta = {"key": f"k{number:03d}", "source": f"s{number % 3}", "kind": kind, "frame_count": frames}
            meta |= {"duration": float(frames), "user": "What is it?", "assistant": f"noise {seed} {number}"}
            if number % per_shard == per_shard - 1:
                meta["tags"] = ["x" * 70_000]  # the bytes that tell one version of a tar from another are at its ends
            writer.write(meta, jpegs)
    return find_shards(folder)


def copy_samples(shard: Path, rows: list[int], out: Path, rename: str = "copy") -> Path:
    """A shard of some samples of another one, under other keys."""
    reader = ShardReader(shard, load_index(shard, TINY))
    with ShardWriter(out, TINY) as writer:
        for row in rows:
            meta, jpegs = reader.read(row)
            writer.write(meta | {"key": f"{rename}-{meta['key']}", "source": "elsewhere"}, jpegs)
    return out / "shard-000000.tar"


def reasons(path: Path, **checks) -> Counter:
    found = verify_shard(path, Checks(**checks))
    assert all(problem.shard == str(path) and problem.detail for problem in found.problems)
    return Counter((problem.reason, problem.key) for problem in found.problems)


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(int(offset))
        file.write(content)


def flip(path: Path, offset: int) -> None:
    overwrite(path, offset, bytes([path.read_bytes()[int(offset)] ^ 1]))


def rewrite(path: Path, change) -> None:
    """The tar anew, with its members passed through `change(name, content) -> content or None`."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, before in members:
            if (content := change(name, before)) is not None:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shard(tmp_path) -> Path:
    return write(tmp_path)[0]


@pytest.fixture
def index(shard) -> ShardIndex:
    return load_index(shard, TINY)


def test_a_clean_shard_has_no_problem(shard):
    found = verify_shard(shard, Checks(size=SIZE))
    assert (found.problems, found.notes) == ([], Counter())
    assert found.by_source["s0"] == Counter(samples=2, frames=3, tokens=found.by_source["s0"]["tokens"], seconds=3.0,
                                            video=1, text=1, image=0, images=0)  # fmt: skip
    assert found.frame_sizes == {(SIZE, SIZE): 3 + 1 + 2 + 3 + 1}
    assert found.frames.sum() == found.tokens.sum() == 6
    assert found.seconds.sum() == 5


def test_a_tar_cut_in_the_middle(shard, index):
    os.truncate(shard, int(index.frame_offset[index.first_frame[4]]) + 50)
    found = verify_shard(shard, Checks())
    problems = {(problem.reason, problem.key): problem.detail for problem in found.problems}
    assert set(problems) == {
        ("truncated_tar", ""), ("stale_index", ""), ("missing_member", "k004"), ("missing_member", "k005")}  # fmt: skip
    assert "k004.000.jpg" in problems["truncated_tar", ""]
    assert "of its 6 samples and the tar's 4, 2 differ, such as k004, k005" in problems["stale_index", ""]
    os.truncate(shard, int(index.json_offset[1]) + 512)  # between two members, where tarfile sees nothing wrong
    assert reasons(shard) == Counter([("truncated_tar", ""), ("stale_index", "")])


def test_files_that_are_no_tar(shard):
    for content in (b"", b"nothing", shard.read_bytes()[:300]):
        shard.write_bytes(content)
        assert reasons(shard) == Counter([("unreadable_tar", "")])
    shard.unlink()
    assert reasons(shard) == Counter([("unreadable_tar", "")])


def test_a_flipped_byte_in_a_header_ends_the_tar_early(shard, index):
    flip(shard, index.frame_offset[index.first_frame[2]] - 512)
    found = reasons(shard)
    assert found["damaged_tar", ""] == 1
    assert {key for reason, key in found if reason == "missing_member"} == {"k002", "k003", "k004", "k005"}


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_byte_in_a_jpeg(shard, index, place):
    size = int(index.frame_size[1])
    flip(shard, index.frame_offset[1] + {"first": 0, "middle": size // 2, "last": size - 1}[place])
    found = reasons(shard)
    assert found["changed_bytes", "k000"] == 1
    assert set(found) <= {("changed_bytes", "k000"), ("bad_jpeg", "k000.001.jpg")}
    assert place != "first" or ("bad_jpeg", "k000.001.jpg") in found


def test_flipped_bytes_in_a_json(shard, index):
    """Anywhere: in a text, in a field that nothing else compares, in the syntax."""
    content = shard.read_bytes()
    for what, reason in ((b"What", "changed_bytes"), (b"duration", "changed_bytes"), (b'"source":', "bad_json")):
        start = content.index(what, int(index.json_offset[3]))
        overwrite(shard, start, bytes([what[0] ^ 1]))
        assert reasons(shard) == Counter([(reason, "k003")]), what
        overwrite(shard, start, what)
    assert not reasons(shard)


def test_a_flipped_byte_where_the_index_recognises_its_tar(tmp_path):
    """The last bytes tell versions of a tar apart: the index does not fit any more, and the sample is still named."""
    [path] = write(tmp_path, count=5, per_shard=6)
    flip(path, load_index(path, TINY).frame_offset[-1] + 300)
    found = reasons(path)
    assert found["stale_index", ""] == found["changed_bytes", "k004"] == 1
    assert {key for _, key in found} <= {"", "k004", "k004.002.jpg"}


def test_names_cannot_command_a_terminal(tmp_path):
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a\x1b[31m.md", "b\udcff.md", "c\n.md"):
            tar.addfile(tarfile.TarInfo(name))
    keys = {key for reason, key in reasons(path) if reason == "unclaimed_member"}
    assert keys == {"a\\x1b[31m.md", "b\\udcff.md", "c\\n.md"}


def test_a_member_missing(shard):
    rewrite(shard, lambda name, content: None if name == "k000.001.jpg" else content)
    found = reasons(shard)
    assert found == Counter([("missing_frames", "k000"), ("stale_index", "")])
    rewrite(shard, lambda name, content: None if name == "k001.json" else content)
    assert reasons(shard)["unclaimed_member", "k001.000.jpg"] == 1


def test_members_that_nobody_claims(shard):
    with tarfile.open(shard, "a") as tar:
        for name in ("notes.md", "k000.txt", "k001.tokens.npy", "other.003.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    found = reasons(shard)
    assert {key for reason, key in found if reason == "unclaimed_member"} == {"notes.md", "other.003.jpg"}


def test_a_member_twice(shard):
    with tarfile.open(shard, "a") as tar:
        for name, content in (("k000.000.jpg", b"x"), ("k003.json", b"{}")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = reasons(shard)
    assert found["duplicate_member", "k000"] == found["duplicate_member", "k003"] == 1


def test_an_index_older_than_its_tar(tmp_path, shard):
    newer = write(tmp_path / "newer", seed=1)[0]
    shard.write_bytes(newer.read_bytes())
    assert reasons(shard) == Counter([("stale_index", "")])


def test_an_index_that_cannot_be_read_and_none_at_all(shard):
    place = shard.with_suffix(".idx")
    place.write_bytes(place.read_bytes()[:-30])
    assert reasons(shard) == Counter([("unreadable_index", "")])
    place.write_bytes(b"no index")
    assert reasons(shard) == Counter([("unreadable_index", "")])
    place.unlink()
    found = verify_shard(shard, Checks())
    assert not found.problems
    assert found.notes.total() == 1


def without_last_frame(index: ShardIndex, row: int) -> dict:
    """Columns of an index that has one frame fewer of a sample."""
    gone = int(index.first_frame[row + 1]) - 1
    num_frames = index.num_frames.copy()
    num_frames[row] -= 1
    return {
        "num_frames": num_frames,
        "first_frame": np.concatenate([[0], np.cumsum(num_frames)]),
        "frame_offset": np.delete(index.frame_offset, gone),
        "frame_size": np.delete(index.frame_size, gone),
    }


def test_an_index_that_says_otherwise(shard, index):
    """Every column that training goes by, changed for one sample."""

    def changed(name: str, at: int) -> dict:
        column = getattr(index, name).copy()
        column[at] += 1
        return {name: column}

    cases = {
        "wrong_place": (changed("frame_offset", 2), changed("frame_size", 0), changed("json_offset", 0),
                        changed("json_size", 0)),
        "wrong_frame_count": (without_last_frame(index, 0),),
        "wrong_token_count": (changed("tokens", 0), changed("head", 0), changed("answer", 0)),
        "wrong_field": (changed("kind", 0), changed("duration", 0), changed("content", 0),
                        {"source_names": ("x", "s1", "s2")}),
        "changed_bytes": (changed("checksum", 0),),
    }  # fmt: skip
    for reason, changes in cases.items():
        for change in changes:
            replace(index, **change).save(shard.with_suffix(".idx"))
            assert reasons(shard)[reason, "k000"] == 1, (reason, change)
    renamed = index.keys.copy()
    renamed[2] = "k00x"
    replace(index, keys=renamed).save(shard.with_suffix(".idx"))
    assert reasons(shard) == Counter([("not_in_index", "k002"), ("missing_member", "k00x")])


def bomb() -> bytes:
    """A JPEG of a few hundred bytes whose header says 20 000 x 20 000 pixels: 1.2 GB once decoded."""
    content = bytearray(encode_jpeg(np.zeros((SIZE, SIZE, 3), np.uint8)))
    header = content.index(b"\xff\xc0")
    content[header + 5 : header + 9] = (20_000).to_bytes(2, "big") * 2
    return bytes(content)


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
    def refuse(content):
        raise AssertionError("decoded")

    with ShardWriter(tmp_path, TINY) as writer:
        writer.write({"key": "a", "kind": "image", "frame_count": 1, "user": "u", "assistant": "a"}, [bomb()])
    monkeypatch.setattr("data_prep.verify_shard.jpeg_pixels", refuse)
    found = verify_shard(tmp_path / "shard-000000.tar", Checks())
    [problem] = found.problems
    assert (problem.key, problem.reason, problem.detail) == (
        "a.000.jpg", "too_many_pixels", "a JPEG of 20000 x 20000 pixels")  # fmt: skip


def test_frames_of_another_size_than_stated(tmp_path, shard):
    assert reasons(shard, size=SIZE) == Counter()
    assert {reason for reason, _ in reasons(shard, size=56)} == {"wrong_size"}
    write_json(tmp_path / "prepared" / RECORDS / "request.json", {"size": 56})
    for path in shard.parent.glob("shard-000000.*"):
        (tmp_path / "prepared" / path.name).write_bytes(path.read_bytes())
    assert reasons(tmp_path / "prepared" / shard.name)["wrong_size", "k000.000.jpg"] == 1


def test_a_share_of_the_frames_is_decoded(tmp_path, monkeypatch):
    paths = write(tmp_path, count=80, per_shard=80)
    decoded = []
    monkeypatch.setattr("data_prep.verify_shard.jpeg_pixels", decoded.append)
    for share, low, high in ((0.0, 0, 0), (0.5, 40, 80), (1.0, 120, 120)):
        decoded.clear()
        assert not reasons(paths[0], decode=share)
        assert low <= len(decoded) <= high
    assert len(set(decoded)) == 120


def test_another_tokenizer(shard, index, tmp_path):
    replace(index, tokenizer_hash="of another").save(shard.with_suffix(".idx"))
    found = verify_shard(shard, Checks())
    assert not found.problems
    assert any("were not checked: counted with tokenizer of another" in note for note in found.notes)
    assert sum(counts["tokens"] for counts in found.by_source.values()) == index.tokens.sum()
    assert reasons(shard, tokenizer="tiny") == Counter([("other_tokenizer", "")])


def test_whole_videos_are_not_shards(tmp_path):
    path = tmp_path / "clips.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("a.mp4"))
    assert reasons(path) == Counter([("holds_videos", "")])


def test_duplicates_within_and_across_shards(tmp_path):
    first, second = write(tmp_path)
    copy_samples(first, [0, 3], tmp_path / "more")
    copy_samples(first, [3], tmp_path / "third", "again")
    samples = SampleSet("train")
    for path in (first, second, tmp_path / "more" / "shard-000000.tar", tmp_path / "third" / "shard-000000.tar"):
        samples.add(verify_shard(path, Checks()))
    found = [(problem.key, problem.reason, problem.detail) for problem in samples.duplicates()]
    assert found == [
        ("copy-k000", "duplicate_sample", f"the same content as {first}, k000"),
        ("copy-k003", "duplicate_sample", f"the same content as {first}, k003"),
        ("again-k003", "duplicate_sample", f"the same content as {first}, k003"),
    ]
    assert samples.totals()["distinct"] == 12
    assert samples.totals()["samples"] == 15


def test_the_command_on_a_clean_set(tmp_path, capsys):
    write(tmp_path / "train")
    write(tmp_path / "val", count=4, seed=1)
    out = tmp_path / "report"
    arguments = ["--shards", str(tmp_path / "train"), "--val", str(tmp_path / "val"), "--workers", "2"]
    assert main([*arguments, "--out", str(out), "--size", str(SIZE)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "clean"
    report = json.loads((out / "report.json").read_text())
    assert report["clean"]
    train = report["sets"]["train"]
    assert (train["shards"], train["samples"], train["distinct"], train["frames"]) == (2, 12, 12, 18)
    assert {name: counts["samples"] for name, counts in train["by_source"].items()} == {"s0": 4, "s1": 4, "s2": 4}
    assert train["histograms"]["frames"]["video"] == [0, 0, 0, 3]
    assert sum(train["histograms"]["tokens"]["text"]) == 3
    assert train["frame_sizes"] == {f"{SIZE}x{SIZE}": 18}
    text = (out / "report.md").read_text()
    for name in ("train-composition", "train-histograms", "train-sheet-000", "val-sheet-002"):
        assert f"(figures/{name}.png)" in text
        assert (out / "figures" / f"{name}.png").stat().st_size > 1000


def test_the_command_on_damage(tmp_path, capsys):
    first, second = write(tmp_path / "train")
    copy_samples(second, [1], tmp_path / "val")
    index = load_index(first, TINY)
    flip(first, index.json_offset[0] + 30)
    (tmp_path / "train" / "shard-000007.idx").write_bytes(first.with_suffix(".idx").read_bytes())
    arguments = ["--shards", str(tmp_path / "train"), "--val", str(tmp_path / "val"), "--workers", "1"]
    assert main([*arguments, "--out", str(tmp_path / "report")]) == 1
    printed = capsys.readouterr().out
    assert f"{first}, k000: " in printed
    assert f"{tmp_path / 'train' / 'shard-000007.tar'}: missing_tar: " in printed
    overlap = f"copy-k007: validation_in_training: the same content as {second}, k007"
    assert f"{tmp_path / 'val' / 'shard-000000.tar'}, {overlap}" in printed
    assert printed.splitlines()[-1] == "3 problems"
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["problems"]["count"] == len(report["problems"]["listed"]) == 3
    assert "validation_in_training" in (tmp_path / "report" / "report.md").read_text()


def dies(path: Path, checks: Checks):
    """Stands in for `verify_shard`: one shard takes the process down."""
    if path.name == "shard-000001.tar":
        os._exit(9)
    return verify_shard(path, checks)


def test_a_shard_that_kills_its_process_is_a_problem_of_that_shard(tmp_path, monkeypatch):
    shards = write(tmp_path, count=8, per_shard=2)
    monkeypatch.setattr(command, "verify_shard", dies)
    sets, ledger = command.verify(shards, [], Checks(), workers=2)
    assert [(problem.shard, problem.reason) for problem in ledger.listed] == [(str(shards[1]), "crashed")]
    assert len(sets["train"]) == 6


def test_requests_that_cannot_be(tmp_path, capsys):
    assert main(["--shards", str(tmp_path)]) == 1
    assert "no shard in" in capsys.readouterr().err
    for wrong in (["--decode", "1.5"], ["--workers", "0"]):
        with pytest.raises(SystemExit) as stopped:
            main(["--shards", str(tmp_path), *wrong])
        assert stopped.value.code == 2
