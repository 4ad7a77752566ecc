"""Studies: runs as processes, restartable, a row for each whatever became of it."""

from __future__ import annotations

import csv
import fcntl
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fvlm.config import load_config
from fvlm.research.study.processes import evaluate_arguments, last_message
from fvlm.research.study.records import read_study
from fvlm.research.study.runner import Launcher, PlannedRun, collect_again, read_plan, run_study
from fvlm.research.study.tables import write_csv
from fvlm.schema import ConfigError

FAKE = str(Path(__file__).with_name("fake_launch.py"))
LAUNCHER = Launcher(train=(sys.executable, FAKE, "train"), evaluate=(sys.executable, FAKE, "evaluate"))
TABLES = ("results.csv", "families.csv", "curves.csv")
STEPS = 4


@pytest.fixture
def base():
    return load_config("tiny_test", [f"train.total_samples={STEPS}", "evaluation.tasks=[loss, slots]"])


def run(name: str, *overrides: str, **more) -> PlannedRun:
    return PlannedRun(name=name, overrides=overrides, labels={"arm": name, "changed": "; ".join(overrides)}, **more)


RUNS = [run("base"), run("coarse", "train.mode=coarse_only"), run("pooled", "model.architecture=multi_token")]


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def starts(out: Path, name: str) -> list[str]:
    lines = (out / name / "starts").read_text().splitlines()
    return [json.loads(line)["what"] for line in lines]


