"""Sample tables and mixtures drawn for the tests of plan, batch and loader."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from fvlm.data.chat import TextCounts
from fvlm.data.shard import KINDS
from fvlm.data.table import SampleTable

COUNT_NAMES = tuple(field.name for field in fields(TextCounts))

# source: (share, kind, frames from..to, mean and deviation of the logarithm of the text's length)
STAGE_2 = {
    "cauldron": (0.46, "image", (1, 1), 4.6, 1.0),
    "cauldron_multi": (0.04, "images", (2, 6), 4.9, 0.8),
    "openvid": (0.10, "video", (3, 16), 4.9, 0.5),
    "webvid": (0.03, "video", (5, 40), 3.6, 0.4),
    "vista": (0.09, "video", (20, 64), 5.0, 0.8),
    "vript": (0.11, "video", (4, 30), 5.6, 0.4),
    "sharegpt4video": (0.02, "video", (5, 40), 5.8, 0.4),
    "llava_video": (0.01, "video", (10, 64), 5.2, 0.7),
    "smoltalk": (0.14, "text", (0, 0), 6.3, 0.9),
}


def draw_table(num_samples: int, sources=None, seed: int = 0, shard_size: int = 100) -> SampleTable:
    """A table with the given sources' distribution; every other video has a narration; shards hold one source."""
    sources = sources or STAGE_2
    names = tuple(sorted(sources))
    random = np.random.default_rng(seed)
    shares = np.array([sources[name][0] for name in names])
    source = np.sort(random.choice(len(names), num_samples, p=shares / shares.sum())).astype(np.int16)
    kind = np.array([KINDS.index(sources[name][1]) for name in names], np.uint8)[source]
    low, high = (np.array([sources[name][2][i] for name in names])[source] for i in range(2))
    mean, deviation = (np.array([sources[name][i] for name in names])[source] for i in (3, 4))
    num_frames = random.integers(low, high + 1).astype(np.int32)
    answer = np.clip(np.exp(random.normal(mean, deviation)), 4, 8000).astype(np.int32)
    head = 20 + random.integers(3, 40, num_samples).astype(np.int32)
    is_narrated = (kind == KINDS.index("video")) & (random.random(num_samples) < 0.5)
    said = random.integers(1, 9, num_samples).astype(np.int32)
    position = np.arange(num_samples, dtype=np.int32)
    return SampleTable(
        source_names=names,
        shard=position // shard_size,
        row=position % shard_size,
        source=source,
        kind=kind,
        num_frames=num_frames,
        tokens=answer + head + 8,
        head=head,
        answer=answer,
        narrated_tokens=np.where(is_narrated, head + 8 + said * num_frames, 0).astype(np.int32),
        narrated_answer=np.where(is_narrated, said * num_frames + 1, 0).astype(np.int32),
        narrated_tail=np.where(is_narrated, said + 2, 0).astype(np.int32),
        rejected_tokens=np.zeros(num_samples, np.int32),
        rejected_answer=np.zeros(num_samples, np.int32),
    )
