"""Annotation files as they are published: JSON, JSON lines, Parquet."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pyarrow import parquet

from fvlm.data.errors import SampleError
from fvlm.evaluate.benchmarks.base import Row
from fvlm.schema import ConfigError

logger = logging.getLogger(__name__)


def read_json(path: Path) -> Any:
    """A JSON file's value; raises ConfigError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no readable JSON: {error}") from error


def read_rows(path: Path) -> list[dict]:
    """The rows of a .parquet, .jsonl or .json file, of which the last may be a list or an object a line."""
    if path.suffix == ".parquet":
        try:
            return parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: no readable Parquet: {error}") from error
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json" and text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: neither JSON nor JSON lines: {error}") from error


def read_numbered(path: Path) -> list[Any]:
    """The rows of a JSON list, each with its "number" in it; raises ConfigError."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: expected a list of rows, got {type(rows).__name__}")
    return [{**row, "number": number} if isinstance(row, Mapping) else row for number, row in enumerate(rows)]


def to_rows(published: Iterable[Any], make: Callable[[Mapping], Row], not_asked: Counter) -> list[Row]:
    """Each published row through `make`; those that raise SampleError are counted by reason, the first one logged."""
    rows = []
    for row in published:
        try:
            if not isinstance(row, Mapping):
                raise SampleError("bad_row", f"{row!r}: expected an object")
            rows.append(make(row))
        except SampleError as error:
            not_asked[error.reason] += 1
            if not_asked[error.reason] == 1:
                logger.info("a row is not asked: %s", error)
    return rows
