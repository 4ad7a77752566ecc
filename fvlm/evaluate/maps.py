"""Raw attention maps of fixed clips: the file they are kept in, and what is computed from them.

One `.npz` a clip, no pickles: `frames` uint8 [n, 3, H, W]; `visual_frame` int64 [V] (which frame a visual token looked
at); `look_at` int64 [n, 2] (row and column on a 4 x 4 grid of the object asked about, -1 where nothing is);
`maps_<mode>` float16 [V, L, h, N+1] (CLS first, then patches row-major); `text` (JSON: key, source, user, assistant).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

CELLS = 4


@dataclass(frozen=True, kw_only=True)
class ClipMaps:
    """Attention maps of one clip by mode; shapes as in the module's docstring."""

    key: str
    source: str
    user: str
    assistant: str
    frames: np.ndarray
    visual_frame: np.ndarray
    look_at: np.ndarray
    maps: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_frames, num_visual = len(self.frames), len(self.visual_frame)
        if self.look_at.shape != (num_frames, 2):
            raise ValueError(f"clip {self.key!r}: look_at has shape {self.look_at.shape}, expected {(num_frames, 2)}")
        if num_visual and not 0 <= int(self.visual_frame.min()) <= int(self.visual_frame.max()) < num_frames:
            raise ValueError(f"clip {self.key!r}: visual_frame points outside the {num_frames} frames")
        for mode, maps in self.maps.items():
            if maps.ndim != 4 or len(maps) != num_visual:
                raise ValueError(
                    f"clip {self.key!r}, {mode}: maps have shape {maps.shape}, expected [{num_visual}, L, h, N+1]"
                )
            grid_side(maps.shape[-1] - 1)

    def tokens_to_draw(self, most: int) -> np.ndarray:
        """Indices of at most `most` visual tokens, spaced evenly."""
        count = len(self.visual_frame)
        return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))


def save_clip(clip: ClipMaps, path: str | Path) -> None:
    """Writes a clip atomically: a reader sees the whole file or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"key": clip.key, "source": clip.source, "user": clip.user, "assistant": clip.assistant})
    arrays = {f"maps_{mode}": maps.astype(np.float16) for mode, maps in clip.maps.items()}
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        np.savez_compressed(
            file,
            frames=clip.frames,
            visual_frame=clip.visual_frame,
            look_at=clip.look_at,
            text=np.array(text),
            **arrays,
        )
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_clip(path: str | Path) -> ClipMaps:
    """Reads a clip; raises ValueError naming the file and the missing arrays."""
    with np.load(path, allow_pickle=False) as arrays:
        missing = [name for name in ("frames", "visual_frame", "look_at", "text") if name not in arrays]
        if missing:
            raise ValueError(f"{path}: missing array(s) {', '.join(missing)}; not a file of attention maps")
        text = json.loads(str(arrays["text"]))
        maps = {name[len("maps_") :]: arrays[name] for name in arrays.files if name.startswith("maps_")}
        rest = {name: arrays[name] for name in ("frames", "visual_frame")}
        look_at = arrays["look_at"]
    # A place that is none of the grid asks about nothing: shares and boxes exist for cells only.
    inside = ((look_at >= 0) & (look_at < CELLS)).all(axis=-1, keepdims=True)
    return ClipMaps(maps=maps, look_at=np.where(inside, look_at, -1), **text, **rest)


def grid_side(num_patches: int) -> int:
    """Side of a square patch grid; raises ValueError where the count is no square."""
    side = math.isqrt(num_patches)
    if side * side != num_patches or side == 0:
        raise ValueError(f"{num_patches} patch keys are no square grid; expected keys = CLS + side * side patches")
    return side


def patch_heat(maps: np.ndarray) -> np.ndarray:
    """[V, L, h, N+1] -> float64 [V, N]: mean over heads and all layers, patches only, summing to 1.

    No layer is left out: early ones may find the place and late ones read it out, or the other way round.
    """
    heat = maps[..., 1:].astype(np.float64).mean(axis=(1, 2))
    return heat / heat.sum(axis=-1, keepdims=True)


def cell_shares(heat: np.ndarray, cells: int = CELLS) -> np.ndarray:
    """[V, N] patch shares -> [V, cells, cells]; a patch that lies over several cells is shared out by area."""
    side = grid_side(heat.shape[-1])
    edges_patch, edges_cell = np.arange(side + 1) / side, np.arange(cells + 1) / cells
    low = np.maximum(edges_cell[:-1, None], edges_patch[None, :-1])
    high = np.minimum(edges_cell[1:, None], edges_patch[None, 1:])
    overlap = np.clip(high - low, 0, None) * side
    return np.einsum("rp,vpq,cq->vrc", overlap, heat.reshape(-1, side, side), overlap)


def cued_share(clips: Iterable[ClipMaps], mode: str, cells: int = CELLS) -> dict[str, float | int] | None:
    """Share of attention on the `look_at` cell, over visual tokens after a sample's first that have one.

    The first token is left out because its query is written before anything was seen. Returns {"share", "top1", "n",
    "chance"}: mean share, how often the cued cell is the most looked at, tokens counted, 1/cells²; None without any.
    """
    shares, hits = [], []
    for clip in clips:
        if mode not in clip.maps:
            continue
        by_cell = cell_shares(patch_heat(clip.maps[mode]), cells)
        for token in range(1, len(clip.visual_frame)):
            row, column = clip.look_at[clip.visual_frame[token]]
            if row >= 0:
                shares.append(by_cell[token, row, column])
                hits.append(by_cell[token].argmax() == row * cells + column)
    if not shares:
        return None
    return {"share": float(np.mean(shares)), "top1": float(np.mean(hits)), "n": len(shares), "chance": 1 / cells**2}
