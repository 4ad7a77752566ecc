"""The model's input: one pack of samples with fixed shapes (docs/model.md, A pack).

Shapes: F frames, T rows, V visual tokens, C rows of the coarse sequence, S samples, K labels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(kw_only=True)
class PackedBatch:
    """One pack. Unused entries follow the rules beside each field, so that they meet no attention, loss or gradient."""

    frames: Tensor
    """uint8 [F, 3, H, W] pixels, or floating point and already normalised; unused: zero."""
    token_ids: Tensor
    """int64 [T]; visual slots and unused rows hold 0."""
    position_ids: Tensor
    """int64 [T], restarting at each sample; unused: 0."""
    cu_seqlens: Tensor
    """int32 [S+1], sample bounds in T; unused: repeats the end of the last real sample."""
    loss_index: Tensor
    """int64 [K], the row of T that predicts; unused: 0."""
    labels: Tensor
    """int64 [K], what it predicts; unused: −100."""
    visual_index: Tensor
    """int64 [V], where a visual token sits in T; unused: T."""
    visual_frame: Tensor
    """int64 [V], sorted, the frame it looks at; unused: spread evenly over all frames, since one program serves all
    queries of a frame and hundreds of unused ones on a single frame would keep the others waiting."""
    query_from: Tensor
    """int64 [V], the row of the coarse sequence whose hidden state writes its query; −1: ``q_init``."""
    coarse_index: Tensor
    """int64 [C], the coarse sequence: rows of T up to and with each sample's last visual token; unused: T."""
    coarse_cu_seqlens: Tensor
    """int32 [S+1], sample bounds in C; unused as ``cu_seqlens``."""
    source_id: Tensor
    """int64 [S], for loss by source; unused: −1."""
    max_seqlen: int
    """Upper bound of a sample's rows, a constant of the plan."""
    visual_cell: Tensor | None = None
    """int64 [V], multi-token baseline: row-major grid cell; unused: 0."""
    reference_logprob: Tensor | None = None
    """float32 [S], DPO: log-probability of the answer under the reference model; unused: 0."""

    def _map(self, function) -> PackedBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(x) for name, x in tensors.items() if isinstance(x, Tensor)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same pack on another device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same pack in page-locked memory."""
        return self._map(lambda x: x.pin_memory())

    def without_unused(self) -> PackedBatch:
        """The same pack without its last unused frames, rows and coarse rows, of each of which one stays.

        Reads lengths: for packs in the host's memory, where no shape needs to be fixed.
        """
        num_rows, num_coarse = max(1, int(self.cu_seqlens[-1])), max(1, int(self.coarse_cu_seqlens[-1]))
        looked_at = self.visual_frame[self.visual_index < len(self.token_ids)]
        num_frames = int(looked_at.max()) + 1 if len(looked_at) else 1
        return replace(
            self,
            frames=self.frames[:num_frames],
            token_ids=self.token_ids[:num_rows],
            position_ids=self.position_ids[:num_rows],
            visual_index=self.visual_index.clamp(max=num_rows),
            visual_frame=self.visual_frame.clamp(max=num_frames - 1),
            coarse_index=self.coarse_index[:num_coarse].clamp(max=num_rows),
        )

    def validate(self) -> None:
        """Check every rule that can be checked from the pack alone.

        Raises:
            ValueError: naming the field.
        """
        num_frames, num_rows, num_coarse = len(self.frames), len(self.token_ids), len(self.coarse_index)
        _check(self.position_ids.shape == self.token_ids.shape, "position_ids", "as long as token_ids")
        _check(self.labels.shape == self.loss_index.shape, "labels", "as long as loss_index")
        _check(len(self.cu_seqlens) == len(self.source_id) + 1, "cu_seqlens", "one longer than source_id")
        _check_bounds("cu_seqlens", self.cu_seqlens, num_rows, self.max_seqlen)
        _check_bounds("coarse_cu_seqlens", self.coarse_cu_seqlens, num_coarse, self.max_seqlen)
        _check(len(self.coarse_cu_seqlens) == len(self.cu_seqlens), "coarse_cu_seqlens", "as long as cu_seqlens")
        _check(bool((self.visual_frame.diff() >= 0).all()), "visual_frame", "sorted")
        _check_range("visual_frame", self.visual_frame, 0, num_frames)
        _check_range("visual_index", self.visual_index, 0, num_rows + 1)
        _check_range("query_from", self.query_from, -1, num_coarse)
        _check_range("coarse_index", self.coarse_index, 0, num_rows + 1)
        _check_range("loss_index", self.loss_index, 0, num_rows)
        used_slots = self.visual_index[self.visual_index < num_rows]
        _check(len(used_slots.unique()) == len(used_slots), "visual_index", "each slot filled once")
        labelled = self.labels != -100
        _check(bool((self.loss_index[labelled] < self.cu_seqlens[-1] - 1).all()), "loss_index", "inside its sample")


def _check(condition: bool, field: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"PackedBatch.{field}: expected {expected}")


def _check_range(field: str, values: Tensor, low: int, high: int) -> None:
    inside = bool(((values >= low) & (values < high)).all())
    _check(inside, field, f"values in [{low}, {high}), got [{values.min()}, {values.max()}]" if not inside else "")


def _check_bounds(field: str, bounds: Tensor, limit: int, max_seqlen: int) -> None:
    lengths = bounds.diff()
    _check(bounds.dtype == torch.int32, field, "int32")
    _check(int(bounds[0]) == 0 and bool((lengths >= 0).all()), field, "to start at 0 and never decrease")
    _check(int(bounds[-1]) <= limit, field, f"to end by {limit}, got {int(bounds[-1])}")
    _check(int(lengths.max()) <= max_seqlen, field, f"samples of at most max_seqlen = {max_seqlen} rows")


@dataclass(kw_only=True)
class SampleRows:
    """One sample as the rows that the language model sees, before packing (numpy, n rows)."""

    token_ids: np.ndarray
    """int64 [n]; anything at visual slots."""
    frame: np.ndarray
    """int64 [n]: the pack's frame that a visual slot looks at, −1 for text."""
    has_loss: np.ndarray
    """bool [n]: whether the row's token is a label; never true at visual slots or in the first row."""
    cell: np.ndarray | None = None
    """int64 [n]: grid cell of a visual slot (multi-token baseline)."""
    source_id: int = 0


