"""Curves of scaling laws with intervals by bootstrap: parabolas of one budget, and L = E + A / N^α + B / D^β.

Nothing is handed out that the points do not determine: every fit carries the reasons for which it was refused. Shapes:
n points, S starts or draws, five parameters (ln E, ln A, α, ln B, β), A and B at the points' mean size and data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import numpy as np

DRAWS = 500
CONFIDENCE = (2.5, 97.5)
SURE = 0.95  # share of the draws in which an optimum has to exist, and to lie within the range
LEAST_POINTS = 7  # five parameters, and two points to check them
LEAST_VALUES = 3  # of sizes, and of amounts of data
WIDEST = 0.5  # half an interval over its value: beyond, a parameter is not determined
WORST_CONDITION = 1e5  # of the Jacobian with columns of unit length
APART = 1.02  # values closer than that are one
HUBER = 1.345  # standard deviations from which a residual counts less than squared
NAMES = ("E", "A", "alpha", "B", "beta")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, draws: np.ndarray | None) -> Estimate:
        """With the interval of its bootstrap draws."""
        if draws is None or not len(draws):
            return cls(value=float(value))
        low, high = np.percentile(draws, CONFIDENCE)
        return cls(value=float(value), low=float(min(low, value)), high=float(max(high, value)))

    def words(self, digits: int = 3) -> str:
        """1.23 [1.1, 1.4]."""
        interval = "" if self.low is None else f" [{self.low:.{digits}g}, {self.high:.{digits}g}]"
        return f"{self.value:.{digits}g}{interval}"


def distinct(values: np.ndarray) -> np.ndarray:
    """The values that lie apart, ascending; those within 2 % of a smaller one are that one."""
    found: list[float] = []
    for value in np.sort(values):
        if not found or value > APART * found[-1]:
            found.append(float(value))
    return np.array(found)


# -- one budget -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Parabola:
    """Loss over ln size at one budget: c0 + c1 x + c2 x², x = ln(size / centre)."""

    coefficients: tuple[float, float, float] | None
    """None where there are fewer than three sizes."""
    centre: float
    optimum: Estimate | None
    """Size of the lowest loss; None where `refused` says why."""
    loss: Estimate | None
    """There."""
    refused: str = ""
    draws: np.ndarray | None = field(default=None, repr=False, compare=False)
    """Optimum of each draw, NaN where it has none within the range."""


def fit_parabola(sizes: np.ndarray, losses: np.ndarray, draws: np.ndarray | None) -> Parabola:
    """Least squares, refused where it has no lowest point within the sizes, or not surely.

    Args:
        sizes, losses: [n].
        draws: [S, n] losses as they might have come out as well; None: their noise is not known.
    """
    x = np.log(sizes)
    centre = x.mean()
    x = x - centre
    common = {"centre": float(np.exp(centre)), "optimum": None, "loss": None}
    if (count := len(distinct(sizes))) < LEAST_VALUES:
        return Parabola(coefficients=None, refused=f"{count} size(s): a parabola needs {LEAST_VALUES}", **common)
    solve = np.linalg.pinv(np.stack([np.ones_like(x), x, x * x], axis=1))  # [3, n]
    c = solve @ losses
    common["coefficients"] = tuple(map(float, c))
    if c[2] <= 0:
        return Parabola(refused="the loss does not bend upwards over size", **common)
    vertex = -c[1] / (2 * c[2])
    if not x.min() <= vertex <= x.max():
        side, end = ("below the smallest", sizes.min()) if vertex < x.min() else ("above the largest", sizes.max())
        return Parabola(refused=f"the lowest loss lies {side} size measured, {end:.3g}", **common)
    optima = lowest = None
    if draws is not None:
        cs = draws @ solve.T  # [S, 3]
        with np.errstate(divide="ignore", invalid="ignore"):
            vertices = -cs[:, 1] / (2 * cs[:, 2])
        inside = (cs[:, 2] > 0) & (vertices >= x.min()) & (vertices <= x.max())
        if inside.mean() < SURE:
            text = f"only {inside.mean():.0%} of the draws have a lowest point within the sizes: too much noise"
            return Parabola(refused=text, **common)
        optima = np.where(inside, np.exp(vertices + centre), np.nan)
        lowest = (cs[:, 0] - cs[:, 1] ** 2 / (4 * cs[:, 2]))[inside]
    inner = None if optima is None else optima[np.isfinite(optima)]
    common["optimum"] = Estimate.of(np.exp(vertex + centre), inner)
    common["loss"] = Estimate.of(c[0] - c[1] ** 2 / (4 * c[2]), lowest)
    return Parabola(draws=optima, **common)


@dataclass(frozen=True, kw_only=True)
class Power:
    """y = exp(level) · (x / centre)^exponent."""

    exponent: Estimate
    centre: float
    level: float
    draws: np.ndarray = field(repr=False, compare=False)
    """[S, 2]: exponent and level of each draw; none without noise that is known."""

    @property
    def factor(self) -> float:
        """y = factor · x^exponent."""
        return float(np.exp(self.level - self.exponent.value * np.log(self.centre)))

    def at(self, x: float) -> Estimate:
        """y there."""
        along = np.log(x / self.centre)
        drawn = np.exp(self.draws[:, 1] + self.draws[:, 0] * along)
        return Estimate.of(np.exp(self.level + self.exponent.value * along), drawn)


def fit_power(x: np.ndarray, y: np.ndarray, draws: np.ndarray | None) -> Power:
    """A straight line through logarithms; x, y [n], draws of y [S, n], of which those with a NaN are left out."""
    u = np.log(x) - np.log(x).mean()
    lines = np.zeros((0, 2))
    if draws is not None:
        known = np.log(draws[np.isfinite(draws).all(axis=1)])
        lines = np.stack([known @ u / (u @ u), known.mean(axis=1)], axis=1)
    return Power(
        exponent=Estimate.of(u @ np.log(y) / (u @ u), lines[:, 0]),
        centre=float(np.exp(np.log(x).mean())),
        level=float(np.log(y).mean()),
        draws=lines,
    )


# -- all runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LossLaw:
    """L = E + A / N^α + B / D^β, fitted to all runs; `parameters` is empty where `refused` says why."""

    refused: tuple[str, ...] = ()
    parameters: Mapping[str, Estimate] = field(default_factory=dict)
    residual: float = 0.0
    """Robust standard deviation of ln measured − ln fitted."""
    outliers: int = 0
    """Runs more than four of these away."""
    draws: np.ndarray | None = field(default=None, repr=False, compare=False)
    """[S, 5] as NAMES."""

    def loss(self, sizes: np.ndarray, data: np.ndarray) -> np.ndarray:
        """Loss of the fit; any shapes that broadcast."""
        e, a, alpha, b, beta = (self.parameters[name].value for name in NAMES)
        return e + a * sizes**-alpha + b * data**-beta


class _Points(NamedTuple):
    x: np.ndarray  # [n] ln size − mean
    z: np.ndarray  # [n] ln data − mean
    low: np.ndarray  # [5] bounds
    high: np.ndarray


def fit_loss_law(sizes: np.ndarray, data: np.ndarray, losses: np.ndarray, seed: int = 0) -> LossLaw:
    """Huber's loss on ln L, from many starts; intervals from residuals drawn anew.

    Args:
        sizes, data, losses: [n], positive.
        seed: of the draws.
    """
    if reasons := _missing(sizes, data, losses):
        return LossLaw(refused=tuple(reasons))
    target, lowest = np.log(losses), float(np.log(losses.min()))
    points = _Points(
        np.log(sizes) - np.log(sizes).mean(),
        np.log(data) - np.log(data).mean(),
        np.array([lowest - 7, lowest - 12, 0.01, lowest - 12, 0.01]),
        np.array([lowest, lowest + 5, 4.0, lowest + 5, 4.0]),
    )
    theta, scale = _robust(points, target)
    fitted, jacobian = _predict(theta, points)
    residuals = target - fitted
    outliers = int((np.abs(residuals) > 4 * max(scale, 1e-9)).sum())
    reasons = _at_bounds(theta, points)
    reasons += _confused(jacobian)
    rng, count = np.random.default_rng(seed), len(target)
    widened = (residuals - np.median(residuals)) * np.sqrt(count / (count - len(NAMES)))
    drawn = fitted + widened[rng.integers(count, size=(DRAWS, count))]
    thetas = _descend(np.tile(theta, (DRAWS, 1)), points, drawn, HUBER * max(scale, 1e-6), rounds=100)[0]
    reasons += _spread(theta, thetas)
    if reasons:
        return LossLaw(refused=tuple(reasons), residual=scale, outliers=outliers)
    means = np.log(sizes).mean(), np.log(data).mean()
    natural, draws = _natural(theta[None], *means)[0], _natural(thetas, *means)
    return LossLaw(
        parameters={name: Estimate.of(natural[i], draws[:, i]) for i, name in enumerate(NAMES)},
        residual=scale,
        outliers=outliers,
        draws=draws,
    )


def _missing(sizes: np.ndarray, data: np.ndarray, losses: np.ndarray) -> list[str]:
    """What no arithmetic can make up for."""
    reasons = []
    if len(losses) < LEAST_POINTS:
        reasons.append(f"{len(losses)} runs: five parameters need at least {LEAST_POINTS}")
    for one, several, values in (("size", "sizes", sizes), ("amount of data", "amounts of data", data)):
        if (count := len(distinct(values))) < LEAST_VALUES:
            what = one if count == 1 else several
            reasons.append(f"{count} {what}: what the loss owes to it needs {LEAST_VALUES} or more")
    if np.ptp(losses) == 0:
        reasons.append("all losses are the same")
    return reasons


def _robust(points: _Points, target: np.ndarray) -> tuple[np.ndarray, float]:
    """Best parameters [5], and the residuals' scale: first by least squares, then by Huber's loss."""
    starts, delta = _starts(points, target), 1e6
    scale = 0.0
    for _ in range(4):
        found, costs = _descend(starts, points, target, delta, rounds=300)
        theta = found[np.argmin(costs)]
        residuals = target - _predict(theta, points)[0]
        free = len(target) / (len(target) - len(NAMES))
        scale = float(1.4826 * np.median(np.abs(residuals)) * np.sqrt(free))
        delta = HUBER * max(scale, 1e-6)
    return theta, scale


def _starts(points: _Points, target: np.ndarray) -> np.ndarray:
    """[S, 5]: exponents and floors all over, and what is left of the loss in equal halves."""
    lowest, mean = np.exp(target.min()), np.exp(target).mean()
    found = []
    for share, alpha, beta in product((0.2, 0.6, 0.95), (0.1, 0.35, 1.0), (0.1, 0.35, 1.0)):
        half = np.log((mean - share * lowest) / 2)
        found.append([np.log(share * lowest), half, alpha, half, beta])
    return np.clip(np.array(found), points.low, points.high)


def _predict(theta: np.ndarray, points: _Points) -> tuple[np.ndarray, np.ndarray]:
    """ln L [..., n] and its derivatives [..., n, 5] at parameters [..., 5]."""
    e, a, alpha, b, beta = (theta[..., i, None] for i in range(5))
    terms = np.stack([e + 0 * points.x, a - alpha * points.x, b - beta * points.z], axis=-1)
    top = terms.max(axis=-1, keepdims=True)
    shares = np.exp(terms - top)
    total = shares.sum(axis=-1, keepdims=True)
    p = shares / total
    by = [p[..., 0], p[..., 1], -points.x * p[..., 1], p[..., 2], -points.z * p[..., 2]]
    return (top + np.log(total))[..., 0], np.stack(by, axis=-1)


def _huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residuals)
    return np.where(size <= delta, residuals**2 / 2, delta * (size - delta / 2)).sum(axis=-1)


def _descend(
    theta: np.ndarray, points: _Points, target: np.ndarray, delta: float, rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg and Marquardt's descent of all starts [S, 5] at once, within bounds; target [n] or [S, n].

    Returns parameters [S, 5] and costs [S].
    """
    damping = np.full(len(theta), 1e-2)
    fitted, jacobian = _predict(theta, points)
    cost = _huber(target - fitted, delta)
    for _ in range(rounds):
        residuals = target - fitted
        weights = delta / np.maximum(np.abs(residuals), delta)
        weighted = jacobian * weights[..., None]
        normal = weighted.mT @ jacobian
        diagonal = np.einsum("sii->si", normal) + 1e-12
        damped = normal + np.eye(5) * (damping[:, None] * diagonal)[:, None, :]
        step = np.linalg.solve(damped, (weighted.mT @ residuals[..., None]))[..., 0]
        trial = np.clip(theta + np.clip(step, -1, 1), points.low, points.high)
        trial_fitted, trial_jacobian = _predict(trial, points)
        trial_cost = _huber(target - trial_fitted, delta)
        better = trial_cost < cost
        done = ~better & (damping > 1e8) | better & (cost - trial_cost < 1e-12 * cost)
        theta, cost = np.where(better[:, None], trial, theta), np.where(better, trial_cost, cost)
        fitted = np.where(better[:, None], trial_fitted, fitted)
        jacobian = np.where(better[:, None, None], trial_jacobian, jacobian)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-9, 1e9)
        if done.all():
            break
    return theta, cost


