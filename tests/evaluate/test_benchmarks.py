"""Benchmarks in their published layouts: read, asked, and nothing missing or broken scored silently."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from fvlm.data.errors import SampleError
from fvlm.evaluate.benchmarks import media
from fvlm.evaluate.benchmarks.base import choose
from fvlm.evaluate.benchmarks.catalogue import READERS, open_benchmark
from fvlm.evaluate.benchmarks.media import ClipFile
from fvlm.evaluate.items import Presentation
from fvlm.model import build_model, tiny_config
from fvlm.schema import ConfigError
from tests.data.drawn_videos import at_rate, draw, grey, numbers

CANDIDATES = ["Ate the medicine.", "Tidied up the blanket.", "Put down the cup/glass/bottle.", "Took the box."]


@pytest.fixture(scope="module")
def small(tokenizer):
    torch.manual_seed(0)
    return build_model(tiny_config(len(tokenizer))).eval()


@pytest.fixture
def opened(tmp_path, tokenizer) -> Callable:
    def find(name: str, **options):
        return open_benchmark(name, tmp_path, tokenizer, Presentation(image_size=56, looks=2), **options)

    return find


def write_json(path: Path, contents) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents))


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def film(path: Path, frames: int = 12, rate: float = 2) -> Path:
    """A video of frames / rate seconds whose frame i is in the i-th grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, at_rate(frames, rate), size=(64, 48), scene=grey)
    return path


def picture(path: Path, level: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 60), (level, level, level)).save(path)
    return path


def videomme_row(number: int, video: str, **changes) -> dict:
    row = {"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Biology"}
    row |= {"url": f"https://www.youtube.com/watch?v={video}", "videoID": video, "question_id": f"001-{number}"}
    row |= {"task_type": "Counting", "question": "How many cups?", "answer": "B"}
    return row | {"options": ["A. One.", "B. Two.", "C. Three.", "D. Four."]} | changes


def run(benchmark, model) -> dict:
    answers, skipped = benchmark.run(model, device="cpu")
    return benchmark.figures(answers, skipped)


def test_videomme_with_missing_and_broken_videos(tmp_path, opened, small):
    place = tmp_path / "videomme"
    film(place / "data" / "abcdefghijk.mp4")
    (place / "data" / "brokenbroke.mp4").write_bytes(b"no video at all")
    rows = [
        videomme_row(1, "abcdefghijk"),
        videomme_row(2, "abcdefghijk", question="Which one?", task_type="OCR"),
        videomme_row(3, "not-hereeee", duration="long"),
        videomme_row(4, "brokenbroke", duration="medium"),
        videomme_row(5, "abcdefghijk", answer="F"),
    ]
    (place / "videomme").mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), place / "videomme" / "test-00000-of-00001.parquet")
    benchmark = opened("videomme")
    assert [question.options for question in benchmark.questions] == [("One.", "Two.", "Three.", "Four.")] * 2
    assert [question.answers for question in benchmark.questions] == [(1,), (1,)]
    found = run(benchmark, small)
    assert found["prompt"] == (
        "How many cups?\nA. One.\nB. Two.\nC. Three.\nD. Four.\nAnswer with the text of the right option."
    )
    overall = found["overall"]
    assert (overall["asked"], overall["missing"], overall["broken"], overall["n"]) == (4, 1, 1, 2)
    assert overall["accuracy_of_asked"] == overall["accuracy"] * 2 / 4
    assert found["by_duration"]["long"] == {"asked": 1, "missing": 1, "broken": 0, "accuracy_of_asked": 0}
    assert found["by_duration"]["medium"]["broken"] == 1
    assert found["by_task"]["Counting"]["n"] == found["by_task"]["OCR"]["n"] == 1
    assert found["not_asked"] == {"bad_answer": 1}
    assert found["skipped"] == {"missing_file": 1, "unknown_format": 1}
    assert json.loads(json.dumps(found)) == found


def test_videomme_as_it_was_before(tmp_path, opened):
    """A row a video, with its questions inside, other names, and the video's name in its address alone."""
    film(tmp_path / "videomme" / "video" / "abcdefghijk.mp4")
    question = {"question_id": "7-1", "task_type": "t", "question": "q?", "options": ["A. x", "B. y"], "answer": "A"}
    row = {"id": 7, "duration_category": "medium", "video_category": "Sports", "url": "https://youtu.be/abcdefghijk"}
    write_json(
        tmp_path / "videomme" / "test.json", [row | {"questions": [question, question | {"question_id": "7-2"}]}]
    )
    benchmark = opened("videomme")
    assert [question.request.key for question in benchmark.questions] == ["7-1", "7-2"]
    assert benchmark.rows[0].groups == {"duration": "medium", "task": "t", "domain": "Sports"}


