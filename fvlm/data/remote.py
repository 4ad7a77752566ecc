"""Shards that lie elsewhere: finding them by URL, and downloading a file whole and checked, or not at all.

Any protocol of fsspec serves; credentials and endpoints come from where its packages look for them (environment,
`~/.aws`, `~/.config/fsspec`), never from a run's configuration. What is downloaded is kept by `fvlm.data.shard_cache`.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from random import SystemRandom
from typing import Any
from urllib.parse import urljoin, urlsplit, urlunsplit

import fsspec

from fvlm.data.errors import ShardError
from fvlm.data.shard import find_shards

logger = logging.getLogger(__name__)

LISTS = (".txt", ".jsonl")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
_PACKAGES |= dict.fromkeys(("http", "https"), "aiohttp")
_REFUSED = (401, 403, 404, 410)  # HTTP states that waiting does not change
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_VALIDATORS = ("ETag", "etag", "md5Hash", "blob_id", "Last-Modified", "LastModified", "mtime", "created")
_random = SystemRandom()  # not the run's


@dataclass(frozen=True, slots=True)
class RemoteShard:
    """A tar elsewhere; its index is expected beside it, with `.idx` for `.tar`."""

    url: str
    sha256: str | None = None
    """What the tar's bytes have to give; None: what `<url>.sha256` says, if there is one."""

    def __str__(self) -> str:
        return self.url

    @property
    def stem(self) -> str:
        """A file name for this URL and no other."""
        name = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(urlsplit(self.url).path).stem)
        return f"{name[:60]}-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}"

    @property
    def folder(self) -> str:
        """Name of the folder that it lies in."""
        return PurePosixPath(urlsplit(self.url).path).parent.name

    def beside(self, old: str, new: str) -> str:
        """The URL with the ending `old` of its path replaced."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(path=parts.path.removesuffix(old) + new))


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a download is given."""

    attempts: int = 5
    pause_s: float = 1.0
    """Before the second attempt; doubled for every further one, and up to as much again by chance."""
    silence_s: float = 60.0
    """Without an answer or a byte, until an attempt is given up."""
    slowest: float = 50e3
    """Bytes a second that an attempt has to reach on average, once `silence_s` are over."""


