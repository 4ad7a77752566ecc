"""The index of a shard: one row a sample, enough to plan training without opening the tar and to read by offset."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import socket
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from transformers import PreTrainedTokenizerBase

from fvlm.data.chat import TextCounts, tokenizer_hash
from fvlm.data.content import checksum, content_hash
from fvlm.data.scan import scan_tar
from fvlm.data.shard_rows import KINDS, IndexRow, index_rows, sample_tags

logger = logging.getLogger(__name__)

VERSION = 4
_MALFORMED = (  # what numpy and zipfile let through when a file is not what it says
    OSError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Columns over the n samples of a shard, in the order of the tar."""

    keys: np.ndarray
    """str [n]."""
    source_names: tuple[str, ...]
    """The shard's sources."""
    source: np.ndarray
    """int16 [n]: position in `source_names`."""
    kind: np.ndarray
    """uint8 [n]: position in KINDS."""
    num_frames: np.ndarray
    """int32 [n]."""
    duration: np.ndarray
    """float32 [n], seconds; 0 where there is none."""
    tokens: np.ndarray
    """int32 [n], and the next seven: see `fvlm.data.chat.TextCounts`."""
    head: np.ndarray
    answer: np.ndarray
    narrated_tokens: np.ndarray
    narrated_answer: np.ndarray
    narrated_tail: np.ndarray
    rejected_tokens: np.ndarray
    rejected_answer: np.ndarray
    tag_sets: tuple[tuple[str, ...], ...]
    """The combinations of tags that occur, each sorted."""
    tag_set: np.ndarray
    """int32 [n]: position in `tag_sets`."""
    content: np.ndarray
    """uint64 [n]: hash of what the sample shows and says (`fvlm.data.content`)."""
    checksum: np.ndarray
    """uint32 [n]: of the bytes of metadata and frames."""
    json_offset: np.ndarray
    """int64 [n]: where the metadata begins, in bytes."""
    json_size: np.ndarray
    """int32 [n], bytes."""
    from_video: np.ndarray
    """bool [n]: whether the frames are those of a whole video, one member."""
    text_offset: np.ndarray
    """int64 [n]: where a whole video's text begins, in bytes."""
    text_size: np.ndarray
    """int32 [n], bytes; 0 where there is none."""
    first_frame: np.ndarray
    """int64 [n + 1]: sample i has members first_frame[i] : first_frame[i + 1] of the next two: frames, or a video."""
    frame_offset: np.ndarray
    """int64 [all frames and whole videos], bytes."""
    frame_size: np.ndarray
    """int32 [all frames and whole videos], bytes."""
    tokenizer_hash: str
    """Of the tokenizer that counted."""
    tar_fingerprint: str
    """Of the tar that was indexed."""

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def from_rows(cls, rows: Sequence[IndexRow], tokenizer_hash: str, tar_fingerprint: str) -> ShardIndex:
        """Columns from samples."""
        sources = [str(row.meta.get("source") or "unknown") for row in rows]
        names = tuple(sorted(set(sources)))
        frames = np.array([frame[:2] for row in rows for frame in row.frames], np.int64).reshape(-1, 2)
        places = np.array([row.json[:2] for row in rows], np.int64).reshape(-1, 2)
        texts = np.array([row.text[:2] for row in rows], np.int64).reshape(-1, 2)
        counts = np.array([astuple(row.counts) for row in rows], np.int32).reshape(-1, len(fields(TextCounts)))
        tags = [sample_tags(row.meta) for row in rows]
        tag_sets = tuple(sorted(set(tags)))
        tag_numbers = {each: number for number, each in enumerate(tag_sets)}
        return cls(
            keys=np.array([row.key for row in rows], np.str_),
            source_names=names,
            source=np.array([names.index(source) for source in sources], np.int16),
            kind=np.array([KINDS.index(row.kind) for row in rows], np.uint8),
            num_frames=np.array([row.num_frames for row in rows], np.int32),
            duration=np.array([_seconds(row.meta) for row in rows], np.float32),
            **{field.name: counts[:, i] for i, field in enumerate(fields(TextCounts))},
            tag_sets=tag_sets,
            tag_set=np.array([tag_numbers[each] for each in tags], np.int32),
            content=np.array([content_hash(row.meta, row.frames) for row in rows], np.uint64),
            checksum=np.array([checksum(row.crcs) for row in rows], np.uint32),
            json_offset=places[:, 0],
            json_size=places[:, 1].astype(np.int32),
            from_video=np.array([row.from_video is not None for row in rows], np.bool_),
            text_offset=texts[:, 0],
            text_size=texts[:, 1].astype(np.int32),
            first_frame=np.cumsum([0, *(len(row.frames) for row in rows)], dtype=np.int64),
            frame_offset=frames[:, 0],
            frame_size=frames[:, 1].astype(np.int32),
            tokenizer_hash=tokenizer_hash,
            tar_fingerprint=tar_fingerprint,
        )

    def save(self, path: Path) -> None:
        """Write the index, complete or not at all."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        columns["tag_sets"] = json.dumps(self.tag_sets)  # an array of strings is as wide as its longest, everywhere
        with complete(path) as file:
            np.savez(file, version=np.int64(VERSION), **columns)

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Read an index. Raises ValueError if the file is not one of this version."""
        try:
            stored = _stored_arrays(Path(path).read_bytes())
            if int(stored["version"]) != VERSION:
                raise ValueError(f"it has version {int(stored['version'])}, expected {VERSION}")
            columns = {field.name: stored[field.name] for field in fields(cls)}
            columns["source_names"] = tuple(columns["source_names"].tolist())
            columns["tag_sets"] = tuple(map(tuple, json.loads(str(columns["tag_sets"]))))
            for name in ("tokenizer_hash", "tar_fingerprint"):
                columns[name] = str(columns[name])
            index = cls(**columns)
            if not index._is_consistent():
                raise ValueError("its columns do not fit each other")
        except _MALFORMED as error:
            raise ValueError(f"{path} is not a readable index: {error}") from error
        return index

    def _is_consistent(self) -> bool:
        n, others = len(self.keys), ("source_names", "tag_sets", "first_frame", "frame_offset", "frame_size")
        columns = [getattr(self, each.name) for each in fields(self) if each.name not in others]
        if any(column.shape != (n,) for column in columns if isinstance(column, np.ndarray)):
            return False
        return (
            self.first_frame.shape == (n + 1,)
            and self.frame_offset.shape == self.frame_size.shape == (self.first_frame[-1],)
            and np.array_equal(np.diff(self.first_frame), np.where(self.from_video, 1, self.num_frames))
            and (self.source < len(self.source_names)).all()
            and (self.kind < len(KINDS)).all()
            and (self.tag_set < len(self.tag_sets)).all()
        )


