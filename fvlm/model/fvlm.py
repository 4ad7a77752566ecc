"""The foveated vision-language model: one looked-up token a frame (docs/model.md).

Shapes: T rows, C coarse rows, V visual tokens, F frames, d = language-model width, D = DINOv2 width, q = query width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import generation
from .base import VisionLanguageModel, VisualTokens
from .configuration import FoveatedConfig
from .encoder import EncodedFrames
from .packed import PackedBatch


class FoveatedVLM(VisionLanguageModel):
    """The language model writes a query for each visual token, which looks into its frame through every layer."""

    def __init__(self, config: FoveatedConfig, llm=None, dino=None):
        super().__init__(config, llm, dino)
        width = config.query_dim
        self.q_static = nn.Parameter(torch.randn(1, width))
        self.q_init = nn.Parameter(torch.randn(1, width))
        self.llm_to_query = nn.Linear(config.llm_config.hidden_size, width)
        self.post_init()

    def visual_tokens(
        self, batch: PackedBatch, text: Tensor, mode: str, fine_iterations: int, entropy: bool
    ) -> VisualTokens:
        """Coarse tokens, fine tokens after ``fine_iterations`` looks, or tokens looked up one after the other."""
        return self._look(batch, text, mode, fine_iterations, entropy, maps=False)

    def attention_maps(self, batch: PackedBatch, mode: str = "coarse_fine", fine_iterations: int = 1) -> Tensor:
        """Where the final visual tokens' queries looked: float32 [V, L, h, N], CLS first, patches row-major."""
        with torch.no_grad():
            text = self.llm.get_input_embeddings()(batch.token_ids)
            return self._look(batch, text, mode, fine_iterations, entropy=False, maps=True).maps

    def _look(self, batch, text, mode, fine_iterations, entropy, maps) -> VisualTokens:
        inspect = {"entropy": entropy, "maps": maps}
        if mode == "autoregressive":
            return generation.autoregressive_tokens(self, batch, text, self.encoder(batch.frames), **inspect)
        encoded = self.encoder(batch.frames, coarse_query=self.q_static)
        coarse = F.embedding(batch.visual_frame, self.to_llm(encoded.coarse))
        if mode == "coarse_only":
            if not (entropy or maps):
                return VisualTokens(coarse)
            seen = self.encoder.look(
                self.q_static.expand(len(batch.visual_frame), -1), encoded, batch.visual_frame, **inspect
            )
            return VisualTokens(coarse, entropy=seen.entropy, maps=seen.maps)
        return self._fine(batch, text, encoded, coarse, fine_iterations, inspect)

    def _fine(
        self, batch: PackedBatch, text: Tensor, encoded: EncodedFrames, coarse: Tensor, iterations: int, inspect: dict
    ) -> VisualTokens:
        """docs/model.md, Coarse → fine, steps 1–2, ``iterations`` times."""
        tokens = coarse
        for iteration in range(iterations):
            last = iteration == iterations - 1
            query = self.write_queries(batch, self.prefix_hidden_states(batch, text, tokens))
            seen = self.encoder.look(query, encoded, batch.visual_frame, **(inspect if last else {}))
            tokens = self.to_llm(seen.z)
        return VisualTokens(tokens, coarse, seen.entropy, seen.maps)

    def prefix_hidden_states(self, batch: PackedBatch, text: Tensor, visual: Tensor) -> Tensor:
        """[C, d]: the language model over each sample up to its last visual token."""
        rows = self.sequence(batch, text, visual).index_select(0, batch.coarse_index)
        position_ids = F.pad(batch.position_ids, (0, 1)).index_select(0, batch.coarse_index)
        return self.run_llm(rows, position_ids, batch.coarse_cu_seqlens, batch.max_seqlen)

    def write_queries(self, batch: PackedBatch, prefix_hidden: Tensor) -> Tensor:
        """[V, q]: written by the hidden state right before each visual token; ``q_init`` where there is none."""
        query = self.llm_to_query(prefix_hidden.index_select(0, batch.query_from.clamp(min=0)))
        query = torch.where((batch.query_from >= 0).unsqueeze(1), query, self.q_init.to(query.dtype))
        return torch.randn_like(query) if self.config.random_queries else query
