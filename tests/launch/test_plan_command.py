"""`launch/plan.py --propose`: what it prints can be pasted, and is what a run finds."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import yaml

from benchmarks.plan_index import draw
from fvlm.data.capacities import Capacities
from fvlm.data.mixture import Mixture
from fvlm.data.plan import Plan
from fvlm.data.table_store import open_table


@pytest.fixture(scope="module")
def command(repo_root):
    spec = importlib.util.spec_from_file_location("launch_plan", repo_root / "launch" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("plan"), 40_000, seed=0, processes=1)


def run(command, monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, arguments)])
    return command.main()


def test_it_proposes_what_a_run_fills(command, index, monkeypatch, capsys):
    code = run(command, monkeypatch, "--propose", index, "question_first=0.5", "text_share=0.14")
    out = capsys.readouterr().out
    assert code == 0
    data = yaml.safe_load(out)["data"]
    assert data["tokens"] == 16384
    mixture = Mixture(question_first=0.5, text_share=0.14)
    table = open_table(sorted(index.glob("*.idx")), None, None).table
    capacities = Capacities.propose(table, mixture, **data, objective="ce_answer", seed=42)
    for symbol, name in (("V", "visual"), ("C", "coarse"), ("S", "samples"), ("K", "labels")):
        [line] = [line for line in out.splitlines() if f"# {symbol}: " in line]
        assert f"{name}: {getattr(capacities, name)} " in line
        assert float(line.split(": ")[-1].split("%")[0]) > 80
    plan = Plan(table, mixture, capacities, "ce_answer", 42, len(table), data["window"])
    packs = [pack for window in range(plan.num_windows) for pack in plan.window(window)]
    assert sum(pack.frames for pack in packs) >= 0.97 * data["frames"] * len(packs)
    assert sum(pack.tokens for pack in packs) >= 0.99 * data["tokens"] * len(packs)
    assert "refused: none" in out


def test_a_mixture_by_name(command, index, monkeypatch, capsys):
    assert run(command, monkeypatch, "--propose", index, "--mixture", "stage2", "--frames", 300) == 1  # too few frames
    out = capsys.readouterr().out
    assert yaml.safe_load(out)["data"]["frames"] == 300
    assert "not as full as packs should be" in out


def test_refusals_are_told(command, index, monkeypatch, capsys):
    assert run(command, monkeypatch, "--propose", index, "--frames", 20, "--longest", 500) == 1
    assert "over_frames" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--propose", "nowhere"], 2, "no .idx file"),
        (["--propose", "INDEX", "lookz=3"], 2, "did you mean looks"),
        (["--propose", "INDEX", "--mixture", "stage7"], 2, "stage7"),
        (["--propose", "INDEX", "--tokens", "8"], 1, "no sample fits"),
        (["--propose", "INDEX", "weights.laion=1"], 1, "laion"),
    ],
)
def test_what_is_wrong_is_named(command, index, monkeypatch, capsys, arguments, code, message):
    arguments = [index if argument == "INDEX" else argument for argument in arguments]
    assert run(command, monkeypatch, *arguments) == code
    assert message in capsys.readouterr().err
