"""A stage-2-like mix of samples, drawn into shards: what `benchmarks/dataloader.py` lets the loaders read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from fvlm.data.chat import SYSTEM_MESSAGE, load_tokenizer
from fvlm.data.shard import ShardWriter
from fvlm.data.tiny_tokenizer import WORDS
from fvlm.data.video import encode_jpeg

# source: (share of the samples, kind, least and most frames, mean and deviation of ln(words of the answer))
STAGE_2 = {
    "cauldron": (0.46, "image", 1, 1, 4.3, 1.0),
    "cauldron_multi": (0.04, "images", 2, 6, 4.6, 0.8),
    "openvid": (0.10, "video", 3, 16, 4.6, 0.5),
    "webvid": (0.03, "video", 5, 40, 3.3, 0.4),
    "vista": (0.09, "video", 20, 64, 4.7, 0.8),
    "vript": (0.11, "video", 4, 30, 5.3, 0.4),
    "sharegpt4video": (0.02, "video", 5, 40, 5.5, 0.4),
    "llava_video": (0.01, "video", 10, 64, 4.9, 0.7),
    "smoltalk": (0.14, "text", 0, 0, 6.0, 0.9),
}
POOL = 512
"""Distinct pictures that frames are taken from."""
MOST_WORDS = 3000
SAMPLES_PER_SHARD = 128


@dataclass(frozen=True, slots=True)
class DrawnSet:
    """What was drawn; `set.json` beside the shards."""

    image_size: int
    samples: int
    frames: int
    jpeg_bytes: int
    """Mean of a frame's."""


def draw_set(folder: Path, num_samples: int, image_size: int, seed: int = 0) -> DrawnSet:
    """Write `num_samples` samples as shards in `folder/shards`, and the tokenizer as `folder/tokenizer.json`.

    The tokenizer is the built-in `tiny`: no download, and every loader uses the same one.
    """
    tokenizer = load_tokenizer("tiny")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat.json").write_text(json.dumps({"system": SYSTEM_MESSAGE}))
    random = np.random.default_rng(seed)
    pool = [encode_jpeg(_picture(random, image_size)) for _ in range(min(POOL, 4 * num_samples))]
    with ShardWriter(folder / "shards", tokenizer, SAMPLES_PER_SHARD) as writer:
        num_frames = num_bytes = 0
        for meta in tqdm(_metas(random, num_samples), "drawing", num_samples, unit="sample", disable=None):
            jpegs = [pool[i] for i in random.integers(0, len(pool), meta["frame_count"])]
            writer.write(meta, jpegs)
            num_frames += len(jpegs)
            num_bytes += sum(map(len, jpegs))
    drawn = DrawnSet(image_size, num_samples, num_frames, num_bytes // max(num_frames, 1))
    (folder / "set.json").write_text(json.dumps(asdict(drawn)))
    return drawn


def _metas(random: np.random.Generator, num_samples: int) -> Iterator[dict]:
    names = list(STAGE_2)
    shares = np.array([STAGE_2[name][0] for name in names])
    for number, choice in enumerate(random.choice(len(names), num_samples, p=shares / shares.sum())):
        _, kind, least, most, mean, deviation = STAGE_2[names[choice]]
        count = int(random.integers(least, most + 1))
        answer = _words(random, int(min(np.exp(random.normal(mean, deviation)), MOST_WORDS)) + 1)
        yield {
            "key": f"s{number:06d}",
            "kind": kind,
            "source": names[choice],
            "user": _words(random, int(random.integers(5, 30))),
            "assistant": answer,
            "frame_count": count,
            "duration": float(count) if kind == "video" else 0.0,
        }


def _words(random: np.random.Generator, count: int) -> str:
    return " ".join(WORDS[i] for i in random.integers(0, len(WORDS), count))


def _picture(random: np.random.Generator, size: int) -> np.ndarray:
    """Patches on coarser patches, a little noise: its JPEG has about a photograph's bytes. uint8 [size, size, 3]."""
    picture = random.integers(-4, 5, (size, size, 3)).astype(np.float32)
    for cells, strength in ((7, 1.0), (28, 0.35), (112, 0.12)):
        patches = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        picture += strength * (np.asarray(patches.resize((size, size), Image.Resampling.BICUBIC), np.float32) - 128)
    return np.clip(picture + 128, 0, 255).astype(np.uint8)
