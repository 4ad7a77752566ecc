"""From media and a question to what the model takes, in `AutoProcessor`'s manner.

Shapes: B samples, n frames, L text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from fvlm.data.chat import SYSTEM_MESSAGE
from fvlm.data.chat_writer import ChatWriter, Text, Visual
from fvlm.data.picture import read_picture
from fvlm.data.video import frame_times, read_media

MEDIA = ("image", "video")
ROLES = ("system", "user", "assistant")


class _Sample(NamedTuple):
    """One chat with its frames."""

    frames: np.ndarray
    """uint8 [n, size, size, 3]; of a still, as many copies as it is looked at."""
    token_ids: np.ndarray
    visual_at: int
    """Text tokens before the frames."""


class FoveatedProcessor(ProcessorMixin):
    """Reads videos and stills, and writes chats the way the model was trained on them.

    Frames are taken one a second, at most `max_frames` and evenly spaced, scaled and cropped to `frame_size` pixels; of
    a video only what these need is decoded. The frames come before the chat unless `question_first`.

    Args:
        tokenizer: with SmolLM2's chat format.
        frame_size: side of a frame in pixels.
        max_frames: most frames of a video.
        looks: how often a single still is given; every look is one token (or `tokens_per_frame` of the model).
        question_first: the frames stand at the end of the first user turn, so that the question directs every look.
        chat_template: the tokenizer's, for `apply_chat_template` with `tokenize=False`.
    """

    model_input_names = ["frames", "frame_mask", "input_ids", "attention_mask", "visual_at"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        frame_size: int = 224,
        max_frames: int = 64,
        looks: int = 8,
        question_first: bool = False,
        chat_template: str | None = None,
    ):
        self.frame_size, self.max_frames = frame_size, max_frames
        self.looks, self.question_first = looks, question_first
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """A question about each picture or video.

        Args:
            images, videos: one of them, or none: a path, a PIL picture, uint8 [H, W, 3], or uint8 [n, H, W, 3] of one
                frame a second; a list of these for a list of questions. A file is what it is, whichever names it.
            text: a question, or a list.
            return_tensors: `pt`, the only choice.

        Returns:
            frames uint8 [B, n, 3, H, W], frame_mask bool [B, n], input_ids int64 [B, L], attention_mask bool [B, L] and
            visual_at int64 [B], as `model(...)` and `model.generate(...)` take them; padding at the end.

        Raises:
            ValueError: no text, both images and videos, or another number of media than questions.
            MediaError (a ValueError): a file that is not there, cannot be read or is neither picture nor video.
        """
        if text is None:
            raise ValueError("text: expected a question, or a list of them")
        if images is not None and videos is not None:
            raise ValueError("images and videos: expected one of them; mixed media go through apply_chat_template")
        questions = [text] if isinstance(text, str) else list(text)
        given = images if videos is None else videos
        media = [given] if isinstance(text, str) else [None] * len(questions) if given is None else list(given)
        if len(media) != len(questions):
            raise ValueError(f"{len(media)} media for {len(questions)} texts: expected one for each")
        chats = []
        for question, medium in zip(questions, media, strict=True):
            parts = [{"type": "text", "text": question}]
            if medium is not None:
                parts.insert(0, {"type": "video", "video": medium})
            chats.append([{"role": "user", "content": parts}])
        return self._batch(chats, True, return_tensors)

    def apply_chat_template(
        self,
        conversation: list,
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        return_dict: bool = True,
        return_tensors: str = "pt",
    ) -> str | list[str] | BatchFeature | torch.Tensor:
        """A chat, or a list of chats, of messages `{"role", "content"}`.

        `content` is text, or a list of `{"type": "text", "text": …}` and `{"type": "image" | "video", "path": …}` (or,
        instead of `path`, a value under the type's own name, as `__call__` takes it). To a chat belong one video, one
        still, or several stills, each looked at once. Without a system message, the one of training comes first.

        With `tokenize` what `__call__` returns (without `return_dict` the token ids alone), else the text: frames have
        none.
        """
        single = bool(conversation) and isinstance(conversation[0], Mapping)
        chats = [conversation] if single else conversation
        if not tokenize:
            plain = [[{"role": role, "content": said} for role, said, _ in _messages(chat)] for chat in chats]
            options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
            texts = [self.tokenizer.apply_chat_template(chat, **options) for chat in plain]
            return texts[0] if single else texts
        batch = self._batch(chats, add_generation_prompt, return_tensors)
        return batch if return_dict else batch["input_ids"]

    # -- one sample -----------------------------------------------------------------------------------------------

    def _batch(self, chats: list[list[Mapping]], open_answer: bool, return_tensors: str) -> BatchFeature:
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: expected 'pt'")
        samples = [self._sample(_messages(chat), open_answer) for chat in chats]
        frames, frame_mask = _padded([sample.frames for sample in samples])
        input_ids, attention_mask = _padded([sample.token_ids.astype(np.int64) for sample in samples])
        return BatchFeature(
            {
                "frames": frames.permute(0, 1, 4, 2, 3).contiguous(),
                "frame_mask": frame_mask,
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "visual_at": torch.tensor([sample.visual_at for sample in samples]),
            }
        )

    def _sample(self, messages: list[tuple[str, str, list]], open_answer: bool) -> _Sample:
        media = [medium for *_, found in messages for medium in found]
        frames = self._frames(media)
        chat, placed = ChatWriter(self.tokenizer), not (self.question_first and media)
        for role, said, _ in messages:
            chat.open(role, said)
            if role == "user" and not placed:
                chat.visual(Visual(()))
                placed = True
            chat.close()
        if open_answer:
            chat.open("assistant", "")
        parts = chat.finish()
        texts = [part.token_ids for part in parts if isinstance(part, Text)]
        directed = any(isinstance(part, Visual) for part in parts)
        return _Sample(frames, np.concatenate(texts), len(texts[0]) if directed else 0)

    def _frames(self, media: list) -> np.ndarray:
        """uint8 [n, size, size, 3] of a chat's media; raises MediaError."""
        if not media:
            return np.zeros((0, self.frame_size, self.frame_size, 3), np.uint8)
        read = [self.read(medium) for medium in media]
        if len(read) == 1:
            frames, is_still = read[0]
            return np.repeat(frames, self.looks, axis=0) if is_still else frames
        if not all(is_still for _, is_still in read):
            raise ValueError("media: expected one video, or any number of stills, in a chat")
        return np.concatenate([frames for frames, _ in read])

    def read(self, medium: Any) -> tuple[np.ndarray, bool]:
        """Frames uint8 [n, size, size, 3] of what `__call__` takes as one medium, and whether they are a still.

        Raises MediaError (a ValueError) for a file that cannot be read, and ValueError for what is no medium.
        """
        if isinstance(medium, (str, Path)):
            found = read_media(medium, self.frame_size, self.max_frames)
            return found.frames, found.kind == "image"
        if isinstance(medium, Image.Image):
            return self._read_picture(medium)
        pixels = np.asarray(medium)
        if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3 or not pixels.size:
            raise ValueError(
                "media: expected a path, a PIL picture, or uint8 [H, W, 3] or [n, H, W, 3], "
                f"got {type(medium).__name__} {pixels.dtype} {list(pixels.shape)}"
            )
        if pixels.ndim == 3:
            return self._read_picture(Image.fromarray(pixels))
        chosen = frame_times(len(pixels), self.max_frames).astype(int)
        return np.concatenate([self._read_picture(Image.fromarray(pixels[i]))[0] for i in chosen]), False

    def _read_picture(self, picture: Image.Image) -> tuple[np.ndarray, bool]:
        frames, seconds = read_picture(picture, self.frame_size, lambda s: frame_times(s, self.max_frames))
        return frames, seconds is None


def _messages(chat: list[Mapping]) -> list[tuple[str, str, list]]:
    """(role, text, media) of each message, opened by a system message.

    Raises ValueError for a message that is no `{"role", "content"}` of a known role and known parts.
    """
    found = []
    for number, message in enumerate(chat):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, (str, list)):
            raise ValueError(f"message {number}: expected role ({', '.join(ROLES)}) and content, got {dict(message)}")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        media, said = [], []
        for part in parts:
            kind = part.get("type")
            if kind == "text" and isinstance(part.get("text"), str):
                said.append(part["text"])
            elif kind in MEDIA and (medium := part.get("path", part.get(kind))) is not None:
                media.append(medium)
            else:
                raise ValueError(f"message {number}: expected text, image or video (with `path`), got {part}")
        found.append((role, "\n".join(said), media))
    if not found:
        raise ValueError("conversation: expected at least one message")
    return found if found[0][0] == "system" else [("system", SYSTEM_MESSAGE, []), *found]


def _padded(parts: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, longest, ...] with zeros at the end, and bool [B, longest], True where there is something."""
    longest = max(len(part) for part in parts)
    out = torch.zeros(len(parts), longest, *parts[0].shape[1:], dtype=torch.from_numpy(parts[0][:0]).dtype)
    mask = torch.zeros(len(parts), longest, dtype=torch.bool)
    for row, part in enumerate(parts):
        out[row, : len(part)] = torch.from_numpy(np.ascontiguousarray(part))
        mask[row, : len(part)] = True
    return out, mask
