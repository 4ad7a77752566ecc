"""Packed scores equal one option at a time, whatever else is in the pack; lists are scored word by word."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fvlm.data.chat import Layout
from fvlm.data.errors import SampleError
from fvlm.evaluate.multiple_choice import Answer, multiple_choice, slot_question, slots, summarise
from fvlm.evaluate.scoring import score
from fvlm.model import build_model, tiny_config
from fvlm.model.configuration import MODES
from tests.evaluate.reference import SHAPES, answer_logprob, answer_places, logprobs

LONG_WORDS = ("ring", "rhinoceros", "ringleader", "quicksilver")


def scored(model, task, **options):
    requests = [question.request for question in task.questions]
    return score(model, requests, presentation=task.presentation, device="cpu", **options)


@pytest.mark.parametrize(
    ("mode", "layout"), [*((mode, Layout.VIDEO_FIRST) for mode in MODES), ("coarse_fine", Layout.QUESTION_FIRST)]
)
def test_scores_equal_one_option_at_a_time(model, tokenizer, presentation, questions, mode, layout):
    task = multiple_choice(questions, tokenizer, replace(presentation, layout=layout))
    scores, lost = scored(model, task, mode=mode, fine_iterations=2)
    assert not lost
    for question, found in zip(task.questions, scores, strict=True):
        for option, text, got in zip(question.options, question.request.texts, found.logprob, strict=True):
            expected = answer_logprob(model, question.item, text, mode=mode, fine_iterations=2)
            assert got == pytest.approx(expected, abs=1e-5), (question.request.key, option)
        assert found.tokens.tolist() == [len(answer_places(text)) for text in question.request.texts]


def test_scores_do_not_depend_on_pack_or_order(model, tokenizer, presentation, questions):
    task = multiple_choice(questions, tokenizer, presentation)
    together, _ = scored(model, task)
    backwards, _ = scored(model, multiple_choice(questions[::-1], tokenizer, presentation), token_budget=150)
    alone = [scored(model, multiple_choice([item], tokenizer, presentation))[0][0] for item in questions]
    for a, b, c in zip(together, backwards[::-1], alone, strict=True):
        np.testing.assert_allclose(a.logprob, b.logprob, atol=1e-5)
        np.testing.assert_allclose(a.logprob, c.logprob, atol=1e-5)


def test_what_options_share_is_computed_once(model, tokenizer, presentation, make_item):
    """Eight options behind a clip of 64 frames cost little more than one of them."""
    meta = {"user": "Which shape is it?", "options": list(SHAPES), "assistant": "ring", "answer": 4}
    (question,) = multiple_choice([make_item(30, frames=64, **meta)], tokenizer, presentation).questions
    request = question.request
    first = request.targets[0]
    alone = replace(request, texts=request.texts[:1], targets=[first], num_groups=1)
    work = []
    for asked in (request, alone):
        with FlopCounterMode(display=False) as counter:
            score(model, [asked], presentation=presentation, device="cpu")
        work.append(counter.get_total_flops())
    assert work[0] < 1.25 * work[1]


def test_texts_that_differ_before_their_frames_are_refused(model, tokenizer, presentation, questions):
    first, other = (q.request for q in multiple_choice(questions[:2], tokenizer, presentation).questions)
    mixed = replace(first, texts=[first.texts[0], other.texts[0]], targets=[first.targets[0], other.targets[0]])
    with pytest.raises(ValueError, match="request 'item-1': its texts differ before row 4"):
        score(model, [mixed], presentation=presentation, device="cpu")


def test_frames_are_encoded_once_an_item(model, tokenizer, presentation, questions, monkeypatch):
    seen = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, **kw: (seen.append(kw["batch"]), forward(self, **kw))[1])
    scored(model, multiple_choice(questions, tokenizer, presentation))
    frames = sum(int(batch.frames.flatten(1).any(1).sum()) for batch in seen)
    assert frames == sum(item.num_frames for item in questions)
    for batch in seen:
        batch.validate()


def test_packs_hold_to_the_budget_and_share_one_shape(model, tokenizer, presentation, questions, monkeypatch):
    seen = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, **kw: (seen.append(kw), forward(self, **kw))[1])
    scored(model, multiple_choice(questions, tokenizer, presentation), token_budget=220)
    assert 1 < len(seen) < len(questions)
    assert len({(len(call["batch"].token_ids), len(call["branches"].labels)) for call in seen}) == 1
    for call in seen:
        assert int(call["batch"].cu_seqlens[-1]) + len(call["branches"].token_ids) <= 220


@pytest.mark.parametrize("mode", MODES)
def test_slots_equal_the_next_word_read_one_text_at_a_time(model, tokenizer, presentation, listings, mode):
    task = slots(listings, tokenizer, presentation)
    words = task.questions[0].options
    assert set(words) == {word for item in listings for word in item.meta["assistant"].split()}
    scores, _ = scored(model, task, mode=mode)
    for question, found in zip(task.questions, scores, strict=True):
        assert len(question.request.texts) == 1, "one-token words need no text of their own"
        table, _ = logprobs(model, question.item, question.request.texts[0], mode=mode)
        places = answer_places(question.request.texts[0])[:-1]
        for slot, place in enumerate(places):
            ids = [tokenizer.encode(word if slot == 0 else f" {word}", add_special_tokens=False)[0] for word in words]
            got = found.logprob.reshape(len(places), -1)[slot]
            np.testing.assert_allclose(got, table[place, ids].numpy(), atol=1e-5)


def test_words_of_several_tokens_are_scored_whole(model, tokenizer, presentation, make_item):
    item = make_item(20, frames=3, user="Which?", assistant="ringleader ring", narration=["", " ringleader", " ring"])
    question = slot_question(item, LONG_WORDS, tokenizer, presentation)
    (found,), _ = score(model, [question.request], presentation=presentation, device="cpu")
    for slot, before in enumerate(([], ["ringleader"])):
        prefix = presentation.segments({**item.meta, "assistant": " ".join(before)}, tokenizer) if before else None
        start = len(answer_places(prefix)) - 1 if before else 0
        for candidate, word in enumerate(LONG_WORDS):
            text = presentation.segments({**item.meta, "assistant": " ".join([*before, word])}, tokenizer)
            table, ids = logprobs(model, item, text)
            places = answer_places(text)[start:-1]
            assert word == "ring" or len(places) > 1
            expected = sum(float(table[place, ids[place]]) for place in places)
            assert found.logprob[slot * len(LONG_WORDS) + candidate] == pytest.approx(expected, abs=1e-5), (slot, word)


def test_multi_token_baseline_is_scored_too(tokenizer, presentation, questions, listings):
    torch.manual_seed(1)
    baseline = build_model(tiny_config(len(tokenizer), architecture="multi_token", grid=4)).eval()
    shown = replace(presentation, grid=4, looks=1)
    for task in (multiple_choice(questions, tokenizer, shown), slots(listings, tokenizer, shown)):
        together, _ = scored(baseline, task)
        alone = [score(baseline, [q.request], presentation=shown, device="cpu")[0][0] for q in task.questions]
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a.logprob, b.logprob, atol=1e-5)


def test_unreadable_items_are_counted_and_move_nobody(model, tokenizer, presentation, questions):
    def broken():
        raise SampleError("bad_jpeg", "cut short")

    whole, _ = multiple_choice(questions, tokenizer, presentation).run(model, device="cpu")
    damaged = [replace(questions[0], read_frames=broken), *questions[1:]]
    answers, skipped = multiple_choice(damaged, tokenizer, presentation).run(model, device="cpu")
    assert skipped == {"bad_jpeg": 1}
    assert [a.choices for a in answers] == [a.choices for a in whole[1:]]


def test_options_that_cannot_be_scored_are_counted(tokenizer, presentation, questions):
    bad = [
        replace(questions[0], meta={**questions[0].meta, **change})
        for change in (
            {"answer": 8},
            {"answer": None},
            {"options": ["one"]},
            {"options": 7},
            {"options": ["ring", 7]},
            {"turns": [{"user": "u", "assistant": "a"}]},
        )
    ]
    task = multiple_choice([*bad, questions[1]], tokenizer, presentation)
    assert (len(task.questions), task.skipped) == (1, {"bad_options": 6})


def test_summary_by_source_by_slot_and_by_length(tokenizer, presentation, questions, listings):
    mc = multiple_choice(questions, tokenizer, presentation).questions
    right = [Answer(q, q.answers, tuple((a + 1) % len(q.options) for a in q.answers)) for q in mc]
    summary = summarise(right)
    assert set(summary["by_source"]) == {"test/a", "test/b"}
    assert (summary["overall"]["accuracy"], summary["overall"]["accuracy_by_length"]) == (1.0, 0.0)
    assert summary["by_source"]["test/b"]["chance"] == 1 / 8
    assert summary["overall"]["chance"] == pytest.approx(np.mean([1 / 8, 1 / 2, 1 / 4, 1 / 3, 1 / 2, 1 / 8]))

    lists = slots(listings, tokenizer, presentation).questions
    first_only = [
        Answer(q, (q.answers[0], *((a + 1) % len(q.options) for a in q.answers[1:])), q.answers) for q in lists
    ]
    overall = summarise(first_only)["overall"]
    assert overall["accuracy"] == 0.25
    assert [slot["accuracy"] for slot in overall["by_slot"]] == [1.0, 0.0, 0.0, 0.0]
    assert overall["n"] == len(listings), "the interval counts clips: slots of one clip are not independent"


def test_records_are_readable(tokenizer, presentation, listings):
    question = slots(listings[:1], tokenizer, presentation).questions[0]
    record = Answer(question, question.answers, question.answers).as_dict()
    assert record["gold"] == record["choice"] == listings[0].meta["assistant"]
    assert set(record["gold"].split()) <= set(SHAPES)
