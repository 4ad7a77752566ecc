"""Which samples form which pack and which step: a pure function of metadata, mixture, capacities and seed.

The order of samples (`order.py`) is cut into windows by sample counts alone; each window is packed by itself
(`packing.py`), so any window, and any step, is reached without planning those before it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass

import numpy as np

from fvlm.data.capacities import REFUSALS, Capacities
from fvlm.data.mixture import Mixture
from fvlm.data.order import SampleOrder, seeded_permutation
from fvlm.data.packing import pack_samples
from fvlm.data.table import DIMENSIONS, OBJECTIVES, SampleTable, sample_costs

__all__ = ["START", "Capacities", "Mixture", "Pack", "Plan", "PlanState", "SampleTable", "Step"]

_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Pack:
    """The samples of one micro-batch, and what they take of its capacities."""

    rows: np.ndarray
    """int64 [n], rows of the table."""
    layouts: np.ndarray
    """uint8 [n], `fvlm.data.chat.Layout` of each."""
    frames: int = 0
    tokens: int = 0
    visual: int = 0
    coarse: int = 0
    labels: int = 0

    @property
    def samples(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class PlanState:
    """Where a run stands in its plan; four integers, on any number of ranks."""

    window: int = 0
    pack: int = 0
    step: int = 0
    samples_seen: int = 0
    """Samples of the order that are behind; refused ones count when their window is through."""


START = PlanState()


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: `packs_per_step` packs; rank r takes packs r, r + ranks, ..."""

    index: int
    packs: list[Pack]
    """Padded with empty packs at the very end of the plan."""
    planned: int
    """Loss tokens of all packs, or pairs with `dpo`: the loss denominator on every rank."""
    samples: int
    samples_seen_before: int
    samples_seen: int
    """After this step; `total_samples` after the last one."""
    state: PlanState
    """From where the next step continues."""


EMPTY_PACK = Pack(np.zeros(0, np.int64), np.zeros(0, np.uint8))


