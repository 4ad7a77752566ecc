"""Small files in the layouts that data sets are published in, for tests of the sources."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))


def write_csv(path: Path, header: list[str], rows: list[list]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def write_parquet(path: Path, columns: dict[str, pa.Array], rows_per_group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


def picture(seed: int, size: tuple[int, int] = (60, 80), kind: str = "PNG") -> bytes:
    """A picture file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def pictures(*groups: list[bytes] | None) -> pa.Array:
    """A column of lists of pictures, as the `datasets` library writes them."""
    rows = [None if group is None else [{"bytes": each, "path": None} for each in group] for group in groups]
    return pa.array(rows, pa.list_(PICTURE))


def texts(*rows: list[tuple[str | None, str | None]] | None) -> pa.Array:
    """The Cauldron's column of exchanges."""
    kind = pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())]))
    given = [row and [{"user": user, "assistant": said, "source": "TQA"} for user, said in row] for row in rows]
    return pa.array(given, kind)


def chat(*messages: tuple[str, str], role: str = "from", content: str = "value") -> list[dict]:
    return [{role: who, content: what} for who, what in messages]
