"""A strip of frames with where each query looked: attention maps over the frames they were computed on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from fvlm.evaluate.maps import ClipMaps, grid_side, patch_heat
from fvlm.research.style import MODE_NAMES, STYLE, save_figure


def plot_strip(
    clip: ClipMaps, stem: str | Path, modes: Sequence[str] | None = None, max_frames: int = 8, cells: int = 4
) -> tuple[Path, Path]:
    """One row of plain frames, then one row a mode with its attention over the frames.

    Heat: mean over heads and all layers, patch keys only (CLS left out and the rest rescaled to sum to 1), one fixed
    colour scale. A box marks the `look_at` cell of a `cells` x `cells` grid.
    Of a longer clip, `max_frames` visual tokens spaced evenly are drawn.
    """
    modes = [mode for mode in (modes or clip.maps) if mode in clip.maps]
    if not modes:
        raise ValueError(f"clip {clip.key!r}: no maps of the modes asked for; it has {', '.join(clip.maps) or 'none'}")
    tokens = clip.tokens_to_draw(max_frames)
    heat = {mode: patch_heat(clip.maps[mode])[tokens] for mode in modes}
    # Full heat is four times the uniform share: attention spread over everything stays dim, one good look shines.
    top = 4 / next(iter(heat.values())).shape[1]
    with plt.rc_context({**STYLE, "axes.grid": False}):
        size = (1.15 * len(tokens) + 0.9, 1.15 * (len(modes) + 1) + 0.5)
        figure, grid = plt.subplots(len(modes) + 1, len(tokens), figsize=size, squeeze=False)
        for column, token in enumerate(tokens):
            frame = clip.frames[clip.visual_frame[token]].transpose(1, 2, 0)
            look_at = clip.look_at[clip.visual_frame[token]]
            _frame(grid[0, column], frame, look_at, cells)
            grid[0, column].set_title(f"frame {clip.visual_frame[token] + 1}", fontsize=7)
            for row, mode in enumerate(modes, start=1):
                _frame(grid[row, column], frame, look_at, cells, heat[mode][column], top)
        for row, name in enumerate(["frame", *(MODE_NAMES.get(mode, mode) for mode in modes)]):
            grid[row, 0].set_ylabel(name, fontsize=8)
        figure.suptitle(_caption(clip), fontsize=8, y=0.99)
        figure.subplots_adjust(wspace=0.06, hspace=0.06, top=1 - 0.5 / size[1])  # two lines of text above
        return save_figure(figure, stem)


def _frame(
    axes: Axes, frame: np.ndarray, look_at: np.ndarray, cells: int, heat: np.ndarray | None = None, top: float = 1.0
) -> None:
    """Draws one frame (uint8 [H, W, 3]), under its `heat` ([patches] shares, `top` the brightest), with its box."""
    height, width = frame.shape[:2]
    axes.set_xticks([])
    axes.set_yticks([])
    draw_look(axes, frame, (0, width, height, 0), heat, top)
    if look_at[0] >= 0:
        box = (width / cells, height / cells)
        corner = (look_at[1] * box[0], look_at[0] * box[1])
        # White under cyan: the box stays visible on dark and on light, with and without colour vision.
        axes.add_patch(Rectangle(corner, *box, fill=False, edgecolor="white", linewidth=2.6))
        axes.add_patch(Rectangle(corner, *box, fill=False, edgecolor="#00B8D4", linewidth=1.3))


def draw_look(
    axes: Axes,
    frame: np.ndarray,
    extent: tuple[float, float, float, float],
    heat: np.ndarray | None = None,
    top: float = 1.0,
) -> None:
    """A frame (uint8 [H, W, 3]) at `extent`; grey under its `heat` ([patches] shares, `top` the brightest), if any."""
    if heat is None:
        axes.imshow(frame, extent=extent)
        return
    axes.imshow(0.6 * frame.mean(-1), extent=extent, cmap="gray", vmin=0, vmax=255)  # colour is left to the heat
    side = grid_side(len(heat))
    shares = np.minimum(heat.reshape(side, side) / top, 1)
    # The more a patch is looked at, the more its heat covers it; elsewhere the frame stays readable.
    axes.imshow(shares, extent=extent, cmap="inferno", alpha=0.8 * shares, vmin=0, vmax=1, interpolation="nearest")


def _caption(clip: ClipMaps) -> str:
    user = clip.user if len(clip.user) <= 110 else clip.user[:107] + "..."
    answer = clip.assistant if len(clip.assistant) <= 110 else clip.assistant[:107] + "..."
    return f"{user}\nanswer: {answer}"
