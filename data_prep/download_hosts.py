"""Politeness to hosts: few connections to each, and none to one that asks for silence or cannot be reached."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime

_STRIKES = 20  # attempts in a row without a connection, and a host is given up for this run


class DownloadError(Exception):
    """A file that could not be had. `reason` is a short snake_case word; `final`: asking again would not help."""

    def __init__(self, reason: str, detail: str, final: bool = False):
        super().__init__(reason, detail)
        self.reason, self.detail, self.final = reason, detail, final


class Hosts:
    """Turns to ask a host: at most `per_host` at once to each and `total` to all.

    A host that asks for more than `patience` seconds of silence, or cannot be reached, is given up.
    """

    def __init__(self, total: int, per_host: int, patience: float):
        self._total = asyncio.Semaphore(total)
        self._per_host, self._patience = per_host, patience
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._quiet_until: dict[str, float] = {}
        self._strikes: Counter[str] = Counter()
        self._given_up: dict[str, str] = {}

    @asynccontextmanager
    async def turn(self, host: str) -> AsyncIterator[None]:
        """Wait until the host may be asked, and hold the turn. Raises DownloadError `host_given_up`."""
        slot = self._slots.setdefault(host, asyncio.Semaphore(self._per_host))
        async with slot:  # the host's first: who waits for a slow one keeps nobody from another
            while (wait := self._quiet_until.get(host, 0.0) - time.monotonic()) > 0 and host not in self._given_up:
                await asyncio.sleep(wait)
            async with self._total:
                if host in self._given_up:
                    raise DownloadError("host_given_up", f"{host}: {self._given_up[host]}; run again later")
                yield

    def quiet(self, host: str, seconds: float) -> None:
        """Ask the host nothing for so long, as it told one of us."""
        self._quiet_until[host] = max(self._quiet_until.get(host, 0.0), time.monotonic() + seconds)
        if seconds > self._patience:
            self._given_up[host] = f"it asks to be left alone for {seconds:.0f} s"

    def answered(self, host: str) -> None:
        """The host is there."""
        self._strikes[host] = 0

    def unreachable(self, host: str, why: str) -> None:
        """Nobody answered."""
        self._strikes[host] += 1
        if self._strikes[host] >= _STRIKES:
            self._given_up[host] = f"no connection {_STRIKES} times in a row: {why}"


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date; None if it says nothing that can be read."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass  # then it is a date
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
