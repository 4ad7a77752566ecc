"""The fixed shapes of a pack, and a proposal for them from the data."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from fvlm.data.chat import Layout
from fvlm.data.mixture import Mixture
from fvlm.data.order import SampleOrder
from fvlm.data.packing import pack_samples
from fvlm.data.table import DIMENSIONS, SampleTable, cost_columns, sample_costs

FILL = {"frames": 0.97, "tokens": 0.99}
"""Shares of a pack's frames and tokens that are to be in use: a frame too many costs less than a token too many."""

_PLACES, _WINDOWS_EACH = 4, 8  # of the order, for what windows call for
_PACKED_WINDOWS = 4  # of these, for what packs hold
_QUANTILE, _MARGIN = 0.99, 1.02
_ROUND, _ROUND_FRAMES = 64, 4
_CHUNK = 1 << 16  # samples whose columns stay in the processor's cache
_UNBOUNDED = 1 << 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacities:
    """The sizes F, T, V, C, S, K of a pack (docs/model.md), and the longest sample; each at least 1."""

    frames: int
    tokens: int
    visual: int
    coarse: int
    samples: int
    labels: int
    max_seqlen: int
    """Upper bound of one sample's tokens, text and visual."""

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"capacities.{field.name} = {getattr(self, field.name)}: expected at least 1")
        for name in ("visual", "coarse", "labels", "max_seqlen"):
            if getattr(self, name) > self.tokens:
                raise ValueError(f"capacities.{name} = {getattr(self, name)}: expected at most tokens = {self.tokens}")

    def as_array(self) -> np.ndarray:
        """int64 [6], in the order of `DIMENSIONS`."""
        return np.array([getattr(self, name) for name in DIMENSIONS], np.int64)

    def refusals(self, costs: np.ndarray) -> np.ndarray:
        """Why each sample (costs int64 [n, 6]) cannot be packed: int64 [n] into `REFUSALS`, 0 where it can."""
        over = np.concatenate([costs > self.as_array(), costs[:, 1:2] > self.max_seqlen, costs[:, 4:5] < 1], axis=1)
        return np.where(over.any(axis=1), over.argmax(axis=1) + 1, 0)

    @classmethod
    def propose(
        cls,
        table: SampleTable,
        mixture: Mixture,
        *,
        tokens: int,
        frames: int | None = None,
        objective: str,
        max_seqlen: int | None = None,
        seed: int = 0,
        window: int = 4096,
    ) -> Capacities:
        """Capacities under which packs of `tokens` tokens (and `frames` frames) are filled by a mixture.

        `frames` None: chosen so that frames and tokens run out together (and no sample of the table is too large).
        `max_seqlen` bounds a sample (for instance by the model's context); None: the longest that fits into a pack.
        V, C, S and K: some windows of `window` samples are packed by frames and tokens alone; a little over the 99 %
        quantile of what their packs hold, and never less than the largest admissible sample, so that they rarely bind.
        """
        windows = _drawn_windows(table, SampleOrder(table, mixture, seed), mixture, objective, min(window, len(table)))
        longest = min(tokens, max_seqlen or tokens)
        if frames is None:
            needed = np.array([costs[costs[:, 1] <= longest, :2].sum(axis=0) for costs in windows])
            frames = max(_balanced_frames(needed, tokens), int(table.num_frames.max()))
        limit = np.array([frames, longest, *[_UNBOUNDED] * 4])
        largest = _largest(table, mixture, objective, limit)
        capacity = np.array([frames, tokens, *[_UNBOUNDED] * 4])
        used = []
        for costs in windows[:: -(-len(windows) // _PACKED_WINDOWS)]:
            costs = costs[(costs <= limit).all(axis=1)]
            used += [costs[group].sum(axis=0) for group in pack_samples(costs, capacity)]
        if not used or not largest[1]:
            raise ValueError(f"capacities: no sample fits into frames = {frames}, tokens = {tokens}; raise them")
        proposal = np.maximum(np.quantile(used, _QUANTILE, axis=0) * _MARGIN, largest)
        rounded = {name: _round_up(value, _ROUND) for name, value in zip(DIMENSIONS, proposal, strict=True)}
        bounded = {name: min(rounded[name], tokens) for name in ("visual", "coarse", "labels")}
        return cls(
            frames=frames,
            tokens=tokens,
            samples=_round_up(proposal[DIMENSIONS.index("samples")], 8),
            max_seqlen=min(_round_up(largest[1], _ROUND), tokens),
            **bounded,
        )


REFUSALS = ("", *(f"over_{name}" for name in DIMENSIONS), "over_max_seqlen", "no_loss_tokens")


def _drawn_windows(
    table: SampleTable, order: SampleOrder, mixture: Mixture, objective: str, length: int
) -> list[np.ndarray]:
    """Costs of windows of `length` samples, from several places of an epoch."""
    windows, size = [], min(len(table), order.size or len(table))
    for place in np.linspace(0, size, _PLACES, endpoint=False, dtype=np.int64).tolist():
        stop = place + max(min(_WINDOWS_EACH * length, size // _PLACES), length)
        rows, layouts = order.take(place, min(stop, order.size or stop))
        costs = sample_costs(table, rows, layouts, mixture, objective)
        windows += np.array_split(costs, max(len(costs) // length, 1))
    return windows


def _balanced_frames(needed: np.ndarray, tokens: int) -> int:
    """The frames of a pack with which windows that need so many frames and tokens [n, 2] fill both best.

    A window takes as many packs as the scarcer of the two calls for (`pack_samples` comes within 0.1 % of that).
    """
    mean_frames, mean_tokens = needed.mean(axis=0)
    middle = tokens * mean_frames / max(mean_tokens, 1)
    candidates = np.unique([_round_up(middle * (1 + percent / 400), _ROUND_FRAMES) for percent in range(-20, 41)])
    num_packs = np.maximum(-(-needed[:, :1] // candidates), -(-needed[:, 1:] // tokens)).sum(axis=0)
    num_packs = np.maximum(num_packs, 1)  # where no sample is short enough
    fills = needed.sum(axis=0)[:, None] / num_packs / np.stack([candidates, np.full(len(candidates), tokens)])
    slack = (fills - np.array([[FILL["frames"]], [FILL["tokens"]]])).min(axis=0)
    return int(candidates[slack.argmax()])


def _largest(table: SampleTable, mixture: Mixture, objective: str, limit: np.ndarray) -> np.ndarray:
    """Largest cost in each dimension over the table's admissible samples, in every layout that the mixture draws."""
    layouts = [Layout.QUESTION_FIRST if mixture.question_first else Layout.VIDEO_FIRST]  # the former takes no less
    layouts += [Layout.NARRATED] if mixture.narrated else []
    largest = np.zeros(len(DIMENSIONS), np.int64)
    for start in range(0, len(table), _CHUNK):
        some = slice(start, min(start + _CHUNK, len(table)))
        for layout in layouts:
            rows: np.ndarray | slice = some
            if layout == Layout.NARRATED:
                rows = start + np.flatnonzero(table.narrated_tokens[some])
            num = some.stop - start if isinstance(rows, slice) else len(rows)
            costs = cost_columns(table, rows, np.full(num, layout, np.uint8), mixture, objective)
            largest_here = np.array([cost.max(initial=0) for cost in costs])
            if (largest_here > limit).any():
                fits = np.logical_and.reduce([cost <= most for cost, most in zip(costs, limit, strict=True)])
                largest_here = np.array([(cost * fits).max(initial=0) for cost in costs])
            largest = np.maximum(largest, largest_here)
    return largest


def _round_up(value: float, multiple: int) -> int:
    return max(int(-(-value // multiple)), 1) * multiple
