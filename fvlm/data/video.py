"""From a media file to upright, cropped RGB frames at the times the model sees.

Videos of any container and codec that PyAV's FFmpeg reads are decoded once, in order, and no further than the last
frame needed; stills and animated pictures go through `fvlm.data.picture`. Used by preparation, evaluation and demo.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import simplejpeg
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from fvlm.data.errors import MediaError
from fvlm.data.picture import MAX_PIXELS, crop, open_picture, read_picture

JPEG_QUALITY = 92
_SCALING = (  # antialiased, chroma brought to full resolution: within 1/255 on average of scaling the RGB picture
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
_MAX_ELONGATION = 100
_TICK = 1e-6  # seconds; absorbs rounding where a wanted time falls exactly on a frame's


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


def read_media(path: str | Path, size: int, max_frames: int = 64) -> Media:
    """The frames of a video, animation or still, shorter side scaled to `size` pixels and centre-cropped.

    A frame is the last one displayed at or before its time, counted from the first frame's.

    Raises MediaError with reason `missing_file`, `empty_file`, `unreadable_file`, `unknown_format`, `unknown_codec`,
    `no_video_stream`, `no_frames`, `too_many_pixels`, `too_long_frame`, `broken_picture` or `truncated_picture`.
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
        return _read_video(path, size, max_frames)
    with picture:
        frames, seconds = read_picture(picture, size, lambda duration: frame_times(duration, max_frames))
    return Media(frames, seconds or 0.0, "image" if seconds is None else "video")


def _read_video(path: Path, size: int, max_frames: int) -> Media:
    warnings = []
    with _Reader(path) as reader:
        duration = reader.declared_duration()
        if duration is None:
            duration = reader.measured_duration()
            warnings.append(f"no duration in the header; measured {duration:.2f} s")
            reader.rewind()
        times = frame_times(duration, max_frames)
        frames, end = reader.take(times, size)
        if len(frames) < len(times):
            # the header promised more than there is: choose the times anew, within what there is
            because = f" ({reader.error})" if reader.error else ""
            warnings.append(f"decodes {end:.2f} s of {duration:.2f} s{because}")
            duration = end
            reader.rewind()
            frames, end = reader.take(frame_times(duration, max_frames), size)
    return Media(np.stack(frames), duration, "video", tuple(warnings))


