"""A decoder that crashes or hangs costs one file."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.parallel import run_in_processes
from data_prep.sources import Row
from data_prep.unit import Job, Unit, units
from tests.data_prep.runs import ROOT, session, wait_for

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
        elif file.startswith("once") and not Path(file.removeprefix("once")).exists():
            Path(file.removeprefix("once")).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        elif file.startswith("between"):
            report(done, None)
            os._exit(11)
        elif file.startswith("hang"):
            time.sleep(60)
        elif file.startswith("nap"):
            time.sleep(float(file.removeprefix("nap")))
            read[row.key] = "read"
        elif file.startswith("full"):
            raise OSError(errno.ENOSPC, "No space left on device", "shard.tar")
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


def test_one_death_is_no_files_fault(tmp_path):
    seen, done = run(["a", f"once{tmp_path / '1'}", "b", f"once{tmp_path / '2'}", "c", "crash"], workers=1)
    assert seen == {f"k{i}": "read" for i in range(5)} | {"k5": "decoder_crashed"}
    assert done == 6


def test_deaths_that_no_file_explains_end_the_run():
    with pytest.raises(RuntimeError, match=r"shard 1: .* died 3 times while it read no file \(exit code 11\)"):
        run(["a", "b", "c", "d", "between"], workers=1)


def test_a_mistake_in_the_code_is_not_hidden():
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        run(["a", "bug"], workers=1)


def test_a_full_disk_is_told_as_it_is():
    with pytest.raises(OSError, match=r"No space left on device: 'shard\.tar'") as caught:
        run(["a", "full"], workers=1)
    assert caught.value.errno == errno.ENOSPC


def test_a_source_that_takes_its_time_makes_no_file_late():
    def todo():
        yield Unit(0, (Row("k0", ("nap0.5",)),))
        yield Unit(1, (Row("k1", ("nap1.5",)),))
        time.sleep(3)  # longer than a file may take: what is told meanwhile is still to be heard
        yield Unit(2, (Row("k2", ("a",)),))

    seen = {}
    for _, record in run_in_processes(JOB, todo(), 2, lambda rows: None, seconds_per_file=2.0, work=work):
        seen |= record
    assert seen == {"k0": "read", "k1": "read", "k2": "read"}


def test_a_process_that_hangs_ends_with_a_run_that_is_killed(tmp_path):
    code = (
        "from pathlib import Path\n"
        "from tests.data_prep.test_parallel import JOB, Unit, Row, run_in_processes, work\n"
        f"begun = lambda rows: Path({str(tmp_path / 'begun')!r}).touch()\n"
        "list(run_in_processes(JOB, iter([Unit(0, (Row('a', ('a',)), Row('b', ('hang',))))]), 1, begun, work=work))"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True) as process:
        wait_for((tmp_path / "begun").exists)
        assert len(session(process.pid)) >= 3  # the run, the one that forks, the one that hangs
        process.kill()
    wait_for(lambda: not session(process.pid), seconds=5)
