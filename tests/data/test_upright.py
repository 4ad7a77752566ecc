"""From a decoded frame to the picture: colours, scaling, fields, transparency, orientation."""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from PIL import Image

from fvlm.data import upright
from fvlm.data.errors import MediaError
from fvlm.data.upright import Shaper
from fvlm.data.video import read_media
from tests.data.drawn_videos import at_rate, draw, moving

KR_KB = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}  # by H.273 number; 2: not said
YUV = [(80, 100, 160), (150, 140, 110), (60, 128, 128), (200, 90, 140)]


def shape(frame: av.VideoFrame, size: int) -> np.ndarray:
    return Shaper(Path("drawn"), size, 1.0)(frame)


def to_rgb(y: float, u: float, v: float, matrix: int, full: bool) -> np.ndarray:
    """One colour by the definition of its matrix, 0 to 255."""
    red, blue = KR_KB[matrix]
    luma = y / 255 if full else (y - 16) / 219
    cb, cr = ((value - 128) / (255 if full else 224) for value in (u, v))
    r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
    return 255 * np.clip([r, (luma - red * r - blue * b) / (1 - red - blue), b], 0, 1)


@pytest.mark.parametrize(
    ("pix_fmt", "full"), [("yuv420p", False), ("yuv420p", True), ("yuvj420p", True), ("yuv420p10le", False)]
)
@pytest.mark.parametrize("matrix", KR_KB)
def test_colours_are_those_of_the_files_matrix_and_range(tmp_path, pix_fmt, full, matrix):
    deep = pix_fmt.endswith("10le")
    for y, u, v in YUV:
        path = tmp_path / "a.mp4"
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 64, pix_fmt
            stream.options = {"qp": "0"}
            stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
            frame = av.VideoFrame(64, 64, pix_fmt)
            for plane, value in zip(frame.planes, (y, u, v), strict=True):
                count = plane.buffer_size // (2 if deep else 1)
                plane.update(np.full(count, value * 4 if deep else value, "<u2" if deep else "u1").tobytes())
            file.mux(stream.encode(frame))
            file.mux(stream.encode())
        shown = read_media(path, 32).frames[0]
        assert np.abs(shown - to_rgb(y, u, v, matrix, full)).max() <= 1.5, (y, u, v)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj420p", "yuv422p10le", "yuv444p", "nv12", "gray", "rgb24", "bgra"])
@pytest.mark.parametrize("size", [24, 100])
def test_planar_rgb_is_packed_rgb(pix_fmt, size):
    """The pixels that libswscale writes to planes are those it writes to RGB triples."""
    frame = av.VideoFrame.from_ndarray(moving((97, 66))(3), format="rgb24").reformat(format=pix_fmt)
    width = max(round(97 * size / 66), size)
    packed = VideoReformatter().reformat(frame, width, size, "rgb24", interpolation=upright._SCALING).to_ndarray()
    left = (width - size) // 2
    np.testing.assert_array_equal(shape(frame, size), packed[:, left : left + size])


