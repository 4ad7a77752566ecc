"""The report card of several stages and studies: what was trained, how far it came, what it cost, for a stranger."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fvlm.model.configuration import MODES
from fvlm.research import sections
from fvlm.research.plots import plot_losses, plot_modes, plot_preference
from fvlm.research.reading import headline_task, percent, reading, with_interval
from fvlm.research.records import RunRecords, read_run
from fvlm.research.report import Figures, write_text
from fvlm.research.sections import table
from fvlm.research.study.records import StudyRecords, read_study
from fvlm.research.study.rows import accuracy_spread, loss_spread
from fvlm.research.style import MODE_NAMES

INTRODUCTION = (
    "This page is about one model and the stages that it was trained in, one after the other, each from the weights of "
    "the one before. *Loss* is the cross-entropy of the text that the model has to write, in nats a token: lower is "
    "better, and zero would be certainty. A *validation* set is of samples that training never saw."
)


def write_card(
    runs: Sequence[str | Path],
    out: str | Path,
    studies: Sequence[str | Path] = (),
    *,
    price_per_hour: float | None = None,
    repository: Path | None = None,
) -> Path:
    """Writes `out` (markdown) and its figures into `figures/` beside it; returns `out`.

    Args:
        runs: folders of the stages, in the order in which they were trained.
        studies: folders of ablations and grids.
        price_per_hour, repository: as of `fvlm.research.report.write_report`.

    Raises FileNotFoundError for a folder without records and ValueError for a record that cannot be read.
    """
    out = Path(out)
    stages, read = [read_run(run) for run in runs], [read_study(study) for study in studies]
    figures = Figures(out.parent / "figures", out.parent)
    evaluated = [stage for stage in stages if stage.evaluation]
    lines = ["# Report card", ""]
    if evaluated:
        lines += [f"> {reading(evaluated[-1])}", ""]
    lines += [INTRODUCTION, "", *sections.introduction()]
    lines += _contents(stages, out.parent)
    lines += _losses(stages, figures) + _accuracies(stages, figures) + _preference(stages, figures)
    for study in read:
        lines += _study(study, out.parent)
    lines += _beside(out.parent)
    lines += _costs(stages, price_per_hour)
    lines += _samples(stages)
    lines += _environment(stages)
    if repository is not None:
        lines += sections.code_size(repository)
    lines += _not_on_record(stages, read, figures)
    return write_text(out, "\n".join(lines).rstrip() + "\n")


def _contents(stages: Sequence[RunRecords], here: Path) -> list[str]:
    """What each stage is, and where its own report lies."""
    rows = []
    for number, stage in enumerate(stages, start=1):
        report = stage.folder / "report.md"
        link = f"[report]({_link(report, here)})" if report.is_file() else None
        start = stage.setting("init_from") or ("the weights of its preset" if stage.config else None)
        objective = stage.setting("train.objective")
        rows.append((number, stage.name, stage.label, objective, start, stage.setting("train.total_samples"), link))
    header = ("stage", "run", "model", "objective", "starts from", "samples planned", "its own report")
    note = (
        "One row a stage. The objective says which words count: `ce_all` all text, `ce_answer` the answers, `dpo` the "
        "preference for one answer over another. A stage without a link gets its report by "
        "`python launch/report.py RUN`."
    )
    return ["## The stages", "", note, "", *table(header, rows)]


def _losses(stages: Sequence[RunRecords], figures: Figures) -> list[str]:
    rows, drawn = [], {}
    for stage in stages:
        if stage.metrics is None:
            continue
        rows.append((
            stage.name, *_ends(stage, "train_loss"), *_ends(stage, "val_loss"), _ends(stage, "loss_ratio")[1],
            len(stage.metrics),
        ))  # fmt: skip
        if stage.setting("train.objective") != "dpo":  # what it minimises is on another scale
            drawn[stage.name] = stage.metrics
    if not rows:
        return []
    header = (
        "run", "training loss, first", "last", "validation loss, first", "last", "fine / coarse, last", "evaluations"
    )  # fmt: skip
    note = (
        "Read along a row: from a stage's first evaluation to its last. Losses of two stages compare only where they "
        "count the same words of the same samples. Fine / coarse below 1: looking makes the text easier to foresee. "
        "The training loss of a `dpo` stage is that of preferences, where ln 2 = 0.693 is no preference at all."
    )
    lines = ["## Progress: losses", "", note, "", *table(header, rows)]
    return lines + (
        figures.draw("losses", "Training and validation loss of each stage", plot_losses, drawn) if drawn else []
    )


def _ends(stage: RunRecords, column: str) -> tuple[float | None, float | None]:
    """First and last number of a column of metrics.csv."""
    if stage.metrics is None or not stage.metrics.has(column):
        return None, None
    values = stage.metrics.numbers(column)
    values = values[np.isfinite(values)]
    return float(values[0]), float(values[-1])


def _accuracies(stages: Sequence[RunRecords], figures: Figures) -> list[str]:
    rows, bars = [], {}
    before: dict[str, Any] | None = None
    last: RunRecords | None = None
    for stage in stages:
        task = headline_task(stage, stage.trained_mode)
        first = _first_accuracy(stage, task)
        if first is not None and last is None:
            rows.append(
                (f"at the first evaluation of {stage.name}", *(_cell(first, stage, mode) for mode in MODES), None, None)
            )
        if task is None:
            continue
        found = {mode: figures_ for mode in MODES if (figures_ := stage.accuracy(task, mode))}
        own = stage.accuracy(task, stage.trained_mode)
        change = None
        if last is not None and before is not None:
            same = _asked(stage) == _asked(last)
            change = f"{100 * (own['accuracy'] - before['accuracy']):+.1f} points" if same else "other validation data"
        rows.append(
            (f"after {stage.name}", *(with_interval(found.get(mode)) for mode in MODES), percent(own["chance"]), change)
        )
        bars[stage.name] = found
        before, last = own, stage
    if not rows:
        return []
    header = ("", *(MODE_NAMES[mode] for mode in MODES), "chance", "change, in the mode trained")
    note = (
        "Share of held-out questions answered rightly, with its 95 % interval; read down a column for what a stage "
        "brought. An accuracy whose interval holds the chance level is no sign of skill; two whose intervals overlap "
        "may be equal."
    )
    lines = ["## Progress: accuracy", "", note, "", *table(header, rows)]
    if bars:
        caption = "Accuracy after each stage in the three modes; bars are 95 % intervals, dashed lines chance"
        lines += figures.draw("stages", caption, plot_modes, bars)
    return lines


def _asked(stage: RunRecords) -> Any:
    """What the stage's evaluation was of: the identity of the data on record, or else what the configuration names."""
    identity = (stage.evaluation or {}).get("identity") or {}
    return identity.get("data") or stage.setting("data.val")


