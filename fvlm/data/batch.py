"""Samples of one pack to `PackedBatch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fvlm.data.capacities import Capacities
from fvlm.data.chat import Text, Visual
from fvlm.data.table import OBJECTIVES
from fvlm.model.packed import PackedBatch, SampleRows, assemble


@dataclass(kw_only=True)
class LoadedSample:
    """One sample, read and tokenised."""

    key: str
    segments: list[Text | Visual]
    frames: np.ndarray
    """uint8 [n, 3, H, W]; samples that hold the same array share its rows of the pack."""
    source_id: int


def collate(
    samples: Sequence[LoadedSample], capacities: Capacities, objective: str, image_size: int, grid: int = 0
) -> PackedBatch:
    """Lay samples out as one pack (docs/model.md, A pack), in their order.

    `ce_all` labels every text token but the sample's first, `ce_answer` the answer tokens. With `grid` > 0 (multi-token
    baseline) each frame reference becomes `grid` visual slots, one a cell.

    Raises ValueError for samples over the capacities, frames of another size and an unknown objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective = {objective!r}: expected one of {OBJECTIVES}")
    frames = torch.zeros((capacities.frames, 3, image_size, image_size), dtype=torch.uint8)
    first_row: dict[int, int] = {}  # by identity: which frames are already in the pack
    used, rows = 0, []
    for sample in samples:
        if id(sample.frames) not in first_row:
            _put_frames(frames, used, sample)
            first_row[id(sample.frames)] = used
            used += len(sample.frames)
        rows.append(_sample_rows(sample, first_row[id(sample.frames)], objective, grid))
    sizes = {
        "T": capacities.tokens,
        "V": capacities.visual,
        "C": capacities.coarse,
        "S": capacities.samples,
        "K": capacities.labels,
    }
    batch = assemble(rows, frames, sizes, capacities.max_seqlen)
    if grid and batch.visual_cell is None:  # an empty pack keeps the baseline's form
        batch.visual_cell = torch.zeros(capacities.visual, dtype=torch.int64)
    return batch


def _put_frames(frames: torch.Tensor, start: int, sample: LoadedSample) -> None:
    stop = start + len(sample.frames)
    if stop > len(frames):
        raise ValueError(f"sample {sample.key}: {stop} frames, expected at most capacities.frames = {len(frames)}")
    if sample.frames.shape[1:] != frames.shape[1:]:
        raise ValueError(
            f"sample {sample.key}: frames of shape {sample.frames.shape[1:]}, expected {tuple(frames.shape[1:])}; "
            f"prepare the data with the model's image size"
        )
    frames[start:stop] = torch.from_numpy(sample.frames)


def _sample_rows(sample: LoadedSample, first_frame: int, objective: str, grid: int) -> SampleRows:
    """The sample's rows in the order of its segments; a visual row names the pack's frame it looks at."""
    tokens, frame, loss, cell = [], [], [], []
    for part in sample.segments:
        if isinstance(part, Visual):
            looked_at = np.repeat(np.array(part.frames, np.int64), max(grid, 1))
            tokens.append(np.zeros(len(looked_at), np.int64))
            frame.append(first_frame + looked_at)
            loss.append(np.zeros(len(looked_at), bool))
            cell.append(np.tile(np.arange(max(grid, 1)), len(part.frames)))
        else:
            tokens.append(part.token_ids.astype(np.int64))
            frame.append(np.full(len(part.token_ids), -1, np.int64))
            loss.append(np.ones(len(part.token_ids), bool) if objective == "ce_all" else part.is_answer)
            cell.append(np.zeros(len(part.token_ids), np.int64))
    frame, has_loss = np.concatenate(frame), np.concatenate(loss)
    has_loss[np.flatnonzero(frame < 0)[:1]] = False  # the constant start token is nobody's label
    return SampleRows(
        token_ids=np.concatenate(tokens),
        frame=frame,
        has_loss=has_loss,
        cell=np.concatenate(cell) if grid else None,
        source_id=sample.source_id,
    )
