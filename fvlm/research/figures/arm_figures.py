"""Figures of a study's arms: each function draws one of them from its tables, or raises NotDrawn with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import fill

import numpy as np

from fvlm.evaluate.maps import ClipMaps, load_clip
from fvlm.model.configuration import MODES
from fvlm.research.figures.arm_plots import plot_arm_modes, plot_dots, plot_families, plot_panels, usual_top
from fvlm.research.strips import plot_strip
from fvlm.research.study.records import Drawn, NotDrawn, StudyRecords
from fvlm.research.study.rows import (
    Spread,
    StudyRun,
    accuracy_spread,
    at_largest_budget,
    budget_words,
    loss_spread,
    spread,
)
from fvlm.research.style import MODE_NAMES
from fvlm.research.tables import Table

LINES = 8
"""Most arms in a panel: as many as the palette keeps apart."""
MOST_CLIPS, MOST_ROWS = 3, 6
LOOKS = ("random_queries", "train.mode", "deep_query", "fine_iterations", "question_first", "query_logit_scale")
"""Keys whose change shows in where a model looks, the most telling first."""
SEEDS = "several seeds are several lines, the thin ones"
REACH = "bars reach over the 95 % intervals of all seeds, open dots are single seeds"


def draw_curves(column: str, ylabel: str, what: str, level: tuple[float, str] | None = None) -> Callable[..., Drawn]:
    """A function that draws a column of `curves.csv`: a panel a question, a line an arm."""

    def draw(study: StudyRecords, stem: Path) -> Drawn:
        panels, runs = _panels(study, column)
        base = study.base_arm()
        marked = level
        if column == "accuracy" and (chance := _one_chance(panels)) is not None:
            marked = (chance, "chance")
        scale = 100 if column == "accuracy" else 1
        top = usual_top(panels, column)
        paths = plot_panels(panels, column, ylabel, stem, base, level=marked, scale=scale, top=top)
        drawn = any(base in arms for arms in panels.values())
        unchanged = f"; black is the unchanged configuration ({base})" if drawn else ""
        cut = "" if top is None else "; the axis ends below the highest values"
        caption = f"{what} over the training samples seen{unchanged}; {SEEDS}{cut}"
        return Drawn(caption=caption, runs=_names(runs), paths=paths)

    return draw


def _panels(study: StudyRecords, column: str) -> tuple[dict[str, dict[str, list[Table]]], list[StudyRun]]:
    """Title -> arm -> tables, what they are compared with first, and the runs in them."""
    if study.curves is None:
        raise NotDrawn("no curves.csv")
    for name in ("samples_seen", column):
        if not study.curves.has(name):
            raise NotDrawn(f"curves.csv has no {name}")
    curves = {run: study.curve(run) for run in study.done}
    known = {run: table for run, table in curves.items() if table is not None and table.has(column)}
    if not known:
        raise NotDrawn(f"curves.csv has no {column} of a run that is done")
    base = study.base_arm()
    panels: dict[str, dict[str, list[Table]]] = {}
    beside: dict[str, list[str]] = {}
    for run, table in known.items():
        if run.arm != base:
            title = panel_of(run)
            panels.setdefault(title, {}).setdefault(line_of(run), []).append(table)
            beside.setdefault(title, []).extend(run.text("against").split())
    arms = {arm: [known[run] for run in runs] for arm, runs in study.arms(known).items()}
    for title, own in panels.items():
        compared = [arm for arm in dict.fromkeys(beside[title] or [base]) if arm in arms and arm not in own]
        panels[title] = {arm: arms[arm] for arm in compared} | own
    return _split(panels) or {"": {base: arms[base]} if base in arms else {}}, list(known)


def _split(panels: dict[str, dict[str, list[Table]]]) -> dict[str, dict[str, list[Table]]]:
    """Panels of at most LINES arms."""
    found = {}
    for title, arms in panels.items():
        names = list(arms)
        for start in range(0, len(names), LINES):
            part = f"{title} ({start // LINES + 1})" if len(names) > LINES else title
            found[part] = {name: arms[name] for name in names[start : start + LINES]}
    return found


def panel_of(run: StudyRun) -> str:
    """The question that a run answers; of a grid, its kind and size."""
    size = run.text("size") or run.text("model")
    return run.text("question") or ", ".join(filter(None, (run.kind if size else "", size)))


def line_of(run: StudyRun) -> str:
    """A run's name within its panel."""
    budget = budget_words(run.text("budget"))
    samples = ", equal samples" if run.text("comparison") == "isosample" else ""
    return run.text("arm") or (budget and budget + samples) or run.name


def _one_chance(panels: dict[str, dict[str, list[Table]]]) -> float | None:
    tables = [table for arms in panels.values() for seeds in arms.values() for table in seeds]
    levels = {float(x) for table in tables if table.has("chance") for x in table.numbers("chance") if math.isfinite(x)}
    return levels.pop() if len(levels) == 1 else None


