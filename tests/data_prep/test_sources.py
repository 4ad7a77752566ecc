"""The adapters: rows of every published layout, with its traps, exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep.sources import SOURCES, Row, licences, open_source
from tests.data_prep.published import (
    MESSAGES,
    PICTURE,
    chat,
    pictures,
    texts,
    write_csv,
    write_json,
    write_jsonl,
    write_parquet,
)

OPENVID = ["video", "caption", "aesthetic score", "motion score", "temporal consistency score", "camera motion"]
OPENVID += ["frame", "fps", "seconds"]
PUBLISHED = [name for name in SOURCES if name != "folder"]


def rows_of(name: str, folder: Path, **more) -> list[Row]:
    source = open_source(name, folder, **more)
    rows = list(source.rows())
    assert source.count() == len(rows)
    assert len({row.key for row in rows}) == len(rows)
    return rows


def reasons(rows: list[Row]) -> list[str | None]:
    return [row.refused and row.refused[0] for row in rows]


def test_openvid(tmp_path):
    measures = [5.1, 2.2, 0.99, "static", 120, 24.0, 5.0]
    rows = [
        ["celebv_1h_3_0.mp4", 'A man, in a hat,\nsays "hello".', *measures],
        ["no_suffix", "Rain.", *measures],
        ["", "Nobody knows where.", *measures],
        ["../../secret.mp4", "Outside.", *measures],
        ["blank.mp4", "  ", *measures],
    ]
    write_csv(tmp_path / "data" / "train" / "OpenVid-1M.csv", OPENVID, rows)
    write_csv(tmp_path / "data" / "train" / "OpenVidHD.csv", OPENVID, rows)  # holds the same clips again
    read = rows_of("openvid", tmp_path, media=tmp_path / "video")
    prompt = "Write a brief caption for this video."
    assert read[:2] == [
        Row(
            "openvid-0-celebv_1h_3_0",
            (str(tmp_path / "video" / "celebv_1h_3_0.mp4"),),
            {"source": "openvid", "user": prompt, "assistant": 'A man, in a hat,\nsays "hello".'},
        ),
        Row(
            "openvid-1-no_suffix",
            (str(tmp_path / "video" / "no_suffix.mp4"),),
            {"source": "openvid", "user": prompt, "assistant": "Rain."},
        ),
    ]
    assert reasons(read) == [None, None, "bad_path", "bad_path", "empty_text"]
    assert "OpenVid-1M.csv, line 5: " in read[2].refused[1]  # the first caption has two lines
    assert len(rows_of("openvid", tmp_path, manifest=Path("data/train/OpenVidHD.csv"))) == 5


@pytest.mark.parametrize(
    ("file", "order"),
    [
        ("results_2M_train.csv", ["videoid", "name", "page_idx", "page_dir", "duration", "contentUrl"]),
        ("data/train/partitions/0000.csv", ["videoid", "contentUrl", "duration", "page_dir", "name"]),
    ],
)
def test_webvid_in_both_orders_of_columns(tmp_path, file, order):
    given = [
        {
            "videoid": "1053841541",
            "page_dir": "027701_027750",
            "name": "Ring, on a hand",
            "contentUrl": "https://a/b.mp4",
        },
        {"videoid": "7", "page_dir": "", "name": "Rain", "contentUrl": ""},
        {"videoid": "", "page_dir": "000001_000050", "name": "Nameless", "contentUrl": "https://a/c.mp4"},
        {"videoid": "8", "page_dir": "/etc", "name": "Absolute", "contentUrl": "https://a/d.mp4"},
    ]
    more = {"page_idx": "27732", "duration": "PT00H00M17S"}
    write_csv(tmp_path / file, order, [[(row | more)[name] for name in order] for row in given])
    read = rows_of("webvid", tmp_path, media=Path("media"))
    user = {"source": "webvid", "user": "What would be the WebVid caption for this video?"}
    assert read[:2] == [
        Row(
            "webvid-0-1053841541",
            ("media/027701_027750/1053841541.mp4",),
            user | {"assistant": "Ring, on a hand"},
            urls=("https://a/b.mp4",),
        ),
        Row("webvid-1-7", ("media/7.mp4",), user | {"assistant": "Rain"}),
    ]
    assert reasons(read[2:]) == ["bad_path", "bad_path"]


def test_real_webvid_rows(shared_fixtures, tmp_path):
    [row, *rest] = rows_of("webvid", shared_fixtures / "annotations", manifest=Path("webvid__test_webvid.csv"))
    assert len(rest) == 19
    assert not any(each.refused for each in (row, *rest))
    assert row.key == "webvid-0-1053841541"
    assert row.meta["assistant"].startswith("Travel blogger shoot a story on top of mountains.")
    assert row.media == (str(shared_fixtures / "annotations" / "027701_027750" / "1053841541.mp4"),)
    assert row.urls[0].startswith("https://ak.picdn.net/shutterstock/videos/1053841541/preview/")


def scene(number: int, **changes) -> dict:
    caption = {"shot_type": "Medium", "camera_movement": "Pan", "content": f"Scene {number}.", "scene_title": "T"}
    made = {"video_id": "ab-c", "clip_id": f"ab-c-Scene-00{number}", "video_title": "", "caption": caption}
    return made | {"voiceover": [""]} | changes


@pytest.mark.parametrize("layout", ["lines", "videos"])
def test_vript_in_both_publications(tmp_path, layout):
    scenes = [scene(1), scene(2, caption="text"), scene(3, caption={"content": None}), scene(4)]
    if layout == "lines":
        meta = {"meta": {"video_id": "ab-c", "num_clips": 4, "integrity": True}}
        lines = [meta | {name: value for name, value in each.items() if name != "video_id"} for each in scenes]
        write_jsonl(tmp_path / "vript_captions" / "vript_long_videos_captions.jsonl", lines)
    else:
        content = {"meta": {"video_id": "ab-c"}, "data": {each["clip_id"]: each for each in scenes} | {"odd": 3}}
        write_json(tmp_path / "vript_captions" / "vript_long_videos_captions" / "ab-c_caption.json", content)
    read = rows_of("vript", tmp_path, media=Path("clips"))
    prompt = "Provide a detailed narration of what happens in this video."
    assert [read[i] for i in (0, 3)] == [
        Row(
            f"vript-{number - 1}-ab-c-Scene-00{number}",
            (f"clips/ab-c/ab-c-Scene-00{number}.mp4",),
            {"source": "vript", "user": prompt, "assistant": f"Scene {number}."},
        )
        for number in (1, 4)
    ]
    assert reasons(read) == [None, "wrong_type", "missing_field", None] + ["wrong_type"] * (layout == "videos")


def test_sharegpt4video(tmp_path):
    captions = [{"idx": "0", "content": "Part."}, {"idx": "-1", "content": "Whole."}]
    row = {"video_id": "v1", "video_path": "panda/v1.mp4", "zip_folder": "panda/panda_videos_1.zip"}
    lines = [
        row | {"captions": captions},
        row | {"captions": [{"idx": -1, "content": "A number."}]},
        row | {"captions": captions[:1]},
        row | {"captions": "Whole."},
        {"captions": captions},
        "{",
    ]
    write_jsonl(tmp_path / "sharegpt4video_40k.jsonl", lines)
    read = rows_of("sharegpt4video", tmp_path)
    prompt = "Describe what happens in this video in detail."
    assert read[:2] == [
        Row(
            f"sharegpt4video-{number}-v1",
            (str(tmp_path / "panda" / "v1.mp4"),),
            {"source": "sharegpt4video", "user": prompt, "assistant": said},
        )
        for number, said in enumerate(("Whole.", "A number."))
    ]
    assert reasons(read[2:]) == ["missing_field", "wrong_type", "missing_field", "bad_json"]
    assert "there is only 'captions'" in read[4].refused[1]


def test_llava_video(tmp_path):
    subset = tmp_path / "0_30_s_academic_v0_1"
    choice = "Which?\nA. cat\nB. dog\nPlease provide your answer by stating the letter followed by the full option."
    row = {"data_source": "0_30_s_academic_v0_1", "video": "academic_source/a.mp4"}
    turns = chat(("human", f"<image>\n{choice}"), ("gpt", "B. dog"), ("human", "Is <image> a tag?"), ("gpt", "Yes."))
    rows = [
        row | {"id": "sharegpt4v-1", "conversations": chat(("human", "<image>\nWhat?"), ("gpt", "A ring."))},
        row | {"conversations": turns},
        row | {"id": 3, "conversations": chat(("human", "What?\n<image>"), ("gpt", "A ring."))},
        row | {"id": 4, "conversations": chat(("gpt", "A ring."))},
        row | {"id": 5, "conversations": chat(("human", "What?"), ("gpt", "A ring."), ("human", "And?"))},
        row | {"id": 6, "conversations": chat(("user", "What?"), ("gpt", "A ring."))},
        row | {"id": 7, "conversations": chat(("human", 3), ("gpt", "A ring."))},
        row | {"id": 8, "video": "v_frames", "conversations": chat(("human", "What?"), ("gpt", "A ring."))},
        row | {"id": 9},
        "not an object",
    ]
    write_json(subset / "0_30_s_academic_v0_1_cap_processed.json", rows)
    read = rows_of("llava_video", tmp_path, media=Path("videos"))
    media, common = ("videos/0_30_s_academic_v0_1/academic_source/a.mp4",), {"source": "llava_video"}
    tags = {"tags": ["0_30_s_academic_v0_1"]}
    exchanges = [{"user": choice, "assistant": "B. dog"}, {"user": "Is <image> a tag?", "assistant": "Yes."}]
    once = common | {"user": "What?", "assistant": "A ring."} | tags
    assert read[:3] == [
        Row("llava_video-0-sharegpt4v-1", media, once),
        Row("llava_video-1", media, common | {"turns": exchanges} | tags),
        Row("llava_video-2-3", media, once),
    ]
    assert reasons(read[3:]) == ["bad_turns"] * 3 + ["wrong_type", "frame_folder", "bad_turns", "bad_json"]
    assert "item 3" in read[3].refused[1]


def test_vista(tmp_path):
    said = chat(("human", "When?"), ("gpt", "At noon."))
    rows = [{"image": "a b.mp4", "conversations": said}, {"video": "c.mp4", "conversations": said}, {"text": "Noon."}]
    write_json(tmp_path / "temporal_niah_qa.json", rows)
    write_json(tmp_path / "spatial_niah_mcq.json", rows[:1])
    read = rows_of("vista", tmp_path)
    meta = {"source": "vista", "user": "When?", "assistant": "At noon."}
    assert read[:3] == [
        Row("vista-0", (str(tmp_path / "spatial_niah_mcq" / "a b.mp4"),), meta | {"tags": ["spatial_niah_mcq"]}),
        Row("vista-1", (str(tmp_path / "temporal_niah_qa" / "a b.mp4"),), meta | {"tags": ["temporal_niah_qa"]}),
        Row("vista-2", (str(tmp_path / "temporal_niah_qa" / "c.mp4"),), meta | {"tags": ["temporal_niah_qa"]}),
    ]
    assert read[3].refused[0] == "missing_field"


def test_cauldron(tmp_path):
    file = tmp_path / "tqa" / "train-00000-of-00001-abc.parquet"
    asked = "Question: How many?\nChoices:\nA. 6.\nB. 4.\nAnswer with the letter."
    columns = {
        "images": pictures([b"1"], [b"2", b"3"], [], None, [b"4"], [b"5"], [b"6"]),
        "texts": texts(
            [(asked, "Answer: D"), ("Why?", "So.")],
            [("<image>\n<image>\nSame?", "No.")],
            [("What?", "A ring.")],
            [("What?", "A ring.")],
            [],
            [("What?", None)],
            [("What?", "  ")],
        ),
    }
    write_parquet(file, columns)
    read = rows_of("cauldron", tmp_path)
    assert read[:2] == [
        Row(
            "cauldron-0",
            (f"{file}#row=0&column=images&item=0",),
            {
                "source": "cauldron",
                "turns": [{"user": asked, "assistant": "Answer: D"}, {"user": "Why?", "assistant": "So."}],
                "tags": ["tqa"],
            },
        ),
        Row(
            "cauldron-1",
            (f"{file}#row=1&column=images&item=0", f"{file}#row=1&column=images&item=1"),
            {"source": "cauldron", "user": "Same?", "assistant": "No.", "tags": ["tqa"]},
        ),
    ]
    assert reasons(read[2:]) == ["missing_media", "missing_media", "bad_turns", "missing_field", "empty_text"]
    assert f"{file}, row 2" in read[2].refused[1]


def test_smoltalk(tmp_path, shared_fixtures):
    real = json.loads((shared_fixtures / "annotations" / "smoltalk_everyday_conversations__row.json").read_text())
    roles = {"role": "role", "content": "content"}
    summary = chat(("system", "Summarise."), ("user", "Long."), ("assistant", "Short."), **roles)
    messages = [
        real["messages"],
        summary,
        chat(("user", "<image> is what tag?"), ("assistant", "HTML."), **roles),
        chat(("system", "Alone."), **roles),
        chat(("user", "No answer."), **roles),
        [],
    ]
    sources = ["everyday-conversations", "smol-summarize", "numina-cot-100k", None, None, None]
    columns = {"messages": pa.array(messages, MESSAGES), "source": pa.array(sources)}
    write_parquet(tmp_path / "data" / "all" / "train-00000-of-00009.parquet", columns)
    write_parquet(tmp_path / "data" / "all" / "test-00000-of-00001.parquet", columns)
    write_parquet(
        tmp_path / "data" / "smol-summarize" / "train-00000-of-00001.parquet", {"messages": columns["messages"]}
    )
    read = rows_of("smoltalk", tmp_path)
    asked, answered = (real["messages"][i::2] for i in (0, 1))
    turns = [{"user": a["content"], "assistant": b["content"]} for a, b in zip(asked, answered, strict=True)]
    assert read[:3] == [
        Row("smoltalk-0", (), {"source": "smoltalk", "turns": turns, "tags": ["everyday-conversations"]}),
        Row(
            "smoltalk-1",
            (),
            {"source": "smoltalk", "user": "Summarise.\n\nLong.", "assistant": "Short.", "tags": ["smol-summarize"]},
        ),
        Row(
            "smoltalk-2",
            (),
            {
                "source": "smoltalk",
                "user": "<image> is what tag?",
                "assistant": "HTML.",
                "tags": ["numina-cot-100k", "chain_of_thought"],
            },
        ),
    ]
    assert reasons(read[3:]) == ["bad_turns"] * 3
    (tmp_path / "data" / "all").rename(tmp_path / "elsewhere")
    assert rows_of("smoltalk", tmp_path)[1].meta["tags"] == ["smol-summarize"]  # by its folder


def test_rlaif_v(tmp_path):
    file = tmp_path / "RLAIF-V-Dataset_000.parquet"
    columns = {
        "ds_name": ["RLAIF-V"] * 4,
        "image": pa.array([{"bytes": b"1", "path": "a.jpg"}] * 3 + [None], PICTURE),
        "question": ["What?", "What?", None, "What?"],
        "chosen": ["A ring.", "Same.", "A ring.", "A ring."],
        "rejected": ["A rung.", "Same. ", "A rung.", "A rung."],
        "origin_dataset": ["COCO", "", None, "VQAv2"],
        "origin_split": ['{"model": "m", "type": "qa"}', "{", "", "null"],  # JSON strings, and what passes for them
        "idx": ["10", "11", "12", "13"],
        "image_path": ["a.jpg"] * 4,
    }
    write_parquet(file, columns)
    read = rows_of("rlaif_v", tmp_path)
    meta = {"source": "rlaif_v", "user": "What?", "chosen": "A ring.", "rejected": "A rung.", "tags": ["COCO"]}
    assert read[0] == Row("rlaif_v-0-10", (f"{file}#row=0&column=image&item=0",), meta)
    assert reasons(read[1:]) == ["same_answers", "missing_field", "missing_media"]


def test_every_source_says_what_it_may_be_used_for():
    for name, terms in licences(PUBLISHED).items():
        assert terms["licence"], name
        assert "arXiv:" in terms["citation"], name
        assert terms["homepage"].startswith("https://"), name
    assert licences(["mine", "openvid"]) == {
        "mine": {"licence": "as of the files in the folder", "citation": "", "homepage": ""},
        "openvid": licences(["openvid"])["openvid"],
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_folder_without_the_files_says_what_was_expected(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"no annotation file of {name} in .*: expected .*https://"):
        open_source(name, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"mine\.csv does not exist"):
        open_source(name, tmp_path, manifest=Path("mine.csv"))