@pytest.mark.parametrize("size", [(97, 65), (320, 180), (640, 480), (1280, 720)])
def test_scaling_is_near_that_of_the_whole_rgb_picture(size):
    """At most 2 levels on average from converting at full size and scaling with Pillow's antialiased bicubic."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    frame = av.VideoFrame.from_ndarray(np.asarray(smooth), format="rgb24").reformat(format="yuv420p")
    full = frame.to_image()
    scale = 56 / min(size)
    plain = full.resize([max(round(side * scale), 56) for side in size], Image.Resampling.BICUBIC)
    left = (plain.width - 56) // 2
    difference = np.abs(shape(frame, 56).astype(int) - np.asarray(plain)[:, left : left + 56])
    assert difference.mean() < 2
    assert np.quantile(difference, 0.999) < 12


def test_fields_are_blended_not_combed(tmp_path):
    def two_moments(i: int) -> np.ndarray:
        picture = np.full((128, 128, 3), 128, np.uint8)
        picture[0::2, 8 * i : 8 * i + 40] = 235
        picture[1::2, 8 * i + 4 : 8 * i + 44] = 16
        return picture

    path = tmp_path / "a.mp4"
    draw(path, at_rate(5), size=(128, 128), options={"x264-params": "tff=1"}, scene=two_moments, interlaced=True)
    with av.open(str(path)) as file:
        frame = next(file.decode(video=0))
    assert frame.interlaced_frame
    shown = shape(frame, 64).astype(int)
    progressive = av.VideoFrame.from_ndarray(frame.to_ndarray(), format="yuv420p")
    np.testing.assert_array_equal(shown, shape(progressive, 64))
    assert np.abs(np.diff(shown[16:48, 16], axis=0)).max() < 6  # rows of one field are 200 levels from the other's


def test_transparent_pixels_of_a_video_are_white(tmp_path):
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:32] = (200, 0, 0, 255)
    draw(tmp_path / "a.mov", at_rate(3), "qtrle", size=(64, 64), pix_fmt="argb", scene=lambda i: rgba)
    shown = read_media(tmp_path / "a.mov", 64).frames[0]
    assert shown[5, 5].tolist() == [200, 0, 0]
    assert shown[60, 5].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    "matrix",
    [
        *((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)),  # quarter turns
        *((-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)),  # mirrored
    ],
)
def test_the_headers_matrix_turns_and_mirrors_the_picture(tmp_path, matrix):
    """The matrix (a, b, c, d) shows point (x, y) at (ax + cy, bx + dy), up to a shift."""
    stored = np.kron(np.arange(40, 240, 10).reshape(4, 5), np.ones((16, 16)))[..., None].repeat(3, 2).astype(np.uint8)
    path = tmp_path / "phone.mp4"
    draw(path, [0, 500], size=(80, 64), scene=lambda i: stored)
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    a, b, c, d = matrix
    fixed = [value << 16 for value in (a, b, 0, c, d, 0, 0, 0)]
    content[start : start + 36] = struct.pack(">9i", *fixed, 1 << 30)
    path.write_bytes(content)
    y, x = np.mgrid[:64, :80]
    right, down = a * x + c * y, b * x + d * y
    expected = np.empty((np.ptp(down) + 1, np.ptp(right) + 1, 3), int)
    expected[down - down.min(), right - right.min()] = stored
    top, left = ((side - 64) // 2 for side in expected.shape[:2])
    shown = read_media(path, 64).frames[0]
    assert np.abs(shown - expected[top : top + 64, left : left + 64]).mean() < 3


def test_the_angle_stands_in_for_a_matrix_that_cannot_be_listed():
    class Unlisted:
        rotation = -90  # clockwise

        @property
        def side_data(self):
            raise ValueError("side data of an unknown type")

    picture = np.arange(6).reshape(2, 3, 1)
    turned = upright.turned(picture, upright.display_matrix(Unlisted()))
    np.testing.assert_array_equal(turned, np.rot90(picture, -1))


def test_colours_that_cannot_be_converted_are_refused(tmp_path):
    draw(tmp_path / "a.mp4", [0, 500], options={"x264-params": "colormatrix=ICtCp"})
    with pytest.raises(MediaError) as caught:
        read_media(tmp_path / "a.mp4", 32)
    assert caught.value.reason == "unknown_colours"
    assert "matrix 14" in caught.value.detail
    assert "a.mp4" in caught.value.detail


def test_constant_luminance_is_read_as_the_usual_bt2020(tmp_path):
    pictures = []
    for name in ("bt2020c", "bt2020nc"):
        draw(tmp_path / "a.mp4", [0, 500], options={"x264-params": f"colormatrix={name}"})
        pictures.append(read_media(tmp_path / "a.mp4", 32).frames)
    np.testing.assert_array_equal(*pictures)
