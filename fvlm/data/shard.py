"""Shards: tar files of samples, each with an index that says where everything is and how long every sample is.

A shard is a webdataset tar with members `{key}.000.jpg`, `{key}.001.jpg`, ..., `{key}.json`, and beside it an `.idx`
file (numpy's npz). Training plans from indexes alone and reads samples by offset. Tars from elsewhere with members
`{key}_000.jpg` or `{key}.jpg` and a JSON of `user` and `assistant`, or with `{key}.mp4` and `{key}.txt`, read as they
are, once `shard_index` has been there.
"""

from __future__ import annotations

import glob
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from webdataset.writer import TarWriter

from fvlm.data.chat import text_counts, tokenizer_hash
from fvlm.data.clip import Clip
from fvlm.data.content import Piece, checksum
from fvlm.data.errors import SampleError
from fvlm.data.shard_index import ShardIndex, build_index, fingerprint, load_index, publish, temporary_name
from fvlm.data.shard_rows import KINDS, IndexRow, parse_meta, sample_tags, video_meta

__all__ = ["KINDS", "ShardIndex", "ShardReader", "ShardWriter", "build_index", "find_shards", "load_index"]

_KEY = re.compile(r"[A-Za-z0-9_+=@-]{1,80}")  # no dot: webdataset's keys end at the first one
_BLOCK = 512  # of a tar file