def test_a_row_for_each_run_and_the_failed_one_tried_again(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [RUNS[0], run("broken", "train.seed=13"), *RUNS[1:]]
    study = run_study(runs, base, "out", launcher=LAUNCHER)
    assert study.exit_code == 1
    assert study.statuses == {"base": "done", "broken": "failed", "coarse": "done", "pooled": "done"}
    found = {row["run"]: row for row in rows(Path("out/results.csv"))}
    assert list(found) == ["base", "broken", "coarse", "pooled"]
    assert found["broken"]["reason"] == "train: train: the loss is not finite"
    assert found["broken"]["val_loss"] == ""
    assert found["broken"]["seed"] == "13"
    first = found["base"]
    assert (first["status"], first["arm"], first["seed"], first["task"]) == ("done", "base", "42", "slots")
    assert float(first["accuracy_coarse_fine"]) == pytest.approx(0.858)
    assert float(first["accuracy_coarse_only"]) == pytest.approx(0.258)
    assert float(first["val_loss"]) == float(first["loss_coarse_fine"]) == pytest.approx(1.142)
    assert float(first["loss_low"]) == pytest.approx(1.092)
    assert (float(first["train_flops"]), float(first["flops_per_sample"])) == (STEPS * 1e9, 1e9)
    assert (first["architecture"], first["tokens_per_frame"], first["grid"]) == ("foveated", "1", "")
    assert found["coarse"]["trained_mode"] == "coarse_only"
    assert found["coarse"]["loss_coarse_fine"] == ""
    assert float(found["coarse"]["val_loss"]) == float(found["coarse"]["loss_coarse_only"])
    assert (found["pooled"]["architecture"], found["pooled"]["grid"]) == ("multi_token", "4")
    curves = [row for row in rows(Path("out/curves.csv")) if row["run"] == "coarse"]
    assert [row["step"] for row in curves] == ["1", "2", "3", "4"]
    assert float(curves[-1]["accuracy"]) == pytest.approx(0.258)  # in the mode that it trained
    families = [row for row in rows(Path("out/families.csv")) if row["run"] == "base"]
    assert {(row["mode"], row["task"]) for row in families} == {
        (mode, task) for mode in ("coarse_only", "coarse_fine", "autoregressive") for task in ("loss", "slots")
    }
    assert rows(Path("out/timing.csv"))[0]["device"] == "pencil"
    assert not Path("out/base/checkpoints").exists()

    Path("mended").touch()
    again = run_study(runs, base, "out", launcher=LAUNCHER)
    assert again.exit_code == 0
    assert starts(Path("out"), "base") == ["train", "evaluate"]  # left alone
    assert starts(Path("out"), "broken") == ["train", "train", "evaluate"]
    assert [each.name for each in read_study("out").done] == [each.name for each in runs]


def test_killed_and_restarted_gives_the_same_tables(base, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_study(RUNS, base, whole, launcher=LAUNCHER)
    monkeypatch.setenv("FAKE_PAUSE", "0.15")
    study = {"target": run_study, "args": (RUNS, base, killed), "kwargs": {"launcher": LAUNCHER}}
    process = multiprocessing.get_context("fork").Process(**study)
    process.start()
    wait_for(lambda: (killed / "coarse" / "metrics.jsonl").is_file(), process)
    for each in [process, *psutil.Process(process.pid).children(recursive=True)]:
        each.kill()
    process.join()
    monkeypatch.setenv("FAKE_PAUSE", "0")
    torn = killed / "coarse" / "metrics.jsonl"
    torn.write_text(torn.read_text() + '{"kind": "ev')
    collect_again(read_plan(killed), base, killed)
    assert [row["status"] for row in rows(killed / "results.csv")] == ["done", "stopped", "not_run"]
    assert run_study(RUNS, base, killed, launcher=LAUNCHER).exit_code == 0
    assert starts(killed, "base") == ["train", "evaluate"]
    assert starts(killed, "coarse") == ["train", "train", "evaluate"]
    for name in TABLES:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_told_to_stop_it_ends_its_children_and_goes_on_later(base, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_PAUSE", "0.15")
    out, before = tmp_path / "out", signal.getsignal(signal.SIGTERM)

    def tell():
        wait_for(lambda: (out / "base" / "checkpoints" / "weights").is_file())
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    study = run_study(RUNS, base, out, launcher=LAUNCHER)
    teller.join()
    assert study.exit_code == 75
    assert study.statuses == {"base": "stopped", "coarse": "not_run", "pooled": "not_run"}
    assert signal.getsignal(signal.SIGTERM) == before
    assert [row["status"] for row in rows(out / "results.csv")] == ["stopped", "not_run", "not_run"]
    monkeypatch.setenv("FAKE_PAUSE", "0")
    assert run_study(RUNS, base, out, launcher=LAUNCHER, only=["base"]).statuses == {"base": "done"}
    lines = [json.loads(line)["step"] for line in (out / "base" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [step for step in range(1, STEPS + 1) for _ in range(2)]


def test_runs_that_start_from_another_wait_for_it_and_fail_with_it(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = 'init_from="out/first"'
    runs = [run("first", "train.seed=13"), run("second", weights, after="first"), run("other")]
    study = run_study(runs, base, "out", launcher=LAUNCHER, only=["second"])
    assert study.statuses == {"first": "failed", "second": "failed"}
    found = {row["run"]: row for row in rows(Path("out/results.csv"))}
    assert found["second"]["reason"] == "it starts from first, which is failed"
    assert found["other"]["status"] == "not_run"
    Path("mended").touch()
    study = run_study(runs, base, "out", launcher=replace(LAUNCHER, parallel=2))
    assert study.exit_code == 0
    assert Path("out/first/checkpoints/weights").is_file()
    assert not Path("out/second/checkpoints").exists()


def test_other_questions_to_a_finished_run_train_it_again_where_its_weights_are_gone(base, tmp_path):
    run_study(RUNS[:1], base, tmp_path, launcher=LAUNCHER)
    asked = [run("base", evaluate=("--fine-iterations", "2"))]
    run_study(asked, base, tmp_path, launcher=LAUNCHER, keep_checkpoints=True)
    assert starts(tmp_path, "base") == ["train", "evaluate"] * 2
    run_study([run("base")], base, tmp_path, launcher=LAUNCHER)
    assert starts(tmp_path, "base") == [*["train", "evaluate"] * 2, "evaluate"]


def test_a_run_is_done_again_where_the_one_that_it_starts_from_changed(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [run("first"), run("second", 'init_from="out/first"', after="first")]
    run_study(runs, base, "out", launcher=LAUNCHER)
    run_study(runs, base, "out", launcher=LAUNCHER)
    assert starts(Path("out"), "second") == ["train", "evaluate"]
    run_study([run("first", "train.seed=5"), runs[1]], base, "out", launcher=LAUNCHER)
    assert starts(Path("out"), "second") == ["train", "evaluate"] * 2


def test_runs_that_are_rows_elsewhere_are_not_run_again_and_give_the_same_tables(base, tmp_path, monkeypatch):
    whole, parts, here = tmp_path / "whole", tmp_path / "parts", tmp_path / "here"
    run_study(RUNS, base, whole, launcher=LAUNCHER)
    for name in ("base", "coarse"):  # two machines, a run each
        run_study(RUNS, base, parts / name, launcher=LAUNCHER, only=[name])
        for table in (*TABLES, "timing.csv"):
            (here / "elsewhere" / name).mkdir(parents=True, exist_ok=True)
            (here / "elsewhere" / name / table).write_bytes((parts / name / table).read_bytes())
    study = run_study(RUNS, base, here, launcher=LAUNCHER)
    assert study.statuses == {"base": "done", "coarse": "done", "pooled": "done"}
    assert not (here / "base").exists()
    assert not (here / "coarse").exists()
    assert starts(here, "pooled") == ["train", "evaluate"]
    for name in TABLES:
        assert (here / name).read_bytes() == (whole / name).read_bytes(), name
    assert rows(here / "timing.csv")[0] == rows(parts / "base" / "timing.csv")[0]
    again = here / "elsewhere" / "again"
    again.mkdir()
    (again / "results.csv").write_bytes((whole / "results.csv").read_bytes())
    with pytest.raises(ConfigError, match=r"run base is also in .*elsewhere/again/results.csv"):
        run_study(RUNS, base, here, launcher=LAUNCHER)


def test_a_row_elsewhere_of_another_configuration_or_of_weights_that_are_wanted_is_run(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [run("first"), run("second", 'init_from="out/first"', after="first"), run("third")]
    run_study(runs, base, "out", launcher=LAUNCHER)
    tables = Path("here/elsewhere")
    tables.mkdir(parents=True)
    for table in TABLES:
        (tables / table).write_bytes(Path("out", table).read_bytes())
    Path("out").rename("gone")
    changed = [runs[0], run("second", 'init_from="here/first"', after="first"), run("third", "train.seed=5")]
    study = run_study(changed, base, "here", launcher=LAUNCHER, only=["first", "third"])
    assert study.statuses == {"first": "done", "third": "done"}
    assert not Path("here/first").exists()
    assert starts(Path("here"), "third") == ["train", "evaluate"]
    assert [row["status"] for row in rows(Path("here/results.csv"))] == ["done", "not_run", "done"]
    run_study(changed, base, "here", launcher=LAUNCHER, only=["second"])
    assert starts(Path("here"), "first") == starts(Path("here"), "second") == ["train", "evaluate"]


def test_tables_are_written_anew_for_their_own_base_alone_and_beside_no_study_at_work(base, tmp_path):
    run_study(RUNS[:1], base, tmp_path, launcher=LAUNCHER)
    table = tmp_path / "results.csv"
    before = table.read_bytes()
    table.unlink()
    collect_again(RUNS[:1], base, tmp_path)
    assert table.read_bytes() == before
    with pytest.raises(ConfigError, match=r"it holds one of base .*; repeat the key=value it was begun with"):
        collect_again(RUNS[:1], load_config("tiny_test"), tmp_path)
    with (tmp_path / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is at work there"):
            collect_again(RUNS[:1], base, tmp_path)


def test_each_of_several_runs_has_its_share_of_the_machine(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    launcher = Launcher(parallel=2)
    found = [launcher.environment(slot) for slot in range(2)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["4", "6"]
    cores = len(os.sched_getaffinity(0))
    assert {each["OMP_NUM_THREADS"] for each in found} == {str(max(1, cores // 2))}
    assert "RANK" not in found[0]


def test_what_is_asked_of_a_run(base):
    assert evaluate_arguments(RUNS[0], base) == ["--tasks", "loss", "slots", "maps"]
    coarse = load_config("tiny_test", ["train.mode=coarse_only"])
    assert evaluate_arguments(RUNS[1], coarse) == ["--tasks", "loss", "maps", "--modes", "coarse_only"]
    pooled = load_config("tiny_test", ["model.architecture=multi_token"])
    assert evaluate_arguments(RUNS[2], pooled) == ["--tasks", "loss"]
    own = run("own", evaluate=("--tasks", "pope", "--modes", "coarse_fine"))
    assert evaluate_arguments(own, base) == ["--tasks", "pope", "--modes", "coarse_fine"]


def test_what_cannot_be_planned(base, tmp_path):
    def refused(runs, expected, base=base):
        with pytest.raises(ConfigError, match=expected):
            run_study(runs, base, tmp_path, launcher=LAUNCHER)

    refused([], "runs = .*at least one")
    refused([run("a"), run("a")], "run = 'a': expected a name that no other run has")
    refused([run("a/b")], "run = 'a/b': expected a folder's name")
    refused([run("a", after="b"), run("b")], "run a: after = 'b': expected a run earlier in the plan")
    refused([run("a", "train.sed=1")], r"run a: unknown key train.sed \(did you mean seed\?\)")
    assert not (tmp_path / "results.csv").exists()
    run_study(RUNS[:1], base, tmp_path, launcher=LAUNCHER)
    refused(RUNS[:1], "a new folder, or one with a study of base", load_config("tiny_test"))
    with pytest.raises(ConfigError, match="only = 'fine': expected one of the planned runs: base"):
        run_study(RUNS[:1], base, tmp_path, launcher=LAUNCHER, only=["fine"])
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(RUNS[:1], "is at work there")


def test_a_run_that_cannot_resume_says_what_train_said(base, tmp_path):
    log = tmp_path / "log"
    log.write_text("old\n 10%|#\r 90%|##\nTraceback\ntrain: ruined\n\n")
    assert last_message(log, 4, 1) == "train: ruined"
    assert last_message(log, log.stat().st_size, -9) == "ended by SIGKILL; the last it printed: it printed nothing"


def test_cells(tmp_path):
    row = {"a": 0.1 + 0.2, "b": None, "c": float("nan"), "d": "x,y", "e": 7}
    write_csv(tmp_path / "t.csv", ["a", "b", "c", "d"], [row])
    assert (tmp_path / "t.csv").read_text() == 'a,b,c,d\n0.30000000000000004,,,"x,y"\n'


def wait_for(condition, process=None, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.is_alive(), "the process ended before"
        time.sleep(0.02)
