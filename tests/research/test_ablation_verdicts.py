"""Verdicts on planted results, and the log that only grows."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from fvlm.config import load_config
from fvlm.evaluate.statistics import wilson_interval
from fvlm.research.ablation.arms import plan_ablations
from fvlm.research.ablation.matrix import Comparison, Rule, load_matrix
from fvlm.research.ablation.results import write_results
from fvlm.research.ablation.verdicts import Deviation, Measured, improvement, judge, said, student_t
from fvlm.research.study.records import read_study

HIGHER = Rule(metric="accuracy", better="higher")
LOSS = Rule(metric="val_loss", better="lower")
MATRIX = {
    "reference": "base",
    "judge": [{"metric": "accuracy", "better": "higher"}],
    "questions": {
        "good": {"asks": "Is it better?", "arms": {"better": ["train.clip=2.0"]}},
        "bad": {"asks": "Is that one?", "arms": {"worse": ["train.clip=3.0"]}},
        "equal": {"asks": "Or this?", "arms": {"same": ["train.clip=4.0"]}},
        "unknown": {"asks": "And that, which broke?", "arms": {"broken": ["train.clip=5.0"]}},
        "real": {"asks": "On real data?", "needs": "real data", "arms": {"mix": ["data.mixture=t1"]}},
    },
}
ACCURACY = {"base": 0.60, "better": 0.80, "worse": 0.30, "same": 0.61}


def plant(out: Path, accuracies: dict[str, list[float]], n: int = 100, failed: dict[str, int] | None = None) -> None:
    """results.csv and families.csv with the given accuracies of each arm, one a seed; `failed`: arm → seed."""
    failed = {"broken": 0} if failed is None else failed
    columns = ["run", "status", "reason", "seed", "arm", "changed", "trained_mode", "task", "chance", "config_hash"]
    columns += ["accuracy_coarse_fine", "low_coarse_fine", "high_coarse_fine"]
    rows, families = [], []
    for arm, values in accuracies.items():
        for seed, value in enumerate(values):
            low, high = wilson_interval(value * n, n)
            name = f"{arm}-s{seed}"
            rows.append([name, "done", "", seed, arm, "", "coarse_fine", "slots", 0.125, "ab", value, low, high])
            families.append([name, "coarse_fine", "mc", "synthetic/ask", n, value, low, high, 0.125, ""])
    rows += [[f"{arm}-s{seed}", "failed", "train: it broke", seed, arm, *[""] * 8] for arm, seed in failed.items()]
    out.mkdir(parents=True, exist_ok=True)
    header = ["run", "mode", "task", "source", "n", "accuracy", "low", "high", "chance", "loss"]
    for name, head, body in (("results.csv", columns, rows), ("families.csv", header, families)):
        with (out / name).open("w", newline="") as file:
            csv.writer(file).writerows([head, *body])


def exactly(values: Sequence[float]) -> Measured:
    """Runs whose questions leave no doubt."""
    return Measured(values=tuple(values), lows=tuple(values), highs=tuple(values))


def test_the_interval_of_a_difference_is_newcombes():
    """His own example: 56 of 70 against 48 of 80 gives 0.2000, from 0.0524 to 0.3339 (Statistics in Medicine, 1998)."""
    sides = []
    for correct, total in ((56, 70), (48, 80)):
        low, high = wilson_interval(correct, total)
        sides.append(Measured(values=(correct / total,), lows=(low,), highs=(high,)))
    gain, low, high = improvement(*sides, "higher")
    assert gain == pytest.approx(0.2)
    assert (low, high) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))
    gain, low, high = improvement(*sides, "lower")
    assert (gain, low, high) == (
        pytest.approx(-0.2),
        pytest.approx(-0.3339, abs=1e-4),
        pytest.approx(-0.0524, abs=1e-4),
    )


def test_seeds_add_students_interval():
    """Exact measurements of (1, 2, 3) and (2, 4, 6): pooled s² = 2.5, t(4) = 2.776."""
    one, other = exactly((1.0, 2.0, 3.0)), exactly((2.0, 4.0, 6.0))
    gain, low, high = improvement(other, one, "higher")
    half = 2.776445 * math.sqrt(2.5 * (1 / 3 + 1 / 3))
    assert (gain, low, high) == (2.0, pytest.approx(2 - half), pytest.approx(2 + half))
    alone = Measured(values=(5.0,), lows=(4.0,), highs=(6.0,))
    assert improvement(alone, alone, "higher") == (0, pytest.approx(-math.sqrt(2)), pytest.approx(math.sqrt(2)))


def test_arms_that_vary_more_than_the_others_have_wider_intervals():
    """Their own s² = 2.5 instead of the study's 1.25, with t(8) = 2.306 of all that were repeated."""
    one, other, calm = (exactly(v) for v in ((1.0, 2.0, 3.0), (2.0, 4.0, 6.0), (1.0, 1.0, 1.0, 1.0, 1.0)))
    all_arms = Deviation.of(arm.values for arm in (one, other, calm))
    half = 2.306004 * math.sqrt(2.5 * (1 / 3 + 1 / 3))
    assert improvement(other, one, "higher", all_arms) == (2.0, pytest.approx(2 - half), pytest.approx(2 + half))
    half = 2.306004 * math.sqrt(1.25 * (1 / 3 + 1 / 5))
    assert improvement(one, calm, "higher", all_arms) == (1.0, pytest.approx(1 - half), pytest.approx(1 + half))


