"""The sections of a report card as lines of markdown, each from records alone; an absent record gives no section."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fvlm.evaluate.maps import cued_share
from fvlm.model.configuration import MODES
from fvlm.research.reading import TASKS, headline_task, percent, with_interval
from fvlm.research.records import RunRecords
from fvlm.research.style import MODE_NAMES

CODE = ("fvlm", "kernels", "launch", "data_prep", "benchmarks")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A markdown table; None becomes a dash, floats four significant digits."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return [*lines, ""]


def cell(value: object) -> str:
    """One table cell; bars and line ends inside a text would break the table."""
    if value is None or value != value:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def introduction() -> list[str]:
    """What a reader has to know before the numbers."""
    text = (
        "A foveated model turns every video frame into one token: its language model writes a query, the query looks "
        "into the frame's features, and what it saw comes back. *Coarse only* looks at every frame with one fixed "
        "query; *coarse→fine* uses that first glance to write a query for each frame and looks again (as in training); "
        "*autoregressive* writes each query from the frames looked at before (as on a live stream). Accuracies stand "
        "with their 95 % interval in brackets and beside the chance level; they are of clips that training never saw."
    )
    return [text, ""]


def what_was_run(run: RunRecords) -> list[str]:
    """Configuration in short, commit, hardware, versions."""
    return ["## What was run", "", *table(("", ""), facts(run))]


def facts(run: RunRecords) -> list[tuple[str, object]]:
    """(what, value) of configuration, commit, hardware and versions, as far as they are on record."""
    evaluation, summary = run.evaluation or {}, run.summary or {}
    environment = {**(summary.get("environment") or {}), **(evaluation.get("environment") or {})}
    learning = run.setting("train.learning_rate") or {}
    rates = ", ".join(f"{group} {rate['base']:g}" for group, rate in learning.items())
    rows = [
        ("model", f"{run.setting('model.preset')}: {run.label}" if run.config else None),
        ("parameters", f"{evaluation['parameters']:,}" if evaluation.get("parameters") else None),
        ("training mode", run.setting("train.mode")),
        ("fine iterations", run.setting("train.fine_iterations")),
        ("objective", run.setting("train.objective")),
        ("learning rates", f"{rates}; {run.setting('train.schedule', 'schedule not on record')}" if rates else None),
        ("samples planned", run.setting("train.total_samples")),
        ("packs a step", run.setting("train.packs_per_step")),
        ("seed", run.setting("train.seed")),
        ("checkpoint evaluated", evaluation.get("checkpoint")),
        ("commit", evaluation.get("commit") or summary.get("commit")),
        *((name, value) for name, value in _flat(environment)),
    ]
    return [row for row in rows if row[1] not in (None, "")]


def _flat(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Nested mappings as one row each: versions -> "torch 2.13.0, ..."."""
    return [
        (name, ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value))
        for name, value in values.items()
    ]


def data(run: RunRecords) -> list[str]:
    """What the validation set is made of, beside the weights of training."""
    loss = _first_loss(run)
    if not loss or not loss.get("composition"):
        return []
    weights = run.setting("data.mixture.weights") or {}
    rows = [
        (source, part["samples"], percent(part["share"]), part["labels"], weights.get(source, "natural"))
        for source, part in sorted(loss["composition"].items())
    ]
    skipped = ", ".join(f"{reason}: {count}" for reason, count in (loss.get("skipped") or {}).items()) or "none"
    header = ("source", "validation samples", "share", "loss tokens", "weight in training")
    return ["## Validation data", "", *table(header, rows), f"Samples skipped in evaluation: {skipped}.", ""]


def losses(run: RunRecords) -> list[str]:
    """First, best and last evaluation of the run."""
    if run.metrics is None:
        return []
    val = run.metrics.numbers("val_loss")
    if not np.isfinite(val).any():
        return []
    names = ["step", "samples_seen", "train_loss", "val_loss", "loss_coarse", "loss_ratio", "attention_entropy"]
    names = [name for name in names if name in run.metrics.columns]
    picks = {"first": 0, "best": int(np.nanargmin(val)), "last": len(val) - 1}
    rows = [(which, *(float(run.metrics.numbers(name)[row]) for name in names)) for which, row in picks.items()]
    return ["## Losses", "", *table(("evaluation", *(name.replace("_", " ") for name in names)), rows)]


