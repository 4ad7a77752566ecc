"""A folder of media files and a JSONL manifest: the way to bring one's own data.

Each line is an object: `media` (a path, or a list of them, relative to the manifest; absent for text), the text as
`user` and `assistant`, or `turns`, or `chosen` and `rejected`, and optionally `key` (or `id`), `source`, `narration`,
`stream` (true: nobody asked, the narration starts with the first frame), `options` with `answer`, `look_at`, `tags`,
`url` (where each of `media` can be downloaded).
Whether a file is a video or a still is found from the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.sources.row import Row, check_text, clean_key
from fvlm.data.errors import SampleError

_STRINGS = ("user", "assistant", "chosen", "rejected", "source")
_LISTS = ("turns", "narration", "options", "look_at", "tags")
_CELLS = 4  # rows and columns of the grid that `look_at` points into


class FolderSource:
    """Rows of a manifest. Raises FileNotFoundError if there is no such file.

    Media are looked for beside the manifest, or in the folder `media` if one is given.
    """

    NAME = "folder"
    LICENCE = "as of the files in the folder"
    CITATION = ""
    HOMEPAGE = ""

    def __init__(self, folder: Path | None, manifest: Path, media: Path | None = None):
        places = [folder / manifest, manifest] if folder else [manifest]
        found = [path for path in places if path.is_file()]
        if not found:
            raise FileNotFoundError(f"manifest {' or '.join(map(str, places))} does not exist")
        self.manifest = found[0]
        self.media = self.manifest.parent if media is None else media

    def digest(self) -> str:
        """Changes when the rows do (16 hex digits)."""
        with open(self.manifest, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    def count(self) -> int:
        """Number of rows."""
        with open(self.manifest, "rb") as file:
            return sum(1 for line in file if line.strip())

    def rows(self) -> Iterator[Row]:
        """Every row in order, those that cannot be used with the reason."""
        seen = set()
        with open(self.manifest, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = self._row(number, line)
                if row.key in seen:
                    row = Row(f"line-{number}", row.media, row.meta, ("duplicate_key", f"key {row.key} came before"))
                seen.add(row.key)
                yield row

    def _row(self, number: int, line: bytes) -> Row:
        key, media, meta = f"line-{number}", (), {}
        try:
            fields = _parse(line)
            key = _key(fields, default=key)
            media, meta = _media(fields, self.media), _meta(fields)
            check_text(meta)
        except SampleError as error:
            return Row(key, media, meta, (error.reason, f"{self.manifest}, line {number}: {error.detail}"))
        return Row(key, media, meta, urls=_urls(fields, len(media)))


def _parse(line: bytes) -> dict:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", str(error)) from error
    if not isinstance(fields, dict):
        raise SampleError("bad_json", f"expected an object, found {type(fields).__name__}")
    return fields


def _key(fields: dict, default: str) -> str:
    given = fields.get("key", fields.get("id", default))
    if not isinstance(given, (str, int)) or given == "":
        raise SampleError("wrong_type", f"key: expected a string, found {given!r}")
    return clean_key(str(given))


def _media(fields: dict, folder: Path) -> tuple[str, ...]:
    media = fields.get("media") or []
    media = [media] if isinstance(media, str) else media
    if not isinstance(media, list) or not all(isinstance(path, str) and path for path in media):
        raise SampleError("wrong_type", f"media: expected a path or a list of paths, found {fields['media']!r}")
    return tuple(str(folder / path) for path in media)


def _urls(fields: dict, count: int) -> tuple[str, ...]:
    """Addresses of the media, one each; none unless the row has them all (preparation does not need them)."""
    urls = fields.get("url") or []
    urls = [urls] if isinstance(urls, str) else urls
    whole = isinstance(urls, list) and len(urls) == count and all(isinstance(url, str) for url in urls)
    return tuple(urls) if whole else ()


def _meta(fields: dict) -> dict:
    for name in _STRINGS:
        if not isinstance(fields.get(name, ""), str):
            raise SampleError("wrong_type", f"{name}: expected a string, found {type(fields[name]).__name__}")
    for name in _LISTS:
        if not isinstance(fields.get(name, []), list):
            raise SampleError("wrong_type", f"{name}: expected a list, found {type(fields[name]).__name__}")
    _check_each(fields, "narration", lambda said: isinstance(said, str), "a string")
    _check_each(fields, "look_at", _is_place, f"null or [row, column] of 0 to {_CELLS - 1}")
    if not isinstance(fields.get("stream", False), bool):
        raise SampleError("wrong_type", f"stream: expected true or false, found {fields['stream']!r}")
    known = ("source", "user", "assistant", "turns", "chosen", "rejected", *_LISTS[1:], "answer", "stream")
    return {"source": "folder"} | {name: fields[name] for name in known if name in fields}


def _check_each(fields: dict, name: str, fits: Callable[[object], bool], expected: str) -> None:
    for frame, entry in enumerate(fields.get(name, [])):
        if not fits(entry):
            raise SampleError("wrong_type", f"{name}, frame {frame}: expected {expected}, found {entry!r}")


def _is_place(entry: object) -> bool:
    cell = isinstance(entry, list) and len(entry) == 2 and all(type(at) is int and 0 <= at < _CELLS for at in entry)
    return entry is None or cell
