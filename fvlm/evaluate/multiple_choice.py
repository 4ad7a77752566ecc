"""Multiple choice by likelihood: whole options, or the next word of a list given the right words before it.

The score of an option is Σ log p over its answer tokens, its end-of-turn included: the likelihood of saying exactly
that. The length-normalised choice (mean log p a token) is reported beside it. In a list answer ("ring moon bar ...",
one word a frame) each place is a slot: the next word only is scored, among the words that occur in such answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fvlm.data.chat import Text
from fvlm.data.errors import SampleError
from fvlm.evaluate.items import Item, Presentation
from fvlm.evaluate.scoring import Request, Scores, Segments, answer_targets, score
from fvlm.evaluate.statistics import accuracy_figures
from fvlm.evaluate.writing import Writer
from fvlm.evaluate.written_choice import named_option


@dataclass(frozen=True)
class Question:
    """What a request asks: the choices at each of its places, and the right ones (indices into `options`)."""

    item: Item
    options: tuple[str, ...]
    answers: tuple[int, ...]
    request: Request

    @property
    def source(self) -> str:
        return str(self.item.meta.get("source", "unknown"))


@dataclass(frozen=True)
class Answer:
    """A model's choices for one question, one a place; `by_length` are the length-normalised ones."""

    question: Question
    choices: tuple[int, ...]
    by_length: tuple[int, ...] = ()
    said: str | None = None
    """What was written, where the choice was read from it; the choice is -1 where it names no option."""

    @property
    def correct(self) -> float:
        """Share of places chosen rightly."""
        return float(np.mean(np.equal(self.choices, self.question.answers)))

    @property
    def chosen(self) -> str:
        """The options chosen, in words."""
        return " ".join(self.question.options[i] if i >= 0 else "nothing that is an option" for i in self.choices)

    def as_dict(self) -> dict[str, Any]:
        """A readable record: what was asked, what is right, what was chosen."""
        question = self.question
        return {
            "key": question.request.key,
            "source": question.source,
            "question": question.item.meta.get("user"),
            "gold": " ".join(question.options[i] for i in question.answers),
            "choice": self.chosen if self.said is None else self.said,
            "correct": self.correct,
        }


@dataclass(frozen=True)
class ChoiceTask:
    """Questions prepared once, to be asked of any checkpoint in any mode."""

    name: str
    questions: list[Question]
    presentation: Presentation
    skipped: Counter
    """Items that could not become questions, by reason."""

    def run(
        self,
        model: nn.Module,
        *,
        device: torch.device | str,
        mode: str = "coarse_fine",
        fine_iterations: int = 1,
        token_budget: int = 4096,
    ) -> tuple[list[Answer], Counter]:
        """Asks all questions; returns the answers, the same on every rank, and what was skipped, by reason."""
        scores, unread = score(
            model,
            [question.request for question in self.questions],
            presentation=self.presentation,
            device=device,
            mode=mode,
            fine_iterations=fine_iterations,
            token_budget=token_budget,
        )
        pairs = zip(self.questions, scores, strict=True)
        return [_choose(question, found) for question, found in pairs if found is not None], self.skipped + unread

    def run_by_writing(
        self, model: nn.Module, writer: Writer, *, device: torch.device | str, mode: str, fine_iterations: int = 1
    ) -> tuple[list[Answer], Counter]:
        """As `run`, by what the model writes to each question: the option that it names, by letter or by text."""
        items = [question.item for question in self.questions]
        said, unread = writer.write(model, items, device, mode, fine_iterations)
        answers = []
        for question, text in zip(self.questions, said, strict=True):
            if text is not None:
                choice = named_option(text, question.options, lettered=bool(question.item.meta.get("lettered")))
                answers.append(Answer(question, (-1 if choice is None else choice,), said=text))
        return answers, self.skipped + unread

    def figures(self, answers: Sequence[Answer], skipped: Counter) -> dict[str, Any]:
        """What is recorded of the answers: `summarise` and "skipped"."""
        return {**summarise(answers), "skipped": dict(skipped)}


def multiple_choice(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, presentation: Presentation
) -> ChoiceTask:
    """Questions whose samples carry `options` and `answer` (the index of the right one)."""
    return _task("multiple_choice", items, lambda item: option_question(item, tokenizer, presentation), presentation)


def slots(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, presentation: Presentation) -> ChoiceTask:
    """Questions answered by a list of words; the candidates at every place are all words of the source's answers."""
    words: dict[str, set[str]] = {}
    for item in items:
        words.setdefault(str(item.meta.get("source")), set()).update(item.meta["assistant"].split())
    candidates = {source: tuple(sorted(found)) for source, found in words.items()}
    return _task(
        "slots",
        items,
        lambda item: slot_question(item, candidates[str(item.meta.get("source"))], tokenizer, presentation),
        presentation,
    )


def summarise(answers: Sequence[Answer]) -> dict[str, Any]:
    """{"overall", "by_source"}: figures of `accuracy_figures`, with accuracy_by_length, and for lists by_slot."""
    by_source: dict[str, list[Answer]] = {}
    for answer in answers:
        by_source.setdefault(answer.question.source, []).append(answer)
    return {
        "overall": choice_figures(answers),
        "by_source": {source: choice_figures(group) for source, group in sorted(by_source.items())},
    }


def _task(name: str, items: Sequence[Item], ask: Any, presentation: Presentation) -> ChoiceTask:
    questions, skipped = [], Counter()
    for item in items:
        try:
            questions.append(ask(item))
        except SampleError as error:
            skipped[error.reason] += 1
    return ChoiceTask(name, questions, presentation, skipped)


