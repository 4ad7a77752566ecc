"""Figures of scaling: loss over tokens, work, size and data, with the fitted laws where a fit was accepted.

Every function draws one figure from plain values and writes it as PNG and SVG; it returns both paths. Points are
measured, lines are fitted; nothing is drawn beyond the range that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from fvlm.research.figures.arm_plots import MARKERS
from fvlm.research.study.rows import Spread
from fvlm.research.style import DASHES, PALETTE, STYLE, save_figure

Fit = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Measured points, and the line fitted to them where there is one; `x` float64 [n], `y` likewise."""

    x: np.ndarray
    y: np.ndarray
    fit: Fit | None = None
    best: tuple[float, float] | None = None
    """Where the fitted line is lowest."""


def plot_efficiency(
    points: Sequence[tuple[str, str, Mapping[str, float], Spread]],
    xlabels: Mapping[str, str],
    ylabel: str,
    stem: str | Path,
    *,
    falls: bool,
) -> tuple[Path, Path]:
    """What an arm reaches against what it costs, a panel a cost, with the frontier: what nothing cheaper reaches.

    Args:
        points: (kind, arm, cost by name, figure); a kind has one colour and marker.
        xlabels: name of a cost -> words for its axis.
        falls: whether less of the figure is better, as with a loss; else it is a share.
    """
    kinds = list(dict.fromkeys(kind for kind, *_ in points))
    scale = 1 if falls else 100
    with plt.rc_context(STYLE):
        size = (3.6 * len(xlabels) + 1.6, 3.3)
        figure, both = plt.subplots(1, len(xlabels), figsize=size, squeeze=False, sharey=True, layout="constrained")
        for axes, (name, words) in zip(both[0], xlabels.items(), strict=True):
            for number, kind in enumerate(kinds):
                own = [(cost[name], spread) for each, _, cost, spread in points if each == kind]
                _spreads(axes, own, scale, number, kind)
            for _, arm, cost, spread in points:
                at = (cost[name], scale * spread.mean)
                axes.annotate(arm, at, (4, 3), textcoords="offset points", fontsize=6, color="0.3")
            costs = [(cost[name], scale * spread.mean) for _, _, cost, spread in points]
            x, y = _frontier(costs, falls)
            line = {"where": "post", "color": "0.35", "linewidth": 1, "label": "frontier", "zorder": 1}
            axes.step([*x, max(costs)[0]], [*y, y[-1]], **line)  # as far as anything costs
            _log_axis(axes, "x", [cost for cost, _ in costs])
            axes.set_xlabel(words)
        chances = {spread.chance for *_, spread in points if math.isfinite(spread.chance)}
        if not falls and len(chances) == 1:
            for axes in both[0]:
                axes.axhline(100 * min(chances), color="0.2", linestyle="--", linewidth=1, label="chance")
        both[0][0].set_ylabel(ylabel)
        both[0][-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return save_figure(figure, stem)


def _spreads(axes: Axes, points: Sequence[tuple[float, Spread]], scale: float, number: int, label: str) -> None:
    means = [scale * spread.mean for _, spread in points]
    error = [
        [max(0.0, mean - scale * spread.low) for mean, (_, spread) in zip(means, points, strict=True)],
        [max(0.0, scale * spread.high - mean) for mean, (_, spread) in zip(means, points, strict=True)],
    ]
    style = {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)]}
    axes.errorbar(
        [x for x, _ in points], means, yerr=error, linestyle="none", capsize=2, markersize=5, label=label, **style
    )


def _frontier(points: Sequence[tuple[float, float]], falls: bool) -> tuple[list[float], list[float]]:
    """The points that no cheaper or equally cheap one matches, by cost."""
    kept: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda p: (p[0], p[1] if falls else -p[1])):
        if not kept or (value < kept[-1][1] if falls else value > kept[-1][1]):
            kept.append((cost, value))
    return [cost for cost, _ in kept], [value for _, value in kept]


def plot_series(
    panels: Mapping[str, Mapping[str, Series]], xlabel: str, ylabel: str, stem: str | Path, mark: str | None = None
) -> tuple[Path, Path]:
    """Measured points with fitted lines over a logarithmic axis: panel's title -> legend -> series.

    Points without a fit are joined by a thin line. `mark`: the legend of the lowest points of the fitted lines.
    """
    with plt.rc_context(STYLE):
        size = (3.7 * len(panels) + 1.6, 3.3)
        figure, grid = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
        legend: dict[str, object] = {}
        names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
        for axes, (title, panel) in zip(grid[0], panels.items(), strict=True):
            for name, series in panel.items():
                _series(axes, series, names.index(name), name, mark)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel(xlabel)
            _log_axis(axes, "x", np.concatenate([series.x for series in panel.values()]))
            legend |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        grid[0][0].set_ylabel(ylabel)
        labels = sorted(legend, key=lambda label: label == mark)  # which is last
        figure.legend([legend[label] for label in labels], labels, loc="outside right upper")
        return save_figure(figure, stem)


