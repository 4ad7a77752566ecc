"""The report of a check: report.md and report.json, figures of what the shards hold, sheets of samples to look at."""

from __future__ import annotations

import os
import textwrap
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from data_prep.unit import write_json
from data_prep.verify_findings import BINS, MOST_FRAMES, OCTAVE, SHEET_FRAMES, SHORTEST, Draw
from data_prep.verify_set import SampleSet
from data_prep.verify_shard import Checks
from fvlm.data.errors import MediaError
from fvlm.data.shard import KINDS
from fvlm.data.video import decode_jpeg, jpeg_size
from fvlm.research.report import Figures
from fvlm.research.sections import table
from fvlm.research.style import PALETTE, STYLE, save_figure

if TYPE_CHECKING:
    from data_prep.verify import Ledger

MOST_SHEETS = 100
"""Sources with a sheet; of more, the largest."""
_SHOWN_PROBLEMS, _SHOWN_SOURCES = 50, 40
_SIDE, _GAP = 112, 4  # pixels of a frame on a sheet, and between two
_TEXT_HEIGHT, _FRAMES_HEIGHT = 0.125, 9.0 / SHEET_FRAMES  # inches, of a line and of a row of frames
_GREY = 200  # of a frame that cannot be shown


def write_report(out: Path, sets: dict[str, SampleSet], ledger: Ledger, checks: Checks) -> Path:
    """Write the report into the folder `out` and return report.md."""
    out.mkdir(parents=True, exist_ok=True)
    figures = Figures(out / "figures", out)
    lines = ["# Shards: what they hold, and what is wrong with them", "", *_problems(ledger)]
    for name, samples in sets.items():
        lines += _holdings(name, samples, figures)
    for name, samples in sets.items():
        lines += _sheets(name, samples, figures)
    write_json(
        out / "report.json",
        {
            "clean": not ledger.counts,
            "checks": asdict(checks),
            "problems": {
                "count": ledger.counts.total(),
                "by_reason": dict(ledger.counts.most_common()),
                "listed": [problem._asdict() for problem in ledger.listed],
            },
            "notes": ledger.notes,
            "sets": {name: samples.summary() for name, samples in sets.items()},
        },
    )
    path = out / "report.md"
    temporary = path.with_name(".report.md.tmp")
    temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def _problems(ledger: Ledger) -> list[str]:
    lines = ["## Problems", ""]
    if not ledger.counts:
        lines += ["None.", ""]
    else:
        lines += table(("reason", "count"), ledger.counts.most_common())
        listed = ledger.listed[:_SHOWN_PROBLEMS]
        lines += [f"The first {len(listed)} of {ledger.counts.total()}; report.json lists more of them.", ""]
        lines += table(("shard", "key", "reason", "detail"), listed)
    return lines + [f"- {note}" for note in ledger.notes] + [""]


def _holdings(name: str, samples: SampleSet, figures: Figures) -> list[str]:
    totals = samples.totals()
    lines = [
        f"## {name}: composition",
        "",
        f"{totals['samples']:,} samples ({totals['distinct']:,} distinct) in {len(samples.shards):,} shards of "
        f"{samples.bytes / 1e9:,.3g} GB: {totals['frames']:,} frames, {totals['seconds'] / 3600:,.4g} hours of video, "
        f"{totals['tokens']:,} text tokens (tokenizer {', '.join(sorted(samples.tokenizers)) or 'none'}).",
        "",
    ]
    if not totals["samples"]:
        return lines
    largest = sorted(samples.by_source.items(), key=lambda each: -each[1]["samples"])
    header = ("source", "samples", "share, %", *KINDS, "frames", "tokens", "hours")
    rows = [
        (
            source,
            counts["samples"],
            100 * counts["samples"] / totals["samples"],
            *(counts[kind] for kind in KINDS),
            counts["frames"],
            counts["tokens"],
            counts["seconds"] / 3600,
        )
        for source, counts in largest
    ]
    lines += table(header, rows)
    lines += figures.draw(f"{name}-composition", f"{name}: shares by source", plot_composition, dict(largest))
    lines += figures.draw(f"{name}-histograms", f"{name}: frames, tokens and durations", plot_histograms, samples)
    sizes = ", ".join(f"{width} x {height}: {n:,}" for (width, height), n in samples.frame_sizes.most_common(10))
    return [*lines, f"Frames by width x height: {sizes or 'none'}.", ""]


def _sheets(name: str, samples: SampleSet, figures: Figures) -> list[str]:
    largest = sorted(samples.draws, key=lambda source: -samples.by_source[source]["samples"])
    lines = [f"## {name}: samples", "", "Drawn at random, with up to eight frames each, spaced evenly.", ""]
    for number, source in enumerate(largest[:MOST_SHEETS]):
        caption = f"{name}, {source}: {samples.by_source[source]['samples']:,} samples".replace("[", "(")
        lines += figures.draw(f"{name}-sheet-{number:03d}", caption, plot_sheet, samples.draws[source])
    if len(largest) > MOST_SHEETS:
        lines += [f"{len(largest) - MOST_SHEETS} smaller sources have no sheet.", ""]
    return lines if largest else []


