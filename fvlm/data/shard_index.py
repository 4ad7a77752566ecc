"""The index of a shard: one row a sample, enough to plan training without opening the tar and to read by offset."""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from fvlm.data.chat import TextCounts, text_counts, tokenizer_hash
from fvlm.data.errors import SampleError

logger = logging.getLogger(__name__)

VERSION = 1
KINDS = ("video", "image", "images", "text")
"""What a sample shows: `kind` columns hold positions in this tuple."""
_FRAME = re.compile(r"(.+)[._](\d{3,})")
_MEDIA = (".mp4", ".webm", ".mkv", ".mov", ".avi")


class IndexRow(NamedTuple):
    """One sample of a shard; offsets and sizes are bytes in the tar."""

    key: str
    meta: Mapping
    kind: str
    counts: TextCounts
    json: tuple[int, int]
    frames: list[tuple[int, int]]


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
    """int32 [n], and the next five: see `fvlm.data.chat.TextCounts`."""
    head: np.ndarray
    answer: np.ndarray
    narrated_tokens: np.ndarray
    narrated_answer: np.ndarray
    narrated_tail: np.ndarray
    json_offset: np.ndarray
    """int64 [n]: where the metadata begins, in bytes."""
    json_size: np.ndarray
    """int32 [n], bytes."""
    first_frame: np.ndarray
    """int64 [n + 1]: sample i has frames first_frame[i] : first_frame[i + 1] of the next two."""
    frame_offset: np.ndarray
    """int64 [all frames], bytes."""
    frame_size: np.ndarray
    """int32 [all frames], bytes."""
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
        frames = np.array([frame for row in rows for frame in row.frames], np.int64).reshape(-1, 2)
        places = np.array([row.json for row in rows], np.int64).reshape(-1, 2)
        counts = np.array([astuple(row.counts) for row in rows], np.int32).reshape(-1, len(fields(TextCounts)))
        num_frames = np.array([len(row.frames) for row in rows], np.int32)
        return cls(
            keys=np.array([row.key for row in rows], np.str_),
            source_names=names,
            source=np.array([names.index(source) for source in sources], np.int16),
            kind=np.array([KINDS.index(row.kind) for row in rows], np.uint8),
            num_frames=num_frames,
            duration=np.array([_seconds(row.meta) for row in rows], np.float32),
            **{field.name: counts[:, i] for i, field in enumerate(fields(TextCounts))},
            json_offset=places[:, 0],
            json_size=places[:, 1].astype(np.int32),
            first_frame=np.concatenate([[0], np.cumsum(num_frames)]).astype(np.int64),
            frame_offset=frames[:, 0],
            frame_size=frames[:, 1].astype(np.int32),
            tokenizer_hash=tokenizer_hash,
            tar_fingerprint=tar_fingerprint,
        )

    def save(self, path: Path) -> None:
        """Write the index, complete or not at all."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        file = open(temporary, "wb")  # noqa: SIM115  publish closes it
        np.savez(file, version=np.int64(VERSION), **{field.name: getattr(self, field.name) for field in fields(self)})
        publish(file, temporary, path)

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Read an index. Raises ValueError if the file is not one of this version."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                if int(stored["version"]) != VERSION:
                    raise ValueError(f"version {int(stored['version'])}, expected {VERSION}")
                columns = {field.name: stored[field.name] for field in fields(cls)}
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a readable index: {error}") from error
        columns["source_names"] = tuple(columns["source_names"].tolist())
        for name in ("tokenizer_hash", "tar_fingerprint"):
            columns[name] = str(columns[name])
        return cls(**columns)


def load_index(
    tar_path: str | Path, tokenizer: PreTrainedTokenizerBase, cache_dir: str | Path | None = None
) -> ShardIndex:
    """The index of a shard, from beside it or from `cache_dir`; built into `cache_dir` where neither fits.

    An index fits if it is of this tar (size and both ends compared) and was counted with this tokenizer. Raises
    FileNotFoundError without a tar, ValueError if an index would have to be built and there is no `cache_dir`.
    """
    tar_path = Path(tar_path)
    if not tar_path.is_file():
        raise FileNotFoundError(f"shard {tar_path} does not exist")
    expected = (tokenizer_hash(tokenizer), fingerprint(tar_path))
    candidates = [tar_path.with_suffix(".idx")]
    if cache_dir is not None:
        unique = zlib.crc32(str(tar_path.resolve()).encode())
        candidates.append(Path(cache_dir) / f"{tar_path.stem}-{unique:08x}-{expected[0]}.idx")
    reasons = []
    for path in candidates:
        index, reason = _fitting(path, expected)
        if index is not None:
            return index
        reasons.append(reason)
    if cache_dir is None:
        raise ValueError(
            f"shard {tar_path} has no usable index: {reasons[0]}; name a folder to build indexes in "
            f"(data.cache_dir of a run, --cache-dir of launch/evaluate.py)"
        )
    logger.warning("building the index of %s in %s: %s", tar_path, cache_dir, reasons[0])
    index = build_index(tar_path, tokenizer)
    candidates[-1].parent.mkdir(parents=True, exist_ok=True)
    index.save(candidates[-1])
    return index


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


def build_index(tar_path: str | Path, tokenizer: PreTrainedTokenizerBase) -> ShardIndex:
    """Index a tar by reading it through. Samples that cannot be used are left out and logged with key and reason.

    Frames are `{key}.000.jpg`, `{key}_000.jpg` or one `{key}.jpg`; metadata is `{key}.json`. Raises ValueError for a
    tar of whole videos.
    """
    tar_path = Path(tar_path)
    places, metas = _members(tar_path)
    frames = defaultdict(dict)
    for stem, place in places.items():
        numbered = _FRAME.fullmatch(stem)
        key, number = (stem, 0) if stem in metas or not numbered else (numbered[1], int(numbered[2]))
        frames[key][number] = place
    rows = []
    for key, (place, content) in metas.items():
        try:
            rows.append(_index_row(key, place, content, frames.get(key, {}), tokenizer))
        except SampleError as error:
            logger.warning("%s, %s: left out: %s", tar_path, key, error)
    return ShardIndex.from_rows(rows, tokenizer_hash(tokenizer), fingerprint(tar_path))


def _members(tar_path: Path) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[tuple[int, int], bytes]]]:
    """(offset, size) of every JPEG by stem; the same and the content of every JSON."""
    pictures, metas = {}, {}
    size = tar_path.stat().st_size
    with tarfile.open(tar_path, "r:") as tar:
        try:
            for member in tar:
                stem, extension = os.path.splitext(member.name)
                place = (member.offset_data, member.size)
                if not member.isfile() or sum(place) > size:
                    continue
                if extension.lower() in _MEDIA:
                    raise ValueError(
                        f"{tar_path} holds videos ({member.name}); prepare them into shards of frames first"
                    )
                if extension == ".json":
                    metas[stem] = (place, tar.extractfile(member).read())
                elif extension.lower() in (".jpg", ".jpeg"):
                    pictures[stem] = place
        except tarfile.TarError as error:
            logger.warning("%s is damaged, what follows is left out: %s", tar_path, error)
    return pictures, metas


def _index_row(key: str, place: tuple[int, int], content: bytes, frames: dict[int, tuple], tokenizer) -> IndexRow:
    try:
        meta = json.loads(content)
    except ValueError as error:
        raise SampleError("bad_json", str(error)) from error
    if not isinstance(meta, dict):
        raise SampleError("bad_json", "expected an object of fields")
    first = min(frames, default=0)  # some pipelines count frames from 1
    count = meta.get("frame_count", len(frames))
    if sorted(frames) != list(range(first, first + len(frames))) or count != len(frames):
        raise SampleError("missing_frames", f"frames {sorted(frames)}, expected {count}")
    kind = meta.get("kind")
    if kind not in KINDS:
        kind = "text" if not frames else "image" if len(frames) == 1 and not meta.get("duration") else "video"
    counts = text_counts(meta | {"kind": kind, "frame_count": len(frames)}, tokenizer)
    return IndexRow(key, meta, kind, counts, place, [frames[i] for i in sorted(frames)])


def fingerprint(tar_path: Path) -> str:
    """Changes when the tar does: its size and a checksum of both ends."""
    with open(tar_path, "rb") as file:
        head = file.read(4096)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 65536))  # reaches beyond the padding that ends a tar
        return f"{size}-{zlib.crc32(file.read(), zlib.crc32(head)):08x}"


def publish(file: BinaryIO, temporary: Path, path: Path) -> None:
    """Close a written file, on disk before it gets its name."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(temporary, path)


def _seconds(meta: Mapping) -> float:
    duration = meta.get("duration")
    return float(duration) if isinstance(duration, (int, float)) else 0.0
