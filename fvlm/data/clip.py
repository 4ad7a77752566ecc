"""Whole videos in shards that others made: how many frames each gives, and these frames, decoded when it is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fvlm.data.errors import MediaError
from fvlm.data.sparse import Unsure, packets_duration
from fvlm.data.video import frame_times, read_video
from fvlm.data.video_file import VideoFile

MOST_SECONDS = 60.0
"""That one video may take to be read; a worker cannot be ended over it as preparation's processes are."""
_SMALL = 16  # pixels; for reading a video only to count its frames


@dataclass(frozen=True, slots=True)
class Clip:
    """A video's file as it lies in a tar."""

    name: str
    """Of the place, for messages."""
    content: bytes
    num_frames: int
    """As the index says."""

    def __len__(self) -> int:
        return self.num_frames

    def decode(self, size: int) -> np.ndarray:
        """uint8 [num_frames, size, size, 3] RGB, at the times of `frame_times`.

        Raises MediaError as `read_video` does, `too_slow`, or `broken_video` if it gives another number of frames.
        """
        with in_memory(self.content, self.name) as path:
            media = read_video(path, size, seconds=MOST_SECONDS)
        if len(media.frames) != self.num_frames:
            found = f"{len(media.frames)} frames can be decoded, {self.num_frames} were planned"
            raise MediaError("broken_video", "; ".join([f"{self.name}: {found}", *media.warnings]))
        return media.frames


def plan_frames(content: bytes, name: str) -> tuple[float, int]:
    """Seconds of a video and the number of frames that `Clip.decode` gives, as a rule without decoding any.

    The header's duration counts. Where there is none, or the packets do not reach the last frame's time or do not tell,
    the video is decoded once. Raises MediaError as `Clip.decode` does.
    """
    with in_memory(content, name) as path:
        with VideoFile(path, MOST_SECONDS) as file:
            duration = file.declared_duration()
            try:
                end = packets_duration(file)
            except Unsure:
                end = 0.0  # only decoding shows it
        if duration is not None and frame_times(duration)[-1] <= end:
            return duration, len(frame_times(duration))
        media = read_video(path, _SMALL, seconds=MOST_SECONDS)
        return media.duration, len(media.frames)


@contextmanager
def in_memory(content: bytes, name: str) -> Iterator[Path]:
    """A file in memory of this content, for as long as the context lasts; a MediaError raised inside says `name`."""
    with open(os.memfd_create("fvlm"), "wb", buffering=0) as copy:  # goes with the process, however that ends
        copy.write(content)
        path = f"/proc/self/fd/{copy.fileno()}"
        try:
            yield Path(path)
        except MediaError as error:
            raise MediaError(error.reason, error.detail.replace(path, name)) from error
