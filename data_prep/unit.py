"""One unit of preparation: the rows of one shard, from media files to the shard and a record of what happened."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from data_prep.packed import PackedMedia
from data_prep.sources import Row
from fvlm.data.chat import load_tokenizer
from fvlm.data.errors import MediaError, SampleError
from fvlm.data.shard import ShardWriter
from fvlm.data.shard_index import complete, fingerprint
from fvlm.data.video import Media, encode_jpeg, read_media

RECORDS = ".prepare"  # folder of the records, inside the output folder
READING = ".reading-"  # begins the names of files there that say what a task is reading


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every unit shares."""

    out: Path
    size: int
    max_frames: int
    tokenizer: str
    samples_per_shard: int


@dataclass(frozen=True, slots=True)
class Unit:
    """The rows of one shard."""

    number: int
    rows: tuple[Row, ...]

    def tar(self, job: Job) -> Path:
        return job.out / f"shard-{self.number:06d}.tar"

    def record(self, job: Job) -> Path:
        return job.out / RECORDS / f"shard-{self.number:06d}.json"


def units(rows: Iterator[Row], samples_per_shard: int) -> Iterator[Unit]:
    """Consecutive runs of rows: unit i has rows [i * n, (i + 1) * n)."""
    batch, number = [], 0
    for row in rows:
        batch.append(row)
        if len(batch) == samples_per_shard:
            yield Unit(number, tuple(batch))
            batch, number = [], number + 1
    if batch:
        yield Unit(number, tuple(batch))


def finished(job: Job, unit: Unit) -> dict | None:
    """The record of a unit that was completed before and whose shard is as it was written; else None."""
    try:
        record = json.loads(unit.record(job).read_text())
    except (FileNotFoundError, ValueError):
        return None
    if record["fingerprint"] is None:  # every row was skipped
        return record
    tar = unit.tar(job)
    complete = tar.is_file() and tar.with_suffix(".idx").is_file() and fingerprint(tar) == record["fingerprint"]
    return record if complete else None


def write_unit(job: Job, unit: Unit, lost: dict[str, str], report: Callable[[int, str | None], None]) -> dict:
    """Write the shard of a unit and its record, which is returned.

    `lost` maps files not to be touched to the reason (they brought a process down before). `report` is called with the
    number of rows done and the file that is about to be read, or None where what follows is no file's doing. Raises
    OSError, with the file that could not be written.
    """
    try:
        record = _write_shard(job, unit, lost, report)
        write_json(unit.record(job), record)
    except OSError as error:
        error.filename = error.filename or str(unit.tar(job))  # a write that fails does not say of which file
        raise
    return record


def _write_shard(job: Job, unit: Unit, lost: dict[str, str], report: Callable[[int, str | None], None]) -> dict:
    record = {"samples": 0, "frames": 0, "by_source": {}, "by_kind": {}, "skipped": [], "warnings": []}
    by_source, by_kind = Counter(), Counter()
    reader = _MediaReader(job, lost, report)
    with ShardWriter(job.out, _tokenizer(job.tokenizer), len(unit.rows) + 1, first_shard=unit.number) as writer:
        for done, row in enumerate(unit.rows):
            try:
                if row.refused:
                    raise SampleError(*row.refused)
                kind, duration, jpegs = reader.read(done, row)
                meta = {"key": row.key, "kind": kind, "duration": duration, "frame_count": len(jpegs)} | row.meta
                _check_frames(meta)
                writer.write(meta, jpegs)
            except (SampleError, MediaError) as error:
                file = getattr(error, "file", row.media[0] if row.media else None)
                record["skipped"].append({"key": row.key, "file": file, "reason": error.reason, "detail": error.detail})
                continue
            by_source[row.meta["source"]] += 1
            by_kind[kind] += 1
            record["samples"] += 1
            record["frames"] += len(jpegs)
            record["warnings"] += [{"key": row.key, **warning} for warning in reader.warnings]
        report(len(unit.rows), None)
        tar = writer.close()
    if tar is None:  # a run that was killed may have found samples, and since then their files are gone
        for file in (unit.tar(job), unit.tar(job).with_suffix(".idx")):
            file.unlink(missing_ok=True)
    return record | {
        "by_source": dict(by_source),
        "by_kind": dict(by_kind),
        "fingerprint": fingerprint(tar) if tar else None,
    }


_tokenizer = lru_cache(maxsize=1)(load_tokenizer)


class _MediaReader:
    """Reads the media of rows; rows in a row that share them share the work."""

    def __init__(self, job: Job, lost: dict[str, str], report: Callable[[int, str | None], None]):
        self._job, self._lost, self._packed = job, lost, PackedMedia()
        self._report, self._told = report, None
        self._media: tuple[str, ...] | None = None
        self._outcome: tuple | MediaError | None = None
        self.warnings: list[dict] = []
        """What was wrong with files of the last row that could be read all the same: file, detail."""

    def read(self, done: int, row: Row) -> tuple[str, float, list[bytes]]:
        """(kind, duration in seconds, JPEG frames) of row `done`. Raises MediaError, with the file as its `file`."""
        if self._media != row.media:
            self.warnings = []
            self._media, self._outcome = row.media, self._read(done, row.media)
        else:
            self._tell(done, None)
        if isinstance(self._outcome, MediaError):
            raise self._outcome
        return self._outcome

    def _tell(self, done: int, file: str | None) -> None:
        """A file is responsible for what happens until the next is read, or a row comes that reads none."""
        if file is not None or self._told is not None:
            self._report(done, file)
        self._told = file

    def _read(self, done: int, files: tuple[str, ...]) -> tuple | MediaError:
        jpegs, kind, duration = [], "text", 0.0
        if not files:
            self._tell(done, None)
        for file in files:
            try:
                self._tell(done, None if file in self._lost else file)
                media = self._decode(file)
                if len(files) > 1 and media.kind == "video":
                    raise MediaError("video_among_several", f"{file}: a list of media may hold stills only")
            except MediaError as error:
                error.file = file
                return error
            kind, duration = media.kind if len(files) == 1 else "images", media.duration
            jpegs += [encode_jpeg(frame) for frame in media.frames]
            self.warnings += [{"file": file, "detail": warning} for warning in media.warnings]
        return kind, duration, jpegs

    def _decode(self, file: str) -> Media:
        if file in self._lost:
            raise MediaError(self._lost[file], f"{file}: reading it took the process down")
        try:
            with self._packed.file(file) as path:
                return read_media(path, self._job.size, self._job.max_frames)
        except MemoryError as error:
            raise MediaError("out_of_memory", f"{file}: there is too little memory to read it") from error


def _check_frames(meta: dict) -> None:
    look_at = meta.get("look_at")
    if look_at is not None and len(look_at) != meta["frame_count"]:
        raise SampleError("bad_look_at", f"{len(look_at)} entries for {meta['frame_count']} frames")


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