@pytest.mark.parametrize(
    ("spreads", "n", "m", "expected"),
    [
        ([1], 1, 1, 0.95), ([1], 3, 1, 0.96), ([1], 2, 2, 0.96), ([1], 3, 3, 0.96),
        ([1, 8], 3, 1, 0.93), ([1, 8], 2, 2, 0.95), ([1, 8], 3, 3, 0.95),
        ([1, 1, 1, 8], 1, 1, 0.87), ([1, 1, 1, 8], 3, 1, 0.92), ([1, 1, 1, 8], 2, 2, 0.94),
    ],
)  # fmt: skip
def test_intervals_over_seeds_hold_the_truth_as_often_as_they_say(spreads, n, m, expected):
    """In studies drawn with eight repeated arms, each of one of these spreads, two of which do not differ."""
    rng, held = np.random.default_rng(0), []
    for _ in range(3000):
        runs = (3, 3, 2, 2, 2, 2, 2, 2, n, m)
        arms = [rng.normal(0, rng.choice(spreads), count).tolist() for count in runs]
        _, low, high = improvement(exactly(arms[-2]), exactly(arms[-1]), "higher", Deviation.of(arms))
        held.append(low <= 0 <= high)
    assert np.mean(held) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize(
    ("of", "against", "margin", "answer"),
    [
        ("better", "base", 0.0, "yes"),
        ("worse", "base", 0.0, "no"),
        ("base", "worse", 0.0, "yes"),
        ("same", "base", 0.0, "not resolved"),
        ("better", "base", 0.15, "not resolved"),  # better, and perhaps not by that much
        ("worse", "base", -0.5, "yes"),  # at most 50 points worse
        ("broken", "base", 0.0, "not measured"),
    ],
)
def test_verdicts(of, against, margin, answer, tmp_path):
    plant(tmp_path, {arm: [value] for arm, value in ACCURACY.items()})
    rule = Rule(metric="accuracy", better="higher", margin=margin)
    found = judge(read_study(tmp_path), Comparison(of=of, against=against), [rule])
    assert found.answer == answer
    for metric in (Rule(metric="mc:synthetic/ask", better="higher", margin=margin), LOSS):
        again = judge(read_study(tmp_path), Comparison(of=of, against=against), [metric])
        assert again.answer == ("not measured" if metric is LOSS else answer)


