"""A study of real runs: tiny ones, trained and evaluated by the commands themselves."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from fvlm.config import load_config
from fvlm.research.study.runner import PlannedRun, run_study
from tests.train.shards import write_shards


@pytest.mark.slow
def test_the_tables_of_real_runs(tmp_path):
    write_shards(tmp_path / "train", 60, seed=0)
    write_shards(tmp_path / "val", 24, seed=2)
    data = [f"data.train=[{tmp_path / 'train'}]", f"data.val=[{tmp_path / 'val'}]"]
    base = load_config("tiny_test", [*data, "train.total_samples=60", "evaluation.tasks=[loss, slots]"])
    weights = f"init_from={tmp_path / 'out' / 'base'}"
    runs = [
        PlannedRun(name="base", labels={"arm": "base"}),
        PlannedRun(name="pooled", overrides=("model.architecture=multi_token",), labels={"arm": "pooled"}),
        PlannedRun(name="frozen", overrides=("train.freeze=[llm]", weights), labels={"arm": "frozen"}, after="base"),
        PlannedRun(name="wrong", overrides=("train.packs_per_step=3", "data.val=[nowhere]"), labels={"arm": "wrong"}),
    ]
    study = run_study(runs, base, tmp_path / "out")
    logs = {run.name: (tmp_path / "out" / run.name / "train.log").read_text()[-2000:] for run in runs}
    assert study.statuses == {
        "base": "done",
        "pooled": "done",
        "frozen": "done",
        "wrong": "failed",
    }, logs
    found = {row["run"]: row for row in _rows(tmp_path / "out" / "results.csv")}
    assert "nowhere" in found["wrong"]["reason"]
    for name, row in list(found.items())[:3]:
        figures = {key: float(row[key]) for key in ("val_loss", "train_loss", "train_flops", "parameters", "steps")}
        assert all(math.isfinite(value) and value > 0 for value in figures.values()), (name, figures)
        assert row["samples"] == "60"
        assert float(row["loss_low"]) <= figures["val_loss"] <= float(row["loss_high"])
        assert int(row["parameters_llm"]) > 0
        assert row["task"] == "slots"
    assert float(found["base"]["loss_ratio"]) > 0
    assert found["pooled"]["loss_autoregressive"] == ""
    assert found["base"]["loss_autoregressive"]
    assert found["base"]["parameters_llm"] == found["frozen"]["parameters_llm"]
    curves = [row for row in _rows(tmp_path / "out" / "curves.csv") if row["run"] == "base"]
    assert curves[-1]["samples_seen"] == "60"
    assert float(curves[-1]["flops_seen"]) == float(found["base"]["train_flops"])
    sources = {(row["task"], row["source"]) for row in _rows(tmp_path / "out" / "families.csv")}
    assert {("loss", "colours"), ("loss", "words"), ("slots", "colours")} <= sources
    assert (tmp_path / "out" / "base" / "evaluation" / "maps").is_dir()
    assert not (tmp_path / "out" / "pooled" / "checkpoints").exists()


def _rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
