"""Written answers: the same alone and in a batch, read as options, held against captions."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch

from fvlm.data.chat import Layout, Text, Visual
from fvlm.data.errors import SampleError
from fvlm.evaluate import captions
from fvlm.evaluate.captions import CaptionTask
from fvlm.evaluate.multiple_choice import multiple_choice, summarise
from fvlm.evaluate.writing import Writer
from fvlm.evaluate.written_choice import named_option

MODES = ("coarse_only", "coarse_fine", "autoregressive")


@pytest.fixture
def writer(tokenizer, presentation) -> Writer:
    return Writer(tokenizer=tokenizer, presentation=presentation, new_tokens=3, token_budget=150)


def alone(model, writer: Writer, item, mode: str) -> str:
    """One prompt, token by token through the padded forward pass."""
    text = writer.presentation.segments({**item.meta, "assistant": "ring"}, writer.tokenizer)
    ids = [int(i) for part in text if isinstance(part, Text) for i in part.token_ids[~part.is_answer]][:-1]
    frames = torch.from_numpy(item.read_frames()[[i for part in text if isinstance(part, Visual) for i in part.frames]])
    at = len(text[0].token_ids) if isinstance(text[0], Text) and len(text) > 1 else 0
    end = writer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    said: list[int] = []
    with torch.no_grad():
        while len(said) < writer.new_tokens and end not in said:
            place = {"visual_at": torch.tensor([at]), "mode": mode}
            logits = model(frames=frames[None], input_ids=torch.tensor([ids + said]), **place).logits
            said.append(int(logits[0, -1].argmax()))
    return writer.tokenizer.decode(said, skip_special_tokens=True).strip()


@pytest.mark.parametrize("mode", MODES)
def test_batches_write_what_each_prompt_gives_alone(model, writer, questions, mode):
    items = [item for item in questions if item.num_frames]
    said, lost = writer.write(model, items, "cpu", mode)
    assert said == [alone(model, writer, item, mode) for item in items]
    assert not lost
    assert len(set(said)) > 1


def test_question_first(model, writer, questions, presentation):
    directed = replace(writer, presentation=replace(presentation, layout=Layout.QUESTION_FIRST))
    said, _ = directed.write(model, questions[:2], "cpu", "coarse_fine")
    assert said == [alone(model, directed, item, "coarse_fine") for item in questions[:2]]


def test_what_cannot_be_shown_is_counted_and_moves_nobody(model, writer, questions):
    def broken():
        raise SampleError("bad_jpeg", "cut short")

    whole, _ = writer.write(model, questions, "cpu", "coarse_only")
    hurt = [replace(questions[0], read_frames=broken), *questions[1:], replace(questions[1], meta={"kind": "text"})]
    said, lost = writer.write(model, hurt, "cpu", "coarse_only")
    assert said == [None, *whole[1:], None]
    assert lost == {"bad_jpeg": 1, "no_user_text": 1}


def test_written_choices_are_read_and_the_others_counted(
    model, writer, questions, tokenizer, presentation, monkeypatch
):
    task = multiple_choice(questions, tokenizer, presentation)
    texts = ["It is a ring.", "a large red circle", "No idea", None, "five", "moon"]
    monkeypatch.setattr(Writer, "write", lambda *args: (texts, Counter({"bad_jpeg": 1})))
    answers, skipped = task.run_by_writing(model, writer, device="cpu", mode="coarse_fine")
    assert [answer.choices for answer in answers] == [(4,), (0,), (-1,), (1,), (7,)]
    overall = summarise(answers)["overall"]
    assert (overall["n"], overall["unparsed"], overall["accuracy"]) == (5, 1, 2 / 5)
    assert skipped == {"bad_jpeg": 1}
    assert answers[2].as_dict()["choice"] == "No idea"


TEXTS = ("Ate the medicine.", "Tidied up the blanket.", "Took the box.", "Took the box and left.")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("B", 1), ("b.", 1), ("(C)", 2), ("Answer: D", 3), ("The correct answer is A.", 0), ("Option B", 1),
        ("B. Tidied up the blanket.", 1), ("Took the box", 2), ("took the box and left!", 3),
        ("The person took the box and left the room.", 3), ("The answer is Took the box.", 2),
        ("B. Took the box.", None), ("E", None), ("A person walks", None), ("", None),
        ("Ate the medicine. Tidied up the blanket.", None), ("I do not know", None),
    ],
)  # fmt: skip
def test_letters_and_texts_are_read(said, expected):
    assert named_option(said, TEXTS, lettered=True) == expected


def test_without_letters_in_the_question_a_letter_is_no_answer():
    assert named_option("B.", TEXTS, lettered=False) is None
    assert named_option("A", ("A", "B"), lettered=False) == 0
    assert named_option("No, there is none.", ("Yes", "No"), lettered=False) == 1
    assert named_option("Yes or no?", ("Yes", "No"), lettered=False) is None
    assert named_option("two", ("two", "two"), lettered=True) is None


def test_captions_are_held_against_their_own_clip(model, writer, make_item, monkeypatch):
    def broken():
        raise SampleError("bad_jpeg", "cut short")

    items = [
        make_item(n, user="Describe it.", assistant=f"clip {n}", source=f"s{n % 2}", frames=1 + n % 3) for n in range(5)
    ]
    items[3] = replace(items[3], read_frames=broken)
    seen = {}

    def figures(texts, references, groups):
        seen.update(texts=texts, references=references, groups=groups)
        return {"cider": 1.0, "cider_by_clip": [], "by_group": {"s0": {}}}

    monkeypatch.setattr(captions, "caption_figures", figures)
    task = CaptionTask(items=items, writer=writer, skipped=Counter(bad_json=1))
    found, records = task.run(model, device="cpu", mode="coarse_fine")
    assert found == {"cider": 1.0, "by_source": {"s0": {}}, "skipped": {"bad_jpeg": 1, "bad_json": 1}, "new_tokens": 3}
    assert seen["references"] == [[f"clip {n}"] for n in (0, 1, 2, 4)]
    assert seen["groups"] == ["s0", "s1", "s0", "s0"]
    assert seen["texts"] == [alone(model, writer, items[n], "coarse_fine") for n in (0, 1, 2, 4)]
    assert [record["gold"] for record in records] == [f"clip {n}" for n in (0, 1, 2, 4)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="no java")
def test_captions_are_scored_by_source(model, writer, make_item):
    items = [make_item(n, user="Describe it.", assistant=f"clip {n}", source=f"s{n % 2}") for n in range(4)]
    found, _ = CaptionTask(items=items, writer=writer, skipped=Counter()).run(model, device="cpu", mode="coarse_only")
    assert {name: group["n"] for name, group in found["by_source"].items()} == {"s0": 2, "s1": 2}
    mean = sum(group["cider"] for group in found["by_source"].values()) / 2
    assert found["cider"] == pytest.approx(mean)
