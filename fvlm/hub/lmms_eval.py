"""fVLM as a model of lmms-eval, which alone imports this, by the entry point `lmms_eval.models` (docs/evaluation.md).

python -m lmms_eval --model fvlm --model_args checkpoint=runs/demo,mode=coarse_fine --tasks mvbench --batch_size 8
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from loguru import logger
from torch import Tensor
from tqdm import tqdm

from fvlm.data.chat_writer import TURN_END
from fvlm.data.errors import MediaError
from fvlm.evaluate.items import Item
from fvlm.evaluate.multiple_choice import option_request
from fvlm.evaluate.ranks import alone
from fvlm.evaluate.scoring import score
from fvlm.hub.harness import at_least_one, cut, flat, generation_options
from fvlm.hub.opening import open_model
from fvlm.model.configuration import MODES
from fvlm.schema import ConfigError


def manifest():
    """The `ModelManifest` that the harness registers."""
    from lmms_eval.models.registry_v2 import ModelManifest  # late: its package calls this while it is being imported

    return ModelManifest(model_id="fvlm", simple_class_path=f"{__name__}.{HarnessModel.__name__}")


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A question with its frames."""

    key: str
    text: str
    kind: str
    """"video", "image", "images" or "text"."""
    frames: np.ndarray
    """uint8 [n, size, size, 3]; a still once."""

    @property
    def item(self) -> Item:
        meta = {"key": self.key, "kind": self.kind, "frame_count": len(self.frames), "user": self.text}
        frames = np.ascontiguousarray(self.frames.transpose(0, 3, 1, 2))
        return Item(meta=meta, num_frames=len(frames), read_frames=lambda: frames)

    @property
    def chat(self) -> list[dict]:
        frames = [self.frames] if self.kind == "video" else self.frames
        kind = "video" if self.kind == "video" else "image"
        shown = [{"type": kind, kind: medium} for medium in frames]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": self.text}]}]


