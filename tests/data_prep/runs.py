"""Runs of preparation as people start them, for tests that end them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.unit import RECORDS

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"size": 56, "tokenizer": "tiny", "max_frames": 64, "samples_per_shard": 3}


def stills(folder: Path, count: int, side: int = 64) -> Path:
    """A manifest of `count` rows: pictures, a text, and one that is not there."""
    rows, rng = [], np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)).save(folder / f"{i}.png", compress_level=1)
        rows.append({"key": f"k{i}", "media": f"{i}.png", "user": "What?", "assistant": f"Picture {i}."})
    del rows[1]["media"]
    (folder / "0.png").unlink()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def command(manifest: Path, out: Path, *more: str) -> list[str]:
    """The command with SETTINGS."""
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    return [sys.executable, "-m", "data_prep.prepare", f"--manifest={manifest}", f"--out={out}", *settings, *more]


def start(*arguments, **more) -> subprocess.Popen:
    """Start `command(*arguments)` in a session of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(*arguments), cwd=ROOT, start_new_session=True, **pipes, **more)


def contents(out: Path) -> dict[str, str]:
    """Hash of every file below, by name."""
    files = [path for path in out.rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def records(out: Path) -> dict[Path, tuple[int, int]]:
    """Of every finished shard the record and which file it is: it is another one once it has been written again."""
    found = {path: path.stat() for path in (out / RECORDS).glob("shard-*.json")}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def session(pid: int) -> list[int]:
    """Processes of the session that `pid` began."""
    found = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{entry}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it ended just now
            continue
        state, _, _, in_session = stat.rpartition(")")[2].split()[:4]
        if int(in_session) == pid and state != "Z":
            found.append(int(entry))
    return found
