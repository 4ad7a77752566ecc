"""Figures of scaling: each function draws one of them from a study's tables and `fits.json`, or raises NotDrawn.

Points are the rows of `results.csv`; a line is a fit of `fits.json` that was not refused. Without one the points stand
alone, and the caption says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fvlm.research.figures.scaling_plots import (
    Fit,
    Series,
    plot_allocation,
    plot_crossover,
    plot_efficiency,
    plot_predicted,
    plot_series,
)
from fvlm.research.scaling.fits import Estimate
from fvlm.research.study.records import Drawn, NotDrawn, StudyRecords
from fvlm.research.study.rows import StudyRun, accuracy_spread, at_largest_budget, budget_words, budgeted, loss_spread

LOSS = "validation loss, nats a token"
COMPUTE = "training FLOPs"
NO_FITS = "no fits.json"


def draw_efficiency(study: StudyRecords, stem: Path) -> Drawn:
    """Accuracy, or loss where there is none, against tokens a frame and FLOPs a sample."""
    base, arms = study.base_arm(), study.arms(at_largest_budget(study.done))
    costs = {"tokens": "visual tokens a frame", "flops": "FLOPs a sample, forward and backward"}
    known: dict[str, tuple[dict[str, float], list[StudyRun]]] = {}
    for arm, runs in arms.items():
        cost = {"tokens": runs[0].tokens, "flops": runs[0].number("flops_per_sample")}
        if not (base in known and _alike(cost, runs[0], *known[base])):
            known[arm] = cost, runs
    shown = [name for name in costs if any(math.isfinite(cost[name]) for cost, _ in known.values())]
    known = {arm: each for arm, each in known.items() if all(math.isfinite(each[0][name]) for name in shown)}
    falls = not any(accuracy_spread(runs) for _, runs in known.values())
    figure = loss_spread if falls else accuracy_spread
    known = {arm: each for arm, each in known.items() if figure(each[1])}
    points = [(runs[0].kind, runs[0].text("size") or arm, cost, figure(runs)) for arm, (cost, runs) in known.items()]
    if not shown or len({tuple(cost.values()) for _, _, cost, _ in points}) < 2:
        raise NotDrawn(
            "results.csv has no two kinds of model with tokens_per_frame, grid or flops_per_sample on record"
        )
    ylabel = LOSS if falls else "held-out accuracy, %"
    paths = plot_efficiency(points, {name: costs[name] for name in shown}, ylabel, stem, falls=falls)
    left_out = f"without arms that see and cost what {base} does" if base else "runs of the largest budget"
    caption = (
        f"{'Loss' if falls else 'Accuracy'} against cost, in the mode that each trained, with 95 % intervals, "
        f"{left_out}; the frontier joins what nothing cheaper reaches"
    )
    return Drawn(caption=caption, runs=_names([run for _, runs in known.values() for run in runs]), paths=paths)


def _alike(cost: dict[str, float], run: StudyRun, base_cost: dict[str, float], base: Sequence[StudyRun]) -> bool:
    """Whether an arm differs from the base in how it was trained alone, not in what it is or costs."""
    return run.kind == base[0].kind and all(math.isclose(cost[name], base_cost[name], rel_tol=0.02) for name in cost)


def draw_isoflop(study: StudyRecords, stem: Path) -> Drawn:
    """Loss over size, a curve a budget, a panel a kind of model."""
    column = (study.fits or {}).get("size", "parameters")
    runs = _measured(budgeted(study.done), column, "budget")
    panels: dict[str, dict[str, Series]] = {}
    notes = [] if study.fits else [NO_FITS]
    for kind, budgets in _grouped(runs, "budget").items():
        panels[kind] = {}
        for budget, own in budgets.items():
            entry = _of_runs(_kind(study, kind).get("isoflop") or [], own)
            fit, best, why = _parabola(entry)
            if why:
                notes.append(f"{kind}, {budget_words(budget)}: {why}")
            panels[kind][budget_words(budget)] = _series(own, column, fit, best)
    words = {"parameters": "parameters", "parameters_llm": "parameters of the language model"}
    paths = plot_series(panels, words.get(column, column), LOSS, stem, mark="lowest of the parabola")
    caption = f"Loss over size at equal training FLOPs, with the parabola in ln N of each budget{_without(notes)}"
    return Drawn(caption=caption, runs=_names(runs), paths=paths)


def _parabola(entry: dict[str, Any] | None) -> tuple[Fit | None, tuple[float, float] | None, str]:
    """(line, its lowest point, why there is none) of one budget's entry in `fits.json`."""
    if entry is None:
        return None, None, ""
    if entry["refused"] or not entry["coefficients"]:
        return None, None, entry["refused"] or "no parabola"
    c, centre = entry["coefficients"], entry["centre"]

    def line(sizes: np.ndarray) -> np.ndarray:
        x = np.log(sizes / centre)
        return c[0] + c[1] * x + c[2] * x * x

    return line, (entry["optimum"]["value"], entry["loss"]["value"]), ""