def draw_arms(study: StudyRecords, stem: Path) -> Drawn:
    """All arms by question: accuracy and loss."""
    return _dots(study, stem, study.done, "Every arm at the end of its training")


def draw_freeze(study: StudyRecords, stem: Path) -> Drawn:
    """The arms that freeze a part, beside the unchanged configuration."""
    base = study.base_arm()
    frozen = [run for run in study.done if "freeze" in run.text("changed").lower()]
    if not frozen:
        raise NotDrawn("results.csv has no done run whose `changed` names `freeze`")
    asked = {run.text("question") for run in frozen} - {""}  # with them what they are compared with
    runs = [run for run in study.done if run.arm == base or run in frozen or run.text("question") in asked]
    return _dots(study, stem, runs, "What freezing a part of the model costs")


def _dots(study: StudyRecords, stem: Path, runs: Sequence[StudyRun], what: str) -> Drawn:
    base, groups = study.base_arm(), {}
    for arm, seeds in study.arms(runs).items():
        question = "" if arm == base else panel_of(seeds[0])
        figures = {"accuracy": accuracy_spread(seeds), "loss": loss_spread(seeds)}
        groups.setdefault(question, {})[arm] = figures
    named = {"accuracy": "held-out accuracy, %", "loss": "validation loss, nats a token"}
    shown = [name for name in named if any(arm[name] for arms in groups.values() for arm in arms.values())]
    if not shown:
        raise NotDrawn("results.csv has neither accuracy nor loss of a run that is done")
    paths = plot_dots(groups, {name: named[name] for name in shown}, stem, base)
    band = f"; the band is the reach of {base}" if any(base in arms for arms in groups.values()) else ""
    found = [figures["accuracy"] for arms in groups.values() for figures in arms.values()]
    caption = f"{what}, each in the mode that it trained: {REACH}{band}{_chance_words(found)}"
    return Drawn(caption=caption, runs=_names(runs), paths=paths)


def _chance_words(spreads: Sequence[Spread | None]) -> str:
    known = any(each is not None and math.isfinite(each.chance) for each in spreads)
    return "; the dashed line is chance" if known else ""


def draw_modes(study: StudyRecords, stem: Path) -> Drawn:
    """Accuracy of every arm in the three modes."""
    arms, runs = {}, []
    for arm, seeds in study.arms().items():
        by_mode = {mode: accuracy_spread(seeds, mode) for mode in MODES}
        by_mode = {mode: figures for mode, figures in by_mode.items() if figures is not None}
        if len(by_mode) > 1:
            arms[arm] = by_mode
            runs += seeds
    if not arms:
        raise NotDrawn("results.csv has no run with accuracies in two modes")
    paths = plot_arm_modes(arms, stem)
    chance = _chance_words([figures for by_mode in arms.values() for figures in by_mode.values()])
    caption = f"The same weights in the modes that they were asked in: {REACH}{chance}"
    return Drawn(caption=caption, runs=_names(runs), paths=paths)


def draw_families(study: StudyRecords, stem: Path) -> Drawn:
    """Accuracy by family, and where looking wins or loses."""
    return _by_family(study, stem, "accuracy", ("held-out accuracy, %", "fine − coarse, points"))


def draw_family_losses(study: StudyRecords, stem: Path) -> Drawn:
    """Loss by family, captions and text included, and where looking wins or loses."""
    return _by_family(study, stem, "loss", ("loss, nats a token", "coarse − fine, nats a token"))


def _by_family(study: StudyRecords, stem: Path, what: str, words: tuple[str, str]) -> Drawn:
    if study.families is None:
        raise NotDrawn("no families.csv")
    for name in ("mode", "source", what):
        if name not in study.families.columns or (name == what and not study.families.has(what)):
            raise NotDrawn(f"families.csv has no {name}")
    recipe = study.recipe()
    series = {f"{MODE_NAMES[mode]} (same weights)": _families(study, recipe, mode, what) for mode in reversed(MODES)}
    fine, coarse = (series[f"{MODE_NAMES[mode]} (same weights)"] for mode in ("coarse_fine", "coarse_only"))
    controls = {
        f"trained as: {kind}": (runs, _families(study, runs, runs[0].mode, what))
        for kind, runs in study.controls().items()
    }
    used = [*recipe, *(run for runs, found in controls.values() if found for run in runs)]
    series |= {label: found for label, (_, found) in controls.items()}
    trained = next((found for label, (_, found) in controls.items() if "coarse only" in label and found), None)
    against, whose = (trained, "a model trained with one fixed query") if trained else (coarse, "the same weights")
    differences = {name: _difference(fine[name], against[name], what) for name in fine if name in against}
    if not differences:
        raise NotDrawn(
            f"families.csv has no {what} of one run in both coarse_fine and coarse_only, nor of two such runs"
        )
    order = sorted(differences, key=lambda name: -differences[name][0])
    series = {label: found for label, found in series.items() if found}
    ordered = {name: differences[name] for name in order}
    paths = plot_families(series, ordered, stem, words, scale=100 if what == "accuracy" else 1)
    caption = (
        f"By family, {recipe[0].arm} and what cannot look; right: fine beside {whose}, above zero where looking wins, "
        f"filled where the 95 % interval leaves out zero; {REACH}"
    )
    return Drawn(caption=caption, runs=_names(used), paths=paths)


