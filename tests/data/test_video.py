"""Reading media: the right frames, upright and cropped, from whatever files bring, and a reason where it cannot be."""

from __future__ import annotations

import itertools
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from fvlm.data.errors import MediaError
from fvlm.data.video import decode_jpeg, encode_jpeg, frame_times, read_media
from tests.data.drawn_videos import at_rate, draw, grey, numbers

NO_B = {"bf": "0"}


@pytest.mark.parametrize("duration", [0.0, 0.1, 1.0, 1.4, 2.6, 10.381, 63.4, 64.0, 65.0, 7200.0])
def test_frame_times_are_one_a_second_then_64_evenly(duration):
    times = frame_times(duration)
    count = min(max(int(np.floor(duration + 0.5)), 1), 64)
    assert times.shape == (count,)
    np.testing.assert_allclose(times, [(2 * i + 1) * duration / (2 * count) for i in range(count)])


@pytest.mark.parametrize("options", [NO_B, {}])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
def test_frames_are_chosen_by_presentation_time_at_a_variable_rate(tmp_path, name, options):
    moments = [0, 40, 80, 1100, 1140, 2000, 2600, 3999, 4000, 4480, 4500, 5200]
    draw(tmp_path / name, moments, size=(64, 48), scene=grey, options=options)
    media = read_media(tmp_path / name, 16)
    expected = [max(i for i, m in enumerate(moments) if m <= t * 1000) for t in frame_times(media.duration)]
    assert 5 < media.duration < 5.7  # muxers differ in how long the last one lasts
    assert media.frames.shape == (round(media.duration), 16, 16, 3)
    assert numbers(media.frames) == expected
    assert media.kind == "video"
    assert media.warnings == ()


def test_times_count_from_the_first_frame(tmp_path):
    draw(tmp_path / "late.mkv", [5000, 5400, 6200, 7100, 7900], size=(64, 48), scene=grey, options=NO_B)
    media = read_media(tmp_path / "late.mkv", 16, max_frames=2)
    times = frame_times(media.duration, 2)
    starts = np.array([0, 0.4, 1.2, 2.1, 2.9])
    assert numbers(media.frames) == [int(np.flatnonzero(starts <= t)[-1]) for t in times]


def test_a_container_without_presentation_times(tmp_path):
    """AVI tells when packets are decoded; with frames that are decoded before earlier ones that is another order."""
    draw(tmp_path / "a.avi", at_rate(49, 10), size=(64, 48), scene=grey, clock=Fraction(1, 10))
    media = read_media(tmp_path / "a.avi", 16)
    np.testing.assert_allclose(numbers(media.frames), [4, 14, 24, 34, 44], atol=1)


def test_duration_is_measured_where_the_header_has_none(tmp_path):
    draw(tmp_path / "live.mkv", range(0, 3000, 100), size=(64, 48), scene=grey, container={"live": "1"})
    with av.open(str(tmp_path / "live.mkv")) as container:
        assert not container.duration
        assert not container.streams.video[0].duration
    media = read_media(tmp_path / "live.mkv", 16)
    assert media.duration == pytest.approx(3.0)
    assert numbers(media.frames) == [5, 15, 25]
    assert "no duration" in media.warnings[0]


@pytest.mark.parametrize("track", ["first", "second"])
def test_the_stream_that_is_marked_as_default_is_read(tmp_path, track):
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams = []
        for name, side, shade in (("first", 96, 40), ("second", 64, 200)):
            stream = container.add_stream("libx264", rate=25)
            stream.width = stream.height = side
            stream.disposition = Disposition.default if name == track else Disposition.original
            streams.append((stream, np.full((side, side, 3), shade, np.uint8)))
        for i in range(50):
            for stream, picture in streams:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts = i
                container.mux(stream.encode(frame))
        for stream, _ in streams:
            container.mux(stream.encode())
    shade = {"first": 40, "second": 200}[track]
    np.testing.assert_allclose(read_media(tmp_path / "two.mkv", 32).frames, shade, atol=2)


@pytest.mark.parametrize("marked", [True, False])
def test_a_cover_picture_is_not_the_video(tmp_path, marked):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        cover, film = container.add_stream("mjpeg"), container.add_stream("libx264", rate=25)
        cover.width = cover.height = 512
        film.width = film.height = 64
        cover.pix_fmt, film.pix_fmt = "yuvj420p", "yuv420p"
        cover.disposition = Disposition.attached_pic
        film.disposition = Disposition.default if marked else Disposition(0)
        picture = av.VideoFrame.from_ndarray(np.full((512, 512, 3), 220, np.uint8), format="rgb24")
        container.mux(cover.encode(picture.reformat(format="yuvj420p")))
        for _ in range(50):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 60, np.uint8), format="rgb24")
            container.mux(film.encode(frame))
        container.mux(film.encode())
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert sum(bool(each.disposition & Disposition.attached_pic) for each in container.streams.video) == 1
    media = read_media(tmp_path / "a.mp4", 32)
    assert media.duration == pytest.approx(2)
    np.testing.assert_allclose(media.frames, 60, atol=2)


