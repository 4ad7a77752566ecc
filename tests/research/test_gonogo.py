"""Every check of the list can pass, fail and be not measured; what is not measured is never a go."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from fvlm.research.gonogo import rules
from fvlm.research.gonogo.checks import as_markdown, check, go, open_subject, verdict
from fvlm.research.gonogo.rules import FAIL, NOT_MEASURED, PASS
from fvlm.research.records import read_run
from fvlm.research.tables import Table
from fvlm.train.metrics import CSV_COLUMNS
from launch.report import main as report
from tests.research import made_up_study as made
from tests.research.made_up import figures


def curve(losses, samples=None) -> Table:
    samples = np.arange(1, len(losses) + 1) * 100.0 if samples is None else samples
    cells = {"samples_seen": [str(x) for x in samples], "val_loss": [str(y) for y in losses]}
    return Table(cells, "curves.csv")


@pytest.fixture
def complete_run(make_run):
    """complete_run(name) -> a run's folder in which every log is there."""

    def make(name: str, **options) -> Path:
        folder = make_run(name, **options)
        steps = [dict.fromkeys(rules.STEP_FIELDS, 1.0) | {"kind": "step", "step": step} for step in range(1, 101)]
        path = folder / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if '"evaluation"' in line]
        path.write_text("\n".join([*kept, *map(json.dumps, steps)]) + "\n")
        (folder / "data.csv").write_text("step,samples_seen\n1,32\n")
        summary = dict.fromkeys(rules.SUMMARY_FIELDS, 1) | {"samples_seen": 3200}
        (folder / "run_summary.json").write_text(json.dumps(summary))
        evaluation = json.loads((folder / "evaluation" / "evaluation.json").read_text())
        (folder / "evaluation" / "evaluation.json").write_text(json.dumps({**evaluation, "complete": True}))
        (folder / "checkpoints" / "step-00000100").mkdir(parents=True)
        (folder / "checkpoints" / "step-00000100" / "manifest.json").write_text("{}")
        return folder

    return make


