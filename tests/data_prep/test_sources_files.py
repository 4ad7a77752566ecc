"""Annotation files that are damaged, odd or large, and pictures that lie inside parquet files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import packed
from data_prep.packed import PackedMedia, reference
from data_prep.sources import files, open_source
from data_prep.sources.files import count_records, digest_files, read_records
from fvlm.data.errors import MediaError, SampleError
from tests.data_prep.published import chat, pictures, texts, write_json, write_jsonl, write_parquet


def read(path: Path, columns=()) -> list:
    """Fields of every record, or the reason where there are none."""
    records = list(read_records(path, columns))
    assert [record.number for record in records] == list(range(len(records)))
    assert count_records(path) == len(records)
    return [each.fields.reason if isinstance(each.fields, SampleError) else each.fields for each in records]


def test_csv_rows_that_are_odd_cost_only_themselves(tmp_path):
    file = tmp_path / "a.csv"
    good = b'1,"said ""hi"", and\r\nleft"\r\n'
    rows = [b"\xef\xbb\xbfid,text\r\n", good, b"2\r\n", b"\r\n", b"3,a,b\r\n", b"4,\xff\r\n", "5,é\r\n".encode()]
    file.write_bytes(b"".join(rows))
    said = {"id": "1", "text": 'said "hi", and\r\nleft'}
    assert read(file) == [
        said,
        "wrong_columns",
        "wrong_columns",
        {"id": "4", "text": "\udcff"},
        {"id": "5", "text": "é"},
    ]
    assert [each.where for each in read_records(file)] == ["line 2", "line 4", "line 6", "line 7", "line 8"]
    file.write_bytes(b"id,text\n" + b'1,"never closed\n' + b"2,b\n" * 50_000)
    assert read(file)[0] == "bad_csv"
    assert read(file)[-1] == {"id": "2", "text": "b"}
    file.write_bytes(b"")
    assert read(file) == []


def test_text_that_cannot_be_stored_is_refused_with_its_row(tmp_path):
    header = b"videoid,name,contentUrl,page_dir\n"
    (tmp_path / "results_2M_train.csv").write_bytes(header + b"1,\xff,u,p\n2,b,u,\xffp\n\xff3,c,u,p\n4,d,u,p\n")
    rows = list(open_source("webvid", tmp_path).rows())
    assert [row.refused and row.refused[0] for row in rows] == ["bad_text", "bad_text", "bad_text", None]
    json.dumps([(row.key, row.media, row.refused) for row in rows], ensure_ascii=False).encode()


def test_jsonl_lines_that_are_odd_cost_only_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1000)
    lines = ["{", "[1]", "", json.dumps({"a": "x" * 5000}), "[" * 900, '{"a": 1}', '{"a": NaN}']
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip() + b"\n\xff")
    found = read(path)
    assert found[:5] == ["bad_json", "bad_json", "too_large", "bad_json", {"a": 1}]
    assert found[-1] == "bad_json"
    assert [each.where for each in read_records(path)][:3] == ["line 1", "line 2", "line 4"]


def test_json_lists_are_read_element_by_element_as_far_as_they_go(tmp_path):
    path = write_json(tmp_path / "a.json", [{"a": [1.5, None]}, 3, {"b": {"c": "é"}}])
    assert read(path) == [{"a": [1.5, None]}, "bad_json", {"b": {"c": "é"}}]
    path.write_bytes(b"\xef\xbb\xbf \n" + path.read_bytes()[:-20])
    assert read(path) == [{"a": [1.5, None]}, "bad_json", "bad_json"]
    path.write_bytes(b'[{"a": "\xff"}, {"a": 1}]')
    assert read(path) == [{"a": "\udcff"}, {"a": 1}]
    write_json(path, {"a": 1})
    assert read(path) == [{"a": 1}]
    for broken in (b"", b"[", b"{", b"[1", b"[" * 100_000, b'{"a":' * 100_000, b'[{"a"}, {"b": 1}]'):
        path.write_bytes(broken)
        assert read(path) == ["bad_json"], broken[:10]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_json_lists_are_cut_anywhere_in_reading(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    rows = [{"text": "x" * (i * 7 % 50), "n": i, "of": [{}, 1.25e3, "]", "é"]} for i in range(60)]
    path = tmp_path / "a.json"
    for indent in (None, 1):
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
        assert read(path) == rows
    path.write_text(json.dumps([*rows[:3], 1234567, *rows[3:]]))
    assert read(path) == [*rows[:3], "bad_json", *rows[3:]]
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 200)
    path.write_text(json.dumps([rows[0], {"text": "x" * 5000}, rows[1]]))
    assert read(path) == [rows[0], "bad_json"]


def test_parquet_rows_without_the_bytes_of_pictures(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(
        path, {"images": pictures([b"1" * 100] * 2, None, []), "texts": texts([("a", "b")], None, []), "c": [1] * 3}
    )
    said = {"user": "a", "assistant": "b", "source": "TQA"}
    expected = [
        {"images": [{"path": None}] * 2, "texts": [said]},
        {"images": None, "texts": None},
        {"images": [], "texts": []},
    ]
    assert read(path, ("images", "texts", "absent")) == expected
    path.write_bytes(path.read_bytes()[:-30])
    assert read(path, ("texts",)) == ["broken_parquet"]
    path.write_bytes(b"PAR1")
    assert read(path, ("texts",)) == ["broken_parquet"]


def test_a_damaged_file_among_several_costs_only_its_own_rows(tmp_path):
    for number in range(3):
        columns = {"images": pictures([b"1"], [b"2"]), "texts": texts([("a", "b")], [("c", "d")])}
        write_parquet(tmp_path / "tqa" / f"train-0000{number}.parquet", columns)
    (tmp_path / "tqa" / "train-00001.parquet").write_bytes(b"PAR1 and nothing more PAR1")
    rows = list(open_source("cauldron", tmp_path).rows())
    assert [row.refused and row.refused[0] for row in rows] == [None, None, "broken_parquet", None, None]
    assert "train-00001.parquet" in rows[2].refused[1]


def test_another_kind_of_file_is_an_error(tmp_path):
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"a\.xlsx: expected one of \.csv, \.json, \.jsonl, \.parquet"):
        list(open_source("webvid", tmp_path, manifest=Path("a.xlsx")).rows())


def test_the_digest_follows_the_rows_and_not_the_place(tmp_path):
    def source(folder: str, text: str = "A ring.", **more):
        row = {"image": "a.mp4", "conversations": chat(("human", "What?"), ("gpt", text))}
        write_json(tmp_path / folder / "one.json", [row])
        return open_source("vista", tmp_path / folder, **more)

    assert source("a").digest() == source("b", media=tmp_path / "media").digest()
    assert source("a").digest() != source("b", "A rung.").digest()
    parquet = tmp_path / "p" / "a.parquet"
    digests = set()
    for content in (["a", "b"], ["a", "c"], ["a", "bb"]):
        write_parquet(parquet, {"text": content})
        digests.add(digest_files([parquet], tmp_path))
    (tmp_path / "p" / "b.parquet").write_bytes(b"x")
    digests.add(digest_files([parquet, tmp_path / "p" / "b.parquet"], tmp_path))
    assert len(digests) == 4


def packed_file(folder: Path, rows: int = 23) -> Path:
    groups = [[b"%d-%d" % (row, item) for item in range(1 + row % 3)] for row in range(rows)]
    return write_parquet(folder / "a.parquet", {"images": pictures(*groups), "text": ["a"] * rows}, rows_per_group=10)


def content(reader: PackedMedia, media: str) -> bytes:
    with reader.file(media) as path:
        return Path(path).read_bytes()


@pytest.mark.parametrize("order", ["forward", "backward", "random", "every fifth"])
def test_packed_pictures_in_any_order(tmp_path, order):
    file = packed_file(tmp_path)
    rows = {"forward": range(23), "backward": range(22, -1, -1), "every fifth": range(0, 23, 5)}
    chosen = rows.get(order, np.random.default_rng(0).integers(0, 23, 60).tolist())
    reader = PackedMedia()
    for row in chosen:
        for item in range(1 + row % 3):
            assert content(reader, reference(file, row, "images", item)) == b"%d-%d" % (row, item)


def test_packed_pictures_are_read_in_one_pass(tmp_path, monkeypatch):
    file, opened = packed_file(tmp_path), []
    original = packed._Column._open_group
    monkeypatch.setattr(
        packed._Column, "_open_group", lambda self, group: opened.append(group) or original(self, group)
    )
    reader = PackedMedia()
    for row in range(23):
        content(reader, reference(file, row, "images", 0))
    assert opened == [0, 1, 2]


def test_single_pictures_and_plain_bytes(tmp_path):
    single = pa.array(
        [{"bytes": b"1", "path": "a"}, None, {"bytes": None, "path": "b.jpg"}],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    file = write_parquet(tmp_path / "a.parquet", {"image": single, "raw": pa.array([b"2", b"", None], pa.binary())})
    reader = PackedMedia()
    assert content(reader, reference(file, 0, "image", 0)) == b"1"
    assert content(reader, reference(file, 0, "raw", 0)) == b"2"
    for row, column in [(1, "image"), (2, "image"), (1, "raw"), (2, "raw")]:
        with pytest.raises(MediaError, match="missing_bytes"):
            content(reader, reference(file, row, column, 0))
    assert content(reader, str(file)) == file.read_bytes()  # no reference


def test_references_that_lead_nowhere_say_so(tmp_path, monkeypatch):
    file, reader = packed_file(tmp_path), PackedMedia()
    wrong = [("images", 23, 0), ("images", 0, 1), ("other", 0, 0)]
    for column, row, item in wrong:
        media = reference(file, row, column, item)
        with pytest.raises(MediaError, match="broken_parquet") as caught:
            content(reader, media)
        assert media in caught.value.detail
        assert content(reader, reference(file, 1, "images", 1)) == b"1-1"
    with pytest.raises(MediaError, match="missing_file"):
        content(reader, reference(tmp_path / "none.parquet", 0, "images", 0))
    monkeypatch.setattr(packed, "MAX_GROUP_BYTES", 10)
    with pytest.raises(MediaError, match=r"too_large: .*smaller row groups"):
        content(PackedMedia(), reference(file, 0, "images", 0))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(MediaError, match="broken_parquet"):
        content(PackedMedia(), reference(file, 0, "images", 0))


def test_messages_name_the_reference_and_not_the_copy(tmp_path):
    media = reference(packed_file(tmp_path), 3, "images", 0)
    with pytest.raises(MediaError) as caught, PackedMedia().file(media) as path:
        raise MediaError("broken_picture", f"{path}: no picture")
    assert (caught.value.reason, caught.value.detail) == ("broken_picture", f"{media}: no picture")
    assert not Path(path).exists()


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Rows of a parquet file with 160 MB of pictures, one row group at a time: far below the file."""
    images = pictures(*[[bytes([i]) + bytes(range(250)) * 4000] for i in range(160)])
    pq.write_table(pa.table({"images": images}), tmp_path / "a.parquet", row_group_size=10, compression="none")
    assert (tmp_path / "a.parquet").stat().st_size > 150 << 20
    code = (
        "import sys; from data_prep.packed import PackedMedia, reference\n"
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return int(next(line for line in lines if line.startswith('RssAnon')).split()[1]) >> 10\n"
        "reader, most, before = PackedMedia(), 0, peak()\n"
        "for row in range(160):\n"
        "    with reader.file(reference(sys.argv[1], row, 'images', 0)):\n"
        "        most = max(most, peak() - before)\n"
        "print(most)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.parquet")]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 80, "MiB, for row groups of 10 MB"