def three_modes(run: RunRecords) -> list[str]:
    """Loss, entropy, speed and accuracy by mode, and the gap of deployment to training."""
    modes = [mode for mode in MODES if run.mode(mode)]
    if not modes:
        return []
    rows = []
    for mode in modes:
        figures = run.mode(mode)
        loss = figures.get("loss") or {}
        accuracies = [with_interval(run.accuracy(task, mode)) for task in TASKS]
        seconds = figures.get("seconds_per_sample")
        speed = None if seconds is None else f"{1000 * seconds:.2f}"
        rows.append((MODE_NAMES[mode], loss.get("loss"), loss.get("attention_entropy"), speed, *accuracies))
    header = ("mode", "loss", "entropy, nats", "ms a sample", *(f"{name} [95 %]" for name in TASKS.values()))
    gaps = (run.evaluation or {}).get("gaps") or {}
    words = {"loss": "loss {:+.4f}", "slots": "lists {:+.1%}", "multiple_choice": "multiple choice {:+.1%}"}
    parts = [text.format(gaps[name]) for name, text in words.items() if gaps.get(name) is not None]
    lines = ["## Three modes", "", *table(header, rows)]
    if parts:
        lines += [f"Autoregressive minus coarse→fine: {', '.join(parts)}.", ""]
    return lines


def by_source(run: RunRecords) -> list[str]:
    """Accuracy by source and mode beside chance, with the marks of degenerate results."""
    lines: list[str] = []
    for task, words in TASKS.items():
        found = {mode: (run.mode(mode).get(task) or {}).get("by_source") or {} for mode in MODES}
        modes = [mode for mode in MODES if found[mode]]
        if not modes:
            continue
        rows = []
        for source in sorted({source for mode in modes for source in found[mode]}):
            first = next(found[mode][source] for mode in modes if source in found[mode])
            flags = _flags({mode: found[mode].get(source, {}).get("flags", []) for mode in modes})
            accuracies = [with_interval(found[mode].get(source)) for mode in modes]
            rows.append((source, first["n"], percent(first["chance"]), *accuracies, flags))
        header = ("source", "samples", "chance", *(MODE_NAMES[mode] for mode in modes), "to note")
        lines += [f"## Accuracy by source: {words}", "", *table(header, rows)]
    return lines


def _flags(by_mode: Mapping[str, Sequence[str]]) -> str:
    """Each mark once, with its modes unless it holds in all of them."""
    modes_of: dict[str, list[str]] = {}
    for mode, flags in by_mode.items():
        for flag in flags:
            modes_of.setdefault(flag, []).append(MODE_NAMES[mode])
    named = [flag if len(m) == len(by_mode) else f"{flag} ({', '.join(m)})" for flag, m in modes_of.items()]
    return "; ".join(named) or "–"


def arms(run: RunRecords, others: Sequence[RunRecords]) -> list[str]:
    """This run beside the ones it is compared with, each in the mode it was trained in."""
    if not others:
        return []
    task = headline_task(run, run.trained_mode)
    rows = []
    for each in (run, *others):
        loss = (each.mode(each.trained_mode).get("loss") or {}).get("loss")
        figures = each.accuracy(task, each.trained_mode) if task else None
        chance = percent(figures["chance"]) if figures else None
        iterations = each.setting("train.fine_iterations")
        samples = each.setting("train.total_samples")
        rows.append((each.name, each.label, iterations, samples, loss, with_interval(figures), chance))
    words = TASKS.get(task, "accuracy")
    header = ("run", "what sees a frame", "fine iterations", "samples", "loss", f"{words} [95 %]", "chance")
    note = "Every run is judged in the mode it was trained in; loss and accuracy are of the same validation set only"
    return ["## Arms", "", *table(header, rows), f"{note} if the runs were given the same one.", ""]


