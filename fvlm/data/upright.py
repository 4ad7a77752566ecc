"""From a decoded video frame to the picture the model sees: colours, scaling, orientation, crop."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from fvlm.data.errors import MediaError
from fvlm.data.picture import on_white

_SCALING = (  # antialiased, chroma brought to full resolution: within 1/255 on average of scaling the RGB picture
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
_PLANAR_RGB = "gbrp"  # libswscale writes the same pixels as to rgb24 in 2/5 of the time
_MAX_ELONGATION = 100
_ANY_CLOCK = Fraction(1, 1000)
_UNSPECIFIED, _BT2020 = 2, 9
_COLOURS = {3: _UNSPECIFIED, 10: _BT2020}  # ITU-T H.273 matrices that libswscale refuses: reserved; BT.2020 constant


class Shaper:
    """Scales the frames of one file to `size` pixels on the shorter side, turns them upright and crops the centre."""

    def __init__(self, path: Path, size: int, aspect: float):
        """`aspect` is the width of a stored pixel over its height."""
        self._path, self._size, self._aspect = path, size, aspect
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 [size, size, 3] RGB. Raises MediaError `too_long_frame` or `unknown_colours`."""
        scale = self._size / min(frame.width * self._aspect, frame.height)
        width, height = (max(round(side * scale), self._size) for side in (frame.width * self._aspect, frame.height))
        if max(width, height) > _MAX_ELONGATION * self._size:
            raise MediaError("too_long_frame", f"{self._path}: {frame.width} x {frame.height} pixels a frame")
        upright = turned(self._scaled(frame, width, height), display_matrix(frame))
        top, left = ((side - self._size) // 2 for side in upright.shape[:2])
        return np.ascontiguousarray(upright[top : top + self._size, left : left + self._size])

    def _scaled(self, frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
        """uint8 [height, width, 3]; what says nothing about its colours is BT.601 of limited range, as in FFmpeg."""
        frame.colorspace = _COLOURS.get(frame.colorspace, frame.colorspace)
        try:
            if frame.interlaced_frame:
                frame = _both_fields(frame)
            if any(component.is_alpha for component in frame.format.components):
                rgba = Image.fromarray(frame.to_ndarray(format="rgba"), "RGBA")
                frame = av.VideoFrame.from_ndarray(np.asarray(on_white(rgba)), format="rgb24")
            scaled = self._reformatter.reformat(frame, width, height, _PLANAR_RGB, interpolation=_SCALING, threads=1)
        except av.FFmpegError as error:
            found = f"pixel format {frame.format.name}, colour matrix {frame.colorspace}"
            raise MediaError("unknown_colours", f"{self._path}: {found}: libswscale cannot convert them") from error
        return scaled.to_ndarray()


def _both_fields(frame: av.VideoFrame) -> av.VideoFrame:
    """The frame marked as progressive: libswscale would scale the fields apart and leave a comb where things move."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=_ANY_CLOCK)
    graph.link_nodes(source, graph.add("setfield", "prog"), graph.add("buffersink")).configure()
    graph.vpush(frame)
    progressive = graph.vpull()
    progressive.colorspace, progressive.color_range = frame.colorspace, frame.color_range
    return progressive


def display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d): the stored point (x, y) is shown at (ax + cy, bx + dy), up to a shift and a scale."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV cannot list side data of which it does not know one type; it knows the angle
        quarters = round(frame.rotation / 90) % 4  # counter-clockwise
        return ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[quarters]
    if data is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    return a, b, c, d


def turned(picture: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """A view of `picture` [h, w, 3] as `matrix` shows it: quarter turns and mirrorings, the nearest to what it says."""
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):  # columns become rows
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