class HarnessModel(lmms):
    """A model and the way it is asked.

    Args:
        checkpoint: what `launch/describe.py` opens: an exported folder, a run, a checkpoint, `hf:owner/name`.
        mode: how it looks; None: as `launch/describe.py` does.
        fine_iterations: of coarse_fine; None: its run's first, or 1.
        max_frames: most frames of a video; None: the processor's.
        device: None: this rank's GPU, and the CPU where there is none.
        batch_size: documents at a time.
        tokenizer: for a folder that names none.

    Raises ConfigError for a value that none of these can have, naming it.
    """

    is_simple = True  # text and media apart; the harness asks for likelihoods in this form alone

    def __init__(
        self,
        checkpoint: str,
        mode: str | None = None,
        fine_iterations: int | None = None,
        max_frames: int | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        tokenizer: str | None = None,
    ):
        super().__init__()
        if mode is not None and mode not in MODES:
            raise ConfigError(f"mode={mode}: expected one of {', '.join(MODES)}")
        self.batch_size, self.device = at_least_one("batch_size", batch_size), _device(device)
        opened = open_model(str(checkpoint), tokenizer)
        self.model, self.processor = opened.model.to(self.device), opened.processor
        if max_frames is not None:
            self.processor.max_frames = at_least_one("max_frames", max_frames)
        passes = opened.fine_iterations if fine_iterations is None else at_least_one("fine_iterations", fine_iterations)
        self.looking = {"mode": mode or opened.default_mode, "fine_iterations": passes}
        self.presentation = opened.presentation

    # -- what the harness calls -----------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model writes to each request; "" where its media cannot be read."""
        said: list[str] = []
        with self._reported(len(requests)) as bar:
            for given, alike in groupby(requests, key=lambda request: request.args[1]):
                for batch in _parts(list(alike), self.batch_size):
                    said += self._answers([self._ask(request) for request in batch], given)
                    bar.update(len(batch))
        return said

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """As `generate_until`, a list for each request: after each answer the task says what is asked next."""
        said: list[list[str]] = []
        with self._reported(len(requests)) as bar:
            for text, given, show, go_on, number, task, split in (request.args for request in requests):
                doc = self.task_dict[task][split][number]
                visuals, answers, known, ended, rounds = show(doc), [], None, False, 0
                while not ended:
                    rounds += 1
                    answers = [*answers, *self._answers([self._look(f"{task}/{number}", text, visuals)], given)]
                    found = go_on(doc, previous_output=answers, round_idx=rounds, previous_round_info=known)
                    visuals, text, ended, answers, known = found
                said.append(list(answers))
                bar.update()
        return said

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(-Σ log p of a continuation as the whole answer, whether it is what the model would write) of each request.

        The harness takes the least of a question's values. A bare pair it would turn into text.

        Raises ValueError, after all were asked, where media could not be read: the harness would score any number.
        """
        if any(len(request.args) != 6 for request in requests):  # a continuation of nothing
            raise ValueError("acc_mutual_info: lmms-eval takes its worst option for the best; leave this metric out")
        found: list[GenerationResult] = []
        same = groupby(requests, key=lambda request: (request.args[0], *_place(request)))
        documents = [list(alike) for _, alike in same]
        with self._reported(len(requests)) as bar:
            for batch in _parts(documents, self.batch_size):
                found += self._likelihoods(batch)
                bar.update(sum(map(len, batch)))
        if self.lost:
            raise ValueError(
                f"{self.lost.total()} questions cannot be shown ({dict(self.lost)}; named above), and a choice by "
                f"likelihood cannot be left open: take them out of the task, or ask it by generate_until"
            )
        return found

    # -- asking ---------------------------------------------------------------------------------------------------

    def _ask(self, request: Instance) -> _Asked | None:
        number, task, split = _place(request)
        return self._look(f"{task}/{number}", request.args[0], request.args[2](self.task_dict[task][split][number]))

    def _look(self, key: str, text: str, visuals: Any) -> _Asked | None:
        """The question with its media decoded; None where they cannot be, logged and counted."""
        try:
            read = [self.processor.read(medium) for medium in flat(visuals)]
            if len(read) > 1 and not all(is_still for _, is_still in read):
                raise MediaError("mixed_media", "expected one video, or any number of stills")
        except ValueError as error:
            reason = error.reason if isinstance(error, MediaError) else "unknown_media"
            self.lost[reason] += 1
            logger.error("{} cannot be shown: {}", key, error)
            return None
        size = self.processor.frame_size
        frames = np.concatenate([np.zeros((0, size, size, 3), np.uint8), *(frames for frames, _ in read)])
        is_video = bool(read) and not read[0][1]
        kind = "video" if is_video else ("text", "image", "images")[min(len(read), 2)]
        return _Asked(key=key, text=text, kind=kind, frames=frames)

    def _answers(self, asked: Sequence[_Asked | None], given: Mapping[str, Any]) -> list[str]:
        options, until = generation_options(given)
        there = [each for each in asked if each]
        rows = self._write(there, **options) if there else ()
        said = (self.processor.decode(row, skip_special_tokens=True).strip() for row in rows)
        return [cut(next(said), until) if each else "" for each in asked]

    def _write(self, asked: Sequence[_Asked], **options) -> Tensor:
        """int64 [B, new tokens], padded with the end of the turn."""
        started = time.perf_counter()
        end = self.processor.tokenizer.convert_tokens_to_ids(TURN_END)
        chats = [each.chat for each in asked]
        inputs = self.processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True).to(self.device)
        rows = self.model.generate(**inputs, **self.looking, eos_token_id=end, pad_token_id=end, **options).cpu()
        self.seconds += time.perf_counter() - started
        self.tokens += int((rows != end).sum())
        return rows

    def _likelihoods(self, documents: Sequence[Sequence[Instance]]) -> list[GenerationResult]:
        """As `loglikelihood`, of some documents' continuations, without those of a document that cannot be shown."""
        asked = {at: each for at, same in enumerate(documents) if (each := self._ask(same[0]))}
        if not asked:
            return []
        tokenizer, shown = self.processor.tokenizer, self.presentation
        options = {at: [self._continuation(request) for request in documents[at]] for at in asked}
        requests = [option_request(each.item, options[at], tokenizer, shown) for at, each in asked.items()]
        with alone():  # the harness has divided the documents among the ranks
            scores, _ = score(self.model, requests, presentation=shown, device=self.device, **self.looking)
        longest = max(len(targets) for request in requests for targets in request.targets)
        written = self._write(list(asked.values()), max_new_tokens=longest, do_sample=False).tolist()
        found = []
        for request, sums, row in zip(requests, scores, written, strict=True):
            for targets, logprob in zip(request.targets, sums.logprob.tolist(), strict=True):
                is_greedy = row[: len(targets)] == targets[:, 2].tolist()
                found.append(GenerationResult((-logprob, is_greedy)))
        return found

    def _continuation(self, request: Instance) -> str:
        """Without the white space in front: in a chat an answer begins a turn, and continues no line."""
        number, task, split = _place(request)
        target = request.args[1]
        return str(target(self.task_dict[task][split][number]) if callable(target) else target).lstrip()

    @contextmanager
    def _reported(self, total: int) -> Iterator[tqdm]:
        """A bar around a call; then how many questions were lost, in the log and in the results' "throughput"."""
        from lmms_eval.models.model_utils.gen_metrics import log_metrics  # late: see `manifest`

        self.lost, self.tokens, self.seconds = Counter(), 0, 0.0
        with tqdm(total=total, desc="Model Responding", disable=self.rank != 0) as bar:
            yield bar
        if self.lost:
            logger.error("{} questions could not be shown: {}", self.lost.total(), dict(self.lost))
        speed = self.tokens / self.seconds if self.seconds else 0.0
        log_metrics(self.seconds, self.tokens, speed, {"not_shown": self.lost.total()})


def _place(request: Instance) -> tuple[int, str, str]:
    """Document, task and split of a request about one text."""
    return request.args[3:6]


def _parts(things: Sequence, size: int) -> Iterator[Sequence]:
    return (things[start : start + size] for start in range(0, len(things), size))


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