@pytest.mark.parametrize("options", [NO_B, {}])
def test_packets_without_times_follow_one_another_at_the_usual_rate(tmp_path, options):
    draw(tmp_path / "a.h264", at_rate(49), size=(64, 48), scene=grey, options=options)
    media = read_media(tmp_path / "a.h264", 16)
    assert media.duration == pytest.approx(49 / 25)
    assert numbers(media.frames) == [12, 36]
    assert "no duration" in media.warnings[0]


def test_a_cut_file_gives_the_frames_that_are_there(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), np.uint8)
    whole = tmp_path / "whole.mp4"
    moments = range(0, 4000, 100)
    draw(whole, moments, size=(64, 48), options=NO_B, container={"movflags": "faststart"}, scene=lambda i: noise[i])
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    media = read_media(tmp_path / "cut.mp4", 16)
    assert 0.5 < media.duration < 3
    assert len(media.frames) == len(frame_times(media.duration))
    assert "decodes" in media.warnings[0]
    assert "of 4.00 s" in media.warnings[0]


def test_pixels_that_are_not_square_are_shown_as_displayed(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 255, 96)[None, :, None], (96, 96, 3)).astype(np.uint8).copy()
    draw(tmp_path / "wide.mp4", [0, 500], size=(96, 96), scene=lambda i: ramp, aspect=Fraction(2, 1))
    frame = read_media(tmp_path / "wide.mp4", 32).frames[0]
    # displayed 192 x 96: the centre 96 are the middle half of the ramp
    assert frame[16, 0].mean() == pytest.approx(255 / 4, abs=6)
    assert frame[16, -1].mean() == pytest.approx(3 * 255 / 4, abs=6)


