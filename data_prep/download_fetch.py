"""One file from one address: tried again where that may help, continued where it stopped, checked before it is kept."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urljoin, urlsplit

import aiohttp

from data_prep.download_hosts import DownloadError, Hosts, retry_after
from data_prep.download_signature import HEAD, describe, is_media

_CHUNK = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_LONGEST_PAUSE = 60.0  # seconds between attempts, unless the server asks for more
_NEVER = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR)  # what else keeps a file from being written may pass
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds of one file."""

    max_bytes: int = 1 << 30
    seconds: float = 600.0
    """For all attempts together with the pauses between them; turns at a busy host are waited for beside that."""
    idle_seconds: float = 30.0
    """For a connection, and between two pieces of the answer."""
    attempts: int = 5
    redirects: int = 5
    """Followed in one attempt."""
    backoff: float = 1.0
    """Seconds before the second attempt; doubled for each that follows."""


class DiskError(Exception):
    """The disk takes nothing more: no file can be had."""


class Fetcher:
    """Fetches files over one session."""

    def __init__(self, session: aiohttp.ClientSession, hosts: Hosts, limits: Limits):
        self._session, self._hosts, self._limits = session, hosts, limits

    async def fetch(self, url: str, path: Path) -> int:
        """Download `url` to `path`, which appears complete or not at all; returns its bytes.

        Raises DownloadError when the attempts or the time are used up, or at once where nothing would help; DiskError
        if the disk is full.
        """
        attempts, part = _Attempts(self._limits), _Part(path, url)
        while True:
            try:
                return await self._attempt(url, part, attempts)
            except DownloadError as error:
                if error.final:
                    part.drop()
                await attempts.pause(error)
            except OSError as error:
                if error.errno in _FULL_DISK:
                    told = "what is there is kept: see to the disk and run the same command again"
                    raise DiskError(f"{path}: {error.strerror}; {told}") from error
                raise DownloadError("cannot_write", f"{path}: {error.strerror}", error.errno in _NEVER) from error

    async def _attempt(self, url: str, part: _Part, attempts: _Attempts) -> int:
        """Ask once, and wherever that redirects to."""
        for _ in range(self._limits.redirects + 1):
            host = _host(url)
            async with self._hosts.turn(host):
                with attempts.clock():
                    answer = await self._ask(url, host, part, attempts.seconds_left())
            if isinstance(answer, int):
                return answer
            url = answer
        raise DownloadError("too_many_redirects", f"{url}: more than {self._limits.redirects}", final=True)

    async def _ask(self, url: str, host: str, part: _Part, seconds: float) -> int | str:
        """Bytes of the complete file, or the address that the server sends us on to."""
        try:
            async with asyncio.timeout(seconds):
                headers = {"Accept-Encoding": "identity", **part.headers()}
                async with self._session.get(url, headers=headers, allow_redirects=False) as response:
                    self._hosts.answered(host)
                    if response.status in _REDIRECTS:
                        return _redirected(response)
                    return await self._receive(response, host, part)
        except aiohttp.ClientPayloadError as error:
            raise DownloadError("truncated", f"{url}: {error}") from error
        except aiohttp.ServerTimeoutError as error:
            raise DownloadError("stalled", f"{url}: nothing came for {self._limits.idle_seconds:g} s") from error
        except TimeoutError as error:
            raise DownloadError("timeout", f"{url}: not complete after {self._limits.seconds:g} s") from error
        except (aiohttp.InvalidURL, ValueError) as error:
            raise DownloadError("bad_url", f"{url!r}: {error}", final=True) from error
        except (aiohttp.ClientError, ConnectionError, ssl.SSLError) as error:
            self._hosts.unreachable(host, str(error))
            raise DownloadError("no_connection", f"{url}: {error}") from error

    async def _receive(self, response: aiohttp.ClientResponse, host: str, part: _Part) -> int:
        self._check_status(response, host)
        begin, size = _extent(response, part)
        if size is not None and size > self._limits.max_bytes:
            raise DownloadError("too_large", _larger(response.url, f"{size} bytes", self._limits), final=True)
        head = b"" if begin == 0 else None  # None: looked at when the first part came
        with part.open(begin, response.headers) as file:
            received = begin
            async for chunk in response.content.iter_chunked(_CHUNK):
                received += len(chunk)
                if received > self._limits.max_bytes:
                    raise DownloadError("too_large", _larger(response.url, "more", self._limits), final=True)
                if head is not None:
                    head += chunk
                    if len(head) < HEAD:
                        continue
                    chunk, head = _checked(head, response), None
                file.write(chunk)
            if head is not None:
                file.write(_checked(head, response))
            if size is not None and received != size:
                raise DownloadError("truncated", f"{response.url}: {received} of {size} bytes came")
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
        part.publish()
        return received

    def _check_status(self, response: aiohttp.ClientResponse, host: str) -> None:
        status = response.status
        if status in (200, 206, 416):
            return
        if status in (429, 503) and (seconds := retry_after(response.headers.get("Retry-After"))):
            self._hosts.quiet(host, seconds)  # for every file that we want from there
        raise DownloadError(f"http_{status}", f"{response.url}: {response.reason}", final=status not in _TRY_AGAIN)


