"""Decoding only what the chosen frames need: the same pictures as a full decode, of every kind of stream."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from fvlm.data import sparse, video, video_file
from fvlm.data.bitstream import Bitstream
from fvlm.data.upright import Shaper
from fvlm.data.video import frame_times, read_media
from fvlm.data.video_file import VideoFile
from tests.data.drawn_videos import Everything, at_rate, draw

SIZE = 24
UNEVEN = np.cumsum(np.random.default_rng(0).choice([7, 20, 40, 500, 1500], 200)).tolist()
H265 = "log-level=none:keyint=30"
A_FRAME = Fraction(1, 25)
STREAMS = {  # file name, how it is drawn, most frames that may come out of the decoder, of all (None: in order)
    "h264": ("a.mp4", {}, 0.7),
    "h264-short-groups": ("a.mp4", {"options": {"g": "30"}}, 0.4),
    "h264-matroska": ("a.mkv", {"options": {"g": "30"}}, 0.4),
    "h264-transport-stream": ("a.ts", {"options": {"g": "30"}}, 0.4),
    "h264-fragments": ("a.mp4", {"options": {"g": "30"}, "container": {"movflags": "frag_keyframe+empty_moov"}}, 0.4),
    "h264-no-duration": ("a.mkv", {"options": {"g": "30"}, "container": {"live": "1"}}, 0.4),
    "h264-open-groups": ("a.mp4", {"options": {"g": "30", "x264-params": "open-gop=1"}}, 0.7),
    "h264-intra-refresh": ("a.mkv", {"options": {"g": "30", "x264-params": "intra-refresh=1"}}, 1),
    "h264-deep-reordering": ("a.mp4", {"options": {"x264-params": "bframes=16:b-adapt=0:ref=16"}}, 0.7),
    "h264-slices-temporal": ("a.mp4", {"options": {"x264-params": "cabac=0:direct=temporal:slices=3:bframes=8"}}, 0.7),
    "h264-baseline": ("a.mp4", {"options": {"profile": "baseline", "g": "30"}}, 0.6),
    "h264-interlaced": ("a.mp4", {"options": {"x264-params": "tff=1", "g": "40"}, "interlaced": True}, 0.6),
    "h264-10-bit": ("a.mp4", {"pix_fmt": "yuv420p10le"}, 0.7),
    "h264-odd-size": ("a.mp4", {"pix_fmt": "yuv444p", "size": (97, 65)}, 0.7),
    "h264-uneven": ("a.mp4", {"moments": UNEVEN, "options": {"g": "20"}}, 0.7),
    "h264-uneven-matroska": ("a.mkv", {"moments": UNEVEN, "options": {"g": "20"}}, 1.5),
    "h264-one-a-second": ("a.mp4", {"moments": at_rate(60, 1), "options": {"g": "10"}}, 1),
    "h264-one-in-five-seconds": ("a.mp4", {"moments": at_rate(30, 0.2), "options": {"g": "4"}}, 1),
    "h264-one-frame": ("a.mp4", {"moments": [0]}, 1),
    "h264-late": ("a.mkv", {"moments": at_rate(150, start=90000)}, 1.5),
    "h264-late-empty-edit": ("a.mp4", {"moments": at_rate(150, start=90000)}, 0.7),
    "h264-edit-list": ("a.mp4", {"moments": at_rate(200, start=-1300), "options": {"g": "30"}}, 0.7),
    "hevc-open-groups": ("a.mp4", {"codec": "libx265", "options": {"x265-params": H265}}, 0.5),
    "hevc-closed-groups": ("a.mkv", {"codec": "libx265", "options": {"x265-params": f"{H265}:open-gop=0:radl=3"}}, 0.5),
    "hevc-layers": ("a.mp4", {"codec": "libx265", "options": {"x265-params": f"{H265}:temporal-layers=3"}}, 0.8),
    "hevc-10-bit": ("a.ts", {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": {"x265-params": H265}}, 0.8),
    "vp8": ("a.webm", {"codec": "libvpx", "options": {"g": "30", "auto-alt-ref": "1", "lag-in-frames": "16"}}, 0.7),
    "vp9": ("a.webm", {"codec": "libvpx-vp9", "options": {"g": "30", "deadline": "realtime", "cpu-used": "8"}}, 0.7),
    "av1": ("a.mp4", {"codec": "libsvtav1", "options": {"g": "30", "preset": "12"}}, 0.7),
    "motion-jpeg": ("a.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}, 0.1),
    "prores": ("a.mov", {"codec": "prores_ks", "pix_fmt": "yuv422p10le", "moments": at_rate(60)}, 0.1),
    "mpeg4": ("a.avi", {"codec": "mpeg4", "options": {"bf": "2", "g": "20"}, "clock": A_FRAME}, None),
    "mpeg2": ("a.ts", {"codec": "mpeg2video", "options": {"bf": "2", "g": "20"}, "clock": A_FRAME}, None),
}


def drawn(name: str, folder: Path) -> Path:
    file, how, _ = STREAMS[name]
    how = {"moments": at_rate(180), **how}
    return draw(folder / file, **how)


@pytest.fixture
def came_out(monkeypatch) -> list[int]:
    """Counts frames that come out of sparse decoding."""
    counts, real = [], sparse._SparseDecoder._come_out
    monkeypatch.setattr(
        sparse._SparseDecoder, "_come_out", lambda self, frames: (counts.append(len(frames)), real(self, frames))[1]
    )
    return counts


@pytest.mark.parametrize("name", STREAMS)
def test_frames_are_those_of_a_full_decode(tmp_path, name, came_out):
    path, most = drawn(name, tmp_path), STREAMS[name][2]
    everything = Everything(path)
    np.testing.assert_array_equal(read_media(path, SIZE).frames, everything.chosen(SIZE))
    if most is None:
        assert not came_out
    else:
        assert 0 < sum(came_out) <= max(most * len(everything.frames), 1)
    np.testing.assert_array_equal(read_media(path, SIZE, max_frames=2).frames, everything.chosen(SIZE, 2))
    if most is None:
        return
    last, rng = everything.frames[-1][0], np.random.default_rng(1)
    dense = [start for start, _ in everything.frames][2:40]  # exactly on the frames; more than the decoder holds back
    for times in [np.sort(rng.uniform(0, last, rng.integers(1, 9))) for _ in range(6)] + [np.array(dense or [0.0])]:
        with VideoFile(path) as file:
            taken = sparse.read_sparsely(file, times, Shaper(path, SIZE, file.pixel_aspect))
        np.testing.assert_array_equal(np.stack(taken), everything.at(times, SIZE))


@pytest.mark.parametrize(
    "name",
    [
        "decord__flipping_a_pancake.mkv",
        "decord__video_90.mov",
        "moviepy__big_buck_bunny_432_433.webm",
        "moviepy__chaplin.mp4",
        "moviepy__fire2.mp4",
        "torchcodec__av1_video.mkv",
        "torchcodec__h265_video.mp4",
        "torchcodec__nasa_13013.mp4",
    ],
)
def test_frames_of_real_videos_are_those_of_a_full_decode(shared_fixtures, name, came_out):
    path = shared_fixtures / "videos" / name
    everything = Everything(path)
    for most in (3, 64):
        np.testing.assert_array_equal(read_media(path, SIZE, most).frames, everything.chosen(SIZE, most))
    assert came_out


@pytest.mark.parametrize(
    ("file", "codec", "options", "arrives"),
    [
        ("a.mp4", "libx264", {"g": "40"}, True),
        ("a.mkv", "libx264", {"g": "40"}, True),
        ("a.mp4", "libx265", {"x265-params": "log-level=none:keyint=40"}, True),
        ("a.webm", "libvpx-vp9", {"g": "40", "deadline": "realtime", "cpu-used": "8"}, True),
        ("a.mkv", "libsvtav1", {"g": "40", "preset": "12"}, True),
        ("a.mp4", "libx264", {"g": "40", "x264-params": "open-gop=1"}, False),  # recovery points do not help
        ("a.mp4", "libx264", {"g": "2000"}, False),  # one keyframe: seeking leads back to it
    ],
)
def test_seeking_gives_the_same_frames(tmp_path, monkeypatch, file, codec, options, arrives):
    path = draw(tmp_path / file, at_rate(700), codec, size=(64, 48), options=options)
    everything, read, sought = Everything(path), [], []
    real_packets, real_seek = sparse._packets, VideoFile.seek
    monkeypatch.setattr(sparse, "_packets", lambda file: (read.append(1) or packet for packet in real_packets(file)))
    monkeypatch.setattr(VideoFile, "seek", lambda self, ticks: (sought.append(ticks), real_seek(self, ticks))[1])
    monkeypatch.setattr(sparse, "_FAR", 2.0)
    np.testing.assert_array_equal(read_media(path, SIZE, max_frames=4).frames, everything.chosen(SIZE, 4))
    assert len(sought) == (3 if arrives else 1)
    assert (sum(read) < 500) == arrives


CUT = {
    "mp4": ("a.mp4", {"options": {"g": "30"}, "container": {"movflags": "faststart"}}),
    "fragments": STREAMS["h264-fragments"][:2],
    "matroska": STREAMS["h264-matroska"][:2],
    "transport-stream": STREAMS["h264-transport-stream"][:2],
    "hevc": STREAMS["hevc-closed-groups"][:2],
    "vp9": STREAMS["vp9"][:2],
}


@pytest.mark.parametrize("name", CUT)
def test_a_broken_tail_costs_what_it_breaks(tmp_path, name):
    file, how = CUT[name]
    whole = draw(tmp_path / f"whole-{file}", at_rate(180), **how)
    content, rng = whole.read_bytes(), np.random.default_rng(2)
    for share in rng.uniform(0.3, 1, 6):
        path = tmp_path / file
        path.write_bytes(content[: int(share * len(content))])
        media, everything = read_media(path, SIZE), Everything(path)
        np.testing.assert_array_equal(media.frames, everything.chosen(SIZE))
        assert media.duration == pytest.approx(everything.declared or everything.end) or "decodes" in media.warnings[0]


@pytest.mark.parametrize("name", ["h264-short-groups", "h264-matroska"])
def test_what_stands_in_for_damage_is_that_of_a_full_decode(tmp_path, name):
    """The decoder makes it up from pictures before, which sparse decoding would not have."""
    path, concealed = drawn(name, tmp_path), 0
    content = path.read_bytes()
    whole = Everything(path)
    with VideoFile(path) as file:
        spots = [(packet.pos, packet.size) for packet in file.packets() if packet.size and not packet.is_keyframe]
    for at, count in sorted(spots, key=lambda spot: -spot[1])[:8]:  # the largest are referred to
        damaged = bytearray(content)
        damaged[at + count // 2 : at + count] = bytes(count - count // 2)
        path.write_bytes(damaged)
        everything = Everything(path)
        np.testing.assert_array_equal(read_media(path, SIZE).frames, everything.chosen(SIZE))
        concealed += len(everything.frames) == len(whole.frames)
    assert concealed


def test_damage_in_what_no_chosen_frame_needs_is_not_noticed(tmp_path):
    path = draw(tmp_path / "a.mp4", at_rate(300), options={"g": "25", "sc_threshold": "0"})
    clean = read_media(path, SIZE, max_frames=3).frames  # at 2, 6 and 10 s
    with VideoFile(path) as file:
        needless = [p for p in file.packets() if p.pts is not None and 3 < float(p.pts * p.time_base) < 5]
        spots = [(packet.pos, packet.size) for packet in needless]
    content = bytearray(path.read_bytes())
    for at, count in spots:
        content[at : at + count] = bytes(count)
    path.write_bytes(content)
    media = read_media(path, SIZE, max_frames=3)
    np.testing.assert_array_equal(media.frames, clean)
    assert not media.warnings


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize(("name", "repeated"), [("a.ts", True), ("a.mkv", True), ("a.mkv", False)])
def test_parameter_sets_that_change_in_midstream(tmp_path, monkeypatch, codec, repeated, name):
    """Two encodings spliced; the second one's parameter sets may come just once, in a group that no time needs.

    They differ so that the second decodes with the first one's as well, to other colours.
    """
    shared, more = {
        "libx264": ("keyint=25:min-keyint=25:scenecut=0", ":chroma-qp-offset=12"),
        "libx265": ("keyint=25:min-keyint=25:scenecut=0:log-level=none", ":cbqpoffs=12:crqpoffs=12"),
    }[codec]
    parts = [
        draw(tmp_path / f"{i}.ts", at_rate(200), codec, options={f"{codec[3:]}-params": params})
        for i, params in enumerate([shared, shared + more])
    ]
    path = spliced(tmp_path / name, parts, repeated)
    everything = Everything(path)
    assert len(everything.frames) > 390
    monkeypatch.setattr(sparse, "_FAR", 2.0)  # seek over them, too
    for most in (2, 3, 5):
        np.testing.assert_array_equal(read_media(path, SIZE, most).frames, everything.chosen(SIZE, most))


@pytest.mark.parametrize("most", [10**6, 10**4])
def test_frames_may_change_size_up_to_a_bound(tmp_path, monkeypatch, most):
    sizes = ((64, 48), (192, 128), (48, 96))
    parts = [draw(tmp_path / f"{i}.ts", at_rate(200), size=size, options={"g": "25"}) for i, size in enumerate(sizes)]
    path = spliced(tmp_path / "a.mkv", parts, repeated=True)
    everything = Everything(path)
    assert len(everything.frames) == 600
    monkeypatch.setattr(video_file, "MAX_PIXELS", most)
    media = read_media(path, SIZE)
    if most > 192 * 128:
        np.testing.assert_array_equal(media.frames, everything.chosen(SIZE))
    else:
        assert media.duration == pytest.approx(8, abs=0.2)
        np.testing.assert_array_equal(media.frames, everything.at(frame_times(media.duration), SIZE))


def spliced(path: Path, parts: list[Path], repeated: bool) -> Path:
    """The packets of Annex B `parts`, spliced; unless `repeated`, each has parameter sets just at its start."""
    with av.open(str(path), "w") as out:
        stream, shift = None, 0
        for part in parts:
            with av.open(str(part)) as file:
                source = file.streams.video[0]
                bitstream = Bitstream(source.codec_context)
                stream = stream or out.add_stream_from_template(source)
                for number, packet in enumerate(packet for packet in file.demux(source) if packet.size):
                    lost = set() if repeated or not number else bitstream.parameter_sets(packet)
                    kept = [b"\0\0\1" + unit for unit in bitstream._units(packet) if unit not in lost]
                    copy = av.Packet(b"".join(kept))
                    copy.pts, copy.dts = packet.pts + shift, packet.dts + shift
                    copy.time_base, copy.is_keyframe, copy.stream = packet.time_base, packet.is_keyframe, stream
                    out.mux(copy)
                shift += round(8 / packet.time_base)
    return path


def test_keyframes_are_not_believed_to_the_container(tmp_path):
    """An MP4 whose list of keyframes has other frames but for the first; of other codecs FFmpeg looks for itself."""
    path = draw(tmp_path / "a.mp4", at_rate(180), "libx265", options={"x265-params": H265})
    content = bytearray(path.read_bytes())
    begin = content.index(b"stss") + 8
    (count,) = struct.unpack_from(">I", content, begin)
    first, *others = struct.unpack_from(f">{count}I", content, begin + 4)
    struct.pack_into(f">{count}I", content, begin + 4, first, *(number + 7 for number in others))
    path.write_bytes(content)
    with VideoFile(path) as file:
        numbers = [number for number, packet in enumerate(file.packets(), 1) if packet.size and packet.is_keyframe]
    assert len(others) > 3
    assert {number + 7 for number in others} == set(numbers) - {first}
    everything = Everything(path)
    for most in (2, 64):
        np.testing.assert_array_equal(read_media(path, SIZE, most).frames, everything.chosen(SIZE, most))


def test_the_choice_waits_for_frames_that_are_decoded_later():
    timeline = sparse._Timeline(np.array([0.25]), base=0.1)
    for pts in (0, 4, 1, 8, 6):
        timeline.add(pts)
    assert list(timeline.settle(ahead=4)) == []  # 2 may still come
    timeline.add(2)
    assert list(timeline.settle(ahead=3)) == [2]
    assert timeline.done


@pytest.mark.parametrize("later", [1, 4])
def test_times_that_jump_back_or_occur_twice_are_unsure(later):
    timeline = sparse._Timeline(np.array([0.25, 0.9]), base=0.1)
    for pts in (0, 1, 2, 4, 5):
        timeline.add(pts)
    assert list(timeline.settle(ahead=2)) == [2]
    with pytest.raises(sparse.Unsure):
        timeline.add(later)


def test_unsure_files_are_decoded_in_order(tmp_path, monkeypatch):
    path = draw(tmp_path / "a.mp4", at_rate(100))
    expected = read_media(path, SIZE)
    calls, real = [], video._read_in_order

    def unsure(*_):
        raise sparse.Unsure("asked to")

    monkeypatch.setattr(video, "read_sparsely", unsure)
    monkeypatch.setattr(video, "_read_in_order", lambda *given: (calls.append(1), real(*given))[1])
    np.testing.assert_array_equal(read_media(path, SIZE).frames, expected.frames)
    assert calls == [1]
    assert frame_times(expected.duration).shape == (4,)
