"""Finished runs of a study that are here as rows of tables alone: done on another machine, or their folders removed.

`OUT/elsewhere/` holds a folder, or several, each with the tables that a study wrote there. A row counts for the run of
its name and configuration (`config_hash`) where that run has no record of its own here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fvlm.research.tables import NothingRecorded, read_csv
from fvlm.schema import ConfigError

ELSEWHERE = "elsewhere"
TABLES = ("results.csv", "families.csv", "curves.csv", "timing.csv")

Rows = dict[str, list[dict[str, str]]]
"""Table -> the rows of one run, their cells as they stand."""


def read_elsewhere(out: Path) -> dict[tuple[str, str], Rows]:
    """(run, config_hash) -> its rows, of every finished run in the tables below `out`/elsewhere.

    Raises ConfigError where two folders hold the same run, ValueError for a table that cannot be read.
    """
    found: dict[tuple[str, str], Rows] = {}
    origins: dict[tuple[str, str], Path] = {}
    for results in sorted((out / ELSEWHERE).glob("**/results.csv")):
        tables = {name: _by_run(results.with_name(name)) for name in TABLES}
        for name, (row, *_) in tables["results.csv"].items():
            if row.get("status") != "done":
                continue
            key = (name, row["config_hash"])
            if key in found:
                raise ConfigError(
                    f"{results}: run {name} is also in {origins[key]}; expected each run once, remove one row"
                )
            origins[key], found[key] = results, {table: rows.get(name, []) for table, rows in tables.items()}
    return found


def _by_run(path: Path) -> dict[str, list[dict[str, str]]]:
    """Run -> its rows; empty without the file."""
    required = ["run", "status", "config_hash"] if path.name == "results.csv" else ["run"]
    found: dict[str, list[dict[str, str]]] = {}
    for row in _rows(path, required) if path.is_file() else ():
        found.setdefault(row["run"], []).append(row)
    return found


def _rows(path: Path, required: list[str]) -> Iterable[dict[str, str]]:
    try:
        table = read_csv(path, required)
    except NothingRecorded:
        return
    for cells in zip(*table.columns.values(), strict=True):
        yield dict(zip(table.columns, cells, strict=True))
