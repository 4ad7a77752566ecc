"""What the language model reads: a sample's chat as segments of text and visual tokens, with its answer flags.

The chat format is SmolLM2's, `<|im_start|>role\\ncontent<|im_end|>\\n`, opened by one fixed system message.
Special tokens split the text, so the two sides of a visual segment, encoded apart, are what the whole chat would give.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fvlm.data.chat_writer import TURN_END, TURN_START, ChatWriter, Text, Visual
from fvlm.data.errors import SampleError
from fvlm.data.tiny_tokenizer import build_tiny_tokenizer

SYSTEM_MESSAGE = "You are a helpful AI assistant."

SOURCE_PROMPTS = {
    "openvid": "Write a brief caption for this video.",
    "webvid": "What would be the WebVid caption for this video?",
    "vript": "Provide a detailed narration of what happens in this video.",
    "sharegpt4video": "Describe what happens in this video in detail.",
}

_FORMAT_VERSION = 1  # part of the tokenizer hash: indexes store counts, and the counts follow this file


class Layout(IntEnum):
    """Where a sample's visual tokens stand."""

    VIDEO_FIRST = 0
    QUESTION_FIRST = 1
    NARRATED = 2


@dataclass(frozen=True)
class TextCounts:
    """Text tokens of a sample, by what the plan needs to know; the narrated counts are 0 without narration."""

    tokens: int
    """All text tokens of the video-first, question-first or text-only chat."""
    head: int
    """Tokens before the end-of-turn of the first user turn, where question-first frames go; 0 without frames."""
    answer: int
    """Answer tokens of the chat, end-of-turns included."""
    narrated_tokens: int
    """All text tokens of the narrated layout."""
    narrated_answer: int
    """Answer tokens of the narrated layout, the end-of-turn included."""
    narrated_tail: int
    """Text tokens after the last visual token of the narrated layout."""
    rejected_tokens: int = 0
    """All text tokens of a preference pair's chat with the rejected answer; the others are with the chosen one."""
    rejected_answer: int = 0
    """Answer tokens of that chat; 0 where there is no pair."""


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer `"tiny"` (built here, no download), or that of a Hugging Face id or folder.

    Raises ValueError if it lacks the chat format's special tokens.
    """
    tokenizer = build_tiny_tokenizer() if name == "tiny" else AutoTokenizer.from_pretrained(name)
    missing = [token for token in (TURN_START, TURN_END) if token not in tokenizer.all_special_tokens]
    if missing:
        raise ValueError(
            f"tokenizer {name!r}: special tokens {missing} expected for the chat format; "
            f"use 'tiny' or a tokenizer with SmolLM2-Instruct's chat format"
        )
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits that change when the token counts of a text may change."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("padding", "truncation"):  # left behind by calls, not part of the vocabulary
        description.pop(state, None)
    content = json.dumps([_FORMAT_VERSION, SYSTEM_MESSAGE, SOURCE_PROMPTS, description], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def text_counts(meta: Mapping, tokenizer: PreTrainedTokenizerBase) -> TextCounts:
    """Token counts of one sample's text (fields: docs/data.md).

    Raises SampleError with reason `empty_text`, `no_user_text`, `bad_text`, `bad_narration` or `bad_frames`.
    """
    chat = segments(meta, tokenizer, Layout.QUESTION_FIRST)
    texts = [part for part in chat if isinstance(part, Text)]
    tokens = sum(part.token_ids.size for part in texts)
    answer = sum(int(part.is_answer.sum()) for part in texts)
    head = texts[0].token_ids.size if len(texts) == 2 else 0
    if "rejected" in meta:
        other = [
            part for part in segments(meta, tokenizer, Layout.VIDEO_FIRST, answer="rejected") if isinstance(part, Text)
        ]
        rejected = (sum(part.token_ids.size for part in other), sum(int(part.is_answer.sum()) for part in other))
        return TextCounts(tokens, head, answer, 0, 0, 0, *rejected)
    if not has_narration(meta):
        return TextCounts(tokens, head, answer, 0, 0, 0)
    narrated = segments(meta, tokenizer, Layout.NARRATED)
    texts = [part for part in narrated if isinstance(part, Text)]
    return TextCounts(
        tokens,
        head,
        answer,
        narrated_tokens=sum(part.token_ids.size for part in texts),
        narrated_answer=sum(int(part.is_answer.sum()) for part in texts),
        narrated_tail=narrated[-1].token_ids.size,
    )


def has_narration(meta: Mapping) -> bool:
    """Whether the sample can be laid out as `Layout.NARRATED`: something is said after one of its frames.

    A narration of the wrong type counts as one, to be refused with its reason by `segments`.
    """
    narration = meta.get("narration") or []
    return not isinstance(narration, list) or any(said.strip() for said in narration if isinstance(said, str))


def segments(
    meta: Mapping,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout | int,
    looks: int = 1,
    tokens_per_frame: int = 1,
    answer: str = "chosen",
) -> list[Text | Visual]:
    """A sample as the language model sees it.

    Video first `[Visual, Text]`; question first `[Text, Visual, Text]`, the visual tokens right before the first user
    turn's end; narrated `[Text, Visual, Text, Visual, ..., Text]`, each frame followed by what is said after it, if
    anything (with `stream` in the row nobody asked: the first frame opens the sample, and the assistant speaks after
    it); without frames `[Text]` in any layout. A still (kind `image`) gives `looks` visual tokens, every other
    frame `tokens_per_frame`. `answer` picks `chosen` or `rejected` of a preference pair.

    Raises SampleError with reason `empty_text`, `no_user_text`, `bad_text`, `bad_narration` or `bad_frames`.
    """
    turns = _turns(meta, answer)
    visual = _visual(meta, looks, tokens_per_frame)
    chat = ChatWriter(tokenizer)
    if layout == Layout.NARRATED and visual is not None:
        _narrate(chat, meta, turns[0][0], visual)
        return chat.finish()
    chat.turn("system", SYSTEM_MESSAGE)
    if visual is None:
        chat.turns(turns)
    elif layout == Layout.QUESTION_FIRST:
        chat.open("user", turns[0][0])
        chat.visual(visual)
        chat.close()
        chat.turn("assistant", turns[0][1])
        chat.turns(turns[1:])
    else:
        chat.turns(turns)
        return [visual, *chat.finish()]
    return chat.finish()


def _turns(meta: Mapping, answer: str) -> list[tuple[str, str]]:
    """(user, assistant) contents, checked; a missing first user content falls back to the source's prompt."""
    if meta.get("turns"):
        if not isinstance(meta["turns"], list) or not all(isinstance(turn, Mapping) for turn in meta["turns"]):
            raise SampleError("bad_text", "turns: expected a list of {user, assistant}")
        pairs = [(turn.get("user"), turn.get("assistant")) for turn in meta["turns"]]
    else:
        pairs = [(meta.get("user"), meta.get(answer) if answer in meta else meta.get("assistant"))]
    if not pairs[0][0] and meta.get("kind") != "text":
        pairs[0] = (SOURCE_PROMPTS.get(str(meta.get("source")).lower()), pairs[0][1])
    for number, (user, assistant) in enumerate(pairs):
        if user is None or user == "":
            source = meta.get("source")
            raise SampleError("no_user_text", f"turn {number} has no user text and source {source!r} no prompt")
        _check_string(user, f"turn {number}, user")
        if assistant is None or not _check_string(assistant, f"turn {number}, assistant").strip():
            raise SampleError("empty_text", f"turn {number} has no assistant text")
    return pairs


