"""The samples of a tar: which of its members make one, what it says and shows, and which cannot be used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from fvlm.data.chat import TextCounts, text_counts
from fvlm.data.content import Piece
from fvlm.data.errors import SampleError
from fvlm.data.scan import Report, TarScan

KINDS = ("video", "image", "images", "text")
"""What a sample shows: `kind` columns hold positions in this tuple."""
_NOTHING = Piece.of(b"", 0)


class IndexRow(NamedTuple):
    """One sample of a shard."""

    key: str
    meta: Mapping
    kind: str
    counts: TextCounts
    json: Piece
    frames: Sequence[Piece]
    """One a frame, or a whole video alone."""
    text: Piece = _NOTHING
    """Of a whole video."""
    from_video: int | None = None
    """Number of frames that a whole video gives; None for a sample of frames."""

    @property
    def num_frames(self) -> int:
        return len(self.frames) if self.from_video is None else self.from_video

    @property
    def crcs(self) -> list[int]:
        """Of the members in the order in which the reader compares them."""
        text = [] if self.from_video is None else [self.text.crc]
        return [self.json.crc, *text, *(frame.crc for frame in self.frames)]


def index_rows(scan: TarScan, tokenizer: PreTrainedTokenizerBase, report: Report, folder: str = "") -> list[IndexRow]:
    """The samples of a tar that can be used, in its order; of the others `report` is told key and reason.

    `folder` is the name of the tar's: the source of whole videos that name none.
    """
    rows = []
    for key in [*scan.metas, *(key for key in scan.videos if key not in scan.metas)]:
        try:
            if key not in scan.videos:
                rows.append(_frames_row(key, *scan.metas[key], scan.frames.get(key, {}), tokenizer))
            elif scan.videos[key] is not None:
                rows.append(_video_row(key, scan, folder, tokenizer))
        except SampleError as error:
            report(key, error.reason, error.detail)
    return rows


def _video_row(key: str, scan: TarScan, folder: str, tokenizer: PreTrainedTokenizerBase) -> IndexRow:
    video, (piece, content), (text, said) = (
        scan.videos[key],
        scan.metas.get(key, (_NOTHING, b"")),
        scan.texts.get(key, (_NOTHING, b"")),
    )
    if key in scan.frames:
        raise SampleError("bad_frames", "both a video and frames")
    meta = video_meta(content, said, folder) | {"duration": video.seconds}
    sample_tags(meta)
    counts = text_counts(meta | {"kind": "video", "frame_count": video.num_frames}, tokenizer)
    return IndexRow(key, meta, "video", counts, piece, [video.piece], text, video.num_frames)


def video_meta(content: bytes, text: bytes, source: str) -> dict:
    """Metadata of a whole video: its `.json`; where that has no answer, `.txt` is it, and where no source, `source`.

    Raises SampleError `bad_json` or `bad_text`.
    """
    meta = parse_meta(content) if content else {}
    if not any(meta.get(name) for name in ("turns", "chosen", "assistant")):
        try:
            meta["assistant"] = text.decode().strip()
        except UnicodeDecodeError as error:
            raise SampleError("bad_text", f"its .txt: {error}") from error
    return meta | {"source": meta.get("source") or source}


def _frames_row(key: str, piece: Piece, content: bytes, frames: dict[int, Piece], tokenizer) -> IndexRow:
    meta = parse_meta(content)
    first = min(frames, default=0)  # some pipelines count frames from 1
    count = meta.get("frame_count", len(frames))
    if sorted(frames) != list(range(first, first + len(frames))) or count != len(frames):
        raise SampleError("missing_frames", f"frames {sorted(frames)}, expected {count}")
    kind = meta.get("kind")
    if kind not in KINDS:
        kind = "text" if not frames else "image" if len(frames) == 1 and not meta.get("duration") else "video"
    if kind == "text" and frames:
        raise SampleError("bad_frames", f"kind 'text' with {len(frames)} frames")
    sample_tags(meta)
    counts = text_counts(meta | {"kind": kind, "frame_count": len(frames)}, tokenizer)
    return IndexRow(key, meta, kind, counts, piece, [frames[i] for i in sorted(frames)])


def parse_meta(content: bytes) -> dict:
    """A sample's metadata. Raises SampleError `bad_json`."""
    try:
        meta = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", str(error)) from error
    if not isinstance(meta, dict):
        raise SampleError("bad_json", "expected an object of fields")
    return meta


def sample_tags(meta: Mapping) -> tuple[str, ...]:
    """A sample's `tags`, sorted, each once. Raises SampleError `bad_tags` unless they are a list of strings."""
    tags = meta.get("tags")
    if tags is None:
        return ()
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise SampleError("bad_tags", f"tags: expected a list of strings, found {tags!r:.80}")
    return tuple(sorted(set(tags)))
