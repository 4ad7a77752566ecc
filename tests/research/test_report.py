"""The report card says what the records say, names what is missing, and reads both ways."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from fvlm.research.reading import reading
from fvlm.research.records import read_run
from fvlm.research.report import Figures, write_report
from launch.report import main


@pytest.fixture
def without_figures(monkeypatch):
    """For tests of the text: drawing takes seconds."""
    monkeypatch.setattr(Figures, "draw", lambda self, name, caption, *_, **__: [caption, ""])


def test_report_of_a_full_run(make_run, repo_root):
    run = make_run("demo")
    others = [
        make_run("coarse", fine=0.3, coarse=0.3, mode="coarse_only"),
        make_run("pooled", architecture="multi_token"),
    ]
    out = write_report(run, run / "report.md", others, price_per_hour=2.5, repository=repo_root)
    text = out.read_text()
    for embedded in re.findall(r"\]\(([^)]+)\)", text):
        assert (out.parent / embedded).is_file(), f"{embedded} is linked and not there"
    for expected in (
        "# Report card: demo",
        "95.0 % [91.0–97.3]",  # accuracy with its interval
        "12.5 %",  # chance
        "coarse only, 1 token a frame",
        "4 pooled tokens a frame",
        "0.200 device-hours, 0.50 at 2.5 an hour",
        "synthetic/caption",
        "2 CPU cores",
        "0123abc",
        "| kernels |",
        "a\\|b?",
        "Autoregressive minus coarse→fine: loss +0.0040, lists -2.0%.",
    ):
        assert expected in text, expected
    assert "Not on record" not in text
    assert "None" not in text
    assert "nan" not in text


def test_cost_of_a_run_that_knows_its_price(make_run, without_figures):
    run = make_run("demo")
    known = json.loads((run / "run_summary.json").read_text())
    known["cost"] = {"gpu_hours": 0.5, "price_per_gpu_hour": 3.0, "money": 1.5}  # it ran on more devices for a while
    (run / "run_summary.json").write_text(json.dumps(known))
    assert "0.500 device-hours, 1.50 at 3 an hour" in write_report(run, run / "report.md").read_text()
    text = write_report(run, run / "report.md", price_per_hour=2.0).read_text()
    assert "0.500 device-hours, 1.00 at 2 an hour" in text


def test_preference_is_shown_of_runs_that_have_it(make_run, without_figures):
    run = make_run("demo")
    assert "## Preference" not in write_report(run, run / "report.md").read_text()
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    judged = [{**each, "preference/accuracy": 0.75, "preference/margin": 0.1} for each in records]
    path.write_text("".join(json.dumps(each) + "\n" for each in judged))
    text = write_report(run, run / "report.md").read_text()
    assert "## Preference" in text
    assert "Training and validation loss" in text
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("\ntrain:\n", "\ntrain:\n  objective: dpo\n"))
    assert "Training and validation loss" not in write_report(run, run / "report.md").read_text()


def test_share_of_attention_is_the_one_of_the_maps(make_run, without_figures):
    run = make_run("demo")
    text = write_report(run, run / "report.md").read_text()
    assert "| coarse→fine | 75.0 % | 100.0 % | 8 |" in text
    assert "| coarse only | 6.2 % |" in text


@pytest.mark.parametrize(
    ("fine", "coarse", "words"),
    [
        (0.95, 0.30, "its answers rest on where it looks"),
        (0.30, 0.60, "looking makes its answers worse"),
        (0.52, 0.50, "does not show that looking helps"),
        (0.13, 0.12, "has not learned the task"),
    ],
)
def test_reading_goes_where_the_numbers_go(make_run, fine, coarse, words):
    text = reading(read_run(make_run("demo", fine=fine, coarse=coarse)))
    assert words in text
    assert text.count(". ") == 1, "two sentences"


def test_reading_says_when_deployment_lags(make_run):
    assert "-45.0 points, more than the intervals" in reading(read_run(make_run("a", fine=0.95, stream=0.5)))
    assert "-2.0 points, within the intervals" in reading(read_run(make_run("b", fine=0.95, stream=0.93)))


def test_reading_says_whether_arms_saw_the_same_samples(make_run):
    run = read_run(make_run("a"))
    same, other = read_run(make_run("b", mode="coarse_only")), read_run(make_run("c", total_samples=99))
    assert "coarse only, 1 token a frame, trained on the same samples, gets" in reading(run, [same])
    assert "trained on other samples" in reading(run, [other])


@pytest.mark.parametrize(
    "record",
    [
        "config.yaml",
        "metrics.csv",
        "metrics.jsonl",
        "run_summary.json",
        "evaluation/evaluation.json",
        "evaluation/maps",
    ],
)
def test_a_missing_record_is_named_and_the_rest_is_reported(make_run, record, without_figures):
    run = make_run("demo")
    path = run / record
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = write_report(run, run / "report.md").read_text()
    section = text.split("## Not on record")[1]
    assert f"`{record}" in section


def test_a_run_without_an_evaluation_yet_is_reported_as_such(make_run, without_figures):
    run = make_run("demo")
    header = (run / "metrics.csv").read_text().splitlines()[0]
    (run / "metrics.csv").write_text(header + "\n")
    assert (
        "`metrics.csv` (losses over training): begun, and empty so far" in write_report(run, run / "r.md").read_text()
    )


def test_a_broken_record_is_an_error_and_not_a_missing_one(make_run):
    run = make_run("demo")
    (run / "run_summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"run_summary\.json: not valid JSON"):
        write_report(run, run / "report.md")


def test_degenerate_results_are_shown(make_run, without_figures):
    run = make_run("demo")
    path = run / "evaluation" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["modes"]["coarse_fine"]["slots"]["by_source"]["synthetic/cue"]["flags"] = ["always answers ring"]
    path.write_text(json.dumps(evaluation))
    assert "always answers ring (coarse→fine)" in write_report(run, run / "report.md").read_text()


def test_command_line(make_run, repo_root, tmp_path, capsys):
    run = make_run("demo")
    command = [sys.executable, str(repo_root / "launch" / "report.py"), str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, (run / "report.md").is_file()) == (0, True), done.stderr
    assert main(["no/such/run"]) == 1
    assert capsys.readouterr().err.strip() == "report: no/such/run: no such run folder"