def _first_accuracy(stage: RunRecords, task: str | None) -> float | None:
    """Of the first evaluation during training, in the mode that the stage trains."""
    column = f"{task}/{stage.trained_mode}/accuracy"
    if task is None or stage.evaluations is None or not stage.evaluations.has(column):
        return None
    values = stage.evaluations.numbers(column)
    return float(values[np.isfinite(values)][0])


def _cell(share: float, stage: RunRecords, mode: str) -> str | None:
    return percent(share) if mode == stage.trained_mode else None


def _preference(stages: Sequence[RunRecords], figures: Figures) -> list[str]:
    names = {"preference/accuracy": "pairs whose chosen answer is preferred", "preference/margin": "margin of rewards"}
    judged = {
        s.name: s.evaluations for s in stages if s.evaluations is not None and s.evaluations.has("preference/accuracy")
    }
    if not judged:
        return []
    rows = []
    for run, records in judged.items():
        for name, words in names.items():
            values = records.numbers(name) if name in records.columns else np.array([])
            values = values[np.isfinite(values)]
            if len(values):
                rows.append((run, words, float(values[0]), float(values[-1])))
    caption = "Validation pairs beside the frozen reference: how often the chosen answer is preferred, and by how much"
    note = "Of pairs that training never saw, first and last evaluation; 0.5 of the pairs would be guessing."
    lines = ["## Progress: preference", "", note, "", *table(("run", "", "first", "last"), rows)]
    return lines + figures.draw("preference", caption, plot_preference, judged)


