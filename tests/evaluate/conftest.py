"""A small random model and samples in memory, as the shards would give them."""

from __future__ import annotations

import socket
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fvlm.data.chat import load_tokenizer
from fvlm.evaluate.items import Item, Presentation
from fvlm.model import build_model, tiny_config
from tests.evaluate.reference import SHAPES


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="session")
def model(tokenizer):
    """Random weights, in float64 so that differences are errors and not rounding."""
    torch.manual_seed(0)
    return build_model(tiny_config(len(tokenizer), visual_scale=1.0)).double().eval()


@pytest.fixture(scope="session")
def presentation() -> Presentation:
    return Presentation(image_size=56, looks=3)


@pytest.fixture(scope="session")
def make_item() -> Callable[..., Item]:
    """make_item(seed, kind, frames, **meta): random frames around the given metadata."""

    def make(seed: int, kind: str = "video", frames: int = 4, **meta) -> Item:
        pixels = np.random.default_rng(seed).integers(0, 256, (frames, 3, 56, 56), dtype=np.uint8)
        meta = {
            "key": f"item-{seed}",
            "source": "test/a",
            "kind": kind,
            "frame_count": frames,
            "duration": frames,
            **meta,
        }
        return Item(meta=meta, num_frames=frames, read_frames=pixels.copy)

    return make


@pytest.fixture(scope="session")
def questions(make_item) -> list[Item]:
    """Multiple choice on videos, a still, several images and text alone; options of different lengths."""
    user = "Which shape is it?"
    return [
        make_item(1, user=user, options=list(SHAPES), assistant="ring", answer=4),
        make_item(2, frames=2, user=user, options=["a large red circle", "bar"], assistant="bar", answer=1),
        make_item(3, "image", 1, user=user, options=list(SHAPES[:4]), assistant="square", answer=0),
        make_item(4, "images", 3, user=user, options=["moon", "ring", "moon ring"], assistant="ring", answer=1),
        make_item(5, "text", 0, user="What is two plus two?", options=["four", "five"], assistant="four", answer=0),
        make_item(6, frames=6, user=user, options=list(SHAPES), assistant="moon", answer=7, source="test/b"),
    ]


@pytest.fixture(scope="session")
def listings(make_item) -> list[Item]:
    """Lists of words, one after each frame but the first."""
    rng = np.random.default_rng(7)
    items = []
    for seed in range(10, 15):
        words = rng.choice(SHAPES, 4).tolist()
        narration = ["", *(f" {word}" for word in words)]
        items.append(make_item(seed, frames=5, user="Which shapes?", assistant=" ".join(words), narration=narration))
    return items


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
