"""720p H.264 clips to decode, drawn: what `benchmarks/data_prep.py` measures on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

FPS = 30
_FINE = 4  # the texture has so many points a pixel: things move by quarters of one
_GRAIN = 3.0  # standard deviation of the noise, levels
_SPRITES = 5


@dataclass(frozen=True, slots=True)
class Shot:
    """What is drawn: once, and encoded with each of `gops`, the most frames from keyframe to keyframe."""

    seconds: int
    gops: tuple[int, ...]
    size: tuple[int, int] = (1280, 720)

    @property
    def names(self) -> list[str]:
        """File names of its clips."""
        return [f"{self.seconds}s-gop{gop}.mp4" for gop in self.gops]


def draw_clips(shot: Shot, folder: Path, seed: int) -> list[Path]:
    """MP4s as x264 makes them by default (crf 23, preset medium, 3 B-frames in pyramids), but for the keyframes.

    Without a cut: scene changes would only make keyframes more frequent.
    """
    paths = [folder / name for name in shot.names]
    with ExitStack() as files:
        outputs = []
        for path, gop in zip(paths, shot.gops, strict=True):
            file = files.enter_context(av.open(f"{path}.part", "w", format="mp4"))
            stream = file.add_stream("libx264", rate=FPS, options={"g": str(gop)})
            stream.width, stream.height = shot.size
            stream.pix_fmt = "yuv420p"
            outputs.append((file, stream))
        for number, planes in enumerate(_frames(shot, np.random.default_rng(seed))):
            for file, stream in outputs:
                frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
                frame.pts = number
                file.mux(stream.encode(frame))
        for file, stream in outputs:
            file.mux(stream.encode())
    for path in paths:  # complete or not at all
        Path(f"{path}.part").replace(path)
    return paths


def _frames(shot: Shot, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Texture that a camera pans over, things that cross it, light that drifts, and grain: uint8 [height * 3/2, width].

    The same in chroma, fainter.
    """
    width, height = shot.size
    back = _texture(random, width * 3 // 2, height * 3 // 2)
    sprites = [_texture(random, width // 6, height // 4) for _ in range(_SPRITES)]
    phases, speeds = random.uniform(0, 6, (_SPRITES + 1, 2)), random.uniform(0.3, 0.7, (_SPRITES + 1, 2))
    grain = np.rint(random.normal(0, _GRAIN, (height + 64, width + 64))).astype(np.int16)
    for number in range(shot.seconds * FPS):
        places = 0.5 + 0.45 * np.sin(phases + speeds * number / FPS)  # of 0 to 1
        luma = _window(back, places[0], width, height)
        for sprite, place in zip(sprites, places[1:], strict=True):
            _paste(luma, sprite, place)
        half = luma[::2, ::2].astype(np.int16) - 128
        y, x = random.integers(0, 64, 2)
        lit = luma + grain[y : y + height, x : x + width]
        lit += round(8 * np.sin(number / FPS))
        planes = [lit.clip(16, 235, out=lit), 128 + half // 3, 128 - half // 4]
        yield np.concatenate([plane.astype(np.uint8).reshape(-1, width) for plane in planes])


def _texture(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Clouds in octaves, as strong as they are wide, in `_FINE` points a pixel: uint8 [height * fine, width * fine]."""
    total = np.full((height * _FINE, width * _FINE), 128, np.float32)
    for pixels, strength in ((200, 70), (50, 45), (14, 30), (5, 18), (2.5, 10)):
        cells = [max(round(side / pixels), 2) for side in (height, width)]
        cloud = Image.fromarray(random.uniform(-strength, strength, cells).astype(np.float32))
        total += np.asarray(cloud.resize((width * _FINE, height * _FINE), Image.Resampling.BICUBIC))
    return total.clip(16, 235).astype(np.uint8)


def _window(texture: np.ndarray, place: np.ndarray, width: int, height: int) -> np.ndarray:
    """What of the texture is seen at `place` (0 to 1 across and down): uint8 [height, width]."""
    left = int(place[0] * (texture.shape[1] - width * _FINE))
    top = int(place[1] * (texture.shape[0] - height * _FINE))
    return texture[top : top + height * _FINE : _FINE, left : left + width * _FINE : _FINE].copy()


def _paste(picture: np.ndarray, sprite: np.ndarray, place: np.ndarray) -> None:
    """Put the sprite at `place` (0 to 1 across and down), to a quarter of a pixel."""
    height, width = (side // _FINE - 1 for side in sprite.shape)
    left, top = (place * [picture.shape[1] - width, picture.shape[0] - height] * _FINE).astype(int)
    (left, right), (top, down) = divmod(left, _FINE), divmod(top, _FINE)
    moved = sprite[_FINE - down :: _FINE, _FINE - right :: _FINE][:height, :width]
    picture[top : top + height, left : left + width] = moved
