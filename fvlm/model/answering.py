"""Text after frames: transformers' ``generate`` behind the model's own looking.

Shapes: B samples, n frames, L text tokens, P = visual and text positions, d = language-model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .padded import pack_padded

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


def generate(
    model: VisionLanguageModel,
    frames: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    frame_mask: Tensor | None,
    visual_at: Tensor | None,
    mode: str,
    fine_iterations: int,
    **options,
) -> Tensor:
    """Tokens after each sample's text; see ``VisionLanguageModel.generate``."""
    padded = pack_padded(model.config, frames, input_ids, attention_mask, None, frame_mask, visual_at)
    text = model.llm.get_input_embeddings()(padded.batch.token_ids)
    visual = model.visual_tokens(padded.batch, text, mode, fine_iterations, False)
    rows = model.sequence(padded.batch, text, visual.tokens)
    rows[-1] = 0  # holds what unused slots do
    real = padded.row_of_position < len(rows) - 1
    to_the_right = real.long().argsort(dim=1, stable=True)  # padding first: the last position writes the next token
    embedded = rows[padded.row_of_position.gather(1, to_the_right)]
    with decoding(model.llm):
        return model.llm.generate(inputs_embeds=embedded, attention_mask=real.gather(1, to_the_right).long(), **options)
