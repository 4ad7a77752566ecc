"""The benchmark of the plan: the index it draws, and what it writes down."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from benchmarks import plan, plan_index, plan_work
from fvlm.data.chat import load_tokenizer, tokenizer_hash
from fvlm.data.shard import ShardIndex, find_shards, load_index

SAMPLES = 30_000


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_same_seed_draws_the_same_files(tmp_path):
    first = contents(plan_index.draw(tmp_path / "a", 5000, 0, processes=1))
    assert first == contents(plan_index.draw(tmp_path / "b", 5000, 0, processes=2))
    assert first != contents(plan_index.draw(tmp_path / "b", 5000, 1, processes=1))


def test_what_is_half_drawn_is_drawn_anew(tmp_path):
    folder = plan_index.draw(tmp_path, 5000, 0, processes=1)
    before = contents(folder)
    (folder / "drawn.json").unlink()
    (folder / "shard-000000.idx").unlink()
    assert contents(plan_index.draw(tmp_path, 5000, 0, processes=1)) == before


def test_the_index_is_one_of_real_shards_with_the_distribution_it_claims(tmp_path):
    folder = plan_index.draw(tmp_path, SAMPLES, 0, processes=1)
    shards = find_shards(folder)
    indexes = [load_index(shard, load_tokenizer("tiny")) for shard in shards]
    assert sum(map(len, indexes)) == SAMPLES
    assert {index.tokenizer_hash for index in indexes} == {tokenizer_hash(load_tokenizer("tiny"))}
    kinds = np.concatenate([index.kind for index in indexes])
    assert abs((kinds == 3).mean() - 0.14) < 0.001
    of_cauldron = sum(len(index) for index in indexes if index.source_names == ("cauldron",))
    assert abs(of_cauldron / SAMPLES - 2.0 / 4.222) < 0.001
    assert all(isinstance(index, ShardIndex) and index._is_consistent() for index in indexes)


def test_figures_are_flat_and_complete(tmp_path, monkeypatch, capsys):
    """With the work done in this process, as fresh ones take long to start."""

    def here(arguments):
        place = (Path(arguments[name]) for name in ("folder", "cache"))
        return plan_work.work(*place, arguments["seed"], arguments["planned"])

    monkeypatch.setattr(plan, "_in_fresh_process", here)
    file = tmp_path / "plan.json"
    arguments = ["--folder", str(tmp_path), "--samples", str(SAMPLES), "--resumes", "1", "--json", str(file)]
    assert plan.main(arguments) == 0
    written = json.loads(file.read_text())
    figures = {name.removeprefix("0.03M/"): value for name, value in written["figures"].items()}
    assert set(plan.LIMITS) <= set(figures)
    assert figures["shards"] == len(list((tmp_path / f"index-{SAMPLES}-0").glob("*.tar")))
    assert all(isinstance(value, (int, float)) and value > 0 for value in figures.values())
    assert figures["first_pack_table_s"] < figures["first_pack_s"]
    assert figures["resident_mib_max"] >= figures["private_mib_max"] > figures["private_growth_mib_max"]
    assert 0.8 < figures["fill_tokens"] <= 1
    assert {"command", "commit", "versions", "hardware"} <= set(written)
    assert "fill_tokens" in capsys.readouterr().out
    table = sum(path.stat().st_size for path in (tmp_path / f"cache-{SAMPLES}-0").rglob("*") if path.is_file())
    assert figures["table_mib"] == table / 2**20


def test_too_small_a_size_is_refused(tmp_path, capsys):
    assert plan.main(["--folder", str(tmp_path), "--samples", "100"]) == 1
    assert "at least 20 000" in capsys.readouterr().err
