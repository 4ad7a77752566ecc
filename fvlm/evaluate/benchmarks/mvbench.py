"""MVBench: a JSON file a task; answers are the candidate's text; some questions are about a part of their video."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from fvlm.data.errors import SampleError
from fvlm.evaluate.benchmarks.base import Row, choose, lettered_prompt, text_field
from fvlm.evaluate.benchmarks.media import ClipFile
from fvlm.evaluate.benchmarks.reading import read_numbered, to_rows
from fvlm.schema import ConfigError

_STAR, _CLEVRER, _PERCEPTION = "star/Charades_v1_480", "clevrer/video_validation", "perception/videos"
FOLDERS = {
    "action_antonym": "ssv2_video",
    "action_count": _PERCEPTION,
    "action_localization": "sta/sta_video",
    "action_prediction": _STAR,
    "action_sequence": _STAR,
    "character_order": _PERCEPTION,
    "counterfactual_inference": _CLEVRER,
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd",
    "moving_attribute": _CLEVRER,
    "moving_count": _CLEVRER,
    "moving_direction": _CLEVRER,
    "object_existence": _CLEVRER,
    "object_interaction": _STAR,
    "object_shuffle": _PERCEPTION,
    "scene_transition": "scene_qa/video",
    "state_change": _PERCEPTION,
    "unexpected_action": "FunQA_test/test",
}
"""Under `video/`, where the archives unpack to, by task."""


def read(folder: Path) -> tuple[list[Row], Counter]:
    """Rows of `json/<task>.json`."""
    files = sorted((folder / "json").glob("*.json"))
    if not files:
        raise ConfigError(f"{folder}: no json/<task>.json")
    rows, not_asked = [], Counter()
    for file in files:
        task = file.stem
        if task not in FOLDERS:
            raise ConfigError(f"{file}: {task} is no task of MVBench; expected some of {', '.join(FOLDERS)}")
        published = read_numbered(file)
        rows += to_rows(published, lambda row, task=task: _row(row, folder, task), not_asked)
    return rows, not_asked


def _row(row: Mapping, folder: Path, task: str) -> Row:
    options, answer = choose(row.get("candidates"), row.get("answer"), by_letter=False)
    return Row(
        key=f"{task}-{row['number']}",
        prompt=lettered_prompt(text_field(row, "question"), options),
        options=options,
        answer=answer,
        groups={"task": task},
        clip=_clip(folder / "video" / FOLDERS[task] / text_field(row, "video"), row.get("start"), row.get("end")),
    )


def _clip(path: Path, start: object, end: object) -> ClipFile:
    """A part of the video, or the file of that part alone, as `<name>_<start>_<end>` where it was published so."""
    if start is None and end is None:
        return ClipFile(path=path)
    if not isinstance(start, (int, float)) or not isinstance(end, (int, float)):
        raise SampleError("bad_segment", f"{path}: start {start!r}, end {end!r}: expected seconds")
    part = path.with_name(f"{path.stem}_{start}_{end}{path.suffix}")
    if not path.exists() and part.exists():
        return ClipFile(path=part)
    return ClipFile(path=path, start=float(start), end=float(end))
