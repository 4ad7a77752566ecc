"""Licence and citation of a run's sources, from preparation's summary to the run's."""

from __future__ import annotations

import json
import logging

import numpy as np
from PIL import Image

from data_prep.prepare import main
from data_prep.sources import SOURCES
from fvlm.data.remote import RemoteShard
from fvlm.data.shard import find_shards
from fvlm.train.describe import source_terms

NOT_STATED = {"licence": "not stated", "citation": "not stated"}


def prepare(folder, *sources: str) -> list:
    """Shards of one picture a source."""
    folder.mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "a.png")
    rows = [{"media": "a.png", "user": "What?", "assistant": f"{i}", "source": name} for i, name in enumerate(sources)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = folder / "shards"
    assert main(["--manifest", str(folder / "rows.jsonl"), "--out", str(out), "--size", "16", "--workers", "1"]) == 0
    return find_shards(out)


def test_what_preparation_states_is_repeated(tmp_path):
    shards = prepare(tmp_path / "first", "openvid", "mine") + prepare(tmp_path / "second", "vript", "mine")
    shards.append(RemoteShard("https://host/shards/0.tar"))
    assert source_terms(shards, ["mine", "openvid", "elsewhere", "vript"]) == {
        "mine": {"licence": "as of the files in the folder", "citation": "not stated"},
        **{
            name: {"licence": SOURCES[name].LICENCE, "citation": SOURCES[name].CITATION}
            for name in ("openvid", "vript")
        },
        "elsewhere": NOT_STATED,
    }


def test_folders_that_disagree_and_files_that_are_others(tmp_path, caplog):
    shards = []
    for name, content in {
        "one": json.dumps({"licences": {"mine": {"licence": "A", "citation": "C"}}}),
        "two": json.dumps({"licences": {"mine": {"licence": "B", "citation": "C"}}}),
        "broken": "{",
        "list": "[]",
        "foreign": json.dumps({"licences": {"mine": "D"}}),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(content)
        shards += [tmp_path / name / "0.tar", tmp_path / name / "1.tar"]
    with caplog.at_level(logging.WARNING):
        assert source_terms(shards, ["mine"]) == {"mine": {"licence": "A; B", "citation": "C"}}
    for name in ("broken", "list", "foreign"):
        assert caplog.text.count(f"{tmp_path / name / 'summary.json'} states no licences") == 1
    assert source_terms([tmp_path / "none" / "0.tar"], ["mine"]) == {"mine": NOT_STATED}
