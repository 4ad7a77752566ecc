"""The output folder of a preparation: whose it is, what it is made from, and what to say when it is full."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.unit import READING, RECORDS, Job, write_json
from fvlm.data.chat import load_tokenizer, tokenizer_hash

_REQUEST = "request.json"
_LEFTOVERS = (".shard-*.tmp", ".summary.json.*.tmp", f"{RECORDS}/.*.tmp", f"{RECORDS}/{READING}*")


class PrepareError(Exception):
    """The request cannot be carried out; the message says what to change."""


@contextmanager
def held(job: Job, source) -> Iterator[None]:
    """The output folder for this run alone, without what a run that was killed left half written.

    The lock goes with the process, however it ends. Raises PrepareError if another run has it, or if the folder holds
    something else than this request.
    """
    if not (job.out / RECORDS / _REQUEST).exists() and any(job.out.glob("*.tar")):
        raise PrepareError(f"{job.out} holds tar files that this command did not write; give another --out")
    (job.out / RECORDS).mkdir(parents=True, exist_ok=True)
    with open(job.out / RECORDS / "lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise PrepareError(
                f"{job.out}: another run is at work there ({lock.read()}); wait until it ends, or give another --out"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        _claim(job, source)
        _remove_leftovers(job.out)
        try:
            yield
        finally:
            _remove_leftovers(job.out)
            lock.truncate(0)


def _claim(job: Job, source) -> None:
    """Note in the output folder what it is made from, or check that it is the same as before."""
    request = {
        "rows": source.digest(),
        "tokenizer": tokenizer_hash(load_tokenizer(job.tokenizer)),
        "size": job.size,
        "max_frames": job.max_frames,
        "samples_per_shard": job.samples_per_shard,
    }
    note = job.out / RECORDS / _REQUEST
    if not note.exists():
        write_json(note, request)
        return
    before = json.loads(note.read_text())
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in request.items() if before.get(name) != value]
    if changed:
        raise PrepareError(
            f"{job.out} holds shards of another request ({', '.join(changed)}): "
            f"give another --out, or remove the folder to prepare anew"
        )


def _remove_leftovers(out: Path) -> None:
    for pattern in _LEFTOVERS:
        for leftover in out.glob(pattern):
            leftover.unlink(missing_ok=True)


def explain(error: OSError, out: Path) -> str:
    """The message of an error, with what to do where a disk is full."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return str(error)
    folder = Path(error.filename or out).absolute()
    while not folder.is_dir():  # it may be the folder that could not be made
        folder = folder.parent
    return (
        f"the disk is full: {error}; {shutil.disk_usage(folder).free / 2**20:.1f} MiB are free in {folder}. "
        f"Make room and run the same command again: finished shards are kept, it goes on after them"
    )
