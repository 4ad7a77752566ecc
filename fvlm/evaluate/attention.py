"""Attention maps of a few fixed clips, in every mode, as raw arrays for the report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fvlm.data.batch import LoadedSample, collate
from fvlm.data.errors import MediaError, SampleError
from fvlm.evaluate.items import Item, Presentation, in_turn, room_for
from fvlm.evaluate.maps import CELLS, ClipMaps, save_clip
from fvlm.evaluate.ranks import gather_over_ranks
from fvlm.evaluate.validation import evaluating

logger = logging.getLogger(__name__)


def choose_clips(items: Sequence[Item], most: int = 10) -> list[Item]:
    """A fixed choice: `most` samples with frames, shared evenly over the sources, clips with `look_at` places first."""
    with_frames = sorted((item for item in items if item.num_frames), key=lambda item: not item.meta.get("look_at"))
    return in_turn(with_frames, lambda item: str(item.meta.get("source")))[:most]


def read_clip(item: Item, tokenizer: PreTrainedTokenizerBase, presentation: Presentation) -> Item | str:
    """The clip with its frames in memory; the reason, which is logged, where one of the ranks cannot use it."""
    reason = None
    try:
        presentation.segments(item.meta, tokenizer)
        frames = item.read_frames()
    except (SampleError, MediaError) as error:
        logger.warning("attention maps: clip %s left out: %s", item.meta.get("key"), error)
        reason = error.reason
    # All ranks leave it out together: a sharded model communicates inside every forward pass.
    reasons = [each for each in gather_over_ranks(reason) if each]
    return reasons[0] if reasons else replace(item, read_frames=lambda: frames)


def clip_maps(
    model: nn.Module,
    item: Item,
    tokenizer: PreTrainedTokenizerBase,
    presentation: Presentation,
    device: torch.device | str,
    modes: Sequence[str],
    fine_iterations: int = 1,
) -> ClipMaps:
    """One clip's maps in each mode; raises SampleError where a frame cannot be read.

    `model` is a `FoveatedVLM` (not an engine around it): the multi-token baseline has no queries and no maps.
    """
    frames, text = item.read_frames(), presentation.segments(item.meta, tokenizer)
    sample = LoadedSample(key=str(item.meta.get("key")), segments=text, frames=frames, source_id=0)
    batch = collate([sample], room_for([sample]), "ce_answer", presentation.image_size, presentation.grid).to(device)
    in_order = batch.visual_index.argsort().cpu().numpy()
    with evaluating(model):
        maps = {
            mode: model.attention_maps(batch, mode=mode, fine_iterations=fine_iterations).half().cpu().numpy()[in_order]
            for mode in modes
        }
    return ClipMaps(
        key=sample.key,
        source=str(item.meta.get("source")),
        user=str(item.meta.get("user") or ""),
        assistant=str(item.meta.get("assistant") or ""),
        frames=frames,
        visual_frame=batch.visual_frame.cpu().numpy()[in_order],
        look_at=look_at_array(item),
        maps=maps,
    )


def save_maps(clips: Sequence[ClipMaps], folder: Path) -> list[Path]:
    """Writes clip-00.npz, clip-01.npz, ...; returns the paths."""
    paths = [folder / f"clip-{number:02d}.npz" for number in range(len(clips))]
    for clip, path in zip(clips, paths, strict=True):
        save_clip(clip, path)
    return paths


def look_at_array(item: Item) -> np.ndarray:
    """int64 [num_frames, 2] of the metadata's `look_at`, -1 where there is none.

    Shards made elsewhere may carry anything there: what is no list of cells, one a frame, is logged and left out.
    """
    nothing = np.full((item.num_frames, 2), -1, np.int64)
    places = item.meta.get("look_at")
    if not places:
        return nothing
    expected = f"expected {item.num_frames} entries, each null or [row, column] of 0 to {CELLS - 1}"
    if not isinstance(places, list) or len(places) != item.num_frames or not all(map(_is_place, places)):
        logger.warning("%s: look_at %s left out; %s", item.meta.get("key"), str(places)[:200], expected)
        return nothing
    return np.array([place or (-1, -1) for place in places], np.int64).reshape(-1, 2)


def _is_place(place: object) -> bool:
    cell = isinstance(place, list) and len(place) == 2 and all(type(at) is int and 0 <= at < CELLS for at in place)
    return place is None or cell
