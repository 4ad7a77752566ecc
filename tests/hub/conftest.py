"""A tiny model, its exported folder, and media to show it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fvlm.data.chat import load_tokenizer
from fvlm.hub.export import write_folder
from fvlm.hub.opening import processor_for
from fvlm.model import FoveatedVLM, build_model, tiny_config
from tests.data.drawn_videos import at_rate, draw


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="session")
def model(tokenizer) -> FoveatedVLM:
    torch.manual_seed(0)
    return build_model(tiny_config(len(tokenizer), visual_scale=1.0)).eval()


@pytest.fixture(scope="session")
def processor(model):
    return processor_for(model.config, "tiny", looks=3)


@pytest.fixture(scope="session")
def exported(model, processor, tmp_path_factory) -> Path:
    """The model as a Hugging Face folder."""
    return write_folder(tmp_path_factory.mktemp("hub") / "tiny-model", model, processor, "# A card\n")


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """Four seconds, 96 x 64 pixels."""
    return draw(tmp_path_factory.mktemp("media") / "clip.mp4", at_rate(40, rate=10))


@pytest.fixture(scope="session")
def picture(tmp_path_factory) -> Path:
    """A still that is taller than wide."""
    path = tmp_path_factory.mktemp("media") / "still.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 80, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def run(model, tmp_path) -> Path:
    """A run's folder with one checkpoint, as training leaves it, and no records yet."""
    folder = tmp_path / "runs" / "drawn"
    checkpoint = folder / "checkpoints" / "step-00000100"
    model.save_pretrained(checkpoint / "weights")
    config = {
        "name": "drawn",
        "model": {"preset": "tiny"},
        "data": {"train": ["shards/train"], "mixture": {"looks": 5}},
        "train": {
            "total_samples": 3200,
            "packs_per_step": 2,
            "fine_iterations": [2, 1],
            "learning_rate": {group: {"base": 0.001} for group in ("connector", "dino", "llm")},
        },
    }
    for place in (checkpoint, folder):
        (place / "config.yaml").write_text(yaml.safe_dump(config))
    for pointer in ("best", "latest"):
        (folder / "checkpoints" / pointer).write_text("step-00000100\n")
    return folder
