"""Write a corpus of synthetic clips: media files, `train.jsonl`, `val.jsonl` and `corpus.json`, in parallel processes.

Every item is drawn from (seed, split, index) alone, so the files do not depend on the number of processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data_prep.synthetic.combinations import Dealer
from data_prep.synthetic.draw import draw, write_clip
from data_prep.synthetic.families import FAMILIES, LEVELS, Level
from data_prep.synthetic.questions import Draft

ITEMS_PER_TASK = 100
DEFAULT_MIX = {
    "cue": 0.6,
    "caption": 0.16,
    "text": 0.14,
    "ask": 0.04,
    "tracking": 0.02,
    "relay": 0.02,
    "still": 0.01,
    "images": 0.01,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """What to draw. Raises ValueError that names the field and what to do."""

    clips: int
    """Items of the training split: clips, stills, sets of stills and texts."""
    val_clips: int
    """Items of the validation split."""
    seed: int = 0
    mix: dict[str, float]
    """Weight of each family."""
    difficulty: int = 1
    """1, 2 or 3: more frames, more glyphs, more motion."""
    frames: int | None = None
    """Scenes in a clip, one a second; None = as the difficulty says."""
    size: int = 224
    """Width and height in pixels."""
    fps: int = 2

    def __post_init__(self):
        if self.clips < 0 or self.val_clips < 0 or self.clips + self.val_clips == 0:
            raise ValueError(f"clips={self.clips}, val_clips={self.val_clips}: ask for at least one item")
        unknown = sorted(set(self.mix) - set(FAMILIES))
        if unknown:
            raise ValueError(f"mix: unknown family {', '.join(unknown)}; expected some of {', '.join(FAMILIES)}")
        if not self.mix or min(self.mix.values()) < 0 or sum(self.mix.values()) <= 0:
            raise ValueError(f"mix={self.mix}: give at least one family, and weights that are not negative")
        if self.difficulty not in LEVELS:
            raise ValueError(f"difficulty={self.difficulty}: expected one of {', '.join(map(str, LEVELS))}")
        if self.frames is not None and not 2 <= self.frames <= 64:
            raise ValueError(f"frames={self.frames}: expected 2 to 64")
        if self.size % 8 or not 56 <= self.size <= 2048:
            raise ValueError(f"size={self.size}: expected a multiple of 8 from 56 to 2048, so that cells are whole")
        if not 1 <= self.fps <= 60:
            raise ValueError(f"fps={self.fps}: expected 1 to 60")

    @property
    def level(self) -> Level:
        level = LEVELS[self.difficulty]
        return Level(self.frames or level.frames, level.glyphs, level.lookalikes, level.jitter)

    def family(self, index: int) -> str:
        """The family of an item: any run of items has nearly the shares of the mix."""
        edges = list(accumulate(self.mix.values()))
        golden = (index * 0.6180339887498949 + 0.5) % 1.0
        return list(self.mix)[min(bisect_right(edges, golden * edges[-1]), len(edges) - 1)]


def draft(corpus: Corpus, split: str, index: int) -> Draft:
    """Item `index` of a split, not yet drawn."""
    dealer = Dealer(f"{corpus.seed} {split} {index}", split, corpus.level.jitter)
    return FAMILIES[corpus.family(index)](dealer, corpus.level)


def write_item(corpus: Corpus, split: str, index: int, folder: Path) -> list[dict]:
    """Draw item `index` into its files below `folder` and return its manifest rows."""
    made = draft(corpus, split, index)
    stem = f"{split}-{index:06d}"
    place = Path("media") / split / f"{index // 1000:04d}"
    (folder / place).mkdir(parents=True, exist_ok=True)
    if made.medium == "video":
        media = str(place / f"{stem}.mp4")
        write_clip(folder / media, made.scenes, corpus.size, corpus.fps)
    else:
        # half of the stills are lossless, half as photographs come
        kind, options = ("png", {"compress_level": 1}) if index % 2 else ("jpg", {"quality": 92, "subsampling": 0})
        media = [str(place / f"{stem}-{number}.{kind}") for number in range(len(made.scenes))]
        for name, scene in zip(media, made.scenes, strict=True):
            Image.fromarray(draw(scene, corpus.size)).save(folder / name, **options)
        media = media[0] if made.medium == "image" else media
    rows = []
    for number, row in enumerate(made.rows):
        rows.append({"key": f"{stem}-{number}", **({"media": media} if media else {}), **row})
    return rows


def _task(corpus: Corpus, split: str, start: int, folder: Path) -> list[dict]:
    count = corpus.clips if split == "train" else corpus.val_clips
    stop = min(start + ITEMS_PER_TASK, count)
    return [row for index in range(start, stop) for row in write_item(corpus, split, index, folder)]


def write_corpus(corpus: Corpus, folder: Path, workers: int) -> dict:
    """Draw everything into `folder` and return the summary that `corpus.json` holds.

    A folder that already holds this very corpus is left as it is. Raises FileExistsError for any other content.
    """
    summary_path = folder / "corpus.json"
    settings = json.loads(json.dumps(asdict(corpus)))
    if summary_path.exists():
        summary = json.loads(summary_path.read_text())
        if summary["settings"] == settings:
            return summary
        raise FileExistsError(f"{folder} holds a corpus drawn with other settings; give another --out or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [
        (corpus, split, start, folder)
        for split, count in (("train", corpus.clips), ("val", corpus.val_clips))
        for start in range(0, count, ITEMS_PER_TASK)
    ]
    rows = defaultdict(list)
    with tqdm(total=corpus.clips + corpus.val_clips, unit="clip", desc="draw") as bar:
        for task, made in zip(tasks, _run(tasks, workers), strict=True):
            rows[task[1]] += made
            bar.update(min(ITEMS_PER_TASK, bar.total - bar.n))
    for split in ("train", "val"):
        _write(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows[split]))
    summary = {"settings": settings, "rows": {split: _summary(rows[split]) for split in ("train", "val")}}
    _write(summary_path, json.dumps(summary, indent=1) + "\n")
    return summary


def _run(tasks: list[tuple], workers: int) -> Iterator[list[dict]]:
    if workers <= 1:
        yield from (_task(*task) for task in tasks)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_task, *zip(*tasks, strict=True))


def _summary(rows: list[dict]) -> dict:
    """Rows by source and, where a source has options, the accuracy that guessing reaches."""
    counts, chances = defaultdict(int), defaultdict(list)
    for row in rows:
        counts[row["source"]] += 1
        if "options" in row:
            chances[row["source"]].append(1 / len(row["options"]))
    chance = {source: round(sum(values) / len(values), 4) for source, values in sorted(chances.items())}
    return {"by_source": dict(sorted(counts.items())), "chance_level": chance}


def _write(path: Path, content: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content)
    os.replace(temporary, path)
