"""Text after frames: transformers' ``generate`` behind the model's own looking.

Shapes: B samples, P = rows of the longest, d = language-model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .packed import PackedBatch

if TYPE_CHECKING:
    from .base import VisionLanguageModel


@contextmanager
def decoding(llm: nn.Module) -> Iterator[None]:
    """Within, the language model makes transformers' masks for padding and cached rows, which packed rows do without.

    It holds for the module, so not for two threads at once.
    """
    before = llm.config._attn_implementation
    llm.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        llm.config._attn_implementation = before


def generate(model: VisionLanguageModel, batch: PackedBatch, mode: str, fine_iterations: int, **options) -> Tensor:
    """Tokens after each sample of a pack without unused samples; see ``VisionLanguageModel.generate``."""
    text = model.llm.get_input_embeddings()(batch.token_ids)
    visual = model.visual_tokens(batch, text, mode, fine_iterations, False)
    rows = model.sequence(batch, text, visual.tokens)
    rows[-1] = 0  # holds what unused slots do
    starts, lengths = batch.cu_seqlens[:-1, None], batch.cu_seqlens.diff()[:, None]
    # padding first: the last position writes the next token
    place = torch.arange(int(lengths.max()), device=rows.device) - (lengths.max() - lengths)
    real = place >= 0
    embedded = rows[torch.where(real, starts + place, len(rows) - 1)]
    with decoding(model.llm):
        return model.llm.generate(inputs_embeds=embedded, attention_mask=real.long(), **options)