def draw_crossover(study: StudyRecords, stem: Path) -> Drawn:
    """The lowest loss of each kind at each budget, and where two kinds change places."""
    runs = _measured(budgeted(study.done), "train_flops", "budget")
    lines = {kind: _lowest(budgets) for kind, budgets in _grouped(runs, "budget").items()}
    if len(lines) < 2:
        raise NotDrawn(f"results.csv has runs at equal budgets of {len(lines)} kind of model; two are needed")
    found = (study.fits or {}).get("crossover") or {}
    if found.get("budgets"):  # over the sizes that both kinds have
        x = np.array(found["budgets"])
        lines = {kind: Series(x=x, y=np.array(found["losses"][kind])) for kind in found["kinds"]}
    crossing = (found.get("compute") or {}).get("value")
    paths = plot_crossover(lines, crossing, COMPUTE, f"lowest {LOSS}", stem)
    caption = (
        f"The lowest loss over sizes at each budget; {found.get('text') or NO_FITS + ' to say whether they cross'}"
    )
    return Drawn(caption=caption, runs=_names(runs), paths=paths)


def _lowest(budgets: dict[str, list[StudyRun]]) -> Series:
    """At each budget the size whose seeds' mean is lowest."""
    points = []
    for runs in budgets.values():
        sizes: dict[float, list[StudyRun]] = {}
        for run in runs:
            sizes.setdefault(run.number("parameters"), []).append(run)
        best = min(sizes.values(), key=lambda own: loss_spread(own).mean)
        points.append((float(np.mean([run.number("train_flops") for run in runs])), loss_spread(best).mean))
    x, y = np.array(sorted(points)).T
    return Series(x=x, y=y)


def draw_data(study: StudyRecords, stem: Path) -> Drawn:
    """Loss over the samples of whole runs, a line a size, a panel a kind of model."""
    sized = [run for run in study.done if run.text("size") or run.text("model")]
    runs = _measured(sized, "samples", "size")
    column = "size" if any(run.text("size") for run in runs) else "model"
    groups = _grouped(runs, column)
    if all(len({run.number("samples") for run in own}) < 2 for sizes in groups.values() for own in sizes.values()):
        raise NotDrawn("results.csv has no size of model that was trained on two amounts of samples")
    panels = {kind: {size: _series(own, "samples") for size, own in sizes.items()} for kind, sizes in groups.items()}
    paths = plot_series(panels, "samples seen in the whole run", LOSS, stem)
    caption = "Loss at the end of a run over the samples that it was given, each run with a schedule of its own length"
    return Drawn(caption=caption, runs=_names(runs), paths=paths)


