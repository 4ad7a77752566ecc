"""The budget search: it finds the edge of memory and the fastest pack below it, and a child's end is a finding."""

from __future__ import annotations

import json
import signal
import subprocess

import pytest

from benchmarks import budget
from benchmarks.budget_trial import OUT_OF_MEMORY, Trial
from fvlm.train_config import CheckpointingConfig


def card(most: int, best: int):
    """A card on which T up to `most` fits, and T = `best` is fastest; counts what is tried."""
    tried = []

    def attempt(tokens):
        tried.append(tokens)
        if tokens > most:
            return {"fits": False, "reason": "out of memory"}
        return {"fits": True, "samples_per_second": 100 - abs(tokens - best) / 1024}

    return attempt, tried


@pytest.mark.parametrize(
    ("first", "most"), [(16384, 16384), (16384, 40_000), (16384, 5000), (1024, 9000), (65536, 20_000), (500, 1100)]
)
def test_the_edge_is_found_to_an_eighth_with_few_trials(first, most):
    attempt, tried = card(most, best=most)
    found = budget.search(attempt, first, 1024, 65536)
    fitting = max(tokens for tokens, result in found.items() if result["fits"])
    failing = min(tokens for tokens, result in found.items() if not result["fits"])
    assert fitting <= most < failing
    assert failing - fitting <= max(1024, fitting // 8)
    assert len(tried) == len(set(tried)) <= 10
    assert all(tokens % 1024 == 0 for tokens in tried)


def test_where_everything_or_nothing_fits():
    attempt, tried = card(10**9, best=0)
    assert max(budget.search(attempt, 16384, 1024, 65536)) == 65536
    assert tried == [16384, 32768, 65536]
    attempt, tried = card(100, best=0)
    found = budget.search(attempt, 4096, 1024, 65536)
    assert tried == [4096, 2048, 1024]
    assert budget.fastest(found) is None


def test_of_about_equally_fast_packs_the_smallest():
    speeds = {1024: 80.0, 2048: 99.0, 4096: 100.0, 8192: 97.0}
    found = {tokens: {"fits": True, "samples_per_second": speed} for tokens, speed in speeds.items()}
    assert budget.fastest(found | {16384: {"fits": False}}) == 2048


TRIAL = Trial(
    folder="nowhere", model="tiny", mix="stage2", zero="zero1", checkpointing=CheckpointingConfig(encoder=0.5, llm=1.0),
    tokens=512, packs=2, limit=0.1, steps=1, overrides=("data.num_workers=0",),
)  # fmt: skip


def test_a_child_gets_the_trial_whole_and_gives_its_finding(monkeypatch):
    def child(command, **_):
        assert Trial.parse(command[-2]) == TRIAL
        with open(command[-1], "w") as file:
            json.dump({"fits": False, "reason": "out of memory: 1 GiB"}, file)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(budget.subprocess, "run", child)
    assert budget.attempt_in_child(TRIAL, 10)["reason"] == "out of memory: 1 GiB"


def test_how_a_child_ends_is_told_apart(monkeypatch):
    def ends(code):
        return lambda command, **_: subprocess.CompletedProcess(command, code, "", "Traceback\nValueError: odd\n\n")

    monkeypatch.setattr(budget.subprocess, "run", ends(-signal.SIGKILL))
    assert budget.attempt_in_child(TRIAL, 10) == {"fits": False, "reason": "ended by signal 9"}
    monkeypatch.setattr(budget.subprocess, "run", ends(1))
    with pytest.raises(RuntimeError, match="T = 512: exit code 1: ValueError: odd"):
        budget.attempt_in_child(TRIAL, 10)

    def late(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(budget.subprocess, "run", late)
    assert budget.attempt_in_child(TRIAL, 10)["reason"] == "not done after 10 s"
    assert OUT_OF_MEMORY.search("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")


def test_a_cpu_needs_a_limit(capsys, monkeypatch):
    monkeypatch.setattr(budget.torch.cuda, "is_available", lambda: False)
    assert budget.main(["--model", "tiny"]) == 2
    assert "--limit" in capsys.readouterr().err


@pytest.mark.slow
def test_a_rehearsal_finds_the_edge_of_an_artificial_limit(tmp_path, capsys):
    """Real children, two of them: the tiny model holds less than 0.1 GiB with T = 512, and more with T = 4096."""
    arguments = ["--model", "tiny", "--zero", "zero0", "--limit", "0.1", "--grain", "512", "--largest", "4096"]
    arguments += ["--steps", "1", "--samples", "150", "--step-tokens", "512", "--json", str(tmp_path / "b.json")]
    assert budget.main(arguments) == 0
    written = json.loads((tmp_path / "b.json").read_text())
    tried = {int(tokens): result for tokens, result in written["tried"].items()}
    fitting = max(tokens for tokens, result in tried.items() if result["fits"])
    failing = min(tokens for tokens, result in tried.items() if not result["fits"])
    assert 512 <= fitting < failing <= 4096
    assert failing - fitting <= 512
    assert "out of memory" in tried[failing]["reason"]
    assert tried[fitting]["peak_gib"] <= 0.1
    assert written["figures"]["largest_tokens_that_fit"] == fitting
    assert written["figures"]["frames"] == tried[written["figures"]["tokens"]]["capacities"]["frames"]
    assert f"data.tokens={written['figures']['tokens']} data.frames=" in capsys.readouterr().out
