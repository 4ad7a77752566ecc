"""What became of every file that was asked for: one JSON line each, kept from run to run."""

from __future__ import annotations

import fcntl
import hashlib
import json
from array import array
from pathlib import Path

import numpy as np

FOLDER = ".download"  # of the records, inside the folder of the media


class Ledger:
    """The record of a folder of downloads, held by one process at a time; use as a context manager.

    A file that is there needs no entry to be kept. Of those that are not, the entries tell which were given up for good
    (no such page, not a picture or video, too large) and need not be asked for again; that takes 9 bytes a file.
    Raises BlockingIOError if another process holds it.
    """

    def __init__(self, out: Path):
        self._path = out / FOLDER / "ledger.jsonl"

    def __enter__(self) -> Ledger:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError as error:
            self._file.close()
            raise BlockingIOError(f"another download is at work in {self._path.parent.parent}") from error
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def _read(self) -> None:
        files, reasons, names, line = array("Q"), array("H"), {}, b"\n"
        self._file.seek(0)
        for line in self._file:
            try:
                entry = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if entry.get("final"):
                files.append(_hash(entry["file"]))
                reasons.append(names.setdefault(entry["reason"], len(names)))
        if not line.endswith(b"\n"):
            self._file.write(b"\n")
        self._files, first = np.unique(np.frombuffer(files, np.uint64), return_index=True)
        self._reasons = np.frombuffer(reasons, np.uint16)[first]
        self._names = list(names)

    def given_up(self, file: str) -> str | None:
        """Why an earlier run gave a file up for good; None if it did not."""
        wanted = np.uint64(_hash(file))
        at = int(np.searchsorted(self._files, wanted))
        found = at < len(self._files) and self._files[at] == wanted
        return self._names[self._reasons[at]] if found else None

    def add(self, entry: dict) -> None:
        """Note what became of a file: `file` and `url`, and `reason`, `detail`, `final` or `bytes`."""
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()


def _hash(file: str) -> int:
    return int.from_bytes(hashlib.blake2b(file.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