def assemble(samples: list[SampleRows], frames: Tensor, sizes: dict[str, int], max_seqlen: int) -> PackedBatch:
    """Lay samples out one after the other; the one place where a pack's indices are made.

    Args:
        samples: in order.
        frames: [F, 3, H, W], already at full capacity.
        sizes: lengths of the fixed shapes by letter: ``T, V, C, S, K``.
        max_seqlen: the plan's constant.

    Raises:
        ValueError: samples that exceed a size, naming it.
    """
    token_ids, position_ids = (np.zeros(sizes["T"], np.int64) for _ in range(2))
    bounds, coarse_bounds = [0], [0]
    visual, coarse, losses = [], [], []  # (frame, row, query_from, cell); rows; (predicting row, label)
    for sample in samples:
        start, coarse_start, n = bounds[-1], coarse_bounds[-1], len(sample.token_ids)
        is_visual = sample.frame >= 0
        slots, labels = np.flatnonzero(is_visual), np.flatnonzero(sample.has_loss)
        prefix = int(slots[-1]) + 1 if len(slots) else 0
        if start + n <= sizes["T"]:  # otherwise refused below, with every other size
            token_ids[start : start + n] = np.where(is_visual, 0, sample.token_ids)
            position_ids[start : start + n] = np.arange(n)
        query_from = np.where(slots > 0, coarse_start + slots - 1, -1)
        cell = np.zeros(len(slots), np.int64) if sample.cell is None else sample.cell[slots]
        visual.append(np.stack([sample.frame[slots], start + slots, query_from, cell], axis=1))
        coarse.append(np.arange(start, start + prefix))
        losses.append(np.stack([start + labels - 1, sample.token_ids[labels]], axis=1))
        bounds.append(start + n)
        coarse_bounds.append(coarse_start + prefix)
    num_visual, num_rows = sum(len(slots) for slots in visual), sizes["T"]
    unused = max(0, sizes["V"] - num_visual)
    spread = np.arange(unused) * len(frames) // max(unused, 1)
    visual.append(np.stack([spread, *(np.full(unused, x) for x in (num_rows, -1, 0))], axis=1))
    visual = np.concatenate(visual)
    visual = visual[np.lexsort((visual[:, 1], visual[:, 0]))]  # a frame's queries are neighbours
    losses = np.concatenate([*losses, np.zeros((0, 2), np.int64)])
    used = {"T": bounds[-1], "V": num_visual, "C": coarse_bounds[-1], "S": len(samples), "K": len(losses)}
    over = [f"{letter} = {used[letter]} > {sizes[letter]}" for letter in used if used[letter] > sizes[letter]]
    _check(not over, "sizes", f"samples within capacity, got {', '.join(over)}")

    def fill(values: np.ndarray, size: str, unused: int, dtype=torch.int64) -> Tensor:
        out = torch.full((sizes[size],), unused, dtype=dtype)
        out[: len(values)] = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
        return out

    def bounds_tensor(values: list[int]) -> Tensor:
        return torch.tensor(values + [values[-1]] * (sizes["S"] + 1 - len(values)), dtype=torch.int32)

    return PackedBatch(
        frames=frames,
        token_ids=torch.from_numpy(token_ids),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=bounds_tensor(bounds),
        loss_index=fill(losses[:, 0], "K", 0),
        labels=fill(losses[:, 1], "K", -100),
        visual_index=torch.from_numpy(visual[:, 1].copy()),
        visual_frame=torch.from_numpy(visual[:, 0].copy()),
        query_from=torch.from_numpy(visual[:, 2].copy()),
        coarse_index=fill(np.concatenate([*coarse, np.zeros(0, np.int64)]), "C", num_rows),
        coarse_cu_seqlens=bounds_tensor(coarse_bounds),
        source_id=fill(np.array([sample.source_id for sample in samples], np.int64), "S", -1),
        max_seqlen=max_seqlen,
        visual_cell=torch.from_numpy(visual[:, 3].copy()) if any(s.cell is not None for s in samples) else None,
    )
