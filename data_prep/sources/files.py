"""Annotation files as they are published, row by row and in constant memory: CSV, JSON, JSONL and parquet."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from fvlm.data.errors import SampleError

MAX_ROW_BYTES = 64 << 20
"""A line, or a file that is one JSON object, of more bytes is refused unread."""
_CHUNK = 1 << 20  # characters of JSON read at a time
_PARQUET_BATCH = 256  # rows held at a time
_BETWEEN = re.compile(r"[\s,]*")  # elements of a list


@dataclass(frozen=True, slots=True)
class Record:
    """One row of an annotation file, or what was wrong where one should have been."""

    file: Path
    number: int
    """Position in the file, from 0."""
    where: str
    """The same for people: "line 12", "item 3", "row 7"."""
    fields: dict | SampleError
    """Column name to value."""


def read_records(file: Path, columns: Sequence[str] = ()) -> Iterator[Record]:
    """Every row of a file, in order. A row that cannot be read holds its SampleError, and reading goes on after it;
    where nothing can be told apart any more, one such row ends the file.

    `columns` names what to read of a parquet file: without the bytes of pictures, which `data_prep.packed` fetches.
    Raises ValueError for another kind of file.
    """
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise ValueError(f"{file}: expected one of {', '.join(_READERS)}")
    for number, (where, fields) in enumerate(reader(file, columns)):
        yield Record(file, number, where, fields)


def count_records(file: Path) -> int:
    """How many rows `read_records` gives (of a damaged file: about how many)."""
    if file.suffix.lower() == ".parquet":
        try:
            return pq.read_metadata(file).num_rows
        except (pa.ArrowException, OSError):
            return 1
    return sum(1 for _ in read_records(file))


def digest_files(files: Sequence[Path], folder: Path) -> str:
    """Changes when the files do (64 hex digits): names and contents, of parquet files the size and the footer.

    A parquet footer says where every column lies, how long it is and what its values range over; the pictures beside
    the text, terabytes of them, are not read.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder) if file.is_relative_to(folder) else file.name}\0".encode())
        with open(file, "rb") as opened:
            if file.suffix.lower() == ".parquet":
                digest.update(_footer(opened))
            else:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _footer(file: BinaryIO) -> bytes:
    """Size and footer of a parquet file; of a damaged one as much of its end."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(4), "little")  # the last bytes are the footer's length and "PAR1"
    file.seek(max(0, size - 8 - min(length, MAX_ROW_BYTES)))
    return size.to_bytes(8, "little") + file.read()


Rows = Iterator[tuple[str, dict | SampleError]]


def _csv(file: Path, _: Sequence[str]) -> Rows:
    # bytes that are not UTF-8 become surrogates, which the text's check refuses: only their row is lost
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        reader = csv.reader(opened)
        header = next(reader, [])
        while True:
            line = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # a quote that never closes, say
                yield f"lines {line} to {reader.line_num}", SampleError("bad_csv", str(error))
                continue
            if not values:
                continue
            if len(values) == len(header):
                yield f"line {line}", dict(zip(header, values, strict=True))
            else:
                detail = f"{len(values)} values, expected {len(header)}: {', '.join(map(repr, header)):.300}"
                yield f"line {line}", SampleError("wrong_columns", detail)


def _jsonl(file: Path, _: Sequence[str]) -> Rows:
    with open(file, "rb") as opened:
        number = 0
        while line := opened.readline(MAX_ROW_BYTES):
            number += 1
            if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = opened.readline(MAX_ROW_BYTES)
                yield f"line {number}", SampleError("too_large", f"a line of more than {MAX_ROW_BYTES} bytes")
            elif line.strip():
                yield f"line {number}", _object(line)


def _object(content: bytes | str) -> dict | SampleError:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        return SampleError("bad_json", str(error))
    return _checked(fields)


def _checked(fields: object) -> dict | SampleError:
    if isinstance(fields, dict):
        return fields
    return SampleError("bad_json", f"expected an object, found {type(fields).__name__}")


def _json(file: Path, _: Sequence[str]) -> Rows:
    """The elements of a list, or a file that is one object."""
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as opened:
        start = opened.read(_CHUNK).lstrip()
        if not start.startswith("["):
            content = start + opened.read(MAX_ROW_BYTES)
            large = SampleError("too_large", f"an object of more than {MAX_ROW_BYTES} characters")
            yield "item 0", _object(content) if len(content) <= MAX_ROW_BYTES else large
            return
        number = 0
        try:
            for element in _elements(opened, start[1:]):
                yield f"item {number}", _checked(element)
                number += 1
        except (ValueError, RecursionError) as error:
            yield f"item {number}", SampleError("bad_json", f"{error}; the rest of the file is left out")


def _elements(opened: TextIO, buffer: str) -> Iterator[object]:
    """Elements of a JSON list whose text is `buffer` and then the rest of the file.

    Raises ValueError where an element cannot be read, RecursionError where it is nested too deeply.
    """
    decoder, at, step, ended = json.JSONDecoder(), 0, _CHUNK, False
    while True:
        at = _BETWEEN.match(buffer, at).end()
        if buffer.startswith("]", at):
            return
        try:
            element, end = decoder.raw_decode(buffer, at)
            if end < len(buffer):
                yield element
                at, step = end, _CHUNK
                continue
            failure = ValueError("the list does not end")
        except ValueError as error:  # or only cut off: with more of the file it may be well
            failure = error
        if ended or len(buffer) - at > MAX_ROW_BYTES:
            raise failure
        more = opened.read(step)
        ended, step = not more, 2 * step  # doubled, so that a long element is not read over and over
        buffer, at = buffer[at:] + more, 0


def _parquet(file: Path, columns: Sequence[str]) -> Rows:
    number = 0
    try:
        with pq.ParquetFile(file, memory_map=True, pre_buffer=False) as opened:
            leaves = [opened.schema.column(i).path for i in range(len(opened.schema))]
            wanted = [path for path in leaves if path.split(".")[0] in columns and path.split(".")[-1] != "bytes"]
            for batch in opened.iter_batches(_PARQUET_BATCH, columns=wanted, use_threads=False):
                for fields in batch.to_pylist():
                    yield f"row {number}", fields
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield f"row {number}", SampleError("broken_parquet", f"{error}; the rest of the file is left out")


_READERS: dict[str, Callable[[Path, Sequence[str]], Rows]] = {
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