def test_the_first_rule_that_both_have_decides_and_seeds_that_disagree_settle_nothing(tmp_path):
    plant(tmp_path, {"base": [0.6], "better": [0.8]})
    found = judge(read_study(tmp_path), Comparison(of="better", against="base"), [LOSS, HIGHER])
    assert found.rule == HIGHER
    assert found.words().startswith("better 80.0 %, base 60.0 % (accuracy): better by +20.0 points [+7.")
    assert "one seed each" in found.words()
    plant(tmp_path, {"base": [0.5, 0.6, 0.7], "better": [0.3, 0.9, 0.9]})
    found = judge(read_study(tmp_path), Comparison(of="better", against="base"), [HIGHER])
    assert found.answer == "not resolved"
    assert "3 and 3 seeds" in found.words()


def test_students_t_is_that_of_the_tables():
    """Two-sided, as printed in any table of the distribution."""
    known = {
        (0.95, 1): 12.706,
        (0.95, 2): 4.303,
        (0.95, 5): 2.571,
        (0.95, 30): 2.042,
        (0.99, 4): 4.604,
        (0.9, 3): 2.353,
    }
    for (confidence, freedom), t in known.items():
        assert student_t(confidence, freedom) == pytest.approx(t, abs=5e-4)
    assert student_t(0.95, 4000) == pytest.approx(1.9605, abs=1e-4)


def test_what_seeds_differ_by_is_known_from_the_whole_study(tmp_path):
    """Arms run once beside others whose seeds differ by ± 10 points: 4 degrees of freedom, s = 0.1414."""
    repeated = {f"other{number}": [0.4, 0.6] for number in range(4)}
    plant(tmp_path, {"base": [0.5], "better": [0.8], **repeated}, n=10**6)
    found = judge(read_study(tmp_path), Comparison(of="better", against="base"), [HIGHER])
    half = 2.776 * math.sqrt(4 * 0.02 / 4) * math.sqrt(2)
    assert found.gain == (
        pytest.approx(0.3),
        pytest.approx(0.3 - half, abs=0.002),
        pytest.approx(0.3 + half, abs=0.002),
    )
    assert found.knows_seeds
    assert said([found]) == "not resolved"
    plant(tmp_path, {"base": [0.5], "better": [0.8]}, n=10**6)
    found = judge(read_study(tmp_path), Comparison(of="better", against="base"), [HIGHER])
    assert said([found]) == "yes, on one seed"
    assert Deviation.of([[0.4, 0.6], [], [0.5]]) == Deviation(squares=pytest.approx(0.02), freedom=1)


def test_a_yes_stands_on_its_surest_comparison_and_a_no_on_all(tmp_path):
    arms = {"base": [0.5, 0.5], "better": [0.8, 0.8], "also": [0.8], "worse": [0.2, 0.2], "too": [0.2]}
    plant(tmp_path, arms, n=10**6)
    better, also, worse, too = (
        judge(read_study(tmp_path), Comparison(of=arm, against="base"), [HIGHER]) for arm in list(arms)[1:]
    )
    assert [each.knows_seeds for each in (better, also, worse, too)] == [True, False, True, False]
    assert said([better, also]) == "yes"
    assert said([also]) == "yes, on one seed"
    assert said([worse]) == "no"
    assert said([worse, too]) == "no, on one seed"


def test_several_ways_to_a_yes_make_each_of_them_harder(tmp_path):
    """62 against 48 of 100 is resolved alone, and not as one of four."""
    plant(tmp_path, {"base": [0.48], "better": [0.62]})
    answers = [
        judge(read_study(tmp_path), Comparison(of="better", against="base"), [HIGHER], out_of).answer
        for out_of in (1, 4)
    ]
    assert answers == ["yes", "not resolved"]