def test_a_clip_breaks_while_it_is_read(tmp_path, opened, small):
    path = film(tmp_path / "videomme" / "data" / "abcdefghijk.mp4", frames=48)
    write_lines(tmp_path / "videomme" / "rows.jsonl", [videomme_row(1, "abcdefghijk"), videomme_row(2, "not-hereeee")])
    benchmark = opened("videomme")
    media.read_frames.cache_clear()
    path.write_bytes(path.read_bytes()[:200])
    overall = run(benchmark, small)["overall"]
    assert overall == {"asked": 2, "missing": 1, "broken": 1, "accuracy_of_asked": 0}


def test_mvbench_segments_folders_of_frames_and_parts(tmp_path, opened):
    place = tmp_path / "mvbench"
    row = {"question": "What happened?", "candidates": CANDIDATES, "answer": CANDIDATES[3]}
    star = place / "video" / "star" / "Charades_v1_480"
    film(star / "ABCDE.mp4", frames=20)
    film(star / "FGHIJ_1.5_4.5.mp4", frames=6)
    sequence = [
        row | {"video": "ABCDE.mp4", "start": 4.0, "end": 8.0},
        row | {"video": "FGHIJ.mp4", "start": 1.5, "end": 4.5},
        row | {"video": "ABCDE.mp4", "start": 30.0, "end": 40.0},
        row | {"video": "ABCDE.mp4", "start": 1.0, "end": 2.0, "answer": "Nothing of this."},
    ]
    write_json(place / "json" / "action_sequence.json", sequence)
    frames = place / "video" / "tvqa" / "frames_fps3_hq" / "friends_s01"
    for number in range(18):
        picture(frames / f"{number + 1:05d}.jpg", 10 + 5 * number)
    write_json(place / "json" / "episodic_reasoning.json", [row | {"video": "friends_s01", "start": 2, "end": 5}])
    benchmark = opened("mvbench")
    first, part, folder = benchmark.questions
    assert numbers(first.item.read_frames().transpose(0, 2, 3, 1)) == [9, 11, 13, 15]
    assert part.item.num_frames == 3
    assert folder.item.num_frames == 3
    assert numbers(folder.item.read_frames().transpose(0, 2, 3, 1)) == [7, 10, 13]
    assert first.options == tuple(CANDIDATES)
    assert first.answers == (3,)
    assert benchmark.skipped == {"bad_segment": 1}
    assert benchmark.not_asked == {"bad_answer": 1}
    assert benchmark.rows[0].groups == {"task": "action_sequence"}


def test_mlvu_leaves_tasks_without_candidates_out(tmp_path, opened, small):
    place = tmp_path / "mlvu"
    film(place / "video" / "4_count" / "count_1.mp4")
    row = {"video": "count_1.mp4", "duration": 6.0, "question": "How often?", "question_type": "count"}
    write_json(place / "json" / "4_count.json", [row | {"candidates": ["1", "2", "10"], "answer": "10"}, row])
    write_json(place / "json" / "9_summary.json", [row | {"answer": "A long story.", "question_type": "summary"}])
    benchmark = opened("mlvu")
    found = run(benchmark, small)
    assert found["overall"]["n"] == found["by_task"]["count"]["asked"] == 1
    assert found["not_asked"] == {"no_candidates": 2}
    assert benchmark.questions[0].answers == (2,)


def test_pope_asks_yes_or_no(tmp_path, opened, small):
    picture(tmp_path / "pope" / "val2014" / "COCO_1.jpg")
    rows = [
        {"question_id": n, "image": image, "text": "Is there a cup in the image?", "label": label}
        for n, image, label in ((1, "COCO_1.jpg", "yes"), (2, "COCO_1.jpg", "no"), (3, "COCO_2.jpg", "no"))
    ]
    write_lines(tmp_path / "pope" / "coco_pope_random.json", rows)
    write_lines(tmp_path / "pope" / "coco_pope_popular.json", [rows[0] | {"label": "maybe"}, rows[1]])
    benchmark = opened("pope")
    found = run(benchmark, small)
    assert found["prompt"] == "Is there a cup in the image?\nAnswer yes or no."
    assert {name: (g["asked"], g["n"]) for name, g in found["by_task"].items()} == {"popular": (1, 1), "random": (3, 2)}
    assert found["overall"]["missing"] == 1
    assert found["not_asked"] == {"bad_answer": 1}
    assert benchmark.questions[0].item.meta["kind"] == "image"
    answers, skipped = benchmark.run(small, device="cpu")
    said = [dataclasses.replace(answer, choices=(choice,)) for answer, choice in zip(answers, (0, -1, 0), strict=True)]
    right = [answer.question.answers for answer in answers]
    assert right == [(1,), (0,), (1,)]  # the first file's question, then two of the second's
    overall = benchmark.figures(said, skipped)["overall"]
    assert {name: overall[name] for name in ("precision", "recall", "f1", "yes")} == {
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "yes": pytest.approx(2 / 3),
    }
    said = [dataclasses.replace(answer, choices=(0,)) for answer in answers]
    by_split = benchmark.figures(said, skipped)["by_task"]
    assert [by_split["random"][name] for name in ("precision", "recall", "yes")] == [0.5, 1.0, 1.0]
    assert by_split["random"]["f1"] == pytest.approx(2 / 3)


