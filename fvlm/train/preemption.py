"""SIGTERM and SIGUSR1 to a rank: steps are finished, an evaluation is not; all ranks save and exit with 75 together."""

from __future__ import annotations

import signal
from types import FrameType

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the same command goes on."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(Exception):
    """The ranks agreed to stop; a checkpoint is written."""


class Interrupted(Exception):
    """The ranks agreed to stop in the midst of an evaluation."""


class Notice:
    """Whether this rank was told to stop; handles the signals inside a `with` block. Ctrl-C still ends at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the signal."""

    def __enter__(self) -> Notice:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
