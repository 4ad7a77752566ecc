"""What the adapters of published data sets share: finding files, going through rows, refusing with a reason."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

from data_prep.packed import reference
from data_prep.sources.conversation import as_text
from data_prep.sources.files import Record, count_records, digest_files, read_records
from data_prep.sources.row import Row, check_text, clean_key
from fvlm.data.chat import SOURCE_PROMPTS
from fvlm.data.errors import SampleError


class Sample(NamedTuple):
    """What an adapter makes of one row."""

    media: tuple[str, ...]
    meta: dict
    urls: tuple[str, ...] = ()


class PublishedSource:
    """Rows of a data set as it is published, in the files of `folder`, media in `media` (default: the same folder).

    `manifest` names one annotation file (inside the folder or by its own path) instead of all that are published.
    Captions, which come without a question, are asked for with the source's prompt.
    Raises FileNotFoundError if there is no such file.
    """

    NAME: ClassVar[str]
    """Of the source, in rows, mixtures and losses."""
    LICENCE: ClassVar[str]
    CITATION: ClassVar[str]
    HOMEPAGE: ClassVar[str]
    FILES: ClassVar[tuple[str, ...]]
    """Patterns of annotation files below the folder: those of the first that finds any."""
    COLUMNS: ClassVar[tuple[str, ...]] = ()
    """Of parquet files: what to read."""
    ID: ClassVar[str] = ""
    """The field that names a row, where there is one; it becomes a part of the key."""
    VERSION: ClassVar[int] = 1
    """To be raised when the same files are to give other rows: shards made before are then not continued."""

    def __init__(self, folder: Path | None, manifest: Path | None = None, media: Path | None = None):
        self.folder = Path(folder) if folder else manifest.parent
        self.media = Path(media) if media else self.folder
        self.files = self._find(manifest)

    def _find(self, manifest: Path | None) -> list[Path]:
        if manifest:
            places = [self.folder / manifest, Path(manifest)]
            found = [path for path in places if path.is_file()][:1]
            missing = f"annotation file {' or '.join(map(str, places))} does not exist"
        else:
            found = next(filter(None, (sorted(self.folder.glob(pattern)) for pattern in self.FILES)), [])
            missing = f"no annotation file of {self.NAME} in {self.folder}: expected {' or '.join(self.FILES)}"
        if not found:
            raise FileNotFoundError(f"{missing}; the files are published at {self.HOMEPAGE}")
        return found

    def digest(self) -> str:
        """Changes when the rows do (16 hex digits)."""
        made_by = [self.NAME, self.VERSION, SOURCE_PROMPTS.get(self.NAME), digest_files(self.files, self.folder)]
        return hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:16]

    def count(self) -> int:
        """Number of rows."""
        return sum(map(count_records, self.files))

    def rows(self) -> Iterator[Row]:
        """Every row in order, those that cannot be used with the reason."""
        number = 0
        for file in self.files:
            for record in read_records(file, self.COLUMNS):
                for part in self.split(record):
                    yield self._row(number, part)
                    number += 1

    def split(self, record: Record) -> Iterator[Record]:
        """The rows of one record, where there may be several."""
        yield record

    def sample(self, record: Record) -> Sample:
        """Media and metadata of one row. Raises SampleError where a field is not as it is published."""
        raise NotImplementedError

    def _row(self, number: int, record: Record) -> Row:
        key = f"{self.NAME}-{number}"  # unique without remembering every key there was
        try:
            if isinstance(record.fields, SampleError):
                raise record.fields
            name = record.fields.get(self.ID)
            if isinstance(name, (str, int)) and name != "":
                key = clean_key(f"{key}-{str(name).removesuffix('.mp4')}")
            media, meta, urls = self.sample(record)
            check_text(meta)
        except SampleError as error:
            return Row(key, refused=(error.reason, f"{record.file}, {record.where}: {error.detail}"))
        user = {"user": SOURCE_PROMPTS[self.NAME]} if self.NAME in SOURCE_PROMPTS else {}
        return Row(key, media, {"source": self.NAME} | user | meta, urls=urls)

    def text(self, record: Record, name: str) -> str:
        """A string field. Raises SampleError, with the fields there are if there is none of this name."""
        fields = record.fields
        if fields.get(name) is None:
            raise SampleError(
                "missing_field", f"{name}: there is only {', '.join(map(repr, fields)) or 'nothing':.300}"
            )
        return as_text(fields[name], name)

    def path(self, *parts: str) -> str:
        """A media file by its published path. Raises SampleError `bad_path` for one that leads out of the media."""
        relative = "/".join(as_text(part, "path") for part in parts if part)
        if not parts[-1] or relative.startswith("/") or ".." in relative.split("/") or "\0" in relative:
            raise SampleError("bad_path", f"{relative!r}: expected a path inside the folder of the media")
        return os.path.join(self.media, os.path.normpath(relative))

    def subset(self, record: Record) -> str:
        """The folder that the annotation file lies in, where that is one below the data set's."""
        folder = record.file.parent
        return folder.name if folder != self.folder else ""

    def packed(self, record: Record, column: str) -> tuple[str, ...]:
        """References to the pictures that lie in a parquet column, one or a list of them."""
        if column not in record.fields:
            raise SampleError("missing_field", f"{column}: there is only {', '.join(map(repr, record.fields)):.300}")
        pictures = record.fields[column]
        pictures = pictures if isinstance(pictures, list) else [pictures]
        if not pictures or None in pictures:
            raise SampleError("missing_media", f"{column}: there is no picture")
        return tuple(reference(record.file, record.number, column, item) for item in range(len(pictures)))
