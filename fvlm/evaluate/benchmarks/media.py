"""A benchmark's clips: how many frames one gives, and these frames, decoded when they are needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fvlm.data.errors import MediaError, SampleError
from fvlm.data.picture import open_picture
from fvlm.data.sparse import Short, Unsure, read_sparsely
from fvlm.data.upright import Shaper
from fvlm.data.video import frame_times, read_media, read_video
from fvlm.data.video_file import VideoFile

MOST_SECONDS = 300.0
"""That one video may take to be read."""
_SMALL = 16  # pixels; for decoding only to count frames
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, kw_only=True)
class ClipFile:
    """A video, a picture, or a folder of frames, and the part of it that a question is about."""

    path: Path
    start: float = 0.0
    """Seconds."""
    end: float = math.inf
    fps: float = 3.0
    """Frames a second of a folder of frames."""


def probe(clip: ClipFile) -> tuple[str, int]:
    """Kind ("image" or "video") and number of frames, as a rule without decoding any; raises MediaError."""
    if not clip.path.exists():
        raise MediaError("missing_file", f"{clip.path} does not exist")
    if clip.path.is_dir():
        return "video", len(_segment(clip, len(_frame_files(clip)) / clip.fps))
    picture = open_picture(clip.path)
    if picture is None:
        return "video", len(_video_times(clip))
    with picture:
        if not getattr(picture, "is_animated", False):
            return "image", 1
    found = read_media(clip.path, _SMALL)
    return found.kind, len(found.frames)


@lru_cache(maxsize=4)  # several questions in a row are about one clip; the same array is then encoded once a pack
def read_frames(clip: ClipFile | None, num_frames: int, size: int) -> np.ndarray:
    """uint8 [num_frames, 3, size, size], not to be written to; raises SampleError."""
    if clip is None:
        return np.zeros((0, 3, size, size), np.uint8)
    try:
        frames = _decode(clip, size)
    except MediaError as error:
        raise SampleError(error.reason, error.detail) from error
    if len(frames) != num_frames:
        raise SampleError("broken_video", f"{clip.path}: {len(frames)} frames decode of {num_frames}")
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2))


def _decode(clip: ClipFile, size: int) -> np.ndarray:
    if clip.path.is_dir():
        files = _frame_files(clip)
        numbers = (_segment(clip, len(files) / clip.fps) * clip.fps).astype(int)
        return np.concatenate([read_media(files[number], size).frames[:1] for number in numbers])
    if open_picture(clip.path) is not None:
        return read_media(clip.path, size).frames
    times = _video_times(clip)
    with VideoFile(clip.path, MOST_SECONDS) as file:
        shape = Shaper(clip.path, size, file.pixel_aspect)
        try:
            return np.stack(read_sparsely(file, times, shape))
        except (Short, Unsure):
            file.rewind()
            return np.stack(file.take(times, shape)[0])


def _video_times(clip: ClipFile) -> np.ndarray:
    with VideoFile(clip.path, MOST_SECONDS) as file:
        duration = file.declared_duration()
    if duration is None:
        duration = read_video(clip.path, _SMALL, seconds=MOST_SECONDS).duration
    return _segment(clip, duration)


def _segment(clip: ClipFile, duration: float) -> np.ndarray:
    """Times of the frames, at most 64, in seconds from the file's first; raises MediaError `bad_segment`."""
    start, end = max(0.0, clip.start), min(clip.end, duration)
    if not start < end:
        raise MediaError("bad_segment", f"{clip.path}: {clip.start:g} to {clip.end:g} s of {duration:.2f} s")
    return start + frame_times(end - start)


def _frame_files(clip: ClipFile) -> list[Path]:
    files = sorted(file for file in clip.path.iterdir() if file.suffix.lower() in _PICTURES)
    if not files:
        raise MediaError("no_frames", f"{clip.path} holds no pictures")
    return files
