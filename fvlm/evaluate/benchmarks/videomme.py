"""Video-MME: a row a question, or in earlier files a row a video with its questions; answers are letters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from fvlm.evaluate.benchmarks.base import Row, choose, first_there, lettered_prompt, text_field
from fvlm.evaluate.benchmarks.media import ClipFile
from fvlm.evaluate.benchmarks.reading import read_rows, to_rows
from fvlm.schema import ConfigError

SUFFIXES = (".mp4", ".mkv", ".webm")
PLACES = ("data", "video", "videos")


def read(folder: Path) -> tuple[list[Row], Counter]:
    """Rows of the first `*.parquet`, `*.jsonl` or `*.json` in the folder or in its `videomme/`; videos in `data/`."""
    files = [
        f
        for ext in ("parquet", "jsonl", "json")
        for f in sorted([*folder.glob(f"*.{ext}"), *folder.glob(f"videomme/*.{ext}")])
    ]
    if not files:
        raise ConfigError(f"{folder}: no annotation file (*.parquet, *.jsonl or *.json, here or in videomme/)")
    not_asked: Counter = Counter()
    return to_rows(_questions(read_rows(files[0])), lambda row: _row(row, folder), not_asked), not_asked


def _questions(published: list[Mapping]) -> Iterator[Mapping]:
    for row in published:
        nested = row.get("questions") if isinstance(row, Mapping) else None
        if isinstance(nested, list):
            yield from ({**row, **question} if isinstance(question, Mapping) else question for question in nested)
        else:
            yield row


def _row(row: Mapping, folder: Path) -> Row:
    video = _video_name(row)
    options, answer = choose(row.get("options"), row.get("answer"), by_letter=True)
    names = [f"{place}/{video}{suffix}" for place in PLACES for suffix in SUFFIXES]
    return Row(
        key=text_field(row, "question_id"),
        prompt=lettered_prompt(text_field(row, "question"), options),
        options=options,
        answer=answer,
        groups={
            "duration": text_field(row, "duration", "duration_category"),
            "task": text_field(row, "task_type"),
            "domain": text_field(row, "domain", "video_category"),
        },
        clip=ClipFile(path=first_there(folder, *names)),
    )


def _video_name(row: Mapping) -> str:
    """Files are named by YouTube's id; rows without a field for it have it in their address."""
    if row.get("videoID"):
        return str(row["videoID"])
    found = re.search(r"(?:v=|youtu\.be/|shorts/)([\w-]{11})", str(row.get("url", "")))
    return found[1] if found else text_field(row, "video_id", "id")
