"""Grids as files, as plans, and as studies that are stopped and go on; the runs themselves are made up."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

from fvlm.config import REPOSITORY, load_config
from fvlm.model.flops import Sample, flops_per_sample
from fvlm.research.scaling.grid import load_grid, plan_grid
from fvlm.research.study.runner import Launcher
from fvlm.research.study.workload import StatedSample, workload
from fvlm.research.tables import read_csv
from fvlm.schema import ConfigError
from fvlm.train.build import geometry, load_data
from fvlm.train.work import step_flops
from tests.train.shards import write_shards

STATED = "sample={frames: 7, text_tokens: 213, labels: 210}"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A run configuration on small shards."""
    folder = tmp_path_factory.mktemp("grid")
    write_shards(folder / "train", 120)
    values = yaml.safe_load((REPOSITORY / "launch" / "configs" / "tiny_test.yaml").read_text())
    values["data"] |= {"train": [str(folder / "train")]}
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.fixture
def grid_file(base, tmp_path) -> Path:
    work = workload(load_config(base))
    values = {
        "base": base,
        "sizes": {"s": ["model.preset=tiny_s"], "m": ["model.preset=tiny"]},
        "architectures": {"foveated": [], "pooled": ["model.architecture=multi_token", "model.grid=16"]},
        "budgets": {"C1": 200 * work.flops_per_sample, "C2": 400 * work.flops_per_sample},
        "equal_samples": [{"architecture": "pooled", "like": "foveated", "sizes": ["m"]}],
        "evaluations": 3,
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_mean_sample_is_what_the_steps_of_a_run_do(base):
    config = load_config(base, ["train.total_samples=360", "data.mixture.question_first=0"])
    work, data = workload(config), load_data(config)
    model = geometry(config.model, len(data.tokenizer))
    steps = list(data.plan.steps(config.train.packs_per_step))
    total = sum(
        step_flops(model, data.plan, step, "coarse_fine", iterations) for step in steps for iterations in (1, 2)
    )
    assert work.flops_per_sample == pytest.approx(total / 2 / 360, rel=1e-9)
    assert work.samples_per_step == pytest.approx(360 / len(steps), rel=0.05)  # the last step may be half empty


def test_a_grid_spends_equal_operations_and_its_extras_equal_samples(grid_file):
    runs = {each.run.name: each for each in plan_grid(load_grid(str(grid_file))[0])}
    assert len(runs) == 2 * 2 * 2 + 2
    grid, _ = load_grid(str(grid_file))
    for each in runs.values():
        labels = each.run.labels
        config = load_config(grid.base, each.run.overrides)
        assert config.train.total_samples == each.samples
        assert 3 <= -(-each.steps // config.train.eval_every) <= 4
        if labels["comparison"] == "isoflop":
            assert each.flops == pytest.approx(labels["budget"], rel=0.01)
    pooled, extra = runs["m-pooled-C2-s42"], runs["m-pooled-C2-samples-s42"]
    assert pooled.samples < runs["m-foveated-C2-s42"].samples == extra.samples
    assert extra.flops > pooled.flops == pytest.approx(runs["m-foveated-C2-s42"].flops, rel=0.01)
    assert extra.run.labels["comparison"] == "isosample"


def test_seeds_and_budgets_from_the_command_line(grid_file):
    grid, rest = load_grid(str(grid_file), ["seeds=[1,2]", "budgets.C1=1e12", "train.clip=0.5"])
    assert rest == ["train.clip=0.5"]
    assert (grid.seeds, grid.budgets["C1"]) == ((1, 2), 1e12)
    names = [each.run.name for each in plan_grid(grid, rest)]
    assert "s-foveated-C1-s1" in names
    assert len(names) == 20


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budgets.C1=-1", "budgets.C1"),
        ("budgets.C1=1e6", "3 steps or more"),
        ("equal_samples=[{architecture: pooled, like: nothing, sizes: [m]}]", "equal_samples[0].like"),
        ("equal_samples=[{architecture: pooled, like: foveated, sizes: [x]}]", "equal_samples[0].sizes"),
        ("seeds=[]", "seeds"),
        ("sizes.s=[model.preset=huge]", "model.preset"),
        ("evaluations=0", "evaluations"),
    ],
)
def test_what_is_wrong_with_a_grid_is_named(grid_file, override, message):
    with pytest.raises(ConfigError) as caught:
        plan_grid(*load_grid(str(grid_file), [override]))
    assert message in str(caught.value)


