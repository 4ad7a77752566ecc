"""Units of work on a Ray cluster: what local processes do, on every machine that sees the same files.

A task notes in a small file beside the records what it is about to read. When its process dies, the note tells which
file to leave out; while it works, the notes tell how far it is, and whether it hangs.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)

import data_prep
import fvlm
from data_prep.parallel import SECONDS_PER_FILE, Losses
from data_prep.unit import READING, RECORDS, Job, Unit, write_unit

_DIED = (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    TaskCancelledError,
    WorkerCrashedError,
)
_LOOK_SECONDS = 1.0
_CONNECT_SECONDS = 10.0


def run_on_ray(
    job: Job,
    todo: Iterator[Unit],
    address: str,
    workers: int | None,
    progress: Callable[[int], None],
    seconds_per_file: float = SECONDS_PER_FILE,
    work: Callable = write_unit,
) -> Iterator[tuple[Unit, dict]]:
    """The units as tasks of one core each, as they are completed.

    `address`: "auto" (the cluster that this machine is part of), "local" (one on this machine for this run) or
    "host:port". `workers` units are under way at once; None: as many as there are cores, and some that wait for one.
    A task whose process or machine dies, or that takes too long over one file, is repeated as local processes do it,
    with the same outcome. Raises ConnectionError if there is no cluster, OSError as the work does (a full disk)
    and for machines that do not see the files, RuntimeError for any other failure.
    """
    _connect(address, workers)
    try:
        flight: dict[ray.ObjectRef, _Task] = {}
        looked = time.monotonic()
        while True:
            for unit in islice(todo, max(0, _room(workers) - len(flight))):
                task = _Task(job, unit, work, progress)
                flight[task.send()] = task
            if not flight:
                return
            for reference in ray.wait(list(flight), timeout=_LOOK_SECONDS)[0]:
                task = flight.pop(reference)
                record = task.result(reference)
                if record is None:
                    flight[task.send()] = task
                    continue
                _require_media(job, task.unit, record)
                yield task.unit, record
            if time.monotonic() - looked > _LOOK_SECONDS:
                for reference, task in flight.items():
                    task.look()
                    if task.is_late(seconds_per_file):
                        ray.cancel(reference, force=True)
                looked = time.monotonic()
    finally:
        ray.shutdown()  # ends the tasks of this run, and a cluster that was started for it


def _connect(address: str, workers: int | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unasked
    on_terminate = signal.getsignal(signal.SIGTERM)
    code = [str(Path(package.__file__).parent) for package in (data_prep, fvlm)]  # every node works with this code
    environment = {"py_modules": code, "env_vars": {"TOKENIZERS_PARALLELISM": "false"}}
    own = {"num_cpus": workers, "include_dashboard": False} if address == "local" else {}
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    try:
        if ":" in address:  # ray.init would knock for ever at a door where nobody is
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level="error", **own)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"--ray-address {address}: no Ray cluster there ({error}); "
            f"start one with `ray start --head`, or give --ray-address local"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # ray.init puts its own in the place


def _room(workers: int | None) -> int:
    """How many units may be under way; clusters grow and shrink."""
    return workers or int(1.25 * ray.cluster_resources().get("CPU", 0)) + 1


class _Task:
    """A unit on its way, and the file that it is reading."""

    def __init__(self, job: Job, unit: Unit, work: Callable, progress: Callable[[int], None]):
        self.unit = unit
        self._job, self._work, self._progress = job, work, progress
        self._losses, self._done = Losses(unit), 0

    def send(self) -> ray.ObjectRef:
        # a note of its own for each attempt: one on a machine that was given up may go on for a while
        descriptor, note = tempfile.mkstemp(prefix=READING, dir=self._job.out / RECORDS)
        os.close(descriptor)
        self._note = Path(note)
        self._place, self._file, self._since, self._late = b"", None, time.monotonic(), False
        return _remote.remote(self._job, self.unit, self._losses.files, note, os.getcwd(), self._work)

    def look(self) -> None:
        """Take in what the note says."""
        place = self._note.read_bytes()
        if place == self._place or not place:
            return
        row, item = map(int, place.split())
        self._place, self._since = place, time.monotonic()
        self._file = self.unit.rows[row].media[item] if item >= 0 else None
        self._count(row)

    def _count(self, done: int) -> None:
        if done > self._done:
            self._progress(done - self._done)
            self._done = done

    def is_late(self, seconds_per_file: float) -> bool:
        """Whether it takes too long over a file; told once."""
        if self._file is None or self._late or time.monotonic() - self._since <= seconds_per_file:
            return False
        self._late = True
        return True

    def result(self, reference: ray.ObjectRef) -> dict | None:
        """The record, or None if the task died and is to be sent again."""
        try:
            record = ray.get(reference)
            self._count(len(self.unit.rows))
            return record
        except _DIED as error:
            if self._late:
                self._losses.hung(self._file)
            else:
                self.look()
                self._losses.died(self._file, str(error))
            return None
        except RayError as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, OSError):
                raise error.cause from None
            raise RuntimeError(f"preparing shard {self.unit.number} failed:\n{error}") from None
        finally:
            self._note.unlink(missing_ok=True)


@ray.remote(num_cpus=1, max_retries=0)
def _remote(job: Job, unit: Unit, lost: dict[str, str], note: str, folder: str, work: Callable) -> dict:
    """On a node: the work, in the folder that the run was started in, each file noted before it is read."""
    try:
        os.chdir(folder)
        noted = os.open(note, os.O_WRONLY)
    except FileNotFoundError as error:
        told = f"machine {socket.gethostname()} does not see it; every node needs media and --out at the same paths"
        raise FileNotFoundError(errno.ENOENT, told, error.filename) from None

    def report(row: int, file: str | None) -> None:
        item = -1 if file is None else unit.rows[row].media.index(file)
        os.pwrite(noted, b"%9d %9d" % (row, item), 0)

    try:
        return work(job, unit, lost, report)
    finally:
        os.close(noted)


def _require_media(job: Job, unit: Unit, record: dict) -> None:
    """A file that only the node misses would silently be missing from the shard: the run ends instead."""
    for row in record["skipped"]:
        if row["reason"] == "missing_file" and os.path.isfile(row["file"].partition("#row=")[0]):
            unit.record(job).unlink(missing_ok=True)
            told = "a machine of the cluster does not see it; every node needs media and --out at the same paths"
            raise FileNotFoundError(errno.ENOENT, told, row["file"])
