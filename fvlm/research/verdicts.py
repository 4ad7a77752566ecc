"""Is one arm better than another? A rule stated beforehand, applied to a study's tables.

The difference of two arms has two parts of doubt. The validation questions are a sample: each run's own 95 % interval
says how much that is worth, and the distances of the two runs' bounds add up in squares (Newcombe's interval for a
difference). Seeds differ: over n and m runs, t * s * sqrt(1/n + 1/m) with the pooled standard deviation s of both arms.
With one run each, s is unknown, and the verdict says that it rests on one seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fvlm.research.ablation_matrix import Comparison, Rule
from fvlm.research.reading import percent
from fvlm.research.study_records import StudyRecords
from fvlm.research.study_rows import StudyRun

YES, NO, OPEN, ABSENT = "yes", "no", "not resolved", "not measured"
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t, 95 % two-sided, for 1 to 10 degrees of freedom; more are taken as 10."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A metric of one arm, a value a seed."""

    values: tuple[float, ...]
    lows: tuple[float, ...]
    """Lower bounds of the runs' own 95 % intervals."""
    highs: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def below(self) -> float:
        """Mean distance of the lower bound: more seeds do not make the questions more."""
        return self.mean - statistics.fmean(self.lows)

    @property
    def above(self) -> float:
        """Mean distance of the upper bound."""
        return statistics.fmean(self.highs) - self.mean


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether `of` is better than `against`."""

    comparison: Comparison
    answer: str
    """yes, no, not resolved or not measured."""
    rule: Rule | None = None
    """The one that decided; None where none could."""
    gain: tuple[float, float, float] | None = None
    """How much better, and the bounds of that; below 0: worse."""
    sides: tuple[Measured, Measured] | None = None

    def words(self) -> str:
        """The figures in a line."""
        pair = self.comparison
        if self.rule is None or self.gain is None or self.sides is None:
            return f"{pair.of} against {pair.against}: no figure that both have"
        shown = [figure(self.rule.metric, side.mean) for side in self.sides]
        gain, low, high = (difference(self.rule.metric, value) for value in self.gain)
        n, m = (len(side.values) for side in self.sides)
        runs = "one seed each" if n == m == 1 else f"{n} and {m} seeds"
        return (
            f"{pair.of} {shown[0]}, {pair.against} {shown[1]} ({self.rule.metric}): "
            f"better by {gain} [{low} to {high}], {runs}"
        )


def measure(study: StudyRecords, arm: str, metric: str) -> Measured | None:
    """The metric of an arm's finished runs; None unless all of them have it, with its interval."""
    found = [_figure(study, run, metric) for run in study.done if run.arm == arm]
    if not found or any(each is None or not all(map(math.isfinite, each)) for each in found):
        return None
    values, lows, highs = zip(*found, strict=True)
    return Measured(values=values, lows=lows, highs=highs)


def _figure(study: StudyRecords, run: StudyRun, metric: str) -> tuple[float, float, float] | None:
    """(value, low, high)."""
    task, _, source = metric.partition(":")
    if source:
        return _family(study, run, task, source)
    if metric == "val_loss":
        found = run.loss()
        return None if found is None else (found["loss"], found["low"], found["high"])
    found = run.accuracy(metric.removeprefix("accuracy").removeprefix("_") or None)
    return None if found is None else (found["accuracy"], found["low"], found["high"])


def _family(study: StudyRecords, run: StudyRun, task: str, source: str) -> tuple[float, float, float] | None:
    if study.families is None:
        return None
    rows = study.families.where(run=run.name, mode=run.mode, task=task, source=source)
    if not len(rows):
        return None
    names = ("loss" if task == "loss" else "accuracy", "low", "high")
    return tuple(float(rows.numbers(name)[0]) for name in names)


def judge(study: StudyRecords, comparison: Comparison, rules: Sequence[Rule]) -> Verdict:
    """By the first rule whose metric both arms have: yes if the gain's interval is above the margin, no if below."""
    for rule in rules:
        of, against = (measure(study, arm, rule.metric) for arm in (comparison.of, comparison.against))
        if of is not None and against is not None:
            gain = improvement(of, against, rule.better)
            answer = YES if gain[1] > rule.margin else NO if gain[2] < rule.margin else OPEN
            return Verdict(comparison=comparison, answer=answer, rule=rule, gain=gain, sides=(of, against))
    return Verdict(comparison=comparison, answer=ABSENT)


def improvement(of: Measured, against: Measured, better: str) -> tuple[float, float, float]:
    """(gain, low, high): by how much `of` is better than `against`, with its 95 % interval."""
    up, down = (of, against) if better == "higher" else (against, of)
    gain, seeds = up.mean - down.mean, _seed_doubt(of.values, against.values)
    return gain, gain - math.hypot(up.below, down.above, seeds), gain + math.hypot(up.above, down.below, seeds)


def _seed_doubt(one: Sequence[float], other: Sequence[float]) -> float:
    """Half-width of the interval of the means' difference that seeds alone give; 0 where each has only one."""
    freedom = len(one) + len(other) - 2
    if freedom == 0:
        return 0.0
    squares = sum((value - statistics.fmean(arm)) ** 2 for arm in (one, other) for value in arm)
    t = _T_95[min(freedom, len(_T_95)) - 1]
    return t * math.sqrt(squares / freedom * (1 / len(one) + 1 / len(other)))


def answer(verdicts: Iterable[Verdict]) -> str:
    """Of a question: yes if any comparison is, no if all are, not measured if nothing is, else not resolved."""
    found = {verdict.answer for verdict in verdicts}
    if YES in found:
        return YES
    return next(iter(found)) if len(found) == 1 else OPEN


def figure(metric: str, value: float) -> str:
    """A value of a metric, as a share in per cent or a loss in nats."""
    return f"{value:.4f}" if "loss" in metric else percent(value)


def difference(metric: str, value: float) -> str:
    """A difference of two values, in nats or points."""
    return f"{value:+.4f}" if "loss" in metric else f"{100 * value:+.1f} points"