def test_the_published_grid_has_24_runs_and_4_of_equal_samples():
    runs = plan_grid(load_grid("grid", [STATED])[0])
    assert [each.run.labels["comparison"] for each in runs] == ["isoflop"] * 24 + ["isosample"] * 4
    assert sorted({each.run.labels["budget"] for each in runs}) == [1.6e16, 5.6e16, 1.6e17, 3.1e17]
    assert sum(each.flops for each in runs[:24]) == pytest.approx(6 * (1.6e16 + 5.6e16 + 1.6e17 + 3.1e17), rel=1e-3)
    for each in runs:
        load_config("stage1_135m", each.run.overrides)
    big = load_config("stage1_135m", next(r.run.overrides for r in runs if r.run.name.startswith("1b7-foveated")))
    own = load_config("stage1_1b7")
    assert big.train.learning_rate == own.train.learning_rate
    assert (big.data.tokens, big.train.packs_per_step) == (own.data.tokens, own.train.packs_per_step)


def test_the_small_grid_is_three_by_four_by_two():
    grid, _ = load_grid("grid_study", [STATED])
    runs = plan_grid(grid)
    assert len(runs) == 24
    assert len({each.parameters for each in runs}) == 6
    assert grid.base == "study"


def test_a_stated_sample_costs_what_the_formula_says():
    config = load_config("stage1_360m")
    stated = StatedSample(frames=2, text_tokens=50, labels=40, looks=8)
    model = geometry(config.model, 0)
    sample = Sample(frames=2, visual=16, tokens=66, coarse=16, labels=40)
    work = workload(config, stated)
    assert work.flops_per_sample == flops_per_sample(model, sample).training
    assert work.parameters.total > 380e6


def test_without_data_the_message_says_how_to_plan_all_the_same():
    with pytest.raises(ConfigError, match="state their mean sample"):
        plan_grid(load_grid("grid")[0], ["data.train=[nowhere]", "data.tokenizer=tiny"])


# -- the command ----------------------------------------------------------------------------------------------------

TRAIN = """
import json, os, signal, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
given = dict(a.split("=", 1) for a in sys.argv if "=" in a)
with open(out.parent.parent / "begun.txt", "a") as file:
    print(out.name, file=file)
if (out.parent.parent / f"stop-at-{out.name}").exists():
    (out.parent.parent / f"stop-at-{out.name}").unlink()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()  # until the study has noticed, and tells us
if (out.parent.parent / f"fail-at-{out.name}").exists():
    sys.exit("train: out of memory")
samples, size = int(given["train.total_samples"]), {"tiny_s": 1e6, "tiny": 2e6}[given["model.preset"]]
summary = {"samples_seen": samples, "steps": samples // 10, "wall_time_sec": 1.0, "commit": "c", "config_hash": "?",
           "parameters": {"llm": size / 2}, "environment": {"device": "none"}, "size": size}
(out / "run_summary.json").write_text(json.dumps(summary))
step = {"kind": "step", "step": samples // 10, "flops_seen": samples * size}
(out / "metrics.jsonl").write_text(json.dumps(step) + "\\n")
"""
EVALUATE = """
import json, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--checkpoint") + 1])
summary = json.loads((out / "run_summary.json").read_text())
loss = 1 + 100 * summary["size"] ** -0.3 + 10 * summary["samples_seen"] ** -0.3
(out / "evaluation").mkdir(exist_ok=True)
modes = {"coarse_fine": {"loss": {"loss": loss, "loss_by_source": {}}}}
(out / "evaluation" / "evaluation.json").write_text(json.dumps({"parameters": summary["size"], "modes": modes}))
"""


