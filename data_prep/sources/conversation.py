"""Chats as data sets write them, to a row's `user` and `assistant` or `turns`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from fvlm.data.errors import SampleError

_PLACEHOLDERS = re.compile(r"\A\s*(?:<(?:image|video)>\s*)+|(?:\s*<(?:image|video)>)+\s*\Z")


def strip_placeholder(text: str) -> str:
    """Without the marks of where the pictures go (`<image>`, of videos too), at either end of a user's text."""
    return _PLACEHOLDERS.sub("", text)


def as_text(value: object, name: str) -> str:
    """A string that can be stored. Raises SampleError `missing_field`, `wrong_type` or `bad_text`."""
    if value is None:
        raise SampleError("missing_field", f"{name}: expected a string")
    if not isinstance(value, str):
        raise SampleError("wrong_type", f"{name}: expected a string, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SampleError("bad_text", f"{name}: {error}") from error
    return value


def conversation(
    messages: object,
    role: str,
    content: str,
    names: Mapping[str, str],
    clean: Callable[[str], str] = lambda text: text,
) -> dict:
    """`{user, assistant}` of one exchange, `{turns}` of several, from a list of `{role: ..., content: ...}`.

    `names` maps the data set's names of the roles to user, assistant and system; `clean` is applied to user texts. A
    system message stands before the first user text: every chat has one fixed system message of its own, and to drop
    what the data set says there would take the task away from the answer.

    Raises SampleError `bad_turns` unless user and assistant take turns, the user first, and every question is answered.
    """
    if not isinstance(messages, list) or not messages:
        raise SampleError("bad_turns", f"expected a list of messages, found {type(messages).__name__} {messages!r:.80}")
    texts = [_message(number, message, role, content, names) for number, message in enumerate(messages)]
    system = texts.pop(0)[1] if texts[0][0] == "system" else ""
    roles = [name for name, _ in texts]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise SampleError("bad_turns", f"expected user and assistant in turns, found {', '.join(roles) or 'nobody'}")
    exchanges = [
        {"user": clean(asked), "assistant": answered}
        for (_, asked), (_, answered) in zip(texts[::2], texts[1::2], strict=True)
    ]
    if system.strip():
        exchanges[0]["user"] = f"{system}\n\n{exchanges[0]['user']}"
    return exchanges[0] if len(exchanges) == 1 else {"turns": exchanges}


def _message(number: int, message: object, role: str, content: str, names: Mapping[str, str]) -> tuple[str, str]:
    if not isinstance(message, dict) or message.get(role) not in names:
        found = f"{message.get(role)!r}" if isinstance(message, dict) else type(message).__name__
        raise SampleError("bad_turns", f"message {number}, {role}: expected one of {', '.join(names)}, found {found}")
    return names[message[role]], as_text(message.get(content), f"message {number}, {content}")
