"""A web server of shards with manners good and bad, for tests of remote shards."""

from __future__ import annotations

import threading
import time
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fvlm.data.remote import Patience
from fvlm.data.shard_cache import ShardCache

SIZE, SAMPLES, PER_SHARD = 16, 48, 8
QUICK = Patience(attempts=3, pause_s=0.01, silence_s=0.5, slowest=1e5)


def open_cache(tmp_path: Path, limit: float = 1e9) -> ShardCache:
    """A cache in `tmp_path` that soon gives up."""
    return ShardCache(tmp_path / "cache", limit, QUICK)


class ShardServer(ThreadingHTTPServer):
    """Serves a folder's files and listings; `manners` maps a file's name to how it is answered, `times` to how often.

    Manners: "error" (503), "forbidden" (403), "short" (hangs up half-way), "page" (HTML instead), "drip" (a byte now
    and then), "silent" (stops half-way), "flipped" (a byte is wrong).
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        self.folder = folder
        self.manners: dict[str, str] = {}
        self.times: dict[str, int] = {}
        self.asked: Counter[str] = Counter()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, *_) -> None:
        """A client that goes away is no concern."""


class _Handler(SimpleHTTPRequestHandler):
    server: ShardServer

    def __init__(self, request, address, server: ShardServer):
        super().__init__(request, address, server, directory=str(server.folder))

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.asked[name] += 1
        manner = self.server.manners.get(name)
        if manner is None or self.server.asked[name] > self.server.times.get(name, 1 << 30):
            super().do_GET()
        elif manner in ("error", "forbidden"):
            self.send_error(503 if manner == "error" else 403)
        else:
            self._misbehave(manner, (self.server.folder / self.path.lstrip("/")).read_bytes())

    def _misbehave(self, manner: str, content: bytes) -> None:
        half = len(content) // 2
        if manner == "page":
            content = b"<html>please log in</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if manner == "flipped":
            content = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        whole = manner in ("page", "flipped")
        self.wfile.write(content if whole else content[:half])
        for _ in range(0 if whole or manner == "short" else 200):
            time.sleep(0.05)
            self.wfile.write(b"x" if manner == "drip" else b"")
        self.close_connection = True

    def log_message(self, *_) -> None:
        """Nothing on the screen."""
