"""The runs of a grid as points to fit: size, data, compute and loss of each kind of model, and how noisy that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fvlm.research.scaling.fits import APART, DRAWS, LossLaw, fit_loss_law
from fvlm.research.study.rows import StudyRun

SAME_BUDGET = 1.1  # runs without a stated budget whose operations differ by less have the same one
FEWEST = 2  # degrees of freedom from which a spread says something
NORMAL = 1.96


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """One kind of model; arrays [n], a run each."""

    kind: str
    runs: list[StudyRun]
    sizes: np.ndarray
    samples: np.ndarray
    flops: np.ndarray
    losses: np.ndarray
    group: np.ndarray
    """int [n]: position in `budgets`; −1 for runs of an equal number of samples, which are at no budget."""
    budgets: np.ndarray
    """[m], ascending: geometric mean of the operations of a budget's runs."""
    law: LossLaw
    noise: np.ndarray | None = None
    """Standard deviation of each loss; None where nothing is known of it."""
    noise_from: str = "nothing on record: one run a point, without intervals"
    draws: np.ndarray | None = field(default=None, repr=False)
    """[S, n] losses as they might have come out as well."""

    def at(self, budget: int) -> np.ndarray:
        """Positions of a budget's runs."""
        return np.flatnonzero(self.group == budget)

    def label(self, position: int) -> str:
        """What a run's size is called."""
        return self.runs[position].text("size") or f"{self.sizes[position]:.3g}"


def points_of(
    runs: Sequence[StudyRun], size: str = "parameters", seed: int = 0
) -> tuple[dict[str, Points], dict[str, str]]:
    """Kind → its points, and run → why it is left out.

    Args:
        runs: rows of a grid's `results.csv`.
        size: column that counts as N: `parameters` or `parameters_llm`.
        seed: of the draws.
    """
    kinds: dict[str, list[StudyRun]] = {}
    left_out = {}
    for run in runs:
        if reason := _unusable(run, size):
            left_out[run.name] = reason
        else:
            kinds.setdefault(run.kind, []).append(run)
    return {kind: _points(kind, own, size, seed) for kind, own in kinds.items()}, left_out


def _unusable(run: StudyRun, size: str) -> str:
    if not run.done:
        return f"{run.text('status')}: {run.text('reason')}".rstrip(": ")
    found = {size: run.number(size), "samples": run.number("samples"), "train_flops": _flops(run)}
    loss = run.loss()
    found["loss"] = loss["loss"] if loss else math.nan
    missing = [name for name, value in found.items() if not (math.isfinite(value) and value > 0)]
    return f"no positive {', '.join(missing)} on record" if missing else ""


def _flops(run: StudyRun) -> float:
    stated = run.number("train_flops")
    return stated if math.isfinite(stated) else run.number("samples") * run.number("flops_per_sample")


def _points(kind: str, runs: list[StudyRun], size: str, seed: int) -> Points:
    sizes = np.array([run.number(size) for run in runs])
    samples = np.array([run.number("samples") for run in runs])
    flops = np.array([_flops(run) for run in runs])
    stated = [run.loss() for run in runs]
    losses = np.array([figures["loss"] for figures in stated])
    group, budgets = _budgets(runs, flops)
    law = fit_loss_law(sizes, samples, losses, seed)
    noise, origin = _noise(sizes, losses, group, law, stated)
    known = {}
    if noise is not None:
        random = np.random.default_rng([seed, 1]).standard_normal((DRAWS, len(runs)))
        known = {"noise": noise, "noise_from": origin, "draws": losses + noise * random}
    return Points(
        kind=kind, runs=runs, sizes=sizes, samples=samples, flops=flops, losses=losses, group=group, budgets=budgets,
        law=law, **known,
    )  # fmt: skip


def _budgets(runs: list[StudyRun], flops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs by their stated budget, or by their operations where none is stated."""
    members: dict[object, list[int]] = {}
    last = -math.inf
    for position in np.argsort(flops, kind="stable").tolist():
        run = runs[position]
        if run.text("comparison") == "isosample":
            continue
        stated = run.text("budget")
        if not stated and flops[position] > SAME_BUDGET * last:
            last = flops[position]
        members.setdefault(stated or last, []).append(position)
    means = {key: float(np.exp(np.log(flops[own]).mean())) for key, own in members.items()}
    group = np.full(len(runs), -1)
    for number, key in enumerate(sorted(members, key=means.__getitem__)):
        group[members[key]] = number
    return group, np.array(sorted(means.values()))


def _noise(
    sizes: np.ndarray, losses: np.ndarray, group: np.ndarray, law: LossLaw, stated: list[dict[str, float]]
) -> tuple[np.ndarray | None, str]:
    """Standard deviation of each loss: what runs scatter by, else what its interval says.

    The runs of a grid are asked the same validation samples. How these were drawn moves all losses alike, which is why
    the interval over samples stands in only where nothing is known of how runs scatter.
    """
    scatter, words = _scatter(sizes, losses, group)
    if not words and not law.refused:
        scatter, words = law.residual * losses, "the scatter around the fitted law"
    if words:
        return np.broadcast_to(np.maximum(scatter, np.finfo(float).tiny), losses.shape), words
    half = np.array([(figures["high"] - figures["low"]) / 2 / NORMAL for figures in stated])
    if not (np.isfinite(half) & (half > 0)).all():
        return None, ""
    return half, "the bootstrap over validation samples, which does not know other seeds"


def _scatter(sizes: np.ndarray, losses: np.ndarray, group: np.ndarray) -> tuple[float | np.ndarray, str]:
    """Spread of repeated runs, else of runs around their budgets' parabolas; 0 and no words without either."""
    repeated = around = 0.0
    repeated_free = around_free = 0
    for budget in range(group.max(initial=-1) + 1):
        own = np.flatnonzero(group == budget)
        number = _numbered(sizes[own])
        for each in range(number.max() + 1):
            same = losses[own[number == each]]
            repeated += float(((same - same.mean()) ** 2).sum())
            repeated_free += len(same) - 1
        if number.max() + 1 > 3:
            x = np.log(sizes[own]) - np.log(sizes[own]).mean()
            around += float(((losses[own] - np.polyval(np.polyfit(x, losses[own], 2), x)) ** 2).sum())
            around_free += len(own) - 3
    if repeated_free >= FEWEST:
        return math.sqrt(repeated / repeated_free), "the spread of repeated runs"
    if around_free >= FEWEST:
        return math.sqrt(around / around_free), "the scatter around the parabolas"
    return 0.0, ""


def _numbered(values: np.ndarray) -> np.ndarray:
    """The same number for values within 2 % of each other, from 0 on, ascending."""
    order = np.argsort(values, kind="stable")
    steps = np.diff(values[order], prepend=values[order[:1]]) > (APART - 1) * values[order]
    number = np.empty(len(values), int)
    number[order] = np.cumsum(steps)
    return number
