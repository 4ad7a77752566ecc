"""What the page does, without the page: the answer in parts, the maps, the time line, messages about files."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fvlm.data.errors import MediaError
from fvlm.data.video import Media
from fvlm.evaluate.maps import patch_heat
from fvlm.hub.demo import Viewer, as_png, chosen, draw_time_line, entropies, moments
from fvlm.hub.opening import open_model, processor_for
from fvlm.model import build_model, tiny_config
from fvlm.model.base import VisionLanguageModel
from fvlm.model.configuration import MODES
from launch.demo import main as demo
from tests.data.drawn_videos import at_rate, draw

QUESTION = "Which shape is it?"


@pytest.fixture(scope="module")
def viewer(exported) -> Viewer:
    return Viewer(open_model(str(exported)), seconds=60)


@pytest.fixture
def shown(request, clip, picture):
    return {"clip": clip, "picture": picture}[request.param]


both = pytest.mark.parametrize("shown", ["clip", "picture"], indirect=True)


@both
@pytest.mark.parametrize("mode", MODES)
def test_the_answer_grows_into_that_of_generate(viewer, model, processor, shown, mode):
    said = list(viewer.answer(viewer.read(shown), QUESTION, mode, 12))
    inputs = processor(videos=shown, text=QUESTION)
    tokens = model.generate(**inputs, mode=mode, max_new_tokens=12, do_sample=False)
    assert said[-1] == processor.decode(tokens[0], skip_special_tokens=True).strip()
    assert len(said) == tokens.shape[1] == 12
    assert all(after.startswith(before) for before, after in pairwise(said))


def test_an_answer_nobody_waits_for_is_not_written_to_its_end(viewer, clip, monkeypatch):
    written, generate = [], VisionLanguageModel.generate

    def kept(self, **inputs):
        tokens = generate(self, **inputs)
        written.append(tokens.shape[1])
        return tokens

    monkeypatch.setattr(VisionLanguageModel, "generate", kept)
    answer = viewer.answer(viewer.read(clip), QUESTION, "coarse_only", 4000)
    next(answer)
    answer.close()
    assert 0 < written[0] < 4000


def test_an_answer_ends_with_its_time(exported, clip):
    hasty = Viewer(open_model(str(exported)), seconds=1e-6)
    media = Viewer(hasty.opened, seconds=60).read(clip)
    assert len(list(hasty.answer(media, QUESTION, "coarse_only", 4000))) <= 2
    with pytest.raises(MediaError, match=r"^too_slow: clip\.mp4: not read within"):
        hasty.read(clip)


def test_what_fails_while_writing_reaches_who_reads(viewer, clip):
    media = viewer.read(clip)
    with pytest.raises(ValueError, match="sideways"):
        list(viewer.answer(media, QUESTION, "sideways", 4))
    assert list(viewer.answer(media, QUESTION, "coarse_only", 4))  # and the next one is answered


@both
def test_maps_and_entropy_are_the_models(viewer, model, processor, shown):
    media = viewer.read(shown)
    clip = viewer.look(media, QUESTION, "coarse_fine")
    assert list(clip.maps) == ["coarse_only", "coarse_fine"]
    inputs = processor(videos=shown, text=QUESTION)
    assert np.array_equal(clip.frames, inputs["frames"][0].numpy())
    for mode, maps in clip.maps.items():
        assert maps.shape == (len(clip.frames), viewer.num_layers, viewer.num_heads, 17)
        with torch.no_grad():
            expected = model(**inputs, mode=mode, entropy=True).attention_entropy
        np.testing.assert_allclose(entropies(maps), expected.numpy(), rtol=1e-4, atol=1e-5)
    assert list(viewer.look(media, QUESTION, "coarse_only").maps) == ["coarse_only"]


def test_one_layer_and_one_head_are_that_layer_and_that_head(viewer, clip):
    maps = viewer.look(viewer.read(clip), QUESTION, "autoregressive").maps["autoregressive"]
    one = maps[:, 1, 2, 1:]
    np.testing.assert_allclose(patch_heat(chosen(maps, 1, 2)), one / one.sum(-1, keepdims=True), rtol=1e-5)
    by_head = np.stack([patch_heat(chosen(maps, None, h)) for h in range(viewer.num_heads)])
    assert not np.allclose(by_head[0], by_head[1])
    np.testing.assert_array_equal(chosen(maps, None, None), maps)


def test_the_time_line_has_a_row_a_mode_a_column_a_token_and_the_entropy(viewer, clip):
    media = viewer.read(clip)
    seen = viewer.look(media, QUESTION, "autoregressive")
    assert moments(media, seen) == ["0:00.5", "0:01.5", "0:02.5", "0:03.5"]
    figure = draw_time_line(media, seen, layer=0)
    assert [axes.get_ylabel() for axes in figure.axes] == ["frame", "coarse only", "autoregressive", "entropy\n(nats)"]
    assert [len(axes.images) for axes in figure.axes] == [4, 8, 8, 0]  # heat lies over its frame
    drawn = [line.get_ydata() for line in figure.axes[-1].lines[:2]]
    for curve, maps in zip(drawn, seen.maps.values(), strict=True):
        np.testing.assert_allclose(curve, entropies(maps[:, :1]))
    assert as_png(figure).startswith(b"\x89PNG")
    assert as_png(draw_time_line(media, seen)) != as_png(draw_time_line(media, seen, head=1))


def test_frames_that_are_all_the_same_have_their_own_times(viewer):
    frame = np.random.default_rng(0).integers(0, 256, (1, 56, 56, 3), np.uint8)
    media = Media(frame.repeat(3, axis=0), 3.0, "video")
    assert moments(media, viewer.look(media, QUESTION, "autoregressive")) == ["0:00.5", "0:01.5", "0:02.5"]


def test_three_hours_become_a_time_line_of_64_frames(viewer, tmp_path):
    sparse = {"preset": "ultrafast", "g": "30"}
    hours = draw(tmp_path / "long.mp4", at_rate(1080, rate=0.1), size=(64, 48), options=sparse)
    media = viewer.read(hours)
    seen = viewer.look(media, QUESTION, "coarse_only")
    assert len(seen.visual_frame) == 64
    assert moments(media, seen)[-1].startswith("178:")
    assert [len(axes.images) for axes in draw_time_line(media, seen).axes] == [64, 128, 0]


def test_a_baseline_that_pools_answers_without_maps(tokenizer, clip, picture):
    torch.manual_seed(0)
    model = build_model(tiny_config(len(tokenizer), architecture="multi_token", grid=4)).eval()
    opened = SimpleNamespace(model=model, processor=processor_for(model.config, "tiny"), fine_iterations=1)
    pools = Viewer(opened)
    assert not pools.looks
    for file in (clip, picture):
        media = pools.read(file)
        assert list(pools.answer(media, QUESTION, "coarse_only", 6))
        seen = pools.look(media, QUESTION, "coarse_only")
        assert [axes.get_ylabel() for axes in draw_time_line(media, seen).axes] == ["frame"]


def test_a_wrong_file_is_named_without_its_folder(viewer, tmp_path):
    (tmp_path / "notes.mp4").write_text("These are notes, and no video. " * 20)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:9000])
    for name, said in (("notes.mp4", "neither a picture nor a video"), ("nowhere.mp4", "does not exist")):
        with pytest.raises(MediaError, match=said) as refused:
            viewer.read(tmp_path / name)
        assert name in refused.value.detail
    with pytest.raises(MediaError) as refused:
        viewer.read(tmp_path / "cut.png")
    assert str(tmp_path) not in str(refused.value)


def test_without_gradio_it_says_what_to_install(exported, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "fvlm.hub.demo_page", raising=False)
    assert demo(["--model", str(exported)]) == 1
    assert "pip install -e '.[demo]'" in capsys.readouterr().err


def test_wrong_usage_is_exit_code_2(tmp_path, capsys):
    pytest.importorskip("gradio", reason="no Gradio: pip install -e '.[demo]'")
    assert demo(["--model", str(tmp_path / "nowhere")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        demo(["--model", "x", "--port", "door"])
    assert stopped.value.code == 2
