"""Which option a written answer names."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LETTER = re.compile(
    r"^(?:(?:so|thus|therefore),?\s+)?(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:answer|option|choice)?\s*(?:is|:)?\s*"
    r"(?:option\s+)?[(\[]?(?P<letter>[a-z])(?P<end>[)\].:,]+\s*|$)(?P<rest>.*)$",
    re.IGNORECASE | re.DOTALL,
)
_LEAD = re.compile(r"^(?:the\s+)?(?:(?:correct|right|best)\s+)?answer\s*(?:is\s*:?|:)\s*", re.IGNORECASE)


def named_option(said: str, options: Sequence[str], *, lettered: bool) -> int | None:
    """The index of the one option that an answer names; None where it names none, or several.

    An option's own text counts before everything else; then, where the question showed letters, a letter standing
    alone or before a closing mark ("B", "(b)", "B. the text", "The answer is B."), unless the text behind it is
    another option's; then the only option whose words occur in the answer.
    """
    texts = [_plain(option) for option in options]
    answer = _plain(_LEAD.sub("", said.strip()))
    if texts.count(answer) == 1:
        return texts.index(answer)
    if lettered and (found := _LETTER.match(said.strip())):
        index = ord(found["letter"].lower()) - ord("a")
        behind = _mentioned(_plain(found["rest"]), texts)
        if index < len(options) and (behind is None or behind == index):
            return index
        return None
    return _mentioned(answer, texts)


def _plain(text: str) -> str:
    """Lower case, single spaces, without marks at its ends."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'()[]*")


def _mentioned(answer: str, texts: Sequence[str]) -> int | None:
    """The only option whose words occur in the answer; one inside a longer one that occurs does not count."""
    found = [text for text in set(texts) if text and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer)]
    found = [text for text in found if not any(text != other and text in other for other in found)]
    return texts.index(found[0]) if len(found) == 1 and list(texts).count(found[0]) == 1 else None
