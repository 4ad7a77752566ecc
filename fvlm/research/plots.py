"""Figures of a run: curves and bars from CSV and JSON records alone, never from a model.

Every function draws one figure and writes it as PNG and SVG; it returns both paths.
Lines differ by colour and by dash.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fvlm.research.style import DASHES, MODE_COLOURS, MODE_NAMES, PALETTE, STYLE, save_figure
from fvlm.research.tables import Table


def _axes(xlabel: str, ylabel: str, size: tuple[float, float] = (5.2, 3.2)) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=size)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, index: int, label: str, **style: Any) -> None:
    keep = np.isfinite(x) & np.isfinite(y)
    if not keep.any():
        return  # it keeps its colour all the same, so that a run looks alike in every figure
    x, y = x[keep], y[keep]
    marker = "o" if len(x) <= 40 else None
    style = {"color": PALETTE[index % len(PALETTE)], "linestyle": DASHES[index % len(DASHES)], **style}
    axes.plot(x, y, label=label, marker=marker, markersize=3, linewidth=1.4, **style)


def plot_losses(runs: Mapping[str, Table], stem: str | Path, x: str = "samples_seen") -> tuple[Path, Path]:
    """Training (thin) and validation (thick) loss over `x`; one colour a run.

    `runs`: label -> metrics table with columns `x`, train_loss, val_loss.
    """
    for table in runs.values():
        table.require([x, "train_loss", "val_loss"])
    with plt.rc_context(STYLE):
        figure, axes = _axes(column_words(x), "cross-entropy, nats a token")
        for index, (label, table) in enumerate(runs.items()):
            steps = table.numbers(x)
            colour = PALETTE[index % len(PALETTE)]
            _line(axes, steps, table.numbers("train_loss"), 1, f"{label}: training", color=colour, alpha=0.6)
            _line(axes, steps, table.numbers("val_loss"), 0, f"{label}: validation", color=colour)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return save_figure(figure, stem)


def plot_loss_ratio(runs: Mapping[str, Table], stem: str | Path, x: str = "samples_seen") -> tuple[Path, Path]:
    """loss_fine / loss_coarse over `x`; under the line at 1, looking helps."""
    with plt.rc_context(STYLE):
        figure, axes = _curves(runs, x, "loss_ratio", "fine loss / coarse loss")
        axes.axhline(1.0, color="0.4", linewidth=0.9, linestyle=":")
        where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "fontsize": 7}
        axes.annotate("below: looking helps", (0.99, 1.0), (0, -9), **where)
        axes.legend()
        return save_figure(figure, stem)


def plot_entropy(
    runs: Mapping[str, Table], stem: str | Path, num_keys: int | None = None, x: str = "samples_seen"
) -> tuple[Path, Path]:
    """Attention entropy of the fine queries over `x`; `num_keys` (patches + CLS) draws the uniform level ln(keys)."""
    with plt.rc_context(STYLE):
        figure, axes = _curves(runs, x, "attention_entropy", "attention entropy, nats")
        if num_keys is not None:
            axes.axhline(np.log(num_keys), color="0.4", linewidth=0.9, linestyle=":", label=f"uniform: ln {num_keys}")
        axes.legend()
        return save_figure(figure, stem)


def plot_preference(runs: Mapping[str, Table], stem: str | Path, x: str = "samples_seen") -> tuple[Path, Path]:
    """Reward accuracy and margin over the validation pairs of preference runs, side by side."""
    with plt.rc_context(STYLE):
        figure, both = plt.subplots(1, 2, figsize=(7.6, 3.0), layout="constrained")
        named = {"accuracy": "pairs whose chosen answer is preferred, %", "margin": "margin of rewards"}
        for axes, (name, words) in zip(both, named.items(), strict=True):
            axes.set_xlabel(column_words(x))
            axes.set_ylabel(words)
            for index, (label, table) in enumerate(runs.items()):
                y = table.numbers(f"preference/{name}") * (100 if name == "accuracy" else 1)
                _line(axes, table.numbers(x), y, index, label)
        _chance_line(both[0], 0.5)
        both[0].legend()
        return save_figure(figure, stem)


def _curves(runs: Mapping[str, Table], x: str, y: str, ylabel: str) -> tuple[Figure, Axes]:
    for table in runs.values():
        table.require([x, y])
    figure, axes = _axes(column_words(x), ylabel)
    for index, (label, table) in enumerate(runs.items()):
        _line(axes, table.numbers(x), table.numbers(y), index, label)
    return figure, axes


def plot_arms(arms: Mapping[str, Table], stem: str | Path, x: str = "samples_seen") -> tuple[Path, Path]:
    """Accuracy over training for several arms, with 95 % intervals as bands and the chance level as a line.

    `arms`: label -> table with columns `x`, accuracy, low, high, chance (shares in [0, 1]), one row an evaluation.
    """
    for table in arms.values():
        table.require([x, "accuracy", "low", "high", "chance"])
    with plt.rc_context(STYLE):
        figure, axes = _axes(column_words(x), "held-out accuracy, %", (5.8, 3.6))
        for index, (label, table) in enumerate(arms.items()):
            steps = table.numbers(x)
            _line(axes, steps, 100 * table.numbers("accuracy"), index, label)
            axes.fill_between(
                steps,
                100 * table.numbers("low"),
                100 * table.numbers("high"),
                color=PALETTE[index % len(PALETTE)],
                alpha=0.15,
                linewidth=0,
            )
        chance = np.nanmean(np.concatenate([table.numbers("chance") for table in arms.values()]))
        _chance_line(axes, chance)
        axes.set_ylim(0, 102)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return save_figure(figure, stem)


def plot_modes(bars: Mapping[str, Mapping[str, Mapping[str, float]]], stem: str | Path) -> tuple[Path, Path]:
    """Accuracy of the three modes side by side, with 95 % intervals and each group's chance level.

    `bars`: group (a source or task) -> mode -> {"accuracy", "low", "high", "chance"} as shares.
    Raises ValueError naming group, mode and field where one is missing.
    """
    if not bars:
        raise ValueError("plot_modes: no groups to draw; expected at least one source with accuracies by mode")
    modes = list(dict.fromkeys(mode for group in bars.values() for mode in group))
    for group, by_mode in bars.items():
        for mode, figures in by_mode.items():
            absent = [name for name in ("accuracy", "low", "high", "chance") if figures.get(name) is None]
            if absent:
                raise ValueError(f"plot_modes: {group!r}, {mode!r}: missing {', '.join(absent)}")
    with plt.rc_context(STYLE):
        figure, axes = _axes("", "accuracy, %", (max(4.2, 1.6 + 1.3 * len(bars)), 3.4))
        width = 0.8 / len(modes)
        for place, by_mode in enumerate(bars.values()):
            for index, mode in enumerate(modes):
                if mode in by_mode:
                    _bar(axes, place - 0.4 + (index + 0.5) * width, width, mode, by_mode[mode], first=place == 0)
            chance = 100 * next(iter(by_mode.values()))["chance"]
            label = "chance" if place == 0 else None
            axes.hlines(chance, place - 0.45, place + 0.45, color="0.2", linestyle="--", linewidth=1, label=label)
        axes.set_xticks(range(len(bars)), [group.replace("_", " ") for group in bars], rotation=15, ha="right")
        axes.set_ylim(0, 105)
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return save_figure(figure, stem)


def _bar(axes: Axes, x: float, width: float, mode: str, figures: Mapping[str, float], first: bool) -> None:
    height = 100 * figures["accuracy"]
    # A Wilson interval always holds the share; the clip only removes rounding below zero, which matplotlib refuses.
    error = [[max(0.0, height - 100 * figures["low"])], [max(0.0, 100 * figures["high"] - height)]]
    colour = MODE_COLOURS.get(mode, "0.6")
    label = MODE_NAMES.get(mode, mode) if first else None
    axes.bar(x, height, width * 0.92, color=colour, label=label, yerr=error, capsize=2, error_kw={"linewidth": 0.9})


def _chance_line(axes: Axes, chance: float) -> None:
    axes.axhline(100 * chance, color="0.2", linestyle="--", linewidth=1, label=f"chance {100 * chance:.3g} %")


def column_words(column: str) -> str:
    return {"samples_seen": "training samples seen", "step": "training steps", "wall_time_sec": "seconds"}.get(
        column, column.replace("_", " ")
    )
