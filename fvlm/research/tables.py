"""CSV records of runs, read into columns; ours or anyone's with the same column names."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class NothingRecorded(ValueError):
    """A record that was begun and holds nothing yet."""


class Table:
    """Columns of one CSV file, in file order.

    `numbers(name)` gives float64 with NaN for empty cells, `text(name)` the cells as written.
    """

    def __init__(self, columns: dict[str, list[str]], origin: str):
        self.columns = columns
        self.origin = origin

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def text(self, name: str) -> list[str]:
        self.require([name])
        return self.columns[name]

    def numbers(self, name: str) -> np.ndarray:
        """Returns float64 [rows]; raises ValueError naming file, column, row and cell where a cell is no number."""
        values = np.full(len(self), np.nan)
        for row, cell in enumerate(self.text(name)):
            if cell.strip() in ("", "None", "null"):
                continue
            try:
                values[row] = float(cell)
            except ValueError:
                raise ValueError(f"{self.origin}: column {name!r}, row {row + 1}: {cell!r} is not a number") from None
        return values

    def has(self, name: str) -> bool:
        """True if the column exists and holds at least one number."""
        return name in self.columns and bool(np.isfinite(self.numbers(name)).any())

    def require(self, names: Sequence[str]) -> None:
        """Raises ValueError that names the file and every missing column."""
        missing = [name for name in names if name not in self.columns]
        if missing:
            has = ", ".join(self.columns) or "none"
            raise ValueError(f"{self.origin}: missing column(s) {', '.join(missing)}; it has {has}")

    def under(self, prefix: str, keep: Sequence[str]) -> Table:
        """Columns `keep`, and those named `prefix` + name under name, e.g. `under("slots/coarse_fine/", ["step"])`."""
        self.require(keep)
        found = {name.removeprefix(prefix): cells for name, cells in self.columns.items() if name.startswith(prefix)}
        return Table({**{name: self.columns[name] for name in keep}, **found}, self.origin)

    def where(self, **equal: str) -> Table:
        """Rows whose cells equal the given texts, e.g. `table.where(mode="coarse_fine")`."""
        self.require(list(equal))
        keep = [row for row in range(len(self)) if all(self.columns[k][row] == v for k, v in equal.items())]
        return Table({name: [cells[row] for row in keep] for name, cells in self.columns.items()}, self.origin)


def read_csv(path: str | Path, required: Sequence[str] = ()) -> Table:
    """Reads a CSV with a header row.

    Raises FileNotFoundError, ValueError where a required column is missing, and its subclass NothingRecorded where no
    row follows the header.
    """
    path = Path(path)
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a mark
        rows = list(csv.reader(file))
    if not rows:
        raise ValueError(f"{path}: empty file; expected a header row with {', '.join(required) or 'column names'}")
    header, body = rows[0], [row for row in rows[1:] if row]  # spreadsheets end with empty lines
    for number, row in enumerate(rows[1:], start=2):
        if row and len(row) != len(header):
            raise ValueError(f"{path}: line {number} has {len(row)} cells, the header has {len(header)}")
    table = Table({name: [row[i] for row in body] for i, name in enumerate(header)}, str(path))
    table.require(required)
    if not body:
        raise NothingRecorded(f"{path}: a header and no rows; nothing was recorded yet")
    return table


def read_jsonl(path: str | Path, kind: str) -> Table:
    """The lines of a JSONL file whose `kind` is as given, as a table; a field that a line lacks is an empty cell.

    Raises FileNotFoundError, or ValueError naming the line that is no JSON object.
    """
    path = Path(path)
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is no JSON: {error}") from error
        if record.get("kind") == kind:
            records.append(record)
    names = dict.fromkeys(name for record in records for name in record)
    cells = {name: [_cell(record.get(name)) for record in records] for name in names}
    return Table(cells, str(path))


def _cell(value: object) -> str:
    return "" if value is None else str(value)