def blank_frames(run: RunRecords) -> list[str]:
    """Loss by source with the real frames, and with every frame replaced by mid-grey."""
    figures = run.mode(run.trained_mode)
    seen, blank = figures.get("loss") or {}, figures.get("blank") or {}
    if not seen.get("loss_by_source") or not blank.get("loss_by_source"):
        return []
    rows = [
        (source, loss, blank["loss_by_source"].get(source), blank["loss_by_source"][source] - loss)
        for source, loss in sorted(seen["loss_by_source"].items())
        if source in blank["loss_by_source"]
    ]
    rows.append(("**all**", seen["loss"], blank["loss"], blank["loss"] - seen["loss"]))
    header = ("source", "loss", "loss with blank frames", "difference")
    return [
        "## What the frames are worth",
        "",
        *table(header, rows),
        "Text-only sources should show no difference.",
        "",
    ]


def where_it_looks(run: RunRecords) -> list[str]:
    """Share of attention on the cell asked about, by mode, beside chance."""
    rows = []
    for mode in MODES:
        share = cued_share(run.clips, mode)
        if share:
            rows.append((MODE_NAMES[mode], percent(share["share"]), percent(share["top1"]), share["n"]))
    if not rows:
        return []
    header = ("mode", "attention on the cell asked about", "it is the most looked-at cell", "looks")
    note = "Patch keys only, mean over heads and all layers, over all looks after a clip's first."
    return ["## Where it looks", "", *table(header, rows), f"{note} Chance is 1/16 = 6.2 %.", ""]


def sample_outputs(run: RunRecords) -> list[str]:
    """Questions with the right answer and what each mode chose."""
    samples = (run.evaluation or {}).get("samples") or []
    if not samples:
        return []
    modes = [mode for mode in MODES if any(mode in sample["choices"] for sample in samples)]
    rows = [(s["source"], s["question"], s["gold"], *(s["choices"].get(mode) for mode in modes)) for s in samples]
    return ["## Sample outputs", "", *table(("source", "question", "right", *(MODE_NAMES[m] for m in modes)), rows)]


def cost(run: RunRecords, price_per_hour: float | None) -> dict[str, Any] | None:
    """{"seconds", "devices", "hours", "price", "money"} of training; None where no time is on record.

    `hours` are device-hours; without a price, given or on record, `price` and `money` are None.
    """
    summary = run.summary or {}
    seconds = summary.get("wall_time_sec")
    if seconds is None and run.metrics is not None and "wall_time_sec" in run.metrics.columns:
        seconds = float(np.nanmax(run.metrics.numbers("wall_time_sec")))
    if seconds is None:
        return None
    devices, known = summary.get("world_size") or 1, summary.get("cost") or {}
    hours = known.get("gpu_hours", seconds * devices / 3600)
    price = known.get("price_per_gpu_hour") if price_per_hour is None else price_per_hour
    money = None if price is None else hours * price
    return {"seconds": seconds, "devices": devices, "hours": hours, "price": price, "money": money}


def code_size(repository: Path) -> list[str]:
    """Lines of Python by folder."""
    counts = {name: _lines_of_code(repository / name) for name in (*CODE, "tests")}
    shown = [(name, count) for name, count in counts.items() if count]
    total = sum(count for name, count in shown if name != "tests")
    header = ("folder", "lines of Python")
    return ["## Size of the code", "", *table(header, [*shown, ("**without tests**", total)])]


def _lines_of_code(folder: Path) -> int:
    """Lines of all Python files; links are not followed, so `fvlm/kernels` is counted once."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".py"):
                total += (Path(root) / name).read_text(encoding="utf-8").count("\n")
    return total


def _first_loss(run: RunRecords) -> dict[str, Any]:
    return next((run.mode(mode)["loss"] for mode in MODES if run.mode(mode).get("loss")), {})