def _study(study: StudyRecords, here: Path) -> list[str]:
    """What a study's arms came to, and where its own pages are."""
    rows = []
    for arm, runs in study.arms().items():
        accuracy, loss = accuracy_spread(runs), loss_spread(runs)
        shown = (
            None
            if accuracy is None
            else f"{percent(accuracy.mean)} [{100 * accuracy.low:.1f}–{100 * accuracy.high:.1f}]"
        )
        chance = None if accuracy is None or math.isnan(accuracy.chance) else percent(accuracy.chance)
        rows.append((arm, runs[0].text("changed") or None, runs[0].kind, len(runs), loss and loss.mean, shown, chance))
    begun = [run for run in study.runs if run.text("status") != "not_run"]
    ended = [f"{run.name} ({run.text('reason') or run.text('status')})" for run in begun if not run.done]
    pages = sorted({*study.folder.glob("*.md"), *study.folder.glob("figures/*.md")})
    links = ", ".join(f"[{page.stem}]({_link(page, here)})" for page in pages)
    note = (
        "One row an arm: what was changed, and what came of it in the mode that it was trained in; means over the "
        "seeds, in brackets the reach of all their 95 % intervals."
    )
    header = ("arm", "changed", "what sees a frame", "seeds", "validation loss", "held-out accuracy", "chance")
    lines = [f"## Study: {study.name}", "", note, "", *table(header, rows)]
    if ended:
        lines += [f"Not done: {', '.join(ended)}.", ""]
    if len(begun) < len(study.runs):
        lines += [f"Not begun: {len(study.runs) - len(begun)} of its {len(study.runs)} planned runs.", ""]
    return lines + ([f"More: {links}.", ""] if links else [])


def _beside(here: Path) -> list[str]:
    """Links to further pages in the card's folder, where they are."""
    pages = {"figures/figures.md": "all figures of the studies", "go-no-go.md": "whether a longer run should be begun"}
    links = [f"[{words}]({page})" for page, words in pages.items() if (here / page).is_file()]
    return [f"Beside this page: {', '.join(links)}.", ""] if links else []


def _costs(stages: Sequence[RunRecords], price_per_hour: float | None) -> list[str]:
    costs = {stage.name: cost for stage in stages if (cost := sections.cost(stage, price_per_hour))}
    if not costs:
        return []
    rows = [
        (name, cost["devices"], cost["seconds"] / 3600, cost["hours"], cost["price"], cost["money"])
        for name, cost in costs.items()
    ]
    money = [cost["money"] for cost in costs.values()]
    total = None if None in money else math.fsum(money)
    hours = [math.fsum(cost[name] for cost in costs.values()) for name in ("seconds", "hours")]
    rows.append(("**all**", None, hours[0] / 3600, hours[1], None, total))
    header = ("run", "devices", "hours", "device-hours", "price of one", "money")
    note = "Training alone, with its evaluations; a device is a GPU, or a process where there was none."
    if total is None:
        note += " Money stands where a price is known: `--price-per-hour`, or `price_per_gpu_hour` of a run."
    return ["## Cost", "", note, "", *table(header, rows)]


def _samples(stages: Sequence[RunRecords]) -> list[str]:
    """Of the last stage that has some."""
    stage = next((stage for stage in reversed(stages) if (stage.evaluation or {}).get("samples")), None)
    if stage is None:
        return []
    note = f"Held-out questions, the right answer, and what the model of {stage.name} chose in each mode."
    heading, empty, *rest = sections.sample_outputs(stage)
    return [heading, empty, note, "", *rest]


def _environment(stages: Sequence[RunRecords]) -> list[str]:
    facts = {stage.name: dict(sections.facts(stage)) for stage in stages}
    names = list(dict.fromkeys(name for known in facts.values() for name in known))
    if not names:
        return []
    rows = [(name, *(known.get(name) for known in facts.values())) for name in names]
    note = "A column a stage: configuration, commit, hardware and versions, as its records have them."
    return ["## What was run, and on what", "", note, "", *table(("", *facts), rows)]


def _not_on_record(stages: Sequence[RunRecords], studies: Sequence[StudyRecords], figures: Figures) -> list[str]:
    absent = [f"{each.name}: {what}" for each in (*stages, *studies) for what in each.missing]
    absent += figures.undrawn
    return ["## Not on record", "", *(f"- {what}" for what in absent), ""] if absent else []


def _link(path: Path, here: Path) -> str:
    return Path(os.path.relpath(path, here)).as_posix()
