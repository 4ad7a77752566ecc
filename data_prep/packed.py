"""Media that lie inside parquet files: references to them, and reading them without holding a file's worth of them.

A reference is `path/to/train-0.parquet#row=12&column=images&item=0`: the bytes of one picture of a list (or of a
single picture: item 0) in one row. Data sets of hundreds of gigabytes are prepared without being unpacked first.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fvlm.data.clip import in_memory
from fvlm.data.errors import MediaError

_REFERENCE = re.compile(r"(.+\.parquet)#row=(\d+)&column=([^&]+)&item=(\d+)", re.DOTALL)
_BATCH = 4  # rows of pictures held at a time
MAX_GROUP_BYTES = 4 << 30
"""Pages may be as large as a row group, and reading one holds it twice: a larger group is refused."""


def reference(file: Path, row: int, column: str, item: int) -> str:
    """Name one picture inside a parquet file."""
    return f"{file}#row={row}&column={column}&item={item}"


class PackedMedia:
    """Opens media by path or reference. Rows asked for in their order are read in one pass over the file."""

    def __init__(self):
        self._column: _Column | None = None

    @contextmanager
    def file(self, media: str) -> Iterator[str]:
        """A path to read a medium from: its own, or that of a copy in memory for as long as the context lasts.

        Raises MediaError `missing_file`, `broken_parquet`, `missing_bytes` or `too_large`; one raised inside names the
        reference in the place of the copy.
        """
        place = _REFERENCE.fullmatch(media)
        if place is None:
            yield media
            return
        with in_memory(self._bytes(media, *place.groups()), media) as path:
            yield str(path)

    def _bytes(self, media: str, file: str, row: str, column: str, item: str) -> bytes:
        if not Path(file).is_file():
            raise MediaError("missing_file", f"{file} does not exist or is not a file")
        try:
            if self._column is None or (self._column.file, self._column.name) != (file, column):
                self._column = _Column(file, column)
            content = self._column.read(int(row), int(item))
        except (pa.ArrowException, OSError, LookupError) as error:
            self._column = None  # what it holds may be half a step on
            raise MediaError("broken_parquet", f"{media}: {error}") from error
        if not content:
            raise MediaError("missing_bytes", f"{media}: the row holds no bytes of the picture")
        return content


class _Column:
    """A column of pictures, read forward; stepping back begins its row group anew."""

    def __init__(self, file: str, name: str):
        self.file, self.name = file, name
        self._parquet = pq.ParquetFile(file, memory_map=True, pre_buffer=False)
        schema, metadata = self._parquet.schema, self._parquet.metadata
        paths = [schema.column(i).path for i in range(len(schema))]
        self._leaves = [path for path in paths if path == name or re.fullmatch(rf"{re.escape(name)}\..*bytes", path)]
        if len(self._leaves) != 1:
            raise LookupError(f"column {name} has no bytes: there is {', '.join(paths)}")
        counts = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        self._starts = list(accumulate(counts, initial=0))  # of the row groups, and the end
        self._next, self._end, self._batch = 0, 0, None
        """Rows [next - batch, next) are at hand; the open row group ends at `end`."""

    def read(self, row: int, item: int) -> bytes | None:
        """Bytes of a picture, None if there are none. Raises LookupError if there is no such row or item."""
        if row >= self._starts[-1]:
            raise LookupError(f"there are only {self._starts[-1]} rows")
        held = len(self._batch) if self._batch is not None else 0
        if not self._next - held <= row < self._end:
            self._open_group(bisect_right(self._starts, row) - 1)
        while row >= self._next:
            batch = next(self._batches, None)
            if batch is None:
                raise LookupError(f"the row group ends before row {row}")
            self._batch, self._next = batch.column(0), self._next + len(batch)
        pictures = self._batch[row - self._next + len(self._batch)].as_py()
        pictures = pictures if isinstance(pictures, list) else [pictures]
        picture = pictures[item]
        return picture["bytes"] if isinstance(picture, dict) else picture

    def _open_group(self, group: int) -> None:
        metadata = self._parquet.metadata.row_group(group)
        sizes = {metadata.column(i).path_in_schema: metadata.column(i) for i in range(metadata.num_columns)}
        size = sizes[self._leaves[0]].total_uncompressed_size
        if size > MAX_GROUP_BYTES:
            found = f"row group {group} holds {size} bytes of {self.name}, more than {MAX_GROUP_BYTES}"
            raise MediaError("too_large", f"{self.file}: {found}; rewrite the file with smaller row groups")
        self._batch, self._next, self._end = None, self._starts[group], self._starts[group + 1]
        self._batches = self._parquet.iter_batches(_BATCH, [group], columns=self._leaves, use_threads=False)
