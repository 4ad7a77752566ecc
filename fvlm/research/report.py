"""The report card of a run: markdown and figures for a stranger, from the run's records alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fvlm.evaluate.maps import ClipMaps
from fvlm.model.configuration import MODES
from fvlm.research import sections
from fvlm.research.plots import plot_arms, plot_entropy, plot_loss_ratio, plot_losses, plot_modes, plot_preference
from fvlm.research.reading import TASKS, headline_task, reading
from fvlm.research.records import RunRecords, read_run
from fvlm.research.strips import plot_strip
from fvlm.research.tables import Table

MOST_STRIPS = 4
ACCURACY_COLUMNS = ("accuracy", "n", "chance", "low", "high")


def write_report(
    run_dir: str | Path,
    out: str | Path,
    compare: Sequence[str | Path] = (),
    *,
    price_per_hour: float | None = None,
    repository: Path | None = None,
) -> Path:
    """Writes `out` (markdown) and its figures into `figures/` beside it; returns `out`.

    Args:
        compare: further run folders, shown as arms beside this one.
        price_per_hour: money for one device for an hour; None: cost in hours only.
        repository: where the code's lines are counted; None: not counted.

    Raises FileNotFoundError for a run folder without any record and ValueError for a record that cannot be read.
    """
    out = Path(out)
    run, others = read_run(run_dir), [read_run(folder) for folder in compare]
    figures = Figures(out.parent / "figures", out.parent)
    lines = [f"# Report card: {run.name}", "", f"> {reading(run, others)}", ""]
    lines += sections.introduction()
    lines += _accuracy_over_training(run, others, figures)
    lines += _strips(run, figures)
    lines += sections.where_it_looks(run)
    lines += sections.three_modes(run) + _mode_bars(run, figures)
    lines += sections.arms(run, others)
    lines += sections.by_source(run)
    lines += sections.blank_frames(run)
    lines += sections.losses(run) + _loss_curves(run, others, figures)
    lines += _preference(run, others, figures)
    lines += sections.sample_outputs(run)
    lines += sections.what_was_run(run) + sections.data(run)
    lines += _cost(run, price_per_hour) + (sections.code_size(repository) if repository else [])
    lines += _not_on_record(run, others, figures)
    return write_text(out, "\n".join(lines).rstrip() + "\n")


class Figures:
    """Draws figures into a folder and gives the markdown that shows them; one that cannot be drawn is remembered."""

    def __init__(self, folder: Path, relative_to: Path):
        self.folder, self.relative_to = folder, relative_to
        self.undrawn: list[str] = []

    def draw(self, name: str, caption: str, plot: Callable[..., Any], *arguments: Any, **options: Any) -> list[str]:
        """Lines that embed the figure; the caption links the vector form. `arguments` come before the figure's path."""
        png, svg = plot(*arguments, self.folder / name, **options)
        image, vector = (Path(os.path.relpath(path, self.relative_to)).as_posix() for path in (png, svg))
        return [f"![{caption}]({image})", "", f"*{caption}* ([vector form]({vector}))", ""]

    def absent(self, name: str, why: str) -> list[str]:
        """Remembers a figure for which a record lacks; nothing is drawn."""
        self.undrawn.append(f"figure `{name}`: {why}")
        return []


def accuracy_curve(run: RunRecords, task: str) -> Table | None:
    """samples_seen, accuracy, low, high, chance over training, in the mode that the run trained; None without."""
    if run.evaluations is None or not len(run.evaluations):
        return None
    curve = run.evaluations.under(f"{task}/{run.trained_mode}/", ["step", "samples_seen"])
    if any(name not in curve.columns for name in ACCURACY_COLUMNS) or not curve.has("accuracy"):
        return None
    return curve


def _accuracy_over_training(run: RunRecords, others: Sequence[RunRecords], figures: Figures) -> list[str]:
    task = headline_task(run, run.trained_mode) or next((t for t in TASKS if accuracy_curve(run, t)), None)
    if task is None:
        return figures.absent("arms", "no accuracy over training in metrics.jsonl")
    curves = {each: accuracy_curve(each, task) for each in (run, *others)}
    drawn = _unique_labels({each: curve for each, curve in curves.items() if curve is not None})
    lines = [] if drawn else figures.absent("arms", "no accuracy over training in metrics.jsonl")
    if drawn:
        caption = f"Held-out accuracy over training: {TASKS[task]}; bands are 95 % intervals, the dashed line is chance"
        lines = ["## Accuracy over training", "", *figures.draw("arms", caption, plot_arms, drawn)]
    figures.undrawn += [f"accuracy over training of {each.name}" for each, c in curves.items() if drawn and c is None]
    return lines