class ShardWriter:
    """Writes `shard-000000.tar` and its index, then the next one after `samples_per_shard` samples.

    A shard appears under its name complete or not at all; its bytes depend on the samples only. Use as a context
    manager: leaving by an exception drops the unfinished shard.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        samples_per_shard: int = 1000,
        first_shard: int = 0,
    ):
        self._folder, self._tokenizer = Path(folder), tokenizer
        self._samples_per_shard, self._number = samples_per_shard, first_shard
        self._hash = tokenizer_hash(tokenizer)
        self._rows: list[IndexRow] = []
        self._tar: TarWriter | None = None
        self._folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
        else:
            self._drop()

    def write(self, meta: Mapping, jpegs: Sequence[bytes]) -> None:
        """Add a sample: metadata (docs/data.md, with `key`, `kind` and `frame_count`) and its frames.

        Raises SampleError, and writes nothing, if the sample could not be trained on.
        """
        key, kind = meta["key"], meta["kind"]
        if not _KEY.fullmatch(key):
            raise SampleError("bad_key", f"key {key!r}: expected 1 to 80 of the characters A-Z a-z 0-9 _ + = @ -")
        if kind not in KINDS or meta["frame_count"] != len(jpegs) or (kind == "text") != (not jpegs):
            found = f"kind {kind!r}, frame_count {meta['frame_count']}, {len(jpegs)} frames"
            raise SampleError("bad_frames", f"key {key!r}: {found}; expected a kind of {KINDS} and as many frames")
        counts = text_counts(meta, self._tokenizer)
        sample_tags(meta)
        try:
            content = json.dumps(meta, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise SampleError("bad_text", f"key {key!r}: {error}") from error
        names = [f"{i:03d}.jpg" for i in range(len(jpegs))]
        contents = [*jpegs, content]
        pieces = [Piece.of(*each) for each in zip(contents, self._add(key, names, contents), strict=True)]
        self._rows.append(IndexRow(key, meta, kind, counts, pieces[-1], pieces[:-1]))
        if len(self._rows) == self._samples_per_shard:
            self.close()

    def close(self) -> Path | None:
        """Publish the current shard, if it has samples, and return its path; `write` would begin the next one."""
        if self._tar is None:
            return None
        self._tar.close()
        self._file.flush()
        path = self._folder / f"shard-{self._number:06d}.tar"
        index = ShardIndex.from_rows(self._rows, self._hash, fingerprint(self._temporary))
        index.save(path.with_suffix(".idx"))
        publish(self._file, self._temporary, path)  # last: a tar under its name has its index
        self._tar, self._rows, self._number = None, [], self._number + 1
        return path

    def _add(self, key: str, names: list[str], contents: list[bytes]) -> list[int]:
        if self._tar is None:
            self._temporary = temporary_name(self._folder / f"shard-{self._number:06d}.tar")
            self._file = open(self._temporary, "wb")  # noqa: SIM115  closed by publish or _drop
            self._tar = TarWriter(self._file, encoder=False, mtime=0)
        position, offsets = self._tar.tarstream.offset, []
        for content in contents:  # names sort as they are listed, and TarWriter writes them sorted
            offsets.append(position + _BLOCK)
            position += _BLOCK + -(-len(content) // _BLOCK) * _BLOCK
        self._tar.write({"__key__": key, **dict(zip([*names, "json"], contents, strict=True))})
        if self._tar.tarstream.offset != position:
            raise RuntimeError(f"tar of {key!r} ends at {self._tar.tarstream.offset}, expected {position}")
        return offsets

    def _drop(self) -> None:
        if self._tar is not None:
            self._temporary.unlink(missing_ok=True)
            for each in (self._tar, self._file):
                with suppress(OSError):  # a full disk does not take the rest of it, which is not wanted anyway
                    each.close()
            self._tar = None


class ShardReader:
    """Reads samples of one shard by row of its index. Safe to copy into other processes before the first read."""

    def __init__(self, tar_path: str | Path, index: ShardIndex):
        self._path, self._index = Path(tar_path), index
        self._descriptor: int | None = None

    def read(self, row: int) -> tuple[dict, list[bytes] | Clip]:
        """Metadata, with `key`, `kind` and `frame_count` as the index says, and the JPEG of every frame or the video.

        Raises SampleError `truncated_shard`, `changed_bytes` (not those that were indexed), `bad_json` or `bad_text`.
        """
        index, where = self._index, f"{self._path}, {self._index.keys[row]}"
        content = self._bytes(where, index.json_offset[row], index.json_size[row])
        frames = range(index.first_frame[row], index.first_frame[row + 1])
        media = [self._bytes(where, index.frame_offset[i], index.frame_size[i]) for i in frames]
        from_video = index.from_video[row]
        text = [self._bytes(where, index.text_offset[row], index.text_size[row])] if from_video else []
        if checksum(map(zlib.crc32, [content, *text, *media])) != index.checksum[row]:
            raise SampleError(
                "changed_bytes", f"{where}: not the bytes that were indexed: the file was damaged or written anew"
            )
        try:
            meta = video_meta(content, *text, self._source(row)) if from_video else parse_meta(content)
        except SampleError as error:
            raise SampleError(error.reason, f"{where}: {error.detail}") from error
        if from_video:
            meta["duration"] = float(index.duration[row])
            media = Clip(where, media[0], int(index.num_frames[row]))
        return meta | {"key": str(index.keys[row]), "kind": KINDS[index.kind[row]], "frame_count": len(media)}, media

    def close(self) -> None:
        """Give the file back; a later read opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _source(self, row: int) -> str:
        return self._index.source_names[self._index.source[row]]

    def _bytes(self, where: str, offset: int, size: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDONLY)
        content = os.pread(self._descriptor, int(size), int(offset))
        if len(content) < size:
            raise SampleError("truncated_shard", f"{where}: {len(content)} of {size} bytes at {offset}")
        return content


def find_shards(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """The tar files of folders, patterns and file names, in order of path, each once.

    Raises FileNotFoundError for a path or pattern that leads to none.
    """
    found = set()
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        path = os.path.expanduser(path)
        inside = os.path.join(glob.escape(path), "*.tar") if os.path.isdir(path) else path
        tars = [Path(name) for name in glob.glob(inside, recursive=True) if os.path.isfile(name)]
        if not tars:
            raise FileNotFoundError(f"no shard in {path!r}: expected a folder of .tar files, a pattern, or a .tar file")
        found.update(tars)
    return sorted(found, key=lambda path: path.parts)  # the order of paths, in a third of the time
