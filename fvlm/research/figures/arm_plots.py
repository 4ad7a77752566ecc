"""Figures that hold arms of a study side by side: curves in panels, dots with their intervals, families.

Every function draws one figure from plain values and writes it as PNG and SVG; it returns both paths. Arms differ by
colour, dash and marker, so that each figure can be read in grey as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fvlm.research.plots import column_words
from fvlm.research.study.rows import Spread
from fvlm.research.style import DASHES, MODE_COLOURS, MODE_NAMES, PALETTE, STYLE, save_figure
from fvlm.research.tables import Table

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MODE_MARKERS = {"coarse_only": "s", "coarse_fine": "o", "autoregressive": "^"}
BASE_STYLE = {"color": "black", "linestyle": "-", "linewidth": 1.8, "zorder": 5}


def plot_panels(
    panels: Mapping[str, Mapping[str, Sequence[Table]]],
    column: str,
    ylabel: str,
    stem: str | Path,
    base: str | None = None,
    x: str = "samples_seen",
    level: tuple[float, str] | None = None,
    scale: float = 1,
    top: float | None = None,
) -> tuple[Path, Path]:
    """A column of `curves.csv` over `x`: a panel a question, a line an arm, thin lines its further seeds.

    `panels`: title -> arm -> one table a seed. `base`: the arm drawn in black in every panel.
    `level`: a height to mark in every panel, and its name; `scale`: what the column is multiplied by;
    `top`: where the shared axis ends, in the column's own unit; None: where the curves do.
    """
    columns = min(len(panels), 3 if len(panels) <= 9 else 4)
    rows = math.ceil(len(panels) / columns)
    with plt.rc_context({**STYLE, "legend.fontsize": 7}):
        size = (3.3 * columns + 0.4, 2.7 * rows + 0.2)
        figure, grid = plt.subplots(
            rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
        )
        grid[0][0].xaxis.set_major_locator(MaxNLocator(4))  # counts of samples have many digits
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for place, (axes, (title, arms)) in enumerate(zip(grid.flat, panels.items(), strict=False)):
            axes.set_title(title, fontsize=9)
            number = 0
            for arm, tables in arms.items():
                _arm_lines(axes, tables, x, column, arm, None if arm == base else number, scale)
                number += arm != base
            if level is not None:
                axes.axhline(scale * level[0], color="0.4", linewidth=0.9, linestyle=":", label=level[1])
            axes.legend()
            axes.label_outer()
            if place + columns >= len(panels):
                axes.xaxis.set_tick_params(labelbottom=True)
                axes.set_xlabel(column_words(x))
        for row in grid:
            row[0].set_ylabel(ylabel)
        if top is not None:
            grid[0][0].set_ylim(top=scale * top)
        return save_figure(figure, stem)


def usual_top(panels: Mapping[str, Mapping[str, Sequence[Table]]], column: str) -> float | None:
    """Where to end the shared axis, so that an arm that diverged does not flatten all others; None: as it comes."""
    tables = [table for arms in panels.values() for seeds in arms.values() for table in seeds]
    values = np.concatenate([table.numbers(column) for table in tables])
    values = values[np.isfinite(values)]
    usual = np.quantile(values, 0.95)
    return 1.5 * usual if values.max() > 3 * usual > 0 else None


def _arm_lines(
    axes: Axes, tables: Sequence[Table], x: str, column: str, arm: str, number: int | None, scale: float
) -> None:
    """One line a seed; the first one carries the label. `number` None: the base arm."""
    for seed, table in enumerate(tables):
        at, values = table.numbers(x), scale * table.numbers(column)
        keep = np.isfinite(at) & np.isfinite(values)
        if not keep.any():
            continue
        style = dict(BASE_STYLE) if number is None else {**_style(number), "linewidth": 1.3}
        label = arm if seed == 0 else None
        if seed:
            style |= {"linewidth": 0.7, "alpha": 0.7}
        elif number is not None and keep.sum() <= 40:
            style |= {"marker": MARKERS[number % len(MARKERS)], "markersize": 3}
        axes.plot(at[keep], values[keep], label=label, **style)


def _style(number: int) -> dict[str, str]:
    return {"color": PALETTE[number % len(PALETTE)], "linestyle": DASHES[number % len(DASHES)]}


def plot_dots(
    groups: Mapping[str, Mapping[str, Mapping[str, Spread | None]]],
    axes_words: Mapping[str, str],
    stem: str | Path,
    base: str | None = None,
) -> tuple[Path, Path]:
    """Arms as rows, a panel a figure: the mean over seeds, the reach of their 95 % intervals, each seed as a small dot.

    `groups`: question -> arm -> figure's name -> its spread; `axes_words`: figure's name -> words for its axis. A band
    marks the reach of the `base` arm.
    """
    rows = [(group, arm, figures) for group, arms in groups.items() for arm, figures in arms.items()]
    with plt.rc_context(STYLE):
        size = (3.0 * len(axes_words) + 2.2, 0.26 * len(rows) + 1.1)
        figure, both = plt.subplots(1, len(axes_words), figsize=size, squeeze=False, sharey=True, layout="constrained")
        for axes, (name, words) in zip(both[0], axes_words.items(), strict=True):
            scale = 100 if name == "accuracy" else 1
            axes.set_xlabel(words)
            for place, (_, arm, figures) in enumerate(rows):
                spread = figures.get(name)
                if spread is not None:
                    _dot(axes, place, spread, scale, color="black" if arm == base else PALETTE[0])
                    if arm == base:
                        axes.axvspan(scale * spread.low, scale * spread.high, color="0.5", alpha=0.12, linewidth=0)
            _mark_chance(axes, [figures.get(name) for _, _, figures in rows], scale)
            _rule_groups(axes, [group for group, _, _ in rows])
        both[0][0].set_yticks(range(len(rows)), [_row_name(group, arm) for group, arm, _ in rows])
        both[0][0].set_ylim(len(rows) - 0.5, -0.5)
        return save_figure(figure, stem)


def plot_arm_modes(arms: Mapping[str, Mapping[str, Spread]], stem: str | Path) -> tuple[Path, Path]:
    """Accuracy of each arm in the modes that it was asked in: arm -> mode -> spread; one row an arm."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.6, 0.34 * len(arms) + 1.2), layout="constrained")
        seen: set[str] = set()
        for place, by_mode in enumerate(arms.values()):
            for index, (mode, spread) in enumerate(by_mode.items()):
                label = None if mode in seen else MODE_NAMES.get(mode, mode)
                shift = (index - (len(by_mode) - 1) / 2) * 0.2  # equal accuracies stay apart
                marker = {"marker": MODE_MARKERS.get(mode, "D"), "color": MODE_COLOURS.get(mode, "0.4")}
                _dot(axes, place + shift, spread, 100, label=label, **marker)
                seen.add(mode)
        _mark_chance(axes, [next(iter(by_mode.values())) for by_mode in arms.values()], 100)
        axes.set_yticks(range(len(arms)), list(arms))
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_xlabel("held-out accuracy, %")
        _legend_outside(axes)
        return save_figure(figure, stem)


