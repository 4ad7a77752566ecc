"""The multi-token control (docs/model.md): pooled grid cells of a frame as tokens, no query."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .base import VisionLanguageModel, VisualTokens
from .configuration import FoveatedConfig
from .packed import PackedBatch


class MultiTokenVLM(VisionLanguageModel):
    """Every frame becomes ``config.grid`` tokens; all modes are the same."""

    def __init__(self, config: FoveatedConfig, llm=None, dino=None):
        super().__init__(config, llm, dino)
        self.post_init()

    def visual_tokens(
        self, batch: PackedBatch, text: Tensor, mode: str, fine_iterations: int, entropy: bool
    ) -> VisualTokens:
        """Each visual slot holds the cell of its frame that ``batch.visual_cell`` names.

        Raises:
            ValueError: a pack without ``visual_cell``.
        """
        if batch.visual_cell is None:
            raise ValueError("the multi-token model needs PackedBatch.visual_cell: collate with grid=config.grid")
        features = self.encoder(batch.frames, features=True).features
        side = int(self.config.grid**0.5)
        patches = (
            features[:, 1:].unflatten(1, (batch.frames.shape[2] // self.config.patch_size, -1)).permute(0, 3, 1, 2)
        )
        cells = F.adaptive_avg_pool2d(patches, side).flatten(2).transpose(1, 2)
        tokens = self.to_llm(self.encoder.output_proj(cells)).flatten(0, 1)
        return VisualTokens(F.embedding(batch.visual_frame * self.config.grid + batch.visual_cell, tokens))
