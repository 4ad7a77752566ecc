"""`launch/describe.py`: whatever file a person has, an answer or one clear line."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from fvlm.data.upright import Shaper
from fvlm.model.base import VisionLanguageModel
from launch.describe import main as describe
from tests.data.drawn_videos import at_rate, draw


@pytest.fixture
def ask(exported, capsys):
    """ask(*arguments) -> exit code, standard output, standard error; the exported model is asked for four tokens."""

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        code = describe([*map(str, arguments), "--model", str(exported), "--new-tokens", "4", "--device", "cpu"])
        return code, *capsys.readouterr()

    return run


def expected(model, processor, file, question: str, **options) -> str:
    inputs = processor(videos=file, text=question)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, **options)
    return processor.decode(tokens[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize("options", [{}, {"mode": "coarse_only"}, {"mode": "coarse_fine", "fine_iterations": 2}])
def test_the_answer_is_the_models(ask, model, processor, clip, options):
    arguments = [part for name, x in options.items() for part in ("--" + name.replace("_", "-"), x)]
    code, out, err = ask(clip, "--ask", "Which shape is it?", *arguments)
    assert (code, err) == (0, "")
    assert out == expected(model, processor, clip, "Which shape is it?", **options) + "\n"


def test_each_of_several_files_gets_its_answer_though_one_is_no_video(ask, model, processor, clip, picture, tmp_path):
    (tmp_path / "notes.mp4").write_text("These are notes, and no video. " * 20)
    code, out, err = ask(clip, tmp_path / "notes.mp4", picture, "--ask", "What is it?")
    assert code == 1
    assert out == "".join(f"{file}: {expected(model, processor, file, 'What is it?')}\n" for file in (clip, picture))
    assert err.count("\n") == 1
    assert err.startswith("describe: unknown_format: ")
    assert "notes.mp4: neither a picture nor a video" in err


def test_three_hours_are_looked_at_64_times_in_bounded_memory(ask, tmp_path, monkeypatch):
    hours = draw(
        tmp_path / "long.mp4",
        at_rate(2160, rate=0.2),
        size=(64, 48),
        options={"preset": "ultrafast", "g": "30"},
    )
    shaped, looked = [], []
    shape, generate = Shaper.__call__, VisionLanguageModel.generate
    monkeypatch.setattr(Shaper, "__call__", lambda self, frame: shaped.append(frame.pts) or shape(self, frame))
    monkeypatch.setattr(
        VisionLanguageModel,
        "generate",
        lambda self, **inputs: looked.append(inputs["frames"].shape) or generate(self, **inputs),
    )
    tracemalloc.start()
    code, _, err = ask(hours, "--mode", "coarse_only")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (code, err) == (0, "")
    assert len(set(shaped)) == len(shaped) == 64
    assert looked == [(1, 64, 3, 56, 56)]
    assert peak < 50e6


def test_an_animation_and_a_portrait_clip(ask, tmp_path):
    pictures = [Image.fromarray(np.full((40, 30, 3), 20 * i, np.uint8)) for i in range(6)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=500)
    portrait = draw(tmp_path / "phone.mp4", at_rate(30, rate=10), size=(54, 96))
    for file in (tmp_path / "a.gif", portrait):
        assert ask(file)[0] == 0


@pytest.mark.parametrize("name", ["nowhere.mp4", "empty.mp4", "folder"])
def test_what_is_no_file_or_empty_is_said(ask, tmp_path, name):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder").mkdir()
    code, out, err = ask(tmp_path / name)
    assert (code, out) == (1, "")
    reason = "empty_file" if name == "empty.mp4" else "missing_file"
    assert err.startswith(f"describe: {reason}: {tmp_path / name}")
    assert err.count("\n") == 1


def test_real_files(ask, shared_fixtures):
    videos, odd = shared_fixtures / "videos", shared_fixtures / "odd"
    readable = [
        videos / "decord__video_90.mov",
        videos / "moviepy__pigs_in_a_polka.gif",
        videos / "torchcodec__av1_video.mkv",
        shared_fixtures / "images" / "pillow__hopper_orientation_6.jpg",
        odd / "moviepy__no_duration.webm",
    ]
    code, out, err = ask(*readable)
    assert (code, err) == (0, "")
    assert [line.split(": ")[0] for line in out.splitlines() if ": " in line] == [str(file) for file in readable]
    broken = ["torchcodec__nasa_13013.mp4.audio.mp3", "pillow__decompression_bomb.gif", "pillow__truncated_image.png"]
    code, out, err = ask(*(odd / name for name in broken))
    assert (code, out) == (1, "")
    reasons = [line.split(": ")[1] for line in err.splitlines()]
    assert reasons == ["no_video_stream", "too_many_pixels", "truncated_picture"]


def test_wrong_usage_is_exit_code_2(ask, exported, tmp_path, clip, capsys):
    assert describe([str(clip), "--model", str(tmp_path / "nowhere")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    for wrong in (["--new-tokens", "0"], ["--mode", "sideways"], ["--temperature", "-1"], ["--device", "abacus"]):
        with pytest.raises(SystemExit) as stopped:
            describe([str(clip), "--model", str(exported), *wrong])
        assert stopped.value.code == 2
        assert wrong[0] in capsys.readouterr().err
