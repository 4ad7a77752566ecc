"""A benchmark's rows as multiple-choice questions, with every question that could not be asked or answered in view."""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fvlm.data.errors import MediaError, SampleError
from fvlm.evaluate.benchmarks import media
from fvlm.evaluate.items import Item, Presentation
from fvlm.evaluate.multiple_choice import Answer, ChoiceTask, Question, choice_figures, option_question
from fvlm.evaluate.statistics import yes_no_figures

logger = logging.getLogger(__name__)
ASK = "Answer with the text of the right option."
MISSING = "missing_file"
YES_NO = ("Yes", "No")
"""Options of a question whose yes finds something: of these there are precision and recall, too."""
NAMED = 5
"""Questions named in the log for each reason; all are counted."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question of a benchmark."""

    key: str
    prompt: str
    """The user's turn."""
    options: tuple[str, ...]
    """Without letters; the answers whose likelihoods are compared."""
    answer: int
    groups: Mapping[str, str]
    """What figures are reported by, such as {"task": "action_count"}."""
    clip: media.ClipFile | None
    """What it is about; None: text alone."""
    lettered: bool = True
    """Whether the prompt shows the options with letters."""


@dataclass(frozen=True)
class Benchmark(ChoiceTask):
    """A ChoiceTask that remembers what was asked, missing and broken, by group."""

    rows: tuple[Row, ...]
    """All that were to be asked."""
    missing: frozenset[str]
    """Keys of those whose file is not there."""
    not_asked: Counter
    """Published rows that are no multiple-choice question, or none that can be read, by reason."""

    def figures(self, answers: Sequence[Answer], skipped: Counter) -> dict[str, Any]:
        """{"overall", "by_<group>" …, "by_source", "skipped", "not_asked", "prompt"}.

        "accuracy" and its interval are over the questions answered; beside it "asked", "missing", "broken" and
        "accuracy_of_asked", in which a question without an answer is wrong; of yes or no, `yes_no_figures`, too.
        """
        by_key = {answer.question.request.key: answer for answer in answers}
        names = list(dict.fromkeys(name for row in self.rows for name in row.groups))
        found: dict[str, Any] = {"overall": self._group(self.rows, by_key)}
        for name in names:
            values = sorted({row.groups[name] for row in self.rows if name in row.groups})
            parts = {value: [row for row in self.rows if row.groups.get(name) == value] for value in values}
            found[f"by_{name}"] = {value: self._group(rows, by_key) for value, rows in parts.items()}
        return {
            **found,
            "skipped": dict(skipped),
            "not_asked": dict(self.not_asked),
            "prompt": self.rows[0].prompt if self.rows else None,
        }

    def _group(self, rows: Sequence[Row], answers: Mapping[str, Answer]) -> dict[str, Any]:
        answered = [answers[row.key] for row in rows if row.key in answers]
        missing = sum(row.key in self.missing for row in rows)
        right = sum(answer.correct for answer in answered)
        figures = choice_figures(answered)
        if answered and all(row.options == YES_NO for row in rows):
            yes = YES_NO.index("Yes")
            said, there = [a.choices == (yes,) for a in answered], [a.question.answers == (yes,) for a in answered]
            figures |= yes_no_figures(said, there)
        return {
            **figures,
            "asked": len(rows),
            "missing": missing,
            "broken": len(rows) - missing - len(answered),
            "accuracy_of_asked": right / len(rows),
        }


def prepare(
    name: str,
    rows: Sequence[Row],
    not_asked: Counter,
    tokenizer: PreTrainedTokenizerBase,
    presentation: Presentation,
) -> Benchmark:
    """Opens every file once, for its number of frames; what is missing or cannot be opened is counted."""
    questions: list[Question] = []
    missing: set[str] = set()
    skipped: Counter = Counter()
    for row in rows:
        try:
            questions.append(option_question(_item(name, row, presentation.image_size), tokenizer, presentation))
        except (MediaError, SampleError) as error:
            skipped[error.reason] += 1
            if skipped[error.reason] <= NAMED:
                logger.warning("%s: question %s cannot be shown: %s", name, row.key, error)
            if error.reason == MISSING:
                missing.add(row.key)
    return Benchmark(name, questions, presentation, skipped, tuple(rows), frozenset(missing), not_asked)


def _item(name: str, row: Row, size: int) -> Item:
    kind, frames = ("text", 0) if row.clip is None else media.probe(row.clip)
    meta = {
        "key": row.key,
        "source": name,
        "kind": kind,
        "frame_count": frames,
        "user": row.prompt,
        "options": list(row.options),
        "answer": row.answer,
        "assistant": row.options[row.answer],
        "lettered": row.lettered,
    }
    return Item(meta=meta, num_frames=frames, read_frames=partial(media.read_frames, row.clip, frames, size))


def lettered_prompt(question: str, options: Iterable[str]) -> str:
    """The question, an option a line behind its letter, and what to answer with."""
    lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False)]
    return "\n".join([question.strip(), *lines, ASK])


def choose(options: object, answer: object, *, by_letter: bool) -> tuple[tuple[str, ...], int]:
    """The options without letters, and the right one's index, from an answer that is a letter or an option's text.

    `by_letter`: what a letter that is also an option's text means. Raises SampleError `bad_options` or `bad_answer`.
    """
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o.strip() for o in options):
        raise SampleError("bad_options", f"options {options!r}: expected two or more texts")
    if not isinstance(answer, str):
        raise SampleError("bad_answer", f"answer {answer!r}: expected an option's letter or text")
    texts = _without_letters(options)
    letter = re.fullmatch(r"\(?([A-Z])[).:]?", answer.strip())
    by_name = ord(letter[1]) - ord("A") if letter and ord(letter[1]) - ord("A") < len(texts) else None
    said = answer.strip()
    same = [i for i, text in enumerate(texts) if said in (text, options[i].strip())]
    by_text = same[0] if len(same) == 1 else None
    first, second = (by_name, by_text) if by_letter else (by_text, by_name)
    found = second if first is None else first
    if found is None:
        raise SampleError("bad_answer", f"answer {answer!r}: names none of {options}, or several")
    return texts, found


def _without_letters(options: Sequence[str]) -> tuple[str, ...]:
    """ "A. a cat", "B. a dog" → "a cat", "a dog", where all begin with their own letters."""
    found = [re.match(r"\(?([A-Z])[).:]\s*(?=\S)", option.strip()) for option in options]
    letters = [match[1] if match else None for match in found]
    if letters != list(string.ascii_uppercase[: len(options)]):
        return tuple(option.strip() for option in options)
    return tuple(option.strip()[match.end() :].strip() for option, match in zip(options, found, strict=True))


def text_field(row: Mapping, *names: str) -> str:
    """The first of the fields that is there, as text; raises SampleError `bad_row` without any."""
    for name in names:
        value = row.get(name)
        if isinstance(value, (str, int)) and str(value).strip():
            return str(value)
    raise SampleError("bad_row", f"a row without {' or '.join(names)}: {sorted(map(str, row))}")


def first_there(folder: Path, *names: str) -> Path:
    """The first of `names` that is in the folder, or where the first would be."""
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])