PATIENT = Patience()


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL of another machine (or of fsspec's `memory://`)."""
    return "://" in str(path) and not str(path).startswith(("file://", "local://"))


def find_all(entries: str | Path | Iterable[str | Path]) -> list[Path | RemoteShard]:
    """The shards of folders, patterns, tars and lists, here or elsewhere, in order of their names, each once.

    A list (`.txt`, or `.jsonl` with `shard` and, if known, `sha256`) names tars, absolutely or relative to itself.
    Raises FileNotFoundError where an entry leads to none, ValueError for a list that is none, ShardError `unlisted`
    for a protocol whose package is missing, or a folder that cannot be listed.
    """
    found: dict[str, Path | RemoteShard] = {}
    for entry in [entries] if isinstance(entries, (str, Path)) else entries:
        entry = str(entry).removeprefix("file://").removeprefix("local://")
        path = urlsplit(entry).path if is_remote(entry) else entry
        if path.endswith(LISTS):
            shards = _listed(entry)
        elif is_remote(entry):
            shards = _find_remote(entry)
        else:
            shards = find_shards(entry)
        found.update((str(shard), shard) for shard in shards)
    return [found[name] for name in sorted(found)]


def _find_remote(entry: str) -> list[RemoteShard]:
    path = urlsplit(entry).path
    magic = glob.has_magic(entry.partition("?")[0])
    if path.endswith(".tar") and not magic:
        return [RemoteShard(entry)]
    pattern = entry if magic else f"{entry.rstrip('/')}/*.tar"
    system, inside = connect(pattern)
    try:
        names = [system.unstrip_protocol(name) for name in system.glob(inside) if str(name).endswith(".tar")]
    except Exception as error:  # every protocol has its own
        raise ShardError("unlisted", f"{entry}: {type(error).__name__}: {error}") from error
    if not names:
        raise FileNotFoundError(
            f"no shard in {entry!r}: expected a folder or pattern of .tar files, or a .tar file; where the server does "
            f"not list folders, name the shards in a list (.txt, one URL a line)"
        )
    return [RemoteShard(name) for name in names]


def _listed(entry: str) -> list[Path | RemoteShard]:
    """What a list names; its lines are checked, whether the shards are there is not."""
    content = read_small(entry) if is_remote(entry) else Path(entry).expanduser().read_bytes()
    shards: list[Path | RemoteShard] = []
    for number, line in enumerate(content.decode().splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{entry}, line {number}"
        name, sha256 = _json_entry(line, where) if urlsplit(entry).path.endswith(".jsonl") else (line.strip(), None)
        if not urlsplit(name).path.endswith(".tar"):
            raise ValueError(f"{where}: {name!r}: expected the path or URL of a .tar file")
        if is_remote(name):
            shards.append(RemoteShard(name, sha256))
        elif is_remote(entry):
            if "://" in name or name.startswith("/"):
                raise ValueError(f"{where}: {name!r}: a list from elsewhere names no files of this machine")
            shards.append(RemoteShard(_relative(entry, name), sha256))
        else:
            shards += find_shards(Path(entry).expanduser().parent / name.removeprefix("file://"))
    if not shards:
        raise FileNotFoundError(f"no shard in {entry!r}: the list is empty")
    return shards


def _relative(entry: str, name: str) -> str:
    scheme, _, rest = entry.partition("://")
    return scheme + "://" + urljoin(f"http://{rest}", name).removeprefix("http://")  # urljoin knows few protocols


def _json_entry(line: str, where: str) -> tuple[str, str | None]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    known = isinstance(fields, dict) and set(fields) <= {"shard", "sha256"} and isinstance(fields.get("shard"), str)
    sha256 = fields.get("sha256") if known else None
    if not known or not (sha256 is None or re.fullmatch("[0-9a-f]{64}", str(sha256))):
        raise ValueError(f'{where}: {line[:200]}: expected {{"shard": URL, "sha256": 64 hex digits}}, sha256 if known')
    return fields["shard"], sha256


def connect(url: str, patience: Patience = PATIENT) -> tuple[fsspec.AbstractFileSystem, str]:
    """fsspec's file system of a URL, and the path in it. Raises ShardError `unlisted` for what fsspec lacks."""
    protocol, silence = url.partition("://")[0], patience.silence_s
    options: dict[str, Any] = {}
    try:
        if protocol in ("http", "https"):
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=silence, sock_read=silence)
            options["client_kwargs"] = {"timeout": timeout}
        elif protocol in ("s3", "s3a"):
            options["config_kwargs"] = {"connect_timeout": silence, "read_timeout": silence}
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = _PACKAGES.get(protocol, "another package")
        raise ShardError("unlisted", f"{url}: {protocol}:// needs {package}: pip install {package}") from error
    except ValueError as error:
        raise ShardError("unlisted", f"{url}: {error}") from error


def read_small(url: str, patience: Patience = PATIENT) -> bytes:
    """A small file's bytes. Raises ShardError as `persist` does."""

    def read() -> bytes:
        system, path = connect(url, patience)
        return system.cat_file(path)

    return persist(read, url, patience)


def describe(url: str, patience: Patience) -> tuple[int, str]:
    """A file's size in bytes (0 if unknown) and its version: 12 hex digits that change when the file does.

    The version is empty where the server says nothing but the size. Raises ShardError as `persist` does.
    """

    def ask() -> dict:
        system, path = connect(url, patience)
        system.invalidate_cache()
        return system.info(path)

    info = persist(ask, url, patience)
    size, known = info.get("size") or 0, [str(info[name]) for name in _VALIDATORS if info.get(name)]
    return size, hashlib.sha256(repr((size, known)).encode()).hexdigest()[:12] if known else ""


def download(url: str, target: Path, patience: Patience, check: Callable[[Path], None]) -> None:
    """The file at `url` as `target`, on disk, and accepted by `check`, which raises ShardError for what is wrong.

    Raises ShardError as `persist` does, and `disk_full`.
    """

    def attempt() -> None:
        system, path = connect(url, patience)
        try:
            system.get_file(path, str(target), callback=_Watch(patience))
        except OSError as error:
            if error.errno in _FULL:
                raise ShardError("disk_full", f"{target}: {error}") from error
            raise
        check(target)
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    persist(attempt, url, patience)


def persist(attempt: Callable[[], Any], url: str, patience: Patience) -> Any:
    """What `attempt` returns, tried again with growing pauses while waiting may help.

    Raises ShardError: `missing_shard`, `forbidden_shard`, `unreachable_shard` after the last attempt, or what
    `attempt` raised itself.
    """
    for number in range(1, patience.attempts + 1):
        try:
            return attempt()
        except Exception as error:  # every protocol has its own
            failure = _judge(error, url)
            if number == patience.attempts or not _may_pass(failure, error):
                raise failure from (None if failure is error else error)
            pause = patience.pause_s * 2 ** (number - 1) * (1 + _random.random())
            logger.info("attempt %d of %d: %s; the next in %.1f s", number, patience.attempts, failure, pause)
            time.sleep(pause)
    raise ValueError(f"attempts = {patience.attempts}: expected at least 1")


def _judge(error: Exception, url: str) -> ShardError:
    if isinstance(error, ShardError):
        return error
    reason = "unreachable_shard"
    if isinstance(error, FileNotFoundError) or _status(error) in (404, 410):
        reason = "missing_shard"
    elif isinstance(error, PermissionError) or _status(error) in (401, 403):
        reason = "forbidden_shard"
    return ShardError(reason, f"{url}: {type(error).__name__}: {error}")


def _may_pass(failure: ShardError, error: Exception) -> bool:
    return failure.reason in ("unreachable_shard", "damaged_download") and _status(error) not in _REFUSED


def _status(error: Exception) -> int | None:
    return getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)


class _Watch(fsspec.Callback):
    """Ends an attempt that is all too slow: a server that drips never falls silent."""

    def __init__(self, patience: Patience):
        super().__init__()
        self._patience, self._begin, self._bytes = patience, time.monotonic(), 0

    def relative_update(self, inc: int = 1) -> None:
        self._bytes += inc
        seconds = time.monotonic() - self._begin
        if seconds > self._patience.silence_s and self._bytes < self._patience.slowest * seconds:
            raise TimeoutError(f"{self._bytes} bytes in {seconds:.0f} s")
