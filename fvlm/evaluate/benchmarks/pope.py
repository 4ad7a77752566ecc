"""POPE: is this object in the picture? Rows as JSON lines, a file a way of choosing the objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from fvlm.data.errors import SampleError
from fvlm.evaluate.benchmarks.base import YES_NO, Row, first_there, text_field
from fvlm.evaluate.benchmarks.media import ClipFile
from fvlm.evaluate.benchmarks.reading import read_rows, to_rows
from fvlm.schema import ConfigError


def read(folder: Path) -> tuple[list[Row], Counter]:
    """Rows of `coco_pope_<split>.json` (or .jsonl), here or a folder below; pictures in `images/` or `val2014/`."""
    files = sorted(f for ext in ("json", "jsonl") for where in ("", "*/") for f in folder.glob(f"{where}*pope*.{ext}"))
    if not files:
        raise ConfigError(f"{folder}: no *pope*.json or .jsonl")
    rows, not_asked = [], Counter()
    for file in files:
        split = file.stem.split("_")[-1]
        rows += to_rows(read_rows(file), lambda row, split=split: _row(row, folder, split), not_asked)
    return rows, not_asked


def _row(row: Mapping, folder: Path, split: str) -> Row:
    label, image = text_field(row, "label").strip().capitalize(), text_field(row, "image")
    if label not in YES_NO:
        raise SampleError("bad_answer", f"label {label!r}: expected yes or no")
    return Row(
        key=f"{split}-{text_field(row, 'question_id')}",
        prompt=f"{text_field(row, 'text').strip()}\nAnswer yes or no.",
        options=YES_NO,
        answer=YES_NO.index(label),
        groups={"task": split},
        clip=ClipFile(path=first_there(folder, f"images/{image}", f"val2014/{image}", image)),
        lettered=False,
    )
