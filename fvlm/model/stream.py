"""Watching without an end: frames one after the other into a KV cache, questions at any time.

Shapes: k tokens a frame, L text tokens, d = language-model width, q = query width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .answering import decoding
from .cache import GrowingCache
from .encoder import EncodedFrames
from .fvlm import FoveatedVLM

ENCODED_TOGETHER = 8
"""Frames whose keys and values are in memory at a time."""


class FoveatedStream:
    """Autoregressive looking at frames as they come; each costs one look and one step of the language model.

    What is asked does not enter the memory of what was seen: every question finds the frames alone before it, as in
    training. Not for two threads at once.

    Args:
        model: in evaluation mode.
        memory: newest visual tokens that looks and answers can attend to; a further one takes the place of the oldest.
            None: three quarters of the language model's context, so that questions and answers have room.
        prompt_ids: int64 [L] text before the first frame (question first): it directs every look and stays.

    Raises:
        ValueError: a multi-token model, or ``memory`` below 1.
    """

    def __init__(self, model: FoveatedVLM, memory: int | None = None, prompt_ids: Tensor | None = None):
        if model.config.architecture != "foveated":
            raise ValueError("FoveatedStream needs a foveated model: the multi-token one writes no queries")
        context = model.config.llm_config.max_position_embeddings
        self.memory = memory if memory is not None else max(1, context - context // 4)
        if self.memory < 1:
            raise ValueError(f"memory={memory}: expected at least 1")
        self.model, self.frames_seen = model, 0
        self._cache = GrowingCache(model.config.llm_config.num_hidden_layers)
        self._prompt_length = 0 if prompt_ids is None else len(prompt_ids)
        self._position = 0  # of the next row; also counts those that were forgotten
        self._query = model.q_init  # [1, q] that the next look takes
        if self._prompt_length:
            with torch.no_grad():
                self._feed(model.llm.get_input_embeddings()(prompt_ids))

    @torch.no_grad()
    def push(self, frames: Tensor, maps: bool = False) -> Tensor | None:
        """Look at the next frames.

        Args:
            frames: uint8 [n, 3, H, W] pixels, or floating point and already normalised.
            maps: return where each token looked.

        Returns:
            float32 [n·k, layers, heads, keys] attention weights, CLS first, if ``maps``; else None.
        """
        seen = []
        for part in frames.split(ENCODED_TOGETHER):
            encoded = self.model.encoder(part)
            for index in range(len(part)):
                one = EncodedFrames(
                    layer_keys=[x[index : index + 1] for x in encoded.layer_keys],
                    layer_values=[x[index : index + 1] for x in encoded.layer_values],
                )
                seen += [self._look(one, maps) for _ in range(self.model.config.tokens_per_frame)]
                self.frames_seen += 1
        return torch.cat(seen) if maps and seen else None

    @torch.no_grad()
    def ask(self, input_ids: Tensor, **options) -> Tensor:
        """Answer to a question about what was seen so far.

        Args:
            input_ids: int64 [L], a chat up to where the answer starts.
            options: transformers' generation options (``max_new_tokens``, ``do_sample``, ``streamer`` …).

        Returns:
            int64 [new tokens], of the first sequence that ``generate`` returns.

        Raises:
            ValueError: no text.
        """
        if input_ids.ndim != 1 or not len(input_ids):
            raise ValueError(f"input_ids: expected [L] with at least one token, got {tuple(input_ids.shape)}")
        ids, kept = input_ids.unsqueeze(0), self._cache.get_seq_length()
        with decoding(self.model.llm):
            out = self.model.llm.generate(
                input_ids=ids,
                attention_mask=ids.new_ones(1, kept + ids.shape[1]),
                position_ids=torch.arange(self._position, self._position + ids.shape[1], device=ids.device)[None],
                past_key_values=self._cache.fork(),
                **options,
            )
        return out[0, ids.shape[1] :]

    def _look(self, frame: EncodedFrames, maps: bool) -> Tensor | None:
        """One visual token, in the language model's memory."""
        query = torch.randn_like(self._query) if self.model.config.random_queries else self._query
        first = torch.zeros(1, dtype=torch.int64, device=query.device)
        seen = self.model.encoder.look(query, frame, first, maps=maps)
        num_tokens = self._position - self._prompt_length
        is_full = num_tokens >= self.memory
        self._cache.put_next_into(self._prompt_length + num_tokens % self.memory if is_full else None)
        self._feed(self.model.to_llm(seen.z))
        return seen.maps

    def _feed(self, rows: Tensor) -> None:
        """Run the language model over rows [n, d]; the last one's hidden state writes the next query."""
        positions = torch.arange(self._position, self._position + len(rows), device=rows.device)
        hidden = self.model.llm.model(
            inputs_embeds=rows.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self._query = self.model.llm_to_query(hidden[:, -1])
        self._position += len(rows)
