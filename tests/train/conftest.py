"""Fixtures of the training tests."""

from __future__ import annotations

import pytest
from shards import write_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder with `train` (150 samples) and `val` (24, none of them in `train`)."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder / "train", 150, seed=0)
    write_shards(folder / "val", 24, seed=2)
    return folder
