"""What the page of `launch/demo.py` does, without the page: read a file, answer in parts, look, draw a time line.

Shapes: n frames, V visual tokens, L layers, h heads, N patches; an attention map has N + 1 weights, CLS first.
"""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import BatchFeature
from transformers.generation.streamers import BaseStreamer

from fvlm.data.errors import MediaError
from fvlm.data.video import Media, read_media
from fvlm.evaluate.maps import ClipMaps, patch_heat
from fvlm.hub.opening import OpenedModel
from fvlm.model import FoveatedVLM
from fvlm.model.padded import pack_padded
from fvlm.research.strips import draw_look
from fvlm.research.style import MODE_COLOURS, MODE_NAMES, STYLE

MOST_COLUMNS = 64
CELL = 1.1
"""Inches of a frame on the time line."""


class _Tokens(BaseStreamer):
    """The tokens that `generate` writes, one by one, for another thread; transformers' own holds back whole words."""

    def __init__(self):
        self._written: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()

    def put(self, value: torch.Tensor) -> None:
        """Called with the next token ids."""
        self._written.put(value.flatten().tolist())

    def end(self) -> None:
        """Called once there are no more."""
        self._written.put(None)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._written.get, None)


class Viewer:
    """One model that is shown files and asked about them, one question at a time.

    Args:
        opened: the model with its processor.
        device: where it runs.
        seconds: the most that reading a file may take, and the most that an answer is written for.
    """

    def __init__(self, opened: OpenedModel, device: torch.device | str = "cpu", seconds: float = 120.0):
        self.opened, self.device, self.seconds = opened, torch.device(device), seconds
        self.model = opened.model.to(self.device).eval()
        # An answer that nobody waits for any longer may still be on its last token.
        self._one_at_a_time = threading.Lock()

    @property
    def looks(self) -> bool:
        """Whether there are attention maps: the multi-token baseline pools instead."""
        return isinstance(self.model, FoveatedVLM)

    @property
    def num_layers(self) -> int:
        """Layers of an attention map."""
        return self.model.config.vision_config.num_hidden_layers if self.model.config.deep_query else 1

    @property
    def num_heads(self) -> int:
        """Heads of an attention map."""
        return self.model.config.vision_config.num_attention_heads

    def read(self, path: str | Path) -> Media:
        """The frames of a video or picture; raises MediaError, whose message has the file's name without its folder."""
        processor = self.opened.processor
        try:
            return read_media(path, processor.frame_size, processor.max_frames, self.seconds)
        except MediaError as error:
            raise MediaError(error.reason, error.detail.replace(str(path), Path(path).name)) from error

    def answer(self, media: Media, question: str, mode: str, new_tokens: int) -> Iterator[str]:
        """The likeliest answer so far, again and again while it grows; the same text as `launch/describe.py` prints.

        Writing stops after `new_tokens`, after `seconds`, or when the iterator is closed. Raises what `generate` does.
        """
        inputs = self._inputs(media, question)
        streamer, left = _Tokens(), threading.Event()

        def nobody_waits(ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
            return torch.full((len(ids),), left.is_set(), device=ids.device)

        def write() -> None:
            try:
                with self._one_at_a_time:
                    self.model.generate(
                        **inputs,
                        mode=mode,
                        fine_iterations=self.opened.fine_iterations,
                        max_new_tokens=new_tokens,
                        max_time=self.seconds,
                        do_sample=False,
                        streamer=streamer,
                        stopping_criteria=[nobody_waits],
                    )
            except BaseException:
                streamer.end()  # or the reader would wait forever
                raise

        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(write)
            try:
                ids = []
                for more in streamer:
                    ids += more
                    if more:
                        yield self.opened.processor.decode(ids, skip_special_tokens=True).strip()
            finally:
                left.set()
            writing.result()

    def look(self, media: Media, question: str, mode: str, answer: str = "") -> ClipMaps:
        """Where each token looked: float32 maps of the coarse query and of `mode`, in the order of time.

        Without maps for a model that does not look (`looks`).
        """
        inputs, config = self._inputs(media, question), self.model.config
        frames = inputs["frames"][0]
        visual_frame, maps = np.arange(len(frames)), {}
        if self.looks:
            batch = pack_padded(config, **inputs).batch
            in_order = batch.visual_index.argsort().cpu().numpy()
            visual_frame = visual_frame.repeat(config.tokens_per_frame)  # the pack holds one of frames that are alike
            with self._one_at_a_time:
                for each in dict.fromkeys(("coarse_only", mode)):
                    found = self.model.attention_maps(batch, each, self.opened.fine_iterations)
                    maps[each] = found.float().cpu().numpy()[in_order]
        return ClipMaps(
            key="asked",
            source="page",
            user=question,
            assistant=answer,
            frames=frames.cpu().numpy(),
            visual_frame=visual_frame,
            look_at=np.full((len(frames), 2), -1),
            maps=maps,
        )

    def _inputs(self, media: Media, question: str) -> BatchFeature:
        still = media.kind == "image"
        frames = media.frames[0] if still else media.frames
        return self.opened.processor(videos=frames, text=question).to(self.device)


def chosen(maps: np.ndarray, layer: int | None, head: int | None) -> np.ndarray:
    """Maps [V, L, h, N + 1] of one layer, one head or both, counted from 0; None takes all of them."""
    layers = slice(None) if layer is None else slice(layer, layer + 1)
    heads = slice(None) if head is None else slice(head, head + 1)
    return maps[:, layers, heads]


def entropies(maps: np.ndarray) -> np.ndarray:
    """Nats [V]: entropy over CLS and patches, mean over layers and heads, as the model itself measures it."""
    weights = maps.astype(np.float64)
    return -(weights * np.log(np.maximum(weights, 1e-30))).sum(-1).mean((1, 2))


def moments(media: Media, clip: ClipMaps) -> list[str]:
    """What stands over each visual token: its frame's time, or which look at a still it is."""
    if media.kind == "image":
        return [f"look {i + 1}" for i in range(len(clip.visual_frame))]
    seconds = (clip.visual_frame + 0.5) * media.duration / len(clip.frames)
    return [f"{int(s // 60)}:{s % 60:04.1f}" for s in seconds]


def draw_time_line(media: Media, clip: ClipMaps, layer: int | None = None, head: int | None = None) -> Figure:
    """Frames side by side in time; below them where the coarse query and the chosen mode looked, and the entropy.

    Heat is the mean over the layers and heads asked for, patches only; full heat is four times an even share. At most
    `MOST_COLUMNS` visual tokens are drawn, evenly spaced.
    """
    tokens = clip.tokens_to_draw(MOST_COLUMNS)
    maps = {mode: chosen(found, layer, head)[tokens] for mode, found in clip.maps.items()}
    rows = 1 + len(maps)
    width, height = CELL * len(tokens) + 1.2, CELL * rows + (1.9 if maps else 0.4)
    with matplotlib.rc_context({**STYLE, "figure.dpi": 100}):
        figure = Figure(figsize=(width, height))
        ratios = [CELL] * rows + ([1.2] if maps else [])
        grid = figure.subplots(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
        figure.subplots_adjust(
            left=1.1 / width, right=1 - 0.1 / width, top=1 - 0.3 / height, bottom=0.35 / height, hspace=0.06
        )
        _draw_row(grid[0], clip, tokens, "frame")
        for axes, (mode, found) in zip(grid[1:rows], maps.items(), strict=True):
            _draw_row(axes, clip, tokens, MODE_NAMES[mode], patch_heat(found))
        over = moments(media, clip)
        for column, token in enumerate(tokens):
            grid[0].text(column, -0.56, over[token], ha="center", va="bottom", fontsize=8)
        if maps:
            _draw_entropy(grid[-1], maps)
    return figure


def _draw_row(axes: Axes, clip: ClipMaps, tokens: np.ndarray, name: str, heat: np.ndarray | None = None) -> None:
    """Each token's frame in a square of 1 around its number, under its heat ([tokens, N] shares)."""
    for column, token in enumerate(tokens):
        frame = clip.frames[clip.visual_frame[token]].transpose(1, 2, 0)
        extent = (column - 0.48, column + 0.48, 0.48, -0.48)
        if heat is None:
            draw_look(axes, frame, extent)
        else:
            draw_look(axes, frame, extent, heat[column], 4 / heat.shape[1])
    axes.set(xlim=(-0.5, len(tokens) - 0.5), ylim=(0.5, -0.5), aspect="auto", xticks=[], yticks=[])
    axes.set_ylabel(name, rotation=0, ha="right", va="center")
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _draw_entropy(axes: Axes, maps: dict[str, np.ndarray]) -> None:
    """A curve a mode, under the frames; dashed where attention is spread evenly over everything."""
    for mode, found in maps.items():
        axes.plot(entropies(found), marker="o", markersize=3, color=MODE_COLOURS[mode], label=MODE_NAMES[mode])
    count = len(found)
    most = np.log(found.shape[-1])
    axes.axhline(most, color="0.4", linestyle="--", linewidth=0.8)
    axes.set(xlim=(-0.5, count - 0.5), ylim=(0, 1.1 * most), xticks=range(count))
    axes.set_xticklabels([str(i + 1) for i in range(count)], fontsize=7)
    axes.set_ylabel("entropy\n(nats)", rotation=0, ha="right", va="center")
    axes.legend(loc="lower left", fontsize=8, ncols=2)


def as_png(figure: Figure) -> bytes:
    """The figure's bytes, without a file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100, metadata={"Software": None})
    return file.getvalue()
