"""The card over several stages and studies, and the one command behind all reports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fvlm.research.card import write_card
from fvlm.research.report import Figures
from fvlm.research.style import STYLE
from launch.report import main as report
from tests.research import made_up_study as made


@pytest.fixture
def without_figures(monkeypatch):
    """For tests of the text: drawing takes seconds."""
    monkeypatch.setattr(Figures, "draw", lambda self, name, caption, *_, **__: [caption, ""])


@pytest.fixture
def stages(make_run) -> list[Path]:
    """A stage with a report of its own, and a preference stage from its weights, which knows its price."""
    first = make_run("stage1", fine=0.6, coarse=0.3, objective="ce_all")
    (first / "report.md").write_text("# Report card\n")
    second = make_run("dpo", fine=0.9, coarse=0.3, objective="dpo")
    path = second / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    shares = {record["step"]: record["step"] / 100 for record in records if record["kind"] == "evaluation"}
    judged = [{**r, "preference/accuracy": shares.get(r["step"]), "preference/margin": 0.25} for r in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in judged))
    cost = {"gpu_hours": 2.0, "price_per_gpu_hour": 3.0, "money": 6.0}
    summary = json.loads((second / "run_summary.json").read_text())
    (second / "run_summary.json").write_text(json.dumps({**summary, "cost": cost}))
    return [first, second]


def test_card_of_two_stages_and_a_study(stages, tmp_path, repo_root, monkeypatch):
    monkeypatch.setitem(STYLE, "savefig.dpi", 50)
    study = made.write_study(tmp_path / "ablations", made.ablation_rows(), maps=False)
    (study / "results.md").write_text("# Results\n")
    out = tmp_path / "out" / "report.md"
    out.parent.mkdir()
    (out.parent / "go-no-go.md").write_text("# Go / no-go\n")
    write_card(stages, out, [study], price_per_hour=2.5, repository=repo_root)
    text = out.read_text()
    for linked in re.findall(r"\]\(([^)]+)\)", text):
        assert (out.parent / linked).is_file(), f"{linked} is linked and not there"
    for expected in (
        "> On held-out clips this model (foveated, 1 token a frame) gets 90.0 %",
        "This page is about one model and the stages that it was trained in",
        "| foveated, 1 token a frame | ce_all | the weights of its preset | 3200 | [report](../stage1/report.md) |",
        "| 2 | dpo | foveated, 1 token a frame | dpo | the weights of its preset | 3200 | – |",
        "| stage1 | 3 | 0.3 | 3.3 | 0.33 | 0.75 | 10 |",
        "| at the first evaluation of stage1 | – | 17.2 % | – | – | – |",
        "| after stage1 | 30.0 % [24.1–36.7] | 60.0 % [53.1–66.5] | 93.0 % [88.6–95.8] | 12.5 % | – |",
        "| 12.5 % | +30.0 points |",
        "| dpo | pairs whose chosen answer is preferred | 0.1 | 1 |",
        "| dpo | margin of rewards | 0.25 | 0.25 |",
        "| F3 | – | foveated, 1 token a frame | 2 | 0.6 | 92.0 % [85.1–96.5] | 12.5 % |",
        "Not done: LR4-s0 (out of memory).",
        "More: [results](../ablations/results.md).",
        "Beside this page: [whether a longer run should be begun](go-no-go.md).",
        "| **all** | – | 0.2 | 2.2 | – | 5.5 |",
        "| commit | 0123abc | 0123abc |",
        "what the model of dpo chose in each mode",
        "| kernels |",
    ):
        assert expected in text, expected
    assert "nan" not in text
    assert "None" not in text


def test_money_is_summed_only_where_every_stage_has_a_price(stages, tmp_path, without_figures):
    text = write_card(stages, tmp_path / "card.md").read_text()
    assert "| dpo | 2 | 0.1 | 2 | 3 | 6 |" in text
    assert "| **all** | – | 0.2 | 2.2 | – | – |" in text
    assert "Money stands where a price is known" in text


def test_accuracies_on_other_data_are_not_subtracted(stages, tmp_path, without_figures):
    config = stages[1] / "config.yaml"
    config.write_text(config.read_text().replace("data:\n", "data:\n  val: [elsewhere]\n"))
    text = write_card(stages, tmp_path / "card.md").read_text()
    assert "other validation data" in text
    assert "points |" not in text
    for stage in stages:  # asked the same, whatever they were trained beside
        path = stage / "evaluation" / "evaluation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"identity": {"data": "2ef0"}}))
    assert "+30.0 points |" in write_card(stages, tmp_path / "card.md").read_text()


def test_what_lacks_is_named(stages, tmp_path, without_figures):
    (stages[0] / "metrics.csv").unlink()
    arms = [*made.ablation_rows(), made.arm("A6", "A6", "") | {"run": "A6-s9", "status": "not_run"}]
    study = made.write_study(tmp_path / "ablations", arms, maps=False)
    grid = made.write_study(tmp_path / "grid", [made.arm("F3", "", "") | {"budget": "1e12"}], maps=False)
    text = write_card(stages, tmp_path / "card.md", [study, grid]).read_text()
    assert f"Not begun: 1 of its {len(arms)} planned runs." in text
    absent = text.split("## Not on record")[1]
    assert "- stage1: `metrics.csv`" in absent
    assert "- grid: `fits.json`" in absent
    assert "- ablations: `fits.json`" not in absent


def test_command_line(stages, tmp_path, capsys, without_figures):
    study = made.write_study(tmp_path / "ablations", [made.arm("F3", "", "")], maps=False)
    card = tmp_path / "card.md"
    assert report(["--card", *map(str, stages), "--study", str(study), "--out", str(card)]) == 0
    assert f"report: {card}" in capsys.readouterr().out
    assert "## Study: ablations" in card.read_text()
    assert report([str(stages[0]), "--compare", str(stages[1]), "--out", str(tmp_path / "one.md")]) == 0
    assert "# Report card: stage1" in (tmp_path / "one.md").read_text()
    assert report(["--card", str(tmp_path / "gone")]) == 1
    assert "gone: no such run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected a RUN, --card, --figures or --go-no-go"),
        (["run", "--card", "a"], "one of them only"),
        (["--card", "a", "--compare", "b"], "--compare: not with this; it belongs to run"),
        (["run", "--study", "b"], "--study: not with this; it belongs to card"),
        (["run", "--arm", "F1"], "--arm: not with this; it belongs to go-no-go"),
    ],
)
def test_wrong_usage(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        report(arguments)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err