def _series(axes: Axes, series: Series, number: int, label: str, mark: str | None) -> None:
    colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
    order = np.argsort(series.x)
    axes.plot(series.x, series.y, marker, color=colour, markersize=5, label=label)
    if series.fit is None:
        axes.plot(series.x[order], series.y[order], color=colour, linewidth=0.7, linestyle=":")
        return
    at = np.geomspace(series.x.min(), series.x.max(), 100)
    axes.plot(at, series.fit(at), color=colour, linewidth=1.3, linestyle=DASHES[number % len(DASHES)])
    if series.best is not None:
        axes.plot(*series.best, "*", color=colour, mec="black", markersize=11, zorder=6, label=mark)


def plot_crossover(
    lines: Mapping[str, Series], crossing: float | None, xlabel: str, ylabel: str, stem: str | Path
) -> tuple[Path, Path]:
    """Kinds of model by the work that they were given, and where two cross, if they do within what was measured."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 3.3), layout="constrained")
        for number, (label, series) in enumerate(lines.items()):
            _series(axes, series, number, label, None)
        if crossing is not None:
            axes.axvline(crossing, color="0.2", linestyle="--", linewidth=1, label=f"they cross at {crossing:.2g}")
        _log_axis(axes, "x", np.concatenate([series.x for series in lines.values()]))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.legend()
        return save_figure(figure, stem)


def plot_allocation(
    panels: Mapping[str, Mapping[str, Series]], xlabel: str, ylabels: Mapping[str, str], stem: str | Path
) -> tuple[Path, Path]:
    """Best size and best amount of data for a given work, on two logarithmic axes: name -> kind -> series."""
    with plt.rc_context(STYLE):
        size = (3.9 * len(panels), 3.3)
        figure, grid = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
        for axes, (name, lines) in zip(grid[0], panels.items(), strict=True):
            for number, (label, series) in enumerate(lines.items()):
                _series(axes, series, number, label, None)
            _log_axis(axes, "x", np.concatenate([series.x for series in lines.values()]))
            _log_axis(axes, "y", np.concatenate([series.y for series in lines.values()]), room=0.06)
            axes.set_xlabel(xlabel)
            axes.set_ylabel(ylabels[name])
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        return save_figure(figure, stem)


def plot_predicted(lines: Mapping[str, tuple[np.ndarray, np.ndarray]], stem: str | Path) -> tuple[Path, Path]:
    """Loss as the parametric fit has it against the loss measured: kind -> (measured [n], fitted [n])."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.2, 3.6), layout="constrained")
        for number, (label, (measured, fitted)) in enumerate(lines.items()):
            style = {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)]}
            axes.plot(measured, fitted, linestyle="none", markersize=5, label=label, **style)
        ends = [min(m.min() for m, _ in lines.values()), max(m.max() for m, _ in lines.values())]
        axes.plot(ends, ends, color="0.4", linewidth=0.9, linestyle=":", label="fit = measured")
        axes.set_xlabel("measured loss, nats a token")
        axes.set_ylabel("loss of the fit, nats a token")
        axes.legend()
        return save_figure(figure, stem)


def _log_axis(axes: Axes, which: str, values: Sequence[float] | np.ndarray, room: float = 0.14) -> None:
    """A logarithmic x or y axis whose range has space at both ends; a short range gets its own values as ticks.

    Of values that lie closer than `room`, a share of the axis, only the first has its number written.
    """
    values = np.asarray(sorted(set(values)), float)
    low, high = values[0] / 1.25, values[-1] * 1.25
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    if values[-1] / values[0] < 30:
        written = [values[0]]
        for value in values:
            if np.log(value / written[-1]) >= room * np.log(high / low):
                written.append(value)
        axis = getattr(axes, f"{which}axis")
        axis.set_ticks(written, [_short(value) for value in written])
        axis.set_ticks(values, [""] * len(values), minor=True)


def _short(value: float) -> str:
    """1_500_000 -> "1.5 M"; beyond 1e15, where letters end, 1.6e16."""
    for size, letter in ((1e15, None), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value:.2g}" if letter is None else f"{value / size:.3g} {letter}"
    return f"{value:g}"
