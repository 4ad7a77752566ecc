"""From a data set's published files to shards, by the commands that people run."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_prep.download import main as download
from data_prep.prepare import PrepareError, main, prepare
from data_prep.sources import licences, open_source
from data_prep.synthetic.draw import Scene, write_clip
from fvlm.data.chat import Layout, Text, Visual, load_tokenizer, segments
from fvlm.data.shard import ShardReader, find_shards, load_index
from fvlm.data.video import decode_jpeg, read_media
from tests.data_prep.published import (
    MESSAGES,
    PICTURE,
    chat,
    picture,
    pictures,
    texts,
    write_csv,
    write_json,
    write_parquet,
)
from tests.data_prep.web import PAGE, Web

OPENVID = ["video", "caption", "aesthetic score", "motion score", "temporal consistency score", "camera motion"]
OPENVID += ["frame", "fps", "seconds"]


def clip(path: Path, seconds: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(path, [Scene((), (grey, grey, grey)) for grey in (250, 5, 250)[:seconds]], 64, 4)
    return path


def run(name: str, folder: Path, out: Path, *more: str, workers: int = 1) -> dict:
    """Prepare by the command, and return its summary."""
    command = ["--source", name, "--input", str(folder), "--out", str(out), "--size", "56", "--samples-per-shard", "4"]
    assert main([*command, "--workers", str(workers), *more]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["licences"] == licences(list(summary["by_source"]))
    return summary


def samples(out: Path) -> list[tuple[dict, list[bytes]]]:
    tokenizer, read = load_tokenizer("tiny"), []
    for path in find_shards(out):
        index = load_index(path, tokenizer)
        read += [ShardReader(path, index).read(row) for row in range(len(index))]
    return read


def shard_bytes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("shard-*")}


def test_captioned_videos(tmp_path, capsys):
    for name, seconds in (("a.mp4", 3), ("b.mp4", 2)):
        clip(tmp_path / "video" / name, seconds)
    rows = [[name, f"Clip {name}.", *[""] * 7] for name in ("a.mp4", "missing.mp4", "b.mp4")]
    write_csv(tmp_path / "OpenVid-1M.csv", OPENVID, rows)
    summary = run("openvid", tmp_path, tmp_path / "out", "--media", str(tmp_path / "video"))
    assert (summary["samples"], summary["by_kind"], summary["by_source"]) == (2, {"video": 2}, {"openvid": 2})
    assert [(row["key"], row["reason"]) for row in summary["skipped_rows"]] == [("openvid-1-missing", "missing_file")]
    assert "CC-BY-4.0" in capsys.readouterr().out
    [(first, jpegs), (second, _)] = samples(tmp_path / "out")
    assert first == {
        "key": "openvid-0-a",
        "kind": "video",
        "duration": 3.0,
        "frame_count": 3,
        "source": "openvid",
        "user": "Write a brief caption for this video.",
        "assistant": "Clip a.mp4.",
    }
    assert [round(decode_jpeg(jpeg, 56).mean() / 255) for jpeg in jpegs] == [1, 0, 1]
    assert second["frame_count"] == 2


def test_several_images_in_a_row(tmp_path):
    files = [picture(i) for i in range(3)] + [picture(3, kind="JPEG"), b"no picture at all", b""]
    columns = {
        "images": pictures([files[0]], [files[1], files[2]], [files[4]], [files[3]], [files[5]], [files[0], files[4]]),
        "texts": texts(*[[("What?", "Noise.")]] * 6),
    }
    file = write_parquet(tmp_path / "nlvr2" / "train-00000-of-00001.parquet", columns)
    summary = run("cauldron", tmp_path, tmp_path / "out", workers=2)
    assert (summary["samples"], summary["frames"]) == (3, 4)
    assert summary["by_kind"] == {"image": 2, "images": 1}
    skipped = {row["key"]: (row["reason"], row["file"]) for row in summary["skipped_rows"]}
    assert skipped == {
        "cauldron-2": ("unknown_format", f"{file}#row=2&column=images&item=0"),
        "cauldron-4": ("missing_bytes", f"{file}#row=4&column=images&item=0"),
        "cauldron-5": ("unknown_format", f"{file}#row=5&column=images&item=1"),
    }
    assert all("fvlm-" not in row["detail"] for row in summary["skipped_rows"])  # names no copy that is gone
    found = samples(tmp_path / "out")
    for (meta, jpegs), contents in zip(found, [files[:1], files[1:3], files[3:4]], strict=True):
        assert meta["tags"] == ["nlvr2"]
        for jpeg, content in zip(jpegs, contents, strict=True):
            (tmp_path / "picture").write_bytes(content)
            [frame] = read_media(tmp_path / "picture", 56).frames
            assert np.abs(decode_jpeg(jpeg, 56).transpose(1, 2, 0).astype(int) - frame).mean() < 8
    visual, text = segments(found[1][0], load_tokenizer("tiny"), Layout.VIDEO_FIRST)
    assert isinstance(text, Text)
    assert visual == Visual((0, 1))


def test_the_same_shards_from_any_number_of_processes_and_after_an_interruption(tmp_path):
    columns = {
        "images": pictures(*[[picture(i)] * (1 + i % 2) for i in range(17)]),
        "texts": texts(*[[("What?", f"Noise {i}.")] for i in range(17)]),
    }
    write_parquet(tmp_path / "a" / "train-0.parquet", columns, rows_per_group=5)
    first = run("cauldron", tmp_path, tmp_path / "one", workers=1)
    second = run("cauldron", tmp_path, tmp_path / "two", workers=2)
    assert first == second
    before = shard_bytes(tmp_path / "one")
    assert before == shard_bytes(tmp_path / "two")
    for name in ("shard-000001.tar", "shard-000003.idx"):
        (tmp_path / "one" / name).unlink()
    assert run("cauldron", tmp_path, tmp_path / "one") == first
    assert shard_bytes(tmp_path / "one") == before


def test_chats(tmp_path):
    names = {"role": "role", "content": "content"}
    messages = [
        chat(("user", "Hi."), ("assistant", "Hello."), ("user", "Bye."), ("assistant", "Bye."), **names),
        chat(("system", "Be brief."), ("user", "Why?"), ("assistant", " "), **names),
        chat(("system", "Be brief."), ("user", "Why?"), ("assistant", "So."), **names),
    ]
    columns = {"messages": pa.array(messages, MESSAGES), "source": ["everyday-conversations"] * 3}
    write_parquet(tmp_path / "data" / "all" / "train-0.parquet", columns)
    summary = run("smoltalk", tmp_path, tmp_path / "out")
    assert (summary["by_kind"], summary["skipped_by_reason"]) == ({"text": 2}, {"empty_text": 1})
    [(first, none), (second, _)] = samples(tmp_path / "out")
    assert none == []
    assert first["turns"] == [{"user": "Hi.", "assistant": "Hello."}, {"user": "Bye.", "assistant": "Bye."}]
    assert (second["user"], second["assistant"]) == ("Be brief.\n\nWhy?", "So.")


def test_preference_pairs(tmp_path):
    columns = {
        "image": pa.array([{"bytes": picture(0), "path": None}, {"bytes": None, "path": "a.jpg"}], PICTURE),
        "question": ["What?"] * 2,
        "chosen": ["Noise."] * 2,
        "rejected": ["A dog."] * 2,
        "origin_dataset": ["COCO"] * 2,
        "origin_split": ["{}"] * 2,
        "idx": ["1", "2"],
    }
    write_parquet(tmp_path / "RLAIF-V-Dataset_000.parquet", columns)
    summary = run("rlaif_v", tmp_path, tmp_path / "out")
    assert (summary["samples"], summary["skipped_by_reason"]) == (1, {"missing_bytes": 1})
    [(meta, jpegs)] = samples(tmp_path / "out")
    assert (meta["user"], meta["chosen"], meta["rejected"], meta["kind"]) == ("What?", "Noise.", "A dog.", "image")
    assert len(jpegs) == 1
    for answer in ("chosen", "rejected"):
        assert len(segments(meta, load_tokenizer("tiny"), Layout.VIDEO_FIRST, looks=8, answer=answer)[0].frames) == 8


def test_conversations_about_videos(tmp_path):
    rows = [{"image": "a.mp4", "conversations": chat(("human", "<video>\nHow many?"), ("gpt", "Two."))}]
    write_json(tmp_path / "two_needle_niah_qa.json", rows)
    clip(tmp_path / "two_needle_niah_qa" / "a.mp4", 2)
    run("vista", tmp_path, tmp_path / "out")
    [(meta, jpegs)] = samples(tmp_path / "out")
    assert (meta["user"], meta["assistant"], len(jpegs)) == ("How many?", "Two.", 2)


def test_downloaded_videos(tmp_path):
    server = Web()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    content = clip(tmp_path / "clip.mp4", 2).read_bytes()
    server.paths["clip"] = lambda handler: handler.answer(content)
    server.paths["gone"] = lambda handler: handler.answer(PAGE, 404)
    header = ["videoid", "name", "page_idx", "page_dir", "duration", "contentUrl"]
    rows = [[f"{i}", f"Clip {i}", "1", "000001_000050", "PT00H00M02S", server.url(f"clip{i}")] for i in range(3)]
    rows[1][-1] = server.url("gone")
    write_csv(tmp_path / "results_2M_train.csv", header, rows)
    media = tmp_path / "media" / "webvid"
    source = ["--source", "webvid", "--input", str(tmp_path)]
    assert download([*source, "--out", str(media)]) == 0
    server.shutdown()
    server.server_close()
    summary = run("webvid", tmp_path, tmp_path / "out", "--media", str(media))
    assert (summary["samples"], summary["skipped_by_reason"]) == (2, {"missing_file": 1})
    assert [meta["assistant"] for meta, _ in samples(tmp_path / "out")] == ["Clip 0", "Clip 2"]


def test_a_manifest_whose_media_lie_elsewhere(tmp_path):
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "a.png", tmp_path / "elsewhere" / "a.png")
    rows = [
        {"media": "a.png", "user": "What?", "assistant": "Nothing.", "source": "webvid"},
        {"media": "x" * 300, "user": "What?", "assistant": "Too long a name."},
        {"user": "What?", "assistant": "Nothing."},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--manifest", "rows.jsonl", "--media", str(tmp_path / "elsewhere")]
    summary = run("folder", tmp_path, tmp_path / "out", *more)
    assert summary["by_source"] == {"folder": 1, "webvid": 1}
    assert summary["skipped_by_reason"] == {"missing_file": 1}
    assert "TERMS.md" in summary["licences"]["webvid"]["licence"]


def test_a_change_of_the_files_is_another_request(tmp_path):
    clip(tmp_path / "a.mp4", 2)
    write_csv(tmp_path / "OpenVid-1M.csv", OPENVID, [["a.mp4", "A clip.", *[""] * 7]])
    run("openvid", tmp_path, tmp_path / "out")
    write_csv(tmp_path / "OpenVid-1M.csv", OPENVID, [["a.mp4", "Another.", *[""] * 7]])
    settings = {"size": 56, "tokenizer": "tiny", "max_frames": 64, "samples_per_shard": 4, "workers": 0}
    with pytest.raises(PrepareError, match=r"rows .* -> "):
        prepare(open_source("openvid", tmp_path), tmp_path / "out", **settings)


def test_wrong_usage(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    for wrong in (["--source", "openvid"], ["--input", "a"]):
        with pytest.raises(SystemExit) as caught:
            main([*wrong, *out])
        assert caught.value.code == 2
    assert "expected --input DIR, the folder of what https://huggingface.co/datasets/nkp37" in capsys.readouterr().err
    assert main(["--source", "vista", "--input", str(tmp_path), *out]) == 1
    assert "expected *.json; the files are published at https://" in capsys.readouterr().err
