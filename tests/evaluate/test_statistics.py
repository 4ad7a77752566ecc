"""Wilson intervals against published values and their defining equation; flags of degenerate results."""

from __future__ import annotations

import math
import random

import pytest

from fvlm.evaluate.statistics import Z_95, accuracy_figures, degenerate_flags, wilson_interval, yes_no_figures


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # R: binom::binom.confint(x, n, methods = "wilson")
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (50, 100, 0.4038315, 0.5961685),
        (1, 20, 0.0088814, 0.2361311),
    ],
)
def test_known_intervals(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(("correct", "total"), [(3, 7), (13.4, 40), (199, 200)])
def test_bounds_solve_the_score_equation(correct, total):
    share = correct / total
    for bound in wilson_interval(correct, total):
        assert abs(share - bound) == pytest.approx(Z_95 * math.sqrt(bound * (1 - bound) / total), abs=1e-12)


def test_interval_of_nothing_and_of_nonsense():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"correct=3 is not within 0\.\.2"):
        wilson_interval(3, 2)


def test_figures_of_perfect_and_of_guessed_answers():
    answers = list("abcd") * 10
    figures = accuracy_figures([1.0] * 40, [0.25] * 40, answers, answers)
    assert (figures["accuracy"], figures["n"], figures["chance"], figures["flags"]) == (1.0, 40, 0.25, [])
    guessed = accuracy_figures([1.0] * 10 + [0.0] * 30, [0.25] * 40, ["a"] * 40, answers)
    assert guessed["flags"] == ["always answers a", "not above chance"]


def test_one_answer_is_no_sign_where_it_is_always_right_or_rarely_asked():
    assert degenerate_flags(["a"] * 40, ["a"] * 40) == []
    assert degenerate_flags(["a"] * 9, list("ab") * 5) == []
    assert degenerate_flags(["a"] * 10, list("ab") * 5) == ["always answers a"]


def test_figures_of_nothing_are_an_error():
    with pytest.raises(ValueError, match="no items"):
        accuracy_figures([], [], [], [])


@pytest.mark.parametrize("seed", range(5))
def test_finding_things_against_counting_them(seed):
    rng = random.Random(seed)
    said = [rng.random() < 0.7 for _ in range(30)]
    right = [rng.random() < 0.5 for _ in range(30)]
    pairs = list(zip(said, right, strict=True))
    hits, false_alarms, misses = (pairs.count(pair) for pair in ((True, True), (True, False), (False, True)))
    precision, recall = hits / (hits + false_alarms), hits / (hits + misses)
    assert yes_no_figures(said, right) == pytest.approx(
        {
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
            "yes": (hits + false_alarms) / 30,
        }
    )


def test_a_share_of_nothing_is_none():
    assert yes_no_figures([False, False], [True, False]) == {"precision": None, "recall": 0.0, "f1": 0.0, "yes": 0.0}
    assert yes_no_figures([True], [False]) == {"precision": 0.0, "recall": None, "f1": 0.0, "yes": 1.0}
    assert yes_no_figures([], []) == dict.fromkeys(("precision", "recall", "f1", "yes"))