def flatten(folder: Path) -> None:
    """Validation loss that has come to rest."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index("val_loss")
    rows = [line.split(",") for line in lines[1:]]
    for number, row in enumerate(rows):
        row[place] = str(0.5 + 0.5**number)
    (folder / "metrics.csv").write_text("\n".join([lines[0], *map(",".join, rows)]) + "\n")


@pytest.mark.parametrize(
    ("fine", "coarse", "outcome"),
    [
        (figures(0.9), figures(0.3), PASS),
        (figures(0.4), figures(0.35), FAIL),
        (figures(0.3), figures(0.9), FAIL),
        (None, figures(0.3), NOT_MEASURED),
        (figures(0.9), {"accuracy": 0.3, "low": math.nan, "high": math.nan}, NOT_MEASURED),
    ],
)
def test_fine_beats_coarse_where_intervals_lie_apart(fine, coarse, outcome):
    assert rules.fine_beats_coarse(fine, coarse, "coarse").outcome == outcome


@pytest.mark.parametrize(("fine", "outcome"), [(0.9, PASS), (0.995, FAIL), (1.2, FAIL), (math.nan, NOT_MEASURED)])
def test_fine_beats_coarse_by_loss(fine, outcome):
    assert rules.fine_beats_coarse_by_loss(fine, 1.0, "coarse").outcome == outcome


@pytest.mark.parametrize(
    ("table", "outcome"),
    [
        (curve([0.5 + 0.5**n for n in range(10)]), PASS),
        (curve([1.0] * 5), PASS),
        (curve([3 - 0.2 * n for n in range(10)]), FAIL),
        (curve([1, 0.9, 0.8, 0.7]), NOT_MEASURED),
        (Table({"samples_seen": ["1"]}, "curves.csv"), NOT_MEASURED),
        (None, NOT_MEASURED),
    ],
)
def test_a_curve_has_converged_when_its_last_fifth_is_flat(table, outcome):
    assert rules.converged(table).outcome == outcome


def test_the_slope_is_that_of_the_last_fifth():
    """A line of 1 % of the loss a fifth of the run: said so, and below the threshold."""
    samples = np.linspace(10, 1000, 50)
    early = np.where(samples < 700, 5.0, 0.0)
    losses = 1 + 0.01 * (1000 - samples) / 200 + early
    finding = rules.converged(curve(losses, samples))
    assert finding == (PASS, "falling 1.0% a fifth of the run (last 11 evaluations)")


def test_a_last_evaluation_close_behind_another_does_not_decide():
    """One each tenth of the run, and one more at its end that happens to equal the one before."""
    samples, losses = [*range(95, 1000, 100), 1000], [3 - 0.2 * n for n in range(10)]
    finding = rules.converged(curve([*losses, losses[-1]], samples))
    assert finding.outcome == FAIL
    assert "(last 4 evaluations)" in finding.evidence


@pytest.mark.parametrize(
    ("losses", "lines", "outcome", "words"),
    [
        ([2, 1, 0.9], [{"kind": "step", "step": 300, "train_loss": 1.0, "grad_norm": 1.0}], PASS, "0 of 300 steps"),
        ([2, 1, 1.2], [{"kind": "step", "step": 300, "train_loss": 1.0}], FAIL, "val_loss ends 20.0% up"),
        ([2, 1, math.nan], [{"kind": "step", "step": 300, "train_loss": 1.0}], FAIL, "not finite"),
        ([2, 1, 0.9], [{"kind": "step", "step": 300, "train_loss": None}], FAIL, "1 step(s) with a loss or gradient"),
        (
            [2, 1, 0.9],
            [{"kind": "step", "step": 300, "train_loss": 1.0}, *[{"kind": "guard", "step": 5}] * 4],
            FAIL,
            "4 of 300 steps left out",
        ),
        (
            [2, 1, 0.9],
            [{"kind": "step", "step": 300, "train_loss": 1.0}, {"kind": "guard", "step": 5}],
            PASS,
            "1 of 300",
        ),
        ([2, 1, 0.9], None, NOT_MEASURED, "no metrics.jsonl"),
        ([2, 1, 1.2], None, FAIL, "20.0% up"),
        (None, [{"kind": "step", "step": 300, "train_loss": 1.0}], NOT_MEASURED, "no validation loss"),
    ],
)
def test_divergence(tmp_path, losses, lines, outcome, words):
    path = tmp_path / "metrics.jsonl"
    if lines is not None:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    finding = rules.not_diverged(None if losses is None else curve(losses), path)
    assert finding.outcome == outcome
    assert words in finding.evidence


def test_an_optimum_has_to_lie_within_the_sizes_of_the_largest_budget(tmp_path):
    study = made.fit(made.write_study(tmp_path / "grid", made.grid_rows(), maps=False))
    found = json.loads((study / "fits.json").read_text())
    passed = rules.has_optimum(found)
    assert passed.outcome == PASS
    assert "4 of 4 budgets have an optimum" in passed.evidence
    isoflop = found["kinds"]["foveated, 1 token a frame"]["isoflop"]
    isoflop[-1] |= {"optimum": None, "refused": "the loss does not bend upwards over size"}
    failed = rules.has_optimum(found)
    assert failed.outcome == FAIL
    assert "does not bend upwards" in failed.evidence
    assert "3 of 4 budgets" in failed.evidence
    assert rules.has_optimum(None).outcome == NOT_MEASURED
    assert rules.has_optimum({"kinds": {}}).outcome == NOT_MEASURED


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / "data.csv").unlink(), "data.csv"),
        (lambda run: (run / "config.yaml").unlink(), "config.yaml"),
        (lambda run: (run / "run_summary.json").write_text("{"), "run_summary.json: "),
        (lambda run: (run / "run_summary.json").write_text('{"run_id": "x"}'), "run_summary.json: config_hash"),
        (lambda run: (run / "checkpoints" / "step-00000100" / "manifest.json").unlink(), "manifest.json"),
        (lambda run: [path.unlink() for path in (run / "evaluation" / "maps").iterdir()], "evaluation/maps"),
        (lambda run: made.drop_column(run / "metrics.csv", "gpu_mem_gb"), "metrics.csv: gpu_mem_gb"),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind":"step","step":1}\n'), "metrics.jsonl: train_loss"),
        (lambda run: (run / "evaluation" / "evaluation.json").write_text("{}"), "evaluation.json: its end"),
    ],
)
def test_a_log_that_lacks_is_named(complete_run, spoil, words):
    run = complete_run("a")
    assert rules.missing_logs(run) == []
    spoil(run)
    assert any(words in what for what in rules.missing_logs(run)), rules.missing_logs(run)


def test_a_study_removes_checkpoints_that_it_has_evaluated(complete_run):
    run = complete_run("a")
    (run / "checkpoints" / "step-00000100" / "manifest.json").unlink()
    (run / "study.json").write_text('{"status": "failed"}')
    assert rules.missing_logs(run) == ["checkpoints/*/manifest.json"]
    (run / "study.json").write_text('{"status": "done"}')
    assert rules.missing_logs(run) == []


def test_the_columns_asked_for_are_those_that_a_run_writes():
    from fvlm.train.clock import Clock
    from fvlm.train.readings import StepSums

    names = (
        set(CSV_COLUMNS)
        | {"data_wait_sec"}
        | set(StepSums(**dict.fromkeys(StepSums.__dataclass_fields__, 1.0)).figures(False, True, 1))
    )
    import torch

    clock = Clock(0.0, torch.device("cpu"), 1)
    assert set(rules.STEP_FIELDS) <= names | set(clock.rates())


@pytest.fixture
def ready(tmp_path, complete_run):
    """An ablation study, a grid with its fits, and a run: all that a go needs."""
    ablations = made.write_study(tmp_path / "ablations", made.ablation_rows()[:-1], maps=False)
    grid = made.fit(made.write_study(tmp_path / "grid", made.grid_rows(), maps=False))
    still = [3.0, 1.0, 0.61, 0.605, 0.602, 0.6]
    for study, names in ((ablations, ("F3-s0", "F3-s1")), (grid, ("xl-foveated-6.4e+13",))):
        rows = [{"run": name, "architecture": "foveated", "trained_mode": "coarse_fine"} for name in names]
        made.write_rows(study / "curves.csv", made.CURVES, [p for row in rows for p in made.curve_rows(row, still)])
        for name in names:
            complete_run(name).rename(study / name)
    run = complete_run("stage1")
    flatten(run)
    return [ablations, grid, run]


def outcomes(paths, **options) -> dict[str, str]:
    return {each.title: each.outcome for each in check([open_subject(path, **options) for path in paths])}


def test_go_where_every_check_passes(ready, tmp_path, capsys):
    assert set(outcomes(ready).values()) == {PASS}
    out = tmp_path / "go.md"
    assert report(["--go-no-go", *map(str, ready), "--out", str(out)]) == 0
    assert "report: Verdict: GO. All 6 checks passed." in capsys.readouterr().out
    text = out.read_text()
    assert "| Fine beats coarse | **pass** | ablations: 92.0 % [85.1–96.5] against 35.0 %" in text
    assert "of A6, trained with one query" in text


def test_one_failed_run_is_a_no_go(ready, tmp_path, capsys):
    rows = [*made.ablation_rows()]
    made.write_rows(ready[0] / "results.csv", made.RESULTS, rows)
    assert report(["--go-no-go", *map(str, ready)]) == 1
    assert "Verdict: NO-GO. Fail: every run is done." in capsys.readouterr().out
    assert outcomes(ready)["Every run is done"] == FAIL
    rows[-1] |= {"status": "not_run", "reason": ""}  # as `--only` leaves it
    made.write_rows(ready[0] / "results.csv", made.RESULTS, rows)
    assert outcomes(ready)["Every run is done"] == PASS
    found = next(each for each in check([open_subject(ready[0])]) if each.title == "Every run is done").findings
    assert found[0][1].evidence == "6 done, 1 never begun"


def test_what_is_not_measured_is_no_go(ready):
    (ready[1] / "fits.json").unlink()
    subjects = [open_subject(path) for path in ready]
    checks = check(subjects)
    assert not go(checks)
    assert verdict(checks) == "**Verdict: NO-GO.** Not measured: a compute-optimal point exists."
    assert "ablations, grid: no fits.json" in as_markdown(subjects, checks)
    assert outcomes(ready[2:])["A compute-optimal point exists"] == NOT_MEASURED


def test_foreign_tables_alone_leave_logs_and_divergence_unmeasured(tmp_path):
    study = made.write_study(tmp_path / "theirs", made.ablation_rows()[:-1], maps=False)
    found = outcomes([study])
    assert found["Every log is there"] == found["No divergence"] == NOT_MEASURED
    assert found["Fine beats coarse"] == found["Every run is done"] == PASS


def test_the_arm_to_judge_can_be_chosen(ready):
    rows = made.ablation_rows()[:-1]
    rows[2] |= made.accuracies(coarse_only=0.35, coarse_fine=0.36)
    made.write_rows(ready[0] / "results.csv", made.RESULTS, rows)
    assert outcomes(ready[:1])["Fine beats coarse"] == PASS
    found = outcomes(ready[:1], arm="F1")
    assert found["Fine beats coarse"] == FAIL
    assert found["Curves converged"] == found["Every log is there"] == NOT_MEASURED


def test_a_run_alone_is_judged_by_its_own_records(complete_run):
    run = complete_run("a", fine=0.4, coarse=0.38)
    found = outcomes([run])
    assert found["Fine beats coarse"] == FAIL
    assert found["Curves converged"] == FAIL, "33 / step still falls"
    assert found["Every run is done"] == PASS
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train"]["total_samples"] = 6400
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert outcomes([run])["Every run is done"] == FAIL
    (run / "run_summary.json").unlink()
    assert outcomes([run])["Every run is done"] == NOT_MEASURED
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text())
    for mode, loss in (("coarse_fine", 0.5), ("coarse_only", 0.9)):
        evaluation["modes"][mode] = {"loss": {"loss": loss}}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    assert rules.run_beats_coarse(read_run(run)).outcome == PASS
    pooled = complete_run("pooled", architecture="multi_token")
    assert rules.run_beats_coarse(read_run(pooled)).outcome == NOT_MEASURED


def test_a_preference_run_is_judged_by_the_loss_of_its_pairs(complete_run):
    """Its cross-entropy may well rise."""
    run = complete_run("dpo", objective="dpo")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"val_loss": line["step"], "preference/loss": 0.6} if line["kind"] == "evaluation" else {}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = outcomes([run])
    assert found["Curves converged"] == found["No divergence"] == PASS


def test_a_folder_that_is_neither_is_refused(tmp_path, capsys):
    assert report(["--go-no-go", str(tmp_path)]) == 1
    assert "none of a run's records is there" in capsys.readouterr().err
    assert report(["--go-no-go", str(tmp_path / "no")]) == 1
    assert "no such run folder" in capsys.readouterr().err
