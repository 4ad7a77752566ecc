"""ScienceQA's test split: `problems.json` by problem, most of them about a picture or a text, some about neither."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from fvlm.data.errors import SampleError
from fvlm.evaluate.benchmarks.base import Row, first_there, lettered_prompt, text_field
from fvlm.evaluate.benchmarks.media import ClipFile
from fvlm.evaluate.benchmarks.reading import read_json, to_rows
from fvlm.schema import ConfigError

SPLIT = "test"


def read(folder: Path) -> tuple[list[Row], Counter]:
    """Problems of the test split; pictures in `images/test/<problem>/`, or `test/<problem>/`."""
    problems = read_json(folder / "problems.json")
    if not isinstance(problems, dict):
        raise ConfigError(f"{folder / 'problems.json'}: expected an object of problems by number")
    published = [
        {**problem, "number": number} if isinstance(problem, Mapping) else problem
        for number, problem in problems.items()
        if not isinstance(problem, Mapping) or problem.get("split") == SPLIT
    ]
    not_asked: Counter = Counter()
    return to_rows(published, lambda row: _row(row, folder), not_asked), not_asked


def _row(row: Mapping, folder: Path) -> Row:
    options, answer = row.get("choices"), row.get("answer")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o.strip() for o in options):
        raise SampleError("bad_options", f"choices {options!r}: expected two or more texts")
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        raise SampleError("bad_answer", f"answer {answer!r}: expected an index into {len(options)} choices")
    hint, image = str(row.get("hint") or "").strip(), row.get("image")
    question = text_field(row, "question")
    place = f"{SPLIT}/{row['number']}/{image}"
    return Row(
        key=str(row["number"]),
        prompt=lettered_prompt(f"{hint}\n{question}" if hint else question, options),
        options=tuple(options),
        answer=answer,
        groups={
            "subject": text_field(row, "subject"),
            "context": "picture" if image else "text" if hint else "none",
            "grade": text_field(row, "grade"),
        },
        clip=ClipFile(path=first_there(folder, f"images/{place}", place)) if image else None,
    )
