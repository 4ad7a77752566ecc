"""From a media file to upright, cropped RGB frames at the times the model sees.

Of a video in any container and codec that PyAV's FFmpeg reads, as little is decoded as the chosen frames need
(`fvlm.data.sparse`), or else everything up to the last of them; stills and animated pictures go through
`fvlm.data.picture`. Used by preparation, evaluation and demo.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from fvlm.data.errors import MediaError
from fvlm.data.picture import MAX_PIXELS, crop, open_picture, read_picture
from fvlm.data.sparse import Short, Unsure, packets_duration, read_sparsely
from fvlm.data.upright import Shaper
from fvlm.data.video_file import VideoFile

JPEG_QUALITY = 92


@dataclass(frozen=True, slots=True)
class Media:
    """What was read from one file."""

    frames: np.ndarray
    """uint8 [n, size, size, 3] RGB."""
    duration: float
    """Seconds; 0 for a still."""
    kind: str
    """"video" or "image"."""
    warnings: tuple[str, ...] = ()
    """What was wrong with the file, though it could be read."""


def frame_times(duration: float, max_frames: int = 64) -> np.ndarray:
    """Times of the frames to take from `duration` seconds: one a second, at most `max_frames`, evenly spaced.

    n = min(max(round(duration), 1), max_frames) times at (i + 1/2) * duration / n, seconds, float64 [n].
    """
    count = min(max(round(duration), 1), max_frames)
    return (np.arange(count) + 0.5) * duration / count


def read_media(path: str | Path, size: int, max_frames: int = 64, seconds: float = math.inf) -> Media:
    """The frames of a video, animation or still, shorter side scaled to `size` pixels and centre-cropped.

    A frame is the last one displayed at or before its time, counted from the first frame's. A video or animation that
    takes more than so many `seconds` to read is refused.

    Raises MediaError with reason `missing_file`, `empty_file`, `unreadable_file`, `unknown_format`, `unknown_codec`,
    `no_video_stream`, `no_frames`, `too_many_pixels`, `too_long_frame`, `unknown_colours`, `broken_picture`,
    `truncated_picture` or `too_slow`.
    """
    path = Path(path)
    if not os.path.isfile(path):  # not Path's, which fails on a name that is too long
        raise MediaError("missing_file", f"{path} does not exist or is not a file")
    try:
        if path.stat().st_size == 0:
            raise MediaError("empty_file", f"{path} has no bytes")
        picture = open_picture(path)
    except OSError as error:
        raise MediaError("unreadable_file", f"{path}: {error}") from error
    if picture is None:
        return read_video(path, size, max_frames, seconds)
    with picture:
        frames, duration = read_picture(picture, size, lambda length: frame_times(length, max_frames), seconds)
    return Media(frames, duration or 0.0, "image" if duration is None else "video")


def read_video(path: Path, size: int, max_frames: int = 64, seconds: float = math.inf) -> Media:
    """`read_media` of what is no picture; `too_slow` where it takes more than so many seconds."""
    with VideoFile(path, seconds) as file:
        shape = Shaper(path, size, file.pixel_aspect)
        try:
            return _read_sparsely(file, shape, max_frames)
        except (Short, Unsure):
            file.rewind()
            return _read_in_order(file, shape, max_frames)


def _read_sparsely(file: VideoFile, shape: Shaper, max_frames: int) -> Media:
    duration, warnings = file.declared_duration(), ()
    if duration is not None:
        try:
            frames = read_sparsely(file, frame_times(duration, max_frames), shape)
            return Media(np.stack(frames), duration, "video", warnings)
        except Short as short:
            warnings = (_too_short(short.end, duration),)
            duration = short.end
    else:
        duration = packets_duration(file)
        warnings = (_no_duration(duration),)
    file.rewind()
    # the last frame as well, to see that the packets up to it decode
    frames = read_sparsely(file, frame_times(duration, max_frames), shape)
    return Media(np.stack(frames), duration, "video", warnings)


def _read_in_order(file: VideoFile, shape: Shaper, max_frames: int) -> Media:
    duration, warnings = file.declared_duration(), []
    if duration is None:
        duration = file.measured_duration()
        warnings.append(_no_duration(duration))
        file.rewind()
    times = frame_times(duration, max_frames)
    frames, end = file.take(times, shape)
    if len(frames) < len(times):
        # the header promised more than there is: choose the times anew, within what there is
        warnings.append(_too_short(end, duration) + (f" ({file.error})" if file.error else ""))
        duration = end
        file.rewind()
        frames, end = file.take(frame_times(duration, max_frames), shape)
    return Media(np.stack(frames), duration, "video", tuple(warnings))


def _too_short(there: float, declared: float) -> str:
    return f"decodes {there:.2f} s of {declared:.2f} s"


def _no_duration(measured: float) -> str:
    return f"no duration in the header; measured {measured:.2f} s"


def encode_jpeg(frame: np.ndarray) -> bytes:
    """JPEG of a uint8 [height, width, 3] RGB frame, without chroma subsampling."""
    frame = np.ascontiguousarray(frame)
    return simplejpeg.encode_jpeg(frame, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")


def decode_jpeg(content: bytes, size: int) -> np.ndarray:
    """uint8 [3, size, size] RGB (a transposed view); a larger JPEG (foreign shards) is scaled and centre-cropped.

    Raises MediaError `bad_jpeg`, `too_many_pixels`, or `too_small`: a frame is never blown up.
    """
    width, height = jpeg_size(content)
    pixels = jpeg_pixels(content)
    if min(height, width) < size:
        raise MediaError("too_small", f"a frame of {width} x {height}, expected {size}: prepare with --size {size}")
    if pixels.shape[:2] != (size, size):
        pixels = crop(Image.fromarray(pixels), size)
    return pixels.transpose(2, 0, 1)


def decode_jpeg_into(pixels: np.ndarray, content: bytes) -> None:
    """`decode_jpeg` right into uint8 [size, size, 3], without memory of its own for a JPEG of that size."""
    size = len(pixels)
    if jpeg_size(content) == (size, size):
        jpeg_pixels(content, pixels)
    else:
        pixels[...] = decode_jpeg(content, size).transpose(1, 2, 0)


def jpeg_size(content: bytes) -> tuple[int, int]:
    """(width, height) by the header alone. Raises MediaError `bad_jpeg` or `too_many_pixels`."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError as error:
        raise MediaError("bad_jpeg", str(error)) from error
    if height * width > MAX_PIXELS:
        raise MediaError("too_many_pixels", f"a JPEG of {width} x {height} pixels")
    return width, height


def jpeg_pixels(content: bytes, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [height, width, 3] RGB, in `out` where given, for a JPEG whose `jpeg_size` was asked before.

    Raises MediaError `bad_jpeg`.
    """
    try:
        return simplejpeg.decode_jpeg(content, colorspace="RGB", buffer=out)
    except ValueError as error:
        raise MediaError("bad_jpeg", str(error)) from error
