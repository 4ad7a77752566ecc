"""Sample tables of any size: columns on disk, written once from the shards' indexes and mapped from then on.

A table lies in `<cache>/tables/<name>/`, a file a column and `table.json`; the name follows from size and time of every
shard and index, the samples held out and the tags told apart. So opening it costs a look at the files' times, no index
is read, and what changes gets another table. It appears complete or not at all: several processes may make it at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from fvlm.data.chat import tokenizer_hash
from fvlm.data.index_file import IndexFile
from fvlm.data.remote import RemoteShard
from fvlm.data.remote_index import find_remote_indexes
from fvlm.data.shard_cache import ShardCache
from fvlm.data.shard_index import VERSION, ShardIndex, find_index
from fvlm.data.table import SampleTable, TableRows, table_digest

logger = logging.getLogger(__name__)

FORMAT = 1
_ATTEMPTS = 3
_CHUNK = 1 << 20  # rows

Shard = Path | RemoteShard
_Read = tuple[str, ShardIndex]
"""Where an index lies, and the index."""


@dataclass(frozen=True, slots=True)
class OpenTable:
    """A table, and what belongs to it."""

    table: SampleTable
    indexes: list[IndexFile]
    """Of the shards, in their order."""
    left_out: dict[str, int]
    """Source -> samples that are held out."""


def open_table(
    shards: Sequence[Shard],
    tokenizer: PreTrainedTokenizerBase | None,
    cache_dir: str | Path | None,
    *,
    cache: ShardCache | None = None,
    held_out: np.ndarray | None = None,
    tags: Collection[str] = (),
    after_each: Callable[[], None] = lambda: None,
) -> OpenTable:
    """The table of shards, from `cache_dir` if it is there, else made of their indexes and kept there.

    `shards` are tars, or `.idx` files alone (then `tokenizer` may be None: whatever counted). Without `cache_dir` the
    table is made in memory, in every process: milliseconds a shard, 47 bytes a sample. `cache` is for remote shards;
    `held_out` and `tags` as for `SampleTable.from_indexes`; `after_each` is called for every shard that was looked at.

    Raises what `find_index` and `find_remote_indexes` raise, ValueError for indexes counted with several tokenizers,
    and OSError where `cache_dir` cannot be written.
    """
    elsewhere = [shard for shard in shards if isinstance(shard, RemoteShard)]
    remote = find_remote_indexes(elsewhere, tokenizer, cache, after_each)
    counted_with = tokenizer_hash(tokenizer) if tokenizer is not None else None

    def indexes() -> Iterator[_Read]:
        """One at a time."""
        found = counted_with
        for shard in tqdm(shards, "indexes", unit="shard", disable=None, leave=False):
            if isinstance(shard, RemoteShard) or shard.suffix == ".idx":
                path = remote[shard] if isinstance(shard, RemoteShard) else shard
                index = ShardIndex.load(path)
            else:
                path, index = find_index(shard, tokenizer, cache_dir, counted_with)
            found = found or index.tokenizer_hash
            if index.tokenizer_hash != found:
                raise ValueError(f"{path} was counted with tokenizer {index.tokenizer_hash}, not {found} as others")
            after_each()
            yield os.path.abspath(path), index

    if cache_dir is None:
        return _in_memory(indexes(), TableRows(held_out, tags))
    for _ in range(_ATTEMPTS):
        folder = Path(cache_dir) / "tables" / _name(shards, remote, counted_with, held_out, tags)
        found = _mapped(folder)
        if found is not None:
            return found
        logger.info("%-8s making the table of %d shards in %s, once", "data", len(shards), folder)
        _write(folder, indexes(), TableRows(held_out, tags))
    raise ValueError(f"shards or indexes change while their table is made ({folder}); start again when they are there")


def _in_memory(indexes: Iterator[_Read], rows: TableRows) -> OpenTable:
    files = []

    def remembered() -> Iterator[ShardIndex]:
        for path, index in indexes:
            files.append(IndexFile(path, len(index), index.tar_fingerprint))
            yield index

    table = SampleTable.from_rows(rows, remembered())
    return OpenTable(table, files, dict(rows.left_out))


def _name(
    shards: Sequence[Shard],
    remote: dict[RemoteShard, Path],
    counted_with: str | None,
    held_out: np.ndarray | None,
    tags: Collection[str],
) -> str:
    digest = hashlib.sha256(repr((FORMAT, VERSION, counted_with, sorted(tags))).encode())
    digest.update(b"" if held_out is None else held_out.tobytes())
    for shard in shards:
        if isinstance(shard, RemoteShard):
            seen = (str(shard), str(remote[shard]), _stat(remote[shard]))
        else:
            path = os.path.abspath(shard)
            seen = (path, _stat(path), _stat(f"{path[: -len('.tar')]}.idx", missing_ok=True))
        digest.update(repr(seen).encode())
    return digest.hexdigest()[:16]


def _stat(path: str | Path, missing_ok: bool = False) -> tuple[int, int] | None:
    """Size and time of a file, which change when it is written anew."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if missing_ok:
            return None
        raise
    return status.st_size, status.st_mtime_ns


