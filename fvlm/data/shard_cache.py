"""Local copies of remote shards, in a folder of bounded size that all processes of a machine share.

The least recently used ones make room, never one that somebody has open: a tar in use is locked (`flock`) by its
readers, and so is a download by its process; locks go with their process, however it ends. A download has another name
until it is complete and checked.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fvlm.data.errors import ShardError
from fvlm.data.remote import PATIENT, Patience, RemoteShard, describe, download, read_small
from fvlm.data.shard_index import fingerprint

logger = logging.getLogger(__name__)

_FORGET_S = 300.0  # after which a shard that could not be had is asked for again
_ROOM_S = 60.0  # for others to give back what they use
_DOWNLOADS_AT_ONCE = 2  # of one process


class ShardCache:
    """Copies of remote shards in `folder`, of at most `limit` bytes."""

    def __init__(self, folder: str | Path, limit: float, patience: Patience = PATIENT):
        self.folder, self.limit, self.patience = Path(folder), int(limit), patience
        self._tars = self.folder / "shards"

    @contextmanager
    def held(self, shard: RemoteShard, tar_fingerprint: str | None = None) -> Iterator[Path]:
        """The shard's copy, downloaded if it has to be; nobody removes it in this block.

        `tar_fingerprint` is what its index was made of; None: whatever lies there. Raises ShardError with a reason of
        `fvlm.data.remote.persist`, `damaged_download`, `changed_shard`, `disk_full` or `cache_full`.
        """
        while True:
            path = self._find(shard, tar_fingerprint)
            descriptor = _locked(path) if path is not None else None
            if descriptor is not None:
                break
            self.fetch(shard, tar_fingerprint)
        try:
            yield path
        finally:
            os.close(descriptor)

    def fetch(self, shard: RemoteShard, tar_fingerprint: str | None = None, wait: bool = True) -> bool:
        """Whether there is a copy now. Without `wait`, not where another process is at it or there is no room.

        Raises ShardError as `held` does. What one process could not have, none asks for again for five minutes.
        """
        size = tar_size(tar_fingerprint) if tar_fingerprint else describe(shard.url, self.patience)[0]
        reserved = self._tars / f"{shard.stem}-{size}.reserved"
        deadline = time.monotonic() + _ROOM_S
        while True:
            if self._find(shard, tar_fingerprint) is not None:
                return True
            with self._alone():
                descriptor = os.open(reserved, os.O_RDWR | os.O_CREAT, 0o644)
                mine = _try_lock(descriptor) and _is(descriptor, reserved)
                there = self._find(shard, tar_fingerprint) is not None  # again: who held the lock may just be through
                failure = None if there else self._recent_failure(shard)
                wanted = not there and failure is None
                if mine and wanted and self._make_room(size, reserved):
                    break
                if mine:
                    reserved.unlink()
            if not mine and wanted and wait:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # until who downloads it is through
            os.close(descriptor)
            if failure is not None:
                raise failure
            if wanted and not wait:
                return False
            if wanted and mine:
                self._wait_for_room(shard, size, deadline)
        part = reserved.with_suffix(".part")
        try:
            self._download(shard, part, tar_fingerprint)
            part.rename(self._tars / f"{shard.stem}-{fingerprint(part)}.tar")
            return True
        except ShardError as error:
            with suppress(OSError):  # on a full disk the others find out by themselves
                self._failure(shard).write_text(json.dumps([error.reason, error.detail]))
            raise
        finally:
            part.unlink(missing_ok=True)
            reserved.unlink(missing_ok=True)
            os.close(descriptor)

    def forget_failures(self) -> None:
        """Ask again for shards that could not be had: a new run begins."""
        for path in self._tars.glob("*.failed"):
            path.unlink(missing_ok=True)

    def _failure(self, shard: RemoteShard) -> Path:
        return self._tars / f"{shard.stem}.failed"

    def _recent_failure(self, shard: RemoteShard) -> ShardError | None:
        path = self._failure(shard)
        try:
            recent = time.time() - path.stat().st_mtime < _FORGET_S
            reason, detail = json.loads(path.read_text()) if recent else ("", "")
        except (FileNotFoundError, ValueError):  # none, or half written
            return None
        return ShardError(reason, detail) if recent else None

    def _find(self, shard: RemoteShard, tar_fingerprint: str | None) -> Path | None:
        if tar_fingerprint is None:
            return max(self._tars.glob(f"{shard.stem}-*.tar"), key=lambda path: path.name, default=None)
        path = self._tars / f"{shard.stem}-{tar_fingerprint}.tar"
        return path if path.exists() else None

    def _download(self, shard: RemoteShard, part: Path, tar_fingerprint: str | None) -> None:
        expected = shard.sha256 or self._published_sha256(shard)

        def check(path: Path) -> None:
            size = os.path.getsize(path)
            if tar_fingerprint and size != tar_size(tar_fingerprint):
                raise ShardError("damaged_download", f"{shard}: {size} bytes, its index says {tar_fingerprint}")
            if expected and (found := _sha256(path)) != expected:
                raise ShardError("damaged_download", f"{shard}: SHA-256 {found}, expected {expected}")
            if tar_fingerprint and fingerprint(path) != tar_fingerprint:
                raise ShardError(
                    "changed_shard", f"{shard}: not the tar that its index was made of; index it anew and start again"
                )

        begin = time.monotonic()
        download(shard.url, part, self.patience, check)
        logger.debug("%s: %d bytes in %.1f s", shard, os.path.getsize(part), time.monotonic() - begin)

    def _published_sha256(self, shard: RemoteShard) -> str | None:
        """What the file beside the tar says; S3 without the right to list calls a file forbidden that is not there."""
        try:
            content = read_small(f"{shard.beside('.tar', '.tar.sha256')}", self.patience)
        except ShardError as error:
            if error.reason in ("missing_shard", "forbidden_shard"):
                return None
            raise
        words = content.decode("ascii", "replace").split()
        if not words or len(words[0]) != 64:
            raise ShardError("damaged_download", f"{shard}.sha256: {content[:80]!r}, expected 64 hex digits")
        return words[0].lower()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process or thread decides about the folder in this block, which is short."""
        self._tars.mkdir(parents=True, exist_ok=True)
        with open(self._tars / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int, own: Path) -> bool:
        """Whether `size` bytes fit beside what is there and on its way; the least recently used tars go for it."""
        used, tars = size, []
        for entry in os.scandir(self._tars):
            path = Path(entry.path)
            if path.suffix == ".reserved" and path != own:
                if _removed(path):  # its process was killed
                    path.with_suffix(".part").unlink(missing_ok=True)
                else:
                    used += int(path.stem.rpartition("-")[2])
            elif path.suffix == ".tar":
                status = entry.stat()
                used += status.st_size
                tars.append((status.st_mtime, status.st_size, path))
        for _, nbytes, path in sorted(tars):
            if used <= self.limit:
                break
            if _removed(path):
                used -= nbytes
        return used <= self.limit

    def _wait_for_room(self, shard: RemoteShard, size: int, deadline: float) -> None:
        if size > self.limit or time.monotonic() > deadline:
            raise ShardError(
                "cache_full",
                f"{shard}: {size / 1e9:.3g} GB do not fit into the {self.limit / 1e9:.3g} GB of {self._tars}, "
                f"or not beside what is in use there; raise data.cache_gb",
            )
        time.sleep(0.1)


