"""Ends a run whose ranks stand still, saying which rank and where, instead of waiting for ever in a collective.

The training thread says where it is (`beat`). A thread of each rank publishes that in a store of its own connection
beside the collectives, reads what the other ranks published, and ends its process where the run stands still: no rank
came further within the limit of the one that is furthest behind, for which the others wait; or that one publishes
nothing any more (dead, stopped, or its machine gone), and a rank is beyond its own. The launcher then ends the others.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass

import torch.distributed as dist

LIMITS = {"step": 60.0, "data": 900.0, "start": 1800.0, "checkpoint": 1800.0, "evaluation": 3600.0}
"""Seconds without a beat by phase. `start` covers everything up to the end of the first step: compilation,
autotuning, the engine's own preparations. `data`: a remote shard has five attempts of up to 60 s of silence each, and a
whole video 60 s, which cost samples and not the run."""
EXIT_CODE = 1


@dataclass(frozen=True, slots=True)
class Beat:
    """Where a rank's training thread was when it was last heard of."""

    count: int
    """Beats so far: the ranks go through the same ones, so a smaller count is a rank that is behind."""
    phase: str
    step: int
    silence: float
    """Seconds since, when this was published."""
    published: int
    """Times this rank has published; stands still when its process does."""


class Heartbeat:
    """Watches the ranks of a run from `start` to `stop`; with one rank it watches this process alone.

    Args:
        rank, size: this rank among all.
        limits: seconds without a beat by phase, see `LIMITS`.
        address: host and port of the ranks' store (MASTER_ADDR, MASTER_PORT).
    """

    def __init__(self, rank: int, size: int, limits: dict[str, float] = LIMITS, address: tuple[str, int] | None = None):
        self._rank, self._size, self._limits = rank, size, dict(limits)
        self._address = address or (os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", 0)))
        self._count, self._phase, self._step, self._at = 0, "start", 0, time.monotonic()
        self._published = 0
        self._heard: dict[int, tuple[Beat, float]] = {
            rank: (Beat(0, "start", 0, 0.0, 0), self._at) for rank in range(size)
        }  # rank -> its newest beat, and when it was new
        self._answered, self._error = time.monotonic(), ""  # of the store
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="heartbeat", daemon=True)]
        if size > 1:  # a thread of its own: a store whose process is stopped never answers
            self._threads.append(threading.Thread(target=self._talk, name="heartbeat store", daemon=True))
        self._period = min(min(limits.values()) / 6, 5.0)

    def __enter__(self) -> Heartbeat:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=2 * self._period)

    def beat(self, phase: str, step: int) -> None:
        """The training thread is at `phase` (of `LIMITS`) of `step`."""
        self._count, self._phase, self._step, self._at = self._count + 1, phase, step, time.monotonic()

    def moving(self) -> None:
        """The training thread came further within its phase; not counted, for ranks may differ in how often."""
        self._at = time.monotonic()

    def _watch(self) -> None:
        while not self._stopped.wait(self._period):
            now = time.monotonic()
            self._published += 1
            mine = Beat(self._count, self._phase, self._step, now - self._at, self._published)
            self._heard[self._rank] = (mine, now)
            if reason := self._overdue(now):
                self._end(reason)

    def _talk(self) -> None:
        try:
            store = dist.TCPStore(*self._address, is_master=False, wait_for_workers=False)
            while not self._stopped.wait(self._period):
                self._exchange(store)
                self._answered = time.monotonic()
        except RuntimeError as error:  # the connection broke: `_watch` waits whether that is the run's end
            self._error = f": {str(error).splitlines()[0]}"

    def _exchange(self, store: dist.Store) -> None:
        """Publish this rank's beat, read the others'."""
        store.set(_key(self._rank), json.dumps(asdict(self._heard[self._rank][0])))
        for rank in range(self._size):
            if rank != self._rank and store.check([_key(rank)]):
                theirs = Beat(**json.loads(store.get(_key(rank))))
                if self._heard[rank][0] != theirs:
                    self._heard[rank] = (theirs, time.monotonic())

    def _overdue(self, now: float) -> str | None:
        """What is wrong with the rank that is furthest behind, if the run stands still because of it."""
        if self._size > 1 and now - self._answered > self._limits["step"]:
            silence = now - self._answered
            return f"rank 0, which holds the ranks' store, did not answer for {silence:.0f} s{self._error}"
        silence = {rank: max(beat.silence, now - heard) for rank, (beat, heard) in self._heard.items()}

        def place(rank: int) -> tuple[int, bool]:  # who waits for others in a collective is further on than they are
            beat, heard = self._heard[rank]
            return beat.count, now - heard <= 3 * self._period

        rank = min(self._heard, key=place)
        limits = {other: self._limits[beat.phase] for other, (beat, _) in self._heard.items()}
        beat, limit = self._heard[rank][0], limits[rank]
        if place(rank)[1]:  # it is there: the others wait for it as long as it may take
            overdue = min(silence.values()) > limit
        else:
            overdue = any(silence[other] > limits[other] for other in silence)
        if not overdue:
            return None
        what = "came no further" if place(rank)[1] else "was not heard of"
        same = [str(other) for other in self._heard if other != rank and place(other) == place(rank)]
        also = f" (nor did rank {', '.join(same)})" if same else ""
        where = f"in phase {beat.phase!r} of step {beat.step}"
        return f"rank {rank} {what} for {silence[rank]:.0f} s {where}{also}; the limit there is {limit:.0f} s"

    def _end(self, reason: str) -> None:
        if self._stopped.is_set():
            return
        print(f"train: rank {self._rank}: {reason}. Ending; where this rank is:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        if self._size > 1:  # the others learn the same a few periods later, if their collectives do not break before
            time.sleep(4 * self._period)
        os._exit(EXIT_CODE)  # the training thread hangs, so nothing else can end it


def _key(rank: int) -> str:
    return f"fvlm/heartbeat/{rank}"