def plot_composition(by_source: dict[str, Any], stem: Path) -> tuple[Path, Path]:
    """Share of samples, frames and tokens that each source gives; the smallest together where there are many."""
    names = list(by_source)[:_SHOWN_SOURCES]
    rest = list(by_source)[_SHOWN_SOURCES:]
    labels = names + ([f"{len(rest)} others"] if rest else [])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 0.9 + 0.3 * len(labels)))
        for number, what in enumerate(("samples", "frames", "tokens")):
            counts = [by_source[name][what] for name in names]
            counts += [sum(by_source[name][what] for name in rest)] if rest else []
            share = 100 * np.array(counts) / max(sum(counts), 1)
            axes.barh(np.arange(len(labels)) + 0.27 * (number - 1), share, 0.25, label=what, color=PALETTE[number])
        axes.set_yticks(np.arange(len(labels)), labels, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel("share, %")
        axes.legend(loc="lower right")
        return _saved(figure, stem)


def plot_histograms(samples: SampleSet, stem: Path) -> tuple[Path, Path]:
    """Samples by frames, text tokens and duration, one colour a kind."""
    starts = np.exp2(np.arange(BINS + 1) / OCTAVE)
    with plt.rc_context(STYLE):
        figure, (frames, tokens, seconds) = plt.subplots(1, 3, figsize=(10.5, 2.9))
        _bars(frames, samples.frames, np.arange(MOST_FRAMES + 2) - 0.5, "frames")
        _bars(tokens, samples.tokens, starts, "text tokens")
        _bars(seconds, samples.seconds, starts * SHORTEST, "duration, s")
        for axes in (tokens, seconds):
            low, high = axes.get_xlim()
            axes.set_xscale("log", base=2)
            axes.set_xlim(max(low, SHORTEST) / 2, 2 * high)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        frames.set_ylabel("samples")
        frames.legend()
        figure.tight_layout()
        return _saved(figure, stem)


def _bars(axes: Axes, counts: np.ndarray, edges: np.ndarray, label: str) -> None:
    """Stacked bars, `counts` [kinds, bins], from the first to the last bin that is not empty."""
    used = np.flatnonzero(counts.sum(axis=0))
    low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
    below, widths = np.zeros(high - low), np.diff(edges[low : high + 1])
    for number, kind in enumerate(KINDS):
        mine = counts[number, low:high]
        axes.bar(edges[low:high], mine, widths, below, align="edge", color=PALETTE[number], label=kind)
        below += mine
    axes.set_ylim(0, 1.08 * max(below.max(), 1))
    axes.set_xlabel(label)


def plot_sheet(draws: list[Draw], stem: Path) -> tuple[Path, Path]:
    """A row of frames for each sample, under its key and what is said."""
    texts = []
    for draw in draws:
        said = [wrapped for line in draw.text.splitlines() for wrapped in textwrap.wrap(line, 170)[:3]]
        texts.append("\n".join([f"{draw.key} ({draw.kind}), {Path(draw.shard).name}", *said[:8]]))
    heights = [_TEXT_HEIGHT * (text.count("\n") + 3) for text in texts]
    heights = [height + _FRAMES_HEIGHT * bool(draw.frames) for height, draw in zip(heights, draws, strict=True)]
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure = plt.figure(figsize=(9.0, sum(heights)))
        top = sum(heights)
        for draw, text, height in zip(draws, texts, heights, strict=True):
            figure.text(0, top / sum(heights), text, va="top", fontsize=7, parse_math=False)
            top -= height
            if draw.frames:
                axes = figure.add_axes((0, (top + _TEXT_HEIGHT) / sum(heights), 1, _FRAMES_HEIGHT / sum(heights)))
                axes.imshow(_strip(draw), aspect="auto")
                axes.axis("off")
        return _saved(figure, stem)


def _strip(draw: Draw) -> np.ndarray:
    """The sample's frames side by side; grey for one that cannot be decoded, white where there are no more."""
    strip = np.full((_SIDE, SHEET_FRAMES * (_SIDE + _GAP), 3), 255, np.uint8)
    with open(draw.shard, "rb") as file:
        for number, (offset, size) in enumerate(draw.frames):
            left = number * (_SIDE + _GAP)
            strip[:, left : left + _SIDE] = _thumbnail(os.pread(file.fileno(), size, offset))
    return strip


def _thumbnail(jpeg: bytes) -> np.ndarray:
    try:
        side = min(jpeg_size(jpeg))
        pixels = decode_jpeg(jpeg, side).transpose(1, 2, 0)
    except MediaError:  # among the problems already
        return np.full((_SIDE, _SIDE, 3), _GREY, np.uint8)
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))


def _saved(figure: plt.Figure, stem: Path) -> tuple[Path, Path]:
    with warnings.catch_warnings():  # a script that the font lacks shows as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        return save_figure(figure, stem)
