"""What is printed on which rank."""

from __future__ import annotations

import logging

import torch

from fvlm.data import loader
from fvlm.evaluate import scoring, writing
from fvlm.train.engine import World
from fvlm.train.logs import start_logging


def test_every_rank_names_the_samples_that_it_lost(monkeypatch):
    levels, loggers = [], [loader.logger, scoring.logger, writing.logger]
    monkeypatch.setattr(logging, "basicConfig", lambda level, **_: levels.append(level))
    try:
        start_logging(World(rank=1, size=2, local_rank=1, device=torch.device("cpu")))
        assert levels == [logging.ERROR]
        assert [logger.level for logger in loggers] == [logging.WARNING] * 3
    finally:
        for logger in loggers:
            logger.setLevel(logging.NOTSET)