def _stored_arrays(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of an uncompressed `.npz` file, each compared with its CRC: as `np.load`, in a fifth of the time."""
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for member in archive.infolist():
            name_size, extra_size = struct.unpack_from("<HH", content, member.header_offset + 26)
            start = member.header_offset + 30 + name_size + extra_size
            stored = memoryview(content)[start : start + member.file_size]
            if member.compress_type != zipfile.ZIP_STORED or zlib.crc32(stored) != member.CRC:
                raise ValueError(f"{member.filename} in it is damaged or compressed")
            if stored[:8] != b"\x93NUMPY\x01\x00":
                raise ValueError(f"{member.filename} in it is no array")
            first = 10 + int.from_bytes(stored[8:10], "little")
            shape, dtype = _array_header(bytes(stored[8:first]))
            arrays[member.filename.removesuffix(".npy")] = np.ndarray(shape, dtype, stored, first).copy()
    return arrays


@lru_cache(1024)
def _array_header(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and data type; indexes repeat each other's headers."""
    shape, _, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    return shape, dtype


def load_index(
    tar_path: str | Path, tokenizer: PreTrainedTokenizerBase, cache_dir: str | Path | None = None
) -> ShardIndex:
    """The index of a shard, from beside it or from `cache_dir`; built into `cache_dir` where neither fits.

    An index fits if it is of this tar (size and both ends compared) and was counted with this tokenizer. Raises
    FileNotFoundError without a tar, ValueError if an index would have to be built and there is no `cache_dir`.
    """
    return find_index(tar_path, tokenizer, cache_dir)[1]


def find_index(
    tar_path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path | None = None,
    counted_with: str | None = None,
) -> tuple[Path, ShardIndex]:
    """`load_index`, with the file that holds it; `counted_with` is the tokenizer's hash, where it is known already."""
    tar_path = Path(tar_path)
    if not tar_path.is_file():
        raise FileNotFoundError(f"shard {tar_path} does not exist")
    expected = (counted_with or tokenizer_hash(tokenizer), fingerprint(tar_path))
    candidates = [tar_path.with_suffix(".idx")]
    if cache_dir is not None:
        unique = zlib.crc32(str(tar_path.resolve()).encode())
        candidates.append(Path(cache_dir) / f"{tar_path.stem}-{unique:08x}-{expected[0]}.idx")
    reasons = []
    for path in candidates:
        index, reason = _fitting(path, expected)
        if index is not None:
            return path, index
        reasons.append(reason)
    if cache_dir is None:
        raise ValueError(
            f"shard {tar_path} has no usable index: {reasons[0]}; name a folder to build indexes in "
            f"(data.cache_dir of a run, --cache-dir of the other commands)"
        )
    logger.warning("building the index of %s in %s: %s", tar_path, cache_dir, reasons[0])
    index = build_index(tar_path, tokenizer)
    candidates[-1].parent.mkdir(parents=True, exist_ok=True)
    index.save(candidates[-1])
    return candidates[-1], index


def _fitting(path: Path, expected: tuple[str, str]) -> tuple[ShardIndex | None, str]:
    if not path.is_file():
        return None, f"{path} does not exist"
    try:
        index = ShardIndex.load(path)
    except ValueError as error:
        return None, str(error)
    if index.tokenizer_hash != expected[0]:
        return None, f"{path} was counted with tokenizer {index.tokenizer_hash}, not {expected[0]}"
    if index.tar_fingerprint != expected[1]:
        return None, f"{path} is of another version of the tar"
    return index, ""


def build_index(tar_path: str | Path, tokenizer: PreTrainedTokenizerBase, folder: str | None = None) -> ShardIndex:
    """Index a tar by reading it through. Samples that cannot be used are left out and logged with key and reason.

    `folder` is the name of the tar's, where it is here under another. Raises ShardError for a file that is no tar.
    """
    tar_path = Path(tar_path)
    folder = tar_path.resolve().parent.name if folder is None else folder

    def report(name: str, reason: str, detail: str) -> None:
        logger.warning("%s, %s: left out: %s: %s", tar_path, name or "what follows", reason, detail)

    scan = scan_tar(tar_path, report, videos=True)
    if scan.videos:
        _say_slow(folder)
    if scan.orphans:
        report(scan.orphans[0], "unclaimed_member", f"{len(scan.orphans)} members belong to no sample, this is one")
    rows = index_rows(scan, tokenizer, report, folder)
    return ShardIndex.from_rows(rows, tokenizer_hash(tokenizer), fingerprint(tar_path))


@cache
def _say_slow(folder: str) -> None:
    """Once, not for every tar."""
    logger.warning(
        "%s holds whole videos, which are decoded whenever they are read: shards that data_prep.prepare makes of them "
        "are read faster",
        folder,
    )


def fingerprint(tar_path: Path) -> str:
    """Changes when the tar does: its size and a checksum of both ends."""
    with open(tar_path, "rb") as file:
        head = file.read(4096)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 65536))  # reaches beyond the padding that ends a tar
        return f"{size}-{zlib.crc32(file.read(), zlib.crc32(head)):08x}"


def temporary_name(path: Path) -> Path:
    """Where a file is written before it gets its name: used by this process on this machine alone."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


@contextmanager
def complete(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which gets its name when the block ends: whole and on disk, or not at all."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            publish(file, temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(file: BinaryIO, temporary: Path, path: Path) -> None:
    """Close a written file, on disk before it gets its name."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(temporary, path)


def _seconds(meta: Mapping) -> float:
    duration = meta.get("duration")
    try:
        seconds = float(duration) if isinstance(duration, (int, float)) else 0.0
    except OverflowError:  # an integer of hundreds of digits
        return 0.0
    return seconds if math.isfinite(seconds) and abs(seconds) < 1e9 else 0.0
