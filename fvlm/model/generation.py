"""Autoregressive looking: each query is written after the token before it was seen, with a KV cache (docs/model.md).

Shapes: S samples, L the longest chunk of a step, V visual tokens, d = language-model width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from .base import VisionLanguageModel, VisualTokens
from .encoder import EncodedFrames
from .packed import PackedBatch


def autoregressive_tokens(
    model: VisionLanguageModel, batch: PackedBatch, text: Tensor, encoded: EncodedFrames, entropy: bool, maps: bool
) -> VisualTokens:
    """Visual tokens of every sample of a pack, looked up one after the other.

    Step r feeds each sample's rows from its (r−1)-th visual token up to the row before its r-th one; the last hidden
    state writes the r-th query. Samples advance together; those without an r-th visual token rest.

    Args:
        text: [T, d] embedded rows.
        encoded: keys and values of the pack's frames.

    Returns:
        tokens [V, d]; zero in unused slots.
    """
    rows = torch.cat([text, text.new_zeros(1, text.shape[1])])
    tokens = text.new_zeros(len(batch.visual_index), text.shape[1])
    inspected: dict[str, list[Tensor]] = {"entropy": [], "maps": []}
    slots_seen = []
    cache = _ChunkCache(model, len(batch.source_id))
    cursor = batch.cu_seqlens[:-1].tolist()
    for step in _steps(batch):
        hidden = cache.feed(rows, batch.position_ids, [(s, cursor[s], row) for s, row, _ in step])
        queries = [
            model.llm_to_query(hidden[s]) if row > cursor[s] else model.q_init.squeeze(0).to(text.dtype)
            for s, row, _ in step
        ]
        slots = torch.tensor([slot for _, _, slot in step], device=text.device)
        by_frame = batch.visual_frame[slots].argsort(stable=True)
        slots, queries = slots[by_frame], torch.stack(queries)[by_frame]
        if model.config.random_queries:
            queries = torch.randn_like(queries)
        seen = model.encoder.look(queries, encoded, batch.visual_frame[slots], entropy=entropy, maps=maps)
        # autocast may give another dtype than the weights', which index_copy does not turn into that of its rows
        tokens = tokens.index_copy(0, slots, model.to_llm(seen.z).to(tokens.dtype))
        rows = rows.index_copy(0, batch.visual_index[slots], tokens[slots])
        slots_seen.append(slots)
        inspected["entropy"].append(seen.entropy)
        inspected["maps"].append(seen.maps)
        for s, row, _ in step:
            cursor[s] = row
    return VisualTokens(
        tokens,
        entropy=_in_slots(inspected["entropy"], slots_seen, len(tokens)) if entropy else None,
        maps=_in_slots(inspected["maps"], slots_seen, len(tokens)) if maps else None,
    )


def _steps(batch: PackedBatch) -> list[list[tuple[int, int, int]]]:
    """Per step r, (sample, row, visual slot) of each sample's r-th visual token."""
    bounds = batch.cu_seqlens
    used = (batch.visual_index < bounds[-1]).nonzero().squeeze(1)
    slots = used[batch.visual_index[used].argsort()]
    rows = batch.visual_index[slots]
    samples = torch.searchsorted(bounds.long(), rows, right=True) - 1
    steps: list[list[tuple[int, int, int]]] = []
    seen: dict[int, int] = {}
    for sample, row, slot in zip(samples.tolist(), rows.tolist(), slots.tolist(), strict=True):
        rank = seen[sample] = seen.get(sample, -1) + 1
        if rank == len(steps):
            steps.append([])
        steps[rank].append((sample, row, slot))
    return steps


def _in_slots(parts: list[Tensor], slots: list[Tensor], num_slots: int) -> Tensor | None:
    if not parts:
        return None
    joined = torch.cat(parts)
    return joined.new_zeros(num_slots, *joined.shape[1:]).index_copy(0, torch.cat(slots), joined)


class _ChunkCache:
    """A KV cache filled with chunks of different lengths; shorter ones leave holes that nobody attends to."""

    def __init__(self, model: VisionLanguageModel, num_samples: int):
        self.model, self.num_samples = model, num_samples
        self.cache = DynamicCache(config=model.llm.config)
        self.filled: Tensor | None = None  # bool [S, rows so far]

    def feed(self, rows: Tensor, position_ids: Tensor, chunks: list[tuple[int, int, int]]) -> dict[int, Tensor]:
        """Run rows start:end of each (sample, start, end); the last hidden state [d] of each non-empty chunk."""
        length = max((end - start for _, start, end in chunks), default=0)
        if length == 0:
            return {}
        index = torch.full((self.num_samples, length), len(rows) - 1, device=rows.device)
        for sample, start, end in chunks:
            index[sample, : end - start] = torch.arange(start, end, device=rows.device)
        filled = index < len(rows) - 1
        out = self.model.llm.model(
            inputs_embeds=rows[index],
            position_ids=position_ids[index.clamp(max=len(position_ids) - 1)],
            attention_mask=self._mask(filled),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return {sample: out[sample, end - start - 1] for sample, start, end in chunks if end > start}

    def _mask(self, filled: Tensor) -> Tensor:
        """bool [S, 1, L, rows so far + L]; every row sees itself, so that holes stay finite."""
        length = filled.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=filled.device).tril()
        new = (causal & filled[:, None, :]) | torch.eye(length, dtype=torch.bool, device=filled.device)
        old = filled.new_zeros(len(filled), 0) if self.filled is None else self.filled
        mask = torch.cat([old[:, None, :].expand(-1, length, -1), new], dim=2)
        self.filled = torch.cat([old, filled], dim=1)
        return mask.unsqueeze(1)