def _strips(run: RunRecords, figures: Figures) -> list[str]:
    shown = sorted(run.clips, key=_looked_for, reverse=True)[:MOST_STRIPS]
    lines = ["## Heat maps", ""] if shown else []
    for number, clip in enumerate(shown):
        caption = f"{clip.source}: where each look went; the box marks what was asked about"
        lines += figures.draw(f"strip-{number:02d}", caption, plot_strip, clip)
    return lines or figures.absent("strips", "no attention maps")


def _looked_for(clip: ClipMaps) -> int:
    """Frames of a clip in which there is something to look for; stable sorting keeps the rest in order."""
    return int((clip.look_at[:, 0] >= 0).sum())


def _mode_bars(run: RunRecords, figures: Figures) -> list[str]:
    bars: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        for mode in MODES:
            for source, values in ((run.mode(mode).get(task) or {}).get("by_source") or {}).items():
                bars.setdefault(source.removeprefix("synthetic/"), {})[mode] = values
    if not bars:
        return figures.absent("modes", "no accuracy by mode")
    caption = "Accuracy by source in the three modes; bars are 95 % intervals, dashed lines chance"
    return figures.draw("modes", caption, plot_modes, dict(sorted(bars.items())))


def _loss_curves(run: RunRecords, others: Sequence[RunRecords], figures: Figures) -> list[str]:
    tables = {each: each.metrics for each in (run, *others) if each.metrics is not None}
    if not tables:
        return figures.absent("losses", "no metrics.csv")
    entropies = {each: table for each, table in tables.items() if each.setting("train.objective") != "dpo"}
    if entropies:  # what dpo minimises is on another scale than the validation set's cross-entropy
        lines = figures.draw("losses", "Training and validation loss", plot_losses, _unique_labels(entropies))
    else:
        lines = figures.absent("losses", "a preference run minimises no cross-entropy")
    plans = (
        ("loss_ratio", "Fine over coarse loss on the same labels", plot_loss_ratio, {}),
        ("attention_entropy", "Attention entropy of the fine queries", plot_entropy, {"num_keys": _num_keys(run)}),
    )
    for column, caption, plot, options in plans:
        with_column = {each: table for each, table in tables.items() if column in table.columns}
        if any(table.has(column) for table in with_column.values()):
            lines += figures.draw(column, caption, plot, _unique_labels(with_column), **options)
        else:
            figures.absent(column, f"no {column} in metrics.csv")
    return lines


def _preference(run: RunRecords, others: Sequence[RunRecords], figures: Figures) -> list[str]:
    """Of preference runs; other runs have nothing to show here and lack nothing."""
    tables = {each: each.evaluations for each in (run, *others) if each.evaluations is not None}
    judged = {each: table for each, table in tables.items() if table.has("preference/accuracy")}
    if not judged:
        return []
    caption = "Validation pairs beside the frozen reference: how often the chosen answer is preferred, and by how much"
    return ["## Preference", "", *figures.draw("preference", caption, plot_preference, _unique_labels(judged))]


def _num_keys(run: RunRecords) -> int | None:
    return next((maps.shape[-1] for clip in run.clips for maps in clip.maps.values()), None)


def _unique_labels(tables: dict[RunRecords, Table]) -> dict[str, Table]:
    """Runs of the same kind get their names behind the label, so that no curve hides another."""
    labels = [run.label for run in tables]
    return {
        (run.label if labels.count(run.label) == 1 else f"{run.label} ({run.name})"): table
        for run, table in tables.items()
    }


def _cost(run: RunRecords, price_per_hour: float | None) -> list[str]:
    cost = sections.cost(run, price_per_hour)
    if cost is None:
        return []
    hours, devices = f"{cost['seconds'] / 3600:.3f} hours", f"{cost['devices']} device(s)"
    money = "" if cost["money"] is None else f", {cost['money']:.2f} at {cost['price']:g} an hour"
    return ["## Cost", "", f"Training took {hours} on {devices}: {cost['hours']:.3f} device-hours{money}.", ""]


def _not_on_record(run: RunRecords, others: Sequence[RunRecords], figures: Figures) -> list[str]:
    absent = [*run.missing, *(f"{each.name}: {record}" for each in others for record in each.missing), *figures.undrawn]
    if not absent:
        return []
    return ["## Not on record", "", *(f"- {what}" for what in absent), ""]


def write_text(path: Path, text: str) -> Path:
    """Writes by rename, flushed first, so that a reader never sees half of it; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path