def _write(folder: Path, indexes: Iterator[_Read], rows: TableRows) -> None:
    """Write a table, a shard at a time in memory."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        hashes = {name: hashlib.sha256() for name in rows.dtypes if name != "source"}
        files, num_rows = [], 0
        with ExitStack() as stack:
            columns = {name: stack.enter_context(open(temporary / name, "wb")) for name in rows.dtypes}
            for path, index in indexes:
                added = rows.add(index)
                for name, column in added.items():
                    columns[name].write(column.data)
                    if name in hashes:
                        hashes[name].update(column.data)
                num_rows += len(added["row"])
                files.append([path, _stat(path), len(index), index.tar_fingerprint])
            for file in columns.values():
                file.flush()
                os.fsync(file.fileno())
        names, renumber = rows.sources()
        hashes["source"] = _renumber(temporary / "source", renumber)
        columns = {name: digest.hexdigest() for name, digest in hashes.items()}
        described = {
            "rows": num_rows,
            "source_names": names,
            "tag_sets": rows.tag_sets,
            "digest": table_digest(columns, names, rows.tag_sets),
            "dtypes": {name: dtype.str for name, dtype in rows.dtypes.items()},
            "left_out": rows.left_out,
            "indexes": files,
        }
        with open(temporary / "table.json", "w") as file:
            json.dump(described, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o755)
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _renumber(path: Path, renumber: np.ndarray) -> hashlib._Hash:
    """Give the sources in a column their final numbers; the column's SHA-256."""
    digest = hashlib.sha256()
    with open(path, "r+b") as file:
        while len(numbers := np.frombuffer(file.read(_CHUNK * renumber.itemsize), renumber.dtype)):
            final = renumber[numbers]
            file.seek(-final.nbytes, os.SEEK_CUR)
            file.write(final.data)
            digest.update(final.data)
        file.flush()
        os.fsync(file.fileno())
    return digest


def _publish(temporary: Path, folder: Path) -> None:
    """Give a finished table its name, unless another process has made the same one meanwhile."""
    try:
        temporary.rename(folder)
    except OSError:
        if _mapped(folder) is not None:
            return
        damaged = temporary.with_suffix(".damaged")
        folder.rename(damaged)
        temporary.rename(folder)
        shutil.rmtree(damaged)


def _mapped(folder: Path) -> OpenTable | None:
    """The table in `folder`; None if there is none, or none whose files and indexes are as they were written."""
    try:
        described = json.loads((folder / "table.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s is damaged and made anew: %s", folder, error)
        return None
    try:
        columns = {
            name: _column(folder / name, np.dtype(dtype), described["rows"])
            for name, dtype in described["dtypes"].items()
        }
        files = []
        for path, status, num_samples, tar_fingerprint in described["indexes"]:
            if _stat(path, missing_ok=True) != tuple(status):
                raise ValueError(f"index {path} is gone, or was written anew")
            files.append(IndexFile(path, num_samples, tar_fingerprint))
        table = SampleTable(
            source_names=tuple(described["source_names"]),
            tag_sets=tuple(map(tuple, described["tag_sets"])),
            **columns,
        )
        object.__setattr__(table, "known_digest", described["digest"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.warning("%s is damaged and made anew: %s", folder, error)
        return None
    return OpenTable(table, files, described["left_out"])


def _column(path: Path, dtype: np.dtype, num_rows: int) -> np.ndarray:
    if os.path.getsize(path) != num_rows * dtype.itemsize:
        raise ValueError(f"{path.name} has {os.path.getsize(path)} bytes, expected {num_rows} x {dtype.itemsize}")
    if not num_rows:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r").view(np.ndarray)  # memmap's own indexing is slow
