"""The ablation matrix: complete, one change an arm, the same samples for all, and errors that name what is wrong."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from fvlm.config import identity, load_config
from fvlm.data.order import SampleOrder
from fvlm.data.plan import Capacities, Plan
from fvlm.research.ablation.arms import describe, plan_ablations
from fvlm.research.ablation.matrix import load_matrix
from fvlm.research.study.plan import write_plan
from fvlm.research.study.runner import PlannedRun
from fvlm.schema import ConfigError
from fvlm.train.build import mixture
from tests.data.tables import draw_table

OUT = Path("runs/ablations")
LR1 = "train.learning_rate={connector: {base: 1.0e-4}, dino: {base: 1.0e-5}, llm: {base: 1.0e-5}}"
# the changes that SPEC names, and what the arms of this project's own questions change; F's start is apart
CHANGES = {
    "F3": {},
    "F1": {"train.freeze": ["dino", "llm"]},
    "F2": {"train.freeze": ["llm"]},
    "F3_P": {},
    "LR2": {"train.learning_rate.connector.base": 1e-3},
    "LR3": {"train.learning_rate.connector.base": 3e-5},
    "LR4": {"train.learning_rate.connector.base": 1e-5},
    "A1": {"model.deep_query": False},
    "A2_2": {"train.fine_iterations": [2]},
    "A2_3": {"train.fine_iterations": [3]},
    "A3_4": {"model.tokens_per_frame": 4},
    "A5_half": {"model.query_logit_scale": 2.0},
    "A5_learnable": {"model.query_logit_scale": "learnable"},
    "A6": {"train.mode": "coarse_only"},
    "A8_1": {"data.mixture.looks": 1},
    "A8_4": {"data.mixture.looks": 4},
    "A8_16": {"data.mixture.looks": 16},
    "B1": {"model.architecture": "multi_token", "model.grid": 16},
    "B1_batch": {"model.architecture": "multi_token", "model.grid": 16, "train.packs_per_step": 2},
    "D1": {
        "data.mixture.kinds": {"video": 55, "image": 30, "text": 15, "images": 0},
        "data.mixture.text_share": None,
    },
    "T1": {"data.mixture.weights": ...},
    "T2": {"data.mixture.weights": ...},
    "T3": {"data.mixture.weights": ...},
    "T4": {"data.mixture.weights": ...},
    "Q_fine": {"data.mixture.question_first": 1.0},
    "Q_coarse": {"data.mixture.question_first": 1.0, "train.mode": "coarse_only"},
    "R": {"model.random_queries": True},
    "G": {"train.fine_iterations": [1, 2]},
    "G_third": {"train.fine_iterations": [1, 1, 2]},
    "G_late": {"train.fine_iterations": [1, 2], "train.total_samples": 10000},
    "N_0": {"data.mixture.narrated": 0.0},
    "N_half": {"data.mixture.narrated": 0.5},
    "N_all": {"data.mixture.narrated": 1.0},
    "N_first": {"data.mixture.narrated": 0.0, "train.total_samples": 20000},
    "N_second": {"train.total_samples": 20000},
    "N_both": {"train.total_samples": 20000},
    "G_first": {"data.mixture.narrated": 0.0, "train.fine_iterations": [1, 2], "train.total_samples": 20000},
}
STARTS = {
    "F1": "P",
    "F2": "P",
    "F3_P": "P",
    "G_late": "H",
    "N_first": "H",
    "N_second": "H_0",
    "N_both": "H",
    "G_first": "H",
}
CLIPS_ALONE = {"B1_batch", "N_first", "N_second", "N_both", "G_first"}


@pytest.fixture(scope="module")
def matrix():
    return load_matrix("ablations")


@pytest.fixture(scope="module")
def study():
    return load_config("study")


@pytest.fixture(scope="module")
def base_135m():
    return load_config("stage1_135m", ["train.schedule=cosine", LR1])


def changed(base, config) -> dict:
    before, after = identity(base), identity(config)
    return {key: after[key] for key in after if key != "train.seed" and after[key] != before[key]}


def matches(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        expected[key] is ... or found[key] == expected[key] for key in expected
    )


def test_all_of_the_list_and_each_arm_only_what_it_says(matrix, base_135m, tmp_path):
    plan = plan_ablations(matrix, base_135m, OUT)
    assert set(matrix.arms) == set(CHANGES)
    assert "A7" in matrix.questions  # a comparison of runs that are there
    assert plan.same_as == {"F3_P": "F3", "N_0": "F3"}
    assert set(plan.left_out) == {"P", "B1_batch", "N_stage", "N_later", "G_first"}
    configs = write_plan(plan.runs, base_135m, tmp_path)
    assert {run.labels["arm"] for run in plan.runs} == {"H", *CHANGES} - {*plan.same_as, *CLIPS_ALONE}
    late = {"init_from": str(OUT / "H-s0"), "train.total_samples": base_135m.train.total_samples // 4}
    for run in plan.runs:
        arm, found = run.labels["arm"], changed(base_135m, configs[run.name])
        assert configs[run.name].train.seed == 0
        if arm not in matrix.starts:
            assert matches(found, CHANGES[arm] | (late if arm == "G_late" else {})), (run.name, found)
            assert run.labels["changed"].count("→") == len(found)


def test_on_drawn_clips(matrix, study, tmp_path):
    plan = plan_ablations(matrix, study, OUT)
    configs = write_plan(plan.runs, study, tmp_path)
    assert set(plan.left_out) == {"T"}
    assert not plan.same_as
    relative = {"LR2": 7e-3, "LR3": 2.1e-4, "LR4": 7e-5}
    for run in plan.runs:
        arm, found = run.labels["arm"], changed(study, configs[run.name])
        expected = dict(CHANGES.get(arm, {}))
        expected |= {key: relative[arm] for key in expected if arm in relative}
        start = f"{STARTS[arm]}-s0" if arm in STARTS else None
        expected |= {"init_from": str(OUT / start)} if start else {}
        expected.pop("data.mixture.text_share", None)  # null already
        if arm not in matrix.starts:
            assert matches(found, expected), (run.name, found)
        assert run.after == start
    names = [run.name for run in plan.runs]
    assert all(names.index(f"{start}-s0") < names.index(f"{arm}-s0") for arm, start in STARTS.items())


def test_further_seeds_start_from_runs_of_their_own(matrix, study):
    plan = plan_ablations(matrix, study, OUT, only=["N_stage"], seeds=[0, 1])
    runs = {run.name: run for run in plan.runs}
    for seed in (0, 1):
        assert runs[f"N_second-s{seed}"].after == f"H_0-s{seed}"
        assert f'init_from="{OUT}/H_0-s{seed}"' in runs[f"N_second-s{seed}"].overrides
        assert f"train.seed={seed}" in runs[f"H_0-s{seed}"].overrides
    assert "H_0-s1" not in plan.chosen  # the study carries it out all the same, being needed


def test_all_arms_see_the_same_samples_but_those_that_are_marked(matrix, study, tmp_path):
    sources = {
        "synthetic/cue": (0.6, "video", (4, 6), 3.0, 0.1),
        "synthetic/still": (0.2, "image", (1, 1), 3.0, 0.1),
        "synthetic/images": (0.1, "images", (2, 4), 3.0, 0.1),
        "synthetic/text": (0.1, "text", (0, 0), 3.0, 0.1),
    }
    table = draw_table(1500, sources)
    plan = plan_ablations(matrix, study, OUT)
    configs = write_plan(plan.runs, study, tmp_path)
    assert plan.other_samples == {"D1", "G_late", "N_first", "N_second", "N_both", "G_first"}  # fewer
    first = SampleOrder(table, mixture(study), 0).take(0, 1200)[0]
    windows = {}
    for run in plan.runs:
        config = configs[run.name]
        if run.labels["arm"] in matrix.starts or config.train.total_samples != study.train.total_samples:
            continue
        rows = SampleOrder(table, mixture(config), config.train.seed).take(0, 1200)[0]
        assert np.array_equal(rows, first) == (run.labels["arm"] not in plan.other_samples), run.name
        if run.labels["arm"] in ("F3", "B1", "A8_16", "Q_fine"):  # packed into other packs, window by window
            shown, objective = mixture(config), config.train.objective
            capacities = Capacities.propose(table, shown, tokens=config.data.tokens, objective=objective)
            packed = Plan(table, shown, capacities, objective, 0, 1500, 500).window(1)
            windows[run.name] = sorted(np.concatenate([pack.rows for pack in packed]).tolist())
    assert len(windows) == 4
    assert all(rows == windows["F3-s0"] for rows in windows.values())


def test_what_is_printed(matrix, study):
    text = "\n".join(describe(plan_ablations(matrix, study, OUT), matrix, study))
    assert '  F2         init_from: null → "runs/ablations/P-s0"\n             train.freeze: [] → ["llm"]' in text
    assert "\n ~D1 " in text
    assert "T: Is a task mix" in text
    assert "left out: it names sources of real data" in text
    assert "judged by accuracy_autoregressive (higher by more than 0.02), else mc_autoregressive" in text
    for question in matrix.questions.values():
        assert question.asks in text


def test_a_part_of_it_and_further_seeds(matrix, study, tmp_path):
    plan = plan_ablations(matrix, study, OUT, only=["A6", "G", "F1"])
    assert plan.chosen == {"A6-s0", "G-s0", "F1-s0"}  # an arm's name counts before a question's
    plan = plan_ablations(matrix, study, OUT, only=["LR"])
    assert plan.chosen == {"LR2-s0", "LR3-s0", "LR4-s0"}
    plan = plan_ablations(matrix, study, OUT, only=["A6", "F3"], seeds=[1, 2])
    assert plan.chosen == {"A6-s1", "A6-s2", "F3-s1", "F3-s2"}
    assert [run.name for run in plan.runs if run.labels["arm"] in ("A6", "R")] == ["A6-s1", "A6-s2", "R-s0"]
    earlier = [PlannedRun(name="A6-s5", labels={"arm": "A6"})]
    plan = plan_ablations(matrix, study, OUT, earlier=earlier)
    assert [run.name for run in plan.runs if run.labels["arm"] == "A6"] == ["A6-s0", "A6-s5"]
    assert "A6-s5" not in plan.chosen
    with pytest.raises(ConfigError, match=r"only = 'A9': expected an arm \(F3, F1, .*\) or a question \(F1, F2, A7"):
        plan_ablations(matrix, study, OUT, only=["A9"])


def test_an_arm_that_is_another_one_on_a_base_takes_that_one_along(matrix, base_135m):
    plan = plan_ablations(matrix, base_135m, OUT, only=["F1", "F3_P"], seeds=[3])
    assert plan.chosen == {"F1-s3", "F3-s3"}
    assert plan_ablations(matrix, base_135m, OUT, only=["F3_P"]).chosen == {"F3-s0"}


def test_words_that_follow_a_list_are_overrides_where_they_are_key_value(monkeypatch, capsys):
    words = ["--base", "study", "--only", "F3", "A6", "name=other", "--seeds", "1", "2", "train.total_samples=2e4"]
    ablate = importlib.import_module("launch.ablate")
    monkeypatch.setattr(sys, "argv", ["ablate.py", *words])
    asked = ablate.parse()
    assert (asked.only, asked.seeds) == (["F3", "A6"], [1, 2])
    assert sorted(asked.overrides) == ["name=other", "train.total_samples=2e4"]
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--base", "study", "--seeds", "one"])
    with pytest.raises(SystemExit):
        ablate.parse()
    assert "--seeds one: expected whole numbers" in capsys.readouterr().err


SMALL = {
    "reference": "base",
    "judge": [{"metric": "accuracy", "better": "higher"}],
    "questions": {
        "X": {"asks": "?", "if_yes": "a", "if_no": "b", "if_open": "c", "arms": {"one": ["train.mode=coarse_only"]}},
    },
}


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("seeds", [], "seeds = (): expected at least one number"),
        ("judge", [], "judge = (): expected at least one rule"),
        ("judge", [{"metric": "loss", "better": "lower"}], "judge.metric = 'loss': expected val_loss, accuracy"),
        (
            "judge",
            [{"metric": "val_loss", "better": "less"}],
            "judge[0].better = 'less': expected one of lower, higher",
        ),
        (
            "questions.X.needs",
            "data",
            "questions.X.needs = 'data': expected one of real data, drawn clips, random weights",
        ),
        ("questions.X.ask", "?", "unknown key questions.X.ask (did you mean asks?)"),
        ("questions.X.arms.base", [], "questions.X.arms.base = 'base': expected a name that nothing else has"),
        ("questions.X.arms.a-b", [], "questions.X.arms.a-b = 'a-b': expected a name of letters, digits and _"),
        ("questions.X.arms.two", {"after": "P"}, "questions.X.arms.two.after = 'P': expected one of []"),
        ("questions.X.arms.two", {"sets": []}, "unknown key questions.X.arms.two.sets"),
        ("questions.X.compare", [{"of": "one", "against": "zwei"}], "questions.X.compare[0] = 'zwei': expected one of"),
    ],
)
def test_a_bad_matrix_says_what_is_wrong(where, value, message, tmp_path):
    written = yaml.safe_load(yaml.safe_dump(SMALL))
    *parents, last = where.split(".")
    place = written
    for parent in parents:
        place = place[parent]
    place[last] = value
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_matrix(str(tmp_path / "m.yaml"))


def test_an_arm_that_cannot_be_says_which(study, tmp_path):
    def planned(arm):
        written = yaml.safe_load(yaml.safe_dump(SMALL))
        written["questions"]["X"]["arms"]["one"] = arm
        (tmp_path / "m.yaml").write_text(yaml.safe_dump(written))
        return plan_ablations(load_matrix(str(tmp_path / "m.yaml")), study, OUT)

    with pytest.raises(ConfigError, match=r"run one: model.grid = 5: expected one of 1, 4, 16"):
        planned(["model.grid=5"])
    with pytest.raises(ConfigError, match=r"override 'model.grid': expected key=value"):
        planned(["model.grid"])
    with pytest.raises(ConfigError, match=r"arm one: scale.train.rate = 2.0: expected a key whose base value is a num"):
        planned({"scale": {"train.rate": 2}})
    assert planned({"scale": {"train.clip": 3}}).changes["one"] == ["train.clip: 1.0 → 3.0"]
