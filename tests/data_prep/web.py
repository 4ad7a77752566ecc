"""A web server with manners good and bad, for tests of the download."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PICTURE = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 400
"""Bytes that begin as a JPEG does."""
OTHER = PICTURE[:4] + PICTURE[::-1]
PAGE = b"<!DOCTYPE html><html><body>This video is no longer available</body></html>"


class Web(ThreadingHTTPServer):
    """Serves paths by the functions in `paths`, and counts what it was asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.paths: dict[str, Callable[[_Handler], None]] = {}
        self.asked: Counter[str] = Counter()
        self.ranges: list[str | None] = []
        self.together, self.most_together, self.lock = 0, 0, threading.Lock()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, *_) -> None:
        """A client that goes away is no concern."""


class _Handler(BaseHTTPRequestHandler):
    server: Web
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        with self.server.lock:
            self.server.asked[path] += 1
            self.server.ranges.append(self.headers.get("Range"))
            self.server.together += 1
            self.server.most_together = max(self.server.most_together, self.server.together)
        try:
            self.server.paths[re.sub(r"\d+$", "", path)](self)
        finally:
            with self.server.lock:
                self.server.together -= 1

    @property
    def times(self) -> int:
        """How often this path has been asked for."""
        return self.server.asked[self.path.lstrip("/")]

    def answer(self, content: bytes = PICTURE, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    def log_message(self, *_) -> None:
        """Nothing on the screen."""


def good(handler: _Handler) -> None:
    handler.answer(Content_Type="video/mp4")


def slow(handler: _Handler) -> None:
    """A few bytes now and then, never silent for long."""
    handler.answer(PICTURE[:600], length=len(PICTURE))
    for _ in range(100):
        time.sleep(0.05)
        handler.wfile.write(b"x")


def silent(handler: _Handler) -> None:
    handler.answer(PICTURE[:600], length=len(PICTURE))
    time.sleep(5)


def truncates_twice(handler: _Handler) -> None:
    """Half of it, hanging up, twice; it can go on from anywhere."""
    begin = int(re.match(r"bytes=(\d+)-", handler.headers.get("Range", "bytes=0-"))[1])
    rest = PICTURE[begin:]
    sent = rest[: len(rest) // 2] if handler.times <= 2 else rest
    more = {"Content_Range": f"bytes {begin}-{len(PICTURE) - 1}/{len(PICTURE)}"} if begin else {}
    handler.answer(sent, 206 if begin else 200, length=len(rest), ETag='"one"', **more)
    if sent != rest:
        handler.hang_up()


def changes(handler: _Handler) -> None:
    """Half of a file, then all of another: the beginning may not be kept."""
    if handler.times == 1:
        handler.answer(PICTURE[:50_000], length=len(PICTURE), ETag='"one"')
        handler.hang_up()
    else:
        handler.answer(OTHER, ETag='"two"')


def unnamed(handler: _Handler) -> None:
    """Half of a file without saying which version, then all."""
    if handler.times == 1:
        handler.answer(PICTURE[:50_000], length=len(PICTURE))
        handler.hang_up()
    else:
        handler.answer()


def wrong_range(handler: _Handler) -> None:
    """Half, then a piece that was not asked for, then all."""
    if handler.times == 1:
        handler.answer(PICTURE[:50_000], length=len(PICTURE), ETag='"one"')
        handler.hang_up()
    elif handler.times == 2:
        handler.answer(PICTURE[7:], 206, Content_Range=f"bytes 7-{len(PICTURE) - 1}/{len(PICTURE)}")
    else:
        handler.answer()


def always_short(handler: _Handler) -> None:
    handler.answer(PICTURE[:1000], length=len(PICTURE))
    handler.hang_up()


def chunked(handler: _Handler) -> None:
    """No length: pieces, and an end."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for begin in range(0, len(PICTURE), 30_000):
        piece = PICTURE[begin : begin + 30_000]
        handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    handler.wfile.write(b"0\r\n\r\n")


def endless(handler: _Handler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while True:
        handler.wfile.write(f"{len(PICTURE):x}\r\n".encode() + PICTURE + b"\r\n")


def redirect(location: str, status: int = 302) -> Callable[[_Handler], None]:
    return lambda handler: handler.answer(b"", status, Location=location)


def status(code: int, times: int = 1 << 30, **headers: str) -> Callable[[_Handler], None]:
    """An error so many times, then the file."""
    return lambda handler: handler.answer(b"no", code, **headers) if handler.times <= times else good(handler)


def page(handler: _Handler) -> None:
    """A page of HTML that calls itself a video."""
    handler.answer(PAGE, Content_Type="video/mp4")


def mislabelled(handler: _Handler) -> None:
    """A picture that calls itself a page."""
    handler.answer(Content_Type="text/html")


def empty(handler: _Handler) -> None:
    handler.answer(b"", Content_Type="image/jpeg")


def large(handler: _Handler) -> None:
    handler.answer(PICTURE, length=1 << 40)
