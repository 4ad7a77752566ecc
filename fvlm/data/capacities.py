"""The fixed shapes of a pack, and a proposal for them from the data."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from fvlm.data.chat import Layout
from fvlm.data.order import SampleOrder
from fvlm.data.packing import pack_samples
from fvlm.data.table import DIMENSIONS, Mixture, SampleTable, sample_costs

_SIMULATED_WINDOWS, _SIMULATED_SAMPLES = 4, 4096
_QUANTILE, _MARGIN = 0.99, 1.02
_FRAMES_MARGIN = 1.015  # more frames than tokens call for, or windows rich in frames would leave tokens unused
_ROUND = 64
_CHUNK = 1 << 20
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
    ) -> Capacities:
        """Capacities under which packs of `tokens` tokens (and `frames` frames) are filled by a mixture.

        `frames` None: chosen so that frames and tokens run out together (and no sample of the table is too large).
        `max_seqlen` bounds a sample (for instance by the model's context); None: the longest that fits into a pack.
        V, C, S and K: some windows are packed by frames and tokens alone; a little over the 99 % quantile of what their
        packs hold, and never less than the largest admissible sample, so that they rarely bind.
        """
        order = SampleOrder(table, mixture, seed)
        starts = np.linspace(0, len(table), _SIMULATED_WINDOWS, endpoint=False, dtype=np.int64)
        length = min(_SIMULATED_SAMPLES, len(table))
        windows = [
            sample_costs(table, *order.take(int(start), int(start) + length), mixture, objective) for start in starts
        ]
        if frames is None:
            drawn = order.take(0, min(_CHUNK, len(table)))
            mean_frames, mean_tokens = sample_costs(table, *drawn, mixture, objective)[:, :2].mean(axis=0)
            balanced = -(-tokens * mean_frames * _FRAMES_MARGIN // mean_tokens)
            frames = max(_round_up(balanced, 4), int(table.num_frames.max()), 1)
        limit = np.array([frames, min(tokens, max_seqlen or tokens), *[_UNBOUNDED] * 4])
        largest = _largest(table, mixture, objective, limit)
        capacity = np.array([frames, tokens, *[_UNBOUNDED] * 4])
        used = []
        for costs in windows:
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


def _largest(table: SampleTable, mixture: Mixture, objective: str, limit: np.ndarray) -> np.ndarray:
    """Largest cost in each dimension over the table's admissible samples, in every layout that the mixture draws."""
    layouts = [Layout.VIDEO_FIRST]
    layouts += [Layout.QUESTION_FIRST] if mixture.question_first else []
    layouts += [Layout.NARRATED] if mixture.narrated else []
    largest = np.zeros(len(DIMENSIONS), np.int64)
    for start in range(0, len(table), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(table)))
        for layout in layouts:
            drawn = rows[table.narrated_tokens[rows] > 0] if layout == Layout.NARRATED else rows
            costs = sample_costs(table, drawn, np.full(len(drawn), layout, np.uint8), mixture, objective)
            costs = costs[(costs <= limit).all(axis=1)]
            largest = np.maximum(largest, costs.max(axis=0, initial=0))
    return largest


def _round_up(value: float, multiple: int) -> int:
    return max(int(-(-value // multiple)), 1) * multiple
