"""The padded form of a batch, for people, turned into one pack.

Shapes: B samples, n visual slots, L text tokens, T = all rows of the pack.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .configuration import FoveatedConfig
from .packed import PackedBatch, SampleRows, assemble


class PaddedPack(NamedTuple):
    """A pack and the way back."""

    batch: PackedBatch
    row_of_position: Tensor
    """int64 [B, n + L]: the pack's row of each visual and text position in sequence order; T = padding."""


def pack_padded(
    config: FoveatedConfig,
    frames: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    frame_mask: Tensor | None = None,
    visual_at: Tensor | None = None,
) -> PaddedPack:
    """Lay padded samples out as a pack without unused rows or frames; arguments as in ``VisionLanguageModel.forward``.

    A sample whose frames are all the same, such as a still given once a look, has one frame in the pack.

    Raises:
        ValueError: shapes that do not fit together, a mask whose padding is not at the end, or labels that are neither
            −100 nor the token itself.
    """
    num_samples, num_frames = frames.shape[:2]
    num_text = input_ids.shape[1]
    looks = config.grid if config.architecture == "multi_token" else config.tokens_per_frame
    text_lengths = _lengths("attention_mask", attention_mask, num_samples, num_text)
    frame_counts = _lengths("frame_mask", frame_mask, num_samples, num_frames)
    starts = np.zeros(num_samples, int) if visual_at is None else visual_at.cpu().numpy()
    if (starts < 0).any() or (starts > text_lengths).any():
        raise ValueError(f"visual_at: expected positions in [0, text length], got {starts.tolist()}")
    if labels is not None and labels.shape != input_ids.shape:
        raise ValueError(f"labels: expected shape {tuple(input_ids.shape)} of input_ids, got {tuple(labels.shape)}")
    ids = input_ids.cpu().numpy()
    wanted = np.zeros(ids.shape, bool) if labels is None else _wanted(labels.cpu().numpy(), ids, text_lengths)
    samples, row_of_position, total = [], np.full((num_samples, num_frames * looks + num_text), -1), 0
    # a pack without any frame holds one, which keeps every path alive
    kept, num_kept = [frames.new_zeros(0 if frame_counts.any() else 1, *frames.shape[2:])], 0
    for b in range(num_samples):
        own, which = _distinct(frames[b, : frame_counts[b]])
        row_frame = np.repeat(which + num_kept, looks)
        kept.append(own)
        num_kept += len(own)
        cell = np.tile(np.arange(looks), frame_counts[b]) if config.architecture == "multi_token" else None
        samples.append(_rows(ids[b, : text_lengths[b]], wanted[b, : text_lengths[b]], row_frame, cell, int(starts[b])))
        n = len(samples[-1].token_ids)
        row_of_position[b, :n] = np.arange(total, total + n)
        total += n
    lengths = [len(s.token_ids) for s in samples]
    num_visual = sum(int((s.frame >= 0).sum()) for s in samples)
    num_coarse = sum(int(np.flatnonzero(s.frame >= 0).max(initial=-1)) + 1 for s in samples)
    num_labels = sum(int(s.has_loss.sum()) for s in samples)
    # shapes of at least 1 keep every path alive, as in a pack of text only
    sizes = {"T": total, "V": max(num_visual, 1), "C": max(num_coarse, 1), "S": num_samples, "K": max(num_labels, 1)}
    batch = assemble(samples, torch.cat(kept), sizes, max(lengths)).to(input_ids.device)
    row_of_position[row_of_position < 0] = total
    return PaddedPack(batch, torch.from_numpy(row_of_position).to(input_ids.device))


def _distinct(frames: Tensor) -> tuple[Tensor, np.ndarray]:
    """The frames [n, ...] that the encoder has to see, and which of them each one is, int64 [n]."""
    if len(frames) > 1 and bool((frames[1:] == frames[:1]).all()):
        return frames[:1], np.zeros(len(frames), np.int64)
    return frames, np.arange(len(frames))


def _wanted(labels: np.ndarray, ids: np.ndarray, text_lengths: np.ndarray) -> np.ndarray:
    """bool [B, L]: tokens that count; raises ValueError for a label that is another token than the one at its place."""
    wanted = labels != -100
    is_text = np.arange(ids.shape[1]) < text_lengths[:, None]
    if len(strange := np.argwhere(wanted & is_text & (labels != ids))):
        b, at = strange[0]
        raise ValueError(
            f"labels: expected input_ids' own tokens, or -100; "
            f"labels[{b}, {at}] is {labels[b, at]}, input_ids[{b}, {at}] is {ids[b, at]}"
        )
    return wanted


def _rows(
    token_ids: np.ndarray, wanted: np.ndarray, row_frame: np.ndarray, cell: np.ndarray | None, at: int
) -> SampleRows:
    """Text with the frames' slots inserted before text token ``at``."""
    slots = len(row_frame)
    has_loss = wanted.copy()
    has_loss[:1] = False
    insert = np.full(slots, at)
    return SampleRows(
        token_ids=np.insert(token_ids, insert, 0),
        frame=np.insert(np.full(len(token_ids), -1), insert, row_frame),
        has_loss=np.insert(has_loss, insert, False),
        cell=None if cell is None else np.insert(np.zeros(len(token_ids), np.int64), insert, cell),
    )


def _lengths(name: str, mask: Tensor | None, num_samples: int, width: int) -> np.ndarray:
    if mask is None:
        return np.full(num_samples, width)
    if mask.shape != (num_samples, width):
        raise ValueError(f"{name}: expected shape {(num_samples, width)}, got {tuple(mask.shape)}")
    mask = mask.bool()
    if not bool((mask[:, 1:] <= mask[:, :-1]).all()):
        raise ValueError(f"{name}: padding must be at the end of each sample")
    return mask.sum(1).cpu().numpy()
