"""Samples of one pack to `PackedBatch`, and a pack as one buffer of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

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
    reference_logprob: float = 0.0
    """Of an answer of a preference pair, under the reference model."""


def collate(
    samples: Sequence[LoadedSample], capacities: Capacities, objective: str, image_size: int, grid: int = 0
) -> PackedBatch:
    """Lay samples out as one pack (docs/model.md, A pack), in their order.

    `ce_all` labels every text token but the sample's first, `ce_answer` and `dpo` the answer tokens; `dpo` takes the
    chosen and the rejected answer of each pair, one after the other. With `grid` > 0 (multi-token
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
    return _lay_out(samples, rows, frames, capacities, objective, grid)


def collate_placed(
    samples: Sequence[tuple[LoadedSample, int]],
    frames: torch.Tensor,
    capacities: Capacities,
    objective: str,
    grid: int = 0,
) -> PackedBatch:
    """`collate` for samples whose frames lie in the pack's already, each from the given row of `frames` on."""
    rows = [_sample_rows(sample, first, objective, grid) for sample, first in samples]
    return _lay_out([sample for sample, _ in samples], rows, frames, capacities, objective, grid)


def _lay_out(
    samples: Sequence[LoadedSample],
    rows: list[SampleRows],
    frames: torch.Tensor,
    capacities: Capacities,
    objective: str,
    grid: int,
) -> PackedBatch:
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
    if objective == "dpo":
        batch.reference_logprob = torch.zeros(capacities.samples)
        batch.reference_logprob[: len(samples)] = torch.tensor([sample.reference_logprob for sample in samples])
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


class _Place(NamedTuple):
    """Where one tensor lies in a pack's buffer."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class PackLayout:
    """A pack as one buffer: the shapes are constants of a run, so every tensor has its fixed place in it.

    One buffer is handed from a worker to the trainer without a copy, and to the device by a single one. Its frames lie
    as JPEGs are decoded, [F, H, W, 3]; the batch's [F, 3, H, W] is a view of that.
    """

    ALIGNMENT = 512
    """Bytes; what a CUDA allocation of its own would have."""

    def __init__(self, capacities: Capacities, image_size: int, objective: str, grid: int = 0):
        self._max_seqlen = capacities.max_seqlen
        bounds, visual = (capacities.samples + 1,), (capacities.visual,)
        int64, int32 = torch.int64, torch.int32
        shapes = {
            "frames": (torch.uint8, (capacities.frames, image_size, image_size, 3)),
            "token_ids": (int64, (capacities.tokens,)),
            "position_ids": (int64, (capacities.tokens,)),
            "cu_seqlens": (int32, bounds),
            "loss_index": (int64, (capacities.labels,)),
            "labels": (int64, (capacities.labels,)),
            "visual_index": (int64, visual),
            "visual_frame": (int64, visual),
            "query_from": (int64, visual),
            "coarse_index": (int64, (capacities.coarse,)),
            "coarse_cu_seqlens": (int32, bounds),
            "source_id": (int64, (capacities.samples,)),
        }
        if grid:
            shapes["visual_cell"] = (int64, visual)
        if objective == "dpo":
            shapes["reference_logprob"] = (torch.float32, (capacities.samples,))
        self._places: dict[str, _Place] = {}
        self.nbytes = 0
        """Size of a pack."""
        for name, (dtype, shape) in shapes.items():
            self._places[name] = _Place(self.nbytes, dtype, shape)
            self.nbytes += -(-self._places[name].nbytes // self.ALIGNMENT) * self.ALIGNMENT

    def new_buffer(self, shared: bool) -> torch.Tensor:
        """uint8 [nbytes] of zeros; `shared` with other processes, which then map it instead of copying it."""
        if not shared:
            return torch.zeros(self.nbytes, dtype=torch.uint8)
        storage = torch.UntypedStorage._new_shared(self.nbytes)  # fresh pages, which the system gives out as zeros
        return torch.empty(0, dtype=torch.uint8).set_(storage)

    def pixels(self, buffer: torch.Tensor) -> torch.Tensor:
        """The buffer's frames as they lie: uint8 [F, H, W, 3]."""
        return self._view(buffer, "frames")

    def store(self, batch: PackedBatch, buffer: torch.Tensor) -> None:
        """Put every tensor of a batch in its place; its frames are those of the buffer already.

        Raises ValueError for a batch of another form.
        """
        held = {field.name for field in fields(batch) if isinstance(getattr(batch, field.name), torch.Tensor)}
        if held != self._places.keys() or batch.frames.data_ptr() != buffer.data_ptr():
            raise ValueError(f"batch of {sorted(held)}: expected {sorted(self._places)}, frames in the buffer")
        for name in held - {"frames"}:
            self._view(buffer, name).copy_(getattr(batch, name))

    def batch(self, buffer: torch.Tensor) -> PackedBatch:
        """The pack in a buffer on any device; its tensors are views of it."""
        tensors = {name: self._view(buffer, name) for name in self._places}
        tensors["frames"] = tensors["frames"].permute(0, 3, 1, 2)
        return PackedBatch(max_seqlen=self._max_seqlen, **tensors)

    def _view(self, buffer: torch.Tensor, name: str) -> torch.Tensor:
        place = self._places[name]
        return buffer[place.offset : place.offset + place.nbytes].view(place.dtype).view(place.shape)
