"""The files of one checkpoint, written, flushed and hashed by a thread while training goes on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

from safetensors import SafetensorError

from fvlm.train.reshape import CheckpointError


@dataclass(kw_only=True)
class Save:
    """A checkpoint on its way to the disk; its results belong to the thread until that has ended."""

    step: int
    folder: Path
    """Temporary."""
    best: dict[str, Any] | None
    """`RunState.best` as of the step, if this is that checkpoint."""
    needed: int
    """Bytes, over all ranks."""
    files: dict[str, Callable[[Path], Any]]
    """What this rank writes, by name below `folder`; a file or a folder each."""
    _entries: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    _error: Exception | None = field(default=None, init=False)
    _thread: Thread = field(init=False)

    def start(self) -> None:
        """Write in the background."""
        self._thread = Thread(target=self._write, name=f"checkpoint-{self.step}", daemon=True)
        self._thread.start()

    @property
    def written(self) -> bool:
        """Whether the thread has ended, one way or the other."""
        return not self._thread.is_alive()

    def wait(self) -> tuple[dict[str, dict[str, Any]], str | None]:
        """(manifest entries of this rank's files, what kept it from writing them or None)."""
        self._thread.join()
        if self._error is not None and not isinstance(self._error, CheckpointError):
            raise self._error
        return self._entries, None if self._error is None else str(self._error)

    def _write(self) -> None:
        name = ""
        try:
            for name, write in self.files.items():
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path)
                for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
                    self._entries[str(file.relative_to(self.folder))] = flush_and_hash(file)
        except (OSError, SafetensorError) as error:
            self._error = CheckpointError(f"{self.folder / name}: {error}")
        except Exception as error:  # a bug: raised in the main thread, by `wait`
            self._error = error


def flush_and_hash(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest, once it is on the disk."""
    flush(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def flush(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
