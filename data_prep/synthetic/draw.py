"""Draw the scenes of the synthetic corpus: coloured glyphs on a 4 x 4 grid, as RGB arrays and H.264 clips.

Glyphs are chosen to stay distinguishable when a 224-pixel clip is prepared at 56 pixels: cells of 14 pixels.
Sizes are in pixels, places in cells (row, column) counted from 0 at the top left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

GRID = 4
COLOURS = {
    "red": (225, 30, 35),
    "green": (30, 165, 45),
    "blue": (45, 80, 245),
    "yellow": (250, 230, 40),
    "white": (250, 250, 250),
    "pink": (250, 105, 205),
    "orange": (250, 135, 20),
    "cyan": (40, 215, 235),
}
BACKGROUNDS = {"black": (12, 12, 12), "grey": (92, 92, 92), "brown": (96, 52, 20), "purple": (72, 20, 100)}
SHAPES = ("square", "circle", "triangle", "cross", "ring", "diamond", "bar", "moon")
ARROWS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

_FILL = 0.84  # width of a glyph as a share of its cell
_SUPERSAMPLING = 4


@dataclass(frozen=True, slots=True)
class Thing:
    """A glyph whose centre passes through its place in the middle of its scene."""

    shape: str
    """One of SHAPES or ARROWS."""
    colour: str
    row: float
    column: float
    span: int = 1
    """Width in cells; (row, column) is then the top left cell."""
    before: tuple[float, float] = (0.0, 0.0)
    """Velocity in cells a second in the first half of the scene, (down, right)."""
    after: tuple[float, float] = (0.0, 0.0)
    """Velocity in the second half."""

    def place(self, phase: float) -> tuple[float, float]:
        """Row and column at `phase` in [0, 1) of the scene."""
        down, right = self.before if phase < 0.5 else self.after
        return self.row + (phase - 0.5) * down, self.column + (phase - 0.5) * right

    @property
    def moves(self) -> bool:
        return self.before != (0.0, 0.0) or self.after != (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Scene:
    """One second of a clip, or one still."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]


def inside(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Whether points of the square [-1, 1]^2 (y down, x right) belong to the glyph."""
    far = np.maximum(np.abs(y), np.abs(x))
    match shape:
        case "square":
            return far <= 0.96
        case "circle":
            return y * y + x * x <= 1
        case "triangle":
            return (y <= 0.92) & (np.abs(x) <= (y + 1) / 2)
        case "cross":
            return (np.minimum(np.abs(y), np.abs(x)) <= 0.3) & (far <= 1)
        case "ring":
            radius = y * y + x * x
            return (radius <= 1) & (radius >= 0.52**2)
        case "diamond":
            return np.abs(y) + np.abs(x) <= 1.05
        case "bar":
            return (np.abs(y) <= 0.36) & (np.abs(x) <= 1)
        case "moon":
            return (y * y + x * x <= 1) & (y * y + (x - 0.62) ** 2 >= 0.8**2)
        case "up" | "down" | "left" | "right":
            down, right = ARROWS[shape]
            along, across = y * down + x * right, y * right - x * down
            head = (along >= -0.05) & (np.abs(across) <= 1 - along)
            shaft = (along >= -1) & (along <= 0) & (np.abs(across) <= 0.34)
            return head | shaft
    raise ValueError(f"shape {shape!r} is not a glyph; expected one of {', '.join((*SHAPES, *ARROWS))}")


@lru_cache(maxsize=64)
def coverage(shape: str, width: int) -> np.ndarray:
    """Share of each pixel that the glyph covers, float32 [width, width] in [0, 1]."""
    fine = width * _SUPERSAMPLING
    axis = ((np.arange(fine) + 0.5) / fine * 2 - 1) / _FILL
    mask = inside(shape, axis[:, None], axis[None, :]).astype(np.float32)
    return mask.reshape(width, _SUPERSAMPLING, width, _SUPERSAMPLING).mean(axis=(1, 3))


@lru_cache(maxsize=2048)
def _sprite(shape: str, colour: str, background: tuple, width: int) -> tuple[np.ndarray, np.ndarray]:
    share = coverage(shape, width)[..., None]
    tile = np.array(COLOURS[colour]) * share + np.array(background) * (1 - share)
    return np.rint(tile).astype(np.uint8), np.repeat(share > 0, 3, axis=2)


@lru_cache(maxsize=32)
def _empty(background: tuple, size: int) -> np.ndarray:
    return np.broadcast_to(np.array(background, np.uint8), (size, size, 3)).copy()


def draw(scene: Scene, size: int, phase: float = 0.5) -> np.ndarray:
    """uint8 [size, size, 3] RGB of the scene at `phase` in [0, 1); later things cover earlier ones."""
    picture = _empty(scene.background, size).copy()
    cell = size // GRID
    for thing in scene.things:
        width = cell * thing.span
        tile, mask = _sprite(thing.shape, thing.colour, scene.background, width)
        top, left = (round(place * cell) for place in thing.place(phase))
        rows, columns = _clip(top, width, size), _clip(left, width, size)
        part = np.s_[rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
        np.copyto(picture[rows[0] : rows[1], columns[0] : columns[1]], tile[part], where=mask[part])
    return picture


def _clip(start: int, width: int, size: int) -> tuple[int, int]:
    return max(start, 0), max(min(start + width, size), 0)


def write_clip(path: Path, scenes: Sequence[Scene], size: int, fps: int) -> None:
    """Write the scenes, one second each, as an H.264 MP4 file. The bytes depend on nothing but the arguments."""
    reformatter = VideoReformatter()
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "ultrafast", "crf": "20"}
        for second, scene in enumerate(scenes):
            still = not any(thing.moves for thing in scene.things)
            for tick in range(fps):
                if tick == 0 or not still:
                    picture = av.VideoFrame.from_ndarray(draw(scene, size, tick / fps), format="rgb24")
                    frame = reformatter.reformat(picture, format="yuv420p", threads=1)
                frame.pts, frame.time_base = second * fps + tick, Fraction(1, fps)
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
