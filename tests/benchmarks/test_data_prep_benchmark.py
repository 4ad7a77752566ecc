"""The comparison of preparation with the ffmpeg command line, on tiny clips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import PictureType

from benchmarks import data_prep
from benchmarks.data_prep import CONTENDERS, Comparison, Spent, find_ffmpeg, main
from benchmarks.data_prep_clips import FPS, Shot, draw_clips

needs_ffmpeg = pytest.mark.skipif(
    find_ffmpeg(None) is None or not hasattr(os, "sched_setaffinity"),
    reason="no ffmpeg: pip install -c constraints.txt imageio-ffmpeg (and Linux)",
)


def test_clips_are_what_x264_makes(tmp_path):
    (path,) = draw_clips(Shot(2, (20,), (160, 96)), tmp_path, seed=3)
    assert path.name == "2s-gop20.mp4"
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frames = list(file.decode(stream))
        assert (stream.codec.name, stream.width, stream.height) == ("h264", 160, 96)
    assert len(frames) == 2 * FPS
    keyframes = [number for number, frame in enumerate(frames) if frame.key_frame]
    assert np.diff(keyframes).max() <= 20
    assert sum(frame.pict_type == PictureType.B for frame in frames) > FPS
    pictures = np.stack([frame.to_ndarray()[:96] for frame in frames]).astype(int)
    moved = np.abs(np.diff(pictures, axis=0)).mean(axis=(1, 2))
    assert moved.min() > 0.3  # every frame is another
    assert np.median(moved) > 1.5
    assert np.ptp(pictures[0]) > 40


@needs_ffmpeg
def test_the_command_compares_and_writes(tmp_path, capsys):
    cores = os.sched_getaffinity(0)
    arguments = ["--rehearse", "--clips", str(tmp_path / "clips"), "--json", str(tmp_path / "out.json")]
    assert main(arguments) == 0
    assert os.sched_getaffinity(0) == cores
    contents = json.loads((tmp_path / "out.json").read_text())
    figures = contents["figures"]
    assert contents["ffmpeg"].startswith("ffmpeg version")
    assert contents["rehearsal"] is True
    assert {path.stem for path in (tmp_path / "clips").iterdir()} == {"2s-gop250", "2s-gop15"}
    for clip in ("2s-gop250", "2s-gop15"):
        assert figures[f"{clip}/frames"] == 2
        assert all(figures[f"{clip}/{contender}_s"] > 0 for contender in CONTENDERS)
    total = {name: sum(figures[f"{clip}/{name}_s"] for clip in ("2s-gop250", "2s-gop15")) for name in CONTENDERS}
    assert figures["speedup"] == pytest.approx(total["ffmpeg"] / total["ours"])
    assert figures["ours_clips_per_s"] == pytest.approx(2 / total["ours"])
    assert f"speed-up over ffmpeg {figures['speedup']:.2f}" in capsys.readouterr().out


def test_speedups_are_of_processor_time_round_by_round(tmp_path):
    comparison, paths = Comparison("ffmpeg", tmp_path), [Path("a.mp4"), Path("b.mp4")]
    comparison.started = [Spent(0.5, 9)] * 3
    times = {"ours": [1, 2, 4], "in_order": [2, 4, 8], "ffmpeg": [3, 4, 4]}
    for path in paths:
        comparison.facts |= {f"{path.stem}/frames": 1}
        for contender, seconds in times.items():
            comparison.spent[path.stem, contender] = [Spent(each, 99) for each in seconds]
    figures = comparison.figures(paths)
    assert figures["speedup"] == figures["a/speedup"] == pytest.approx(2)  # of 3, 2 and 1
    assert figures["speedup_without_start"] == pytest.approx(1.75)  # of 2.5, 1.75 and 0.875
    assert figures["speedup_over_in_order"] == pytest.approx(2)
    assert figures["ours_clips_per_s"] == pytest.approx(0.5)


@needs_ffmpeg
def test_wrong_frames_get_no_time(tmp_path, monkeypatch, capsys):
    real = data_prep.read_media

    def wrong(path, size):
        media = real(path, size)
        media.frames[1] += 1
        return media

    monkeypatch.setattr(data_prep, "read_media", wrong)
    assert main(["--rehearse", "--clips", str(tmp_path), "--json", str(tmp_path / "out.json")]) == 1
    assert "2s-gop15.mp4: our frames are not those of a full decode" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@needs_ffmpeg
def test_frames_of_other_moments_get_no_time(tmp_path, monkeypatch, capsys):
    real = data_prep.ffmpeg_command

    def late(binary, path, folder):
        command = real(binary, path, folder)
        at = command.index("-i")
        return [*command[:at], "-itsoffset", "0.1", *command[at:]]

    monkeypatch.setattr(data_prep, "ffmpeg_command", late)
    assert main(["--rehearse", "--clips", str(tmp_path)]) == 1
    assert "of ffmpeg's" in (message := capsys.readouterr().err) or "levels from ffmpeg's" in message


@pytest.mark.parametrize(("arguments", "said"), [(["--ffmpeg", "no-such-program"], "no-such-program"), ([], "PATH")])
def test_a_missing_ffmpeg_is_named_with_its_remedy(monkeypatch, capsys, tmp_path, arguments, said):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "pip install -c constraints.txt imageio-ffmpeg" in error


def test_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--rounds", "0"])
    assert caught.value.code == 2
    assert "--rounds 0" in capsys.readouterr().err
    with pytest.raises(subprocess.CalledProcessError):
        Comparison("false", Path("/tmp")).round([], 0)
