"""What the data of a run is like while it runs: known from the plan, so that counting costs next to nothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fvlm.data.plan import Plan, Step
from fvlm.data.table import DIMENSIONS


class DataStatistics:
    """Fill of the packs since the last record, and the sources' shares since the run began."""

    def __init__(self, plan: Plan, samples_by_source: Mapping[str, int]):
        """`samples_by_source` of the run's earlier starts."""
        self._plan, self._capacities = plan, plan.capacities.as_array()
        names = plan.table.source_names
        self._by_source = np.array([samples_by_source.get(name, 0) for name in names], np.int64)
        self._mixture = {f"mixture/{name}": share for name, share in plan.mixture_shares().items()}
        self._used, self._num_packs = np.zeros(len(DIMENSIONS), np.int64), 0
        self._sequences = 2 if plan.objective == "dpo" else 1  # of a sample

    @property
    def samples_by_source(self) -> dict[str, int]:
        """Samples in the packs so far, those that could not be read among them."""
        return dict(zip(self._plan.table.source_names, self._by_source.tolist(), strict=True))

    def count(self, step: Step) -> None:
        """Add a step that is done, with the packs of all ranks."""
        for pack in step.packs:
            self._used += [getattr(pack, name) for name in DIMENSIONS]
        self._num_packs += len(step.packs)
        rows = np.concatenate([pack.rows for pack in step.packs])
        self._by_source += np.bincount(self._plan.table.source[rows], minlength=len(self._by_source))

    def record(self) -> dict[str, float]:
        """`fill_*` of each capacity and `samples_per_pack` since the last call; `share/*` so far beside `mixture/*`."""
        num_packs, total = max(self._num_packs, 1), max(int(self._by_source.sum()), 1)
        samples = DIMENSIONS.index("samples")
        per_pack = int(self._used[samples]) / num_packs
        self._used[samples] *= self._sequences
        fill = dict(zip(DIMENSIONS, (self._used / (num_packs * self._capacities)).tolist(), strict=True))
        self._used[:], self._num_packs = 0, 0
        return {
            **{f"fill_{name}": share for name, share in fill.items()},
            "samples_per_pack": per_pack,
            **{f"share/{name}": count / total for name, count in self.samples_by_source.items()},
            **self._mixture,
        }
