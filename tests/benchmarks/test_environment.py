"""What result files say about how they came to be."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from benchmarks import environment
from benchmarks.environment import markdown_table, record, write_json
from benchmarks.gpu_tests import main as run_tests


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit, taken for this one."""
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "first"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    return tmp_path


def test_commit_says_whether_the_code_was_changed(checkout):
    head = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert environment.commit() == head.stdout.strip()
    (checkout / "benchmarks" / "results").mkdir(parents=True)
    (checkout / "benchmarks" / "results" / "some.json").write_text("{}")
    assert environment.commit() == head.stdout.strip()
    (checkout / "kernel.py").write_text("new")
    assert environment.commit() == head.stdout.strip() + "+changes"


def test_outside_of_git_the_commit_is_what_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("FVLM_COMMIT", raising=False)
    assert environment.commit() == "unknown"
    monkeypatch.setenv("FVLM_COMMIT", "abc")
    assert environment.commit() == "abc"


def test_a_record_is_complete_and_flat(tmp_path):
    contents = record("benchmarks.some", ["--runs", "3"], {"a/ms": 1.5}, tiles={"k": 1})
    write_json(tmp_path / "deep" / "file.json", contents)
    assert json.loads((tmp_path / "deep" / "file.json").read_text()) == contents
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["file.json"]
    assert contents["command"] == "python -m benchmarks.some --runs 3"
    assert contents["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert contents["hardware"]["cpu_cores"] > 0
    assert {"figures", "tiles", "command", "commit", "date", "versions", "hardware"} == set(contents)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "file.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}


def test_tables():
    assert markdown_table([{"a": 1, "b": None}, {"a": "x", "b": 2.5}]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| 1 | – |",
        "| x | 2.5 |",
    ]


@pytest.mark.parametrize(("body", "code", "counts"), [("assert True", 0, (1, 0, 1)), ("assert False", 1, (0, 1, 1))])
def test_outcomes_of_tests_are_recorded(body, code, counts, tmp_path, monkeypatch):
    file = tmp_path / f"test_that_exits_{code}.py"
    file.write_text(f"import pytest\ndef test_it():\n    {body}\n@pytest.mark.skip\ndef test_skipped():\n    pass\n")
    monkeypatch.setattr("benchmarks.gpu_tests.ROOT", tmp_path)
    out = tmp_path / "out.json"
    assert run_tests(["--json", str(out), str(file), "-q", "-p", "no:cacheprovider"]) == code
    contents = json.loads(out.read_text())
    assert tuple(contents["figures"][name] for name in ("passed", "failed", "skipped")) == counts
    assert len(contents["failed"]) == counts[1]