class Prefetcher:
    """Downloads shards before they are needed, in threads of the process that says which.

    All workers are told the same shards in the same order: each takes the first that nobody has or downloads.
    """

    def __init__(self, cache: ShardCache):
        self._cache = cache
        self._wanted: deque[tuple[RemoteShard, str]] = deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def expect(self, shards: Sequence[tuple[RemoteShard, str]]) -> None:
        """What will be needed, soonest first, each with the tar's fingerprint; forgets what was said before."""
        with self._changed:
            self._wanted = deque(shards)
            self._changed.notify_all()
        while len(self._threads) < _DOWNLOADS_AT_ONCE:  # not before: threads do not survive a fork
            self._threads.append(threading.Thread(target=self._run, daemon=True))
            self._threads[-1].start()

    def close(self) -> None:
        """Begin no further download."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                shard, tar_fingerprint = self._wanted.popleft()
            try:
                self._cache.fetch(shard, tar_fingerprint, wait=False)
            except (ShardError, OSError) as error:  # who needs the shard meets it too, and reports it
                logger.debug("not fetched ahead: %s", error)


def tar_size(tar_fingerprint: str) -> int:
    """Bytes of a tar, of which its index keeps the fingerprint."""
    return int(tar_fingerprint.partition("-")[0])


def _locked(path: Path) -> int | None:
    """A descriptor that keeps the file from being removed, marked as just used; None if it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # only ever held by others for the moment of a removal
    if not _is(descriptor, path):
        os.close(descriptor)
        return None
    os.utime(descriptor)
    return descriptor


def _removed(path: Path) -> bool:
    """Whether the file is gone: removed here unless somebody holds its lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        if not _try_lock(descriptor):
            return False
        if _is(descriptor, path):
            path.unlink()
        return True
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
