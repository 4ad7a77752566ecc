"""Is one arm better than another? A rule stated beforehand, applied to a study's tables.

The difference of two arms has two parts of doubt. The validation questions are a sample: each run's own 95 % interval
says how much that is worth, and the distances of the two runs' bounds add up in squares (Newcombe's interval for a
difference). Seeds differ: over n and m runs, t * s * sqrt(1/n + 1/m). s is the pooled standard deviation of all arms
of the study that were repeated, or of these two where that is wider; t has the degrees of freedom of all. In drawn
studies such intervals hold the truth 92 to 96 times in 100, also where arms differ in spread; between two arms of one
seed each it is 87 then (tested). Where neither these two were repeated nor enough others, the answer says that it
rests on one seed.

A question of k comparisons, any of which would answer it, asks 1 - 0.05 / k of each (Bonferroni).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

from fvlm.evaluate.statistics import Z_95, wilson_interval
from fvlm.research.ablation.matrix import Comparison, Rule
from fvlm.research.reading import percent
from fvlm.research.study.records import StudyRecords
from fvlm.research.study.rows import StudyRun

ENOUGH = 4
"""Degrees of freedom from which the study's deviation over seeds speaks for arms that were run once."""
YES, NO, OPEN, ABSENT = "yes", "no", "not resolved", "not measured"


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How much runs that differ in their seed alone differ."""

    squares: float = 0.0
    """Summed squares of distances from the arms' means."""
    freedom: int = 0

    @property
    def s(self) -> float:
        """Standard deviation; 0 where nothing was repeated."""
        return math.sqrt(self.squares / self.freedom) if self.freedom else 0.0

    @classmethod
    def of(cls, arms: Iterable[Sequence[float]]) -> Deviation:
        """Pooled over arms, each the values of its seeds."""
        arms = [arm for arm in arms if arm]
        squares = math.fsum((value - statistics.fmean(arm)) ** 2 for arm in arms for value in arm)
        return cls(squares=squares, freedom=sum(len(arm) - 1 for arm in arms))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A metric of one arm, a value a seed."""

    values: tuple[float, ...]
    lows: tuple[float, ...]
    """Lower bounds of the runs' own 95 % intervals."""
    highs: tuple[float, ...]
    failed: int = 0
    """Further runs of the arm, which failed."""

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
    knows_seeds: bool = False
    """Whether seeds were repeated often enough to say what they differ by."""

    def words(self) -> str:
        """The figures in a line."""
        pair = self.comparison
        if self.rule is None or self.gain is None or self.sides is None:
            return f"{pair.of} against {pair.against}: no figure that both have"
        shown = [figure(self.rule.metric, side.mean) for side in self.sides]
        gain, low, high = (difference(self.rule.metric, value) for value in self.gain)
        n, m = (len(side.values) for side in self.sides)
        runs = "one seed each" if n == m == 1 else f"{n} and {m} seeds"
        broken = [
            f"{side.failed} of {name} failed"
            for side, name in zip(self.sides, _names(pair), strict=True)
            if side.failed
        ]
        return (
            f"{pair.of} {shown[0]}, {pair.against} {shown[1]} ({self.rule.metric}): "
            f"better by {gain} [{low} to {high}], {', '.join([runs, *broken])}"
        )


def _names(pair: Comparison) -> tuple[str, str]:
    return pair.of, pair.against


def measure(study: StudyRecords, arm: str, metric: str) -> Measured | None:
    """The metric of an arm's finished runs; None unless all of them have it, with its interval."""
    found = [_figure(study, run, metric) for run in study.done if run.arm == arm]
    if not found or any(each is None or not all(map(math.isfinite, each)) for each in found):
        return None
    values, lows, highs = zip(*found, strict=True)
    failed = sum(run.arm == arm and run.text("status") == "failed" for run in study.runs)
    return Measured(values=values, lows=lows, highs=highs, failed=failed)


def _figure(study: StudyRecords, run: StudyRun, metric: str) -> tuple[float, float, float] | None:
    """(value, low, high)."""
    task, _, source = metric.partition(":")
    if source:
        return _family(study, run, task, source)
    if metric.startswith("mc"):
        return _all_choices(study, run, metric.removeprefix("mc").removeprefix("_") or run.mode)
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


