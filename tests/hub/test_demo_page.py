"""The page over its own protocol: what a browser sends and gets, without one."""

from __future__ import annotations

import base64
import os
import re
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

gr = pytest.importorskip("gradio", reason="no Gradio: pip install -e '.[demo]'")
gradio_client = pytest.importorskip("gradio_client", reason="no Gradio: pip install -e '.[demo]'")

from fvlm.hub.demo import Viewer  # noqa: E402
from fvlm.hub.demo_page import Handlers, served  # noqa: E402
from fvlm.hub.opening import open_model  # noqa: E402
from launch.demo import main as demo  # noqa: E402

QUESTION = "Which shape is it?"


@pytest.fixture(scope="module")
def viewer(exported) -> Viewer:
    return Viewer(open_model(str(exported)), seconds=60)


@pytest.fixture(scope="module")
def address(viewer):
    with served(viewer, "tiny") as address:
        yield address


@pytest.fixture
def visitor(address):
    return gradio_client.Client(address, verbose=False)


def uploads() -> list[Path]:
    files = Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*")
    return [path for path in files if path.is_file() and path.stat().st_size]  # Gradio makes empty ones


def size_of(html: str) -> tuple[int, int]:
    """Width and height of the PNG inside."""
    picture = base64.b64decode(re.search(r'base64,([^"]+)"', html).group(1))
    return int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")


def test_a_file_is_asked_about_and_looked_into(visitor, viewer, clip):
    about = visitor.predict(gradio_client.handle_file(str(clip)), api_name="/open_file")
    assert about == "clip.mp4: a video of 4.0 s, 4 frames of it looked at"
    assert uploads() == []
    said = list(visitor.submit(QUESTION, "autoregressive", 12, -1, -1, api_name="/ask"))
    answer, picture = said[-1]
    assert [answer] == list(viewer.answer(viewer.read(clip), QUESTION, "autoregressive", 12))[-1:]
    assert answer
    assert size_of(picture)[0] > 4 * 110
    by_head = visitor.predict(1, 2, api_name="/draw_head")
    assert size_of(by_head) == size_of(picture)
    assert by_head != picture


def test_what_is_no_media_gets_a_line_and_the_next_file_its_answer(visitor, picture, tmp_path):
    (tmp_path / "notes.mp4").write_text("These are notes, and no video. " * 20)
    with pytest.raises(gradio_client.exceptions.AppError, match=r"^notes\.mp4: neither a picture nor a video"):
        visitor.predict(gradio_client.handle_file(str(tmp_path / "notes.mp4")), api_name="/open_file")
    with pytest.raises(gradio_client.exceptions.AppError, match="Drop a video or a picture first"):
        visitor.predict(QUESTION, "coarse_fine", 6, -1, -1, api_name="/ask")
    assert uploads() == []
    about = visitor.predict(gradio_client.handle_file(str(picture)), api_name="/open_file")
    assert about == "still.png: a picture, looked at 3 times"
    for question in (" ", "x" * 2001):
        with pytest.raises(gradio_client.exceptions.AppError, match="Ask something"):
            visitor.predict(question, "coarse_fine", 6, -1, -1, api_name="/ask")
    assert visitor.predict(QUESTION, "autoregressive", 6, 0, -1, api_name="/ask")[0]


def test_a_model_that_fails_is_said_and_logged(viewer, clip, monkeypatch, caplog):
    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(viewer, "answer", fails)
    said = Handlers(viewer).ask(viewer.read(clip), QUESTION, "coarse_fine", 6, -1, -1)
    with pytest.raises(gr.Error, match="The model failed: out of memory"):
        list(said)
    assert "a question failed" in caplog.text


def test_the_command_serves_until_it_is_interrupted(exported, clip, monkeypatch, capsys):
    abouts = []

    def visited() -> None:
        address = re.search(r"http://\S+", capsys.readouterr().out).group()
        visitor = gradio_client.Client(address, verbose=False)
        abouts.append(visitor.predict(gradio_client.handle_file(str(clip)), api_name="/open_file"))
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.demo.threading", SimpleNamespace(Event=lambda: SimpleNamespace(wait=visited)))
    assert demo(["--model", str(exported), "--device", "cpu"]) == 0
    assert abouts == ["clip.mp4: a video of 4.0 s, 4 frames of it looked at"]


def test_ended_by_a_signal_it_leaves_no_folder(exported, monkeypatch):
    folders = []

    def ended() -> None:
        folders.append(Path(os.environ["GRADIO_TEMP_DIR"]))
        assert folders[0].is_dir()
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("launch.demo.threading", SimpleNamespace(Event=lambda: SimpleNamespace(wait=ended)))
    assert demo(["--model", str(exported), "--device", "cpu"]) == 0
    assert not folders[0].exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_this_machine_is_served_and_nothing_is_left(viewer, clip):
    with served(viewer, "tiny") as address:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        host, port = re.fullmatch(r"http://([\d.]+):(\d+)/", address).groups()
        assert host == "127.0.0.1"
        with socket.socket() as to_another_address, pytest.raises(ConnectionRefusedError):
            to_another_address.connect(("127.0.0.2", int(port)))
        with pytest.raises(OSError), served(viewer, "tiny", int(port)):
            pass
        assert folder.is_dir()
    assert not folder.exists()