def _at_bounds(theta: np.ndarray, points: _Points) -> list[str]:
    """Parameters that the descent drove as far as it may."""
    floor = "E cannot be told from 0: the loss still falls as a power law where it was measured"
    if theta[0] <= points.low[0] + 1e-3:
        return [floor]
    pairs = zip(NAMES, theta, points.low, points.high, strict=True)
    return [
        f"{name} runs off to the end of its range: nothing in the data holds it"
        for name, value, low, high in pairs
        if not low + 1e-6 < value < high - 1e-6
    ]


def _confused(jacobian: np.ndarray) -> list[str]:
    """Whether parameters move the fit in the same way."""
    lengths = np.linalg.norm(jacobian, axis=0)
    condition = np.inf if (lengths == 0).any() else np.linalg.cond(jacobian / lengths)
    if condition < WORST_CONDITION:
        return []
    return [f"sizes and data vary together, so that parameters cannot be told apart (condition {condition:.1g})"]


def _spread(theta: np.ndarray, thetas: np.ndarray) -> list[str]:
    """Parameters that the draws scatter too widely; A and B at the points' mean size and data."""
    value, drawn = theta.copy(), thetas.copy()
    for column in (0, 1, 3):
        value[column], drawn[:, column] = np.exp(value[column]), np.exp(drawn[:, column])
    low, high = np.percentile(drawn, CONFIDENCE, axis=0)
    wide = (high - low) / 2 > WIDEST * value
    return [
        f"{name} is known to no better than {value[i]:.2g} [{low[i]:.2g}, {high[i]:.2g}]"
        for i, name in enumerate(("E", "A / N^alpha at the mean size", "alpha", "B / D^beta at the mean data", "beta"))
        if wide[i]
    ]


def _natural(thetas: np.ndarray, mean_size: float, mean_data: float) -> np.ndarray:
    """[S, 5] as NAMES, from logarithms at the means."""
    e, a, alpha, b, beta = thetas.T
    return np.stack([np.exp(e), np.exp(a + alpha * mean_size), alpha, np.exp(b + beta * mean_data), beta], axis=1)
