"""Made-up figures and attention maps."""

from __future__ import annotations

import numpy as np

from fvlm.evaluate.maps import ClipMaps
from fvlm.evaluate.statistics import wilson_interval

CHANCE = 0.125
CSV_COLUMNS = (
    "run_id", "step", "samples_seen", "wall_time_sec", "train_loss", "val_loss", "loss_fine", "loss_coarse",
    "loss_ratio", "grad_norm", "attention_entropy", "lr_connector", "lr_dino", "lr_llm", "throughput", "gpu_mem_gb",
)  # fmt: skip


def figures(accuracy: float, n: int = 200) -> dict:
    low, high = wilson_interval(accuracy * n, n)
    return {"accuracy": accuracy, "n": n, "chance": CHANCE, "low": low, "high": high, "flags": []}


def make_clip(side: int = 4, frames: int = 5, seed: int = 0, **maps_on_cue: float) -> ClipMaps:
    """Maps that put the given share of attention (CLS left out) on the cued cell, in every layer and head."""
    rng = np.random.default_rng(seed)
    look_at = rng.integers(0, 4, (frames, 2))
    per_cell = (side // 4) ** 2
    maps = {}
    for mode, share in maps_on_cue.items():
        values = np.full((frames, 2, 3, side, side), (1 - share) / (side * side - per_cell))
        for t, (row, column) in enumerate(look_at * (side // 4)):
            values[t, :, :, row : row + side // 4, column : column + side // 4] = share / per_cell
        values = values.reshape(frames, 2, 3, -1)
        maps[mode] = np.concatenate([np.full((frames, 2, 3, 1), 0.2), 0.8 * values], axis=-1).astype(np.float16)
    return ClipMaps(
        key=f"cue-{seed}",
        source="synthetic/cue",
        user="Which shape has the colour of the first square, picture by picture?",
        assistant="ring moon bar cross",
        frames=rng.integers(0, 255, (frames, 3, 14 * side, 14 * side), dtype=np.uint8),
        visual_frame=np.arange(frames),
        look_at=look_at,
        maps=maps,
    )
