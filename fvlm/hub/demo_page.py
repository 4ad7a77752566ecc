"""The page itself: Gradio's widgets around a `Viewer`, served to this machine only."""

from __future__ import annotations

import base64
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# Read when Gradio is imported: nothing is reported to anyone.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

from fvlm.data.chat import SOURCE_PROMPTS
from fvlm.data.video import Media
from fvlm.evaluate.maps import ClipMaps
from fvlm.hub.demo import MOST_COLUMNS, Viewer, as_png, draw_time_line
from fvlm.model.configuration import MODES
from fvlm.research.style import MODE_NAMES

logger = logging.getLogger(__name__)

MOST_BYTES = "4gb"
LONGEST_QUESTION = 2000
FORGOTTEN_AFTER = 3600
"""Seconds that a visitor's frames and maps are kept."""
SHOWN = 30
"""Seconds that a message stays."""
WAITING = 8
"""Requests that may wait for their turn; a further one is turned away."""

CAPTION = f"""Under each frame, where its token looked: the coarse query is the same for every frame, the chosen mode's
is written by what was seen before. Heat is the share of attention among the patches, full at four times an even share.
The curve is the entropy of the attention, dashed where it is spread evenly. At most {MOST_COLUMNS} tokens are drawn."""
NO_MAPS = "This model pools cells of a frame instead of looking, so there are no attention maps."


class Seen(NamedTuple):
    """What the last question was about."""

    media: Media
    maps: ClipMaps


class Handlers:
    """What the page's events call; each raises `gr.Error` with one line for whoever looks at it."""

    def __init__(self, viewer: Viewer):
        self.viewer = viewer

    def open_file(self, path: str) -> Iterator[tuple[Media | None, str]]:
        """A dropped file's frames, and what it is; the upload itself is deleted once it was read."""
        yield None, ""  # or a wrong file would leave the one before it to be asked about
        try:
            with _said_on_the_page():
                media = self.viewer.read(path)
        finally:
            Path(path).unlink(missing_ok=True)
        name, count = Path(path).name, len(media.frames)
        if media.kind == "image":
            about = f"a picture, looked at {self.viewer.opened.processor.looks} times"
        else:
            about = f"a video of {media.duration:.1f} s, {count} frame{'s' * (count != 1)} of it looked at"
        yield media, f"{name}: {about}"

    def ask(
        self, media: Media | None, question: str, mode: str, new_tokens: int, layer: int, head: int
    ) -> Iterator[tuple[str, Seen | None, str]]:
        """The answer as it grows, at last with the maps and their time line."""
        if media is None:
            raise gr.Error("Drop a video or a picture first.", print_exception=False)
        question = question.strip()
        if not 1 <= len(question) <= LONGEST_QUESTION:
            raise gr.Error(f"Ask something, in at most {LONGEST_QUESTION} characters.", print_exception=False)
        said = ""
        yield said, None, ""
        with _said_on_the_page():
            for said in self.viewer.answer(media, question, mode, int(new_tokens)):
                yield said, None, ""
            seen = Seen(media, self.viewer.look(media, question, mode, said))
        yield said or "(no words)", seen, self.time_line(seen, layer, head)

    def time_line(self, seen: Seen | None, layer: int, head: int) -> str:
        """HTML with the picture inside, so that no file of it is left; −1 is the mean."""
        if seen is None:
            return ""
        pick = [None if index < 0 else index for index in (layer, head)]
        picture = base64.b64encode(as_png(draw_time_line(*seen, *pick))).decode()
        return (
            '<div style="overflow-x: auto; background: white">'
            '<img id="time-line" alt="frames with attention heat maps over time, and the entropy of the attention"'
            f' style="max-width: none" src="data:image/png;base64,{picture}"></div>'
        )


@contextmanager
def _said_on_the_page() -> Iterator[None]:
    """What goes wrong with a file or a question becomes a message; the log keeps what is not the visitor's doing."""
    try:
        yield
    except (ValueError, OSError) as error:
        said = getattr(error, "detail", None) or str(error)
        raise gr.Error(said, duration=SHOWN, print_exception=False) from error
    except RuntimeError as error:
        logger.exception("a question failed")
        raise gr.Error(f"The model failed: {error}", duration=SHOWN, print_exception=False) from error


def build_page(viewer: Viewer, title: str) -> gr.Blocks:
    """The page around a model."""
    handlers, opened = Handlers(viewer), viewer.opened
    # One at a time: the model is one, and matplotlib's settings are the process's.
    turn = {"concurrency_limit": 1, "concurrency_id": "model"}
    with gr.Blocks(title="fVLM", analytics_enabled=False, fill_width=True, delete_cache=(600, 600)) as page:
        gr.Markdown(f"# Where it looks\n{title}")
        media = gr.State(time_to_live=FORGOTTEN_AFTER)
        seen = gr.State(time_to_live=FORGOTTEN_AFTER)
        with gr.Row():
            with gr.Column():
                file = gr.File(label="Video or picture", elem_id="file")
                about = gr.Markdown(elem_id="about")
                question = gr.Textbox(
                    SOURCE_PROMPTS["sharegpt4video"], label="Question", max_length=LONGEST_QUESTION, elem_id="question"
                )
                mode = gr.Radio(
                    [(MODE_NAMES[mode], mode) for mode in MODES],
                    value=opened.default_mode,
                    label="Mode",
                    elem_id="mode",
                )
                new_tokens = gr.Slider(1, 512, 128, step=1, label="Most tokens of the answer", elem_id="new-tokens")
                button = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column():
                answer = gr.Textbox(label="Answer", lines=8, interactive=False, elem_id="answer")
                with gr.Row(visible=viewer.looks):
                    layer = gr.Dropdown(_choices("layers", viewer.num_layers), value=-1, label="Layer", elem_id="layer")
                    head = gr.Dropdown(_choices("heads", viewer.num_heads), value=-1, label="Head", elem_id="head")
        picture = gr.HTML(elem_id="looks")
        gr.Markdown(CAPTION if viewer.looks else NO_MAPS)

        file.upload(handlers.open_file, file, [media, about], api_name="open_file", **turn)
        file.clear(lambda: (None, ""), None, [media, about], api_visibility="private")
        asked = [media, question, mode, new_tokens, layer, head]
        gr.on([button.click, question.submit], handlers.ask, asked, [answer, seen, picture], api_name="ask", **turn)
        for pick in (layer, head):
            pick.input(handlers.time_line, [seen, layer, head], picture, api_name=f"draw_{pick.elem_id}", **turn)
    return page


def _choices(what: str, count: int) -> list[tuple[str, int]]:
    return [(f"mean of all {what}", -1), *((str(i + 1), i) for i in range(count))]


@contextmanager
def served(viewer: Viewer, title: str, port: int | None = None) -> Iterator[str]:
    """The page's address on this machine, for as long as the context lasts; uploads are deleted at its end.

    Raises OSError where the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="fvlm-page-") as uploads:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = uploads  # read by widgets when they are made
        page = build_page(viewer, title)
        try:
            fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
            _, address, _ = page.queue(max_size=WAITING).launch(
                server_name="127.0.0.1",
                server_port=port,
                share=False,
                ssr_mode=False,
                prevent_thread_lock=True,
                quiet=True,
                max_file_size=MOST_BYTES,
                footer_links=[],
                theme=gr.themes.Default(**fonts),  # the default's own fonts come from the network
            )
            yield address
        finally:
            page.close(verbose=False)
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before