def reference_frames(path: Path, size: int, max_frames: int) -> np.ndarray:
    """Every frame decoded, the shown one picked by time, scaled by Pillow: no early stop, no shared scaler."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        frames = [(frame.time, frame.rotation, frame.to_image()) for frame in container.decode(stream)]
        declared = stream.duration * stream.time_base if stream.duration else container.duration / av.time_base
    picked = []
    for time in frame_times(float(declared), max_frames):
        _, angle, image = max((f for f in frames if f[0] - frames[0][0] <= time + 1e-6), key=lambda f: f[0])
        image = image.rotate(angle, expand=True)
        scale = size / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = ((side - size) // 2 for side in image.size)
        picked.append(np.asarray(image.convert("RGB").crop((left, top, left + size, top + size))))
    return np.stack(picked)


@pytest.mark.parametrize(
    "name",
    [
        "decord__flipping_a_pancake.mkv",
        "decord__video_90.mov",
        "moviepy__big_buck_bunny_432_433.webm",
        "moviepy__fire2.mp4",
        "moviepy__pigs_in_a_polka.gif",
        "torchcodec__av1_video.mkv",
        "torchcodec__h265_video.mp4",
        "torchcodec__nasa_13013.mp4",
    ],
)
def test_real_videos_equal_a_full_decode(shared_fixtures, name):
    path = shared_fixtures / "videos" / name
    media, expected = read_media(path, 112), reference_frames(path, 112, 64)
    assert media.frames.shape == expected.shape
    differences = np.abs(media.frames.astype(int) - expected).mean(axis=(1, 2, 3))
    assert differences.max() < 4  # scalers differ a little; the neighbouring frame of a moving picture would be far off


def test_max_frames_spreads_over_the_whole_video(shared_fixtures):
    path = shared_fixtures / "videos" / "moviepy__chaplin.mp4"
    media = read_media(path, 56, max_frames=4)
    difference = np.abs(media.frames.astype(int) - reference_frames(path, 56, 4)).mean()
    assert len(media.frames) == 4
    assert difference < 4


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("moviepy__zero_byte_result.webm", "empty_file"),
        ("pillow__broken.png", "broken_picture"),
        ("pillow__decompression_bomb.gif", "too_many_pixels"),
        ("pillow__truncated_image.png", "truncated_picture"),
        ("pillow__truncated_jpeg.jpg", "truncated_picture"),
        ("pillow__zero_width.gif", "broken_picture"),
        ("torchcodec__nasa_13013.mp4.audio.mp3", "no_video_stream"),
        ("does_not_exist.mp4", "missing_file"),
        ("manifest.jsonl", "unknown_format"),
    ],
)
def test_odd_files_are_refused_with_their_reason(shared_fixtures, name, reason):
    with pytest.raises(MediaError) as caught:
        read_media(shared_fixtures / "odd" / name, 56)
    assert caught.value.reason == reason
    assert name in caught.value.detail


def test_odd_files_that_can_be_read_are_read(shared_fixtures):
    damaged = read_media(shared_fixtures / "odd" / "decord__corrupted.mp4", 56)
    assert damaged.duration == pytest.approx(2.8)  # 28 of 50 frames at 10 a second
    assert len(damaged.frames) == 3
    assert "5.00 s" in damaged.warnings[0]
    unknown = read_media(shared_fixtures / "odd" / "moviepy__no_duration.webm", 56)
    assert len(unknown.frames) == round(unknown.duration) == 5


def test_a_playlist_in_disguise_reaches_no_other_file(tmp_path):
    draw(tmp_path / "secret.mp4", [0, 500])
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    for name in ("list.mp4", "list.m3u8"):
        with pytest.raises(MediaError):
            read_media(tmp_path / name, 16)


def test_names_with_colons_and_spaces(tmp_path):
    draw(tmp_path / "http: a?b%20#.mp4", [0, 500])
    assert len(read_media(tmp_path / "http: a?b%20#.mp4", 16).frames) == 1


def picture(path: Path) -> np.ndarray:
    media = read_media(path, 64)
    assert media.kind == "image"
    assert media.duration == 0
    assert media.frames.shape == (1, 64, 64, 3)
    return media.frames[0].astype(int)


def test_stills_equal_pillow(shared_fixtures):
    for name in ("flower.jpg", "hopper_gray.jpg", "pil_sample_cmyk.jpg", "sugarshack.mpo"):
        path = shared_fixtures / "images" / f"pillow__{name}"
        image = Image.open(path).convert("RGB")
        scale = 64 / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = ((side - 64) // 2 for side in image.size)
        expected = np.asarray(image.crop((left, top, left + 64, top + 64)))
        assert np.abs(picture(path) - expected).mean() < 2, name


def giant(jpeg: bytes) -> bytes:
    """A JPEG that says it is of 20 000 x 20 000 pixels."""
    start = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:start] + struct.pack(">HH", 20000, 20000) + jpeg[start + 4 :]


def test_a_giant_still_is_refused_by_its_header(tmp_path):
    (tmp_path / "giant.jpg").write_bytes(giant(encode_jpeg(np.zeros((16, 16, 3), np.uint8))))
    with pytest.raises(MediaError, match=r"too_many_pixels.*giant\.jpg"):
        read_media(tmp_path / "giant.jpg", 16)


def test_exif_orientation(tmp_path):
    ramp = np.broadcast_to(np.arange(0, 256, 4, np.uint8)[None, :, None], (64, 64, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(ramp).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(picture(tmp_path / "turned.png"), np.rot90(ramp, -1))


def test_transparency_goes_on_white_and_16_bits_keep_their_range(tmp_path):
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:32] = (200, 0, 0, 255)
    Image.fromarray(rgba).save(tmp_path / "half.png")
    shown = picture(tmp_path / "half.png")
    assert shown[5, 5].tolist() == [200, 0, 0]
    assert shown[60, 5].tolist() == [255, 255, 255]
    deep = np.broadcast_to(np.arange(64, dtype=np.uint16) * 1024, (64, 64)).copy()
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(picture(tmp_path / "deep.png")[..., 0], deep // 256)


@pytest.mark.parametrize("name", ["moving.gif", "moving.webp", "moving.png"])
def test_animations_are_videos(tmp_path, name):
    images = [Image.new("RGB", (32, 32), (10 + 40 * i,) * 3) for i in range(5)]
    options = {"lossless": True} if name.endswith("webp") else {}
    images[0].save(
        tmp_path / name, save_all=True, append_images=images[1:], duration=[500, 700, 100, 900, 800], **options
    )
    media = read_media(tmp_path / name, 16)
    assert media.kind == "video"
    assert media.duration == pytest.approx(3.0)
    assert [round((frame.mean() - 10) / 40) for frame in media.frames] == [1, 3, 4]  # shown at 0.5, 1.5 and 2.5 s


@pytest.mark.parametrize("name", ["moving.gif", "moving.webp", "moving.png"])
@pytest.mark.parametrize("ticks", [3, 6])
def test_an_animation_that_takes_too_long_is_refused(tmp_path, monkeypatch, name, ticks):
    """While its delays are read, five frames, and while frames are taken; the clock ticks when it is looked at."""
    images = [Image.new("RGB", (32, 32), (10 + 40 * i,) * 3) for i in range(5)]
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=1000)
    clock = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with pytest.raises(MediaError, match=f"not read within {ticks} s") as caught:
        read_media(tmp_path / name, 16, seconds=ticks)
    assert caught.value.reason == "too_slow"
    assert next(clock) == ticks + 2
    assert len(read_media(tmp_path / name, 16, seconds=11).frames) == 5


def test_jpeg_there_and_back():
    rng = np.random.default_rng(0)
    frame = np.kron(rng.integers(0, 255, (7, 7, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    content = encode_jpeg(frame)
    assert np.abs(decode_jpeg(content, 56).transpose(1, 2, 0).astype(int) - frame).mean() < 2
    assert decode_jpeg(content, 28).shape == (3, 28, 28)
    assert decode_jpeg(content, 56).dtype == np.uint8
    with pytest.raises(MediaError, match="prepare with --size 112"):
        decode_jpeg(content, 112)


def test_bad_jpeg_has_a_reason():
    content = encode_jpeg(np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(MediaError, match="bad_jpeg"):
        decode_jpeg(content[: len(content) // 2], 16)
    with pytest.raises(MediaError, match="bad_jpeg"):
        decode_jpeg(b"not a picture", 16)
    with pytest.raises(MediaError, match="too_many_pixels"):
        decode_jpeg(giant(content), 16)