class _Attempts:
    """How often and how long one file has been asked for."""

    def __init__(self, limits: Limits):
        self._limits, self._made, self._spent = limits, 0, 0.0

    def seconds_left(self) -> float:
        return max(0.0, self._limits.seconds - self._spent)

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Count the time inside as spent on the file."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._spent += time.monotonic() - begun

    async def pause(self, error: DownloadError) -> None:
        """Pause before the next attempt; raises the error again if there is to be none."""
        self._made += 1
        if error.final or self._made >= self._limits.attempts:
            raise error
        pause = min(self._limits.backoff * 2 ** (self._made - 1), _LONGEST_PAUSE) * random.uniform(0.5, 1.5)
        if pause >= self.seconds_left():
            raise error
        with self.clock():
            await asyncio.sleep(pause)


class _Part:
    """The beginning of a file, under a name of its own, with a note of what it is the beginning of."""

    def __init__(self, path: Path, url: str):
        self.path, self._url = path, url
        self._part = path.with_name(f".{path.name}.part")
        self._note = path.with_name(f".{path.name}.part.json")

    def headers(self) -> dict[str, str]:
        """Ask for the rest, if the beginning is of this address and the server can tell whether that has changed."""
        try:
            note = json.loads(self._note.read_text())
            size = self._part.stat().st_size
        except (OSError, ValueError):
            return {}
        if not size or note.get("url") != self._url or not note.get("same"):
            return {}
        return {"Range": f"bytes={size}-", "If-Range": note["same"]}

    def size(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def open(self, begin: int, headers: Mapping[str, str]) -> BinaryIO:
        """The part, cut to `begin` bytes, for writing on."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if begin == 0:
            etag = headers.get("ETag", "")
            same = etag if etag.startswith('"') else headers.get("Last-Modified")  # a weak tag does not do for ranges
            self._note.write_text(json.dumps({"url": self._url, "same": same}))
        return open(self._part, "ab" if begin else "wb")

    def drop(self) -> None:
        self._part.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def publish(self) -> None:
        """Give the file its name."""
        os.replace(self._part, self.path)
        self._note.unlink(missing_ok=True)


def _host(url: str) -> str:
    """Host and port. Raises DownloadError `bad_scheme` or `bad_url`."""
    try:
        parts = urlsplit(url)
        host = parts.hostname and f"{parts.hostname}:{parts.port or parts.scheme}"
    except ValueError as error:
        raise DownloadError("bad_url", f"{url!r}: {error}", final=True) from error
    if parts.scheme not in ("http", "https"):
        raise DownloadError("bad_scheme", f"{url!r}: expected http or https", final=True)
    if not host:
        raise DownloadError("bad_url", f"{url!r} names no host", final=True)
    return host


def _redirected(response: aiohttp.ClientResponse) -> str:
    location = response.headers.get("Location")
    if not location:
        raise DownloadError("bad_redirect", f"{response.url}: redirected to nowhere", final=True)
    return urljoin(str(response.url), location)


def _extent(response: aiohttp.ClientResponse, part: _Part) -> tuple[int, int | None]:
    """(where the answer begins in the file, size of the whole file if the server says)."""
    if response.status == 200:
        return 0, response.content_length
    given = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
    if response.status == 206 and given and int(given[1]) == part.size():
        return int(given[1]), int(given[3])
    part.drop()  # what is there does not fit what the server has: begin anew
    raise DownloadError("bad_range", f"{response.url}: {response.headers.get('Content-Range', 'no range')}")


def _checked(head: bytes, response: aiohttp.ClientResponse) -> bytes:
    if not head:
        raise DownloadError("empty", f"{response.url}: the answer has no bytes")
    if not is_media(head):
        detail = f"{response.url}: not a picture or video but {describe(head)} (called {response.content_type})"
        raise DownloadError("not_media", detail, final=True)
    return head


def _larger(url: object, found: str, limits: Limits) -> str:
    return f"{url}: {found}, more than --max-mb {limits.max_bytes / 2**20:g}"
