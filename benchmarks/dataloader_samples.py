"""Samples like those of the three stages, drawn into shards: what benchmarks let loaders and training read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from fvlm.data.chat import SYSTEM_MESSAGE, load_tokenizer
from fvlm.data.shard import ShardWriter
from fvlm.data.tiny_tokenizer import WORDS
from fvlm.data.video import encode_jpeg


class Source(NamedTuple):
    """What the samples of one source are like."""

    share: float
    """Of the samples drawn."""
    kind: str
    least: int
    """Frames."""
    most: int
    log_words: float
    """Mean of ln(words of the answer)."""
    deviation: float
    """Its standard deviation."""


# Shares as in launch/configs/mixtures: published sizes, beside 14 % of text. Lengths are chosen so that the means fit:
# stage 2 has about 4.6 distinct frames and 180 to 250 tokens a sample, visual ones included.
STAGE_1 = {
    "openvid": Source(0.842, "video", 3, 13, 4.8, 0.4),
    "webvid": Source(0.018, "video", 5, 30, 3.3, 0.4),
    "smoltalk": Source(0.14, "text", 0, 0, 5.8, 0.8),
}
STAGE_2 = {
    "cauldron": Source(0.434, "image", 1, 1, 3.9, 1.0),
    "cauldron_multi": Source(0.040, "images", 2, 6, 4.2, 0.8),
    "openvid": Source(0.214, "video", 3, 13, 4.8, 0.4),
    "vript": Source(0.097, "video", 3, 15, 5.3, 0.4),
    "vista": Source(0.056, "video", 4, 28, 4.7, 0.8),
    "sharegpt4video": Source(0.009, "video", 5, 50, 5.5, 0.4),
    "llava_video": Source(0.005, "video", 10, 64, 4.9, 0.7),
    "webvid": Source(0.005, "video", 5, 30, 3.3, 0.4),
    "smoltalk": Source(0.14, "text", 0, 0, 5.8, 0.8),
}
DPO = {"rlaif_v": Source(1.0, "image", 1, 1, 4.6, 0.5)}
MIXES = {"stage1": STAGE_1, "stage2": STAGE_2, "dpo": DPO}
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


def draw_set(folder: Path, num_samples: int, image_size: int, seed: int = 0, mix: str = "stage2") -> DrawnSet:
    """Write `num_samples` samples of one of `MIXES` as shards in `folder/shards`, and `folder/tokenizer.json`.

    Those of `dpo` are preference pairs. The tokenizer is the built-in `tiny`: no download, the same for every loader.
    """
    tokenizer = load_tokenizer("tiny")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat.json").write_text(json.dumps({"system": SYSTEM_MESSAGE}))
    random = np.random.default_rng(seed)
    pool = [encode_jpeg(_picture(random, image_size)) for _ in range(min(POOL, 4 * num_samples))]
    with ShardWriter(folder / "shards", tokenizer, SAMPLES_PER_SHARD) as writer:
        num_frames = num_bytes = 0
        for meta in tqdm(draw_metas(random, num_samples, mix), "drawing", num_samples, unit="sample", disable=None):
            jpegs = [pool[i] for i in random.integers(0, len(pool), meta["frame_count"])]
            writer.write(meta, jpegs)
            num_frames += len(jpegs)
            num_bytes += sum(map(len, jpegs))
    drawn = DrawnSet(image_size, num_samples, num_frames, num_bytes // max(num_frames, 1))
    (folder / "set.json").write_text(json.dumps(asdict(drawn)))
    return drawn


def draw_metas(random: np.random.Generator, num_samples: int, mix: str) -> Iterator[dict]:
    """Metadata of the samples (docs/data.md), one after the other."""
    names, sources = list(MIXES[mix]), list(MIXES[mix].values())
    answers = ("chosen", "rejected") if mix == "dpo" else ("assistant",)
    for number, choice in enumerate(_choices(random, num_samples, [source.share for source in sources])):
        source = sources[choice]
        count = int(random.integers(source.least, source.most + 1))
        yield {
            "key": f"s{number:06d}",
            "kind": source.kind,
            "source": names[choice].removesuffix("_multi"),
            "user": _words(random, int(random.integers(5, 30))),
            **{answer: _answer(random, source) for answer in answers},
            "frame_count": count,
            "duration": float(count) if source.kind == "video" else 0.0,
        }


def _choices(random: np.random.Generator, num_samples: int, shares: Sequence[float]) -> np.ndarray:
    """The source of each sample: as many of each as its share says, to within one, in random order."""
    shares = np.array(shares) / sum(shares)
    places = (np.arange(num_samples) + 0.5) / max(num_samples, 1)
    return random.permutation(np.searchsorted(shares.cumsum()[:-1], places, side="right"))


def _answer(random: np.random.Generator, source: Source) -> str:
    words = np.exp(random.normal(source.log_words, source.deviation))
    return _words(random, int(min(words, MOST_WORDS)) + 1)


def _words(random: np.random.Generator, count: int) -> str:
    return " ".join(WORDS[i] for i in random.integers(0, len(WORDS), count))


def _picture(random: np.random.Generator, size: int) -> np.ndarray:
    """Patches on coarser patches, a little noise: its JPEG has about a photograph's bytes. uint8 [size, size, 3]."""
    picture = random.integers(-4, 5, (size, size, 3)).astype(np.float32)
    for cells, strength in ((7, 1.0), (28, 0.35), (112, 0.12)):
        patches = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        picture += strength * (np.asarray(patches.resize((size, size), Image.Resampling.BICUBIC), np.float32) - 128)
    return np.clip(picture + 128, 0, 255).astype(np.uint8)
