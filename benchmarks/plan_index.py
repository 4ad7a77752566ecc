"""Draws the index of a large data set without its media: real `.idx` files beside empty tars, the same from a seed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fvlm.data.chat import TextCounts, load_tokenizer, tokenizer_hash
from fvlm.data.shard_index import VERSION, ShardIndex, fingerprint
from fvlm.data.shard_rows import KINDS

FORMAT = 2
"""Of what is drawn: a change of it draws anew."""
SHARD_SIZE = 956
"""Samples of a shard: 4.3 million of them in 4 500 shards."""
TOKENIZER = "tiny"


@dataclass(frozen=True, slots=True)
class Source:
    """What the samples of a source are like; the text's length is log-normal."""

    size: float
    """Samples, relative to the others."""
    name: str
    kind: str
    frames: tuple[int, int]
    log_tokens: float
    deviation: float


STAGE_2 = (  # sizes as published (The Cauldron's 2.0 million: some rows hold several pictures), and 14 % text
    Source(1.85e6, "cauldron", "image", (1, 1), 4.6, 1.0),
    Source(150e3, "cauldron", "images", (2, 6), 4.9, 0.8),
    Source(905e3, "openvid", "video", (3, 16), 4.9, 0.5),
    Source(19e3, "webvid", "video", (5, 40), 3.6, 0.4),
    Source(237e3, "vista", "video", (20, 64), 5.0, 0.8),
    Source(411e3, "vript", "video", (4, 30), 5.6, 0.4),
    Source(37e3, "sharegpt4video", "video", (5, 40), 5.8, 0.4),
    Source(22e3, "llava_video", "video", (10, 64), 5.2, 0.7),
    Source(591e3, "smoltalk", "text", (0, 0), 6.3, 0.9),
)


def draw(folder: Path, num_samples: int, seed: int, processes: int | None = None) -> Path:
    """The folder with `num_samples` samples, drawn unless it is there, by `processes` (None: one a core)."""
    target = folder / f"index-{num_samples}-{seed}"
    described = {"format": FORMAT, "samples": num_samples, "shard_size": SHARD_SIZE, "seed": seed, "index": VERSION}
    done = target / "drawn.json"
    if done.is_file() and json.loads(done.read_text()) == described:
        return target
    shutil.rmtree(target, ignore_errors=True)  # left half drawn
    target.mkdir(parents=True)
    shards = _shards(num_samples)
    make = partial(_draw_shard, target, seed, tokenizer_hash(load_tokenizer(TOKENIZER)))
    with multiprocessing.get_context("fork").Pool(processes or os.cpu_count()) as pool:
        drawn = pool.imap_unordered(make, enumerate(shards), chunksize=16)
        for _ in tqdm(drawn, f"drawing {num_samples:,} samples", len(shards), unit="shard", file=sys.stderr):
            pass
    done.write_text(json.dumps(described) + "\n")
    return target


def _shards(num_samples: int) -> list[tuple[Source, int]]:
    """(source, samples) of every shard; a shard holds one source."""
    ends = np.cumsum([source.size for source in STAGE_2])
    sizes = np.diff(np.round(num_samples * ends / ends[-1]).astype(int), prepend=0).tolist()
    return [
        (source, min(SHARD_SIZE, size - first))
        for source, size in zip(STAGE_2, sizes, strict=True)
        for first in range(0, size, SHARD_SIZE)
    ]


def _draw_shard(folder: Path, seed: int, counted_with: str, numbered: tuple[int, tuple[Source, int]]) -> None:
    number, (source, n) = numbered
    tar = folder / f"shard-{number:06d}.tar"
    tar.touch()
    index = draw_index(source, n, np.random.default_rng([seed, number]), counted_with, fingerprint(tar))
    index.save(tar.with_suffix(".idx"))


def draw_index(
    source: Source, n: int, random: np.random.Generator, counted_with: str, tar_fingerprint: str
) -> ShardIndex:
    """The index of a shard of `n` samples of a source."""
    low, high = source.frames
    num_frames = random.integers(low, high + 1, n).astype(np.int32)
    answer = np.clip(np.exp(random.normal(source.log_tokens, source.deviation, n)), 4, 8000).astype(np.int32)
    head = (20 + random.integers(3, 40, n)).astype(np.int32)
    narrated = (random.random(n) < 0.5) & (source.kind == "video")
    said = random.integers(1, 9, n).astype(np.int32)
    counts = {
        "tokens": answer + head + 8,
        "head": head,
        "answer": answer,
        "narrated_tokens": np.where(narrated, head + 8 + said * num_frames, 0),
        "narrated_answer": np.where(narrated, said * num_frames + 1, 0),
        "narrated_tail": np.where(narrated, said + 2, 0),
    }
    counts = {field.name: np.zeros(n) for field in fields(TextCounts)} | counts
    frame_size = random.integers(6_000, 14_000, int(num_frames.sum())).astype(np.int32)
    first_frame = np.concatenate([[0], np.cumsum(num_frames)]).astype(np.int64)
    ends = np.cumsum(-(-frame_size // 512) * 512 + 512, dtype=np.int64)
    return ShardIndex(
        keys=np.array([f"{source.name[:8]}-{word:012x}" for word in random.integers(0, 1 << 48, n).tolist()], np.str_),
        source_names=(source.name,),
        source=np.zeros(n, np.int16),
        tag_sets=((),),
        tag_set=np.zeros(n, np.int32),
        kind=np.full(n, KINDS.index(source.kind), np.uint8),
        num_frames=num_frames,
        duration=num_frames.astype(np.float32),
        **{name: column.astype(np.int32) for name, column in counts.items()},
        content=random.integers(0, 1 << 64, n, dtype=np.uint64),
        checksum=random.integers(0, 1 << 32, n, dtype=np.uint32),
        json_offset=np.concatenate([[0], ends])[first_frame[1:]],
        json_size=random.integers(300, 3_000, n).astype(np.int32),
        from_video=np.zeros(n, np.bool_),
        text_offset=np.zeros(n, np.int64),
        text_size=np.zeros(n, np.int32),
        first_frame=first_frame,
        frame_offset=ends - frame_size,
        frame_size=frame_size,
        tokenizer_hash=counted_with,
        tar_fingerprint=tar_fingerprint,
    )
