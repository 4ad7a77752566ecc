"""What a model writes about many clips: greedy answers to their prompts, batched by size, spread over the ranks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from fvlm.data.batch import LoadedSample, collate
from fvlm.data.chat import Text, Visual
from fvlm.data.chat_writer import TURN_END
from fvlm.data.errors import SampleError
from fvlm.evaluate.items import Item, Presentation, room_for, segment_lengths
from fvlm.evaluate.ranks import gather_over_ranks, rank_and_world
from fvlm.evaluate.validation import evaluating

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Writer:
    """How prompts are shown, and how much is written."""

    tokenizer: PreTrainedTokenizerBase
    presentation: Presentation
    new_tokens: int = 64
    """Most tokens of an answer."""
    token_budget: int = 4096
    """Rows of a batch, padding and what is to be written included; a longer prompt gets a batch of its own."""

    def write(
        self,
        model: nn.Module,
        items: Sequence[Item],
        device: torch.device | str,
        mode: str,
        fine_iterations: int = 1,
    ) -> tuple[list[str | None], Counter]:
        """The likeliest answers to all prompts, the same on every rank; None where there is none, the reasons counted.

        Batches follow from all prompts together and not from ranks. Ranks run different numbers of batches: the model
        has to be whole on each.
        """
        prompts: dict[int, list[Text | Visual]] = {}
        lost: dict[int, str] = {}
        for index, item in enumerate(items):
            try:
                prompts[index] = self._prompt(item.meta)
            except SampleError as error:
                lost[index] = error.reason
        batches = self._batches(prompts)
        rank, world = rank_and_world()
        said: dict[int, str] = {}
        with evaluating(model):
            for batch in tqdm(batches[rank::world], "batches written", leave=False, disable=True if rank else None):
                self._write_batch(
                    model, items, {i: prompts[i] for i in batch}, device, mode, fine_iterations, said, lost
                )
        for other_said, other_lost in gather_over_ranks((said, lost)):
            said.update(other_said)
            lost.update(other_lost)
        return [said.get(index) for index in range(len(items))], Counter(lost.values())

    def _prompt(self, meta: Mapping) -> list[Text | Visual]:
        """The chat up to where the assistant's first answer begins."""
        parts: list[Text | Visual] = []
        for part in self.presentation.segments({**meta, "assistant": "x"}, self.tokenizer):
            if isinstance(part, Text) and part.is_answer.any():
                first = int(part.is_answer.argmax())
                return [*parts, Text(part.token_ids[:first], part.is_answer[:first])]
            parts.append(part)
        raise SampleError("no_answer", "no segment holds answer tokens")

    def _batches(self, prompts: Mapping[int, list[Text | Visual]]) -> list[list[int]]:
        """Prompts of similar length together, the longest first: what does not fit in memory is seen at once."""
        rows = {i: sum(segment_lengths(prompt, self.presentation.grid)) for i, prompt in prompts.items()}
        batches: list[list[int]] = []
        for index in sorted(prompts, key=lambda i: (-rows[i], i)):
            longest = rows[batches[-1][0]] + self.new_tokens if batches else 0
            if not batches or (len(batches[-1]) + 1) * longest > self.token_budget:
                batches.append([])
            batches[-1].append(index)
        return batches

    def _write_batch(self, model, items, prompts, device, mode, fine_iterations, said, lost) -> None:
        samples: dict[int, LoadedSample] = {}
        for index, prompt in prompts.items():
            try:
                frames = np.array(items[index].read_frames())  # its own, whoever else looks at the clip
            except SampleError as error:
                logger.warning("%s left out: %s", items[index].meta.get("key"), error)
                lost[index] = error.reason
                continue
            key = str(items[index].meta.get("key"))
            samples[index] = LoadedSample(key=key, segments=prompt, frames=frames, source_id=0)
        if not samples:
            return
        loaded, shown = list(samples.values()), self.presentation
        batch = collate(loaded, room_for(loaded, shown.grid), "ce_answer", shown.image_size, shown.grid)
        end = self.tokenizer.convert_tokens_to_ids(TURN_END)
        tokens = model.generate(
            batch=batch.to(device),
            mode=mode,
            fine_iterations=fine_iterations,
            max_new_tokens=self.new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        for index, row in zip(samples, tokens.tolist(), strict=True):
            said[index] = self.tokenizer.decode(row, skip_special_tokens=True).strip()
