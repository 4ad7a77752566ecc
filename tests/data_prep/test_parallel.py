"""A decoder that crashes or hangs costs one file."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from data_prep.parallel import run_in_processes
from data_prep.sources import Row
from data_prep.unit import Job, units

JOB = Job(out=Path("unused"), size=56, max_frames=64, tokenizer="tiny", samples_per_shard=3)


def work(job, unit, lost, report):
    """Stands in for `write_unit`: some files are deadly."""
    read = {}
    for done, row in enumerate(unit.rows):
        [file] = row.media
        report(done, file)
        if file in lost:
            read[row.key] = lost[file]
        elif file.startswith("crash"):
            os._exit(11)
        elif file.startswith("hang"):
            time.sleep(60)
        elif file.startswith("bug"):
            raise KeyError("a mistake in the code")
        else:
            read[row.key] = "read"
    return read


def run(files: list[str], workers: int) -> tuple[dict, int]:
    rows = (Row(f"k{i}", (file,)) for i, file in enumerate(files))
    seen, done = {}, []
    for _, record in run_in_processes(JOB, units(rows, 3), workers, done.append, seconds_per_file=2.0, work=work):
        seen |= record
    return seen, sum(done)


def test_deadly_files_are_left_out_and_the_rest_is_done():
    files = ["a", "crash1", "b", "crash2", "crash3", "c", "d", "hang", "e", "f"]
    seen, done = run(files, workers=2)
    special = {1: "decoder_crashed", 3: "decoder_crashed", 4: "decoder_crashed", 7: "decoder_timeout"}
    assert seen == {f"k{i}": special.get(i, "read") for i in range(len(files))}
    assert done == len(files)


def test_a_mistake_in_the_code_is_not_hidden():
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        run(["a", "bug"], workers=1)
