"""Rows of a study's `results.csv`: what each run is, its figures in the mode that it trained, and seeds together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fvlm.model.configuration import MODES
from fvlm.research.tables import Table

TEXTS = {
    "run", "status", "reason", "question", "arm", "changed", "model", "size", "budget", "architecture", "comparison",
    "against", "task", "trained_mode", "mode", "source", "config_hash", "commit", "device", "started", "finished",
}  # fmt: skip
"""Columns that are words; a cell of any other is taken for a number where it is one."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure of one arm over its seeds."""

    values: tuple[float, ...]
    """One a seed."""
    low: float
    """The lowest bound of the seeds' 95 % intervals; the lowest value where none is on record."""
    high: float
    bounded: bool = True
    """Whether each seed has its interval."""
    chance: float = math.nan

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return math.fsum(self.values) / len(self.values)


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyRun:
    """One row of `results.csv`; equal to itself only."""

    cells: dict[str, str]
    numbers: dict[str, float]
    """Of the columns that hold numbers; NaN where a cell is empty."""
    folder: Path | None = None
    """With the run's own records, where they are at hand."""

    @property
    def name(self) -> str:
        return self.cells["run"]

    @property
    def arm(self) -> str:
        """What its seeds share; the run's own name in a study without arms."""
        return self.text("arm") or self.name

    @property
    def done(self) -> bool:
        """A foreign table without `status` has finished runs only."""
        return self.text("status") in ("", "done")

    @property
    def mode(self) -> str:
        """The mode that the run trained; where its figures are of one mode alone, that one."""
        stated = self.text("trained_mode") or "coarse_fine"
        known = [m for m in MODES if any(math.isfinite(self.number(f"{what}_{m}")) for what in ("accuracy", "loss"))]
        return known[0] if len(known) == 1 else stated

    @property
    def is_baseline(self) -> bool:
        """Whether it is the control that sees a frame as pooled tokens, without queries."""
        return self.text("architecture") in ("multi_token", "baseline")

    @property
    def tokens(self) -> float:
        """Visual tokens a frame; NaN where it is not on record."""
        return self.number("grid") if self.is_baseline else self.number("tokens_per_frame")

    @property
    def kind(self) -> str:
        """What sees a frame, for legends."""
        count = "" if math.isnan(self.tokens) else f"{self.tokens:g} "
        plural = "" if self.tokens == 1 else "s"
        if self.is_baseline:
            return f"{count}pooled token{plural} a frame"
        return f"{'coarse only' if self.mode == 'coarse_only' else 'foveated'}, {count}token{plural} a frame"

    def text(self, column: str) -> str:
        """A cell; empty where the column or the cell is."""
        return self.cells.get(column, "").strip()

    def number(self, column: str) -> float:
        """A cell's number; NaN where the column or the cell is empty."""
        return self.numbers.get(column, math.nan)

    def accuracy(self, mode: str | None = None) -> dict[str, float] | None:
        """{"accuracy", "low", "high", "chance"} in a mode (None: the run's own); None where it was not measured."""
        mode = mode or self.mode
        value = self.number(f"accuracy_{mode}")
        if math.isnan(value):
            return None
        bounds = {name: self.number(f"{name}_{mode}") for name in ("low", "high")}
        return {"accuracy": value, **bounds, "chance": self.number("chance")}

    def loss(self, mode: str | None = None) -> dict[str, float] | None:
        """{"loss", "low", "high"} of the evaluation in a mode (None: its own, or else the last `val_loss`)."""
        own = mode is None or mode == self.mode
        value = self.number(f"loss_{mode or self.mode}")
        if math.isnan(value) and own:
            value = self.number("val_loss")
        if math.isnan(value):
            return None
        low, high = (self.number(name) if own else math.nan for name in ("loss_low", "loss_high"))
        return {"loss": value, "low": low, "high": high}


def study_runs(results: Table, folder: Path | None = None) -> list[StudyRun]:
    """Rows of a table with `results.csv`'s columns; `folder`: where the runs' own folders would be.

    Raises ValueError where a run is named twice, or a cell of a measured column is no number.
    """
    names = results.text("run")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{results.origin}: run {', '.join(twice)} is named in more than one row; expected one a run")
    columns = {name: _numbers(results, name) for name in results.columns if name not in TEXTS}
    found = []
    for row, name in enumerate(names):
        own = None if folder is None else folder / name
        found.append(
            StudyRun(
                cells={column: cells[row] for column, cells in results.columns.items()},
                numbers={column: float(values[row]) for column, values in columns.items() if values is not None},
                folder=own if own is not None and own.is_dir() else None,
            )
        )
    return found


def _numbers(results: Table, name: str) -> np.ndarray | None:
    """A column's numbers; None of a label that is words. A measured column has to be numbers, and says so."""
    measured = name.startswith(("accuracy_", "low_", "high_", "loss", "val_loss", "train_", "flops"))
    try:
        return results.numbers(name)
    except ValueError:
        if measured or name in ("parameters", "samples", "steps", "chance"):
            raise
        return None


def budget_words(budget: str) -> str:
    """A budget as it is written in figures: a name as it stands, FLOPs shortened."""
    try:
        return f"{float(budget):.3g} FLOPs"
    except ValueError:
        return budget


def budgeted(runs: Sequence[StudyRun]) -> list[StudyRun]:
    """Of a grid, the runs that were given a budget, not another run's samples; of other studies none."""
    return [run for run in runs if run.text("budget") and run.text("comparison") != "isosample"]


def at_largest_budget(runs: Sequence[StudyRun]) -> list[StudyRun]:
    """Of a grid, the runs of its largest budget; of other studies all."""
    grid = [run for run in budgeted(runs) if math.isfinite(run.number("train_flops"))]
    if not grid:
        return list(runs)
    largest = max(grid, key=lambda run: run.number("train_flops")).text("budget")
    return [run for run in grid if run.text("budget") == largest]


def accuracy_spread(runs: Sequence[StudyRun], mode: str | None = None) -> Spread | None:
    """Accuracy of one arm's runs in a mode (None: their own); None where none has it."""
    return spread([run.accuracy(mode) for run in runs], "accuracy")


def loss_spread(runs: Sequence[StudyRun], mode: str | None = None) -> Spread | None:
    """Loss of one arm's runs in a mode (None: their own); None where none has it."""
    return spread([run.loss(mode) for run in runs], "loss")


def spread(figures: Sequence[dict[str, float] | None], name: str) -> Spread | None:
    """The seeds' figures as one; None where there is none."""
    known = [each for each in figures if each is not None]
    if not known:
        return None
    values = tuple(each[name] for each in known)
    low, high = ([each[bound] for each in known] for bound in ("low", "high"))
    bounded = all(math.isfinite(bound) for bound in (*low, *high))
    return Spread(
        values=values,
        low=min(value if math.isnan(bound) else bound for value, bound in zip(values, low, strict=True)),
        high=max(value if math.isnan(bound) else bound for value, bound in zip(values, high, strict=True)),
        bounded=bounded,
        chance=known[0].get("chance", math.nan),
    )
