"""Videos drawn for tests with PyAV, and a slow reading of them: everything decoded, frames chosen by time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from fvlm.data.upright import Shaper
from fvlm.data.video import frame_times

MILLISECOND = Fraction(1, 1000)


def at_rate(count: int, rate: float = 25, start: int = 0) -> list[int]:
    """When each of `count` frames is shown, in milliseconds."""
    return [start + round(1000 * i / rate) for i in range(count)]


def draw(
    path: Path,
    moments: Sequence[int],
    codec: str = "libx264",
    *,
    size: tuple[int, int] = (96, 64),
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    scene: Callable[[int], np.ndarray] | None = None,
    interlaced: bool = False,
    clock: Fraction = MILLISECOND,
    aspect: Fraction | None = None,
) -> Path:
    """A video with a different picture, or `scene(i)`, shown from each of `moments`, in milliseconds."""
    scene = scene or moving(size)
    gap = float(np.median(np.diff(moments))) if len(moments) > 1 else 40
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=Fraction(1000 / gap).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.time_base = stream.codec_context.time_base = clock
        stream.options = options or {}
        if interlaced:
            stream.codec_context.flags |= av.codec.context.Flags.interlaced_dct
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for i, moment in enumerate(moments):
            picture = scene(i)
            frame = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[2] == 4 else "rgb24")
            frame.pts, frame.time_base = round(moment * MILLISECOND / clock), clock
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def moving(size: tuple[int, int]) -> Callable[[int], np.ndarray]:
    """Texture that drifts under a square that runs the other way: no two of some hundred frames are alike."""
    width, height = size
    coarse = np.random.default_rng(7).integers(30, 220, (height // 8 + 2, width // 8 + 2, 3))
    texture = np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8)

    def scene(i: int) -> np.ndarray:
        picture = np.roll(texture, (i, 2 * i), axis=(0, 1))[:height, :width].copy()
        left, top = (-3 * i) % (width - 16), (5 * i) % (height - 16)
        picture[top : top + 16, left : left + 16] = (i * 7 % 256, 255 - i * 5 % 256, i * 3 % 256)
        return picture

    return scene


def grey(i: int) -> np.ndarray:
    """Frame i < 50 in one grey, so that `numbers` finds i again."""
    return np.full((48, 64, 3), 10 + 5 * i, np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    """Which frame of a `grey` video each one is."""
    return np.rint((frames.mean(axis=(1, 2, 3)) - 10) / 5).astype(int).tolist()


class Everything:
    """All frames of a video that decode before the first error."""

    def __init__(self, path: Path):
        self.frames: list[tuple[float, av.VideoFrame]] = []
        """(seconds from the first frame's start, frame)"""
        decoded = []
        with av.open(str(path)) as file:
            stream = file.streams.best("video")
            stream.codec_context.thread_count = 1  # what stands in for damaged data depends on it
            try:
                for packet in file.demux(stream):
                    decoded += packet.decode()
            except av.FFmpegError:
                pass
            declared = stream.duration * stream.time_base if stream.duration else (file.duration or 0) / av.time_base
            usual, aspect = 1 / float(stream.average_rate or 25), float(stream.sample_aspect_ratio or 1)
        self.frames = [(frame.time - decoded[0].time, frame) for frame in decoded]
        self.end = max(start + (float(frame.duration * frame.time_base) or usual) for start, frame in self.frames)
        self.declared = float(declared)
        self._path, self._aspect = path, aspect

    def at(self, times: Sequence[float], size: int) -> np.ndarray:
        """Pictures of the last frame that starts at or before each time."""
        shape = Shaper(self._path, size, self._aspect)
        return np.stack(
            [
                shape(max((each for each in self.frames if each[0] <= time + 1e-6), key=lambda e: e[0])[1])
                for time in times
            ]
        )

    def chosen(self, size: int, max_frames: int = 64) -> np.ndarray:
        """What `read_media` should give: by the declared duration, else by what there is."""
        times = frame_times(self.declared or self.end, max_frames)
        if times[-1] > self.end + 1e-6:
            times = frame_times(self.end, max_frames)
        return self.at(times, size)
