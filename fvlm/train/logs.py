"""What the ranks of a run print: rank 0 everything, the others what only they know."""

from __future__ import annotations

import logging

from fvlm.train.engine import World

LOST_SAMPLES = ("fvlm.data.loader", "fvlm.evaluate.scoring", "fvlm.evaluate.writing")
"""Loggers that name each lost sample, on the rank that was to read it."""


def start_logging(world: World) -> None:
    """Messages on standard error, the same one once."""
    logging.basicConfig(level=logging.INFO if world.is_main else logging.ERROR, format="%(message)s")
    if not world.is_main:
        for name in LOST_SAMPLES:
            logging.getLogger(name).setLevel(logging.WARNING)
