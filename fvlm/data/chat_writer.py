"""Put a chat's tokens down and cut them into segments.

Contents are encoded as plain text and the special ids are put in here, so that no content can forge a turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class Text:
    """A run of text tokens: `token_ids` int32 [n], `is_answer` bool [n] (assistant content and its end-of-turn)."""

    token_ids: np.ndarray
    is_answer: np.ndarray


@dataclass(frozen=True)
class Visual:
    """A run of visual tokens: for each, which of the sample's own frames it looks at; repeats are further looks."""

    frames: tuple[int, ...]


class _ChatFormat:
    """A tokenizer reduced to what the chat needs."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy: the caller's keeps its state
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True  # "<|im_end|>" inside a content is text, not the end of a turn
        self.start, self.end = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])
        self.newline = self.encode("\n")
        self.assistant = self.encode("assistant\n")

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


_chat_format = lru_cache(maxsize=8)(_ChatFormat)


class ChatWriter:
    """Collects a chat's tokens and cuts them into segments where visual tokens stand."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._format = _chat_format(tokenizer)
        self._segments: list[Text | Visual] = []
        self._ids: list[int] = []
        self._answer: list[bool] = []

    def turns(self, turns: list[tuple[str, str]]) -> None:
        for user, assistant in turns:
            self.turn("user", user)
            self.turn("assistant", assistant)

    def turn(self, role: str, content: str) -> None:
        self.open(role, content)
        self.close(is_answer=role == "assistant")

    def open(self, role: str, content: str) -> None:
        """`<|im_start|>role\\ncontent`: encoded in one piece, as the template's text would be."""
        ids = self._format.encode(f"{role}\n{content}")
        self._add([self._format.start], False)
        if role == "assistant":
            header = _common_prefix(ids, self._format.assistant)
            self._add(ids[:header], False)
            self._add(ids[header:], True)
        else:
            self._add(ids, False)

    def plain(self, content: str, is_answer: bool) -> None:
        self._add(self._format.encode(content), is_answer)

    def close(self, is_answer: bool = False) -> None:
        self._add([self._format.end], is_answer)
        self._add(self._format.newline, False)

    def visual(self, visual: Visual) -> None:
        self._cut()
        self._segments.append(visual)

    def finish(self) -> list[Text | Visual]:
        self._cut()
        return self._segments

    def _add(self, ids: list[int], is_answer: bool) -> None:
        self._ids += ids
        self._answer += [is_answer] * len(ids)

    def _cut(self) -> None:
        if self._ids:
            self._segments.append(Text(np.array(self._ids, np.int32), np.array(self._answer, np.bool_)))
            self._ids, self._answer = [], []


def _common_prefix(a: list[int], b: list[int]) -> int:
    """An answer that begins with white space may fuse with the header's newline; the fused token is the answer's."""
    for position, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return position
    return min(len(a), len(b))
