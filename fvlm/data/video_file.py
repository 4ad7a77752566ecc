"""An open video file: its best stream, what its header says, its packets, and its frames decoded in order."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from fvlm.data.errors import MediaError
from fvlm.data.picture import MAX_PIXELS
from fvlm.data.upright import Shaper

TICK = 1e-6
"""Seconds; absorbs rounding where a wanted time falls exactly on a frame's."""
_SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # demuxers whose packets have absolute times


class VideoFile:
    """Opens a file's best video stream. A context manager; raises MediaError where there is nothing to open."""

    def __init__(self, path: Path, seconds: float = math.inf):
        """`seconds` from now on `packets` raises MediaError `too_slow`."""
        self.path = path
        self._seconds, self._begin = seconds, time.monotonic()
        self.error = ""
        """What ended decoding before the end of the file."""
        self._open()

    def __enter__(self) -> VideoFile:
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
            self.stream = self._container.streams.best("video")
            if self.stream is None or self.stream.disposition & Disposition.attached_pic:
                raise MediaError("no_video_stream", f"{self.path} has no video stream")
            if self.stream.codec_context is None:
                raise MediaError("unknown_codec", f"{self.path}: FFmpeg has no decoder for its video stream")
            width, height = self.stream.width, self.stream.height
            if width * height > MAX_PIXELS:
                raise MediaError("too_many_pixels", f"{self.path}: {width} x {height} pixels a frame")
            self.stream.codec_context.thread_count = 1  # preparation runs a process a core
            self.stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # frames may be larger than declared
        except MediaError:
            self._container.close()
            raise

    def rewind(self) -> None:
        """Begin again at the first frame (by opening anew: not every container can seek)."""
        self._container.close()
        self._open()

    @property
    def pixel_aspect(self) -> float:
        """Width of a stored pixel over its height."""
        return float(self.stream.sample_aspect_ratio or 1)

    @property
    def usual_duration(self) -> float:
        """Seconds that a frame is shown where it does not say."""
        return 1 / float(self.stream.average_rate or self.stream.base_rate or 25)

    def declared_duration(self) -> float | None:
        """Seconds that the header gives the stream, else the container; None where it says nothing."""
        if self.stream.duration:
            seconds = float(self.stream.duration * self.stream.time_base)
        else:
            seconds = (self._container.duration or 0) / av.time_base
        return seconds if seconds > 0 else None

    def packets(self) -> Iterator[av.Packet]:
        """The stream's packets in decoding order, then an empty one that brings out the frames still held back."""
        for packet in self._container.demux(self.stream):
            if time.monotonic() - self._begin > self._seconds:
                raise MediaError("too_slow", f"{self.path}: not read within {self._seconds:g} s")
            yield packet

    def end(self, packet: av.Packet) -> float:
        """Seconds at which the packet's frame ends, by the stream's clock."""
        base = float(self.stream.time_base)
        return packet.pts * base + (packet.duration * base if packet.duration else self.usual_duration)

    @property
    def orders_frames(self) -> bool:
        """Whether packets carry presentation times; AVI has decoding times, which tell them only without reordering."""
        return self._container.format.name != "avi" or self.stream.codec.intra_only

    @property
    def seekable(self) -> bool:
        """Whether packets after seeking carry the same times as before it."""
        return self._container.format.name in _SEEKABLE

    def seek(self, ticks: int) -> None:
        """Let `packets` go on with the last keyframe at or before `ticks`."""
        self._container.seek(ticks, stream=self.stream)

    def measured_duration(self) -> float:
        """Seconds from the start of the first decoded frame to the end of the last."""
        return max((end for _, end, _ in self._frames()), default=0.0)

    def take(self, times: np.ndarray, shape: Shaper) -> tuple[list[np.ndarray], float]:
        """Pictures at the ascending `times`, as far as the video reaches, and when the last decoded frame ends.

        Everything up to the last frame needed is decoded. Raises MediaError `no_frames` if nothing can be.
        """
        taken, end, shown, picture = [], 0.0, None, None
        for start, end, frame in self._frames():
            while shown is not None and times[len(taken)] + TICK < start:
                picture = shape(shown) if picture is None else picture
                taken.append(picture)
                if len(taken) == len(times):
                    return taken, end
            shown, picture = frame, None
        if shown is None:
            raise MediaError(
                "no_frames", f"{self.path}: no frame can be decoded: {self.error or 'the stream is empty'}"
            )
        rest = int(np.sum(times[len(taken) :] <= end + TICK))
        return taken + [shape(shown)] * rest, end

    def _frames(self) -> Iterator[tuple[float, float, av.VideoFrame]]:
        """(start, end, frame), seconds from the start of the first frame; starts never decrease."""
        first, start, end, latest, jumps = None, 0.0, 0.0, None, False
        base = float(self.stream.time_base)
        for frame in self._decoded():
            jumps = jumps or (None not in (frame.pts, latest) and frame.pts < latest)
            latest = frame.pts
            stamp = frame.dts if jumps else frame.pts  # presentation times that jump back were guessed wrongly
            if stamp is None:
                start = end
            else:
                first = stamp if first is None else first
                start = max(start, (stamp - first) * base)
            end = start + (frame.duration * base if frame.duration else self.usual_duration)
            yield start, end, frame

    def _decoded(self) -> Iterator[av.VideoFrame]:
        """Frames up to the first error after a good one."""
        begun = False
        packets = self.packets()
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