def _families(study: StudyRecords, runs: Sequence[StudyRun], mode: str, what: str) -> dict[str, Spread]:
    """Family -> figure over the seeds, in one mode."""
    found: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        table = study.families.where(run=run.name, mode=mode)
        names = (what, "accuracy", "low", "high", "chance")
        columns = {name: table.numbers(name) for name in names if name in table.columns}
        tasks = table.columns.get("task", [""] * len(table))
        rows = [row for row in range(len(table)) if np.isfinite(columns[what][row])]
        sources = [table.text("source")[row] for row in rows]
        for row, source in zip(rows, sources, strict=True):
            name = source if sources.count(source) == 1 else f"{source}, {tasks[row]}"
            figures = {
                "low": math.nan,
                "high": math.nan,
                **{key: float(column[row]) for key, column in columns.items()},
            }
            if what != "accuracy" and math.isfinite(figures.get("accuracy", math.nan)):
                figures |= {"low": math.nan, "high": math.nan}  # they are the accuracy's
            found.setdefault(name, []).append(figures)
    return {name: spread(figures, what) for name, figures in found.items()}


def _difference(fine: Spread, coarse: Spread, what: str) -> tuple[float, float, float]:
    """What looking is worth, above zero where it wins, with Newcombe's interval of the difference of two figures."""
    value = fine.mean - coarse.mean
    if not (fine.bounded and coarse.bounded):
        below = above = math.nan
    else:
        below = math.hypot(fine.mean - fine.low, coarse.high - coarse.mean)
        above = math.hypot(fine.high - fine.mean, coarse.mean - coarse.low)
    return (value, value - below, value + above) if what == "accuracy" else (-value, -value - above, -value + below)


def draw_attention(number: int) -> Callable[..., Drawn]:
    """A function that draws the `number`-th fixed clip of those with most arms' maps: a row an arm, in its own mode."""

    def draw(study: StudyRecords, stem: Path) -> Drawn:
        # of each arm's seeds
        first = [next(filter(_maps, seeds), None) for seeds in study.arms(at_largest_budget(study.done)).values()]
        mapped = [run for run in first if run is not None]
        if not mapped:
            raise NotDrawn("no run folder beside results.csv has evaluation/maps/*.npz")
        mapped.sort(key=lambda run: (run.arm != study.base_arm(), _telling(run)))
        shared = _shared_clips(mapped)
        if number >= len(shared):
            raise NotDrawn(f"the runs have maps of {len(shared)} clip(s)")
        clip, owners = shared[number]
        paths = plot_strip(clip, stem)
        caption = f"{clip.source}: where each arm looked, in the mode that it trained"
        caption += "; the box marks what was asked about" if _asks(clip) else ""
        caption += f"; {len(owners)} of {len(mapped)} arms with maps" if len(owners) < len(mapped) else ""
        return Drawn(caption=caption, runs=_names(owners), paths=paths)

    return draw


def _telling(run: StudyRun) -> int:
    """Place among the arms, those first that change how a model looks."""
    named = [place for place, key in enumerate(LOOKS) if key in run.text("changed")]
    return min(named, default=len(LOOKS))


def _maps(run: StudyRun) -> list[Path]:
    return sorted((run.folder / "evaluation" / "maps").glob("*.npz")) if run.folder else []


def _shared_clips(runs: Sequence[StudyRun]) -> list[tuple[ClipMaps, list[StudyRun]]]:
    """Clips with the maps of every run that saw the same frames; those with something to look for first."""
    found: dict[str, tuple[ClipMaps, list[StudyRun]]] = {}
    for run in runs:
        for path in _maps(run):
            clip = load_clip(path)
            own = clip.maps.get(run.mode)
            if own is None:
                continue
            label = _row_name(run)
            first, owners = found.get(clip.key, (replace(clip, maps={}), []))
            same = len(first.visual_frame) == len(clip.visual_frame) and first.frames.shape == clip.frames.shape
            if same and label not in first.maps and len(owners) < MOST_ROWS:
                found[clip.key] = replace(first, maps={**first.maps, label: own}), [*owners, run]
    return sorted(found.values(), key=lambda each: (not _asks(each[0]), -len(each[1])))[:MOST_CLIPS]


def _row_name(run: StudyRun) -> str:
    """An arm's name; of a grid's runs, whose names are for files, size and kind."""
    return run.arm if run.arm != run.name else fill(", ".join(filter(None, (run.text("size"), run.kind))), 16)


def _asks(clip: ClipMaps) -> bool:
    """Whether it is on record where there is something to look for."""
    return bool((clip.look_at[:, 0] >= 0).any())


def _names(runs: Sequence[StudyRun]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(run.name for run in runs))
