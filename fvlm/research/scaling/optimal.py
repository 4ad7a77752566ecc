"""What a grid says: best size and data for a budget, how they grow, and which size to take.

Everything comes from `results.csv` alone, ours or anyone's with the same columns, and goes into `fits.json` (what
`fit_grid` returns) and `fits.md`. What the runs do not determine is refused, with the reason in the number's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fvlm.research.scaling.crossover import crossover
from fvlm.research.scaling.fits import (
    LEAST_VALUES,
    NAMES,
    Estimate,
    Parabola,
    Power,
    distinct,
    fit_parabola,
    fit_power,
)
from fvlm.research.scaling.points import NORMAL, Points, points_of
from fvlm.research.scaling.report import fits_report
from fvlm.research.study.rows import StudyRun, study_runs
from fvlm.research.tables import read_csv
from fvlm.train.describe import write_json

FARTHEST = 10.0  # times the largest budget, and not beyond
ENOUGH_BUDGETS = 4  # to go there, and over this many times the smallest:
ENOUGH_RANGE = 10.0


def write_fits(results: Path, out: Path, size: str = "parameters") -> dict[str, Any]:
    """Fits a grid's CSV and writes `fits.json` and `fits.md` into `out`; returns the former's contents.

    Raises FileNotFoundError, or ValueError naming file, row and column for what cannot be read.
    """
    found = fit_grid(study_runs(read_csv(results, ["run", "samples"])), size)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "fits.json", found)
    (out / "fits.md").write_text(fits_report(found), encoding="utf-8")
    return found


def fit_grid(runs: Sequence[StudyRun], size: str = "parameters", seed: int = 0) -> dict[str, Any]:
    """All fits as plain values, by kind of model; docs/research.md says what each is.

    Args:
        runs: rows of `results.csv`.
        size: column that counts as N: `parameters` or `parameters_llm`.
        seed: of the bootstrap's draws.
    """
    kinds, left_out = points_of(runs, size, seed)
    return {
        "size": size,
        "kinds": {kind: _fit_kind(points) for kind, points in kinds.items()},
        "crossover": crossover(list(kinds.values())),
        "left_out": left_out,
    }


def _fit_kind(points: Points) -> dict[str, Any]:
    isoflop, parabolas, data = [], [], []
    for number, budget in enumerate(points.budgets):
        own = points.at(number)
        sizes, losses = points.sizes[own], points.losses[own]
        draws = None if points.draws is None else points.draws[:, own]
        parabola = fit_parabola(sizes, losses, draws)
        samples, sample_draws = _samples_at(parabola, sizes, points.samples[own])
        parabolas.append(parabola)
        data.append((samples, sample_draws))
        isoflop.append(
            {
                "budget": float(budget),
                "runs": [points.runs[i].name for i in own],
                "sizes": sizes.tolist(),
                "losses": losses.tolist(),
                "centre": parabola.centre,
                "coefficients": parabola.coefficients,
                "optimum": _plain(parabola.optimum),
                "loss": _plain(parabola.loss),
                "samples": _plain(samples),
                "refused": parabola.refused,
            }
        )
    allocation, growth = _allocation(points.budgets, parabolas, data)
    return {
        "runs": [run.name for run in points.runs],
        "noise": None if points.noise is None else float(np.sqrt((points.noise**2).mean())),
        "noise_from": points.noise_from,
        "isoflop": isoflop,
        "allocation": allocation,
        "parametric": _parametric(points),
        "choice": _choice(points, isoflop[-1] if isoflop else None, growth, allocation["refused"]),
    }


def _samples_at(parabola: Parabola, sizes: np.ndarray, samples: np.ndarray) -> tuple[Estimate | None, Any]:
    """Samples that the budget allows at the best size: between the runs, by their logarithms."""
    if parabola.optimum is None:
        return None, None
    degree = min(2, len(distinct(sizes)) - 1)
    curve = np.polynomial.Polynomial.fit(np.log(sizes), np.log(samples), degree)
    value = np.exp(curve(np.log(parabola.optimum.value)))
    if parabola.draws is None:
        return Estimate.of(value, None), None
    drawn = np.exp(curve(np.log(parabola.draws)))
    return Estimate.of(value, drawn[np.isfinite(drawn)]), drawn


def _allocation(
    budgets: np.ndarray, parabolas: list[Parabola], data: list[tuple[Estimate | None, Any]]
) -> tuple[dict[str, Any], tuple[Power, Power] | None]:
    """How best size and data grow with compute, over the budgets that have an optimum."""
    kept = [i for i, parabola in enumerate(parabolas) if parabola.optimum is not None]
    if len(kept) < LEAST_VALUES:
        have = f"{len(kept)} of {len(budgets)} budgets have an optimum"
        return {"refused": f"{have}: a power law needs {LEAST_VALUES}"}, None
    known = all(parabolas[i].draws is not None for i in kept)
    powers = []
    for values, draws in (
        ([parabolas[i].optimum for i in kept], [parabolas[i].draws for i in kept]),
        ([data[i][0] for i in kept], [data[i][1] for i in kept]),
    ):
        drawn = np.stack(draws, axis=1) if known else None
        powers.append(fit_power(budgets[kept], np.array([each.value for each in values]), drawn))
    size, samples = powers
    found = {
        "refused": "",
        "budgets": budgets[kept].tolist(),
        "size": {"exponent": _plain(size.exponent), "factor": size.factor},
        "samples": {"exponent": _plain(samples.exponent), "factor": samples.factor},
    }
    reason = _too_little(budgets[kept])
    ahead = float(FARTHEST * budgets.max())
    found["ahead"] = {"compute": ahead, "refused": reason}
    if not reason:
        found["ahead"] |= {"size": _plain(size.at(ahead)), "samples": _plain(samples.at(ahead))}
    return found, (size, samples)


def _too_little(budgets: np.ndarray) -> str:
    """Why nothing is said of budgets beyond those measured; empty where it can be."""
    if len(budgets) < ENOUGH_BUDGETS:
        return f"{len(budgets)} budgets with an optimum; {ENOUGH_BUDGETS} are needed to go beyond them"
    if (times := budgets.max() / budgets.min()) < ENOUGH_RANGE:
        return f"the budgets span a factor of {times:.2g}; {ENOUGH_RANGE:g} is needed to go beyond them"
    return ""


def _parametric(points: Points) -> dict[str, Any]:
    """The loss law, and what follows from it for the best size and data of a budget."""
    law, names = points.law, [run.name for run in points.runs]
    if law.refused:
        return {"refused": list(law.refused), "runs": names}
    # a sample costs as size^κ, so that the lowest loss at given operations is where α A N^−α = κ β B D^−β
    u = np.log(points.sizes) - np.log(points.sizes).mean()
    kappa = float(u @ np.log(points.flops / points.samples) / (u @ u))

    def exponents(alpha: Any, beta: Any) -> tuple[Any, Any]:
        return beta / (alpha + kappa * beta), alpha / (alpha + kappa * beta)

    value = exponents(law.parameters["alpha"].value, law.parameters["beta"].value)
    drawn = exponents(law.draws[:, NAMES.index("alpha")], law.draws[:, NAMES.index("beta")])
    return {
        "refused": [],
        "runs": names,
        "fitted": law.loss(points.sizes, points.samples).tolist(),
        **{name: _plain(estimate) for name, estimate in law.parameters.items()},
        "residual": law.residual,
        "outliers": law.outliers,
        "flops_per_sample_exponent": kappa,
        "size_exponent": _plain(Estimate.of(value[0], drawn[0])),
        "sample_exponent": _plain(Estimate.of(value[1], drawn[1])),
    }


# -- which size -----------------------------------------------------------------------------------------------------


def _choice(
    points: Points, largest: dict[str, Any] | None, growth: tuple[Power, Power] | None, refused: str
) -> dict[str, Any] | None:
    """The size to take, from the largest budget: the smallest one that the noise cannot tell from the best.

    `size` is empty where there is nothing to choose from.
    """
    if largest is None:
        return None
    own = points.at(len(points.budgets) - 1)
    by_size: dict[str, list[int]] = {}
    for position in own[np.argsort(points.sizes[own], kind="stable")].tolist():
        by_size.setdefault(points.label(position), []).append(position)
    means = {name: float(points.losses[each].mean()) for name, each in by_size.items()}
    if len(means) < 2:
        return {"size": "", "reasons": [f"one size alone, {next(iter(means))}, was trained at the largest budget"]}
    best = min(means, key=means.__getitem__)

    def margin(name: str) -> float:
        if points.noise is None:
            return 0.0
        sums = [(points.noise[by_size[each]] ** 2).sum() / len(by_size[each]) ** 2 for each in (name, best)]
        return NORMAL * float(np.sqrt(sum(sums)))

    chosen = next(name for name in means if name == best or means[name] - means[best] <= margin(name))
    reasons = [f"at the largest budget, {largest['budget']:.3g} FLOP, the lowest loss is {means[best]:.4f}, of {best}"]
    if chosen != best:
        apart = means[chosen] - means[best]
        reasons.append(
            f"{chosen} is {apart:.4f} above, less than the {margin(chosen):.4f} that noise can do, "
            "and the smaller model costs less wherever it is used"
        )
    others = [f"{name} {means[name] - means[best]:+.4f}" for name in means if name not in (best, chosen)]
    if others:
        reasons.append(f"the others: {', '.join(others)}")
    if points.noise is None:
        reasons.append("how much of this is noise is not known")
    if largest["optimum"]:
        size = Estimate(**largest["optimum"])
        reasons.append(f"the parabola is lowest at {size.words()} parameters")
    else:
        reasons.append(f"a parabola does not say more: {largest['refused']}")
    order = list(means)
    if chosen in (order[0], order[-1]):
        end = "smallest" if chosen == order[0] else "largest"
        reasons.append(f"it is the {end} size of the grid, so a better one may lie beyond")
    if growth is None:
        reasons.append(f"how the best size grows with compute is not known: {refused}")
    else:
        reasons.append(f"the best size grows as compute to the power {growth[0].exponent.words()}")
    return {"size": chosen, "reasons": reasons}


def _plain(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else asdict(estimate)
