"""MLVU's dev set: a JSON file a task; answers are the candidate's text; tasks that ask for a text are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from fvlm.data.errors import SampleError
from fvlm.evaluate.benchmarks.base import Row, choose, lettered_prompt, text_field
from fvlm.evaluate.benchmarks.media import ClipFile
from fvlm.evaluate.benchmarks.reading import read_numbered, to_rows
from fvlm.schema import ConfigError


def read(folder: Path) -> tuple[list[Row], Counter]:
    """Rows of `json/<n>_<task>.json`; videos in `video/<n>_<task>/`."""
    files = sorted((folder / "json").glob("*.json"))
    if not files:
        raise ConfigError(f"{folder}: no json/<n>_<task>.json")
    rows, not_asked = [], Counter()
    for file in files:
        published = read_numbered(file)
        videos = folder / "video" / file.stem
        rows += to_rows(published, lambda row, videos=videos: _row(row, videos), not_asked)
    return rows, not_asked


def _row(row: Mapping, videos: Path) -> Row:
    if "candidates" not in row:
        raise SampleError("no_candidates", f"{videos.name}: asks for a text")
    options, answer = choose(row["candidates"], row.get("answer"), by_letter=False)
    return Row(
        key=f"{videos.name}-{row['number']}",
        prompt=lettered_prompt(text_field(row, "question"), options),
        options=options,
        answer=answer,
        groups={"task": text_field(row, "question_type")},
        clip=ClipFile(path=videos / text_field(row, "video")),
    )
