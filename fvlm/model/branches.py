"""Texts that go on from a pack's samples, all at once: what they share is computed once.

Shapes: T rows of the pack, B rows of the branches, S samples, K labels, d = language-model width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from .packed import PackedBatch

if TYPE_CHECKING:
    from .base import VisionLanguageModel


@dataclass(kw_only=True)
class Branches:
    """Texts behind samples of a pack; each sees its sample's rows and its own, and no other text's."""

    token_ids: Tensor
    """int64 [B], text after text."""
    position_ids: Tensor
    """int64 [B], going on from the sample's."""
    sample: Tensor
    """int64 [B], the pack's sample that the row's text goes on from."""
    text: Tensor
    """int64 [B], a number for each text."""
    loss_index: Tensor
    """int64 [K], the row that predicts: a branch's, or B + a row of the pack; unused: 0."""
    labels: Tensor
    """int64 [K], what it predicts; unused: −100."""

    def to(self, device: torch.device | str) -> Branches:
        """The same on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def branched_hidden_states(
    model: VisionLanguageModel, batch: PackedBatch, branches: Branches, text: Tensor, visual: Tensor
) -> Tensor:
    """[B + T, d] after the final norm: the branches' rows, then the pack's.

    The branches run behind the pack's keys and values, as one sequence in which a mask keeps them apart.
    """
    rows = model.sequence(batch, text, visual)[:-1]
    cache = DynamicCache(config=model.llm.config)
    shared = model.llm.model(
        inputs_embeds=rows.unsqueeze(0),
        position_ids=batch.position_ids.unsqueeze(0),
        past_key_values=cache,
        use_cache=True,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
    ).last_hidden_state
    if not len(branches.token_ids):
        return shared.squeeze(0)
    own = model.llm.model(
        inputs_embeds=model.llm.get_input_embeddings()(branches.token_ids).unsqueeze(0),
        position_ids=branches.position_ids.unsqueeze(0),
        attention_mask=_seen(batch, branches)[None, None],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return torch.cat([own, shared], dim=1).squeeze(0)


def _seen(batch: PackedBatch, branches: Branches) -> Tensor:
    """bool [B, T + B]: what each branch row attends to."""
    row = torch.arange(len(batch.token_ids), device=branches.sample.device)
    first, end = (batch.cu_seqlens[branches.sample + step].unsqueeze(1) for step in (0, 1))
    place = torch.arange(len(branches.text), device=branches.text.device)
    own = (branches.text.unsqueeze(1) == branches.text) & (place.unsqueeze(1) >= place)
    return torch.cat([(row >= first) & (row < end), own], dim=1)