def option_question(item: Item, tokenizer: PreTrainedTokenizerBase, presentation: Presentation) -> Question:
    """Scores each of the sample's options as its answer; raises SampleError where they are none."""
    meta, options, answer = item.meta, item.meta["options"], item.meta.get("answer")
    if meta.get("turns"):
        raise SampleError("bad_options", "options belong to one user text and one answer, not to several turns")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise SampleError("bad_options", f"options {options!r}: expected a list of strings")
    if not isinstance(answer, int) or not 0 <= answer < len(options) or len(options) < 2:
        raise SampleError(
            "bad_options", f"{len(options)} options, answer {answer!r}: expected an index into two or more"
        )
    return Question(item, tuple(options), (answer,), option_request(item, options, tokenizer, presentation))


def option_request(
    item: Item, options: Sequence[str], tokenizer: PreTrainedTokenizerBase, presentation: Presentation
) -> Request:
    """Each option as the whole answer, a group each; raises SampleError where the text cannot be laid out."""
    texts = [presentation.segments({**item.meta, "assistant": option}, tokenizer) for option in options]
    targets = [answer_targets(text, group) for group, text in enumerate(texts)]
    return _request(item, texts, targets, len(options))


def slot_question(
    item: Item, candidates: Sequence[str], tokenizer: PreTrainedTokenizerBase, presentation: Presentation
) -> Question:
    """Scores every candidate at every place of a list answer, given the right words before it.

    A candidate of one token is read off the right answer's own text, as another label at the same row; only longer
    ones that are wrong need a text of their own. Groups are place · len(candidates) + candidate.
    """
    words = item.meta["assistant"].split()
    text = presentation.segments(item.meta, tokenizer)
    segment, start, _ = _answer(text)
    texts, targets = [text], [[]]
    if not set(words) <= set(candidates):
        raise SampleError(
            "bad_list", f"answer words {sorted(set(words) - set(candidates))} are not among the candidates"
        )
    for place, word in enumerate(words):
        said = _answer_ids(item, words[:place], tokenizer, presentation) if place else np.zeros(0, np.int32)
        before = len(said)
        for candidate, other in enumerate(candidates):
            other_text = presentation.segments(_with_answer(item, [*words[:place], other]), tokenizer)
            _, _, ids = _answer(other_text)
            if not np.array_equal(ids[:before], said):
                raise SampleError(
                    "bad_list", f"the tokenizer joins {other!r} with the word before it; no slot to score"
                )
            group = place * len(candidates) + candidate
            rows = [(segment, start + at, ids[at], group) for at in range(before, len(ids))]
            targets[0] += rows[:1] if other != word else rows
            if other != word and len(rows) > 1:
                texts.append(other_text)
                targets.append(rows[1:])
    arrays = [np.array(rows, np.int64).reshape(-1, 4) for rows in targets]
    answers = tuple(candidates.index(word) for word in words)
    return Question(item, tuple(candidates), answers, _request(item, texts, arrays, len(words) * len(candidates)))


def _request(item: Item, texts: list[Segments], targets: list[np.ndarray], num_groups: int) -> Request:
    return Request(
        key=str(item.meta.get("key")),
        num_frames=item.num_frames,
        read_frames=item.read_frames,
        texts=texts,
        targets=targets,
        num_groups=num_groups,
    )


def _with_answer(item: Item, words: Sequence[str]) -> dict[str, Any]:
    return {**item.meta, "assistant": " ".join(words)}


def _answer_ids(item: Item, words: Sequence[str], tokenizer, presentation: Presentation) -> np.ndarray:
    return _answer(presentation.segments(_with_answer(item, words), tokenizer))[2]


def _answer(text: Segments) -> tuple[int, int, np.ndarray]:
    """(segment, place of its first answer token, answer token ids without the end-of-turn) of a one-turn chat."""
    segment = len(text) - 1
    part = text[segment]
    if not isinstance(part, Text) or not part.is_answer.any():
        raise SampleError("no_answer", "the last segment holds no answer tokens")
    places = np.flatnonzero(part.is_answer)
    return segment, int(places[0]), part.token_ids[places[:-1]]


def _choose(question: Question, found: Scores) -> Answer:
    shape = (len(question.answers), len(question.options))
    logprob, tokens = found.logprob.reshape(shape), found.tokens.reshape(shape)
    return Answer(question, tuple(logprob.argmax(1).tolist()), tuple((logprob / tokens).argmax(1).tolist()))


def choice_figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Figures of one group of answers; empty without answers."""
    if not answers:
        return {}
    written = answers[0].said is not None
    figures = accuracy_figures(
        [answer.correct for answer in answers],
        [1 / len(answer.question.options) for answer in answers],
        [answer.chosen for answer in answers]
        if written
        else [a.question.options[i] for a in answers for i in a.choices],
        [answer.question.options[i] for answer in answers for i in answer.question.answers],
    )
    if written:
        return {**figures, "unparsed": sum(answer.choices == (-1,) for answer in answers)}
    by_length = [float(np.mean(np.equal(answer.by_length, answer.question.answers))) for answer in answers]
    figures["accuracy_by_length"] = float(np.mean(by_length))
    longest = max(len(answer.choices) for answer in answers)
    if longest > 1:
        figures["by_slot"] = [_slot_figures(answers, place) for place in range(longest)]
    return figures


def _slot_figures(answers: Sequence[Answer], place: int) -> dict[str, Any]:
    hits = [a.choices[place] == a.question.answers[place] for a in answers if len(a.choices) > place]
    return {"slot": place + 1, "accuracy": float(np.mean(hits)), "n": len(hits)}
