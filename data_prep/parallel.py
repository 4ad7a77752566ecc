"""Units of work in processes that may die: a decoder that crashes or hangs costs one file, not the run."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait

from data_prep.unit import Job, Unit, write_unit

SECONDS_PER_FILE = 600.0
"""A file that takes longer to read is given up."""


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

    A process that dies, or takes too long over one file, is replaced and its unit repeated without that file; the
    reason is then `decoder_crashed` or `decoder_timeout`. Raises RuntimeError for any other failure of a process.
    """
    team = [_Worker(job, work) for _ in range(workers)]
    try:
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
                elif worker.file and time.monotonic() - worker.since > seconds_per_file:
                    worker.replace("decoder_timeout")
    finally:
        for worker in team:
            worker.stop()


class _Worker:
    """A process, the unit it works on, and the file it is reading."""

    def __init__(self, job: Job, work: Callable):
        self.job, self.work = job, work
        self.unit: Unit | None = None
        self.file: str | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data_prep.unit"])  # seconds of imports, once and not a process
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, self.job, self.work), daemon=True)
        self.process.start()
        other.close()  # so that the death of the process shows as the end of its messages

    def give(self, unit: Unit | None) -> bool:
        """Set the process to work; False if there is nothing to do."""
        self.unit, self.lost, self.done = unit, {}, 0
        if unit is not None:
            self._send()
        return unit is not None

    def _send(self) -> None:
        self.file, self.since = None, time.monotonic()
        try:
            self.connection.send((self.unit, self.lost))
        except OSError:  # it died before it was asked; `hear` finds out
            return

    def hear(self, progress: Callable[[int], None]) -> dict | None:
        """Take one message in; the record if the unit is complete."""
        try:
            kind, *content = self.connection.recv()
        except (EOFError, OSError):
            self.replace("decoder_crashed")
            return None
        if kind == "failed":
            raise RuntimeError(f"preparing shard {self.unit.number} failed:\n{content[0]}")
        done, self.file = content if kind == "reading" else (len(self.unit.rows), None)
        self.since = time.monotonic()
        if done > self.done:
            progress(done - self.done)
            self.done = done
        return content[0] if kind == "complete" else None

    def replace(self, reason: str) -> None:
        """Another process for the same unit, which leaves out the file that this one was reading."""
        if self.file is None:
            self.process.join(10)
            raise RuntimeError(
                f"the process that prepared shard {self.unit.number} ended by itself (exit code "
                f"{self.process.exitcode}) while it read no file; if memory ran out, try fewer --workers"
            )
        self.stop()
        self.lost[self.file] = reason
        self._start()
        self._send()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, job: Job, work: Callable) -> None:
    try:
        while True:
            unit, lost = connection.recv()
            connection.send(("complete", work(job, unit, lost, lambda *at: connection.send(("reading", *at)))))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):  # the parent is gone or going
        return
    except Exception:
        connection.send(("failed", traceback.format_exc()))
