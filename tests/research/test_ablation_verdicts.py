"""Verdicts on planted results, and the log that only grows."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import yaml

from fvlm.config import load_config
from fvlm.evaluate.statistics import wilson_interval
from fvlm.research.ablation_matrix import Comparison, Rule, load_matrix
from fvlm.research.ablation_results import write_results
from fvlm.research.ablations import plan_ablations
from fvlm.research.study_records import read_study
from fvlm.research.verdicts import Measured, improvement, judge

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


def plant(out: Path, accuracies: dict[str, list[float]], n: int = 100, failed: tuple[str, ...] = ("broken",)) -> None:
    """results.csv and families.csv with the given accuracies of each arm, one a seed."""
    columns = ["run", "status", "reason", "seed", "arm", "changed", "trained_mode", "task", "chance", "config_hash"]
    columns += ["accuracy_coarse_fine", "low_coarse_fine", "high_coarse_fine"]
    rows, families = [], []
    for arm, values in accuracies.items():
        for seed, value in enumerate(values):
            low, high = wilson_interval(value * n, n)
            name = f"{arm}-s{seed}"
            rows.append([name, "done", "", seed, arm, "", "coarse_fine", "slots", 0.125, "ab", value, low, high])
            families.append([name, "coarse_fine", "mc", "synthetic/ask", n, value, low, high, 0.125, ""])
    rows += [[f"{arm}-s0", "failed", "train: it broke", 0, arm, *[""] * 8] for arm in failed]
    out.mkdir(parents=True, exist_ok=True)
    header = ["run", "mode", "task", "source", "n", "accuracy", "low", "high", "chance", "loss"]
    for name, head, body in (("results.csv", columns, rows), ("families.csv", header, families)):
        with (out / name).open("w", newline="") as file:
            csv.writer(file).writerows([head, *body])


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
    one, other = (Measured(values=v, lows=v, highs=v) for v in ((1.0, 2.0, 3.0), (2.0, 4.0, 6.0)))
    gain, low, high = improvement(other, one, "higher")
    half = 2.776 * math.sqrt(2.5 * (1 / 3 + 1 / 3))
    assert (gain, low, high) == (2.0, pytest.approx(2 - half), pytest.approx(2 + half))
    alone = Measured(values=(5.0,), lows=(4.0,), highs=(6.0,))
    assert improvement(alone, alone, "higher") == (0, pytest.approx(-math.sqrt(2)), pytest.approx(math.sqrt(2)))


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


def test_the_page_and_the_log(tmp_path):
    for question in MATRIX["questions"].values():
        question |= {"if_yes": "take it", "if_no": "leave it", "if_open": "repeat it"}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(MATRIX, sort_keys=False))
    matrix, out, log = load_matrix(str(tmp_path / "m.yaml")), tmp_path / "out", tmp_path / "kept" / "experiments.md"
    plan = plan_ablations(matrix, load_config("study"), out)
    plant(out, {arm: [value] for arm, value in ACCURACY.items()})
    write_results(matrix, plan, "study", out, log)
    page = (out / "ablations.md").read_text()
    assert "| good | Is it better? | yes | better 80.0 %, base 60.0 % (accuracy): better by +20.0 points" in page
    assert "| bad | Is that one? | no |" in page
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