class Plan:
    """All packs of a run, window by window."""

    def __init__(
        self,
        table: SampleTable,
        mixture: Mixture,
        capacities: Capacities,
        objective: str,
        seed: int,
        total_samples: int,
        window: int = 4096,
    ):
        """`total_samples` positions of the order are planned, in windows of about `window` (an epoch of natural
        weights is cut evenly, so that it ends with a window).

        Raises ValueError for an unknown objective, sizes below 1, a mixture that the table cannot give for so long,
        and a table without a single sample that fits the capacities.
        """
        if objective not in OBJECTIVES:
            raise ValueError(f"objective = {objective!r}: expected one of {OBJECTIVES}")
        if total_samples < 1 or window < 1:
            raise ValueError(f"total_samples = {total_samples}, window = {window}: expected at least 1")
        self.table, self.mixture, self.capacities = table, mixture, capacities
        self.objective, self.seed, self.total_samples = objective, seed, total_samples
        self._order = SampleOrder(table, mixture, seed)
        self.notes = self._order.notes(total_samples)
        """What a reader of the run should know of its mixture: parts left out, sources used up."""
        self._window_size = window
        self._refused: dict[int, Counter] = {}
        self._require_admissible()

    @property
    def num_windows(self) -> int:
        epoch = self._order.epoch_size
        if epoch is None:
            return -(-self.total_samples // self._window_size)
        epochs, rest = divmod(self.total_samples, epoch)
        windows = -(-epoch // self._window_size)
        return epochs * windows + sum(window * epoch // windows < rest for window in range(windows))

    @property
    def refused(self) -> Counter:
        """Samples refused in the windows planned so far in this process, by reason."""
        return sum(self._refused.values(), Counter())

    def all_refused(self) -> Counter:
        """Samples refused in all windows, by reason; those that another process has planned are judged again."""
        for window in range(self.num_windows):
            if window not in self._refused:
                self._admitted(window)
        return self.refused

    def mixture_shares(self) -> dict[str, float]:
        """Source -> share of the samples before packing, in the long run."""
        return self._order.shares()

    def window_bounds(self, window: int) -> tuple[int, int]:
        """First position of a window in the order, and the one after its last."""
        return min(self._window_start(window), self.total_samples), min(
            self._window_start(window + 1), self.total_samples
        )

    def window_order(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """A window's samples before packing: table rows int64 [n], layouts uint8 [n]."""
        return self._order.take(*self.window_bounds(window))

    def window(self, window: int) -> list[Pack]:
        """A window's packs, in the order of training; independent of all other windows."""
        rows, layouts, costs = self._admitted(window)
        groups = pack_samples(costs, self.capacities.as_array())
        packs = []
        for number in seeded_permutation(len(groups), self.seed, "packs", window):
            group = groups[number]
            used = dict(zip(DIMENSIONS, costs[group].sum(axis=0).tolist(), strict=True))
            del used["samples"]
            packs.append(Pack(rows[group], layouts[group], **used))
        return packs

    def _admitted(self, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, layouts and costs of a window's samples that can be packed; the others are counted."""
        rows, layouts = self.window_order(window)
        costs = sample_costs(self.table, rows, layouts, self.mixture, self.objective)
        refusals = self.capacities.refusals(costs)
        self._refused[window] = Counter(REFUSALS[reason] for reason in refusals[refusals > 0])
        return rows[refusals == 0], layouts[refusals == 0], costs[refusals == 0]

    def steps(self, packs_per_step: int, start: PlanState = START) -> Iterator[Step]:
        """The run's steps from `start` on; the last one is padded with empty packs."""
        if packs_per_step < 1:
            raise ValueError(f"packs_per_step = {packs_per_step}: expected at least 1")
        before = seen = start.samples_seen
        index, pending = start.step, []
        for window in range(start.window, self.num_windows):
            packs = self.window(window)
            first = start.pack if window == start.window else 0
            if first > len(packs):
                raise ValueError(f"{start} does not belong to this plan: window {window} has {len(packs)} packs")
            for number in range(first, len(packs)):
                pending.append(packs[number])
                is_last = number + 1 == len(packs)
                seen = self.window_bounds(window)[1] if is_last else seen + packs[number].samples
                if len(pending) == packs_per_step:
                    place = (window + 1, 0) if is_last else (window, number + 1)
                    yield self._step(index, pending, before, PlanState(*place, index + 1, seen))
                    before, index, pending = seen, index + 1, []
            seen = self.window_bounds(window)[1]
        if pending:
            pending += [EMPTY_PACK] * (packs_per_step - len(pending))
            yield self._step(index, pending, before, PlanState(self.num_windows, 0, index + 1, seen))

    def _step(self, index: int, packs: list[Pack], before: int, state: PlanState) -> Step:
        samples = sum(pack.samples for pack in packs)
        return Step(
            index=index,
            packs=packs,
            planned=samples if self.objective == "dpo" else sum(pack.labels for pack in packs),
            samples=samples,
            samples_seen_before=before,
            samples_seen=state.samples_seen,
            state=state,
        )

    def fingerprint(self) -> str:
        """16 hex digits that change with anything the packs depend on: a resumed run must find its own plan."""
        digest = hashlib.sha256(repr((self.seed, self.objective, self._window_size)).encode())
        digest.update(repr((self.total_samples, asdict(self.mixture), astuple(self.capacities))).encode())
        digest.update(self.table.digest().encode())
        return digest.hexdigest()[:16]

    def _window_start(self, window: int) -> int:
        epoch = self._order.epoch_size
        if epoch is None:
            return window * self._window_size
        windows = -(-epoch // self._window_size)
        return window // windows * epoch + window % windows * epoch // windows

    def _require_admissible(self) -> None:
        """An early, clear error where every sample would be refused; stops at the first chunk with a good one."""
        reasons = Counter()
        for start in range(0, len(self.table), _CHUNK):
            stop = min(start + _CHUNK, len(self.table))
            layouts = np.zeros(stop - start, np.uint8)
            costs = sample_costs(self.table, slice(start, stop), layouts, self.mixture, self.objective)
            refusals = self.capacities.refusals(costs)
            if (refusals == 0).any():
                return
            reasons.update(REFUSALS[reason] for reason in refusals)
        raise ValueError(f"all {len(self.table)} samples are refused: {dict(reasons)}; capacities: {self.capacities}")
