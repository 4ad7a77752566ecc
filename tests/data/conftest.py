"""Fixtures of the tests of remote shards."""

from __future__ import annotations

import numpy as np
import pytest
from shard_server import PER_SHARD, SAMPLES, SIZE, ShardServer

from fvlm.data.chat import load_tokenizer
from fvlm.data.shard import ShardWriter
from fvlm.data.video import encode_jpeg


@pytest.fixture
def folder(tmp_path):
    """Shards of `SAMPLES` videos of one to three frames."""
    random = np.random.default_rng(0)
    with ShardWriter(tmp_path / "shards", load_tokenizer("tiny"), PER_SHARD) as writer:
        for number in range(SAMPLES):
            meta = {"key": f"s{number:03d}", "source": f"src{number % 2}", "kind": "video"}
            meta |= {"frame_count": 1 + number % 3, "user": "Which?", "assistant": f"number {number}"}
            noise = random.integers(0, 256, (meta["frame_count"], SIZE, SIZE, 3), np.uint8)
            writer.write(meta, [encode_jpeg(frame) for frame in noise])
    return tmp_path / "shards"


@pytest.fixture
def server(folder):
    """A web server of these shards."""
    with ShardServer(folder) as running:
        yield running
        running.shutdown()