def draw_allocation(study: StudyRecords, stem: Path) -> Drawn:
    """Best size and best samples for given FLOPs, with their power laws."""
    if study.fits is None:
        raise NotDrawn(NO_FITS)
    panels: dict[str, dict[str, Series]] = {"optimum": {}, "samples": {}}
    notes, laws, used = [], [], []
    for kind, fits in study.fits["kinds"].items():
        found = [entry for entry in fits["isoflop"] if entry["optimum"]]
        if not found:
            notes.append(f"{kind}: no budget has an optimum")
            continue
        allocation = fits["allocation"]
        used += [name for entry in found for name in entry["runs"]]
        x = np.array([entry["budget"] for entry in found])
        for panel, name in (("optimum", "size"), ("samples", "samples")):
            y = np.array([entry[panel]["value"] for entry in found])
            line = None if allocation["refused"] else _power(allocation[name])
            panels[panel][kind] = Series(x=x, y=y, fit=line)
        if allocation["refused"]:
            notes.append(f"{kind}: {allocation['refused']}")
            continue
        a, b = (Estimate(**allocation[name]["exponent"]).words() for name in ("size", "samples"))
        laws.append(f"{kind}: a = {a}, b = {b}")
    if not panels["optimum"]:
        raise NotDrawn("; ".join(notes) or "fits.json has no kind of model")
    words = {"optimum": "best size, parameters", "samples": "best amount of data, samples"}
    paths = plot_allocation(panels, COMPUTE, words, stem)
    text = "Compute-optimal size and data from the parabolas, N ∝ C^a and D ∝ C^b"
    caption = "; ".join([text, *laws]) + _without(notes)
    return Drawn(caption=caption, runs=tuple(dict.fromkeys(used)), paths=paths)


def _power(law: dict[str, Any]) -> Fit:
    factor, exponent = law["factor"], law["exponent"]["value"]
    return lambda compute: factor * compute**exponent


def draw_parametric(study: StudyRecords, stem: Path) -> Drawn:
    """Loss of L = E + A/N^α + B/D^β against the loss measured."""
    if study.fits is None:
        raise NotDrawn(NO_FITS)
    lines, notes, laws, used = {}, [], [], []
    rows = {run.name: run for run in study.done}
    for kind, fits in study.fits["kinds"].items():
        law = fits["parametric"]
        if law["refused"]:
            notes.append(f"{kind}: {'; '.join(law['refused'])}")
            continue
        if gone := [name for name in law["runs"] if name not in rows]:
            raise NotDrawn(f"fits.json is of runs that are not done in results.csv ({', '.join(gone)}): write it anew")
        runs = [rows[name] for name in law["runs"]]
        lines[kind] = np.array([run.loss()["loss"] for run in runs]), np.array(law["fitted"])
        named = {"E": "E", "A": "A", "alpha": "α", "B": "B", "beta": "β"}
        laws.append(
            f"{kind}: " + ", ".join(f"{word} = {Estimate(**law[name]).words()}" for name, word in named.items())
        )
        used += runs
    if not lines:
        raise NotDrawn("L = E + A/N^α + B/D^β was refused: " + "; ".join(notes))
    paths = plot_predicted(lines, stem)
    caption = f"L = E + A/N^α + B/D^β against what was measured; {'; '.join(laws)}{_without(notes)}"
    return Drawn(caption=caption, runs=_names(used), paths=paths)


def _measured(runs: Sequence[StudyRun], column: str, label: str) -> list[StudyRun]:
    """Runs with a loss and a number in `column`; raises NotDrawn without any."""
    found = [run for run in runs if math.isfinite(run.number(column)) and run.loss() is not None]
    if not found:
        raise NotDrawn(f"results.csv has no done run with {label}, {column} and a loss")
    return found


def _grouped(runs: Sequence[StudyRun], column: str) -> dict[str, dict[str, list[StudyRun]]]:
    """Kind of model -> a label's cell -> runs."""
    found: dict[str, dict[str, list[StudyRun]]] = {}
    for run in runs:
        found.setdefault(run.kind, {}).setdefault(run.text(column), []).append(run)
    return found


def _series(runs: Sequence[StudyRun], column: str, fit: Fit | None = None, best: tuple | None = None) -> Series:
    x, y = (np.array(values) for values in zip(*((r.number(column), r.loss()["loss"]) for r in runs), strict=True))
    return Series(x=x, y=y, fit=fit, best=best)


def _kind(study: StudyRecords, kind: str) -> dict[str, Any]:
    return ((study.fits or {}).get("kinds") or {}).get(kind) or {}


def _of_runs(entries: Sequence[dict[str, Any]], runs: Sequence[StudyRun]) -> dict[str, Any] | None:
    names = {run.name for run in runs}
    return next((entry for entry in entries if names & set(entry["runs"])), None)


def _without(notes: Sequence[str]) -> str:
    return f"; no line for {'; '.join(dict.fromkeys(notes))}" if notes else ""


def _names(runs: Sequence[StudyRun]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(run.name for run in runs))