def _all_choices(study: StudyRecords, run: StudyRun, mode: str) -> tuple[float, float, float] | None:
    """Of all multiple-choice questions, whatever their source, with Wilson's interval."""
    if study.families is None:
        return None
    rows = study.families.where(run=run.name, mode=mode, task="mc")
    if not len(rows):
        return None
    n, right = rows.numbers("n"), rows.numbers("n") * rows.numbers("accuracy")
    total, correct = float(n.sum()), float(right.sum())
    return (correct / total, *wilson_interval(min(correct, total), total))


def judge(study: StudyRecords, comparison: Comparison, rules: Sequence[Rule], out_of: int = 1) -> Verdict:
    """By the first rule whose metric both arms have: yes if the gain's interval is above the margin, no if below.

    `out_of`: comparisons any of which would answer the question. An arm of which runs failed is never the better one.
    """
    for rule in rules:
        of, against = (measure(study, arm, rule.metric) for arm in _names(comparison))
        if of is None or against is None:
            continue
        arms = [measure(study, arm, rule.metric) for arm in study.arms()]
        all_arms = Deviation.of(arm.values for arm in arms if arm is not None)
        gain = improvement(of, against, rule.better, all_arms, 1 - 0.05 / out_of)
        answer = YES if gain[1] > rule.margin else NO if gain[2] < rule.margin else OPEN
        if (answer == YES and of.failed) or (answer == NO and against.failed):
            answer = OPEN
        repeated = min(len(of.values), len(against.values)) > 1
        known = repeated or all_arms.freedom >= ENOUGH
        return Verdict(
            comparison=comparison, answer=answer, rule=rule, gain=gain, sides=(of, against), knows_seeds=known
        )
    return Verdict(comparison=comparison, answer=ABSENT)


def improvement(
    of: Measured, against: Measured, better: str, all_arms: Deviation | None = None, confidence: float = 0.95
) -> tuple[float, float, float]:
    """(gain, low, high): by how much `of` is better than `against`, with its interval.

    `all_arms`: what seeds differ by in the whole study.
    """
    up, down = (of, against) if better == "higher" else (against, of)
    own = Deviation.of([of.values, against.values])
    all_arms = all_arms or own
    t = student_t(confidence, all_arms.freedom) if all_arms.freedom else 0.0
    seeds = t * max(all_arms.s, own.s) * math.sqrt(1 / len(of.values) + 1 / len(against.values))
    wider = NormalDist().inv_cdf((1 + confidence) / 2) / Z_95  # the runs' own intervals are on record at 95 %
    gain = up.mean - down.mean
    below = math.hypot(wider * up.below, wider * down.above, seeds)
    above = math.hypot(wider * up.above, wider * down.below, seeds)
    return gain, gain - below, gain + above


@cache
def student_t(confidence: float, freedom: int) -> float:
    """The t that |T| stays below with probability `confidence`; the distribution function is exact for whole degrees
    of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    low, high = 0.0, 1e6
    for _ in range(100):
        t = (low + high) / 2
        low, high = (t, high) if _within(t, freedom) < confidence else (low, t)
    return high


def _within(t: float, freedom: int) -> float:
    """Probability of |T| < t."""
    angle = math.atan2(t, math.sqrt(freedom))
    odd, cosine = freedom % 2, math.cos(angle)
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    part = math.sin(angle) * total
    return (angle + part) * 2 / math.pi if odd else part


def answer(verdicts: Iterable[Verdict]) -> str:
    """Of a question: yes if any comparison is, no if all are, not measured if nothing is, else not resolved."""
    found = {verdict.answer for verdict in verdicts}
    if YES in found:
        return YES
    return next(iter(found)) if len(found) == 1 else OPEN


def said(verdicts: Sequence[Verdict]) -> str:
    """The answer, and whether it rests on one seed: a yes stands on its surest comparison, a no on all of them."""
    found = answer(verdicts) if verdicts else ABSENT
    enough = {YES: any, NO: all}.get(found)
    alone = enough and not enough(each.knows_seeds for each in verdicts if each.answer == found)
    return f"{found}, on one seed" if alone else found


def figure(metric: str, value: float) -> str:
    """A value of a metric, as a share in per cent or a loss in nats."""
    return f"{value:.4f}" if "loss" in metric else percent(value)


def difference(metric: str, value: float) -> str:
    """A difference of two values, in nats or points."""
    return f"{value:+.4f}" if "loss" in metric else f"{100 * value:+.1f} points"
