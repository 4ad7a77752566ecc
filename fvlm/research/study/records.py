"""A study's tables as rows: which runs are done, what each one is, and its figures in the mode that it trained.

Reads `results.csv`, `families.csv`, `curves.csv` and `fits.json` of a study's folder, or anyone's CSVs with the same
columns; columns beyond `run` may lack, and a figure that needs one says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvlm.research.records import read_json
from fvlm.research.study.rows import StudyRun, study_runs
from fvlm.research.tables import NothingRecorded, Table, read_csv

BASE_ARMS = ("base", "lr1", "f3")
"""Names under which a study's unchanged configuration goes."""
START = "start"
"""Question of the runs that others start from."""


class NotDrawn(ValueError):
    """A figure that a study's tables do not hold, and why."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure that was written."""

    caption: str
    runs: tuple[str, ...]
    """Names of the runs in it."""
    paths: tuple[Path, Path]
    """PNG and SVG."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyRecords:
    """What a study's folder holds; a table is None where `missing` names it."""

    name: str
    folder: Path
    runs: list[StudyRun]
    """All rows of `results.csv`, in its order."""
    families: Table | None = None
    curves: Table | None = None
    fits: dict[str, Any] | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def done(self) -> list[StudyRun]:
        """Without those that only give others their first weights."""
        return [run for run in self.runs if run.done and run.text("question") != START]

    @property
    def commits(self) -> list[str]:
        """Of the runs, each once."""
        return list(dict.fromkeys(run.text("commit")[:12] for run in self.runs if run.text("commit")))

    def arms(self, runs: Iterable[StudyRun] | None = None) -> dict[str, list[StudyRun]]:
        """Arm -> its done runs, one a seed, in the order of the plan."""
        found: dict[str, list[StudyRun]] = {}
        for run in self.done if runs is None else runs:
            found.setdefault(run.arm, []).append(run)
        return found

    def base_arm(self) -> str | None:
        """The arm that changes nothing: the first without a change on record, or so named; None where no arms are."""
        arms = [run for run in self.runs if run.text("arm") and run.text("question") != START]
        unchanged = [run.arm for run in arms if "changed" in run.cells and not run.text("changed")]
        named = [run.arm for run in arms if run.arm.lower() in BASE_ARMS]
        return next(iter([*unchanged, *named, *(run.arm for run in arms)]), None)

    def recipe(self, arm: str | None = None) -> list[StudyRun]:
        """The done runs on which a decision rests, one a seed.

        Of `arm`, or the base arm; without arms (a grid) the foveated runs that were given the most work. Never chosen
        by their result. Raises ValueError for an arm that a study with arms does not have.
        """
        base = self.base_arm()
        if arm is not None and arm not in {run.arm for run in self.runs} and base is not None:
            raise ValueError(f"arm {arm!r}: not in study {self.name}; it has {', '.join(self.arms(self.runs))}")
        base = base and (arm or base)
        if base is not None:
            return [run for run in self.done if run.arm == base]
        return _most_work([run for run in self.done if not run.is_baseline and run.mode != "coarse_only"])

    def controls(self) -> dict[str, list[StudyRun]]:
        """Kind -> done runs, one a seed, of models that cannot look: one fixed query a frame, or pooled tokens.

        One arm a kind, the one with the fewest changes; without arms the runs that were given the most work.
        """
        found: dict[str, list[StudyRun]] = {}
        for run in self.done:
            if run.is_baseline or run.mode == "coarse_only":
                found.setdefault(run.kind, []).append(run)
        if self.base_arm() is None:
            return {kind: _most_work(runs) for kind, runs in found.items()}
        fewest = {kind: min(runs, key=lambda run: run.text("changed").count("; ")).arm for kind, runs in found.items()}
        return {kind: [run for run in runs if run.arm == fewest[kind]] for kind, runs in found.items()}

    def curve(self, run: StudyRun) -> Table | None:
        """Its rows of `curves.csv`; None without any."""
        if self.curves is None:
            return None
        rows = self.curves.where(run=run.name)
        return rows if len(rows) else None


def _most_work(runs: Sequence[StudyRun]) -> list[StudyRun]:
    """The run with the most training FLOPs, and further seeds of it; the last one where no work is on record."""
    known = [run for run in runs if math.isfinite(run.number("train_flops"))]
    if not known:
        return list(runs[-1:])
    most = max(known, key=lambda run: (run.number("train_flops"), run.number("parameters")))
    same = ("architecture", "tokens_per_frame", "grid", "trained_mode", "parameters", "samples", "budget", "comparison")
    return [run for run in known if all(run.text(column) == most.text(column) for column in same)]


def read_study(path: str | Path) -> StudyRecords:
    """Reads a study's folder, or one CSV file in the place of its `results.csv`.

    Raises FileNotFoundError where there is no `results.csv`, and ValueError naming file, row and column for what cannot
    be read.
    """
    path = Path(path)
    results = path if path.is_file() else path / "results.csv"
    if not results.is_file():
        raise FileNotFoundError(f"{path}: no results.csv; expected a study's folder, or a CSV with its columns")
    folder, missing = results.parent, []
    beside = folder if path.is_dir() else None  # what lies beside a single file may be of another study
    tables = {}
    for name, what in (("families.csv", "accuracy by source"), ("curves.csv", "evaluations during training")):
        if beside and (beside / name).is_file():
            try:
                tables[name] = read_csv(beside / name, ["run"])
                continue
            except NothingRecorded:
                what += ": begun, and empty so far"
        missing.append(f"`{name}` ({what})")
    fits = read_json(beside / "fits.json") if beside and (beside / "fits.json").is_file() else None
    table = read_csv(results, ["run"])
    if fits is None and any(table.columns.get("budget", ())):  # ablations have none to lack
        missing.append("`fits.json` (scaling laws)")
    return StudyRecords(
        name=folder.resolve().name if beside else results.stem,
        folder=folder,
        runs=study_runs(table, beside),
        families=tables.get("families.csv"),
        curves=tables.get("curves.csv"),
        fits=fits,
        missing=missing,
    )
