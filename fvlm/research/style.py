"""How figures look and how they are written: PNG beside SVG, colours that stay apart in all common colour blindness."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442")
DASHES = ("-", "--", "-.", ":")
MODE_COLOURS = {"coarse_only": PALETTE[1], "coarse_fine": PALETTE[0], "autoregressive": PALETTE[2]}
MODE_NAMES = {"coarse_only": "coarse only", "coarse_fine": "coarse→fine", "autoregressive": "autoregressive"}
STYLE = {
    "figure.dpi": 120,
    "savefig.dpi": 160,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "fvlm",
}


def save_figure(figure: Figure, stem: str | Path) -> tuple[Path, Path]:
    """Writes `stem`.png and `stem`.svg (no dates inside, so equal records give equal files) and closes the figure."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = (stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg"))
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, bbox_inches="tight", metadata=metadata)
    plt.close(figure)
    return paths
