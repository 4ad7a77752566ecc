"""Preparation as people run it: what comes out, what is skipped and why, and going on after an interruption."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import unit as unit_module
from data_prep.prepare import PrepareError, main, prepare
from data_prep.sources import FolderSource, Row
from data_prep.synthetic.corpus import Corpus, write_corpus
from data_prep.synthetic.families import FAMILIES
from data_prep.unit import RECORDS, Job, Unit, write_unit
from fvlm.data.chat import load_tokenizer
from fvlm.data.shard import ShardReader, find_shards, load_index
from fvlm.data.video import decode_jpeg, read_media

ODD_PLACES = ([0, 4], [-1, 0], [0], [0, 1, 2], [0.5, 1], [True, 0], "ab", 3)
SETTINGS = {"size": 56, "tokenizer": "tiny", "max_frames": 64, "samples_per_shard": 8}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A corpus of 30 items of all families."""
    folder = tmp_path_factory.mktemp("clips")
    write_corpus(Corpus(clips=30, val_clips=0, mix=dict.fromkeys(FAMILIES, 1.0), frames=4), folder, workers=1)
    return folder


def run(source, out: Path, workers: int = 0, **changes) -> dict:
    return prepare(source, out, **(SETTINGS | changes), workers=workers)


def source_of(clips: Path) -> FolderSource:
    return FolderSource(clips, Path("train.jsonl"))


def shard_bytes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("shard-*")}


def read_all(out: Path) -> list[tuple[dict, list[bytes]]]:
    tokenizer = load_tokenizer("tiny")
    read = []
    for path in find_shards(out):
        index = load_index(path, tokenizer)
        read += [ShardReader(path, index).read(row) for row in range(len(index))]
    return read


def manifest(folder: Path, rows: list) -> FolderSource:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "clips.jsonl").write_text("\n".join(lines) + "\n")
    return FolderSource(folder, Path("clips.jsonl"))


def still(folder: Path, name: str) -> str:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(folder / name)
    return name


def test_rows_become_samples(clips, tmp_path):
    summary = run(source_of(clips), tmp_path)
    rows = [json.loads(line) for line in (clips / "train.jsonl").read_text().splitlines()]
    samples = read_all(tmp_path)
    assert [meta["key"] for meta, _ in samples] == [row["key"] for row in rows]
    assert summary["samples"] == len(rows) == sum(summary["by_source"].values())
    assert summary["frames"] == sum(len(jpegs) for _, jpegs in samples)
    assert summary["skipped"] == 0
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert [len(load_index(path, load_tokenizer("tiny"))) for path in find_shards(tmp_path)[:-1]] == [8] * (
        (len(rows) - 1) // 8
    )
    kinds = set()
    for row, (meta, jpegs) in zip(rows, samples, strict=True):
        media = row.get("media", [])
        media = [media] if isinstance(media, str) else media
        read = [read_media(clips / path, 56) for path in media]
        kind = "images" if len(read) > 1 else read[0].kind if read else "text"
        expected = {name: value for name, value in row.items() if name != "media"}
        assert meta == expected | {
            "kind": kind,
            "duration": read[0].duration if read else 0.0,
            "frame_count": len(jpegs),
        }
        frames = [frame for each in read for frame in each.frames]
        assert len(frames) == len(jpegs)
        for frame, jpeg in zip(frames, jpegs, strict=True):
            assert np.abs(decode_jpeg(jpeg, 56).transpose(1, 2, 0).astype(int) - frame).mean() < 3
        kinds.add(kind)
    assert kinds == {"video", "image", "images", "text"}


def test_processes_change_nothing(clips, tmp_path):
    first, second = run(source_of(clips), tmp_path / "a", workers=0), run(source_of(clips), tmp_path / "b", workers=2)
    assert first == second
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")


