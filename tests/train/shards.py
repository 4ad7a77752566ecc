"""Small shards for the training tests: videos, stills and text, 56 px, whose captions name the frames' colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fvlm.data.chat import load_tokenizer
from fvlm.data.shard import ShardWriter
from fvlm.data.video import encode_jpeg

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (230, 230, 230)}


def write_shards(folder: Path, num_samples: int, seed: int = 0, samples_per_shard: int = 16) -> Path:
    """Shards of `num_samples` samples in `folder`, which is returned."""
    random = np.random.default_rng(seed)
    with ShardWriter(folder, load_tokenizer("tiny"), samples_per_shard) as writer:
        for number in range(num_samples):
            writer.write(*_sample(f"s{seed}-{number:05d}", number % 7, random))
    return folder


def _sample(key: str, variety: int, random: np.random.Generator) -> tuple[dict, list[bytes]]:
    if variety == 6:
        words = " ".join(random.choice(list(COLOURS), 3))
        meta = {"kind": "text", "source": "words", "user": f"Say {words}.", "assistant": words, "frame_count": 0}
        return {"key": key, "duration": 0.0, **meta}, []
    count = 1 if variety == 5 else int(random.integers(2, 6))
    names = list(random.choice(list(COLOURS), count))
    frames = [_frame(name, random) for name in names]
    meta = {
        "kind": "image" if variety == 5 else "video",
        "source": "colours",
        "user": "Which colours?",
        "assistant": " ".join(names),
        "frame_count": count,
        "duration": float(count),
        "narration": [f" {name}" for name in names],
    }
    return {"key": key, **meta}, [encode_jpeg(frame) for frame in frames]


def _frame(name: str, random: np.random.Generator) -> np.ndarray:
    frame = random.integers(0, 60, (56, 56, 3)).astype(np.uint8)
    row, column = random.integers(0, 4, 2) * 14
    frame[row : row + 14, column : column + 14] = COLOURS[name]
    return frame
