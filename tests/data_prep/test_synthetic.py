"""The synthetic corpus: answers that the pictures bear out, a held-out split that is held, files that do not vary."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.synthetic.__main__ import main, mix
from data_prep.synthetic.combinations import HELD_OUT, Combination
from data_prep.synthetic.corpus import DEFAULT_MIX, Corpus, draft, write_corpus
from data_prep.synthetic.draw import ARROWS, BACKGROUNDS, COLOURS, GRID, SHAPES, Scene, Thing, coverage, write_clip
from data_prep.synthetic.families import FAMILIES
from data_prep.synthetic.questions import vocabulary
from fvlm.data.chat import load_tokenizer
from fvlm.data.video import decode_jpeg, encode_jpeg, read_media

ANSWERS = ("assistant", "chosen", "rejected")
EVERY = dict.fromkeys(FAMILIES, 1.0)


def corpus(**changes) -> Corpus:
    return Corpus(**({"clips": 40, "val_clips": 20, "mix": EVERY} | changes))


def drafts(family: str, split: str = "train", count: int = 60, **changes):
    return [draft(corpus(mix={family: 1.0}, clips=count, **changes), split, index) for index in range(count)]


def at(scene: Scene) -> dict[tuple[int, int], Thing]:
    """What stands in each cell."""
    things = {(round(thing.row), round(thing.column)): thing for thing in scene.things}
    assert len(things) == len(scene.things)
    return things


def only(scene: Scene, **wanted) -> Thing:
    [thing] = [t for t in scene.things if all(getattr(t, name) == value for name, value in wanted.items())]
    return thing


# Oracles: each finds the answer in the scenes alone, and the cells that a follower looks at.


def cue_oracle(scenes, row):
    first = scenes[0].things[0]
    found = [only(scene, colour=first.colour) for scene in scenes[1:]]
    return [thing.shape for thing in found], [first, *found]


def cue_shape_oracle(scenes, row):
    first = scenes[0].things[0]
    found = [only(scene, shape=first.shape) for scene in scenes[1:]]
    return [thing.colour for thing in found], [first, *found]


def cue_place_oracle(scenes, row):
    [(cell, first)] = at(scenes[0]).items()
    found = [at(scene)[cell] for scene in scenes[1:]]
    return [thing.shape for thing in found], [first, *found]


def relay_oracle(scenes, row):
    [cell] = at(scenes[0])
    path = []
    for scene in scenes:
        thing = at(scene)[cell]
        path.append(thing)
        if thing.shape in ARROWS:
            cell = (cell[0] + ARROWS[thing.shape][0], cell[1] + ARROWS[thing.shape][1])
    assert [thing.shape in ARROWS for thing in path] == [True] * (len(scenes) - 1) + [False]
    return [path[-1].shape], path


def tracking_oracle(scenes, row):
    [marked] = [colour for colour, count in Counter(t.colour for t in scenes[0].things).items() if count == 1]
    assert f"the {marked} shape" in row["user"]
    path = [only(scenes[0], colour=marked)]
    for scene in scenes[1:]:
        near = [t for t in scene.things if abs(t.row - path[-1].row) + abs(t.column - path[-1].column) <= 1]
        assert len(near) == 1, "a picture a second has to be enough"
        path.append(near[0])
    last = path[-1]
    words = f"row {last.row + 1} column {last.column + 1}"
    return [words if "Where" in row["user"] else last.shape], path


def ask_oracle(scenes, row):
    place = re.search(r"row (\d) column (\d)", row["user"])
    if place:
        found = [at(scene)[int(place[1]) - 1, int(place[2]) - 1] for scene in scenes]
    else:
        [colour] = set(re.findall(r"\w+", row["user"])) & set(COLOURS)
        found = [only(scene, colour=colour) for scene in scenes]
    return [thing.shape for thing in found], found


def asked_oracle(scenes, row):
    number = re.search(r"picture (\d+)", row["user"])
    index = int(number[1]) - 1 if number else 0
    place = re.search(r"row (\d) column (\d)", row["user"])
    if place:
        found = at(scenes[index])[int(place[1]) - 1, int(place[2]) - 1]
    else:
        [colour] = set(re.findall(r"\w+", row["user"])) & set(COLOURS)
        found = only(scenes[index], colour=colour)
    return [found.shape], [found if i == index else None for i in range(len(scenes))]


ORACLES = {
    "cue": cue_oracle,
    "cue_shape": cue_shape_oracle,
    "cue_place": cue_place_oracle,
    "relay": relay_oracle,
    "tracking": tracking_oracle,
    "ask": ask_oracle,
    "still": asked_oracle,
    "images": asked_oracle,
}


@pytest.mark.parametrize("difficulty", [1, 2, 3])
@pytest.mark.parametrize("family", ORACLES)
def test_answers_are_in_the_pictures(family, difficulty):
    for split in ("train", "val"):
        for made in drafts(family, split, 30, difficulty=difficulty):
            for row in made.rows:
                answers, followed = ORACLES[family](made.scenes, row)
                picture = re.search(r"in picture (\d+)\?", row["user"])
                if row["source"].endswith("_mc"):
                    answers = [answers[int(picture[1]) - (1 if family == "ask" else 2)]]
                assert row["assistant"] == " ".join(answers)
                assert row["look_at"] == [t and [round(t.row), round(t.column)] for t in followed]
                if "options" in row:
                    assert row["options"][row["answer"]] == row["assistant"]
                    assert len(set(row["options"])) == len(row["options"]) > 1
                if "narration" in row and family.startswith(("cue", "ask")):
                    said = [f" {answer}" for answer in answers]
                    assert row["narration"] == [""] * (len(made.scenes) - len(said)) + said
                    assert ("stream" in row) == (family != "ask"), "without its question nobody could tell"
                if "narration" in row:
                    assert len(row["narration"]) == len(made.scenes)
                    assert answers[-1] in row["narration"][-1] or row["source"].endswith("_mc")


@pytest.mark.parametrize("split", ["train", "val"])
def test_preferences_are_between_the_answer_and_another(split):
    for made in drafts("preference", split, 60):
        [row] = made.rows
        answers, followed = cue_oracle(made.scenes, row)
        assert row["chosen"].split() == answers
        assert row["look_at"] == [[round(t.row), round(t.column)] for t in followed]
        said = row["rejected"].split()
        assert len(said) == len(answers)
        assert set(said) <= set(SHAPES)
        assert said != answers
        assert "assistant" not in row


def test_captions_say_what_is_shown():
    for made in drafts("caption"):
        first, second = made.scenes[0].things
        [background] = [name for name, colour in BACKGROUNDS.items() if colour == made.scenes[0].background]
        relation = "above" if first.row < second.row else "left of"
        assert (first.column < second.column) == (relation == "left of")
        said = (
            f"A {first.colour} {first.shape} {relation} a {second.colour} {second.shape} on a {background} background."
        )
        assert [row["assistant"] for row in made.rows] == [said]
        assert len(set(made.scenes)) == 1


def test_texts_have_right_answers():
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    seen = Counter()
    for made in drafts("text", count=300):
        [row] = made.rows
        user, answer = row["user"], row["assistant"]
        words = re.findall(r"\w+", user)
        values = [numbers.index(word) for word in words if word in numbers]
        if "after" in words:
            assert values[0] + 1 == numbers.index(answer)
        elif "What is" in user and values:
            assert sum(values) == numbers.index(answer)
        elif "last of" in user:
            assert answer == words[-1]
        elif "again" in words:
            assert user.endswith(f": {answer}.")
        elif "colour or a shape" in user:
            assert answer == ("a colour" if words[1] in COLOURS else "a shape")
        else:
            assert {words[-1], answer} in [set(p) for p in (("up", "down"), ("left", "right"), ("top", "bottom"))] + [
                {"first", "last"},
                {"start", "end"},
            ]
        seen[words[0] + words[1]] += 1
        assert made.medium == "text"
        assert made.scenes == ()
    assert len(seen) >= 5


@pytest.mark.parametrize("family", [*ORACLES])
def test_training_never_shows_a_held_out_combination(family):
    def shown(made, cells):
        return {
            Combination(t.colour, t.shape, round(t.row) * GRID + round(t.column))
            for scene in made.scenes
            for t in scene.things
            if cells is None or [round(t.row), round(t.column)] in cells
        }

    for difficulty in (1, 3):
        for made in drafts(family, "train", difficulty=difficulty):
            assert not shown(made, None) & HELD_OUT
            assert not any("tags" in row for row in made.rows)
        for made in drafts(family, "val", difficulty=difficulty):
            row = made.rows[0]
            assert row["tags"] == ["held_out"]
            assert shown(made, [cell for cell in row["look_at"] if cell]) & HELD_OUT
    assert 0.05 < len(HELD_OUT) / (len(COLOURS) * len(SHAPES) * GRID**2) < 0.15


def test_answers_cannot_be_guessed():
    """Shapes, colours and places are spread evenly, in the training split too, where combinations are missing."""
    answers = Counter(word for made in drafts("cue", count=400) for word in made.rows[0]["assistant"].split())
    assert set(answers) == set(SHAPES)
    assert max(answers.values()) < 1.3 * sum(answers.values()) / len(SHAPES)
    picked = Counter(row["answer"] for made in drafts("relay", count=400) for row in made.rows)
    assert max(picked.values()) < 1.6 * 400 / len(SHAPES)


def test_every_word_is_short_and_known():
    words = vocabulary()
    tokenizer = load_tokenizer("tiny")
    for family in FAMILIES:
        for made in drafts(family, "val", 40):
            for row in made.rows:
                said = [
                    row["user"],
                    *(row[name] for name in ANSWERS if name in row),
                    *row.get("narration", []),
                    *row.get("options", []),
                ]
                assert set(re.findall(r"[A-Za-z]+", " ".join(said))) <= words
    known = [word for word in words if word.islower()]
    assert [word for word in known if len(tokenizer.encode(f" {word}", add_special_tokens=False)) != 1] == []


def nearest(frame: np.ndarray, background, shapes) -> dict[tuple[int, int], tuple[str, str]]:
    """Shape and colour in each cell of a frame uint8 [H, W, 3] by the nearest template; empty cells left out."""
    cell = frame.shape[0] // GRID
    templates = {
        (shape, colour): coverage(shape, cell)[..., None] * np.array(rgb)
        + (1 - coverage(shape, cell)[..., None]) * np.array(background)
        for shape, (colour, rgb) in itertools.product(shapes, COLOURS.items())
    }
    names, stack = list(templates), np.stack(list(templates.values()))
    found = {}
    for row, column in itertools.product(range(GRID), repeat=2):
        part = frame[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell].astype(float)
        if np.abs(part - background).mean() > 10:
            found[row, column] = names[int(((stack - part) ** 2).sum(axis=(1, 2, 3)).argmin())]
    return found


@pytest.mark.parametrize("size", [56, 224])
@pytest.mark.parametrize("family", ["cue", "relay", "tracking"])
def test_glyphs_survive_h264_scaling_and_jpeg(tmp_path, family, size):
    """A classifier that compares with templates reads every glyph of every prepared frame."""
    for number, made in enumerate(drafts(family, count=6)):
        path = tmp_path / f"{number}.mp4"
        write_clip(path, made.scenes, 224, 2)
        media = read_media(path, size)
        assert len(media.frames) == len(made.scenes)
        assert media.duration == len(made.scenes)
        for frame, scene in zip(media.frames, made.scenes, strict=True):
            prepared = decode_jpeg(encode_jpeg(frame), size).transpose(1, 2, 0)
            expected = {cell: (thing.shape, thing.colour) for cell, thing in at(scene).items()}
            assert nearest(prepared, scene.background, (*SHAPES, *ARROWS)) == expected


def test_objects_move_smoothly_between_pictures():
    """Where a scene ends, the next one begins; in the middle of a scene every object is in its cell."""
    for made in drafts("tracking", count=8):
        for now, later in itertools.pairwise(made.scenes):
            for thing, same in zip(now.things, later.things, strict=True):
                end, start = thing.place(1.0), same.place(0.0)
                assert end == pytest.approx(start)
                assert thing.place(0.5) == (thing.row, thing.column)


def test_the_mix_is_kept_in_every_stretch():
    made = corpus(mix=DEFAULT_MIX, clips=5000)
    for start in (0, 1234, 4000):
        counts = Counter(made.family(index) for index in range(start, start + 1000))
        for family, share in DEFAULT_MIX.items():
            assert counts[family] == pytest.approx(1000 * share, abs=10)
    assert sum(DEFAULT_MIX.values()) == pytest.approx(1)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_files_do_not_depend_on_the_number_of_processes(tmp_path):
    asked = corpus(clips=130, val_clips=20, frames=3)
    first = write_corpus(asked, tmp_path / "one", workers=1)
    second = write_corpus(asked, tmp_path / "two", workers=2)
    assert first == second
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    again = write_corpus(corpus(clips=130, val_clips=20, frames=3, seed=1), tmp_path / "other", workers=1)
    assert again["settings"] != first["settings"]
    assert digests(tmp_path / "other") != digests(tmp_path / "one")


def test_manifests_lead_to_files_and_keys_are_unique(tmp_path):
    summary = write_corpus(corpus(), tmp_path, workers=1)
    for split in ("train", "val"):
        rows = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        assert Counter(row["source"] for row in rows) == summary["rows"][split]["by_source"]
        assert len({row["key"] for row in rows}) == len(rows)
        for row in rows:
            media = row.get("media", [])
            media = [media] if isinstance(media, str) else media
            assert bool(media) == (row["source"] != "synthetic/text")
            for path in media:
                assert (tmp_path / path).is_file()
                if not path.endswith("mp4"):
                    assert Image.open(tmp_path / path).size == (224, 224)
    chance = summary["rows"]["val"]["chance_level"]
    assert chance["synthetic/cue_mc"] == 1 / 8
    assert (
        summary["rows"]["val"]["by_source"]["synthetic/cue"] == summary["rows"]["val"]["by_source"]["synthetic/cue_mc"]
    )


def test_a_second_run_leaves_the_corpus_or_refuses(tmp_path, capsys):
    command = ["--out", str(tmp_path), "--clips", "3", "--mix", "still,text", "--workers", "1"]
    assert main(command) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert main([*command, "--seed", "1"]) == 1
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--mix", "cue=0.5,chess=0.5"], "chess"),
        (["--mix", "cue=-1"], "mix"),
        (["--clips", "0"], "clips"),
        (["--size", "100"], "size"),
        (["--frames", "1"], "frames"),
        (["--difficulty", "4"], "difficulty"),
        (["--fps", "0"], "fps"),
    ],
)
def test_wrong_requests_are_named(tmp_path, capsys, arguments, names):
    assert main(["--out", str(tmp_path / "out"), *arguments]) == 2
    assert names in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mix_takes_weights_or_equal_shares():
    assert mix("cue=0.7, text=0.3") == {"cue": 0.7, "text": 0.3}
    assert mix("cue,text") == {"cue": 1.0, "text": 1.0}