class _Reader:
    """An open video file: its best stream, decoded in order up to the first error after a good frame."""

    def __init__(self, path: Path):
        self.path, self.error = path, ""
        self._reformatter = VideoReformatter()
        self._open()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_) -> None:
        self._container.close()

    def _open(self) -> None:
        try:
            # by descriptor, with nothing else allowed: a playlist cannot reach other files or the network
            with open(self.path, "rb") as file:
                options = {"fd": str(file.fileno()), "protocol_whitelist": "fd"}
                self._container = av.open("fd:", metadata_errors="replace", options=options)
        except (av.FFmpegError, OSError) as error:
            raise MediaError("unknown_format", f"{self.path}: neither a picture nor a video: {error}") from error
        try:
            self._stream = self._container.streams.best("video")
            if self._stream is None or self._stream.disposition & Disposition.attached_pic:
                raise MediaError("no_video_stream", f"{self.path} has no video stream")
            if self._stream.codec_context is None:
                raise MediaError("unknown_codec", f"{self.path}: FFmpeg has no decoder for its video stream")
            width, height = self._stream.width, self._stream.height
            if width * height > MAX_PIXELS:
                raise MediaError("too_many_pixels", f"{self.path}: {width} x {height} pixels a frame")
            self._stream.codec_context.thread_count = 1  # preparation runs a process a core
        except MediaError:
            self._container.close()
            raise

    def rewind(self) -> None:
        """Begin again at the first frame (by opening anew: not every container can seek)."""
        self._container.close()
        self._open()

    def declared_duration(self) -> float | None:
        """Seconds that the header gives the stream, else the container; None where it says nothing."""
        if self._stream.duration:
            seconds = float(self._stream.duration * self._stream.time_base)
        else:
            seconds = (self._container.duration or 0) / av.time_base
        return seconds if seconds > 0 else None

    def measured_duration(self) -> float:
        """Seconds from the start of the first decoded frame to the end of the last."""
        return max((end for _, end, _ in self._frames()), default=0.0)

    def take(self, times: np.ndarray, size: int) -> tuple[list[np.ndarray], float]:
        """Frames at the ascending `times`, as far as the video reaches, and when the last decoded frame ends.

        Raises MediaError `no_frames` if nothing can be decoded.
        """
        taken, end, shown, picture = [], 0.0, None, None
        for start, end, frame in self._frames():
            while shown is not None and times[len(taken)] + _TICK < start:
                picture = self._picture(shown, size) if picture is None else picture
                taken.append(picture)
                if len(taken) == len(times):
                    return taken, end
            shown, picture = frame, None
        if shown is None:
            raise MediaError(
                "no_frames", f"{self.path}: no frame can be decoded: {self.error or 'the stream is empty'}"
            )
        rest = int(np.sum(times[len(taken) :] <= end + _TICK))
        return taken + [self._picture(shown, size)] * rest, end

    def _picture(self, frame: av.VideoFrame, size: int) -> np.ndarray:
        """Shorter side to `size`, centre crop, upright: uint8 [size, size, 3]."""
        aspect = float(self._stream.sample_aspect_ratio or 1)  # width of a pixel over its height
        scale = size / min(frame.width * aspect, frame.height)
        width, height = (max(round(side * scale), size) for side in (frame.width * aspect, frame.height))
        if max(width, height) > _MAX_ELONGATION * size:
            raise MediaError("too_long_frame", f"{self.path}: {frame.width} x {frame.height} pixels a frame")
        scaled = self._reformatter.reformat(frame, width, height, "rgb24", interpolation=_SCALING, threads=1)
        upright = np.rot90(scaled.to_ndarray(), round(frame.rotation / 90))  # the angle is counter-clockwise
        top, left = ((side - size) // 2 for side in upright.shape[:2])
        return np.ascontiguousarray(upright[top : top + size, left : left + size])

    def _frames(self) -> Iterator[tuple[float, float, av.VideoFrame]]:
        """(start, end, frame), seconds from the start of the first frame; starts never decrease."""
        usual = 1 / float(self._stream.average_rate or self._stream.base_rate or 25)
        first, start, end = None, 0.0, 0.0
        for frame in self._decoded():
            if frame.time is None:
                start = end
            else:
                first = frame.time if first is None else first
                start = max(start, frame.time - first)
            end = start + (float(frame.duration * frame.time_base) if frame.duration else usual)
            yield start, end, frame

    def _decoded(self) -> Iterator[av.VideoFrame]:
        begun = False
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                for frame in packet.decode():
                    begun = True
                    yield frame
            except av.FFmpegError as error:
                self.error = str(error)
                if begun:  # what follows would be predicted from pictures that are missing
                    return


def encode_jpeg(frame: np.ndarray) -> bytes:
    """JPEG of a uint8 [height, width, 3] RGB frame, without chroma subsampling."""
    frame = np.ascontiguousarray(frame)
    return simplejpeg.encode_jpeg(frame, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")


def decode_jpeg(content: bytes, size: int) -> np.ndarray:
    """uint8 [3, size, size] RGB (a transposed view); a larger JPEG (foreign shards) is scaled and centre-cropped.

    Raises MediaError `bad_jpeg`, `too_many_pixels`, or `too_small`: a frame is never blown up.
    """
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(content)
        if height * width > MAX_PIXELS:
            raise MediaError("too_many_pixels", f"a JPEG of {width} x {height} pixels")
        pixels = simplejpeg.decode_jpeg(content, colorspace="RGB")
    except ValueError as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError("bad_jpeg", str(error)) from error
    if min(height, width) < size:
        raise MediaError("too_small", f"a frame of {width} x {height}, expected {size}: prepare with --size {size}")
    if pixels.shape[:2] != (size, size):
        pixels = crop(Image.fromarray(pixels), size)
    return pixels.transpose(2, 0, 1)