def plot_families(
    series: Mapping[str, Mapping[str, Spread]],
    differences: Mapping[str, tuple[float, float, float]],
    stem: str | Path,
    words: tuple[str, str],
    scale: float = 100,
) -> tuple[Path, Path]:
    """Left, each family's figure in every series; right, what looking is worth, with its interval.

    Args:
        series: legend -> family -> spread; one that begins with a mode's name has its colour.
        differences: family -> (difference, low, high), in the order in which the families are drawn, from the top.
        words: for the two horizontal axes.
        scale: 100 for shares.
    """
    families = list(differences)
    with plt.rc_context(STYLE):
        size = (7.6, 0.34 * len(families) + 1.4)
        figure, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained", width_ratios=(3, 2))
        for number, (label, by_family) in enumerate(series.items()):
            shift = (number - (len(series) - 1) / 2) * 0.6 / len(series)
            mode = next((mode for mode, name in MODE_NAMES.items() if label.startswith(name)), None)
            style = {"color": MODE_COLOURS.get(mode, PALETTE[number % len(PALETTE)])}
            style |= {"marker": MODE_MARKERS.get(mode, MARKERS[number % len(MARKERS)])}
            for place, family in enumerate(families):
                if family in by_family:
                    _dot(left, place + shift, by_family[family], scale, label=label, **style)
                    label = None
        for place, family in enumerate(families):
            _tick(left, place, next((by[family].chance for by in series.values() if family in by), math.nan), scale)
            value, low, high = (scale * part for part in differences[family])
            clear = low > 0 or high < 0  # filled where the interval leaves out zero: grey and colour blindness keep it
            colour = PALETTE[0] if value > 0 else PALETTE[4]
            error = [[value - low], [high - value]] if math.isfinite(low) else None
            fill = colour if clear else "white"
            right.errorbar(value, place, xerr=error, fmt="o", color=colour, mfc=fill, markersize=5, capsize=2)
        right.axvline(0, color="0.2", linewidth=0.9)
        left.set_yticks(range(len(families)), [family.removeprefix("synthetic/") for family in families])
        left.set_ylim(len(families) - 0.5, -0.5)
        left.set_xlabel(words[0])
        right.set_xlabel(words[1])
        figure.legend(loc="outside upper center", ncols=2, fontsize=7)
        return save_figure(figure, stem)


def _dot(axes: Axes, y: float, spread: Spread, scale: float, label: str | None = None, **style: str) -> None:
    mean = scale * spread.mean
    # A bound can lie on the wrong side of the mean by rounding alone; matplotlib refuses a negative length.
    error = [[max(0.0, mean - scale * spread.low)], [max(0.0, scale * spread.high - mean)]]
    style = {"marker": "o", **style}
    axes.errorbar(mean, y, xerr=error, label=label, linestyle="none", markersize=4.5, capsize=2, linewidth=1, **style)
    if len(spread.values) > 1:
        seeds = [scale * value for value in spread.values]
        axes.scatter(
            seeds, [y] * len(seeds), s=9, facecolors="white", edgecolors=style.get("color"), linewidths=0.7, zorder=6
        )


def _tick(axes: Axes, y: float, chance: float, scale: float) -> None:
    if math.isfinite(chance):
        axes.vlines(scale * chance, y - 0.42, y + 0.42, color="0.2", linestyle="--", linewidth=1)


def _mark_chance(axes: Axes, spreads: Sequence[Spread | None], scale: float) -> None:
    """A line where all rows have one chance level; a tick a row where they differ."""
    levels = [math.nan if spread is None else spread.chance for spread in spreads]
    known = {level for level in levels if math.isfinite(level)}
    if len(known) == 1:
        axes.axvline(scale * known.pop(), color="0.2", linestyle="--", linewidth=1, label="chance")
        return
    for place, level in enumerate(levels):
        _tick(axes, place, level, scale)


def _rule_groups(axes: Axes, groups: Sequence[str]) -> None:
    for place in range(1, len(groups)):
        if groups[place] != groups[place - 1]:
            axes.axhline(place - 0.5, color="0.7", linewidth=0.6)


def _row_name(group: str, arm: str) -> str:
    return arm if arm.startswith(group) else f"{group}: {arm}"


def _legend_outside(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