def test_media_of_neighbouring_rows_are_read_once(clips, tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(unit_module, "read_media", lambda path, *rest: reads.append(path) or read_media(path, *rest))
    path = clips / "media" / "train" / "0000" / "train-000000.mp4"
    row = {"media": str(path), "user": "What?", "assistant": "A ring."}
    summary = run(manifest(tmp_path, [row] * 5 + [{"user": "What?", "assistant": "A ring."}] + [row]), tmp_path / "out")
    assert summary["samples"] == 7
    assert len(reads) == 2


def test_a_second_run_does_nothing_and_a_damaged_shard_is_made_again(clips, tmp_path, monkeypatch):
    summary = run(source_of(clips), tmp_path)
    before = shard_bytes(tmp_path)
    monkeypatch.setattr(unit_module, "read_media", None)
    assert run(source_of(clips), tmp_path) == summary
    monkeypatch.undo()
    shards = find_shards(tmp_path)
    shards[0].write_bytes(shards[0].read_bytes()[:5000])
    shards[1].unlink()
    shards[2].with_suffix(".idx").unlink()
    assert run(source_of(clips), tmp_path) == summary
    assert shard_bytes(tmp_path) == before


def test_too_little_memory_for_a_file_costs_the_file(tmp_path, monkeypatch):
    rows = [{"media": still(tmp_path, f"{i}.png"), "user": "What?", "assistant": "A ring."} for i in range(3)]

    def read(path, *rest):
        if path.endswith("1.png"):
            raise MemoryError
        return read_media(path, *rest)

    monkeypatch.setattr(unit_module, "read_media", read)
    summary = run(manifest(tmp_path, rows), tmp_path / "out")
    [skipped] = summary["skipped_rows"]
    assert (skipped["file"], skipped["reason"]) == (str(tmp_path / "1.png"), "out_of_memory")
    assert summary["samples"] == 2


def test_a_shard_that_lost_its_media_before_it_was_recorded(tmp_path):
    source = manifest(tmp_path, [{"media": still(tmp_path, "0.png"), "user": "What?", "assistant": "A ring."}])
    run(source, tmp_path / "out")
    (tmp_path / "out" / RECORDS / "shard-000000.json").unlink()
    (tmp_path / "0.png").unlink()
    assert run(source, tmp_path / "out")["samples"] == 0
    assert not shard_bytes(tmp_path / "out")


def test_what_is_read_is_told_until_something_else_begins(tmp_path):
    first, second = (str(tmp_path / still(tmp_path, f"{i}.png")) for i in range(2))
    rows = [Row("a", (first,)), Row("b", (second,)), Row("c", (second,)), Row("d"), Row("e", (first, second))]
    rows = tuple(replace(row, meta={"user": "What?", "assistant": "A ring.", "source": "s"}) for row in rows)
    told = []
    job = Job(out=tmp_path / "out", **SETTINGS)
    record = write_unit(job, Unit(0, rows), {}, lambda *at: told.append(at))
    assert told == [(0, first), (1, second), (2, None), (4, first), (4, second), (5, None)]
    assert record["samples"] == 5
    told.clear()
    record = write_unit(job, Unit(0, rows), {second: "decoder_crashed"}, lambda *at: told.append(at))
    assert told == [(0, first), (1, None), (4, first), (4, None), (5, None)]
    assert [row["reason"] for row in record["skipped"]] == ["decoder_crashed"] * 3


@pytest.mark.parametrize("change", [{"size": 64}, {"max_frames": 2}, {"samples_per_shard": 9}])
def test_another_request_is_refused(clips, tmp_path, change):
    run(source_of(clips), tmp_path)
    with pytest.raises(PrepareError, match=f"{next(iter(change))} .* -> {next(iter(change.values()))}.*--out"):
        run(source_of(clips), tmp_path, **change)


def test_other_rows_or_foreign_shards_are_refused(clips, tmp_path):
    row = {"user": "What?", "assistant": "A ring."}
    run(manifest(tmp_path, [row]), tmp_path / "out")
    with pytest.raises(PrepareError, match="rows "):
        run(manifest(tmp_path, [row, row]), tmp_path / "out")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "00000.tar").write_bytes(b"")
    with pytest.raises(PrepareError, match="did not write"):
        run(source_of(clips), tmp_path / "foreign")


