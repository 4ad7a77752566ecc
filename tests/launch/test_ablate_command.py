"""`launch/ablate.py`: what it prints, writes and returns."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from functools import partial

import pytest
import yaml

from fvlm.research.study.runner import Launcher

MATRIX = {
    "reference": "base",
    "judge": [{"metric": "accuracy", "better": "higher"}],
    "questions": {
        "look": {
            "asks": "Does looking help?",
            "arms": {"coarse": ["train.mode=coarse_only"]},
            "compare": [{"of": "base", "against": "coarse"}],
            "if_yes": "Look.",
            "if_no": "Stop.",
            "if_open": "Repeat.",
        }
    },
}


@pytest.fixture(scope="module")
def command(repo_root):
    spec = importlib.util.spec_from_file_location("launch_ablate", repo_root / "launch" / "ablate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ablate(command, monkeypatch, tmp_path, repo_root):
    """ablate(*arguments) -> exit code, in an empty folder with the matrix above, without real training."""
    fake = str(repo_root / "tests" / "research" / "fake_launch.py")
    commands = {name: (sys.executable, fake, name) for name in ("train", "evaluate")}
    monkeypatch.setattr(command, "Launcher", partial(Launcher, **commands))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(MATRIX))

    def run(*arguments: str) -> int:
        shared = ["ablate.py", "--base", "study", "--matrix", "m.yaml", "train.total_samples=2"]
        monkeypatch.setattr(sys, "argv", [*shared, *arguments])
        return command.main()

    return run


def test_from_the_plan_to_the_verdict(ablate, tmp_path, capsys):
    assert ablate("--dry-run") == 0
    assert 'train.mode: "coarse_fine" → "coarse_only"' in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert ablate() == 0
    assert "look       yes, on one seed       Does looking help?" in capsys.readouterr().out
    out = tmp_path / "runs" / "m-study"
    assert "| look | Does looking help? | yes, on one seed | base 90.0 %" in (out / "ablations.md").read_text()
    log = (out / "experiments.md").read_text()
    results = (out / "results.csv").read_bytes()
    (out / "results.csv").unlink()
    assert ablate("--collect") == 0
    assert (out / "results.csv").read_bytes() == results
    assert (out / "experiments.md").read_text() == log
    assert ablate("--seeds", "13", "--only", "coarse") == 1
    assert "| coarse-s13 | failed | train: train: the loss is not finite |" in (out / "ablations.md").read_text()
    (tmp_path / "mended").touch()
    assert ablate("--only", "coarse", "--seeds", "13") == 0
    assert "(n = 2)" in (out / "ablations.md").read_text()
    assert "| coarse-s13 |" not in (out / "ablations.md").read_text()


def test_wrong_usage(ablate, capsys):
    assert ablate("--only", "fine") == 2
    assert "ablate: only = 'fine': expected an arm (base, coarse) or a question (look)" in capsys.readouterr().err
    assert ablate("train.sed=1") == 2
    assert "unknown key train.sed (did you mean seed?)" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        ablate("--parallel", "0")
    assert stopped.value.code == 2


def test_the_launcher_is_what_runs_are_carried_out_by(repo_root):
    train = replace(Launcher(), parallel=3).train
    assert train == (sys.executable, str(repo_root / "launch" / "train.py"))
