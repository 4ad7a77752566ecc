"""An evaluation's record on disk, gone on with where it stopped as long as it is about the same thing."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fvlm.data.shard_index import ShardIndex
from fvlm.evaluate.benchmarks.base import Benchmark

logger = logging.getLogger(__name__)


def resume(path: Path, identity: Mapping[str, Any], restart: bool = False) -> dict[str, Any]:
    """The record at `path`, to be gone on with, or a new one where there is none or it is about something else.

    What two identities do not share may differ, such as a benchmark that was not asked before. `restart`: a new one.
    """
    record = None if restart else _read(path)
    if record is not None:
        known = record["identity"]
        changed = [name for name, value in identity.items() if name in known and known[name] != value]
        if not changed:
            record["identity"] = {**known, **identity}
            logger.info("evaluate: goes on with %s (--restart begins anew)", path)
            return record
        logger.info("evaluate: begins anew: %s holds another %s", path, ", ".join(changed))
    return {"identity": dict(identity)}


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(record["identity"], dict)
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.warning("evaluate: begins anew: %s holds nothing to go on with: %s", path, error)
        return None
    return record if whole else None


def file_digest(path: Path) -> str:
    """16 hex digits of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def set_digest(indexes: Sequence[ShardIndex]) -> str:
    """16 hex digits of a set of shards, by its samples' checksums in order."""
    digest = hashlib.sha256()
    for index in indexes:
        digest.update(np.ascontiguousarray(index.checksum, "<u4").tobytes())
        digest.update("\n".join(map(str, index.keys)).encode())
    return digest.hexdigest()[:16]


def benchmark_digest(benchmark: Benchmark) -> str:
    """16 hex digits of a benchmark's questions and of the names and sizes of their files."""
    said = []
    for row in benchmark.rows:
        path = row.clip.path if row.clip else None
        size = path.stat().st_size if path is not None and path.is_file() else None
        place = (path.name, size, row.clip.start, row.clip.end) if row.clip else None
        said.append([row.key, row.prompt, row.options, row.answer, place])
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