def test_rows_that_cannot_be_used_are_skipped_with_their_reason(clips, tmp_path):
    text = {"user": "What?", "assistant": "A ring."}
    pictures = [still(tmp_path, f"{i}.png") for i in range(2)]
    video = str(clips / "media" / "train" / "0000" / "train-000000.mp4")
    cases = [
        ("{", "bad_json"),
        ('"text"', "bad_json"),
        ({**text, "media": 3}, "wrong_type"),
        ({**text, "media": [3]}, "wrong_type"),
        ({**text, "key": {}}, "wrong_type"),
        ({**text, "user": 1}, "wrong_type"),
        ({**text, "narration": "a"}, "wrong_type"),
        ({**text, "options": [1, 2], "answer": 0}, "wrong_type"),
        ({**text, "options": ["A ring.", "b"], "answer": 2}, "bad_options"),
        ({**text, "options": ["a", "A ring."], "answer": 0}, "bad_options"),
        ({"user": "What?", "media": pictures[0]}, "missing_field"),
        ({"user": "What?", "chosen": "a"}, "missing_field"),
        ({"user": "What?", "assistant": " "}, "empty_text"),
        ({"turns": []}, "empty_text"),
        ({"turns": [{"user": "a"}]}, "empty_text"),
        ({"user": "", "assistant": "a"}, "no_user_text"),
        ({**text, "media": "none.mp4"}, "missing_file"),
        ({**text, "media": [video, pictures[0]]}, "video_among_several"),
        *(({**text, "media": video, "narration": bad}, "wrong_type") for bad in (["a", 1], [None], "abc")),
        *(({**text, "media": video, "look_at": [None, bad]}, "wrong_type") for bad in ODD_PLACES),
        ({**text, "media": video, "narration": ["a"]}, "bad_narration"),
        ({**text, "media": video, "look_at": [[0, 0]]}, "bad_look_at"),
    ]
    good = [
        {**text, "key": "same"},
        {**text, "id": 7},
        {**text, "key": "a.b"},
        {**text, "key": "a_b"},
        {**text, "media": pictures[0]},
        {**text, "media": pictures},
        {**text, "media": pictures[:1]},
        {"turns": [{"user": "a", "assistant": "b"}] * 2, "media": []},
        {"user": "a", "chosen": "b", "rejected": "c", "media": pictures[0]},
        {"assistant": "A ring.", "media": pictures[0], "source": "openvid"},
    ]
    rows = [*good, {**text, "key": "same"}, "", *(row for row, _ in cases)]
    summary = run(manifest(tmp_path, rows), tmp_path / "out", samples_per_shard=4)
    reasons = ["duplicate_key", *(reason for _, reason in cases)]
    assert [row["reason"] for row in summary["skipped_rows"]] == reasons
    assert summary["samples"] == len(good)
    lines = [row["detail"] for row in summary["skipped_rows"] if row["reason"] == "bad_json"]
    assert all(f"line {number}" in detail for number, detail in zip((13, 14), lines, strict=True))
    details = " ".join(row["detail"] for row in summary["skipped_rows"] if row["reason"] == "wrong_type")
    assert "narration, frame 1: expected a string, found 1" in details
    assert "look_at, frame 1: expected null or [row, column] of 0 to 3, found [0, 4]" in details
    samples = read_all(tmp_path / "out")
    assert [meta["kind"] for meta, _ in samples] == ["text"] * 4 + [
        "image",
        "images",
        "image",
        "text",
        "image",
        "image",
    ]
    assert samples[8][0]["rejected"] == "c"
    assert len({meta["key"] for meta, _ in samples}) == len(good)


def test_a_bad_row_moves_no_other(tmp_path):
    rows = [{"key": f"k{i}", "user": "What?", "assistant": "ring " * (i + 1)} for i in range(6)]
    run(manifest(tmp_path, rows), tmp_path / "all", samples_per_shard=2)
    (tmp_path / "clips.jsonl").unlink()
    run(manifest(tmp_path, [*rows[:2], "{", *rows[3:]]), tmp_path / "some", samples_per_shard=2)
    every, some = shard_bytes(tmp_path / "all"), shard_bytes(tmp_path / "some")
    changed = {name for name in every if every[name] != some[name]}
    assert changed == {"shard-000001.tar", "shard-000001.idx"}


def test_odd_files(shared_fixtures, tmp_path, capsys):
    arguments = ["--input", str(shared_fixtures / "odd"), "--manifest", "manifest.jsonl", "--workers", "1"]
    assert main([*arguments, "--out", str(tmp_path), "--size", "56"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {row["key"]: row["reason"] for row in summary["skipped_rows"]} == {
        "odd-002": "empty_file",
        "odd-003": "broken_picture",
        "odd-004": "too_many_pixels",
        "odd-005": "truncated_picture",
        "odd-006": "truncated_picture",
        "odd-007": "broken_picture",
        "odd-008": "no_video_stream",
        "odd-009": "missing_file",
    }
    assert {warning["key"] for warning in summary["warnings"]} == {"odd-000", "odd-001"}
    assert [(meta["key"], len(jpegs)) for meta, jpegs in read_all(tmp_path)] == [("odd-000", 3), ("odd-001", 5)]
    shown = capsys.readouterr().out
    for name in ("odd-009", "does_not_exist.mp4", "missing_file", "decord__corrupted.mp4"):
        assert name in shown


def test_real_videos_all_come_through(shared_fixtures, tmp_path):
    summary = run(FolderSource(shared_fixtures / "videos", Path("manifest.jsonl")), tmp_path, workers=2)
    assert summary["samples"] == 25
    assert summary["skipped"] == 0


def test_exit_codes(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(["--manifest", str(tmp_path / "none.jsonl"), *out]) == 1
    assert "none.jsonl does not exist" in capsys.readouterr().err
    manifest(tmp_path, ["{"])
    assert main(["--manifest", str(tmp_path / "clips.jsonl"), *out]) == 1
    assert "no sample could be written" in capsys.readouterr().err
    for wrong in (["--size", "0"], ["--source", "web"], []):
        with pytest.raises(SystemExit) as caught:
            main([*out, *wrong] if not wrong else [*out, "--manifest", "m", *wrong])
        assert caught.value.code == 2
