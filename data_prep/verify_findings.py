"""What is found in one shard: problems, and what a report says of its samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fvlm.data.chat import has_narration
from fvlm.data.content import salted
from fvlm.data.shard import KINDS, ShardIndex
from fvlm.data.shard_rows import IndexRow

SHEET_SAMPLES = 4
"""Samples of a source on its sheet."""
SHEET_FRAMES = 8
"""Frames shown of each."""
MOST_FRAMES, OCTAVE, BINS = 128, 4, 96
"""Histograms: frame counts up to MOST_FRAMES; tokens and seconds in BINS bins, OCTAVE to a doubling."""
SHORTEST = 1 / 16
"""Seconds; where the bins of durations begin. Those of tokens begin at 1."""

_MOST_TEXTS, _LONGEST_TEXT = 6, 300  # of a sample on a sheet


class Problem(NamedTuple):
    """Something wrong; `key` is a sample's, a member's name, or empty where it is the shard's."""

    shard: str
    key: str
    reason: str
    detail: str


class Draw(NamedTuple):
    """A sample for the sheets: those with the smallest salts are shown."""

    salt: int
    key: str
    shard: str
    kind: str
    text: str
    frames: tuple[tuple[int, int], ...]
    """(offset, size) in the tar."""


@dataclass(kw_only=True, slots=True)
class Findings:
    """What is wrong with a shard, and what it holds."""

    shard: str
    problems: list[Problem] = field(default_factory=list)
    notes: Counter = field(default_factory=Counter)
    """Things to know that are not wrong."""
    size: int = 0
    """Bytes."""
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, "S1"))
    """UTF-8 [n]."""
    content: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """uint64 [n]."""
    by_source: dict[str, Counter] = field(default_factory=dict)
    """samples, frames, tokens, seconds and each kind."""
    frame_sizes: Counter = field(default_factory=Counter)
    """Frames by (width, height)."""
    frames: np.ndarray = field(default_factory=lambda: np.zeros((len(KINDS), MOST_FRAMES + 1), np.int64))
    tokens: np.ndarray = field(default_factory=lambda: np.zeros((len(KINDS), BINS), np.int64))
    seconds: np.ndarray = field(default_factory=lambda: np.zeros((len(KINDS), BINS), np.int64))
    """Histograms, by kind."""
    tokenizers: set[str] = field(default_factory=set)
    """Hash of the tokenizer that `tokens` are of."""
    draws: dict[str, list[Draw]] = field(default_factory=dict)
    """By source."""

    def report(self, key: str, reason: str, detail: str) -> None:
        """Add a problem."""
        self.problems.append(Problem(*map(printable, (self.shard, key, reason, detail))))


def describe(found: Findings, truth: ShardIndex, rows: list[IndexRow], tokens: np.ndarray, seed: int) -> None:
    """Take up what the report shows; `tokens` are the text tokens of each sample, `seed` chooses the sheets'."""
    found.keys = np.array([key.encode("utf-8", "surrogateescape") for key in truth.keys.tolist()], np.bytes_)
    found.content = truth.content
    kind, frames = truth.kind, truth.num_frames
    np.add.at(found.frames, (kind, np.minimum(frames, MOST_FRAMES)), 1)
    np.add.at(found.tokens, (kind, _bins(tokens, 1)), 1)
    timed = truth.duration > 0
    np.add.at(found.seconds, (kind[timed], _bins(truth.duration[timed], SHORTEST)), 1)
    salts = salted(truth.content, "sheet", seed)
    for number, name in enumerate(truth.source_names):
        mine = np.flatnonzero(truth.source == number)
        found.by_source[name] = Counter(
            samples=len(mine),
            frames=int(frames[mine].sum()),
            tokens=int(tokens[mine].sum(dtype=np.int64)),
            seconds=float(truth.duration[mine].sum(dtype=np.float64)),
            **dict(zip(KINDS, np.bincount(kind[mine], minlength=len(KINDS)).tolist(), strict=True)),
        )
        drawn = mine[np.argsort(salts[mine], kind="stable")][:SHEET_SAMPLES]
        found.draws[name] = [_draw(found.shard, int(salts[row]), rows[row]) for row in drawn.tolist()]


def _bins(values: np.ndarray, first: float) -> np.ndarray:
    """Which bin of the histograms: bin i begins at first * 2 ** (i / OCTAVE)."""
    return np.clip(np.floor(OCTAVE * np.log2(np.maximum(values, first) / first)), 0, BINS - 1).astype(np.int64)


def _draw(shard: str, salt: int, row: IndexRow) -> Draw:
    last = len(row.frames) - 1
    shown = sorted({round(i * last / (SHEET_FRAMES - 1)) for i in range(SHEET_FRAMES)}) if row.frames else []
    return Draw(salt, row.key, shard, row.kind, _text(row.meta), tuple(row.frames[i][:2] for i in shown))


def _text(meta: Mapping) -> str:
    """What is said, a line each, shortened."""
    turns = meta.get("turns") or [meta]
    said = [(name, turn[name]) for turn in turns for name in ("user", "assistant") if turn.get(name)]
    said += [(name, meta[name]) for name in ("chosen", "rejected") if meta.get(name)]
    said += [("narration", " |".join(meta["narration"]))] if has_narration(meta) else []
    lines = [f"{name}: {' '.join(str(text)[:_LONGEST_TEXT].split())}" for name, text in said[:_MOST_TEXTS]]
    return "\n".join(map(printable, lines))


def printable(text: str) -> str:
    """The text itself, or spelled out if a terminal or a file could take a part of it for something else."""
    return text if text.isprintable() else ascii(text)[1:-1]
