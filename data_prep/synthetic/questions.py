"""The words of the synthetic corpus, and the rows that carry them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.synthetic.draw import ARROWS, BACKGROUNDS, COLOURS, SHAPES, Scene

QUESTIONS = {
    "cue": "Which shape has the colour of the first square, picture by picture?",
    "cue_mc": "Which shape has the colour of the first square in picture {picture}?",
    "cue_shape": "Which colour has the first shape, picture by picture?",
    "cue_shape_mc": "Which colour has the first shape in picture {picture}?",
    "cue_place": "Which shape stands where the first square was, picture by picture?",
    "cue_place_mc": "Which shape stands where the first square was in picture {picture}?",
    "tracking_shape": "Follow the {colour} shape. Which shape is it at the end?",
    "tracking_place": "Follow the {colour} shape. Where is it at the end?",
    "relay": "Follow the arrows. Which shape stands at the end?",
    "ask_colour": "Which shape is {colour}, picture by picture?",
    "ask_colour_mc": "Which shape is {colour} in picture {picture}?",
    "ask_cell": "Which shape stands in {place}, picture by picture?",
    "ask_cell_mc": "Which shape stands in {place} in picture {picture}?",
    "still_colour": "Which shape is {colour}?",
    "still_cell": "Which shape stands in {place}?",
    "caption": "Describe this video.",
    "text_after": "Which number comes after {number}?",
    "text_plus": "What is {number} and {other}?",
    "text_other": "What is the other end of {word}?",
    "text_kind": "Is {word} a colour or a shape?",
    "text_last": "Which is the last of: {words}?",
    "text_repeat": "Write again: {words}.",
}
"""Every question and prompt, by kind; `{}` fields are filled with the words below."""
CAPTION = "A {colour} {shape} {relation} a {other_colour} {other_shape} on a {background} background."
PLACE = "row {row} column {column}"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
OPPOSITES = (("up", "down"), ("left", "right"), ("top", "bottom"), ("first", "last"), ("start", "end"))
RELATIONS = {"left of": (0, 2), "above": (2, 0)}
"""Words for how the first object stands to the second, and the step in cells (down, right) from first to second."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A clip, a still, several stills or a text before it is drawn, with its rows."""

    medium: str
    """"video" (a scene a second), "image", "images" (a picture a scene) or "text" (no scenes)."""
    scenes: tuple[Scene, ...]
    rows: list[dict]
    """Manifest rows without `key` and `media`."""


def says(place: Sequence[int]) -> str:
    """A place (row, column) in words, which count from 1."""
    return PLACE.format(row=place[0] + 1, column=place[1] + 1)


def row(
    source: str, user: str, assistant: str, look_at=None, narration=None, rare: bool = False, stream: bool = True
) -> dict:
    """A manifest row with an open answer; `stream`: its narration needs no question."""
    made = {"source": f"synthetic/{source}", "user": user, "assistant": assistant}
    made |= {"narration": narration} if narration else {}
    made |= {"stream": True} if narration and stream else {}
    made |= {"look_at": look_at} if look_at else {}
    return made | ({"tags": ["held_out"]} if rare else {})


def choice_row(source: str, user: str, options: Sequence[str], answer: str, **more) -> dict:
    """A manifest row with options; the answer is one of them. Chance level: 1 / number of options."""
    options = list(options)
    return row(source, user, answer, **more) | {"options": options, "answer": options.index(answer)}


def vocabulary() -> set[str]:
    """Every word that any text of the corpus can contain, without numerals and punctuation."""
    values = (*COLOURS, *SHAPES, *ARROWS, *BACKGROUNDS, *NUMBERS, *RELATIONS, *(w for pair in OPPOSITES for w in pair))
    texts = (*QUESTIONS.values(), CAPTION, PLACE, *values)
    return {word for text in texts for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", "", text))}