def test_scienceqa_with_and_without_pictures(tmp_path, opened, small):
    picture(tmp_path / "scienceqa" / "images" / "test" / "11" / "image.png")
    problem = {"question": "Which is warm?", "choices": ["ice", "fire"], "answer": 1, "hint": "", "image": None}
    problem |= {"subject": "natural science", "grade": "grade3", "split": "test", "task": "closed choice"}
    problems = {
        "11": problem | {"image": "image.png"},
        "12": problem | {"hint": "Fire burns."},
        "13": problem | {"split": "train"},
        "14": problem | {"image": "image.png"},
        "15": problem | {"answer": 2},
    }
    write_json(tmp_path / "scienceqa" / "problems.json", problems)
    benchmark = opened("scienceqa")
    found = run(benchmark, small)
    assert {name: (g["asked"], g["missing"]) for name, g in found["by_context"].items()} == {
        "picture": (2, 1),
        "text": (1, 0),
    }
    assert found["not_asked"] == {"bad_answer": 1}
    assert benchmark.rows[1].prompt.startswith("Fire burns.\nWhich is warm?\nA. ice\nB. fire\n")
    assert [question.item.meta["kind"] for question in benchmark.questions] == ["image", "text"]


def test_questions_about_one_clip_share_its_frames(tmp_path, opened, small, monkeypatch):
    film(tmp_path / "videomme" / "data" / "abcdefghijk.mp4")
    write_lines(tmp_path / "videomme" / "rows.jsonl", [videomme_row(n, "abcdefghijk") for n in range(3)])
    seen = []
    forward = type(small).forward
    monkeypatch.setattr(type(small), "forward", lambda self, **kw: (seen.append(kw["batch"]), forward(self, **kw))[1])
    run(opened("videomme"), small)
    assert [len(batch.visual_frame.unique()) for batch in seen] == [6]


def test_limits_and_refusals(tmp_path, opened):
    with pytest.raises(ConfigError, match="--benchmark-data: no folder"):
        opened("mlvu")
    for name in READERS:
        (tmp_path / name).mkdir()
        with pytest.raises(ConfigError, match=str(tmp_path / name)):
            opened(name)
    write_json(tmp_path / "mvbench" / "json" / "new_task.json", [])
    with pytest.raises(ConfigError, match="new_task is no task of MVBench"):
        opened("mvbench")
    write_lines(tmp_path / "videomme" / "rows.jsonl", [videomme_row(n, "not-hereeee") for n in range(5)])
    benchmark = opened("videomme", most_questions=3)
    assert [row.key for row in benchmark.rows] == ["001-0", "001-2", "001-4"]


@pytest.mark.parametrize(
    ("options", "answer", "by_letter", "expected"),
    [
        (["A. B", "B. A"], "A", True, (("B", "A"), 0)),
        (["A. B", "B. A"], "A", False, (("B", "A"), 1)),
        (["A. B", "B. A"], "A. B", True, (("B", "A"), 0)),
        (["(A) one", "(B) two"], "(B)", True, (("one", "two"), 1)),
        (["A. one", "two"], "two", True, (("A. one", "two"), 1)),
        (["one", "two", "one"], "two", False, (("one", "two", "one"), 1)),
    ],
)
def test_answers_are_letters_or_texts(options, answer, by_letter, expected):
    assert choose(options, answer, by_letter=by_letter) == expected


@pytest.mark.parametrize(
    ("options", "answer"),
    [(["one", "one"], "one"), (["one", "two"], "three"), (["one"], "one"), (["one", 2], "one"), (["one", "two"], 1)],
)
def test_answers_that_name_no_option_are_refused(options, answer):
    with pytest.raises(SampleError, match=r"bad_(options|answer)"):
        choose(options, answer, by_letter=False)


def test_clips_that_are_animations_or_folders_without_frames(tmp_path):
    stills = [Image.fromarray(np.full((60, 60, 3), level, np.uint8)) for level in (0, 80, 160)]
    stills[0].save(tmp_path / "three.gif", save_all=True, append_images=stills[1:], duration=1000)
    clip = ClipFile(path=tmp_path / "three.gif")
    assert media.probe(clip) == ("video", 3)
    assert media.read_frames(clip, 3, 56)[:, 0, 0, 0].tolist() == [0, 80, 160]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no_frames"):
        media.probe(ClipFile(path=tmp_path / "empty"))
