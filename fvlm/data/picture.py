"""Stills and animated pictures through Pillow: open safely, turn upright, to RGB, crop. Used by `fvlm.data.video`."""

from __future__ import annotations

import math
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fvlm.data.errors import MediaError

MAX_PIXELS = Image.MAX_IMAGE_PIXELS
"""A picture or video frame of more pixels (89 million) is refused."""
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000")
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF????WEBP", b"II*\0", b"MM\0*")
_MALFORMED = (  # what Pillow's readers let through when a file is not what it says
    OSError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)
_DEFAULT_DELAY_MS = 100  # of an animation's frame without one, as browsers show it

Image.init()  # registers every format; open() alone would know only the commonest


def open_picture(path: Path) -> Image.Image | None:
    """The picture in a file, pixels not yet decoded; None if the file is of no picture format.

    Raises MediaError `too_many_pixels` or `broken_picture`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(path, formats=_FORMATS)
        except Image.UnidentifiedImageError as error:
            with open(path, "rb") as file:
                head = file.read(12)
            if any(_matches(head, magic) for magic in _MAGIC):
                raise MediaError(
                    "broken_picture", f"{path}: its first bytes are a picture's, its header is not"
                ) from error
            return None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise MediaError("too_many_pixels", f"{path}: {error}") from error
        except _MALFORMED as error:
            raise MediaError("broken_picture", f"{path}: {error}") from error


def _matches(head: bytes, magic: bytes) -> bool:
    return len(head) >= len(magic) and all(m in (h, ord("?")) for h, m in zip(head, magic, strict=False))


def read_picture(
    picture: Image.Image, size: int, wanted: Callable[[float], np.ndarray], seconds: float = math.inf
) -> tuple[np.ndarray, float | None]:
    """Frames, uint8 [n, size, size, 3], and the duration in seconds, which is None for a still.

    `wanted` maps the duration of an animation to the times of its frames, ascending, in seconds. A multi-picture JPEG
    (MPO) has several views of one moment: a still. Raises MediaError `truncated_picture`, `broken_picture`,
    `too_many_pixels`, or `too_slow` for an animation that takes more than so many `seconds` to read.
    """
    try:
        if picture.format != "MPO" and getattr(picture, "is_animated", False):
            return _animation(picture, size, wanted, seconds)
        return crop(_to_rgb(picture), size)[None], None
    except Image.DecompressionBombError as error:  # frames of an animation can grow
        raise MediaError("too_many_pixels", f"{picture.filename}: {error}") from error
    except MediaError:  # a ValueError, but no sign of a broken picture
        raise
    except _MALFORMED as error:
        reason = "truncated_picture" if "truncated" in str(error) else "broken_picture"
        raise MediaError(reason, f"{picture.filename}: {error}") from error


def _animation(
    picture: Image.Image, size: int, wanted: Callable[[float], np.ndarray], seconds: float
) -> tuple[np.ndarray, float]:
    begun = time.monotonic()

    def seek(number: int) -> None:
        if time.monotonic() - begun > seconds:
            raise MediaError("too_slow", f"{picture.filename}: not read within {seconds:g} s")
        picture.seek(number)

    delays = []
    for number in range(picture.n_frames):
        seek(number)
        picture.load()  # WebP knows a frame's delay only then
        delays.append((picture.info.get("duration") or _DEFAULT_DELAY_MS) / 1000)
    ends = np.cumsum(delays)
    duration = float(ends[-1])
    numbers = np.searchsorted(ends, wanted(duration) + 1e-6, side="right")  # frames that ended before the time
    cropped = {}
    for number in sorted(set(numbers.tolist())):
        seek(number)
        cropped[number] = crop(_to_rgb(picture), size)
    return np.stack([cropped[number] for number in numbers.tolist()]), duration


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Upright (by EXIF orientation) and in RGB: transparency on white, 16-bit grey by its high byte."""
    picture.load()
    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        return on_white(picture.convert("RGBA"))
    if picture.mode.startswith("I"):  # Pillow would clip at 255
        high = np.asarray(picture).astype(np.int64) >> 8
        return Image.fromarray(high.clip(0, 255).astype(np.uint8)).convert("RGB")
    return picture.convert("RGB")


def on_white(rgba: Image.Image) -> Image.Image:
    """An RGBA picture in RGB, white where it is transparent."""
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def crop(picture: Image.Image, size: int) -> np.ndarray:
    """Shorter side to `size`, then the centre: uint8 [size, size, 3], antialiased bicubic.

    What falls outside the centre is not computed, however long the picture.
    """
    scale = size / min(picture.size)
    width, height = (max(round(side * scale), size) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    across, down = picture.width / width, picture.height / height  # pixels of the picture per pixel of the scaled one
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))
