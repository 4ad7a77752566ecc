"""What an evaluation harness passes on from a task, in this model's terms; needs no harness."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from fvlm.schema import ConfigError

logger = logging.getLogger(__name__)
NEW_TOKENS = 128
"""Most tokens of an answer where a task does not say."""
PASSED = ("min_new_tokens", "num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")
DRAWING = ("top_p", "top_k")
"""Arguments that transformers' `generate` takes as they are; these two only where it draws."""
MEANT = {*PASSED, *DRAWING, "max_new_tokens", "temperature", "do_sample", "until"}


def generation_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """transformers' options, and the texts that end an answer, from a task's `generation_kwargs`.

    The likeliest token is taken each time unless there is a temperature above 0, or `do_sample` alone (temperature 1),
    and nothing says `do_sample: false`. What has no meaning here is ignored, with one line in the log.
    """
    _say_ignored(tuple(sorted(given.keys() - MEANT)))
    temperature = given.get("temperature")
    if temperature is None:
        temperature = 1.0 if given.get("do_sample") else 0.0
    draws = given.get("do_sample") is not False and temperature > 0
    options = {"max_new_tokens": given.get("max_new_tokens") or NEW_TOKENS, "do_sample": draws}
    if draws:
        options["temperature"] = temperature
    names = (*PASSED, *DRAWING) if draws else PASSED
    options |= {name: given[name] for name in names if given.get(name) is not None}
    until = given.get("until") or []
    return options, [until] if isinstance(until, str) else list(until)


@lru_cache
def _say_ignored(names: tuple[str, ...]) -> None:
    if names:
        logger.warning("generation arguments that mean nothing to this model are ignored: %s", ", ".join(names))


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of those that end it."""
    return text[: min((at for end in until if end and (at := text.find(end)) >= 0), default=len(text))]


def flat(visuals: Any) -> list:
    """What a document shows, one medium after the other: lists in lists opened up, nothing for None."""
    if isinstance(visuals, (list, tuple)):
        return [medium for each in visuals for medium in flat(each)]
    return [] if visuals is None else [visuals]


def at_least_one(name: str, given: int | str) -> int:
    """An argument that is a count; raises ConfigError."""
    if not str(given).isdecimal() or int(given) < 1:
        raise ConfigError(f"{name}={given}: expected a whole number of at least 1")
    return int(given)
