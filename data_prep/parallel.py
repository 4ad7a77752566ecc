"""Units of work in processes that may die: a decoder that crashes or hangs costs one file, not the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from data_prep.unit import Job, Unit, write_unit

SECONDS_PER_FILE = 600.0
"""A file that takes longer to read is given up."""
_DEATHS = 2  # over one file before it is held responsible: once may be a lack of memory, a lost machine, or a person
_DEATHS_ELSEWHERE = 3  # that no file explains


class Losses:
    """The files of a unit to leave out, with the reason: those over which processes hung, or died twice."""

    def __init__(self, unit: Unit):
        self.files: dict[str, str] = {}
        self._unit, self._deaths = unit, Counter()

    def hung(self, file: str) -> None:
        self.files[file] = "decoder_timeout"

    def died(self, file: str | None, how: str) -> None:
        """A process died while it read `file` (None: between files). Raises RuntimeError where that goes on."""
        self._deaths[file] += 1
        if file is not None and self._deaths[file] == _DEATHS:
            self.files[file] = "decoder_crashed"
        elif file is None and self._deaths[file] == _DEATHS_ELSEWHERE:
            raise RuntimeError(
                f"shard {self._unit.number}: the process that prepared it died {_DEATHS_ELSEWHERE} times while it "
                f"read no file ({how}); if memory ran out, try fewer --workers or --samples-per-shard"
            )


def run_here(job: Job, todo: Iterator[Unit], progress: Callable[[int], None]) -> Iterator[tuple[Unit, dict]]:
    """The units one after another in this process, without protection from crashing decoders."""
    for unit in todo:
        yield unit, write_unit(job, unit, {}, lambda done, file: None)
        progress(len(unit.rows))


def run_in_processes(
    job: Job,
    todo: Iterator[Unit],
    workers: int,
    progress: Callable[[int], None],
    seconds_per_file: float = SECONDS_PER_FILE,
    work: Callable = write_unit,
) -> Iterator[tuple[Unit, dict]]:
    """The units in `workers` processes, as they are completed.

    A process that dies, or takes too long over one file, is replaced and its unit repeated: at once without a file that
    took too long (`decoder_timeout`), at the second death over the same file without that (`decoder_crashed`). Raises
    OSError as the work does (a full disk), RuntimeError for any other failure.
    """
    team = []
    try:
        team += (_Worker(job, work) for _ in range(workers))
        busy = [worker for worker in team if worker.give(next(todo, None))]
        while busy:
            ready = wait([worker.connection for worker in busy], timeout=1.0)
            for worker in list(busy):
                if worker.connection in ready:
                    record = worker.hear(progress)
                    if record is None:
                        continue
                    yield worker.unit, record
                    if not worker.give(next(todo, None)):
                        busy.remove(worker)
                elif worker.is_late(seconds_per_file):
                    worker.give_up_file()
    finally:
        for worker in team:
            worker.stop()


class _Worker:
    """A process, the unit it works on, and the file it is reading."""

    def __init__(self, job: Job, work: Callable):
        self._job, self._work = job, work
        self.unit: Unit | None = None
        self._file: str | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data_prep.unit"])  # seconds of imports, once and not a process
        self.connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._job, self._work), daemon=True)
        self._process.start()
        other.close()  # so that the death of the process shows as the end of its messages

    def give(self, unit: Unit | None) -> bool:
        """Set the process to work; False if there is nothing to do."""
        self.unit, self._done = unit, 0
        if unit is not None:
            self._losses = Losses(unit)
            self._send()
        return unit is not None

    def _send(self) -> None:
        self._file, self._since = None, time.monotonic()
        with suppress(OSError):  # it died before it was asked; `hear` finds out
            self.connection.send((self.unit, self._losses.files))

    def hear(self, progress: Callable[[int], None]) -> dict | None:
        """Take one message in; the record if the unit is complete."""
        try:
            kind, *content = self.connection.recv()
        except (EOFError, OSError):
            self._process.join(10)  # for its exit code
            self._losses.died(self._file, f"exit code {self._process.exitcode}")
            self._again()
            return None
        if kind == "refused":
            raise content[0]
        if kind == "failed":
            raise RuntimeError(f"preparing shard {self.unit.number} failed:\n{content[0]}")
        done, self._file = content if kind == "reading" else (len(self.unit.rows), None)
        self._since = time.monotonic()
        if done > self._done:
            progress(done - self._done)
            self._done = done
        return content[0] if kind == "complete" else None

    def is_late(self, seconds_per_file: float) -> bool:
        """Whether it takes too long over a file; news that wait to be heard (`todo` may take its time) say no."""
        over = self._file is not None and time.monotonic() - self._since > seconds_per_file
        return over and not self.connection.poll()

    def give_up_file(self) -> None:
        """Repeat the unit without the file that is being read."""
        self._losses.hung(self._file)
        self._again()

    def _again(self) -> None:
        self.stop()
        self._start()
        self._send()

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, job: Job, work: Callable) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to act on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            unit, lost = connection.recv()
            connection.send(_outcome(connection, job, unit, lost, work))


def _outcome(connection: Connection, job: Job, unit: Unit, lost: dict[str, str], work: Callable) -> tuple:
    try:
        return "complete", work(job, unit, lost, lambda *at: connection.send(("reading", *at)))
    except OSError as error:
        return "refused", error
    except Exception:
        return "failed", traceback.format_exc()


def _end_with_parent() -> None:
    """A run that is killed takes its processes along, be they in the middle of a file."""
    multiprocessing.parent_process().join()
    os._exit(1)