def test_an_arm_of_which_seeds_failed_is_never_the_better_one(tmp_path):
    plant(tmp_path, {"base": [0.5, 0.5], "better": [0.9, 0.9]}, failed={"better": 2})
    found = judge(read_study(tmp_path), Comparison(of="better", against="base"), [HIGHER])
    assert (found.answer, found.sides[0].failed) == ("not resolved", 1)
    assert "1 of better failed" in found.words()
    assert judge(read_study(tmp_path), Comparison(of="base", against="better"), [HIGHER]).answer == "not resolved"
    plant(tmp_path, {"base": [0.5, 0.5], "better": [0.9, 0.9]}, failed={"base": 2})
    assert judge(read_study(tmp_path), Comparison(of="better", against="base"), [HIGHER]).answer == "yes"
    assert judge(read_study(tmp_path), Comparison(of="base", against="better"), [HIGHER]).answer == "no"


def test_all_multiple_choice_questions_count_alike(tmp_path):
    """10 of 20 and 90 of 180 and 30 of 100 are 130 of 300."""
    plant(tmp_path, {"base": [0.5]}, n=20)
    with (tmp_path / "families.csv").open("a", newline="") as file:
        for mode, source, n, accuracy in (
            ("coarse_fine", "cue", 180, 0.5),
            ("coarse_fine", "still", 100, 0.3),
            ("autoregressive", "cue", 40, 0.25),
        ):
            csv.writer(file).writerow(["base-s0", mode, "mc", source, n, accuracy, 0, 1, 0.125, ""])
    pair, study = Comparison(of="base", against="base"), read_study(tmp_path)
    whole = judge(study, pair, [Rule(metric="mc", better="higher")]).sides[0]
    assert whole.values == (pytest.approx(130 / 300),)
    assert (whole.lows[0], whole.highs[0]) == pytest.approx(wilson_interval(130, 300))
    stream = judge(study, pair, [Rule(metric="mc_autoregressive", better="higher")]).sides[0]
    assert stream.values == (0.25,)


def test_the_page_and_the_log(tmp_path):
    for question in MATRIX["questions"].values():
        question |= {"if_yes": "take it", "if_no": "leave it", "if_open": "repeat it"}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(MATRIX, sort_keys=False))
    matrix, out, log = load_matrix(str(tmp_path / "m.yaml")), tmp_path / "out", tmp_path / "kept" / "experiments.md"
    plan = plan_ablations(matrix, load_config("study"), out)
    plant(out, {arm: [value] for arm, value in ACCURACY.items()})
    write_results(matrix, plan, "study", out, log)
    page = (out / "ablations.md").read_text()
    assert (
        "| good | Is it better? | yes, on one seed | better 80.0 %, base 60.0 % (accuracy): better by +20.0 points"
        in page
    )
    assert "| bad | Is that one? | no, on one seed |" in page
    assert "| equal | Or this? | not resolved |" in page
    assert "| unknown | And that, which broke? | not measured |" in page
    assert [page.count(words) for words in ("take it", "leave it", "repeat it")] == [1, 1, 1]
    assert "Left out: real (it names sources of real data" in page
    assert "| broken-s0 | failed | train: it broke |" in page
    assert "80.0 % [71.1–86.7]" in page
    assert "| arm | ask (mc) |" in page
    assert "chance is 12.5 %" in page
    first = log.read_text()
    rows = [line for line in first.splitlines() if line.startswith("| 2")]
    assert [row.split(" | ")[3] for row in rows] == ["good", "bad", "equal"]  # what came to nothing stays as well
    write_results(matrix, plan, "study", out, log)
    assert log.read_text() == first
    plant(out, {arm: [value] for arm, value in ACCURACY.items()} | {"better": [0.8, 0.82], "base": [0.6]})
    write_results(matrix, plan, "study", out, log)
    grown = log.read_text()
    assert grown.startswith(first)
    assert len(grown.splitlines()) == len(first.splitlines()) + 1
    assert "81.0 % ± 1.4 % (n = 2)" in (out / "ablations.md").read_text()