@pytest.fixture
def command(repo_root, tmp_path, monkeypatch):
    """main(arguments) of launch/scaling_grid.py, whose runs are the scripts above."""
    spec = importlib.util.spec_from_file_location("launch_scaling_grid", repo_root / "launch" / "scaling_grid.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    commands = {}
    for name, text in (("train", TRAIN), ("evaluate", EVALUATE)):
        (tmp_path / f"{name}.py").write_text(text)
        commands[name] = (sys.executable, str(tmp_path / f"{name}.py"))
    monkeypatch.setattr(module, "Launcher", functools.partial(Launcher, **commands))
    return module.main


ONE_SIZE = "sizes={m: [model.preset=tiny]}"  # four runs and two of equal samples


def test_a_grid_that_is_stopped_goes_on_and_gives_the_same_tables(command, grid_file, tmp_path):
    whole, stopped = tmp_path / "a" / "whole", tmp_path / "b" / "stopped"
    for out in (whole, stopped):
        out.parent.mkdir()
    assert command(["--grid", str(grid_file), "--out", str(whole), ONE_SIZE]) == 0
    (stopped.parent / "stop-at-m-foveated-C2-s42").touch()
    assert command(["--grid", str(grid_file), "--out", str(stopped), ONE_SIZE]) == 75
    assert "not_run" in (stopped / "results.csv").read_text()
    assert command(["--grid", str(grid_file), "--out", str(stopped), ONE_SIZE]) == 0
    for name in ("results.csv", "curves.csv", "families.csv", "fits.json", "fits.md"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name
    begun = (stopped.parent / "begun.txt").read_text().split()
    assert sorted(begun) == sorted([*set(begun), "m-foveated-C2-s42"])  # that one alone twice
    assert len(set(begun)) == 6


def test_a_failed_run_is_a_row_with_its_reason(command, grid_file, tmp_path, capsys):
    (tmp_path / "c").mkdir()
    out = tmp_path / "c" / "out"
    (out.parent / "fail-at-m-pooled-C1-s42").touch()
    assert command(["--grid", str(grid_file), "--out", str(out), ONE_SIZE]) == 1
    table = read_csv(out / "results.csv")
    assert len(table) == 6
    row = table.where(run="m-pooled-C1-s42")
    assert (row.text("status"), row.text("reason")) == (["failed"], ["train: train: out of memory"])
    assert table.text("status").count("done") == 5
    assert "failed: train: train: out of memory: `m-pooled-C1-s42`" in (out / "fits.md").read_text()
    assert float(row.text("budget")[0]) == load_grid(str(grid_file))[0].budgets["C1"]


def test_runs_by_name_and_changes_behind_them(command, grid_file, tmp_path):
    (tmp_path / "d").mkdir()
    out = tmp_path / "d" / "out"
    assert (
        command(["--grid", str(grid_file), "--out", str(out), "--only", "m-pooled-C1-s42", "m-pooled-C2-s42", ONE_SIZE])
        == 0
    )
    statuses = read_csv(out / "results.csv").text("status")
    assert statuses == ["not_run", "not_run", "done", "done", "not_run", "not_run"]
    assert command(["--grid", str(grid_file), "--out", str(out), "--only", "nothing", ONE_SIZE]) == 2


def test_a_dry_run_prints_the_plan_and_trains_nothing(command, grid_file, tmp_path, capsys):
    assert command(["--grid", str(grid_file), "--out", str(tmp_path / "none"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "m-pooled-C2-samples-s42" in printed
    assert "10 runs" in printed
    assert not (tmp_path / "none").exists()


def test_wrong_usage_ends_with_2_and_one_message(command, capsys):
    assert command(["--grid", "nothing_of_the_kind"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("scaling_grid: 'nothing_of_the_kind'")
    assert "grid_study" in error


def test_fits_of_anyones_csv(command, tmp_path):
    path = tmp_path / "theirs.csv"
    lines = ["run,architecture,parameters,samples,train_flops,val_loss"]
    for i, size in enumerate((1e6, 3e6, 1e7)):
        lines += [f"r{i}{j},foveated,{size},{c / size},{c},{2 + (i - 1) ** 2 / 10}" for j, c in enumerate((1e13, 1e14))]
    path.write_text("\n".join(lines) + "\n")
    assert command(["--fits", str(path), "--out", str(tmp_path / "fits")]) == 0
    assert "3e+06" in (tmp_path / "fits" / "fits.md").read_text()
    assert command(["--fits", str(tmp_path / "missing.csv")]) == 1
