"""Captions of a validation set's clips, written by the model and held against the set's own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fvlm.evaluate.captioning import caption_figures
from fvlm.evaluate.items import Item
from fvlm.evaluate.ranks import gather_over_ranks, rank_and_world
from fvlm.evaluate.writing import Writer


@dataclass(frozen=True, kw_only=True)
class CaptionTask:
    """Clips whose answers are free text."""

    items: list[Item]
    writer: Writer
    skipped: Counter
    """Samples of the set that could not be read, by reason."""

    def run(
        self, model: nn.Module, *, device: torch.device | str, mode: str, fine_iterations: int = 1
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Figures of `caption_figures` with "by_source" and "skipped", and a record of each caption; on every rank.

        Raises ValueError where no clip could be read.
        """
        said, unread = self.writer.write(model, self.items, device, mode, fine_iterations)
        written = [(item.meta, text) for item, text in zip(self.items, said, strict=True) if text is not None]
        if not written:
            raise ValueError(f"captions: none of {len(self.items)} clips could be described: {dict(unread)}")
        records = [
            {
                "key": str(meta.get("key")),
                "source": str(meta.get("source", "unknown")),
                "question": meta.get("user"),
                "gold": meta["assistant"],
                "choice": text,
            }
            for meta, text in written
        ]
        figures = None
        if rank_and_world()[0] == 0:  # the metrics are other programs: once is enough
            texts, truths = ([record[name] for record in records] for name in ("choice", "gold"))
            figures = caption_figures(texts, [[truth] for truth in truths], [record["source"] for record in records])
            figures["by_source"] = figures.pop("by_group")
            figures.pop("cider_by_clip")
        figures = gather_over_ranks(figures)[0]
        return {**figures, "skipped": dict(self.skipped + unread), "new_tokens": self.writer.new_tokens}, records