def _check_string(content: object, where: str) -> str:
    if not isinstance(content, str):
        raise SampleError("bad_text", f"{where}: {type(content).__name__} found, expected a string")
    try:
        content.encode()
    except UnicodeEncodeError as error:  # JSON can carry half of a surrogate pair
        raise SampleError("bad_text", f"{where}: {error}") from error
    return content


def _visual(meta: Mapping, looks: int, tokens_per_frame: int) -> Visual | None:
    """The sample's frames in order, each as often as it is looked at; None for a text-only sample."""
    kind = meta.get("kind")
    if kind == "text":
        return None
    count = meta.get("frame_count")
    if not isinstance(count, int) or count < 1:
        raise SampleError("bad_frames", f"kind {kind!r} with frame_count {count!r}, expected at least one frame")
    if kind == "image":
        return Visual((0,) * looks)
    return Visual(tuple(np.repeat(np.arange(count), tokens_per_frame).tolist()))


def _narrate(chat: ChatWriter, meta: Mapping, user: str, visual: Visual) -> None:
    narration, count = meta.get("narration"), len(set(visual.frames))
    if not isinstance(narration, list) or len(narration) != count or not has_narration(meta):
        raise SampleError("bad_narration", f"expected a list of {count} strings, one a frame, not all of them blank")
    if not meta.get("stream"):
        chat.turn("system", SYSTEM_MESSAGE)
        chat.turn("user", user)
        chat.open("assistant", "")
    for frame, said in enumerate(narration):
        chat.visual(Visual((frame,) * visual.frames.count(frame)))
        if frame == 0 and meta.get("stream"):
            chat.open("assistant", "")
        chat.plain(_check_string(said, f"narration {frame}"), is_answer=True)
    chat.close(is_answer=True)
